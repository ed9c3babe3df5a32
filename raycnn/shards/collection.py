"""What every layout has in common: pinned slices of objects on one side, samples on the other."""

import fnmatch
import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from raycnn.config import MIB, Limits
from raycnn.errors import Bad, DataError, Status
from raycnn.storage import Entry, Store

UNIT_ROWS = 2048
UNIT_BYTES = 128 * MIB
FIRST_ROWS = 256
FIRST_BYTES = 16 * MIB
SHARE = 16

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
    "holdout": "test",
}
"""Folder and file names that mean a split."""

IMAGE_SUFFIXES = frozenset(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm"))

_MAX_BYTES = Limits.model_validate({}).max_bytes


class Slice(NamedTuple):
    """A run of samples within one object, pinned to the version that was listed.

    A single image, a tar member or an IDX row is a slice of one row with its key; a run of Parquet rows is a
    slice of many rows whose keys are in the file, and `offset` the first row of their row group.
    """

    key: str
    path: str
    size: int
    etag: str
    first: int
    rows: int
    offset: int
    bytes: int
    label: int


class Sample(NamedTuple):
    """One image of a collection: its stable name, its bytes or why there are none, and its class index."""

    key: str
    encoded: bytes | None
    label: int | None
    bad: Bad | None = None


class Collection(ABC):
    """Images under one URL in one layout. Picklable, so that a Ray worker reads what the driver planned."""

    layout: str
    reason: str
    random_access: bool = True
    """Whether single rows can be read at no more than their own cost, so that they can be mixed by listing."""
    names_rows: bool = False
    """Whether the keys stand inside of the objects, so that an object's name says nothing of them."""
    accept_unreadable: bool = False
    """Whether an object that is missing or altered is planned, where a manifest says what it held; or refused."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.class_names: tuple[str, ...] = ()
        self.splits: tuple[str, ...] = ()

    @abstractmethod
    def slices(self, skipped: Counter[str], exclude: Sequence[str] = ()) -> Iterator[Slice]:
        """Every sample once, in byte order of (path, first), streamed; what is left out is counted in `skipped`.

        Args:
            skipped: Counts what is left out, by the reason.
            exclude: Glob patterns of objects' paths. They leave out whole objects, however many images one holds.
        """

    @abstractmethod
    def read(self, slices: Sequence[Slice]) -> Iterator[Sample]:
        """The samples of the slices, in order. A missing or replaced single image becomes a `Bad` sample.

        Raises:
            DataError: an object that holds many images is missing, was replaced, or cannot be parsed.
        """

    def keys(self, piece: Slice) -> Iterator[str]:
        """The keys of a slice, without its images."""
        yield piece.key

    def split_of(self, piece: Slice) -> str | None:
        """The split that the layout itself names for the slice, or None where it names none."""
        return None

    def run_of(self, piece: Slice) -> str:
        """Names the run of rows that is read in one go and holds the slice; such runs are what can be mixed."""
        return f"{piece.path}#{piece.first}"

    def select(self, split: str, skipped: Counter[str], exclude: Sequence[str] = ()) -> Iterator[Slice]:
        """The slices of one split, or of all."""
        self.check_split(split)
        pieces = self.slices(skipped, exclude)
        yield from pieces if split == "all" else (piece for piece in pieces if self.split_of(piece) == split)

    def check_split(self, split: str) -> None:
        """Refuse a split that the layout does not name.

        Raises:
            DataError: with those that it does.
        """
        if split != "all" and split not in self.splits:
            have = ", ".join(self.splits) or "none; use all, or pack it first"
            raise DataError(f"{self.store.address()}: no split {split!r} in this {self.layout}; its splits: {have}")

    def objects(self, skipped: Counter[str], excludes: "Excludes | None" = None, prefix: str = "") -> Iterator[Entry]:
        """The objects that count as images or shards: no folder markers, no hidden names, nothing excluded."""
        for entry in self.store.list(prefix):
            if is_hidden(entry.path):
                skipped["hidden"] += 1
            elif not is_text(entry.path):
                skipped["not UTF-8"] += 1
            elif excludes and excludes.match(entry.path):
                skipped["excluded"] += 1
            else:
                yield entry


class Excludes:
    """The glob patterns of objects that are left out, and which of them have matched."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._patterns, self._unused = tuple(patterns), set(patterns)

    def match(self, path: str) -> bool:
        """Whether any pattern matches; `*` matches `/` too."""
        if not self._patterns:
            return False
        matching = [p for p in self._patterns if fnmatch.fnmatchcase(path, p)]
        self._unused.difference_update(matching)
        return bool(matching)

    def check(self, collection: Collection, having: str = "") -> None:
        """Where objects hold many images, refuse a pattern that was meant for keys: it has left out nothing.

        Args:
            collection: What was listed.
            having: Only patterns with this in them. Any other may be for an object that has been deleted since.

        Raises:
            DataError: a pattern matches no object.
        """
        for pattern in sorted(p for p in self._unused if having in p):
            raise DataError(
                f"{collection.store.address()}: --exclude {pattern!r} matches no object; in this "
                f"{collection.layout} it leaves out whole objects by their path, not images by their key"
            )


def is_hidden(path: str) -> bool:
    """Folder markers, and names of which any part starts with a dot or an underscore."""
    return path.startswith((".", "_")) or "/." in path or "/_" in path or path.endswith("/")


def path_order(path: str) -> bytes:
    """What paths are sorted by, as S3 lists them."""
    return path.encode("utf-8", "surrogateescape")


def is_text(path: str) -> bool:
    """Whether a name is UTF-8. S3 lists keys that are not, but they can neither be written down nor asked for."""
    return path.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in path)


def is_image_name(path: str) -> bool:
    """Whether a name ends as those of images do. It tells images from what lies beside them, never what they are."""
    return path.rpartition(".")[2].lower() in IMAGE_SUFFIXES


def too_large(size: int) -> Bad | None:
    """Why an encoded image of this size is not even fetched, or None where it is."""
    if size <= _MAX_BYTES:
        return None
    return Bad(Status.TOO_LARGE, f"{size} bytes, the limit is {_MAX_BYTES}")


def units(slices: Iterable[Slice]) -> Iterator[list[Slice]]:
    """Consecutive slices grouped into units of at most 2,048 rows and 128 MiB (one larger image is a unit).

    The first ones are smaller, and no one holds more than 1/16 of what came before it: the first labels are there
    soon, and of a small collection each of a few workers gets several units.
    """
    unit: list[Slice] = []
    rows = size = all_rows = all_bytes = 0
    most_rows, most_bytes = FIRST_ROWS, FIRST_BYTES
    for piece in slices:
        if unit and (rows + piece.rows > most_rows or size + piece.bytes > most_bytes):
            yield unit
            all_rows, all_bytes = all_rows + rows, all_bytes + size
            most_rows = min(UNIT_ROWS, max(FIRST_ROWS, all_rows // SHARE))
            most_bytes = min(UNIT_BYTES, max(FIRST_BYTES, all_bytes // SHARE))
            unit, rows, size = [], 0, 0
        unit.append(piece)
        rows, size = rows + piece.rows, size + piece.bytes
    if unit:
        yield unit


def key_hash(key: str, salt: str) -> int:
    """64 stable bits of a key: the same on every machine and in every run."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8, key=salt.encode()).digest()
    return int.from_bytes(digest, "big")


def hash_split(key: str, val: float, test: float) -> str:
    """The split of a key by its hash, so that adding images never moves the ones that were there."""
    position = key_hash(key, "raycnn-split") / 2**64
    if position < test:
        return "test"
    return "val" if position < test + val else "train"


def natural_order(names: Iterable[str]) -> tuple[str, ...]:
    """Distinct class names in order: by value where all are whole numbers, else by spelling."""
    distinct = set(names)
    if distinct and all(name.isdecimal() for name in distinct):
        return tuple(sorted(distinct, key=lambda name: (int(name), name)))
    return tuple(sorted(distinct))
