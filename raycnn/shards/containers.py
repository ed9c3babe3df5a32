"""Layouts in which one object holds many images: what they share, and tars."""

import gzip
import json
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import groupby
from tarfile import HeaderError, ReadError
from typing import NamedTuple, Self

import pyarrow as pa

from raycnn.config import MIB
from raycnn.errors import DataError, ObjectChanged, ObjectMissing, one_line
from raycnn.shards.collection import (
    SPLIT_NAMES,
    SPLITS,
    Excludes,
    Sample,
    Slice,
    natural_order,
    too_large,
)
from raycnn.shards.objects import ObjectCollection
from raycnn.storage import Entry, Store

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
RUN_BYTES = 32 * MIB
"""What lies together in a tar and is mixed with other such runs as a whole."""
COALESCE_BYTES = 8 * MIB
"""Tar members that lie together are fetched in ranges of up to this size."""
LABEL_BYTES = 65536
"""Largest member that is read for a label."""

_SIDE_SUFFIXES = (
    *(".caption", ".cbor", ".cls", ".cls2", ".csv", ".html", ".id", ".index", ".inx", ".jsn", ".json", ".jsonl"),
    *(".md", ".mp", ".msg", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth", ".pyd", ".tb", ".ten", ".text"),
    *(".transcript", ".tsv", ".txt", ".xml", ".yaml", ".yml"),
)
"""What tars hold beside their images, as WebDataset writes them. All else counts as an image, whatever its name."""


@contextmanager
def whole_object_errors(where: str) -> Iterator[None]:
    """An object that holds many images and cannot be read whole stops the verb, with one line."""
    try:
        yield
    except ObjectMissing:
        raise DataError(f"{where} is gone since it was listed; restore it, or label to a new output") from None
    except ObjectChanged:
        raise DataError(f"{where} was replaced since it was listed; label to a new output, or restore it") from None
    except (pa.ArrowException, tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DataError(f"{where}: damaged: {one_line(error)[:200]}; restore it, or move it elsewhere") from None


def split_in_name(path: str) -> str | None:
    """The split in `train-00000-of-00004.parquet`, `train_000.tar` or `train/part.parquet`."""
    *folders, name = path.split("/")
    word = name.replace("_", "-").split("-")[0].split(".")[0]
    return SPLIT_NAMES.get(word) or next((SPLIT_NAMES[f] for f in folders if f in SPLIT_NAMES), None)


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
        found = {split_in_name(e.path) for e in tars}
        self.splits = tuple(s for s in SPLITS if s in found)
        self._names_by_index = names
        if class_names is None and not names:
            names = natural_order(m.label for e in tars for m in _members(self.store, e, Counter()) if m.label)
        self.class_names = names if class_names is None else class_names
        self._index = {name: i for i, name in enumerate(self.class_names)}

    def split_of(self, piece: Slice) -> str | None:
        return split_in_name(piece.path)

    def run_of(self, piece: Slice) -> str:
        return piece.path if piece.path.endswith("gz") else f"{piece.path}#{piece.offset // RUN_BYTES}"

    def slices(self, skipped: Counter[str], exclude: Sequence[str] = ()) -> Iterator[Slice]:
        excludes = Excludes(exclude)
        for entry in self.objects(skipped, excludes):
            if not _is_tar(entry.path):
                skipped["not tar"] += 1
                continue
            for i, member in enumerate(_members(self.store, entry, skipped)):
                key = f"{entry.path}#{i}:{member.name}"
                label = self._class_index(member.label)
                yield Slice(key, entry.path, entry.size, entry.etag, i, 1, member.offset, member.size, label)
        excludes.check(self, having="#")

    def _class_index(self, label: str) -> int:
        if label.isdecimal() and self._names_by_index:
            return int(label) if int(label) < len(self.class_names) else -1
        return self._index.get(label, -1)

    def read(self, slices: Sequence[Slice]) -> Iterator[Sample]:
        for (path, etag), run in groupby(slices, key=lambda s: (s.path, s.etag)):
            with whole_object_errors(self.store.address(path)):
                if path.endswith("gz"):
                    yield from self._read_gzipped(path, etag, list(run))
                else:
                    for together in _coalesce(run):
                        yield from self._read_range(path, etag, together)

    def _read_range(self, path: str, etag: str, members: list[Slice]) -> Iterator[Sample]:
        start = members[0].offset
        length = members[-1].offset + members[-1].bytes - start
        # A member that is too large shares its range with no other.
        fetched = length and not (len(members) == 1 and too_large(length))
        data = self.store.get_ranges(path, [(start, length)], if_match=etag)[0] if fetched else b""
        for m in members:
            yield _sample(m, data[m.offset - start : m.offset - start + m.bytes])

    def _read_gzipped(self, path: str, etag: str, members: list[Slice]) -> Iterator[Sample]:
        wanted = {m.first: m for m in members}
        with _open_tar(self.store, path, etag) as tar:
            for i, info in enumerate(info for info in _headers(tar) if _is_image(info)):
                if (m := wanted.pop(i, None)) is not None:
                    file = None if too_large(m.bytes) else tar.extractfile(info)
                    yield _sample(m, file.read() if file else b"")
                if not wanted:
                    return


def _sample(member: Slice, encoded: bytes) -> Sample:
    label = member.label if member.label >= 0 else None
    if bad := too_large(member.bytes):
        return Sample(member.key, None, label, bad)
    return Sample(member.key, encoded, label)


class _Tar(tarfile.TarFile):
    """A tar that is read to its end; those that lie one behind the other in an object are read as one."""

    members: list[tarfile.TarInfo]
    at_end = False
    """Whether the last block was of zeros, as they stand at the end of a tar."""


_Zeros: type[HeaderError] = tarfile.EOFHeaderError  # pyright: ignore[reportAttributeAccessIssue]
_Nothing: type[HeaderError] = tarfile.EmptyHeaderError  # pyright: ignore[reportAttributeAccessIssue]


class _Header(tarfile.TarInfo):
    """A header that must be one: `tarfile` takes a damaged, cut or missing header for the end of the tar."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> Self:
        assert isinstance(tarfile, _Tar)
        try:
            header = super().fromtarfile(tarfile)
        except _Zeros:
            tarfile.at_end = True
            raise
        except (HeaderError, ValueError) as error:
            if tarfile.at_end and isinstance(error, _Nothing):
                raise
            what = "its end is missing" if isinstance(error, _Nothing) else error
            raise ReadError(f"{what}, at byte {tarfile.offset}") from None
        tarfile.at_end = False
        return header


@contextmanager
def _open_tar(store: Store, path: str, etag: str) -> Iterator[_Tar]:
    """A tar from its start: unpacked as a stream where it is gzipped, else only what is read is fetched."""
    with ExitStack() as stack:
        if path.endswith("gz"):
            stream = stack.enter_context(store.stream(path, if_match=etag))
            # GzipFile goes on to the next member, and notices an end that is missing; tarfile's own does neither.
            source, mode = stack.enter_context(gzip.GzipFile(fileobj=stream, mode="rb")), "r|"
        else:
            source, mode = stack.enter_context(store.open(path, if_match=etag)), "r:"
        tar = _Tar.open(fileobj=source, mode=mode, tarinfo=_Header, ignore_zeros=True)
        yield stack.enter_context(tar)


def _headers(tar: _Tar) -> Iterator[tarfile.TarInfo]:
    while (info := tar.next()) is not None:
        # It would remember every member.
        tar.members.clear()
        yield info


def _is_image(info: tarfile.TarInfo) -> bool:
    is_file = info.isreg() and not info.issparse()
    return is_file and not _is_hidden_member(info.name) and not info.name.lower().endswith(_SIDE_SUFFIXES)


def _is_hidden_member(name: str) -> bool:
    """Whether a part of the name starts with a dot; `./` is none, and cameras write names that start with `_`."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


class _Member(NamedTuple):
    name: str
    offset: int
    size: int
    label: str


def _members(store: Store, entry: Entry, skipped: Counter[str]) -> Iterator[_Member]:
    """The images of a tar in order, each with the label that stands beside it; bodies of images are skipped."""
    waiting: list[_Member] = []
    label, stem = "", None
    with (
        whole_object_errors(store.address(entry.path)),
        _open_tar(store, entry.path, entry.etag) as tar,
    ):
        for info in _headers(tar):
            if info.isdir():
                continue
            if _is_image(info) or _holds_label(info):
                if _stem(info.name) != stem:
                    yield from (m._replace(label=label) for m in waiting)
                    waiting, label, stem = [], "", _stem(info.name)
                if _is_image(info):
                    waiting.append(_Member(_printable(info.name), info.offset_data, info.size, ""))
                else:
                    file = tar.extractfile(info)
                    label = _label_text(_suffix(info.name), file.read() if file else b"") or label
            else:
                skipped[_why_left_out(info)] += 1
    yield from (m._replace(label=label) for m in waiting)


def _holds_label(info: tarfile.TarInfo) -> bool:
    is_label = _suffix(info.name) in ("cls", "json") and info.size < LABEL_BYTES
    return info.isreg() and is_label and not _is_hidden_member(info.name)


def _why_left_out(info: tarfile.TarInfo) -> str:
    if info.issparse():
        return "sparse files in tars"
    if not info.isreg():
        return "links in tars"
    return "hidden" if _is_hidden_member(info.name) else "side files in tars"


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


def _is_tar(path: str) -> bool:
    return path.endswith(TAR_SUFFIXES)


def _stem(name: str) -> str:
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.split('.', 1)[0]}"


def _suffix(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _printable(name: str) -> str:
    return name.encode("utf-8", "replace").decode("utf-8")
