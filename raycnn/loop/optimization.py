"""What turns gradients into better weights: schedule, optimizer, and the average of the weights."""

import copy
import math
from itertools import chain

import torch
from torch import Tensor, nn

from raycnn.config import TrainConfig
from raycnn.models import Classifier

MOMENTUM = 0.9
CYCLED_MOMENTUM = (0.85, 0.95)
"""While the learning rate of one-cycle is highest, and lowest."""
ONE_CYCLE_START = 1 / 25
"""Of the peak: where one-cycle begins (fastai's and torch's)."""

AVERAGE_WARMUP = 10
"""The average's decay begins near 0, so that the first weights, which know nothing, are soon forgotten."""


def learning_rate(config: TrainConfig, done: float) -> float:
    """The rate at the share `done`, 0 to 1, of a run.

    cosine: linear warm-up, then half a cosine to zero (Loshchilov and Hutter 2017, arXiv 1608.03983, no restarts).
    linear: linear warm-up, then linear to zero. one-cycle: half a cosine up from 1/25, half a cosine down to zero
    (Smith and Topin 2018, arXiv 1708.07120, in fastai's form).
    """
    if done < config.warmup:
        risen = done / config.warmup
        if config.schedule == "one-cycle":
            risen = ONE_CYCLE_START + (1 - ONE_CYCLE_START) * (1 - math.cos(math.pi * risen)) / 2
        return config.learning_rate * risen
    fallen = min(1.0, (done - config.warmup) / (1 - config.warmup))
    left = 1 - fallen if config.schedule == "linear" else (1 + math.cos(math.pi * fallen)) / 2
    return config.learning_rate * left


def momentum(config: TrainConfig, done: float) -> float:
    """SGD's momentum, and the first beta of AdamW, at the share `done` of a run."""
    if config.schedule != "one-cycle":
        return MOMENTUM
    low, high = CYCLED_MOMENTUM
    return high - (high - low) * learning_rate(config, done) / config.learning_rate


def blocks(net: nn.Module) -> list[tuple[str, nn.Module]]:
    """The parts of a network in the order of computation, by name; a part that holds most weights is taken apart."""
    parts = [("", net)]
    whole = sum(p.numel() for p in net.parameters())
    while True:
        at = max(range(len(parts)), key=lambda i: sum(p.numel() for p in parts[i][1].parameters()))
        name, largest = parts[at]
        inner = [
            (f"{name}.{k}" if name else k, m) for k, m in largest.named_children() if any(True for _ in m.parameters())
        ]
        if not inner or sum(p.numel() for p in largest.parameters()) <= whole / 2:
            return parts
        parts[at : at + 1] = inner


def make_optimizer(classifier: Classifier, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW or SGD with Nesterov momentum; biases and normalisation are not decayed.

    The rate of each group is scaled by its `scale`: with a layer decay, blocks nearer to the image learn slower
    (Howard and Ruder 2018, arXiv 1801.06146).
    """
    scales: dict[int, float] = {}
    parts = blocks(classifier.net)
    for index, (_, part) in enumerate(parts):
        scale = config.layer_decay ** (len(parts) - 1 - index)
        scales |= {id(p): scale for p in part.parameters()}
    lowest = config.layer_decay ** (len(parts) - 1)  # of what stands in no block, such as a class token
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for weight in classifier.parameters():
        if weight.requires_grad:
            decay = config.weight_decay if weight.ndim > 1 else 0.0
            groups.setdefault((scales.get(id(weight), lowest), decay), []).append(weight)
    made = [{"params": weights, "weight_decay": d, "scale": s} for (s, d), weights in groups.items()]
    if config.optimizer == "sgd":
        return torch.optim.SGD(made, lr=config.learning_rate, momentum=MOMENTUM, nesterov=True)
    return torch.optim.AdamW(made, lr=config.learning_rate, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, config: TrainConfig, done: float, rate: float | None = None) -> None:
    """Give every group its rate and momentum at the share `done` of a run; `rate` replaces the schedule's."""
    rate, moment = learning_rate(config, done) if rate is None else rate, momentum(config, done)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
        if "betas" in group:
            group["betas"] = (moment, group["betas"][1])
        else:
            group["momentum"] = moment


class Average:
    """The exponential moving average of a classifier's weights and statistics (Polyak and Juditsky 1992)."""

    def __init__(self, classifier: Classifier, decay: float) -> None:
        """Begin with the weights as they are; `decay` is per step."""
        self.classifier = copy.deepcopy(classifier).eval().requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def update(self, classifier: Classifier, step: int) -> None:
        """Move towards the weights after `step` (from 0)."""
        decay = min(self._decay, (1 + step) / (AVERAGE_WARMUP + step))
        mine, theirs = (list(chain(c.parameters(), c.buffers())) for c in (self.classifier, classifier))
        floats = [i for i, value in enumerate(mine) if value.is_floating_point()]
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            [mine[i] for i in floats], [theirs[i] for i in floats], 1 - decay
        )
        for value, other in zip(mine, theirs, strict=True):
            if not value.is_floating_point():
                value.copy_(other)
