"""`raycnn label`: exactly one row for every image, by the ledger's protocol, through Ray Data.

One worker per CPU (or GPU) reads, decodes, predicts and commits whole units. A unit's rows:
key, status, label, class_name, probability, top_k, detail; the last four are null where status is not ok.
"""

import hashlib
import io
import itertools
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import raycnn
from raycnn import bundle as bundles
from raycnn import data, images
from raycnn.config import LabelConfig, to_yaml
from raycnn.errors import Bad, BundleError, ConfigError, DataError, Status
from raycnn.ledger import Growth, Ledger, Plan, UnitRef, fingerprint_id, label_ledger, new_slices
from raycnn.predictor import Predictions, Predictor
from raycnn.shards import Collection, Sample, Slice, open_collection, units
from raycnn.storage import contains, open_store

SCHEMA_VERSION = 1
BATCH = 64
"""Images that are predicted together."""

_TOP = pa.struct([("label", pa.int64()), ("class_name", pa.string()), ("probability", pa.float32())])

LABEL_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("status", pa.string()),
        ("label", pa.int64()),
        ("class_name", pa.string()),
        ("probability", pa.float32()),
        ("top_k", pa.list_(_TOP)),
        ("detail", pa.string()),
    ]
)


@dataclass(frozen=True)
class LabelReport:
    """What a run has labelled; rows and status count the whole output, units_written what this run committed."""

    rows: int
    status: dict[str, int]
    units: int
    units_written: int
    images_per_s: float
    output: str
    generations: int
    changed: int
    gone: int


def label(config: LabelConfig, progress: data.Progress | None = None) -> LabelReport:
    """Label a collection, or resume, or label what is new, or find nothing to do.

    Raises:
        ConfigError: the output lies inside the input, or belongs to another selection or model.
        DataError: the collection cannot be read, or a shard of it was replaced.
        BundleError: the bundle is altered, or a worker's copy behaves otherwise.
        StorageError: the store cannot promise create-once, or cannot be reached.
    """
    say = progress or (lambda event: None)
    if contains(config.data, config.out) or contains(config.out, config.data):
        raise ConfigError(f"output {config.out} and input {config.data} lie inside each other; choose another output")
    bundle = bundles.load(config.bundle)
    collection = open_collection(config.data, ())
    collection.accept_unreadable = config.accept_unreadable
    say({"kind": "note", "text": f"{config.data}: {collection.layout}, because {collection.reason}"})
    run = _LabelRun(config, bundle, collection, say)
    return run.run()


class _LabelRun:
    def __init__(self, config: LabelConfig, bundle: bundles.Bundle, collection: Collection, say: data.Progress) -> None:
        self._config, self._bundle, self._collection, self._say = config, bundle, collection, say
        store = open_store(config.out)
        self._store = store.single_driver() if config.single_driver else store
        self._fingerprint = fingerprint_of(bundle, config.top_k)
        self._ledger = label_ledger(self._store, self._fingerprint)
        self._selection = {
            "data": collection.store.url,
            "split": config.split,
            "exclude": list(config.exclude),
        }
        self._growth = Growth()

    def run(self) -> LabelReport:
        start = time.perf_counter()
        plans = self._plans()
        written, rows = 0, 0
        for plan in plans:
            if (pending := self._ledger.pending(plan)) or self._ledger.success(plan.generation) is None:
                results = list(self._label(plan, pending))
                written += sum(r["written"] for r in results)
                rows += sum(r["rows"] for r in results if r["written"])
                self._finish(plan, {r["path"]: r for r in results if r["written"]})
        status: Counter[str] = Counter()
        for plan in plans:
            status.update((self._ledger.success(plan.generation) or {"status": {}})["status"])
        return LabelReport(
            rows=sum(p.rows for p in plans),
            status=dict(sorted(status.items())),
            units=sum(len(p.refs) for p in plans),
            units_written=written,
            images_per_s=rows / (time.perf_counter() - start),
            output=self._store.address(),
            generations=len(plans),
            changed=self._growth.changed,
            gone=self._growth.gone,
        )

    def _plans(self) -> list[Plan]:
        """All generations, with a new one where every earlier one is finished and the collection has grown."""
        plans = self._ledger.plans()
        for plan in plans:
            self._ledger.check(plan, self._selection, self._fingerprint)
        if not plans or all(self._ledger.success(p.generation) for p in plans):
            plans += self._plan_next(plans)
        self._ledger.probe(plans[0])
        return plans

    def _plan_next(self, plans: list[Plan]) -> list[Plan]:
        skipped: Counter[str] = Counter()
        listed = self._collection.select(self._config.split, skipped, self._config.exclude)
        if plans:
            listed = new_slices(listed, self._ledger.planned(plans), self._growth)
        listed = self._counting(listed)
        first = next(listed, None)
        if first is None:
            if plans:
                return []
            raise DataError(
                f"{self._collection.store.address()}: no images to label; left out: {dict(skipped) or 'none'}"
            )
        grouped = units(itertools.chain([first], listed))
        plan = self._ledger.plan(len(plans), grouped, self._selection, self._fingerprint, skipped)
        self._store.create("config.yaml", to_yaml(self._config).encode())
        return [plan]

    def _counting(self, slices: Iterator[Slice]) -> Iterator[Slice]:
        rows, last = 0, time.perf_counter()
        for piece in slices:
            rows += piece.rows
            if time.perf_counter() - last > 1:
                last = time.perf_counter()
                self._say({"kind": "note", "text": f"planning: {rows:,} images listed"})
            yield piece

    def _label(self, plan: Plan, pending: list[UnitRef]) -> Iterator[dict[str, Any]]:
        if not pending:
            return
        data.connect(self._say)
        now, limit = data.resources()
        workers = data.plan_units("label", now, limit, len(pending), use_gpu=limit.gpus >= 1)
        arguments = {
            "config": self._config.model_dump(mode="json") | {"out": self._store.url},
            "parts": self._ledger.parts,
            "fingerprint": self._fingerprint,
            "device": "cuda" if workers.gpus else "cpu",
        }
        done, total = plan.rows - sum(r.rows for r in pending), plan.rows
        bad: Counter[str] = Counter()
        for result in data.map_units(Labeler, [r._asdict() for r in pending], workers, arguments, self._say):
            done += result["rows"]
            bad.update({k: v for k, v in result["status"].items() if k != Status.OK})
            text = ", ".join(f"{n} {s}" for s, n in sorted(bad.items()))
            self._say({"kind": "progress", "done": done, "total": total, "text": text})
            yield result

    def _finish(self, plan: Plan, written: dict[str, dict[str, Any]]) -> None:
        """The success marker, with what this run wrote and what it reads again of earlier runs' parts."""
        parts, status = [], Counter[str]()
        for ref in plan.refs:
            path = self._ledger.path(ref)
            part = written.get(path) or _describe(path, self._store.get(path))
            status.update(part["status"])
            parts.append({k: part[k] for k in ("path", "bytes", "sha256", "rows")})
        self._ledger.finish(plan, {"status": dict(sorted(status.items())), "parts": parts})


def _describe(path: str, part: bytes) -> dict[str, Any]:
    statuses = pq.read_table(io.BytesIO(part), columns=["status"])["status"].to_pylist()
    return {
        "path": path,
        "bytes": len(part),
        "sha256": hashlib.sha256(part).hexdigest(),
        "rows": len(statuses),
        "status": dict(Counter(statuses)),
    }


def fingerprint_of(bundle: bundles.Bundle, top_k: int) -> dict[str, Any]:
    """All that decides a row's content: one output holds one fingerprint."""
    return {
        "bundle": bundle.digest,
        "weights": bundle.weights_sha256,
        "class_names": hashlib.sha256("\n".join(bundle.class_names).encode()).hexdigest(),
        "image": bundle.spec.model_dump(mode="json"),
        "temperature": bundle.temperature,
        "precision": "float32",
        "top_k": min(top_k, len(bundle.class_names)),
        "schema": SCHEMA_VERSION,
        "pixels": bundle.pixel_digest,
    }


class Labeler:
    """Lives in one Ray worker: reads, decodes, predicts and commits one unit after another."""

    def __init__(self, config: dict[str, Any], parts: str, fingerprint: dict[str, Any], device: str) -> None:
        """Load the bundle, whose self-test runs here, and check that this node makes the same rows."""
        import torch

        self._config = LabelConfig(**config)
        torch.set_num_threads(1)
        bundle = bundles.load(self._config.bundle)
        mine = fingerprint_of(bundle, self._config.top_k)
        if differing := sorted(k for k in mine if mine[k] != fingerprint[k]):
            raise BundleError(
                f"node {socket.gethostname()} has another {', '.join(differing)} than the plan; "
                "install the same decoder versions on every node"
            )
        self._fingerprint = fingerprint
        self._class_names = bundle.class_names
        self._predictor = Predictor(bundle, device, top_k=fingerprint["top_k"])
        self._collection = open_collection(self._config.data, ())
        self._ledger = Ledger(open_store(self._config.out), parts)
        self._lineage = {
            "bundle": bundle.digest,
            "fingerprint": fingerprint_id(fingerprint),
            "decoder": images.DECODER,
            "backend": f"torch {torch.__version__} {device}",
            "raycnn": raycnn.__version__,
        }

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Label and commit one unit; the report says whether it was ours that counted."""
        ref = UnitRef(**item)
        table = self._table(self._rows(self._ledger.slices(ref)))
        metadata = self._lineage | {"unit": str(ref.unit), "plan": ref.plan, "rows": str(len(table))}
        sink = io.BytesIO()
        pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd")
        part = sink.getvalue()
        written = self._ledger.commit(ref, part, len(table))
        return _describe(self._ledger.path(ref), part) | {"written": written}

    def _rows(self, slices: Sequence[Slice]) -> Iterator[tuple[list[str], list[Bad | None], Predictions]]:
        """(keys, failures, predictions of those that have pixels) for one batch after another."""
        batch: list[Sample] = []
        for sample in self._samples(slices):
            batch.append(sample)
            if len(batch) == BATCH:
                yield self._predict(batch)
                batch = []
        if batch:
            yield self._predict(batch)

    def _samples(self, slices: Sequence[Slice]) -> Iterator[Sample]:
        if not self._config.accept_unreadable:
            return self._collection.read(slices)
        try:
            return iter(list(self._collection.read(slices)))
        except DataError:
            return self._readable_and_not(slices)

    def _readable_and_not(self, slices: Sequence[Slice]) -> Iterator[Sample]:
        """The samples of a unit of which some object cannot be read, whose planned rows say so."""
        for _, run in itertools.groupby(slices, key=lambda piece: piece.path):
            pieces = list(run)
            try:
                samples = list(self._collection.read(pieces))
            except DataError as error:
                keys = [key for piece in pieces for key in _planned_keys(piece)]
                samples = [Sample(key, None, None, Bad(Status.UNREADABLE, str(error))) for key in keys]
            yield from samples

    def _predict(self, batch: list[Sample]) -> tuple[list[str], list[Bad | None], Predictions]:
        made = [s.bad or self._predictor.prepare(s.encoded) for s in batch]
        pixels = [p for p in made if not isinstance(p, Bad)]
        failures = [p if isinstance(p, Bad) else None for p in made]
        spec = self._predictor.bundle.spec
        stacked = np.stack(pixels) if pixels else np.zeros((0, spec.height, spec.width, spec.channels), np.uint8)
        return [s.key for s in batch], failures, self._predictor.predict(stacked)

    def _table(self, batches: Iterator[tuple[list[str], list[Bad | None], Predictions]]) -> pa.Table:
        return pa.Table.from_batches(
            [label_rows(k, f, p, self._class_names) for k, f, p in batches], schema=LABEL_SCHEMA
        )


def _planned_keys(piece: Slice) -> list[str]:
    """The keys of a slice that cannot be read; those of Parquet rows are in the file, so that their places stand in."""
    return [piece.key] if piece.key else [f"{piece.path}#{piece.first + i}" for i in range(piece.rows)]


def label_rows(
    keys: list[str], failures: list[Bad | None], predictions: Predictions, class_names: Sequence[str]
) -> pa.RecordBatch:
    """One label row for each key; the predictions belong to the keys without a failure, in order."""
    ok = np.array([f is None for f in failures], bool)
    place = np.cumsum(ok) - 1
    names = pa.array(class_names, pa.string())

    def where_ok(values: pa.Array) -> pa.Array:
        return values.take(pa.array(place, mask=~ok))

    k = predictions.labels.shape[1]
    flat = pa.array(predictions.labels.reshape(-1))
    top = pa.StructArray.from_arrays(
        [flat, names.take(flat), pa.array(predictions.probabilities.reshape(-1), pa.float32())],
        fields=list(_TOP),
    )
    offsets = pa.array(np.arange(len(predictions.labels) + 1, dtype=np.int32) * k)
    best = pa.array(predictions.labels[:, 0])
    return pa.RecordBatch.from_arrays(
        [
            pa.array(keys, pa.string()),
            pa.array([str(f.status) if f else str(Status.OK) for f in failures]),
            where_ok(best),
            where_ok(names.take(best)),
            where_ok(pa.array(predictions.probabilities[:, 0], pa.float32())),
            where_ok(pa.ListArray.from_arrays(offsets, top)),
            pa.array([f.detail if f else None for f in failures], pa.string()),
        ],
        schema=LABEL_SCHEMA,
    )
