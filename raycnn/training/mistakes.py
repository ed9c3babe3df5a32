"""Which validation images a trained network gets wrong, found by predicting them once more."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from raycnn import data, images
from raycnn.config import ImageSpec
from raycnn.errors import Bad
from raycnn.metrics import top_classes
from raycnn.models import Classifier
from raycnn.shards import PackedCollection, Sample

MOST_EXAMINED, MOST_PIXELS = 20_000, 250_000_000
"""Images that are predicted once more at most, and their pixels at most: 5,000 images of 224 x 224 px."""
MOST_MISTAKES = 32
EXAMPLES = 8
"""Images that are kept of each pair of classes."""

Pair = tuple[int, int]
"""Label and prediction."""


class Mistake(NamedTuple):
    """An image whose prediction is not its label."""

    key: str
    label: int
    prediction: int
    probability: float
    """Of the prediction, calibrated."""
    pixels: images.Pixels
    """uint8 (H, W, C), as the network has seen them."""


class Examined(NamedTuple):
    """What was found among the images that were predicted."""

    rows: int
    """Labelled, readable images."""
    worst: list[Mistake]
    """Those with the highest probabilities, highest first; of equals the first key."""
    of_pairs: Mapping[Pair, list[Mistake]]
    """The same for each pair that was asked for."""


def examine(
    classifier: Classifier, samples: Iterable[Sample], temperature: float, pairs: Sequence[Pair] = ()
) -> Examined:
    """Predict labelled images and keep some of those that are wrong; memory does not grow with their number.

    Args:
        classifier: In evaluation mode, on its device.
        samples: Unreadable ones and those without a label are passed over.
        temperature: What the votes are divided by before they become probabilities.
        pairs: Of which examples are wanted.
    """
    rows, worst = 0, list[Mistake]()
    of_pairs: dict[Pair, list[Mistake]] = {pair: [] for pair in pairs}
    for group in data.read_ahead(data.groups(samples)):
        made = [(s, s.bad or images.pixels(s.encoded, classifier.spec)) for s in group if s.label is not None]
        readable = [(s, pixels) for s, pixels in made if not isinstance(pixels, Bad)]
        rows += len(readable)
        found = list(_wrong(classifier, readable, temperature)) if readable else []
        worst = _surest(worst + found, MOST_MISTAKES)
        for pair in {(m.label, m.prediction) for m in found} & of_pairs.keys():
            of_pairs[pair] = _surest(of_pairs[pair] + [m for m in found if m[1:3] == pair], EXAMPLES)
    return Examined(rows, worst, of_pairs)


@torch.inference_mode()
def _wrong(
    classifier: Classifier, readable: Sequence[tuple[Sample, images.Pixels]], temperature: float
) -> Iterator[Mistake]:
    device = next(classifier.parameters()).device
    batch = torch.from_numpy(np.stack([pixels for _, pixels in readable]))
    logits = classifier(batch.to(device)).double().cpu()
    predictions = top_classes(logits, 1)[:, 0].tolist()
    probabilities = torch.softmax(logits / temperature, 1).amax(1).tolist()
    for (sample, pixels), prediction, probability in zip(readable, predictions, probabilities, strict=True):
        if sample.label is not None and prediction != sample.label:
            yield Mistake(sample.key, sample.label, prediction, probability, pixels)


def _surest(mistakes: Sequence[Mistake], most: int) -> list[Mistake]:
    return sorted(mistakes, key=lambda m: (-m.probability, m.key))[:most]


def validation_samples(packed: PackedCollection, spec: ImageSpec) -> Iterator[Sample]:
    """The validation split; where it is larger than `examine` should see, row groups from all over it."""
    most = max(1, min(MOST_EXAMINED, MOST_PIXELS // (spec.height * spec.width)))
    groups = list(packed.select("val", Counter()))
    step = -(-sum(group.rows for group in groups) // most)
    return islice(packed.read(groups[:: max(1, step)]), most)
