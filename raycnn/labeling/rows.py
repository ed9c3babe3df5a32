"""What a label row is. A unit's rows: key, status, label, class_name, probability, top_k, detail.

The four before `detail` are null where status is not ok. Where a prediction is less sure than `abstain`, label and
class_name are null, and `detail` says so.
"""

import io
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raycnn.errors import Bad, BundleError, Status
from raycnn.ledger import UnitRef
from raycnn.predictor import Predictions

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


class UnitRows:
    """The rows of one unit while they are made, in the order of the plan."""

    def __init__(self, ref: UnitRef) -> None:
        self.ref = ref
        self.is_read = False
        """Whether every sample of the unit has been added."""
        self.was_committed = False
        """Whether somebody has committed the unit already, so that nothing of it was read."""
        self.keys: list[str] = []
        self._failures: list[Bad | None] = []
        self._predictions: list[Predictions] = []
        self._awaited = 0

    @property
    def is_complete(self) -> bool:
        """Whether nothing is awaited any more."""
        return self.is_read and not self._awaited

    def add(self, key: str, failure: Bad | None) -> None:
        """The next sample: it has failed, or its prediction will come."""
        self.keys.append(key)
        self._failures.append(failure)
        self._awaited += failure is None

    def predict(self, predictions: Predictions, start: int, stop: int) -> None:
        """The predictions [start, stop) are those of the next samples without a failure."""
        embeddings = predictions.embeddings
        self._predictions.append(
            Predictions(
                predictions.labels[start:stop],
                predictions.probabilities[start:stop],
                None if embeddings is None else embeddings[start:stop],
            )
        )
        self._awaited -= stop - start

    def table(self, class_names: Sequence[str], top_k: int, abstain: float) -> pa.Table:
        """The rows of a complete unit."""
        labels = _joined([p.labels for p in self._predictions], np.zeros((0, top_k), np.int64))
        probabilities = _joined([p.probabilities for p in self._predictions], np.zeros((0, top_k), np.float32))
        rows = label_rows(self.keys, self._failures, Predictions(labels, probabilities), class_names, abstain)
        return pa.Table.from_batches([rows])

    def embeddings(self, width: int) -> pa.Table:
        """key, embedding (list<float16>, null where status is not ok) of a complete unit."""
        made = [p.embeddings for p in self._predictions if p.embeddings is not None]
        flat = _joined(made, np.zeros((0, width), np.float16))
        offsets = pa.array(np.arange(len(flat) + 1, dtype=np.int32) * width)
        # Not of a fixed size, because Parquet files with nulls among those cannot be read again.
        values = pa.ListArray.from_arrays(offsets, pa.array(flat.reshape(-1), pa.float16()))
        return pa.table({"key": pa.array(self.keys, pa.string()), "embedding": _spread(values, self._failures)})


def _joined(parts: list[np.ndarray], empty: np.ndarray) -> np.ndarray:
    return np.concatenate(parts) if parts else empty


def _spread(values: pa.Array, failures: Sequence[Bad | None], also_null: np.ndarray | None = None) -> pa.Array:
    """One value for each row: those of the rows without a failure are given, in order; the others are null."""
    ok = np.array([f is None for f in failures], bool)
    place = np.cumsum(ok) - 1
    null = ~ok
    if also_null is not None:
        null[ok] = also_null
    return values.take(pa.array(place, mask=null))


def label_rows(
    keys: list[str],
    failures: Sequence[Bad | None],
    predictions: Predictions,
    class_names: Sequence[str],
    abstain: float = 0.0,
) -> pa.RecordBatch:
    """One label row for each key; the predictions belong to the keys without a failure, in order.

    Raises:
        BundleError: a probability is not a number.
    """
    names = pa.array(class_names, pa.string())
    best, sure = predictions.labels[:, 0], predictions.probabilities[:, 0]
    if not np.isfinite(sure).all():
        good = [key for key, failure in zip(keys, failures, strict=True) if failure is None]
        raise BundleError(
            f"{good[int(np.isfinite(sure).argmin())]}: the model's numbers overflow, so that there is no probability: "
            "is the bundle sound? In float16, as on GPUs, try --layout fused and another output, which is float32"
        )
    unsure = sure < abstain
    k = predictions.labels.shape[1]
    flat = pa.array(predictions.labels.reshape(-1))
    top = pa.StructArray.from_arrays(
        [flat, names.take(flat), pa.array(predictions.probabilities.reshape(-1), pa.float32())], fields=list(_TOP)
    )
    offsets = pa.array(np.arange(len(best) + 1, dtype=np.int32) * k)
    said = iter(np.where(unsure, sure, np.nan).tolist())
    details = [f.detail if f else _unsure(next(said), abstain) for f in failures]
    return pa.RecordBatch.from_arrays(
        [
            pa.array(keys, pa.string()),
            pa.array([str(f.status) if f else str(Status.OK) for f in failures]),
            _spread(pa.array(best), failures, unsure),
            _spread(names.take(pa.array(best)), failures, unsure),
            _spread(pa.array(sure, pa.float32()), failures),
            _spread(pa.ListArray.from_arrays(offsets, top), failures),
            pa.array(details, pa.string()),
        ],
        schema=LABEL_SCHEMA,
    )


def _unsure(probability: float, abstain: float) -> str | None:
    """The detail of a row that has a prediction; NaN is one that is sure enough."""
    return None if probability != probability else f"abstained: {probability:.3f} is below {abstain:g}"


def written(table: pa.Table, metadata: Mapping[str, str]) -> bytes:
    """The table as a Parquet file, with the metadata in its schema."""
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(dict(metadata)), sink, compression="zstd")
    return sink.getvalue()
