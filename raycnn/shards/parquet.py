"""Parquet files with images in them.

A key is what stands in the column `key`, or `file#row` where there is none. Every file has the image and the
label in columns of the same names, and no key stands twice: both are checked when the rows are planned.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raycnn.config import MIB
from raycnn.errors import Bad, DataError
from raycnn.shards.collection import (
    SPLITS,
    UNIT_BYTES,
    UNIT_ROWS,
    Collection,
    Excludes,
    Sample,
    Slice,
    natural_order,
)
from raycnn.shards.containers import split_in_name, whole_object_errors
from raycnn.shards.objects import LABEL_COLUMNS, parquet_file
from raycnn.storage import Entry, Store

IMAGE_COLUMNS = ("image", "img", "bytes", "encoded", "jpg", "png")
BATCH_BYTES = 8 * MIB
"""Rows that are decoded together."""
STREAM_BYTES = 4 * MIB
"""Read ahead of each column of a row group that is too large to be held."""


class ParquetCollection(Collection):
    """Parquet files with encoded images in a binary column or in a struct{bytes, path} (Hugging Face)."""

    layout = "Parquet"
    random_access = False

    def __init__(self, store: Store, reason: str, class_names: tuple[str, ...] | None = None) -> None:
        """Look at the files' names and at one footer; with `class_names` the labels need not be looked through."""
        super().__init__(store)
        self.reason = reason
        files = [e for e in self.objects(Counter()) if e.path.endswith(".parquet")]
        if not files:
            raise DataError(f"{store.address()}: no Parquet file with images")
        schema = parquet_file(store, files[0].path, files[0].etag).schema_arrow
        self._model = files[0].path
        self.names_rows = _has_keys(schema)
        self._image = _image_column(schema, store.address(self._model))
        self._label = _label_column(schema, store.address(self._model))
        self._named = hugging_face_names(schema, self._label) if self._label else ()
        self._by_position = bool(self._named)
        self._name_classes(class_names if class_names is not None else self._named or self._find_class_names(files))
        found = {split_in_name(entry.path) for entry in files}
        self.splits = tuple(s for s in SPLITS if s in found)

    def _name_classes(self, names: tuple[str, ...]) -> None:
        self.class_names = names
        self._index = {name: i for i, name in enumerate(names)}

    def _find_class_names(self, files: list[Entry]) -> tuple[str, ...]:
        if self._label is None:
            return ()
        found: set[str] = set()
        for entry in files:
            with whole_object_errors(self.store.address(entry.path)):
                file = parquet_file(self.store, entry.path, entry.etag)
                self._check_columns(file.schema_arrow, entry.path)
                table = file.read(columns=[self._label])
            found.update(str(value) for value in table[0].unique().to_pylist() if value is not None)
        return natural_order(found)

    def _check_columns(self, schema: pa.Schema, path: str) -> None:
        """Refuse a file that is another table than the first one: its labels would be lost, or mean others."""
        where = self.store.address(path)
        pairs = (
            ("images are", self._image, _image_column(schema, where)),
            ("labels are", self._label, _label_column(schema, where)),
        )
        for what, ours, theirs in pairs:
            if ours != theirs:
                raise DataError(
                    f"{where}: its {what} in column {theirs!r}, those of {self._model} in {ours!r}; "
                    "write both alike, or move one elsewhere"
                )
        names = hugging_face_names(schema, self._label) if self._label else ()
        if names and self._named and names != self._named:
            raise DataError(f"{where}: its class names are not those of {self._model}; move one elsewhere")

    def split_of(self, piece: Slice) -> str | None:
        return split_in_name(piece.path)

    def run_of(self, piece: Slice) -> str:
        # Of a row group nothing can be read but what stands before it too.
        return f"{piece.path}#{piece.offset}"

    def slices(self, skipped: Counter[str], exclude: Sequence[str] = ()) -> Iterator[Slice]:
        excludes, files, hashes = Excludes(exclude), [], []
        for entry in self.objects(skipped, excludes):
            if not entry.path.endswith(".parquet"):
                skipped["not Parquet"] += 1
                continue
            with whole_object_errors(self.store.address(entry.path)):
                file = parquet_file(self.store, entry.path, entry.etag)
                self._check_columns(file.schema_arrow, entry.path)
                keys = (hash(key) for key in _keys_of(file, entry.path))
                hashes.append(np.fromiter(keys, np.int64))
            files.append(entry)
            yield from _slices_of(file, entry)
        self._check_keys(files, hashes)
        excludes.check(self, having="#")

    def _check_keys(self, files: list[Entry], hashes: list[np.ndarray]) -> None:
        """Refuse keys that stand twice. Eight bytes a row are held; the files are read again only to name one."""
        ordered = np.sort(np.concatenate(hashes)) if hashes else np.empty(0, np.int64)
        twice = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
        places: dict[str, str] = {}
        for entry in files if twice else ():
            for key in _keys_of(parquet_file(self.store, entry.path, entry.etag), entry.path):
                if hash(key) not in twice:
                    continue
                if key in places:
                    raise DataError(
                        f"{self.store.address()}: the key {key!r} stands in {places[key]} and again in {entry.path}; "
                        "make the column `key` unique, or give it another name, so that keys are file#row"
                    )
                places[key] = entry.path

    def read(self, slices: Sequence[Slice]) -> Iterator[Sample]:
        for (path, etag), run in groupby(slices, key=lambda s: (s.path, s.etag)):
            with whole_object_errors(self.store.address(path)):
                file = _open_for_rows(self.store, path, etag)
                self._check_columns(file.schema_arrow, path)
                for first, rows in _runs(run):
                    found = 0
                    for start, batch in _row_range(file, self._columns(file), first, rows):
                        yield from self._samples(path, start, batch)
                        found += len(batch)
                    if found != rows:
                        raise DataError(f"{self.store.address(path)}: holds fewer rows than were planned")

    def keys(self, piece: Slice) -> Iterator[str]:
        with whole_object_errors(self.store.address(piece.path)):
            file = parquet_file(self.store, piece.path, piece.etag)
            if not _has_keys(file.schema_arrow):
                yield from (f"{piece.path}#{piece.first + i}" for i in range(piece.rows))
                return
            for start, batch in _row_range(file, [_KEY], piece.first, piece.rows):
                yield from _keys(batch, piece.path, start)

    def _columns(self, file: pq.ParquetFile) -> list[str]:
        """The columns that are read of each row."""
        key = _KEY if _has_keys(file.schema_arrow) else None
        return [c for c in (key, self._image, self._label) if c]

    def _samples(self, path: str, start: int, batch: pa.RecordBatch) -> Iterator[Sample]:
        """The rows of a batch, the first of which is row `start` of the file."""
        images = batch[self._image]
        encoded = (
            pc.call_function("struct_field", [images], pc.StructFieldOptions(indices=["bytes"]))
            if pa.types.is_struct(images.type)
            else images
        )
        keys = _keys(batch, path, start)
        labels = batch[self._label].to_pylist() if self._label else [None] * len(batch)
        for key, value, label, bad in zip(keys, encoded, labels, self._failures(batch, encoded), strict=True):
            yield Sample(key, value.as_py(), self._class_index(label), bad)

    def _failures(self, batch: pa.RecordBatch, encoded: pa.Array) -> Iterable[Bad | None]:
        """What is known of each row's image without looking at it."""
        return [None] * len(batch)

    def _class_index(self, label: Any) -> int | None:
        if label is None or not self._by_position:
            return None if label is None else self._index.get(str(label))
        if isinstance(label, int):
            return label if 0 <= label < len(self.class_names) else None
        return self._index.get(str(label))


_KEY = "key"


def _has_keys(schema: pa.Schema) -> bool:
    """Whether the file names its rows, by texts or whole numbers."""
    if _KEY not in schema.names:
        return False
    kind = schema.field(_KEY).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)


def _keys(batch: pa.RecordBatch, path: str, start: int) -> list[str]:
    """The keys of a batch whose first row is row `start` of the file."""
    named: list[str | None] = [None] * len(batch)
    if _has_keys(batch.schema):
        named = batch[_KEY].cast(pa.string()).to_pylist()
    return [f"{path}#{start + i}" if key is None else key for i, key in enumerate(named)]


def _keys_of(file: pq.ParquetFile, path: str) -> Iterator[str]:
    """The keys of a file, where it names its rows."""
    start = 0
    for batch in file.iter_batches(columns=[_KEY]) if _has_keys(file.schema_arrow) else ():
        yield from _keys(batch, path, start)
        start += len(batch)


def _slices_of(file: pq.ParquetFile, entry: Entry) -> Iterator[Slice]:
    """A file's row groups, each cut where it is larger than a unit may be."""
    begin = 0
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        size = max(group.total_byte_size, 1)
        step = max(1, min(UNIT_ROWS, UNIT_BYTES * group.num_rows // size))
        for first in range(0, group.num_rows, step):
            rows = min(step, group.num_rows - first)
            share = size * rows // group.num_rows
            yield Slice("", entry.path, entry.size, entry.etag, begin + first, rows, begin, share, -1)
        begin += group.num_rows


def _open_for_rows(store: Store, path: str, etag: str) -> pq.ParquetFile:
    """A file whose row groups are fetched in one go, or in a stream where one is too large to be held."""
    source = store.open(path, if_match=etag)
    metadata = pq.read_metadata(source)
    largest = max((metadata.row_group(g).total_byte_size for g in range(metadata.num_row_groups)), default=0)
    if largest <= UNIT_BYTES:
        return pq.ParquetFile(source, metadata=metadata, pre_buffer=True)
    return pq.ParquetFile(source, metadata=metadata, pre_buffer=False, buffer_size=STREAM_BYTES)


def _runs(pieces: Iterable[Slice]) -> Iterator[tuple[int, int]]:
    """(first row, rows) of the slices of one file, those that follow each other as one."""
    first = rows = 0
    for piece in pieces:
        if rows and piece.first != first + rows:
            yield first, rows
            rows = 0
        first = first if rows else piece.first
        rows += piece.rows
    if rows:
        yield first, rows


def _row_range(file: pq.ParquetFile, columns: list[str], first: int, rows: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(index of its first row, batch) of the rows [first, first + rows), a few at a time; each group is read once."""
    at = 0
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        if at + group.num_rows <= first or at >= first + rows:
            at += group.num_rows
            continue
        size = max(1, min(UNIT_ROWS, BATCH_BYTES * group.num_rows // max(group.total_byte_size, 1)))
        for batch in file.iter_batches(size, row_groups=[number], columns=columns):
            low, high = max(first, at), min(first + rows, at + len(batch))
            if low < high:
                yield low, batch.slice(low - at, high - low)
            at += len(batch)
            if at >= first + rows:
                return


def _image_column(schema: pa.Schema, where: str) -> str:
    def holds_bytes(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    for name in (*IMAGE_COLUMNS, *schema.names):
        if name in schema.names and holds_bytes(schema.field(name).type):
            return name
    raise DataError(f"{where}: no column with encoded images among {schema.names}; move it elsewhere")


def _label_column(schema: pa.Schema, where: str) -> str | None:
    name = next((c for c in LABEL_COLUMNS if c in schema.names), None)
    if name is not None and pa.types.is_nested(kind := schema.field(name).type):
        raise DataError(f"{where}: its column {name!r} holds {kind}; write one text or number a row")
    return name


def hugging_face_names(schema: pa.Schema, column: str) -> tuple[str, ...]:
    """The names of a Hugging Face ClassLabel column, from the schema's metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(features[column]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


def column(store: Store, slices: Iterable[Slice], name: str) -> Iterator[list[Any]]:
    """The values of one column in each slice; of the files nothing else is read."""
    for (path, etag), run in groupby(slices, key=lambda s: (s.path, s.etag)):
        with whole_object_errors(store.address(path)):
            file = parquet_file(store, path, etag)
            for piece in run:
                batches = _row_range(file, [name], piece.first, piece.rows)
                yield [value for _, batch in batches for value in batch[name].to_pylist()]
