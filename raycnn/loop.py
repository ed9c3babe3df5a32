"""Training and evaluation over any iterable of batches. Knows torch.distributed, not Ray.

The loss of a step is the mean over its global batch, however the rows are spread over the ranks; a rank whose
share is empty takes part with a weight of zero, so every rank runs the same number of steps.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional

from raycnn.config import TrainConfig
from raycnn.errors import ConfigError, DataError
from raycnn.metrics import Metrics

MOMENTUM = 0.9


class Batch(NamedTuple):
    """This rank's share of one step: uint8 pixels (N, H, W, C) and int64 labels (N,); N may be 0."""

    pixels: Tensor
    labels: Tensor


def world_size() -> int:
    """Ranks that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this process is."""
    return dist.get_rank() if dist.is_initialized() else 0


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero (Loshchilov and Hutter 2017, arXiv 1608.03983, without restarts)."""
    warm = config.warmup * steps
    if step < warm:
        return config.learning_rate * (step + 1) / max(1.0, warm)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1.0, steps - warm)))


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW or SGD with Nesterov momentum; biases and normalisation are not decayed."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    free = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": free, "weight_decay": 0.0}]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=MOMENTUM, nesterov=True)
    return torch.optim.AdamW(groups, lr=config.learning_rate)


class Trainer:
    """One rank's optimizer steps: `model` may be wrapped for data-parallel training."""

    def __init__(self, model: nn.Module, config: TrainConfig, steps: int) -> None:
        """Prepare to run `steps` steps in all."""
        self.model, self._config, self._steps = model, config, steps
        self.optimizer = make_optimizer(model, config)

    def step(self, batch: Batch, step: int) -> tuple[float, int]:
        """One optimizer step; returns this rank's summed loss and its number of rows.

        What the model draws at random depends on (seed, step, rank) alone, so that a run that is resumed goes on
        as if it had never stopped.

        Raises:
            DataError: the loss is not finite.
            ConfigError: the batch is too small for the model.
        """
        device = next(self.model.parameters()).device
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self._config, step, self._steps)
        rows = batch.labels.numel()
        total = torch.tensor([rows], dtype=torch.float64, device=device)
        with _drawn_from(device, self._config.seed, step, rank()):
            loss = self._loss(batch, device) if rows else self._no_loss(batch, device)
        if world_size() > 1:
            dist.all_reduce(total)
        # Data-parallel training averages gradients over ranks; this makes it the mean over the global batch.
        (loss * (world_size() / max(1.0, total.item()))).backward()
        value = loss.item()
        if not math.isfinite(value):
            raise DataError(
                f"the loss is {value} at step {step}; lower --learning-rate (now {self._config.learning_rate:g})"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value, rows

    def _loss(self, batch: Batch, device: torch.device) -> Tensor:
        try:
            logits = self.model(batch.pixels.to(device, non_blocking=True))
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ConfigError(
                f"batch_size: {self._config.batch_size} leaves a worker a single image in a step, of which batch "
                "normalisation learns nothing; raise it to at least twice the number of workers"
            ) from None
        labels = batch.labels.to(device, non_blocking=True)
        smoothing = self._config.label_smoothing
        return functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)

    def _no_loss(self, batch: Batch, device: torch.device) -> Tensor:
        """Zero with a zero gradient for every weight; batch normalisation must not learn from the black image."""
        black = torch.zeros((1, *batch.pixels.shape[1:]), dtype=torch.uint8, device=device)
        self.model.eval()
        loss = self.model(black).sum() * 0.0
        self.model.train()
        return loss


@contextmanager
def _drawn_from(device: torch.device, *key: int) -> Iterator[None]:
    """Random numbers of torch follow from the key, and its generators are left as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))
        yield


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
    model.train()
    return metrics


def pack_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Model and optimizer as one flat dict of tensors, for safetensors."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if value is not None:
                tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
    return {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}


def unpack_state(tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """The inverse of `pack_state`, in place."""
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    if optimizer is None:
        return
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    whole = optimizer.state_dict()
    whole["state"] = state
    optimizer.load_state_dict(whole)
