"""What a classifier did on labelled images, as counts that add up.

Metrics of parts of a data set, counted anywhere in any order, sum to the metrics of the whole: the counts exactly,
the two kinds of sums to float64's last digits. Nothing about single images is kept, and yet calibration can be read at
any temperature of a fixed grid after one pass.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raycnn.config import HISTOGRAM_BINS
from raycnn.errors import DataError

TEMPERATURES = tuple(2.0 ** (k / 8) for k in range(-16, 25))
"""1/4 to 8 in steps of 9%; 1 is among them. A bundle's temperature is one of these."""

BINS = 600
"""Confidence bins over [0, 1]; bin i holds confidences in [i / BINS, (i + 1) / BINS)."""

ECE_BINS = 15
THRESHOLDS = (*(k / 50 for k in range(50)), 0.99, 0.995)

_CHUNK_ELEMENTS = 4_000_000


def top_classes(logits: Tensor, k: int) -> Tensor:
    """The k highest classes (N, min(k, C)), best first; of equal logits the lower class wins.

    Evaluation and labeling both rank with this, so that they cannot disagree over a tie.
    """
    k = min(k, logits.shape[1])
    best = torch.topk(logits, k, dim=1)
    if bool(((logits >= best.values[:, -1:]).sum(dim=1) != k).any()):  # a tie over the last place, or NaN
        return torch.sort(logits, dim=1, descending=True, stable=True).indices[:, :k]
    # Sorting all of 1,000 classes takes 20 times as long as sorting the few that were found, first by class.
    classes = best.indices.sort(dim=1).values
    order = torch.sort(logits.gather(1, classes), dim=1, descending=True, stable=True).indices
    return classes.gather(1, order)


class Coverage(NamedTuple):
    """What accepting only predictions of at least this confidence would keep, and how right it would be."""

    threshold: float
    coverage: float
    accuracy: float | None


class Calibration(NamedTuple):
    """How far confidences can be trusted at one temperature."""

    temperature: float
    loss: float
    """Mean negative log likelihood in nats."""
    ece: float
    """Expected calibration error over 15 equal bins (Guo et al. 2017, arXiv 1706.04599)."""
    confidence_histogram: list[int]
    """Images per hundredth of confidence."""
    coverage: list[Coverage]


class Metrics:
    """Counts over labelled predictions of a classifier; memory is num_classes squared and does not grow."""

    def __init__(self, num_classes: int) -> None:
        """Nothing counted yet."""
        self.num_classes = num_classes
        self.confusion = torch.zeros((num_classes, num_classes), dtype=torch.int64)
        """Images by label (row) and prediction (column), int64."""
        self._top5 = torch.zeros(1, dtype=torch.int64)
        self._bins = torch.zeros((len(TEMPERATURES), BINS), dtype=torch.int64)
        self._correct = torch.zeros((len(TEMPERATURES), BINS), dtype=torch.int64)
        self._confidence = torch.zeros((len(TEMPERATURES), ECE_BINS), dtype=torch.float64)
        self._nll = torch.zeros(len(TEMPERATURES), dtype=torch.float64)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: float logits (N, C) on any device and int64 labels (N,); N may be 0.

        Raises:
            ValueError: a label is not one of the classes, or a logit is not finite.
        """
        logits, labels = logits.detach().double(), labels.to(logits.device)
        if logits.shape != (len(labels), self.num_classes):
            raise ValueError(f"expected logits for {self.num_classes} classes, got {tuple(logits.shape)}")
        if not bool(torch.isfinite(logits).all()):
            raise ValueError("a logit is not finite")
        if bool(((labels < 0) | (labels >= self.num_classes)).any()):
            raise ValueError(f"a label is outside 0..{self.num_classes - 1}")
        ranked = top_classes(logits, 5)
        hits = ranked == labels[:, None]
        pairs = labels * self.num_classes + ranked[:, 0]
        counts = torch.bincount(pairs, minlength=self.num_classes**2)
        self.confusion += counts.cpu().view_as(self.confusion)
        self._top5 += hits.any(dim=1).sum().cpu()
        rows = max(1, _CHUNK_ELEMENTS // (len(TEMPERATURES) * self.num_classes))
        for part, target, hit in zip(logits.split(rows), labels.split(rows), hits[:, 0].split(rows), strict=True):
            self._update_calibration(part, target, hit)

    def _update_calibration(self, logits: Tensor, labels: Tensor, hits: Tensor) -> None:
        scale = 1.0 / torch.tensor(TEMPERATURES, dtype=torch.float64, device=logits.device)[:, None]
        # (T, N) each; the highest logit stays the highest at every temperature.
        total = torch.logsumexp(logits[None] * scale[:, :, None], dim=2)
        self._nll += (total - logits.gather(1, labels[:, None])[:, 0] * scale).sum(dim=1).cpu()
        confidence = torch.exp(logits.max(dim=1).values * scale - total)
        bins = (confidence * BINS).long().clamp(max=BINS - 1)
        ones = torch.ones_like(confidence)
        self._bins += _histogram(bins, ones, BINS).long()
        self._correct += _histogram(bins[:, hits], ones[:, hits], BINS).long()
        self._confidence += _histogram(bins // (BINS // ECE_BINS), confidence, ECE_BINS)

    def merge(self, other: "Metrics") -> None:
        """Add what `other` counted on other images."""
        for mine, theirs in zip(self._parts(), other._parts(), strict=True):
            mine += theirs

    def to_vector(self) -> Tensor:
        """Everything as one float64 vector; vectors add up as metrics do (counts exactly, below 2**53)."""
        return torch.cat([part.flatten().double() for part in self._parts()])

    @classmethod
    def from_vector(cls, vector: Tensor, num_classes: int) -> Self:
        """The inverse of `to_vector`, or of a sum of such vectors."""
        metrics = cls(num_classes)
        parts = metrics._parts()
        pieces = vector.cpu().split([part.numel() for part in parts])
        for part, piece in zip(parts, pieces, strict=True):
            part.copy_(piece.view_as(part))
        return metrics

    def _parts(self) -> list[Tensor]:
        return [self.confusion, self._top5, self._bins, self._correct, self._confidence, self._nll]

    @property
    def rows(self) -> int:
        """Images counted."""
        return int(self.confusion.sum())

    @property
    def accuracy_top1(self) -> float:
        """Share of images whose highest class is their label."""
        return int(self.confusion.diagonal().sum()) / self._counted()

    @property
    def accuracy_top5(self) -> float:
        """Share of images whose label is among the five highest classes (all of them, if there are fewer)."""
        return int(self._top5) / self._counted()

    @property
    def loss(self) -> float:
        """Mean cross entropy of the uncalibrated logits, in nats."""
        return self.calibration(1.0).loss

    @property
    def ece(self) -> float:
        """Expected calibration error of the uncalibrated logits; `calibration(t).ece` has it at others."""
        return self.calibration(1.0).ece

    @property
    def temperature(self) -> float:
        """The temperature that makes the counted labels likeliest, out of TEMPERATURES.

        A prior worth one image holds it at 1 where there is nothing to learn from: without it, a handful of
        images that are all right would drive it to the end of the grid.
        """
        self._counted()
        logs = torch.tensor(TEMPERATURES, dtype=torch.float64).log()
        return TEMPERATURES[int((self._nll + logs.square()).argmin())]

    def calibration(self, temperature: float) -> Calibration:
        """Loss, calibration error and coverage with logits divided by a temperature.

        A temperature that is none of TEMPERATURES is read at the nearest of them.
        """
        rows = self._counted()
        at = min(range(len(TEMPERATURES)), key=lambda i: abs(math.log(TEMPERATURES[i] / temperature)))
        bins, correct, confidence = self._bins[at], self._correct[at], self._confidence[at]
        gaps = (correct.view(ECE_BINS, -1).sum(dim=1) - confidence).abs()
        return Calibration(
            temperature=TEMPERATURES[at],
            loss=float(self._nll[at]) / rows,
            ece=float(gaps.sum()) / rows,
            confidence_histogram=bins.view(HISTOGRAM_BINS, -1).sum(dim=1).tolist(),
            coverage=[_coverage(threshold, bins, correct) for threshold in THRESHOLDS],
        )

    def per_class(self, class_names: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """One dict a class: label, class_name if names are given, precision, recall, f1, support.

        A ratio with nothing in its denominator (a class that was never predicted, or never there) is None.
        """
        support, predicted = self.confusion.sum(dim=1).tolist(), self.confusion.sum(dim=0).tolist()
        right = self.confusion.diagonal().tolist()
        lines: list[dict[str, Any]] = []
        for label in range(self.num_classes):
            name = {"class_name": class_names[label]} if class_names is not None else {}
            tp, there, said = right[label], support[label], predicted[label]
            scores = {
                "precision": _ratio(tp, said),
                "recall": _ratio(tp, there),
                "f1": _ratio(2 * tp, there + said),
            }
            lines.append({"label": label} | name | scores | {"support": there})
        return lines

    def validation(self) -> dict[str, Any]:
        """What a bundle's validation.json holds, at the fitted temperature."""
        calibration = self.calibration(self.temperature)
        return {
            "rows": self.rows,
            "accuracy_top1": self.accuracy_top1,
            "accuracy_top5": self.accuracy_top5,
            "temperature": calibration.temperature,
            "loss": calibration.loss,
            "ece": calibration.ece,
            "class_counts": self.confusion.sum(dim=1).tolist(),
            "predicted_counts": self.confusion.sum(dim=0).tolist(),
            "confidence_histogram": calibration.confidence_histogram,
            "coverage": [line._asdict() for line in calibration.coverage],
        }

    def _counted(self) -> int:
        if not (rows := self.rows):
            raise DataError("no labelled image could be read, so there is nothing to measure")
        return rows


def confused_pairs(confusion: npt.ArrayLike) -> list[tuple[int, int, int]]:
    """(images, label, prediction) for each cell off the diagonal that is not empty, the most frequent first.

    Args:
        confusion: int64 (C, C), images by label (row) and prediction (column).
    """
    counts = np.array(confusion)
    np.fill_diagonal(counts, 0)
    labels, predictions = counts.nonzero()
    found = zip(counts[labels, predictions].tolist(), labels.tolist(), predictions.tolist(), strict=True)
    return sorted(found, key=lambda pair: (-pair[0], *pair[1:]))


def _histogram(bins: Tensor, weights: Tensor, size: int) -> Tensor:
    """Weights per bin of each row: (T, N) -> (T, size), float64, on the CPU."""
    empty = torch.zeros((len(bins), size), dtype=torch.float64, device=bins.device)
    return empty.scatter_add_(1, bins, weights).cpu()


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _coverage(threshold: float, bins: Tensor, correct: Tensor) -> Coverage:
    first = round(threshold * BINS)
    accepted = int(bins[first:].sum())
    return Coverage(threshold, accepted / int(bins.sum()), _ratio(int(correct[first:].sum()), accepted))
