"""What label rows count up to, in parts and together. Knows no torch."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from raycnn.config import HISTOGRAM_BINS


def counts_of(table: pa.Table) -> dict[str, Any]:
    """What the columns status, label and probability count up to; as JSON, and to be added up by `add_counts`."""
    sure = table["probability"].drop_null().to_numpy()
    bins = np.minimum((sure * HISTOGRAM_BINS).astype(np.int64), HISTOGRAM_BINS - 1)
    labels = table["label"].drop_null().value_counts()
    return {
        "status": _named(table["status"].value_counts()),
        "labels": {str(label): n for label, n in _named(labels).items()},
        "confidence": np.bincount(bins, minlength=HISTOGRAM_BINS).tolist(),
        "abstained": len(sure) - len(table["label"].drop_null()),
    }


def _named(counts: pa.StructArray) -> dict[Any, int]:
    return {one["values"]: one["counts"] for one in counts.to_pylist()}


def add_counts(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The counts of several parts together."""
    status, labels = Counter[str](), Counter[str]()
    confidence = np.zeros(HISTOGRAM_BINS, np.int64)
    abstained = 0
    for part in parts:
        status.update(part["status"])
        labels.update(part["labels"])
        confidence += np.array(part["confidence"], np.int64)
        abstained += part["abstained"]
    return {
        "status": dict(sorted(status.items())),
        "labels": dict(sorted(labels.items(), key=lambda item: int(item[0]))),
        "confidence": confidence.tolist(),
        "abstained": abstained,
    }


def shift(counts: Mapping[str, Any], validation: Mapping[str, Any]) -> dict[str, float] | None:
    """How far the labels' classes and confidences lie from those on validation: 0 alike, 1 wholly different.

    Total variation distance of the shares; None where the bundle has not been validated or nothing was labelled.
    Classes are counted as predicted in both, without what was abstained from.
    """
    if not validation.get("predicted_counts") or not sum(counts["confidence"]):
        return None
    classes = np.zeros(len(validation["predicted_counts"]))
    for label, n in counts["labels"].items():
        classes[int(label)] = n
    return {
        "classes": _distance(classes, np.array(validation["predicted_counts"], float)),
        "confidence": _distance(
            np.array(counts["confidence"], float), np.array(validation["confidence_histogram"], float)
        ),
    }


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    if not one.sum() or not other.sum():
        return 1.0
    return round(float(np.abs(one / one.sum() - other / other.sum()).sum() / 2), 4)
