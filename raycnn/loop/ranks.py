"""The processes that train together, and what each of them is given."""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")


class Batch(NamedTuple):
    """This rank's share of one step; N may be 0."""

    pixels: Tensor
    """uint8 (N, H, W, C)."""
    labels: Tensor
    """int64 (N,)."""
    keys: Tensor
    """int64 (N,): hashes of the images' keys, from which augmentation follows."""
    lanes: Tensor
    """int64 (N,): the lane that a row comes from; rows of one lane stand together."""
    sizes: Tensor | None = None
    """int32 (N, 2): height and width of each image in its padded frame; None where all fill it, cut as the model
    wants them."""


def world_size() -> int:
    """Ranks that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this process is."""
    return dist.get_rank() if dist.is_initialized() else 0


def summed(values: Sequence[float], device: torch.device) -> list[float]:
    """Each value added up over the ranks, all of which have to ask."""
    if world_size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def gathered(value: T) -> list[T]:
    """The value of each rank, all of which have to ask, by rank."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values
