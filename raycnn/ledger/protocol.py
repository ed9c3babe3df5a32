"""Plan, pending, commit, finish: what exists below an output, and what is made there only once."""

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from raycnn.config import MIB
from raycnn.errors import ConfigError, DataError, StorageError
from raycnn.ledger.pages import ALTERED, all_slices, slices_of, write_pages
from raycnn.shards import Slice, path_order
from raycnn.storage import Store

VERSION = 1
MAX_PART_BYTES = 64 * MIB
LABEL_PARTS = "labels"
EMBEDDING_PARTS = "embeddings"


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
        pages = write_pages(self.store, units)
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
        return list(slices_of(self.store, ref.page, ref.unit))

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
            yield from all_slices(self.store, page["path"])


def plan_path(generation: int) -> str:
    """Where a generation's plan lies."""
    return f"plan/g{generation:04d}.json"


def success_path(generation: int) -> str:
    """Where a generation's success marker lies."""
    return f"_SUCCESS-g{generation:04d}.json"


def fingerprint_id(fingerprint: dict[str, Any]) -> str:
    """12 hex digits that stand for a fingerprint in a path."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:12]


def label_ledger(store: Store, fingerprint: dict[str, Any]) -> Ledger:
    """The ledger of a label output: its parts lie below the fingerprint."""
    return Ledger(store, f"{LABEL_PARTS}/fp={fingerprint_id(fingerprint)}")
