"""Layouts in which every image is an object of its own: folders, flat prefixes, and lists of paths."""

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from raycnn.errors import Bad, DataError, ObjectChanged, ObjectMissing, Status
from raycnn.shards.collection import SPLIT_NAMES, SPLITS, Collection, Sample, Slice, natural_order
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
        for entry in self.objects(skipped, exclude):
            yield _whole(entry, self._label(entry.path))

    def _label(self, path: str) -> int:
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
                    raise DataError(f"{store.url}/{name}: {path!r} is named twice; keep one line for each image")
                rows[path] = (label, row_split or split)
        self._rows = rows
        self.class_names = natural_order(label for label, _ in rows.values() if label)
        self._index = {name: i for i, name in enumerate(self.class_names)}
        self.splits = tuple(s for s in SPLITS if any(split == s for _, split in rows.values()))

    def slices(self, skipped: Counter[str], exclude: Sequence[str] = ()) -> Iterator[Slice]:
        listed = self.objects(Counter(), exclude)
        entry = next(listed, None)
        for path in sorted(self._rows, key=lambda p: p.encode("utf-8", "surrogateescape")):
            while entry is not None and _order(entry.path) < _order(path):
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


def _order(path: str) -> bytes:
    return path.encode("utf-8", "surrogateescape")


def _list_rows(store: Store, name: str) -> Iterator[tuple[str, str, str]]:
    """(path below the root, label or "", split or "") of each row of a list."""
    table = read_table(store, name)
    column = path_column(table.schema)
    if column is None:
        raise DataError(f"{store.url}/{name}: no path column; name one of its columns {table.column_names} `path`")
    paths = table[column].cast(pa.string()).to_pylist()
    labels = _strings(table, LABEL_COLUMNS)
    splits = _strings(table, ("split",))
    folder = name.rpartition("/")[0]
    for path, label, split in zip(paths, labels, splits, strict=True):
        yield _below_root(store, folder, path, name), label, SPLIT_NAMES.get(split.lower(), split)


def _strings(table: pa.Table, names: tuple[str, ...]) -> list[str]:
    column = next((c for c in names if c in table.column_names), None)
    if column is None:
        return [""] * len(table)
    return pc.fill_null(table[column].cast(pa.string()), "").to_pylist()


def _below_root(store: Store, folder: str, path: str | None, name: str) -> str:
    if not path:
        raise DataError(f"{store.url}/{name}: a row without a path; remove it or fill it in")
    if path.startswith(store.url + "/"):
        return path[len(store.url) + 1 :]
    if "://" in path or path.startswith("/") or ".." in path.split("/"):
        raise DataError(f"{store.url}/{name}: {path!r} lies outside {store.url}; put the list above its images")
    return f"{folder}/{path}" if folder else path.removeprefix("./")


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
    except pa.ArrowInvalid as error:
        raise DataError(f"{store.url}/{path}: not a Parquet file: {' '.join(str(error).split())[:200]}") from None


def read_table(store: Store, name: str) -> pa.Table:
    """A list as an Arrow table.

    Raises:
        DataError: it cannot be parsed as what its name says.
    """
    source = io.BytesIO(store.get(name))
    try:
        if name.endswith(".parquet"):
            return pq.read_table(source)
        if name.endswith(".jsonl"):
            return pyarrow.json.read_json(source)
        return pyarrow.csv.read_csv(
            source,
            parse_options=pyarrow.csv.ParseOptions(delimiter="\t" if name.endswith(".tsv") else ","),
            # As they stand there: 007 is not 7.
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys((*PATH_COLUMNS, *LABEL_COLUMNS), pa.string())
            ),
        )
    except pa.ArrowInvalid as error:
        raise DataError(f"{store.url}/{name}: cannot be read as a list: {str(error).splitlines()[0]}") from None
