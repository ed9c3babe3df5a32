"""The packed format: Parquet shards of encoded images that other tools open too, and their manifest."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raycnn.config import MIB
from raycnn.errors import Bad, DataError, Status
from raycnn.shards.collection import SPLITS, Collection, Excludes, Sample, Slice
from raycnn.shards.parquet import ParquetCollection, column
from raycnn.storage import Entry, Store

MANIFEST, UNREADABLE = "manifest.json", "unreadable.jsonl"
WORK = "_pack"
"""Where `raycnn pack` keeps its plan and its records."""
FORMAT = "raycnn-packed"
VERSION = 1
GROUP_ROWS = 512
GROUP_BYTES = 32 * MIB
ALTERED = "altered"
"""The version of a shard that is not the one which the manifest describes: nothing can be read of it."""
_RESTORE = "restore it from a copy, or pack the data set again to another place"

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


class PackedRow(NamedTuple):
    """One row of a packed data set; `height` and `width` are 0 where the header is unreadable."""

    key: str
    encoded: bytes | None
    label: int | None
    height: int
    width: int
    status: Status


def packed_schema(class_names: Sequence[str]) -> pa.Schema:
    """Columns key, image{bytes, path}, label, height, width, status; marked for Hugging Face `datasets`."""
    value = {"dtype": "string", "_type": "Value"}
    integer = {"dtype": "int32", "_type": "Value"}
    features: dict[str, Any] = {
        "key": value,
        "image": {"_type": "Image"},
        "label": {"names": list(class_names), "_type": "ClassLabel"},
        "height": integer,
        "width": integer,
        "status": value,
    }
    return pa.schema(
        [
            ("key", pa.string()),
            ("image", IMAGE),
            ("label", pa.int64()),
            ("height", pa.int32()),
            ("width", pa.int32()),
            ("status", pa.string()),
        ],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )


def write_shard(file: Path, rows: Iterable[PackedRow], class_names: Sequence[str]) -> list[int]:
    """Write one shard, row groups of at most 512 rows or 32 MiB; return the rows of each group."""
    groups: list[int] = []
    schema = packed_schema(class_names)
    with pq.ParquetWriter(file, schema, compression="none", use_dictionary=False) as writer:
        for group in _groups(rows):
            writer.write_table(_table(group, schema), row_group_size=len(group))
            groups.append(len(group))
    return groups


def _groups(rows: Iterable[PackedRow]) -> Iterator[list[PackedRow]]:
    group: list[PackedRow] = []
    size = 0
    for row in rows:
        length = len(row.encoded or b"")
        if group and (len(group) == GROUP_ROWS or size + length > GROUP_BYTES):
            yield group
            group, size = [], 0
        group.append(row)
        size += length
    if group:
        yield group


def _table(rows: list[PackedRow], schema: pa.Schema) -> pa.Table:
    keys, encoded, labels, heights, widths, statuses = zip(*rows, strict=True)
    image = pa.StructArray.from_arrays(
        [pa.array(encoded, pa.binary()), pa.array([k.rpartition("/")[2] for k in keys], pa.string())],
        fields=list(IMAGE),
    )
    columns = [keys, image, labels, heights, widths, [str(s) for s in statuses]]
    arrays = [c if isinstance(c, pa.Array) else pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


def is_manifest(data: bytes) -> bool:
    """Whether a `manifest.json` is one of ours, and whole."""
    try:
        return json.loads(data).get("format") == FORMAT
    except (ValueError, AttributeError):
        return False


class PackedCollection(ParquetCollection):
    """A data set that `raycnn pack` made."""

    layout = "packed data set"

    def __init__(self, store: Store, manifest: dict[str, Any]) -> None:
        """Take a manifest that `is_manifest` accepted.

        Raises:
            DataError: it was written by a newer raycnn, or lacks what every manifest has.
        """
        if lacking := {"version", "class_names", "splits", "shards"}.difference(manifest):
            raise DataError(f"{store.address(MANIFEST)}: no {sorted(lacking)[0]!r} in it; {_RESTORE}")
        if manifest["version"] > VERSION:
            raise DataError(f"{store.address()}: packed by a newer raycnn ({manifest['version']}); upgrade raycnn")
        Collection.__init__(self, store)
        self.manifest, self.reason = manifest, "it has a raycnn manifest"
        self._image, self._label, self._by_position = "image", "label", True
        self._name_classes(tuple(manifest["class_names"]))
        self._model, self._named = MANIFEST, self.class_names
        self.splits = tuple(s for s in SPLITS if self.rows(s))

    def rows(self, split: str) -> int:
        """Rows of a split, readable or not."""
        return sum(self.manifest["splits"].get(split, {}).get("status", {}).values())

    def counts(self, split: str) -> dict[str, int]:
        """Labelled rows of each class name in a split."""
        return self.manifest["splits"].get(split, {}).get("classes", {})

    def labels(self, groups: Sequence[Slice]) -> list[np.ndarray]:
        """int64 (rows,) of each row group; -1 where an image has none or cannot be read. No images are read for it."""

        def usable(label: int | None, status: str) -> int:
            return label if label is not None and status == Status.OK else -1

        columns = zip(*(column(self.store, groups, name) for name in ("label", "status")), strict=True)
        return [np.array(list(map(usable, *both)), np.int64) for both in columns]

    def unreadable(self) -> list[str]:
        """Keys of the images of all splits that could not be decoded when they were packed."""
        return [json.loads(line)["key"] for line in self.store.get(UNREADABLE).splitlines()]

    @property
    def digest(self) -> str:
        """What identifies the data: sha256 over the shards' digests and the class names."""
        names = [self.manifest["class_names"], [(s["path"], s["sha256"]) for s in self.manifest["shards"]]]
        return hashlib.sha256(json.dumps(names).encode()).hexdigest()

    def slices(self, skipped: Counter[str], exclude: Sequence[str] = ()) -> Iterator[Slice]:
        """One slice for each row group, from the manifest; no shard is opened."""
        excludes = Excludes(exclude)
        listed = {e.path: e for e in self.objects(Counter(), prefix="data/")}
        for shard in sorted(self.manifest["shards"], key=lambda s: s["path"]):
            if excludes.match(shard["path"]):
                skipped["excluded"] += 1
                continue
            entry = self._pinned(shard, listed.get(shard["path"]))
            first = 0
            for rows in shard["row_groups"]:
                share = shard["bytes"] * rows // max(shard["rows"], 1)
                yield Slice("", entry.path, entry.size, entry.etag, first, rows, first, share, -1)
                first += rows
        excludes.check(self)

    def _pinned(self, shard: dict[str, Any], entry: Entry | None) -> Entry:
        """The listed version of a shard, which must be the manifest's."""
        if entry is not None and entry.size == shard["bytes"]:
            return entry
        if self.accept_unreadable:
            return Entry(shard["path"], shard["bytes"], ALTERED)
        what = "is missing" if entry is None else f"has {entry.size} bytes, its manifest says {shard['bytes']}"
        raise DataError(f"{self.store.address(shard['path'])} {what}; {_RESTORE}")

    def read(self, slices: Sequence[Slice]) -> Iterator[Sample]:
        for piece in slices:
            if piece.etag == ALTERED:
                where = self.store.address(piece.path)
                raise DataError(f"{where} is missing, or not as its manifest says; {_RESTORE}")
        return super().read(slices)

    def _columns(self, file: pq.ParquetFile) -> list[str]:
        return [*super()._columns(file), "status"]

    def _failures(self, batch: pa.RecordBatch, encoded: pa.Array) -> Iterator[Bad | None]:
        """Why there were no bytes to pack."""
        for has_bytes, status in zip(encoded.is_valid().to_pylist(), batch["status"].to_pylist(), strict=True):
            yield None if has_bytes or status == Status.OK else Bad(Status(status), "when it was packed")


def summarise(shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts per split, of its statuses and of its classes, added up over shard entries."""
    splits: dict[str, dict[str, Counter[str]]] = {}
    for shard in shards:
        split = splits.setdefault(shard["split"], {"status": Counter(), "classes": Counter()})
        split["status"].update(shard["status"])
        split["classes"].update(shard["classes"])
    return {s: {k: dict(sorted(c.items())) for k, c in splits[s].items()} for s in sorted(splits)}
