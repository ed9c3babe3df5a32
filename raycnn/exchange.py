"""Labels for other tools: `raycnn export` compacts the parts of a label output into a few large Parquet files.

    _export-g0000.json                        which parts go into which file; created once, first
    labels-g0000-00000-of-00003.parquet       rows in the order of the plan; created once
    _SUCCESS-g0000.json                       rows, and each file's size and digest; created last

The names carry the first generation that the files hold: where a label output has grown since, the same command
adds files with the later generations and leaves the others as they are.
"""

import hashlib
import io
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import raycnn
from raycnn.config import MIB, ExportConfig
from raycnn.errors import ConfigError, DataError, ObjectMissing
from raycnn.ledger import ALTERED, EMBEDDING_PARTS, LABEL_PARTS, Ledger, Plan, UnitRef, label_ledger, success_path
from raycnn.storage import contains, open_store

VERSION = 1
FILE_BYTES = 128 * MIB
"""Aimed size of a file."""
KEPT = 0.78
"""Share of the parts' bytes that is left when they are one file; embeddings stay as large as they are."""
GROUP_BYTES = 64 * MIB
"""Rows that are written as one row group, in bytes of Arrow memory."""
READ_THREADS = 8
OF_ONE_PART = {b"unit", b"plan", b"rows"}
"""What a part's metadata says of itself alone; the rest is the lineage of its rows."""

Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class ExportReport:
    """What the export holds; files_written is what this run wrote of it."""

    rows: int
    files: int
    bytes: int
    files_written: int
    output: str


class FinishedLabels:
    """A label output whose every generation is finished, and its parts, each checked against its success marker."""

    def __init__(self, url: str) -> None:
        """Read the plans and the markers.

        Raises:
            DataError: there is no plan, or a generation is not finished, or its marker was altered.
        """
        self.store = open_store(url)
        self.plans = Ledger(self.store, LABEL_PARTS).plans()
        if not self.plans:
            raise DataError(f"{self.store.address()}: no plan there; is it the output of `raycnn label`?")
        self.ledger = label_ledger(self.store, self.fingerprint)
        self._markers: list[dict[str, Any]] = []
        for plan in self.plans:
            if (marker := self.ledger.success(plan.generation)) is None:
                raise DataError(
                    f"{self.store.address()}: the labels of generation {plan.generation} are not finished; "
                    "run the same `raycnn label` command again, then this one"
                )
            if marker.get("plan") != plan.digest or not marker.keys() >= {"parts", "status", "class_names"}:
                raise DataError(f"{self.store.address(success_path(plan.generation))} {ALTERED}")
            self._markers.append(marker)
        self._parts = {part["path"]: part for marker in self._markers for part in marker["parts"]}

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decided the rows' content; all generations share it."""
        return self.plans[0].content["fingerprint"]

    @property
    def selection(self) -> dict[str, Any]:
        """What was labelled: the URL of the collection, the split, what was left out."""
        return self.plans[0].content["selection"]

    @property
    def class_names(self) -> list[str]:
        """Every class that the model knows, in its order."""
        return self._markers[0]["class_names"]

    def check_apart(self, dst: str) -> None:
        """Refuse an output that would become part of the labels or of what was labelled, or the other way round.

        Raises:
            ConfigError: it lies inside one of them, or around it.
        """
        for what, url in (("the labels", self.store.url), ("the labelled images", self.selection["data"])):
            if contains(url, dst) or contains(dst, url):
                raise ConfigError(f"{dst} and {what} {url} lie inside each other; choose another output")

    def refs(self, plans: Sequence[Plan]) -> Iterator[UnitRef]:
        """Every unit of the plans, in order."""
        return (ref for plan in plans for ref in plan.refs)

    def bytes_of(self, ref: UnitRef) -> int:
        """Size of the unit's part."""
        return self._described(ref)["bytes"]

    def status(self, plans: Sequence[Plan]) -> dict[str, int]:
        """Rows of the plans by their status."""
        counts: Counter[str] = Counter()
        for plan in plans:
            counts.update(self._markers[plan.generation]["status"])
        return dict(sorted(counts.items()))

    def part(self, ref: UnitRef) -> bytes:
        """The unit's part.

        Raises:
            DataError: it is not the one that was committed.
        """
        path = self.ledger.path(ref)
        data = self._read(path)
        if hashlib.sha256(data).hexdigest() != self._described(ref)["sha256"]:
            raise DataError(f"{self.store.address(path)} {ALTERED}")
        return data

    def embeddings(self, ref: UnitRef) -> bytes:
        """The unit's keys and embeddings as Parquet, which lie beside the labels under the same name."""
        return self._read(self.ledger.embeddings_path(ref))

    def embedding_sizes(self) -> dict[str, int]:
        """Bytes of each unit's embeddings, by their path."""
        return {entry.path: entry.size for entry in self.store.list(f"{EMBEDDING_PARTS}/")}

    def _described(self, ref: UnitRef) -> dict[str, Any]:
        path = self.ledger.path(ref)
        if path not in self._parts:
            raise DataError(f"{self.store.address(path)} {ALTERED}")
        return self._parts[path]

    def _read(self, path: str) -> bytes:
        try:
            return self.store.get(path)
        except ObjectMissing:
            raise DataError(f"{self.store.address(path)} {ALTERED}") from None


def export(config: ExportConfig, progress: Progress | None = None) -> ExportReport:
    """Compact a label output, or resume, or add what it has got since, or find nothing to do.

    Raises:
        ConfigError: the output lies inside the labels or what was labelled, or holds an export of other labels.
        DataError: the labels are not finished, were altered, or have no embeddings.
    """
    labels = FinishedLabels(config.out)
    labels.check_apart(config.dst)
    return _Export(config, labels, progress or (lambda event: None)).run()


class _Export:
    def __init__(self, config: ExportConfig, labels: FinishedLabels, say: Progress) -> None:
        self._labels, self._say, self._embeddings = labels, say, config.embeddings
        self._store = open_store(config.dst)
        self._done, self._total, self._written = 0, sum(p.rows for p in labels.plans), 0

    def run(self) -> ExportReport:
        files: list[dict[str, Any]] = []
        begin = 0
        while begin < len(self._labels.plans):
            plan = self._plan(begin)
            files += self._finish(begin, plan, self._write(begin, plan))
            begin = plan["through"] + 1
        return ExportReport(
            rows=sum(f["rows"] for f in files),
            files=len(files),
            bytes=sum(f["bytes"] for f in files),
            files_written=self._written,
            output=self._store.address(),
        )

    def _plan(self, begin: int) -> dict[str, Any]:
        """What the generations from `begin` on are written as: as it was begun, or up to the last one there is."""
        path = f"_export-g{begin:04d}.json"
        if self._store.head(path) is None:
            self._store.create(path, json.dumps(self._new_plan(begin), indent=1).encode())
        plan = self._read(path)
        ours = {
            "labels": [p.digest for p in self._labels.plans[begin : plan["through"] + 1]],
            "embeddings": self._embeddings,
        }
        for what, value in ours.items():
            if plan[what] != value:
                other = "other labels" if what == "labels" else f"labels with{'out' * self._embeddings} embeddings"
                raise ConfigError(f"{self._store.address()} holds an export of {other}; export to another place")
        return plan

    def _new_plan(self, begin: int) -> dict[str, Any]:
        plans = self._labels.plans[begin:]
        groups = list(self._groups(plans))
        return {
            "version": VERSION,
            "through": plans[-1].generation,
            "labels": [p.digest for p in plans],
            "embeddings": self._embeddings,
            "files": [
                {
                    "path": f"labels-g{begin:04d}-{i:05d}-of-{len(groups):05d}.parquet",
                    "units": len(group),
                    "rows": sum(ref.rows for ref in group),
                }
                for i, group in enumerate(groups)
            ],
        }

    def _groups(self, plans: Sequence[Plan]) -> Iterator[list[UnitRef]]:
        """Consecutive units whose parts together have the size of a file."""
        embeddings = self._labels.embedding_sizes() if self._embeddings else {}
        group: list[UnitRef] = []
        size = 0
        for ref in self._labels.refs(plans):
            beside = self._labels.ledger.embeddings_path(ref)
            if self._embeddings and beside not in embeddings:
                raise DataError(
                    f"{self._labels.store.address(beside)} is not there; label with --embeddings to another output, "
                    "or export without"
                )
            own = round(self._labels.bytes_of(ref) * KEPT) + embeddings.get(beside, 0)
            if group and size + own > FILE_BYTES:
                yield group
                group, size = [], 0
            group.append(ref)
            size += own
        yield group

    def _read(self, path: str) -> dict[str, Any]:
        try:
            content = json.loads(self._store.get(path))
            version = content["version"]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{self._store.address(path)} is damaged; export to another place") from None
        if version > VERSION:
            raise DataError(f"{self._store.address(path)}: written by a newer raycnn; upgrade raycnn")
        return content

    def _write(self, begin: int, plan: dict[str, Any]) -> dict[str, str]:
        """Write the files that are not there yet; the digests of those."""
        there, digests = {e.path for e in self._store.list("labels-")}, dict[str, str]()
        refs = self._labels.refs(self._labels.plans[begin : plan["through"] + 1])
        for file in plan["files"]:
            units = list(itertools.islice(refs, file["units"]))
            if file["path"] not in there:
                data = self._compacted(units)
                if self._store.create(file["path"], data):
                    digests[file["path"]] = hashlib.sha256(data).hexdigest()
            self._done += file["rows"]
            self._say({"kind": "progress", "done": self._done, "total": self._total, "text": "", "unit": "rows"})
        self._written += len(digests)
        return digests

    def _compacted(self, units: Sequence[UnitRef]) -> bytes:
        """The rows of some units as one Parquet file, with the lineage of all of them in its metadata."""
        with ThreadPoolExecutor(READ_THREADS) as pool:
            parts = list(pool.map(self._labels.part, units))
            beside = list(pool.map(self._labels.embeddings, units)) if self._embeddings else [None] * len(units)
        lineage = _lineage([pq.read_schema(io.BytesIO(part)).metadata or {} for part in parts])
        tables = map(_rows, units, parts, beside)
        first = next(tables)
        schema = first.schema.with_metadata(lineage | {b"source": self._labels.selection["data"].encode()})
        sink = io.BytesIO()
        with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
            for group in _row_groups(itertools.chain([first], tables)):
                writer.write_table(group, row_group_size=len(group))
        return sink.getvalue()

    def _finish(self, begin: int, plan: dict[str, Any], digests: dict[str, str]) -> list[dict[str, Any]]:
        """Write the success marker, if it is not there; the files as it describes them."""
        path = f"_SUCCESS-g{begin:04d}.json"
        if self._store.head(path) is None:
            plans = self._labels.plans[begin : plan["through"] + 1]
            content = {
                "version": VERSION,
                "raycnn": raycnn.__version__,
                "labels": plan["labels"],
                "embeddings": plan["embeddings"],
                "source": self._labels.selection["data"],
                "fingerprint": self._labels.fingerprint,
                "rows": sum(f["rows"] for f in plan["files"]),
                "status": self._labels.status(plans),
                "files": [self._described(f, digests.get(f["path"])) for f in plan["files"]],
            }
            self._store.create(path, json.dumps(content, indent=1).encode())
        return self._read(path)["files"]

    def _described(self, file: dict[str, Any], digest: str | None) -> dict[str, Any]:
        """A file as it lies there; one that an earlier run wrote is read again."""
        entry = self._store.head(file["path"])
        if entry is None:
            raise DataError(f"{self._store.address(file['path'])} is gone since it was written; run the same again")
        if digest is None:
            sha256 = hashlib.sha256()
            with self._store.stream(file["path"], if_match=entry.etag) as written:
                for piece in iter(lambda: written.read(MIB), b""):
                    sha256.update(piece)
            digest = sha256.hexdigest()
        return {"path": file["path"], "bytes": entry.size, "sha256": digest, "rows": file["rows"]}


def _lineage(of_parts: Sequence[Mapping[bytes, bytes]]) -> dict[bytes, bytes]:
    """What the parts' metadata says of their rows' origin; where parts differ, all that they say."""
    found: dict[bytes, set[bytes]] = {}
    for name, value in (item for one in of_parts for item in one.items()):
        if name not in OF_ONE_PART:
            found.setdefault(name, set()).add(value)
    return {name: b", ".join(sorted(values)) for name, values in sorted(found.items())}


def _rows(ref: UnitRef, part: bytes, embeddings: bytes | None) -> pa.Table:
    """A unit's label rows, with a column of embeddings where those are given."""
    table = pq.read_table(io.BytesIO(part)).replace_schema_metadata(None)
    if len(table) != ref.rows:
        raise DataError(f"{ref.name} has {len(table):,} rows, planned were {ref.rows:,}; it {ALTERED}")
    if embeddings is None:
        return table
    try:
        beside = pq.read_table(io.BytesIO(embeddings), columns=["key", "embedding"])
    except (pa.ArrowException, OSError):  # no marker has their digests
        beside = None
    if beside is None or not beside["key"].equals(table["key"]):
        raise DataError(f"the embeddings of {ref.name}: what is there {ALTERED}")
    return table.append_column("embedding", beside["embedding"])


def _row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Consecutive tables put together until they are as large as a row group."""
    group: list[pa.Table] = []
    for table in tables:
        group.append(table)
        if sum(t.nbytes for t in group) >= GROUP_BYTES:
            yield pa.concat_tables(group)
            group = []
    if group:
        yield pa.concat_tables(group)
