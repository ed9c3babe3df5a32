"""What becomes of rows on their way to a training worker."""

import numpy as np

from raycnn.config import ImageSpec
from raycnn.data import Failure, join
from raycnn.errors import Bad, Status

SPEC = ImageSpec(height=2, width=2)


def rows(labels: list[int], bad: list[str]) -> dict[str, np.ndarray]:
    pixels = np.zeros((len(labels), SPEC.height, SPEC.width, SPEC.channels), np.uint8)
    numbers = np.arange(len(labels))
    named = {"label": np.array(labels, np.int64), "key": numbers - 2, "lane": numbers // 2, "copy": 0 * numbers}
    return {"pixels": pixels, "bad": np.array(bad, object)} | named


def test_every_row_that_is_not_trained_on_is_counted_once():
    broken = f"{Status.TRUNCATED}\tb.jpg\0ends early"
    made = join([rows([0, -1], ["", ""]), rows([-1, 2, 1], [broken, broken, ""])], SPEC)
    assert made.labels.tolist() == [0, 1]
    assert (made.keys.tolist(), made.lanes.tolist()) == ([-2, 0], [0, 1])
    assert len(made.pixels) == 2
    assert made.sizes is None
    assert made.failures == [Failure("b.jpg", n, Bad(Status.TRUNCATED, "ends early")) for n in (-2, -1)]
    assert made.unlabelled == 1
    assert join([], SPEC).unlabelled == 0


def test_images_of_several_sizes_become_one_batch_and_keep_what_was_at_their_top_left():
    parts = [rows([i, i], ["", ""]) for i in range(3)]
    for i, part in enumerate(parts):
        part["pixels"] = np.full((2, 3 * 16), 7 + i, np.uint8)
        part["size"] = np.array([[3 + i, 5 - i], [1, 2]], np.int32)
    made = join(parts, SPEC)
    assert made.sizes is not None
    assert made.sizes.tolist() == [[3, 5], [1, 2], [4, 4], [1, 2], [5, 3], [1, 2]]
    assert made.pixels.shape == (6, 5, 5, 3)
    for i, (frame, (height, width)) in enumerate(zip(made.pixels, made.sizes, strict=True)):
        assert (frame[:height, :width] == 7 + i // 2).all()
        assert frame.sum(dtype=int) == height * width * 3 * (7 + i // 2)
