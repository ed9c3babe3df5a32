"""`raycnn verify`: a label output is read again, and compared with its plans."""

import hashlib
import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raycnn.config import VerifyConfig
from raycnn.errors import DataError, ObjectMissing, RaycnnError
from raycnn.ledger.growth import Growth, new_slices
from raycnn.ledger.pages import ALTERED, forget_pages
from raycnn.ledger.protocol import LABEL_PARTS, Ledger, Plan, UnitRef, label_ledger, plan_path, success_path
from raycnn.shards import open_collection
from raycnn.storage import Store, open_store


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
    forget_pages()
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
