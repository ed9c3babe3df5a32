"""Where ticks and names stand beside curves, and how strongly a cell of a confusion matrix is coloured."""

import math
from collections.abc import Sequence
from itertools import pairwise

MATRIX_CLASSES = 30
"""Up to so many classes a confusion matrix is shown whole; beyond, what is confused most."""


def ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers that enclose [low, high]."""
    if low == high:
        low, high = low - (abs(low) or 1.0) / 10, high + (abs(high) or 1.0) / 10
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The same places, moved so that no two are nearer than `gap`, and none leaves [low, high]."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = list(places)
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + gap)
    over = max(0.0, max(moved) - high)
    return [max(low, m - over) for m in moved]


def strength(share: float, is_right: bool) -> float:
    """How strongly a cell of a confusion matrix is coloured, 0 to 1, for its share of the row."""
    # A square root, so that a confusion of one in a hundred can still be seen.
    return share if is_right else math.sqrt(share)
