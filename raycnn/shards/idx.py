"""The MNIST family's IDX files (format: http://yann.lecun.com/exdb/mnist)."""

import functools
import gzip
import io
import math
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from raycnn.errors import DataError, one_line
from raycnn.shards.collection import SPLIT_NAMES, SPLITS, Excludes, Sample, Slice
from raycnn.shards.containers import whole_object_errors
from raycnn.shards.objects import ObjectCollection
from raycnn.storage import Entry, Store


class IdxCollection(ObjectCollection):
    """The MNIST family: `*-images-idx3-ubyte` with `*-labels-idx1-ubyte`, gzipped or not. Images become PNG."""

    def __init__(self, store: Store, reason: str, files: list[Entry], names: tuple[str, ...]) -> None:
        super().__init__(store, "IDX", reason)
        images = [e.path for e in files if "-images" in e.path]
        self._labels = {path: _idx_labels(store, path, files) for path in images}
        highest = max((max(labels, default=-1) for labels in self._labels.values()), default=-1)
        if names and highest >= len(names):
            raise DataError(
                f"{store.address()}/classes.txt: {len(names)} names, but there are labels up to {highest}; "
                "name every class, one a line"
            )
        self.class_names = names or tuple(str(i) for i in range(highest + 1))
        found = {_idx_split(path) for path in images}
        self.splits = tuple(s for s in SPLITS if s in found)

    def split_of(self, piece: Slice) -> str | None:
        return _idx_split(piece.path)

    def slices(self, skipped: Counter[str], exclude: Sequence[str] = ()) -> Iterator[Slice]:
        excludes = Excludes(exclude)
        for entry in self.objects(skipped, excludes):
            if entry.path not in self._labels:
                continue
            images = _idx_images(self.store, entry.path, entry.etag)
            pixels = images.shape[1] * images.shape[2]
            for i, label in enumerate(self._labels[entry.path]):
                yield Slice(f"{entry.path}#{i}", entry.path, entry.size, entry.etag, i, 1, i, pixels, label)
        excludes.check(self, having="#")

    def read(self, slices: Sequence[Slice]) -> Iterator[Sample]:
        for piece in slices:
            with whole_object_errors(self.store.address(piece.path)):
                images = _idx_images(self.store, piece.path, piece.etag)
            png = io.BytesIO()
            Image.fromarray(images[piece.first]).save(png, "PNG", compress_level=1)
            yield Sample(piece.key, png.getvalue(), piece.label if piece.label >= 0 else None)


def _idx_split(path: str) -> str | None:
    word = path.rpartition("/")[2].split("-")[0]
    return "test" if word == "t10k" else SPLIT_NAMES.get(word)


def _idx_labels(store: Store, images: str, files: list[Entry]) -> list[int]:
    count = len(_parse_idx(store.get(images), store.address(images), 3))
    wanted = images.removesuffix(".gz").replace("-images", "-labels").replace("idx3", "idx1")
    for entry in files:
        if entry.path.removesuffix(".gz") == wanted:
            labels = _parse_idx(store.get(entry.path), store.address(entry.path), 1).tolist()
            if len(labels) != count:
                raise DataError(f"{store.address(entry.path)}: {len(labels)} labels for {count} images")
            return labels
    return [-1] * count


def _parse_idx(data: bytes, where: str, dimensions: int) -> np.ndarray:
    """An IDX file of unsigned bytes as an array."""
    if where.endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{where}: damaged: {one_line(error)[:200]}; restore it") from None
    start = 4 + 4 * dimensions
    if data[:4] != bytes((0, 0, 8, dimensions)):
        raise DataError(f"{where}: not an IDX file of unsigned bytes in {dimensions} dimension(s); restore it")
    shape = struct.unpack_from(f">{dimensions}I", data, 4) if len(data) >= start else ()
    if not shape or math.prod(shape) != len(data) - start:
        raise DataError(f"{where}: {len(data)} bytes, where its header announces another size; restore it")
    if dimensions > 1 and not math.prod(shape[1:]):
        raise DataError(f"{where}: its images have no pixels; restore it")
    return np.frombuffer(data, np.uint8)[start:].reshape(shape)


@functools.lru_cache(maxsize=4)
def _idx_images(store: Store, path: str, etag: str) -> np.ndarray:
    return _parse_idx(store.get(path, if_match=etag), store.address(path), 3)
