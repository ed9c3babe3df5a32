"""Samples on their way to a training worker: decoded by Ray Data tasks, in order, taken lane by lane.

Nothing here imports torch: a task that decodes does not need it, and it takes seconds to import.
"""

import functools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from raycnn import images
from raycnn.config import ImageSpec
from raycnn.errors import Bad
from raycnn.shards import Collection, Slice, key_hash, open_collection
from raycnn.shards.order import row_order

Block = dict[str, np.ndarray]
"""Decoded rows: pixels (n, H, W, C) uint8, label, key, lane, epoch, ordinal (n,) int64, bad (n,) text; and where the
images differ in size, size (n, 2) int32, the height and width of each at the top left of its zero-padded frame."""

KEY_SALT = "raycnn-augment"
"""Of the hashes of keys that augmentation follows from."""


class FeedBatch(NamedTuple):
    """Rows that can be trained on, and why others cannot."""

    pixels: npt.NDArray[np.uint8]
    """(n, H, W, C)."""
    labels: npt.NDArray[np.int64]
    """(n,)."""
    keys: npt.NDArray[np.int64]
    """(n,): hashes of the images' keys."""
    lanes: npt.NDArray[np.int64]
    """(n,)."""
    sizes: npt.NDArray[np.int32] | None
    """(n, 2): height and width of each image at the top left of its zero-padded frame; None where all fill it, cut as
    the model wants them."""
    failures: list[Bad]
    unlabelled: int
    """Rows that have pixels, and no label."""


def row_ranges(groups: Sequence[Slice], low: int, high: int, max_rows: int) -> list[dict[str, Any]]:
    """The rows [low, high) of the groups laid end to end, as items of at most `max_rows` for `decode_piece`."""
    items, position = [], 0
    for index, group in enumerate(groups):
        start, stop = max(low, position), min(high, position + group.rows)
        for at in range(start, stop, max_rows):
            place = {"epoch": -1, "lane": 0, "group": index, "ordinal": at, "slice": list(group)}
            items.append(place | {"start": at - position, "stop": min(at + max_rows, stop) - position})
        position += group.rows
    return items


@functools.lru_cache(maxsize=1)
def _open_once(url: str, digest: str) -> Collection:
    """The packed data set, opened once in each process that decodes; `digest` tells data sets at one URL apart."""
    return open_collection(url)


def decode_piece(
    item: dict[str, Any],
    url: str,
    digest: str,
    spec: dict[str, Any],
    seed: int | None = None,
    crop_scale: float = 1.0,
) -> Block:
    """Read and decode one piece: a random box for each image from (seed, epoch, key), or the centre without a seed."""
    packed, shape = _open_once(url, digest), ImageSpec(**spec)
    group = Slice(*item["slice"])
    samples = list(packed.read([group]))
    order = np.arange(group.rows) if seed is None else row_order(group.rows, seed, item["epoch"], item["group"])
    chosen = [samples[i] for i in order[item["start"] : item["stop"]]]
    pixels = np.zeros((len(chosen), shape.height, shape.width, shape.channels), np.uint8)
    bad = [""] * len(chosen)
    for i, sample in enumerate(chosen):
        box = None
        if seed is not None and crop_scale < 1:
            rng = np.random.default_rng([seed, item["epoch"], key_hash(sample.key, "raycnn-box")])
            box = images.random_box(shape, rng, scale=(crop_scale, 1.0))
        made = sample.bad or images.pixels(sample.encoded, shape, box)
        if isinstance(made, Bad):
            bad[i] = f"{made.status}\t{sample.key}: {made.detail}"
        else:
            pixels[i] = made
    return {
        "pixels": pixels,
        "label": np.array([-1 if s.label is None else s.label for s in chosen], np.int64),
        "key": np.array([key_hash(s.key, KEY_SALT) for s in chosen], np.uint64).view(np.int64),
        "lane": np.full(len(chosen), item["lane"], np.int64),
        "epoch": np.full(len(chosen), item["epoch"], np.int64),
        "ordinal": item["ordinal"] + np.arange(len(chosen)),
        "bad": np.array(bad, object),
    }


class LaneBuffers:
    """Decoded rows that wait for their step, lane by lane; a gap in their order stops the run."""

    def __init__(self, blocks: Iterator[Block], spec: ImageSpec) -> None:
        self._blocks, self._spec, self._epoch = blocks, spec, -1
        self._waiting: dict[int, deque[Block]] = {}
        self._next: dict[int, int] = {}

    def begin(self, epoch: int, first: Mapping[int, int]) -> None:
        """Go on to an epoch, each lane at its first row; every row of the epoch before must have been taken."""
        if any(self._waiting.values()):
            raise RuntimeError("rows of the epoch before are left over: a gap in the order of training")
        self._epoch, self._next = epoch, dict(first)

    def take(self, counts: list[tuple[int, int]]) -> FeedBatch:
        """The next rows of each lane as one batch, without those that have no pixels or no label."""
        return join([part for lane, count in counts for part in self._rows(lane, count)], self._spec)

    def _rows(self, lane: int, count: int) -> Iterator[Block]:
        waiting = self._waiting.setdefault(lane, deque())
        while count:
            while not waiting:
                self._pull()
            part = waiting.popleft()
            if len(part["label"]) > count:
                waiting.appendleft({k: v[count:] for k, v in part.items()})
                part = {k: v[:count] for k, v in part.items()}
            count -= len(part["label"])
            yield part

    def _pull(self) -> None:
        block = next(self._blocks, None)
        if block is None:
            raise RuntimeError("the stream of samples ended early: a gap in the order of training")
        starts = np.flatnonzero(np.diff(block["lane"], prepend=-1))
        for start, stop in zip(starts, [*starts[1:], len(block["lane"])], strict=True):
            lane, ordinal = int(block["lane"][start]), int(block["ordinal"][start])
            if block["epoch"][start] != self._epoch or ordinal != self._next[lane]:
                raise RuntimeError(f"lane {lane}: row {ordinal} arrived out of the order of training")
            self._next[lane] = ordinal + int(stop - start)
            self._waiting.setdefault(lane, deque()).append({k: v[start:stop] for k, v in block.items()})


def join(parts: Sequence[Block], spec: ImageSpec) -> FeedBatch:
    """The parts as one batch, without the rows that have no pixels or no label."""
    parts = parts or [_no_rows(spec)]
    labels, keys, lanes, bad = (np.concatenate([p[k] for p in parts]) for k in ("label", "key", "lane", "bad"))
    pixels = _in_one_frame([p["pixels"] for p in parts])
    sizes = np.concatenate([p["size"] for p in parts]) if "size" in parts[0] else None
    failures = [Bad(*text.split("\t", 1)) for text in bad if text]
    readable = np.array([not text for text in bad], bool)
    usable = readable & (labels >= 0)
    unlabelled = int(np.count_nonzero(readable & ~usable))
    if not usable.all():
        pixels, labels, keys, lanes = pixels[usable], labels[usable], keys[usable], lanes[usable]
        sizes = None if sizes is None else sizes[usable]
    return FeedBatch(pixels, labels, keys, lanes, sizes, failures, unlabelled)


def _no_rows(spec: ImageSpec) -> Block:
    none = np.zeros(0, np.int64)
    pixels = np.zeros((0, spec.height, spec.width, spec.channels), np.uint8)
    return {"pixels": pixels, "label": none, "key": none, "lane": none, "bad": np.zeros(0, object)}


def _in_one_frame(parts: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint8]:
    """(n, H, W, C) of all the parts, padded with zeros to the largest height and width of them."""
    frames = {part.shape[1:] for part in parts}
    if len(frames) == 1:
        return np.concatenate(parts)
    made = np.zeros((sum(map(len, parts)), *(max(sides) for sides in zip(*frames, strict=True))), np.uint8)
    at = 0
    for part in parts:
        made[at : at + len(part), : part.shape[1], : part.shape[2]] = part
        at += len(part)
    return made
