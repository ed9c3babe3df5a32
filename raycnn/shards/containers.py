"""Layouts in which one object holds many images: Parquet, tar, IDX."""

import functools
import gzip
import io
import json
import struct
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from raycnn.config import MIB
from raycnn.errors import DataError, ObjectChanged, ObjectMissing
from raycnn.shards.collection import (
    SPLIT_NAMES,
    SPLITS,
    UNIT_ROWS,
    Collection,
    Sample,
    Slice,
    is_image_name,
    natural_order,
)
from raycnn.shards.objects import LABEL_COLUMNS, ObjectCollection, parquet_file
from raycnn.storage import Entry, Store

IMAGE_COLUMNS = ("image", "img", "bytes", "encoded", "jpg", "png")
RUN_BYTES = 32 * MIB
"""What lies together in a tar and is mixed with other such runs as a whole."""
COALESCE_BYTES = 8 * MIB
"""Tar members that lie together are fetched in ranges of up to this size."""


class ParquetCollection(Collection):
    """Parquet files with encoded images in a binary column or in a struct{bytes, path} (Hugging Face)."""

    layout = "Parquet"
    random_access = False

    _prefix = ""

    def __init__(self, store: Store, reason: str, class_names: tuple[str, ...] | None = None) -> None:
        """Look at the files' names and at one footer; with `class_names` the labels need not be looked through."""
        super().__init__(store)
        self.reason = reason
        files = [e for e in self.objects(Counter()) if e.path.endswith(".parquet")]
        if not files:
            raise DataError(f"{store.url}: no Parquet file with images")
        schema = parquet_file(store, files[0].path, files[0].etag).schema_arrow
        self._image = _image_column(schema, files[0].path)
        self._label = next((c for c in LABEL_COLUMNS if c in schema.names), None)
        named = _hugging_face_names(schema, self._label) if self._label else ()
        self._by_position = bool(named)
        self._name_classes(class_names if class_names is not None else named or self._find_class_names(files))
        found = {_split_in_name(entry.path) for entry in files}
        self.splits = tuple(s for s in SPLITS if s in found)

    def _name_classes(self, names: tuple[str, ...]) -> None:
        self.class_names = names
        self._index = {name: i for i, name in enumerate(names)}

    def _find_class_names(self, files: list[Entry]) -> tuple[str, ...]:
        if self._label is None:
            return ()
        found: set[str] = set()
        for entry in files:
            table = parquet_file(self.store, entry.path, entry.etag).read(columns=[self._label])
            found.update(str(value) for value in table[0].unique().to_pylist() if value is not None)
        return natural_order(found)

    def split_of(self, piece: Slice) -> str | None:
        return _split_in_name(piece.path)

    def slices(self, skipped: Counter[str], exclude: Sequence[str] = ()) -> Iterator[Slice]:
        for entry in self.objects(skipped, exclude, self._prefix):
            if not entry.path.endswith(".parquet"):
                skipped["not Parquet"] += 1
                continue
            metadata = parquet_file(self.store, entry.path, entry.etag).metadata
            first = 0
            for group in range(metadata.num_row_groups):
                rows = metadata.row_group(group).num_rows
                size = _stored_bytes(metadata.row_group(group))
                for start in range(0, rows, UNIT_ROWS):
                    count = min(UNIT_ROWS, rows - start)
                    share = size * count // max(rows, 1)
                    yield Slice("", entry.path, entry.size, entry.etag, first + start, count, 0, share, -1)
                first += rows

    def read(self, slices: Sequence[Slice]) -> Iterator[Sample]:
        for (path, etag), run in groupby(slices, key=lambda s: (s.path, s.etag)):
            with _whole_object_errors(f"{self.store.url}/{path}"):
                file = pq.ParquetFile(self.store.open(path, if_match=etag), pre_buffer=True)
                for piece in run:
                    yield from self._rows(file, piece)

    def _rows(self, file: pq.ParquetFile, piece: Slice) -> Iterator[Sample]:
        columns = [c for c in ("key", self._image, self._label) if c and c in file.schema_arrow.names]
        for start, batch in _row_range(file, columns, piece.first, piece.rows):
            images = batch[self._image]
            encoded = (
                pc.call_function("struct_field", [images], pc.StructFieldOptions(indices=["bytes"]))
                if pa.types.is_struct(images.type)
                else images
            )
            keys = batch["key"].to_pylist() if "key" in columns else None
            labels = batch[self._label].to_pylist() if self._label else [None] * len(batch)
            for i, (value, label) in enumerate(zip(encoded, labels, strict=True)):
                key = keys[i] if keys else f"{piece.path}#{start + i}"
                yield Sample(key, value.as_py(), self._class_index(label))

    def _class_index(self, label: Any) -> int | None:
        if label is None or not self._by_position:
            return None if label is None else self._index.get(str(label))
        if isinstance(label, int):
            return label if 0 <= label < len(self.class_names) else None
        return self._index.get(str(label))


class TarCollection(ObjectCollection):
    """WebDataset tars: `name.jpg` with `name.cls` (an index or a name) or `name.json` ({"label": ...}).

    Members are streamed or fetched by range, never extracted. A gzipped tar is streamed from its start by each of
    its readers.
    """

    random_access = False

    def __init__(
        self, store: Store, reason: str, names: tuple[str, ...], class_names: tuple[str, ...] | None = None
    ) -> None:
        """Take the names in `classes.txt` or, where there is none, look through the labels of all tars.

        Args:
            store: Where the tars are.
            reason: What they were recognised by.
            names: The lines of `classes.txt`; numbers in `.cls` files are indices of them.
            class_names: What an earlier look has found, so that the tars need not be looked through again.
        """
        super().__init__(store, "WebDataset tar", reason)
        tars = [e for e in self.objects(Counter()) if _is_tar(e.path)]
        found = {_split_in_name(e.path) for e in tars}
        self.splits = tuple(s for s in SPLITS if s in found)
        self._names_by_index = names
        if class_names is None and not names:
            names = natural_order(m.label for e in tars for m in _members(self.store, e) if m.label)
        self.class_names = names if class_names is None else class_names
        self._index = {name: i for i, name in enumerate(self.class_names)}

    def split_of(self, piece: Slice) -> str | None:
        return _split_in_name(piece.path)

    def run_of(self, piece: Slice) -> str:
        return piece.path if piece.path.endswith("gz") else f"{piece.path}#{piece.offset // RUN_BYTES}"

    def slices(self, skipped: Counter[str], exclude: Sequence[str] = ()) -> Iterator[Slice]:
        for entry in self.objects(skipped, exclude):
            if not _is_tar(entry.path):
                skipped["not tar"] += 1
                continue
            for i, member in enumerate(_members(self.store, entry)):
                key = f"{entry.path}#{i}:{member.name}"
                label = self._class_index(member.label)
                yield Slice(key, entry.path, entry.size, entry.etag, i, 1, member.offset, member.size, label)

    def _class_index(self, label: str) -> int:
        if label.isdecimal() and self._names_by_index:
            return int(label) if int(label) < len(self.class_names) else -1
        return self._index.get(label, -1)

    def read(self, slices: Sequence[Slice]) -> Iterator[Sample]:
        for (path, etag), run in groupby(slices, key=lambda s: (s.path, s.etag)):
            with _whole_object_errors(f"{self.store.url}/{path}"):
                if path.endswith("gz"):
                    yield from self._read_gzipped(path, etag, list(run))
                else:
                    for together in _coalesce(run):
                        yield from self._read_range(path, etag, together)

    def _read_range(self, path: str, etag: str, members: list[Slice]) -> Iterator[Sample]:
        start = members[0].offset
        length = members[-1].offset + members[-1].bytes - start
        data = self.store.get_ranges(path, [(start, length)], if_match=etag)[0] if length else b""
        for m in members:
            encoded = bytes(data[m.offset - start : m.offset - start + m.bytes])
            yield Sample(m.key, encoded, m.label if m.label >= 0 else None)

    def _read_gzipped(self, path: str, etag: str, members: list[Slice]) -> Iterator[Sample]:
        wanted = {m.first: m for m in members}
        with tarfile.open(fileobj=self.store.stream(path, if_match=etag), mode="r|gz") as tar:
            images = (m for m in tar if m.isreg() and is_image_name(m.name))
            for i, info in enumerate(images):
                if (m := wanted.pop(i, None)) is not None:
                    file = tar.extractfile(info)
                    yield Sample(m.key, file.read() if file else b"", m.label if m.label >= 0 else None)
                if not wanted:
                    return


class IdxCollection(ObjectCollection):
    """The MNIST family: `*-images-idx3-ubyte` with `*-labels-idx1-ubyte`, gzipped or not. Images become PNG."""

    def __init__(self, store: Store, reason: str, files: list[Entry], names: tuple[str, ...]) -> None:
        super().__init__(store, "IDX", reason)
        self._files = {e.path: e for e in files if "-images" in e.path}
        self._labels = {path: _idx_labels(store, path, files) for path in self._files}
        highest = max((max(labels, default=-1) for labels in self._labels.values()), default=-1)
        self.class_names = names or tuple(str(i) for i in range(highest + 1))
        found = {_idx_split(path) for path in self._files}
        self.splits = tuple(s for s in SPLITS if s in found)

    def split_of(self, piece: Slice) -> str | None:
        return _idx_split(piece.path)

    def slices(self, skipped: Counter[str], exclude: Sequence[str] = ()) -> Iterator[Slice]:
        for path, entry in sorted(self._files.items()):
            images = _idx_images(self.store, path, entry.etag)
            pixels = images.shape[1] * images.shape[2]
            for i, label in enumerate(self._labels[path]):
                yield Slice(f"{path}#{i}", path, entry.size, entry.etag, i, 1, i, pixels, label)

    def read(self, slices: Sequence[Slice]) -> Iterator[Sample]:
        for piece in slices:
            with _whole_object_errors(f"{self.store.url}/{piece.path}"):
                images = _idx_images(self.store, piece.path, piece.etag)
            png = io.BytesIO()
            Image.fromarray(images[piece.first]).save(png, "PNG", compress_level=1)
            yield Sample(piece.key, png.getvalue(), piece.label if piece.label >= 0 else None)


class _whole_object_errors:  # noqa: N801 (reads as a statement)
    """An object that holds many images and cannot be read whole stops the verb, with one line."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ObjectMissing):
            raise DataError(
                f"{self._where} is gone since it was listed; restore it, or label to a new output"
            ) from None
        if isinstance(error, ObjectChanged):
            raise DataError(
                f"{self._where} was replaced since it was listed; label to a new output, or restore it"
            ) from None
        if isinstance(error, pa.ArrowInvalid | tarfile.TarError | EOFError | gzip.BadGzipFile):
            raise DataError(f"{self._where}: damaged: {_line(error)}") from None


class _Member(NamedTuple):
    name: str
    offset: int
    size: int
    label: str


def _members(store: Store, entry: Entry) -> Iterator[_Member]:
    """The images of a tar in order, each with the label that stands beside it; bodies of images are skipped."""
    gzipped = entry.path.endswith("gz")
    source = store.stream(entry.path, if_match=entry.etag) if gzipped else store.open(entry.path, if_match=entry.etag)
    waiting: list[_Member] = []
    label, stem = "", None
    with (
        _whole_object_errors(f"{store.url}/{entry.path}"),
        source,
        tarfile.open(fileobj=source, mode="r|gz" if gzipped else "r:") as tar,
    ):
        for info in tar:
            if not info.isreg():
                continue
            if _stem(info.name) != stem:
                yield from (m._replace(label=label) for m in waiting)
                waiting, label, stem = [], "", _stem(info.name)
            if is_image_name(info.name):
                waiting.append(_Member(_printable(info.name), info.offset_data, info.size, ""))
            elif _suffix(info.name) in ("cls", "json") and info.size < 65536:
                file = tar.extractfile(info)
                label = _label_text(_suffix(info.name), file.read() if file else b"") or label
    yield from (m._replace(label=label) for m in waiting)


def _coalesce(run: Iterator[Slice]) -> Iterator[list[Slice]]:
    """Consecutive members whose bytes lie within 64 KiB of each other, at most 8 MiB together."""
    together: list[Slice] = []
    for piece in run:
        if together:
            gap = piece.offset - (together[-1].offset + together[-1].bytes)
            if not 0 <= gap <= 65536 or piece.offset + piece.bytes - together[0].offset > COALESCE_BYTES:
                yield together
                together = []
        together.append(piece)
    if together:
        yield together


def _label_text(suffix: str, data: bytes) -> str:
    text = data.decode("utf-8", "replace").strip()
    if suffix == "cls":
        return text
    try:
        value = json.loads(text)
    except ValueError:
        return ""
    label = value.get("label", "") if isinstance(value, dict) else ""
    return str(label) if isinstance(label, int | str) else ""


def _row_range(file: pq.ParquetFile, columns: list[str], first: int, rows: int) -> Iterator[tuple[int, pa.Table]]:
    """(index of the first row, table) for each row group's share of the rows [first, first + rows)."""
    start = 0
    for group in range(file.metadata.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        low, high = max(first, start), min(first + rows, start + count)
        if low < high:
            table = file.read_row_group(group, columns=columns)
            yield low, table.slice(low - start, high - low)
        start += count


def _stored_bytes(group: Any) -> int:
    return sum(group.column(i).total_compressed_size for i in range(group.num_columns))


def _image_column(schema: pa.Schema, path: str) -> str:
    def holds_bytes(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    for name in (*IMAGE_COLUMNS, *schema.names):
        if name in schema.names and holds_bytes(schema.field(name).type):
            return name
    raise DataError(f"{path}: no column with encoded images among {schema.names}")


def _hugging_face_names(schema: pa.Schema, column: str) -> tuple[str, ...]:
    """The names of a Hugging Face ClassLabel column, from the schema's metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(features[column]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


def _split_in_name(path: str) -> str | None:
    """The split in `train-00000-of-00004.parquet`, `train_000.tar` or `train/part.parquet`."""
    *folders, name = path.split("/")
    word = name.replace("_", "-").split("-")[0].split(".")[0]
    return SPLIT_NAMES.get(word) or next((SPLIT_NAMES[f] for f in folders if f in SPLIT_NAMES), None)


def _idx_split(path: str) -> str | None:
    word = path.rpartition("/")[2].split("-")[0]
    return "test" if word == "t10k" else SPLIT_NAMES.get(word)


def _idx_labels(store: Store, images: str, files: list[Entry]) -> list[int]:
    wanted = images.removesuffix(".gz").replace("-images", "-labels").replace("idx3", "idx1")
    for entry in files:
        if entry.path.removesuffix(".gz") == wanted:
            count = len(_idx(store, images))
            labels = _idx(store, entry.path).tolist()
            if len(labels) != count:
                raise DataError(f"{store.url}/{entry.path}: {len(labels)} labels for {count} images")
            return labels
    return [-1] * len(_idx(store, images))


def _idx(store: Store, path: str) -> np.ndarray:
    """An IDX file of unsigned bytes as an array (format: http://yann.lecun.com/exdb/mnist)."""
    return _parse_idx(store.get(path), f"{store.url}/{path}")


def _parse_idx(data: bytes, where: str) -> np.ndarray:
    if where.endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError) as error:
            raise DataError(f"{where}: damaged: {_line(error)}") from None
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise DataError(f"{where}: not an IDX file of unsigned bytes")
    shape = struct.unpack_from(f">{data[3]}I", data, 4)
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if body.size != int(np.prod(shape)):
        raise DataError(f"{where}: {body.size} bytes of data where {shape} were announced")
    return body.reshape(shape)


@functools.lru_cache(maxsize=4)
def _idx_images(store: Store, path: str, etag: str) -> np.ndarray:
    return _parse_idx(store.get(path, if_match=etag), f"{store.url}/{path}")


def _is_tar(path: str) -> bool:
    return path.endswith((".tar", ".tar.gz", ".tgz"))


def _stem(name: str) -> str:
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.split('.', 1)[0]}"


def _suffix(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _printable(name: str) -> str:
    return name.encode("utf-8", "replace").decode("utf-8")


def _line(error: BaseException | None) -> str:
    return " ".join(str(error).split())[:200]
