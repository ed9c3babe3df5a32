"""Outputs of `raycnn label`, made without Ray and without a model."""

import hashlib
import io
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from raycnn.errors import Bad, Status
from raycnn.labeling.rows import label_rows
from raycnn.ledger import Ledger, label_ledger
from raycnn.predictor import Predictions
from raycnn.shards import open_collection
from raycnn.storage import open_store

CLASSES = ("cat", "dog", "eel")
FINGERPRINT = {"weights": "abc", "top_k": 3}


def png(seed: int) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)).save(sink, "PNG")
    return sink.getvalue()


def predictions(rows: int, seed: int) -> Predictions:
    logits = np.random.default_rng(seed).normal(size=(rows, len(CLASSES)))
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    order = np.argsort(-shares, axis=1)
    return Predictions(order.astype(np.int64), np.take_along_axis(shares, order, 1).astype(np.float32))


def make_labels(data: str, out: str, per_unit: int = 4, embeddings: bool = False, abstain: float = 0.0) -> Ledger:
    """What `raycnn label` writes for a collection, as its next generation: the first image of every unit is bad."""
    ledger = label_ledger(open_store(out), FINGERPRINT)
    collection = open_collection(data, ())
    before = {s.path for p in ledger.plans() for r in p.refs for s in ledger.slices(r)}
    slices = [s for s in collection.select("all", Counter()) if s.path not in before]
    cut = [slices[i : i + per_unit] for i in range(0, len(slices), per_unit)]
    selection = {"data": collection.store.url, "split": "all", "exclude": []}
    plan = ledger.plan(len(ledger.plans()), cut, selection, FINGERPRINT, Counter())
    status, parts = Counter[str](), []
    for ref in plan.refs:
        keys = [s.key for s in collection.read(ledger.slices(ref))]
        failures: list[Bad | None] = [Bad(Status.EMPTY, "no bytes"), *[None] * (len(keys) - 1)]
        rows = label_rows(keys, failures, predictions(len(keys) - 1, ref.unit), CLASSES, abstain)
        metadata = {"bundle": "b1", "decoder": f"d{ref.unit % 2}", "unit": str(ref.unit), "plan": ref.plan}
        if embeddings:
            lists = [None if f else [float(ref.unit)] * 6 for f in failures]
            beside, sink = pa.table({"key": keys, "embedding": pa.array(lists, pa.list_(pa.float16()))}), io.BytesIO()
            pq.write_table(beside, sink)
            ledger.put_embeddings(ref, sink.getvalue(), len(keys))
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_batches([rows]).replace_schema_metadata(metadata), sink, compression="zstd")
        part = sink.getvalue()
        ledger.commit(ref, part, len(keys))
        status.update(rows["status"].to_pylist())
        digest = hashlib.sha256(part).hexdigest()
        parts.append({"path": ledger.path(ref), "bytes": len(part), "sha256": digest, "rows": ref.rows})
    ledger.finish(plan, {"status": dict(status), "class_names": list(CLASSES), "parts": parts})
    return ledger
