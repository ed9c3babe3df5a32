"""Which learning rate to take (Smith 2017, arXiv 1506.01186): the loss while the rate rises a millionfold."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from raycnn.errors import DataError
from raycnn.loop.ranks import Batch, summed
from raycnn.loop.steps import Trainer

LOWEST, HIGHEST = 1e-6, 1.0
SMOOTHING = 0.9
GIVEN_UP = 4.0
"""Times the lowest loss: what follows is divergence."""
FEWEST = 20


class RangeTest(NamedTuple):
    """Learning rates, the smoothed loss at each, and the one to try."""

    rates: list[float]
    losses: list[float]
    suggestion: float


def range_test(trainer: Trainer, batches: Iterable[Batch], steps: int) -> RangeTest:
    """Take up to `steps` steps at ever higher rates; the trainer's weights are of no use afterwards.

    The suggestion is where the smoothed loss falls most steeply.

    Raises:
        DataError: there are too few batches to say anything.
    """
    rates, losses, smoothed = list[float](), list[float](), 0.0
    for step, batch in zip(range(steps), batches, strict=False):
        rate = LOWEST * (HIGHEST / LOWEST) ** (step / max(1, steps - 1))
        loss, rows = summed(_taken(trainer, batch, step, rate), trainer.device)
        if not math.isfinite(loss):
            break
        if not rows:  # not one image of the batch could be read
            continue
        smoothed = SMOOTHING * smoothed + (1 - SMOOTHING) * loss / rows
        rates.append(rate)
        losses.append(smoothed / (1 - SMOOTHING ** len(rates)))
        if losses[-1] > GIVEN_UP * min(losses):
            break
    if len(rates) < FEWEST:
        raise DataError(
            f"--find-lr needs at least {FEWEST} steps in an epoch, and had {len(rates)}; lower --batch-size"
        )
    best = min(range(1, len(rates)), key=lambda i: _slope(rates, losses, i))
    return RangeTest(rates, losses, float(f"{rates[best]:.1g}"))


def _taken(trainer: Trainer, batch: Batch, step: int, rate: float) -> tuple[float, int]:
    """Loss and rows of this rank's step. A loss that is not finite must end the test on all ranks, not one."""
    try:
        done = trainer.step(batch, step, rate=rate)
    except DataError:
        return math.inf, 0
    return done.loss, done.rows


def _slope(rates: list[float], losses: list[float], at: int) -> float:
    low, high = max(0, at - 5), min(len(rates) - 1, at + 5)
    return (losses[high] - losses[low]) / math.log(rates[high] / rates[low])
