"""The exactly-once protocol: plan, pending, commit, finish, verify. It knows no Ray and no images.

    plan/pages/<sha256>.parquet      which slices each unit holds; content-named, written first
    plan/g0000.json                  generation 0; created once, names its pages, selection and fingerprint
    labels/fp=<12 hex>/part-g0000-000000.parquet     one per unit; created once: the data and the commit
    _SUCCESS-g0000.json              created once when nothing is pending

An object that exists is never written again, renamed or deleted, so there is no state to repair: pending is
the plan less the listing. Whoever loses a race to create an object uses the winner's.
"""

import functools
import hashlib
import heapq
import io
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raycnn.config import MIB, VerifyConfig
from raycnn.errors import ConfigError, DataError, ObjectMissing, RaycnnError, StorageError
from raycnn.shards import Slice, open_collection, path_order
from raycnn.storage import Store, open_store

VERSION = 1
PAGE_UNITS = 16
MAX_PART_BYTES = 64 * MIB

ALTERED = "was altered or deleted; the output cannot be trusted: use a new one"

_PAGE = pa.schema(
    [
        ("unit", pa.int32()),
        ("key", pa.string()),
        ("path", pa.string()),
        ("size", pa.int64()),
        ("etag", pa.string()),
        ("first", pa.int64()),
        ("rows", pa.int64()),
        ("offset", pa.int64()),
        ("bytes", pa.int64()),
        ("label", pa.int64()),
    ]
)
_UNIT = _PAGE.remove(0)
_ENCODINGS = {f.name: "DELTA_BYTE_ARRAY" if f.type == pa.string() else "DELTA_BINARY_PACKED" for f in _PAGE}
"""Neighbours are alike: keys begin alike, and numbers go up by little. So a page is small, and quickly made."""


class UnitRef(NamedTuple):
    """Names one unit; small enough to be sent to a worker, which reads the slices from the page."""

    generation: int
    unit: int
    rows: int
    page: str
    plan: str
    """sha256 of the plan's bytes."""

    @property
    def name(self) -> str:
        """The stem of the part that commits this unit."""
        return f"part-g{self.generation:04d}-{self.unit:06d}"


@dataclass(frozen=True)
class Plan:
    """One generation: what was to be done when it was planned. Immutable once created."""

    generation: int
    content: dict[str, Any]
    digest: str

    @property
    def rows(self) -> int:
        """Rows that the generation's parts hold when it is done."""
        return self.content["rows"]

    @property
    def refs(self) -> list[UnitRef]:
        """Every unit of the generation, in order."""
        found: list[UnitRef] = []
        for page in self.content["pages"]:
            for rows in page["unit_rows"]:
                found.append(UnitRef(self.generation, len(found), rows, page["path"], self.digest))
        return found


class Ledger:
    """The plans and parts below one output URL."""

    def __init__(self, store: Store, parts: str, suffix: str = ".parquet") -> None:
        """Keep parts at `<parts>/<unit><suffix>` below the store."""
        self.store, self.parts, self.suffix = store, parts, suffix

    def plans(self) -> list[Plan]:
        """The generations that exist, oldest first."""
        found = []
        while (plan := self._read_plan(len(found))) is not None:
            found.append(plan)
        return found

    def _read_plan(self, generation: int) -> Plan | None:
        if self.store.head(plan_path(generation)) is None:
            return None
        data = self.store.get(plan_path(generation))
        content = self._parse(plan_path(generation), data)
        if content["version"] > VERSION:
            raise DataError(f"{self.store.address()}: planned by a newer raycnn; upgrade raycnn")
        return Plan(generation, content, hashlib.sha256(data).hexdigest())

    def _parse(self, path: str, data: bytes) -> dict[str, Any]:
        try:
            content = json.loads(data)
            content["version"]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{self.store.address(path)} {ALTERED}") from None
        return content

    def plan(
        self,
        generation: int,
        units: Iterable[list[Slice]],
        selection: dict[str, Any],
        fingerprint: dict[str, Any],
        skipped: Counter[str],
        extra: dict[str, Any] | None = None,
    ) -> Plan:
        """Create the plan of a generation, or adopt the one that somebody else has just created.

        Raises:
            ConfigError: the adopted plan selects other data or was made with another fingerprint.
            DataError: there are parts of a plan that is gone, which would be taken for parts of this one.
        """
        orphans = f"{self.parts}/part-g{generation:04d}-"
        if next(self.store.list(orphans), None) is not None and self.store.head(plan_path(generation)) is None:
            raise DataError(f"{self.store.address(plan_path(generation))} {ALTERED}")
        pages = [self._write_page(page) for page in _batches(map(_table_of, units), PAGE_UNITS)]
        content = {
            "version": VERSION,
            "generation": generation,
            "selection": selection,
            "fingerprint": fingerprint,
            "units": sum(len(p["unit_rows"]) for p in pages),
            "rows": sum(sum(p["unit_rows"]) for p in pages),
            "skipped": dict(skipped),
            "pages": pages,
            **(extra or {}),
        }
        data = json.dumps(content, indent=1).encode()
        self.store.create(plan_path(generation), data)
        adopted = self._read_plan(generation)
        assert adopted is not None
        self.check(adopted, selection, fingerprint)
        return adopted

    def _write_page(self, page: list[pa.Table]) -> dict[str, Any]:
        units = np.repeat(np.arange(len(page), dtype=np.int32), [len(unit) for unit in page])
        table = pa.concat_tables(page).add_column(0, _PAGE.field(0), [units])
        sink = io.BytesIO()
        pq.write_table(
            table,
            sink,
            compression="zstd",
            use_dictionary=False,
            column_encoding=_ENCODINGS,
            write_statistics=False,
        )
        data = sink.getvalue()
        digest = hashlib.sha256(data).hexdigest()
        path = f"plan/pages/{digest[:32]}.parquet"
        self.store.create(path, data)
        return {"path": path, "sha256": digest, "unit_rows": [int(unit["rows"].to_numpy().sum()) for unit in page]}

    def check(self, plan: Plan, selection: dict[str, Any], fingerprint: dict[str, Any]) -> None:
        """Refuse to go on with a plan for other data or by another model, naming what differs.

        Raises:
            ConfigError: with the fields that differ.
        """
        for what, ours in (("selection", selection), ("fingerprint", fingerprint)):
            theirs = plan.content[what]
            differing = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
            if differing:
                shown = ", ".join(f"{k} (was {theirs.get(k)!r}, now {ours.get(k)!r})" for k in differing)
                raise ConfigError(f"{self.store.address()} was begun with another {what}: {shown}; use another output")

    def probe(self, plan: Plan) -> None:
        """Put the plan a second time; a store that takes it cannot keep the promise.

        Raises:
            StorageError: the store ignores the condition.
        """
        self.store.probe_create_once(plan_path(plan.generation), self.store.get(plan_path(plan.generation)))

    def slices(self, ref: UnitRef) -> list[Slice]:
        """What the unit holds.

        Raises:
            DataError: the page is not the one that was planned.
        """
        table = _read_page(self.store.url, ref.page)
        first, end = np.searchsorted(table["unit"].to_numpy(), (ref.unit % PAGE_UNITS, ref.unit % PAGE_UNITS + 1))
        return list(_slices(table.slice(first, end - first)))

    def committed(self) -> set[str]:
        """The stems of the parts that exist."""
        names = (e.path.rpartition("/")[2] for e in self.store.list(self.parts + "/"))
        return {n.removesuffix(self.suffix) for n in names if n.endswith(self.suffix)}

    def pending(self, plan: Plan) -> list[UnitRef]:
        """The units of the plan whose part does not exist."""
        committed = self.committed()
        return [ref for ref in plan.refs if ref.name not in committed]

    def path(self, ref: UnitRef) -> str:
        """Where the unit's part lies."""
        return f"{self.parts}/{ref.name}{self.suffix}"

    def is_committed(self, ref: UnitRef) -> bool:
        """Whether the unit's part exists now."""
        return self.store.head(self.path(ref)) is not None

    def commit(self, ref: UnitRef, data: bytes, rows: int) -> bool:
        """Create the unit's part: the data and the commit in one. False: it was there already, ours is dropped.

        Raises:
            DataError: the part does not hold the rows that were planned, or does not fit one PUT.
        """
        self._check(ref, self.path(ref), data, rows)
        return self.store.create(self.path(ref), data)

    def check_rows(self, ref: UnitRef, rows: int) -> None:
        """Refuse a unit of which other rows were read than planned.

        Raises:
            DataError: saying so.
        """
        if rows != ref.rows:
            raise DataError(
                f"{self.slices(ref)[0].path} and what follows it: {rows:,} images were read, not the {ref.rows:,} that "
                f"{self.store.address()} has planned; if the source has changed, use another output"
            )

    def _check(self, ref: UnitRef, path: str, data: bytes, rows: int) -> None:
        self.check_rows(ref, rows)
        if len(data) > MAX_PART_BYTES:
            raise DataError(
                f"{self.store.address(path)} would be {len(data) // MIB} MiB, more than "
                f"{MAX_PART_BYTES // MIB}: its keys are very long, or it has many unreadable images"
            )

    def put_embeddings(self, ref: UnitRef, data: bytes, rows: int) -> None:
        """Create what lies beside the unit's part, before it: a part that exists has its embeddings.

        Raises:
            DataError: the rows are not those that were planned, or do not fit one PUT.
        """
        path = self.embeddings_path(ref)
        self._check(ref, path, data, rows)
        self.store.create(path, data)

    def embeddings_path(self, ref: UnitRef) -> str:
        """Where the unit's embeddings lie, if the run makes them."""
        return f"{EMBEDDING_PARTS}{self.path(ref).removeprefix(LABEL_PARTS)}"

    def describe(self, ref: UnitRef, part: bytes) -> dict[str, Any]:
        """What a success marker says of one part."""
        digest = hashlib.sha256(part).hexdigest()
        return {"path": self.path(ref), "bytes": len(part), "sha256": digest, "rows": ref.rows}

    def finish(self, plan: Plan, summary: dict[str, Any]) -> bool:
        """Write the generation's success marker. False: it was there already.

        Raises:
            StorageError: a part is missing after all.
        """
        if left := self.pending(plan):
            raise StorageError(f"{self.store.address()}: {len(left)} units are pending; run the same command again")
        content = {"version": VERSION, "plan": plan.digest, "rows": plan.rows, **summary}
        return self.store.create(success_path(plan.generation), json.dumps(content, indent=1).encode())

    def success(self, generation: int) -> dict[str, Any] | None:
        """The generation's success marker, or None while it is not finished."""
        if self.store.head(success_path(generation)) is None:
            return None
        return self._parse(success_path(generation), self.store.get(success_path(generation)))

    def planned(self, plans: Iterable[Plan]) -> Iterator[Slice]:
        """Every slice that the plans hold, in the order of their paths."""
        return heapq.merge(*map(self._planned_by, plans), key=lambda piece: path_order(piece.path))

    def _planned_by(self, plan: Plan) -> Iterator[Slice]:
        for page in plan.content["pages"]:
            yield from _slices(_read_page(self.store.url, page["path"]))


def plan_path(generation: int) -> str:
    """Where a generation's plan lies."""
    return f"plan/g{generation:04d}.json"


def success_path(generation: int) -> str:
    """Where a generation's success marker lies."""
    return f"_SUCCESS-g{generation:04d}.json"


def _table_of(unit: list[Slice]) -> pa.Table:
    """A unit's slices by column: a page of them as tuples would keep the garbage collector busy."""
    columns = (pa.array(list(map(itemgetter(i), unit)), f.type) for i, f in enumerate(_UNIT))
    return pa.Table.from_arrays(list(columns), schema=_UNIT)


def _slices(table: pa.Table) -> Iterator[Slice]:
    columns = (column.to_numpy().tolist() for column in table.columns[1:])
    return map(Slice._make, zip(*columns, strict=True))


@functools.lru_cache(maxsize=8)
def _read_page(url: str, path: str) -> pa.Table:
    """One page, checked against the digest in its name; kept as columns, a third of what slices take."""
    store = open_store(url)
    try:
        data = store.get(path)
    except ObjectMissing:
        data = b""
    if not path.endswith(f"/{hashlib.sha256(data).hexdigest()[:32]}.parquet"):
        raise DataError(f"{store.address(path)} {ALTERED}")
    return pq.read_table(io.BytesIO(data))


def fingerprint_id(fingerprint: dict[str, Any]) -> str:
    """12 hex digits that stand for a fingerprint in a path."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:12]


def _batches(units: Iterable[pa.Table], count: int) -> Iterator[list[pa.Table]]:
    batch: list[pa.Table] = []
    for unit in units:
        batch.append(unit)
        if len(batch) == count:
            yield batch
            batch = []
    if batch:
        yield batch


@dataclass
class Growth:
    """How a collection differs from what earlier generations planned, in rows."""

    changed: int = 0
    gone: int = 0


def new_slices(listed: Iterable[Slice], planned: Iterable[Slice], growth: Growth) -> Iterator[Slice]:
    """The listed slices of objects that no earlier generation has; what changed or is gone is counted.

    An object is known by its path. One that has changed is never planned again, not even in part: its rows have
    other places now, and a key would be labelled twice. Both sides come in the order of their paths, so that
    memory does not grow with them.
    """
    known, last = _objects(planned), b""
    have = next(known, None)
    for path, pieces in itertools.groupby(listed, key=attrgetter("path")):
        order = path_order(path)
        if order < last:  # it could be taken for a new one, and be labelled twice
            raise DataError(f"{path!r} is listed after a name that follows it, so that nothing was planned")
        last = order
        while have and have.order < order:
            growth.gone += have.rows
            have = next(known, None)
        if have is None or have.order != order:
            yield from pieces
            continue
        for piece in pieces:
            if piece.etag != have.etag:
                growth.changed += piece.rows
        have = next(known, None)
    if have:
        growth.gone += have.rows + sum(left.rows for left in known)


class _Object(NamedTuple):
    order: bytes
    etag: str
    rows: int


def _objects(planned: Iterable[Slice]) -> Iterator[_Object]:
    """What was planned, by object."""
    for path, pieces in itertools.groupby(planned, key=attrgetter("path")):
        etag, rows = "", 0
        for piece in pieces:
            etag, rows = piece.etag, rows + piece.rows
        yield _Object(path_order(path), etag, rows)


LABEL_PARTS = "labels"
EMBEDDING_PARTS = "embeddings"


def label_ledger(store: Store, fingerprint: dict[str, Any]) -> Ledger:
    """The ledger of a label output: its parts lie below the fingerprint."""
    return Ledger(store, f"{LABEL_PARTS}/fp={fingerprint_id(fingerprint)}")


@dataclass
class VerifyReport:
    """What `raycnn verify` found, in rows; `altered` counts parts."""

    expected: int = 0
    present: int = 0
    lost: int = 0
    duplicate: int = 0
    foreign: int = 0
    altered: int = 0
    unfinished: int = 0
    """Units without a part, and generations without a success marker: the run is not over."""
    status: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, int] = field(default_factory=dict)
    """With --deep: how the inputs differ from the plan now."""

    @property
    def error(self) -> RaycnnError | None:
        """What to raise after the report is printed, or None where all is well."""
        if not (self.lost or self.duplicate or self.foreign or self.altered or self.unfinished):
            return None
        if self.unfinished and not (self.duplicate or self.foreign or self.altered):
            return DataError("the run is not finished; run the same `raycnn label` command again")
        return DataError(
            f"lost {self.lost}, duplicate {self.duplicate}, foreign {self.foreign}, altered {self.altered}: "
            "label to a new output"
        )


def verify(config: VerifyConfig) -> VerifyReport:
    """Prove a label output from the outside: read every part again and compare it with the plan.

    Raises:
        DataError: there is no plan at all.
    """
    _read_page.cache_clear()  # what this process has read before proves nothing of what is there now
    store = open_store(config.out)
    ledger = Ledger(store, LABEL_PARTS)
    # Before the plans: a run that goes on meanwhile makes parts of plans that were not there, which are not foreign.
    parts = {entry.path for entry in store.list(LABEL_PARTS + "/")}
    plans = ledger.plans()
    if not plans:
        raise DataError(f"{store.address()}: no plan there; is it the output of `raycnn label`?")
    return _Verification(store, plans, parts).report(config.deep)


class _Verification:
    def __init__(self, store: Store, plans: list[Plan], parts: set[str]) -> None:
        self._store, self._plans, self._parts = store, plans, parts
        fingerprint = plans[0].content["fingerprint"]
        self._has_embeddings = bool(fingerprint.get("embeddings"))
        self._ledger = label_ledger(store, fingerprint)
        self._found = VerifyReport(expected=sum(p.rows for p in plans))
        self._status: Counter[str] = Counter()
        self._hashes = bytearray()

    def report(self, deep: bool) -> VerifyReport:
        self._check_generations()
        found, parts = self._found, self._parts
        for plan in self._plans:
            digests = self._digests(plan)
            found.unfinished += digests is None
            for ref in plan.refs:
                path = self._ledger.path(ref)
                if path in parts or (digests and self._ledger.is_committed(ref)):  # since the parts were listed
                    parts.discard(path)
                    self._check_part(ref, path, digests[path] if digests else None)
                else:
                    found.lost += ref.rows
                    found.unfinished += digests is None
        for path in sorted(parts):
            found.foreign += max(self._rows_of_foreign(path), 1)
        hashes = np.frombuffer(self._hashes, np.uint64)
        hashes.sort()  # in place: all that is held of the rows are 8 bytes each
        found.duplicate += int(np.count_nonzero(hashes[1:] == hashes[:-1]))
        found.status = dict(sorted(self._status.items()))
        if deep:
            found.inputs = _compare_inputs(self._ledger, self._plans)
        return found

    def _check_generations(self) -> None:
        """A plan or a marker behind a generation without a plan means that the plan has gone."""
        missing = len(self._plans)
        known = {name(g) for name in (plan_path, success_path) for g in range(missing)}
        is_behind = any(e.path not in known for prefix in ("plan/g", "_SUCCESS-g") for e in self._store.list(prefix))
        if is_behind and self._store.head(plan_path(missing)) is None:  # else a run has just made it
            raise DataError(f"{self._store.address(plan_path(missing))} {ALTERED}")

    def _digests(self, plan: Plan) -> dict[str, str] | None:
        """The sha256 of each part by its path, as the success marker has them; None while there is no marker."""
        if (marker := self._ledger.success(plan.generation)) is None:
            return None
        digests = {part["path"]: part["sha256"] for part in marker.get("parts", [])}
        if marker.get("plan") != plan.digest or digests.keys() != {self._ledger.path(ref) for ref in plan.refs}:
            raise DataError(f"{self._store.address(success_path(plan.generation))} {ALTERED}")
        return digests

    def _check_part(self, ref: UnitRef, path: str, sha256: str | None) -> None:
        data = self._store.get(path)
        if (part := _read_part(data)) is None:
            self._found.altered += 1
            self._found.lost += ref.rows
            return
        keys, statuses, metadata = part
        is_ours = metadata.get(b"plan") == ref.plan.encode() and metadata.get(b"unit") == str(ref.unit).encode()
        if (
            not is_ours
            or (sha256 is not None and hashlib.sha256(data).hexdigest() != sha256)
            or (self._has_embeddings and self._embedded(ref) != keys)
        ):
            self._found.altered += 1
        self._count_rows(ref, keys)
        self._status.update(statuses)
        digests = (hashlib.blake2b(k.encode("utf-8", "surrogateescape"), digest_size=8).digest() for k in keys)
        self._hashes += b"".join(digests)

    def _embedded(self, ref: UnitRef) -> list[str] | None:
        """The keys of the unit's embeddings; None where they are gone or cannot be read."""
        try:
            data = self._store.get(self._ledger.embeddings_path(ref))
        except ObjectMissing:
            return None
        return _keys_in(data, "embedding")

    def _count_rows(self, ref: UnitRef, keys: list[str]) -> None:
        found, slices = self._found, self._ledger.slices(ref)
        if all(s.key for s in slices):
            expected = {s.key for s in slices}
            present = expected.intersection(keys)
            found.present += len(present)
            found.lost += len(expected) - len(present)
            found.foreign += sum(1 for k in keys if k not in expected)
        else:
            found.present += min(len(keys), ref.rows)
            found.lost += max(0, ref.rows - len(keys))
            found.foreign += max(0, len(keys) - ref.rows)

    def _rows_of_foreign(self, path: str) -> int:
        try:
            return pq.read_metadata(io.BytesIO(self._store.get(path))).num_rows
        except (pa.ArrowException, OSError):
            return 0


def _read_part(data: bytes) -> tuple[list[str], list[str], Mapping[bytes, bytes]] | None:
    """(keys, statuses, metadata) of a label part; None where it cannot be read."""
    try:
        table = pq.read_table(io.BytesIO(data), columns=["key", "status"])
        keys, statuses = table["key"].cast(pa.string()).to_pylist(), table["status"].to_pylist()
    except Exception:  # noqa: BLE001  what pyarrow raises for damaged bytes knows no bounds
        return None
    return None if None in keys else (keys, statuses, table.schema.metadata or {})


def _keys_in(data: bytes, column: str) -> list[str] | None:
    """The keys of a file that has this column, too; None where it cannot be read."""
    try:
        return pq.read_table(io.BytesIO(data), columns=["key", column])["key"].to_pylist()
    except Exception:  # noqa: BLE001  what pyarrow raises for damaged bytes knows no bounds
        return None


def _compare_inputs(ledger: Ledger, plans: list[Plan]) -> dict[str, int]:
    selection = plans[0].content["selection"]
    collection = open_collection(selection["data"], ())
    collection.accept_unreadable = True  # what is lost or altered is what is counted here
    listed = collection.select(selection["split"], Counter(), selection["exclude"])
    growth = Growth()
    new = sum(s.rows for s in new_slices(listed, ledger.planned(plans), growth))
    return {"new": new, "changed": growth.changed, "gone": growth.gone}
