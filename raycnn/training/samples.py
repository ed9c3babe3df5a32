"""What a training worker is given: its share of every step, and of validation."""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raycnn import data, loop
from raycnn.config import GIB, MIB, ImageSpec, TrainConfig
from raycnn.errors import Status
from raycnn.shards import PackedCollection
from raycnn.shards.order import (
    Cursor,
    Piece,
    copies,
    epoch_pieces,
    first_rows,
    row_order,
    step_counts,
    steps_per_epoch,
)
from raycnn.training.folder import Claim

PIECE_BYTES = 96 * MIB
"""Most pixels that a decode task makes at a time. Ray Data cuts what exceeds 128 MiB into blocks, and a task that
waits for its blocks to be taken keeps its CPU: those of training would starve those of validation for ever."""
VAL_CACHE_BYTES = 256 * MIB
"""Decoded validation pixels that a worker keeps, so that later epochs do not decode them again."""
PIECE_ROWS = 4096
"""Most rows that it makes; a task takes 10 ms beside its work, in which it could decode hundreds of tiny images."""
HEAD_ROWS = 16
"""Least rows of each lane that are decoded first of all, so that the first step comes soon."""
STREAM_ITEMS = (64, 512)
"""Items that one Ray Data execution is made of: the first, and at most. Each takes 2 ms to be submitted, all of which
pass before the first is decoded; so the first step does not wait long, and later executions are rare."""
BATCHES_AHEAD = 2
"""Batches that are ready before a step asks for them: pages of the decoded cache may have to come from the disk."""


class Samples:
    """The training and the validation split, as one rank of a number of ranks is given them."""

    def __init__(
        self,
        config: TrainConfig,
        packed: PackedCollection,
        spec: ImageSpec,
        plan: data.TrainPlan,
        claim: Claim,
        say: Callable[[str], None],
    ) -> None:
        """Plan what this rank reads.

        Args:
            config: How to train.
            packed: The data.
            spec: The model's input.
            plan: What decode tasks may use.
            claim: The run's lanes, of which a rank owns whole ones, and how it keeps decoded images.
            say: Is told why no more can be kept on this node.
        """
        self._config, self._packed, self._plan, self.spec = config, packed, plan, spec
        self.claim, self._say = claim, say
        self._rank, self._world = loop.rank(), loop.world_size()
        self._owned = [lane for lane in range(self.claim.lanes) if lane % self._world == self._rank]
        self._groups = list(packed.select("train", Counter()))
        self.rows = sum(g.rows for g in self._groups)
        """Of the training split, over all ranks."""
        self.steps = steps_per_epoch(self.rows, config.batch_size)
        """Of an epoch."""
        self._val: list[loop.Batch] | None = None
        self.val_skipped = Counter[Status]()
        """Images of this rank's share of validation that could not be read, when it was last gone through."""

    def batches(self, first: Cursor, device: torch.device) -> Iterator[tuple[loop.Batch, data.FeedBatch]]:
        """This rank's share of every step of every epoch from `first` on, in order, made ahead on a thread from now.

        Each as tensors, for which a GPU that is the `device` need not wait, and as what they were made of.
        """
        pins = device.type == "cuda"
        made = ((to_torch(taken, pins=pins), taken) for taken in self._made_batches(first))
        return data.read_ahead(made, BATCHES_AHEAD)

    def _made_batches(self, first: Cursor) -> Iterator[data.FeedBatch]:
        c, geometry = self._config, self.claim.geometry

        def starts() -> Iterator[Cursor]:
            yield first
            yield from (Cursor(epoch, 0) for epoch in range(first.epoch + 1, c.epochs))

        cache = None if geometry is None else self._cache(geometry)
        head = max(HEAD_ROWS, c.batch_size // self.claim.lanes)
        epochs = map(self._pieces, starts(), itertools.chain([head], itertools.repeat(0)))
        if cache is None:
            # What is decoded anyway is best decoded without a pause between epochs.
            epochs = iter([itertools.chain.from_iterable(epochs)])
        arguments = self._decode_arguments() | {"seed": c.seed, "crop_scale": c.crop_scale, "geometry": geometry}
        blocks = (block for pieces in epochs for block in self._stream(pieces, arguments, cache))
        buffers = data.LaneBuffers(blocks, self.spec, cache)
        has_boxes = geometry is None or (not geometry.short and c.crop_scale == 1)
        for start in starts():
            rows = first_rows(self.rows, c.batch_size, self.claim.lanes, self._owned, start.step)
            buffers.begin(start.epoch, rows)
            for step in range(start.step, self.steps):
                counts = step_counts(self.rows, c.batch_size, self.claim.lanes, self._owned, step)
                taken = buffers.take(list(counts))
                yield taken._replace(sizes=None) if has_boxes else taken

    def _pieces(self, start: Cursor, head: int) -> Iterator[dict[str, Any]]:
        """What is left of an epoch for this rank to read; `head` rows of each lane first, unless it is 0."""
        c, positions = self._config, [0, *itertools.accumulate(g.rows for g in self._groups)]
        visits = [np.ones(g.rows, np.int64) for g in self._groups]
        if c.imbalance == "sampler":
            visits = copies(self._labels, c.seed, start.epoch)
        visited = [g._replace(rows=int(n.sum())) for g, n in zip(self._groups, visits, strict=True)]
        for piece in epoch_pieces(
            visited, c.seed, start, c.batch_size, self.claim.lanes, self._owned, self._most_rows(), head
        ):
            made = piece._asdict() | {"slice": list(self._groups[piece.group]), "row": positions[piece.group]}
            yield made | (_repeated(piece, visits[piece.group], c.seed) if c.imbalance == "sampler" else {})

    @functools.cached_property
    def _labels(self) -> list[npt.NDArray[np.int64]]:
        return self._packed.labels(self._groups)

    def _most_rows(self) -> int:
        """That one task may decode, of the training or of the validation split."""
        sizes = [self.spec.height * self.spec.width * self.spec.channels]
        sizes += [self.claim.geometry.slot_bytes] if self.claim.geometry else []
        return max(1, min(PIECE_ROWS, PIECE_BYTES // max(sizes)))

    def _cache(self, geometry: data.Geometry) -> data.Cache | None:
        budget = int(self._config.cache_gib * GIB)
        if not budget:
            return None
        return data.open_cache(self._packed.digest, geometry, self.rows, budget, self._say)

    def _stream(
        self, pieces: Iterable[dict[str, Any]], arguments: dict[str, Any], cache: data.Cache | None = None
    ) -> Iterator[data.Block]:
        size, most = STREAM_ITEMS
        items = data.items_of(pieces, self._most_rows(), arguments.get("seed"), cache)
        while chunk := list(itertools.islice(items, size)):
            decoded = functools.partial(data.stream, data.decode, plan=self._plan, arguments=arguments)
            yield from decoded(chunk) if cache is None else data.through_cache(chunk, decoded, self._config.seed, cache)
            size = min(2 * size, most)

    def _decode_arguments(self) -> dict[str, Any]:
        spec = self.spec.model_dump(mode="json")
        return {"url": self._packed.store.url, "digest": self._packed.digest, "spec": spec}

    def validation(self) -> Iterator[loop.Batch]:
        """This rank's share of the validation split: whole ranges of rows, each row on exactly one rank."""
        if self._val is not None:
            yield from self._val
            return
        self.val_skipped.clear()
        groups = list(self._packed.select("val", Counter()))
        rows = sum(g.rows for g in groups)
        low, high = self._rank * rows // self._world, (self._rank + 1) * rows // self._world
        size = (high - low) * self.spec.height * self.spec.width * self.spec.channels
        kept: list[loop.Batch] | None = [] if size <= VAL_CACHE_BYTES else None
        pieces = data.row_ranges(groups, low, high, self._most_rows())
        for block in self._stream(pieces, self._decode_arguments()):
            for at in range(0, len(block["label"]), self._config.batch_size):
                part = {k: v[at : at + self._config.batch_size] for k, v in block.items()}
                taken = data.join([part], self.spec)
                self.val_skipped.update(failure.bad.status for failure in taken.failures)
                batch = to_torch(taken)
                if kept is not None:
                    kept.append(batch)
                yield batch
        self._val = kept


def _repeated(piece: Piece, visits: npt.NDArray[np.int64], seed: int) -> dict[str, list[int]]:
    """The rows of a piece of a group whose rows are visited so often, and the how manieth time each comes."""
    rows = np.repeat(np.arange(len(visits)), visits)
    nth = np.arange(len(rows)) - np.repeat(np.cumsum(visits) - visits, visits)
    order = row_order(len(rows), seed, piece.epoch, piece.group)[piece.start : piece.stop]
    return {"rows": rows[order].tolist(), "copies": nth[order].tolist()}


def to_torch(taken: data.FeedBatch, *, pins: bool = False) -> loop.Batch:
    """The same memory as tensors; with `pins` a copy that a GPU fetches by itself, while the program goes on."""

    def tensor(array: npt.NDArray[Any]) -> torch.Tensor:
        made = torch.from_numpy(array)
        return made.pin_memory() if pins else made

    pixels, labels, keys, lanes = map(tensor, (taken.pixels, taken.labels, taken.keys, taken.lanes))
    return loop.Batch(pixels, labels, keys, lanes, None if taken.sizes is None else tensor(taken.sizes))
