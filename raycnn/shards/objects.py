"""Layouts in which every image is an object of its own: folders, flat prefixes, and lists of paths."""

import io
import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from raycnn.errors import Bad, DataError, ObjectChanged, ObjectMissing, Status, one_line
from raycnn.shards.collection import (
    SPLIT_NAMES,
    SPLITS,
    Collection,
    Excludes,
    Sample,
    Slice,
    natural_order,
    path_order,
    too_large,
)
from raycnn.storage import Entry, Store

READ_THREADS = 16
"""GETs in flight per reader: a GET of a small object waits, it does not work."""

PATH_COLUMNS = (
    "path",
    "image",
    "file_name",
    "filename",
    "filepath",
    "image_path",
    "file",
    "uri",
    "url",
    "img",
)
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "target", "category", "fine_label")
TEXT_COLUMNS = (*PATH_COLUMNS, *LABEL_COLUMNS, "key", "corrected")
"""Columns whose values are kept as they are written."""


class ObjectCollection(Collection):
    """One object, one image; its class and split are those of its folder."""

    def __init__(
        self,
        store: Store,
        layout: str,
        reason: str,
        class_names: tuple[str, ...] = (),
        split_folders: dict[str, str] | None = None,
    ) -> None:
        super().__init__(store)
        self.layout, self.reason, self.class_names = layout, reason, class_names
        self._split_folders = split_folders or {}
        self._index = {name: i for i, name in enumerate(class_names)}
        self.splits = tuple(s for s in SPLITS if s in self._split_folders.values())

    def slices(self, skipped: Counter[str], exclude: Sequence[str] = ()) -> Iterator[Slice]:
        for entry in self.objects(skipped, Excludes(exclude)):
            yield _whole(entry, self._label(entry.path))

    def _label(self, path: str) -> int:
        if not self._index:
            return -1
        parts = path.split("/")[1 if self._split_folders else 0 :]
        return self._index.get(parts[0], -1) if len(parts) > 1 else -1

    def split_of(self, piece: Slice) -> str | None:
        return self._split_folders.get(piece.path.split("/", 1)[0])

    def read(self, slices: Sequence[Slice]) -> Iterator[Sample]:
        with ThreadPoolExecutor(READ_THREADS) as pool:
            yield from pool.map(self._read_one, slices)

    def _read_one(self, piece: Slice) -> Sample:
        label = piece.label if piece.label >= 0 else None
        if piece.size < 0:
            return Sample(piece.key, None, label, Bad(Status.MISSING, "not in the store"))
        if bad := too_large(piece.size):
            return Sample(piece.key, None, label, bad)
        try:
            return Sample(piece.key, self.store.get(piece.path, if_match=piece.etag), label)
        except ObjectMissing:
            return Sample(piece.key, None, label, Bad(Status.MISSING, "gone since it was listed"))
        except ObjectChanged:
            return Sample(piece.key, None, label, Bad(Status.CHANGED, "replaced since it was listed"))


class ListCollection(ObjectCollection):
    """Images named by a CSV, TSV, JSON Lines or Parquet list with a path column; labels by a label column.

    The list itself is held in memory; the images are matched with a streamed listing.
    """

    def __init__(self, store: Store, lists: dict[str, str], reason: str) -> None:
        """Read the lists (path of the list -> the split that it holds, or an empty string)."""
        super().__init__(store, "list of paths", reason)
        rows: dict[str, tuple[str, str]] = {}
        for name, split in lists.items():
            for path, label, row_split in _list_rows(store, name):
                if path in rows:
                    raise DataError(f"{store.address(name)}: {path!r} is named twice; keep one line for each image")
                rows[path] = (label, row_split or split)
        self._rows = rows
        self.class_names = natural_order(label for label, _ in rows.values() if label)
        self._index = {name: i for i, name in enumerate(self.class_names)}
        self.splits = tuple(s for s in SPLITS if any(split == s for _, split in rows.values()))

    def slices(self, skipped: Counter[str], exclude: Sequence[str] = ()) -> Iterator[Slice]:
        excludes, listed = Excludes(exclude), self.store.list()
        entry = next(listed, None)
        for path in sorted(self._rows, key=path_order):
            if excludes.match(path):
                skipped["excluded"] += 1
                continue
            while entry is not None and path_order(entry.path) < path_order(path):
                entry = next(listed, None)
            label = self._label(path)
            if entry is not None and entry.path == path:
                yield _whole(entry, label)
            else:
                head = self.store.head(path)
                yield _whole(head, label) if head else Slice(path, path, -1, "", 0, 1, 0, 0, label)

    def _label(self, path: str) -> int:
        return self._index.get(self._rows[path][0], -1)

    def split_of(self, piece: Slice) -> str | None:
        return self._rows[piece.path][1] or None


def _whole(entry: Entry, label: int) -> Slice:
    return Slice(entry.path, entry.path, entry.size, entry.etag, 0, 1, 0, entry.size, label)


def _list_rows(store: Store, name: str) -> Iterator[tuple[str, str, str]]:
    """(path below the root, label or "", split or "") of each row of a list."""
    table, where = read_table(store, name), store.address(name)
    column = path_column(table.schema)
    if column is None:
        raise DataError(f"{where}: no path column; name one of its columns {table.column_names} `path`")
    paths = text_column(table, (column,), where)
    labels = text_column(table, LABEL_COLUMNS, where)
    splits = text_column(table, ("split",), where)
    folder = name.rpartition("/")[0]
    for path, label, word in zip(paths, labels, splits, strict=True):
        split = word.strip()
        yield _below_root(store, folder, path, where), label, SPLIT_NAMES.get(split.lower(), split)


def text_column(table: pa.Table, names: Sequence[str], where: str) -> list[str]:
    """The first of the columns that the table has, as text; empty where it says nothing, or there is none of them.

    Raises:
        DataError: it holds something else than texts and numbers.
    """
    column = next((c for c in names if c in table.column_names), None)
    if column is None:
        return [""] * len(table)
    try:
        return pc.fill_null(table[column].cast(pa.string()), "").to_pylist()
    except pa.ArrowException:
        kind = table.schema.field(column).type
        raise DataError(
            f"{where}: its column {column!r} holds {kind}; write one text or number for each image"
        ) from None


def _below_root(store: Store, folder: str, path: str, where: str) -> str:
    root = store.address()
    if path.startswith(root + "/"):
        below = path[len(root) + 1 :]
    elif "://" in path or path.startswith("/"):
        below = ".."
    else:
        below = f"{folder}/{path}" if folder else path
    if ".." in below.split("/"):
        raise DataError(f"{where}: {path!r} lies outside {root}; put the list above its images")
    # Two spellings of one path are one image.
    normal = posixpath.normpath(below)
    if not path or normal == ".":
        raise DataError(f"{where}: a row without a path; remove it or fill it in")
    return normal


def path_column(schema: pa.Schema) -> str | None:
    """The column that names images; one of that name which holds them is none."""

    def is_text(kind: pa.DataType) -> bool:
        return pa.types.is_string(kind) or pa.types.is_large_string(kind)

    return next((c for c in PATH_COLUMNS if c in schema.names and is_text(schema.field(c).type)), None)


def parquet_file(store: Store, path: str, etag: str | None = None) -> pq.ParquetFile:
    """A Parquet file of which only the footer has been read.

    Raises:
        DataError: it is none.
    """
    try:
        return pq.ParquetFile(store.open(path, if_match=etag))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{store.address(path)}: not a Parquet file: {one_line(error)[:200]}") from None


def read_table(store: Store, name: str) -> pa.Table:
    """A list as an Arrow table.

    Raises:
        DataError: it cannot be parsed as what its name says.
    """
    return parse_list(store.get(name), name, store.address(name))


def parse_list(data: bytes, name: str, where: str) -> pa.Table:
    """The content of a list as an Arrow table.

    Raises:
        DataError: it cannot be parsed as what its name says.
    """
    try:
        table = _parse_table(io.BytesIO(data), name)
    except pa.ArrowException as error:
        raise DataError(f"{where}: cannot be read as a list: {str(error).splitlines()[0]}") from None
    for column in (*TEXT_COLUMNS, "split"):
        if table.column_names.count(column) > 1:
            raise DataError(f"{where}: two of its columns are named {column!r}; rename or remove one")
    return table


def _parse_table(source: io.BytesIO, name: str) -> pa.Table:
    if name.endswith(".parquet"):
        return pq.read_table(source)
    if name.endswith(".jsonl"):
        return pyarrow.json.read_json(source)
    return pyarrow.csv.read_csv(
        source,
        parse_options=pyarrow.csv.ParseOptions(delimiter="\t" if name.endswith(".tsv") else ","),
        # As they stand there: 007 is not 7.
        convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(TEXT_COLUMNS, pa.string())),
    )
