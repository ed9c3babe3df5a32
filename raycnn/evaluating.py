"""`raycnn evaluate`: how a bundle does on labelled images, every row exactly once on any number of workers."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from raycnn import bundle as bundles
from raycnn import data
from raycnn.config import EvaluateConfig
from raycnn.errors import Bad, DataError
from raycnn.metrics import Metrics
from raycnn.predictor import Predictor
from raycnn.shards import Collection, Slice, open_collection, units

BATCH = 64
FLIPPED = ("accuracy_top1", "accuracy_top5", "loss")
"""What is told of the votes that mirror images have, too."""


@dataclass(frozen=True)
class EvaluateReport:
    """Counts over every labelled, readable row; what else there was is in `status` and `unlabelled`."""

    rows: int
    accuracy_top1: float
    accuracy_top5: float
    loss: float
    """Of the logits as they are, like training's."""
    ece: float
    """Calibration error of the probabilities that labeling and serving give, at the bundle's temperature."""
    per_class: list[dict[str, Any]]
    confusion: list[list[int]]
    split: str
    status: dict[str, int]
    unlabelled: int
    with_flips: dict[str, float] | None = None
    """Accuracies and loss by the mean of the logits of each image and of its mirror image, where it was asked for."""


def evaluate(config: EvaluateConfig, progress: data.Progress | None = None) -> EvaluateReport:
    """Count over one split.

    Raises:
        BundleError: the bundle is altered, or knows other classes than the data.
        DataError: there is nothing to count on.
    """
    say = progress or (lambda event: None)
    bundle = bundles.load(config.bundle)
    collection = open_collection(config.data)
    if not collection.class_names:
        raise DataError(f"{config.data}: no labels in this {collection.layout}; evaluation needs class names")
    bundles.check_classes(bundle, collection.class_names)
    split = _split(config, collection)
    pieces = list(units(collection.select(split, Counter(), config.exclude)))
    if not pieces:
        raise DataError(f"{config.data}: no images in split {split}")
    data.connect(say)
    now, limit = data.resources()
    plan = data.plan_units("evaluate", now, limit, len(pieces), use_gpu=limit.gpus >= 1)
    items = [{"slices": [list(s) for s in unit]} for unit in pieces]
    total = sum(s.rows for unit in pieces for s in unit)
    arguments = {
        "bundle": config.bundle,
        "data": config.data,
        "class_names": list(collection.class_names),
        "device": "cuda" if plan.gpus else "cpu",
        "flips": config.flips,
    }
    counted, status, unlabelled, done = _zeros(bundle, config.flips), Counter[str](), 0, 0
    for result in data.map_units(Evaluator, items, plan, arguments, say):
        for metrics, counts in zip(counted, result["counts"], strict=True):
            metrics.merge(Metrics.from_vector(_dense(counts), len(bundle.class_names)))
        status.update(result["status"])
        unlabelled += result["unlabelled"]
        done += result["rows"]
        say({"kind": "progress", "done": done, "total": total, "text": ""})
    if not counted[0].rows:
        raise DataError(f"{config.data}: no labelled, readable image in split {split}; status: {dict(status)}")
    return _report(counted, bundle, split, status, unlabelled)


def _zeros(bundle: bundles.Bundle, flips: bool) -> list[Metrics]:
    """Of the images as they are, and then with their mirror images."""
    return [Metrics(len(bundle.class_names)) for _ in range(1 + flips)]


def _split(config: EvaluateConfig, collection: Collection) -> str:
    if config.split != "auto":
        return config.split
    return next((s for s in ("test", "val") if s in collection.splits), "all")


def _report(
    counted: list[Metrics], bundle: bundles.Bundle, split: str, status: Counter[str], unlabelled: int
) -> EvaluateReport:
    metrics, *flipped = counted
    per_class = [{"class_name": n, **row} for n, row in zip(bundle.class_names, metrics.per_class(), strict=True)]
    return EvaluateReport(
        rows=metrics.rows,
        accuracy_top1=metrics.accuracy_top1,
        accuracy_top5=metrics.accuracy_top5,
        loss=metrics.loss,
        ece=metrics.calibration(bundle.temperature).ece,
        per_class=per_class,
        confusion=metrics.confusion.tolist(),
        split=split,
        status=dict(sorted(status.items())),
        unlabelled=unlabelled,
        with_flips={name: getattr(flipped[0], name) for name in FLIPPED} if flipped else None,
    )


class Evaluator:
    """Lives in one Ray worker: reads, decodes and predicts one unit after another, and returns its counts."""

    def __init__(self, bundle: str, data: str, class_names: list[str], device: str, flips: bool) -> None:
        """Load the bundle, whose self-test runs here."""
        torch.set_num_threads(1)
        self._flips = flips
        self._bundle = bundles.load(bundle)
        self._predictor = Predictor(self._bundle, device)
        self._collection = open_collection(data, tuple(class_names))
        # Class folders may come in another order, or be fewer, than the bundle's classes.
        self._labels = [self._bundle.class_names.index(n) for n in class_names]

    def __call__(self, items: list[dict[str, Any]], is_again: bool) -> Iterator[dict[str, Any]]:
        """Counts of each unit."""
        with data.Decoder(self._bundle.spec, is_again) as decoder:
            for item in items:
                yield self._count_unit(item, decoder)

    def _count_unit(self, item: dict[str, Any], decoder: data.Decoder) -> dict[str, Any]:
        counted, status = _zeros(self._bundle, self._flips), Counter[str]()
        slices = [Slice(*s) for s in item["slices"]]
        rows = unlabelled = 0
        pixels: list[np.ndarray] = []
        labels: list[int] = []
        for group in data.read_ahead(data.groups(self._collection.read(slices))):
            rows += len(group)
            for sample, made in zip(group, decoder.decode(group), strict=True):
                status["ok" if not isinstance(made, Bad) else str(made.status)] += 1
                unlabelled += sample.label is None
                if not isinstance(made, Bad) and sample.label is not None:
                    pixels.append(made)
                    labels.append(self._labels[sample.label])
            if len(pixels) >= BATCH:
                self._count(counted, pixels, labels)
                pixels, labels = [], []
        if pixels:
            self._count(counted, pixels, labels)
        counts = [_sparse(metrics.to_vector()) for metrics in counted]
        return {"rows": rows, "status": dict(status), "unlabelled": unlabelled, "counts": counts}

    def _count(self, counted: list[Metrics], pixels: list[np.ndarray], labels: list[int]) -> None:
        batch, truth = np.stack(pixels), torch.tensor(labels)
        logits = self._predictor.logits(batch)
        counted[0].update(logits, truth)
        for metrics in counted[1:]:
            mirrored = self._predictor.logits(np.ascontiguousarray(batch[:, :, ::-1]))
            metrics.update((logits + mirrored) / 2, truth)


def _sparse(vector: torch.Tensor) -> dict[str, Any]:
    """A unit touches few of the cells of a large confusion matrix, so only those travel."""
    index = vector.nonzero().flatten()
    return {"size": vector.numel(), "index": index.tolist(), "value": vector[index].tolist()}


def _dense(counts: dict[str, Any]) -> torch.Tensor:
    vector = torch.zeros(counts["size"], dtype=torch.float64)
    vector[counts["index"]] = torch.tensor(counts["value"], dtype=torch.float64)
    return vector
