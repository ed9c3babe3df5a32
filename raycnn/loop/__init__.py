"""Training and evaluation over any iterable of batches. Knows torch.distributed, not Ray.

The loss of a step is the mean over its global batch, however the rows are spread over the ranks; a rank whose
share is empty takes part with a weight of zero, so every rank runs the same number of steps.
"""

from raycnn.loop.evaluation import evaluate
from raycnn.loop.optimization import Average, blocks, learning_rate, make_optimizer, momentum
from raycnn.loop.range_test import RangeTest, range_test
from raycnn.loop.ranks import Batch, gathered, rank, summed, world_size
from raycnn.loop.steps import Step, Told, Trainer, evaluated_weights, training_size
from raycnn.loop.timing import Clock

__all__ = [
    "Average",
    "Batch",
    "Clock",
    "RangeTest",
    "Step",
    "Told",
    "Trainer",
    "blocks",
    "evaluate",
    "evaluated_weights",
    "gathered",
    "learning_rate",
    "make_optimizer",
    "momentum",
    "range_test",
    "rank",
    "summed",
    "training_size",
    "world_size",
]
