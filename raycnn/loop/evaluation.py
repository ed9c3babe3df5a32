"""Exact evaluation: every row once, however the rows are spread over ranks and batches."""

from collections.abc import Iterable

import torch
from torch import distributed as dist
from torch import nn

from raycnn.errors import DataError
from raycnn.loop.ranks import Batch, world_size
from raycnn.metrics import Metrics


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], num_classes: int) -> Metrics:
    """Metrics over every row of every rank's batches, added up over the ranks: each row counts exactly once.

    `model` is not a data-parallel wrapper: ranks may have different numbers of batches. All of them count with the
    buffers of rank 0, whose running statistics are those of the checkpoint and the bundle.

    Raises:
        DataError: a vote is not finite.
    """
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    metrics = Metrics(num_classes)
    for batch in batches:
        if batch.labels.numel():
            logits = model(batch.pixels.to(device)).float().cpu()
            if not bool(torch.isfinite(logits).all()):
                raise DataError("training diverged, the model's votes are not finite; lower --learning-rate")
            metrics.update(logits, batch.labels)
    if world_size() > 1:
        on_device = metrics.to_vector().to(device)
        dist.all_reduce(on_device)
        metrics = Metrics.from_vector(on_device.cpu(), num_classes)
    model.train(was_training)
    return metrics
