"""What becomes of rows on their way to a training worker."""

import numpy as np

from raycnn.config import ImageSpec
from raycnn.data import join
from raycnn.errors import Bad, Status

SPEC = ImageSpec(height=2, width=2)


def rows(labels: list[int], bad: list[str]) -> dict[str, np.ndarray]:
    pixels = np.zeros((len(labels), SPEC.height, SPEC.width, SPEC.channels), np.uint8)
    return {"pixels": pixels, "label": np.array(labels, np.int64), "bad": np.array(bad, object)}


def test_every_row_that_is_not_trained_on_is_counted_once():
    broken = f"{Status.TRUNCATED}\tb.jpg: ends early"
    made = join([rows([0, -1], ["", ""]), rows([-1, 2, 1], [broken, broken, ""])], SPEC)
    assert made.labels.tolist() == [0, 1]
    assert len(made.pixels) == 2
    assert made.failures == [Bad(Status.TRUNCATED, "b.jpg: ends early")] * 2
    assert made.unlabelled == 1
    assert join([], SPEC).unlabelled == 0
