"""Optimizer steps of one rank, and the state that they go on from."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from raycnn import augment
from raycnn.config import TrainConfig
from raycnn.errors import ConfigError, DataError
from raycnn.loop.optimization import Average, make_optimizer, set_rates
from raycnn.loop.ranks import Batch, rank, summed, world_size
from raycnn.loop.timing import Clock
from raycnn.models import Classifier

_MODEL, _AVERAGE, _OPTIMIZER = "model.", "average.", "optimizer."
GROWN_AT = 2 / 3
"""Share of a run after which images of a progressively resized run have their full size."""
SIZE_STEP = 32
"""Sizes on the way grow by so many px, which all the strides of common networks divide; by 4 px below 64."""


class Told(NamedTuple):
    """What rank 0 tells all ranks with a step, so that they do the same; the others tell nothing."""

    time_used: float = 0.0
    """Share of the time that the run may take."""
    looks: float = 0.0
    """1 where all are to look whether a node is about to leave."""


NOTHING = Told()


class Step(NamedTuple):
    """What one step has come to, on this rank."""

    loss: float
    """Summed over the rows."""
    rows: int
    done: float
    """Share of the run, 0 to 1."""
    told: Told


class Trainer:
    """One rank's steps: forward, backward, optimizer, average of the weights."""

    def __init__(
        self,
        classifier: Classifier,
        config: TrainConfig,
        steps: int,
        model: nn.Module | None = None,
        class_counts: Sequence[int] | None = None,
    ) -> None:
        """Prepare to run `steps` steps in all.

        Args:
            classifier: What learns, on its device.
            config: How.
            steps: Of the whole run.
            model: What is called to train it, if not itself: a data-parallel wrapper, a compiled one.
            class_counts: Training images of each class, for `imbalance`.
        """
        self.classifier, self._model = classifier, model if model is not None else classifier
        self._config, self._steps = config, steps
        self.device = next(classifier.parameters()).device
        self.clock = Clock(self.device)
        self.optimizer = make_optimizer(classifier, config)
        self.average = Average(classifier, config.ema) if config.ema else None
        self._weights, self._prior = _against_imbalance(config, class_counts, self.device)
        self._dtype = _dtype(config, self.device)
        if isinstance(self._model, DistributedDataParallel):
            self._model.register_comm_hook(None, self._reduce)

    @property
    def evaluated(self) -> Classifier:
        """What is evaluated, and becomes the bundle: the average where there is one."""
        return self.average.classifier if self.average is not None else self.classifier

    def _reduce(
        self,
        _: object,
        bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage]
    ) -> torch.futures.Future[Tensor]:
        """The usual all-reduce; what passes until the last of them is the backward pass itself."""
        self.clock.mark("backward")
        assert dist.group.WORLD is not None
        return allreduce_hook(dist.group.WORLD, bucket)

    def step(self, batch: Batch, step: int, epoch: int = 0, told: Told = NOTHING, rate: float | None = None) -> Step:
        """One optimizer step; `step` counts from the run's beginning.

        What the model draws at random depends on (seed, step, rank) alone, so that a run that is resumed goes on
        as if it had never stopped.

        Args:
            batch: This rank's share.
            step: Of the whole run, from 0.
            epoch: Augmentation of an image follows from it, too.
            told: What this rank tells.
            rate: The learning rate, instead of the schedule's.

        Raises:
            DataError: the loss is not finite.
            ConfigError: the batch is too small for the model.
        """
        self.clock.mark("data")
        rows, *tellings = summed([batch.labels.numel(), *told], self.device)
        told = Told(*tellings)
        self.clock.mark("all_reduce")
        done = min(1.0, max((step + 0.5) / self._steps, told.time_used))
        set_rates(self.optimizer, self._config, done, rate)
        with _drawn_from(self.device, self._config.seed, step, rank()):
            loss = self._forward_and_backward(batch, rows, step, epoch, done)
        value = loss.item()
        if not math.isfinite(value):
            other = ", or use --precision float32" if self._dtype != torch.float32 else ""
            rate = self._config.learning_rate
            raise DataError(f"the loss is {value} at step {step}; lower --learning-rate (now {rate:g}){other}")
        if self._config.clip_norm:
            nn.utils.clip_grad_norm_(self.classifier.parameters(), self._config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.classifier, step)
        self.clock.mark("optimizer")
        return Step(value, batch.labels.numel(), done, told)

    def _forward_and_backward(self, batch: Batch, rows: float, step: int, epoch: int, done: float) -> Tensor:
        """The summed loss; gradients are those of the mean over the global batch of `rows`."""
        # Data-parallel training averages gradients over ranks; this makes it the mean over the global batch.
        scale = world_size() / max(1.0, rows)
        if not batch.labels.numel():
            loss = self._no_loss(batch)
            loss.backward()
            self.clock.mark("all_reduce")
            return loss.detach()
        pixels, labels, partners, share = self.prepared(batch, step, epoch, done)
        self.clock.mark("augment")
        total = torch.zeros((), device=self.device)
        count = min(self._config.accumulate, len(labels))
        bounds = [len(labels) * i // count for i in range(count + 1)]
        is_wrapped = isinstance(self._model, DistributedDataParallel)
        for start, stop in pairwise(bounds):
            own, is_last = slice(start, stop), stop == len(labels)
            # Gradients of earlier parts stay here; those of all parts are summed over the ranks with the last.
            with self._model.no_sync() if is_wrapped and not is_last else nullcontext():  # pyright: ignore
                logits = self._logits(pixels[own])
                loss = self._loss(logits, labels[own])
                if share is not None:
                    loss = loss * share[own] + self._loss(logits, partners[own]) * (1 - share[own])
                summed = loss.sum()
                self.clock.mark("forward")
                (summed * scale).backward()
                self.clock.mark("all_reduce" if is_wrapped and is_last else "backward")
            total += summed.detach()
        return total

    @torch.no_grad()
    def prepared(
        self, batch: Batch, step: int, epoch: int, done: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What the model is given of a batch, on its device.

        Returns:
            Augmented pixels, labels, and with mixing the partners' labels and the shares of the rows' own.
        """
        pixels, labels, keys, lanes, sizes = (
            None if t is None else t.to(self.device, non_blocking=True) for t in batch
        )
        assert pixels is not None and labels is not None and keys is not None and lanes is not None  # noqa: PT018
        size = training_size(self._config, self.classifier, done)
        pixels = augment.augment(pixels, keys, epoch, self._config, size, sizes, self.classifier.spec.crop)
        if not (self._config.mixup or self._config.cutmix):
            return pixels, labels, labels, None
        pixels, partners, share = augment.mixed(pixels, labels, lanes, step, self._config)
        return pixels, labels, partners, share

    def _logits(self, pixels: Tensor) -> Tensor:
        try:
            with torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32):
                logits = self._model(pixels)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ConfigError(
                f"batch_size: {self._config.batch_size} leaves a worker a single image in a step, of which batch "
                "normalisation learns nothing; raise it to at least twice the number of workers"
            ) from None
        return logits.float() if self._prior is None else logits.float() + self._prior

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        smoothing = self._config.label_smoothing
        return functional.cross_entropy(logits, labels, self._weights, reduction="none", label_smoothing=smoothing)

    def _no_loss(self, batch: Batch) -> Tensor:
        """Zero with a zero gradient for every weight; batch normalisation must not learn from the black image."""
        spec = self.classifier.spec
        black = torch.zeros((1, spec.height, spec.width, spec.channels), dtype=torch.uint8, device=self.device)
        self._model.eval()
        loss = self._model(black).float().sum() * 0.0
        self._model.train()
        return loss

    def state(self) -> dict[str, Tensor]:
        """All that a later process goes on with, as one flat dict of tensors for safetensors."""
        tensors = {_MODEL + k: v for k, v in self.classifier.state_dict().items()}
        if self.average is not None:
            tensors |= {_AVERAGE + k: v for k, v in self.average.classifier.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            for name, value in state.items():
                if value is not None:
                    tensors[f"{_OPTIMIZER}{index}.{name}"] = torch.as_tensor(value)
        return {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go on with what `state` has given."""
        self.classifier.load_state_dict(_below(_MODEL, tensors))
        if self.average is not None:
            self.average.classifier.load_state_dict(_below(_AVERAGE, tensors))
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        state: dict[int, dict[str, Any]] = {}
        for key, value in _below(_OPTIMIZER, tensors).items():
            index, name = key.split(".", 1)
            # Stored as the weight is in memory: fused optimizers on CPUs go through both byte by byte.
            like = weights[int(index)]
            placed = torch.empty_like(like).copy_(value) if value.shape == like.shape else value
            state.setdefault(int(index), {})[name] = placed
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})


def evaluated_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a trainer's state the weights that it evaluates."""
    return _below(_AVERAGE, tensors) or _below(_MODEL, tensors)


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def training_size(config: TrainConfig, classifier: Classifier, done: float) -> tuple[int, int]:
    """Height and width of training images at the share `done` of a run, in px (progressive resizing)."""
    height, width = classifier.spec.height, classifier.spec.width
    if not config.start_size:
        return height, width
    full = min(height, width)
    side = config.start_size + (full - config.start_size) * min(1.0, done / GROWN_AT)
    unit = SIZE_STEP if full > 64 else 4
    side = full if done >= GROWN_AT else max(config.start_size, unit * int(side // unit))
    return round(height * side / full), round(width * side / full)


def _dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """Of the arithmetic: by itself bfloat16 is chosen where it is fast, on GPUs that have it."""
    has_it = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    is_wide = config.precision == "bfloat16" or (config.precision == "auto" and has_it)
    return torch.bfloat16 if is_wide else torch.float32


def _against_imbalance(
    config: TrainConfig, class_counts: Sequence[int] | None, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Weights of the classes' losses, or what is added to their votes while training; each (C,) or None.

    weights: inverse to the counts, 1 on average over the images. logit-adjust: the logarithms of the classes' shares
    (Menon et al. 2021, arXiv 2007.07314), so that the votes themselves are those of balanced classes.
    """
    if config.imbalance not in ("weights", "logit-adjust") or class_counts is None:
        return None, None
    counts = torch.tensor(class_counts, dtype=torch.float32, device=device)
    if config.imbalance == "weights":
        return counts.sum() / (len(counts) * counts), None
    return None, (counts / counts.sum()).log()


@contextmanager
def _drawn_from(device: torch.device, *key: int) -> Iterator[None]:
    """Random numbers of torch follow from the key, and its generators are left as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))
        yield
