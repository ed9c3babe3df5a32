"""The order of training samples: a function of (seed, epoch, manifest) over a fixed number of lanes.

An epoch's sequence is the row groups of the split in a permuted order, the rows of each permuted again. Lane l
of L owns the l-th of L equal runs of that sequence, and each step takes its share of every lane. A worker owns
whole lanes, so any number of workers that divides L trains on the same global batches.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from raycnn.shards.collection import Slice

MIN_LANES = 8
SAMPLER = 0x73616D70
"""Tells the random numbers of `copies` from those of the order."""


class Cursor(NamedTuple):
    """Where a run goes on: in this epoch, of which so many steps are done."""

    epoch: int
    step: int


class Piece(NamedTuple):
    """Rows of one row group, in the order `row_order(...)[start:stop]`, that one lane needs from `step` on."""

    epoch: int
    step: int
    lane: int
    group: int
    ordinal: int
    """Position of the first row in the epoch's sequence."""
    start: int
    stop: int


def lanes_for(num_workers: int) -> int:
    """The number of lanes of a new run: the smallest multiple of its workers that is at least 8."""
    return num_workers * math.ceil(MIN_LANES / num_workers)


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Steps that visit every row once; the rows are spread over them evenly, so there is no short last batch."""
    return math.ceil(rows / batch_size)


def lane_range(rows: int, lanes: int, lane: int) -> tuple[int, int]:
    """The run of an epoch's sequence that a lane owns."""
    return lane * rows // lanes, (lane + 1) * rows // lanes


def step_start(lane_rows: int, steps: int, lane: int, lanes: int, step: int) -> int:
    """The first row of a step within a lane. Lanes are out of phase, so that their rounding does not add up."""
    if step >= steps:
        return lane_rows
    return (step * lane_rows + lane * steps // lanes) // steps


def group_order(groups: int, seed: int, epoch: int) -> np.ndarray:
    """The row groups of a split in an epoch's order."""
    return np.random.default_rng([seed, epoch]).permutation(groups)


def row_order(rows: int, seed: int, epoch: int, group: int) -> np.ndarray:
    """The rows of one row group in an epoch's order."""
    return np.random.default_rng([seed, epoch, 1 + group]).permutation(rows)


def copies(labels: Sequence[np.ndarray], seed: int, epoch: int) -> list[np.ndarray]:
    """How often each row is visited in an epoch that shows all classes alike often, and as many rows as there are.

    Systematic sampling (Madow 1949) over the rows of each class in a random order: a row that should come 2.3 times
    comes 2 or 3 times, by chance. Rows without a label or pixels come once, to be counted.

    Args:
        labels: int64 of each row group (n,); -1 where there is none, or no pixels.
        seed: Of the run.
        epoch: Each has its own choice.

    Returns:
        int64 of each row group (n,).
    """
    every = np.concatenate(labels)
    known = every[every >= 0]
    weights = 1 / np.bincount(known)[known]
    rng = np.random.default_rng([seed, epoch, SAMPLER])
    order = rng.permutation(len(known))
    order = order[np.argsort(known[order], kind="stable")]  # class by class, so that each has its share exactly
    reached = np.floor(np.cumsum(weights[order]) * (len(known) / weights.sum()) + rng.random())
    reached[-1] = len(known)  # whatever rounding has left of it
    times, times_known = np.ones(len(every), np.int64), np.empty(len(known), np.int64)
    times_known[order] = np.diff(reached, prepend=0).astype(np.int64)
    times[every >= 0] = times_known
    return np.split(times, np.cumsum([len(group) for group in labels])[:-1])


def epoch_pieces(
    groups: Sequence[Slice],
    seed: int,
    cursor: Cursor,
    batch_size: int,
    lanes: int,
    owned: Sequence[int],
    max_rows: int,
    head: int = 0,
) -> list[Piece]:
    """What the owner of some lanes has yet to read in an epoch, at most `max_rows` at a time, as its steps need it.

    With a `head` the first piece of each lane has so few rows, so that the first step need not wait for more.
    """
    rows, epoch = sum(g.rows for g in groups), cursor.epoch
    steps = steps_per_epoch(rows, batch_size)
    runs = [(lane, *lane_range(rows, lanes, lane)) for lane in owned]
    first = first_rows(rows, batch_size, lanes, owned, cursor.step)
    pieces: list[Piece] = []
    position = 0
    for group in group_order(len(groups), seed, epoch):
        count = groups[group].rows
        for lane, low, high in runs:
            start, stop = max(first[lane], position), min(high, position + count)
            at = start
            while at < stop:
                most = min(head or max_rows, max_rows) if at == first[lane] else max_rows
                end = min(at + most, stop)
                step = _step_of(at - low, high - low, steps, lane, lanes)
                pieces.append(Piece(epoch, step, lane, int(group), at, at - position, end - position))
                at = end
        position += count
    return sorted(pieces, key=lambda p: p.step)


def _step_of(row: int, lane_rows: int, steps: int, lane: int, lanes: int) -> int:
    """The step that takes a lane's row: the last one that starts at it or before it."""
    step = min(steps - 1, ((row + 1) * steps - lane * steps // lanes) // lane_rows)
    while step_start(lane_rows, steps, lane, lanes, step) > row:
        step -= 1
    return step


def first_rows(rows: int, batch_size: int, lanes: int, owned: Sequence[int], step: int) -> dict[int, int]:
    """Of each owned lane the position, in the epoch's sequence, of the first row that a step takes."""
    steps, first = steps_per_epoch(rows, batch_size), {}
    for lane in owned:
        low, high = lane_range(rows, lanes, lane)
        first[lane] = low + step_start(high - low, steps, lane, lanes, step)
    return first


def step_counts(rows: int, batch_size: int, lanes: int, owned: Sequence[int], step: int) -> Iterator[tuple[int, int]]:
    """(lane, rows) that each owned lane gives to a step."""
    begin, end = (first_rows(rows, batch_size, lanes, owned, s) for s in (step, step + 1))
    for lane in owned:
        yield lane, end[lane] - begin[lane]
