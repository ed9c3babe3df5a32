"""Samples on their way to a training worker: decoded by Ray Data tasks, in order, taken lane by lane.

Nothing here imports torch: a task that decodes does not need it, and it takes seconds to import.
"""

import functools
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from raycnn import images
from raycnn.config import ImageSpec
from raycnn.data.cache import Cache, Geometry
from raycnn.errors import Bad, Status
from raycnn.shards import Collection, Sample, Slice, key_hash, open_collection
from raycnn.shards.order import row_order

Block = dict[str, np.ndarray]
"""Decoded rows: pixels (n, H, W, C) uint8, label, key, lane, epoch, ordinal, copy (n,) int64, and bad (n,) text:
"" or what is wrong, as `STATUS tab KEY nul DETAIL`.

Of images that are, or could be, in the decoded cache: row (n,) int64, the place within the split; size (n, 2) int32,
height and width; and pixels (n, B) uint8, the H x W x C bytes of each and zeros, or none where the cache has them.
"""

Piece = dict[str, Any]
"""A `shards.order.Piece` with its row group, `slice`, and `row`, the place of the group's first row in the split.

Where rows come more than once in an epoch, `rows` are those of the piece, and `copies` the how manieth time each comes.
"""

FIRST_ROWS = 64
"""Of the first item that is decoded, so that the first step comes soon."""
ANOTHER = 0x632BE59BD9B4E019
"""An odd number, whose multiples tell the copies of one image apart."""
KEY_SALT = "raycnn-augment"
"""Of the hashes of keys that augmentation follows from."""


class Failure(NamedTuple):
    """An image that cannot be trained on."""

    key: str
    """Empty where it is the decoded cache that says so, which knows no more than the hash."""
    hash: int
    """Of the key, as in FeedBatch."""
    bad: Bad


class FeedBatch(NamedTuple):
    """Rows that can be trained on, and why others cannot."""

    pixels: npt.NDArray[np.uint8]
    """(n, H, W, C)."""
    labels: npt.NDArray[np.int64]
    """(n,)."""
    keys: npt.NDArray[np.int64]
    """(n,): hashes of the images' keys, and of the how manieth time that each comes in the epoch."""
    lanes: npt.NDArray[np.int64]
    """(n,)."""
    sizes: npt.NDArray[np.int32] | None
    """(n, 2): height and width of each image at the top left of its zero-padded frame; None where all fill it, cut as
    the model wants them."""
    failures: list[Failure]
    unlabelled: int
    """Rows that have pixels, and no label."""


def feed_key(key: str) -> int:
    """The hash of a key that batches carry, in int64."""
    return int.from_bytes(key_hash(key, KEY_SALT).to_bytes(8), signed=True)


def row_ranges(groups: Sequence[Slice], low: int, high: int, max_rows: int) -> list[Piece]:
    """The rows [low, high) of the groups laid end to end, as pieces of at most `max_rows`."""
    pieces, position = [], 0
    for index, group in enumerate(groups):
        start, stop = max(low, position), min(high, position + group.rows)
        for at in range(start, stop, max_rows):
            place = {"epoch": -1, "lane": 0, "group": index, "ordinal": at, "slice": list(group), "row": position}
            pieces.append(place | {"start": at - position, "stop": min(at + max_rows, stop) - position})
        position += group.rows
    return pieces


def rows_of(piece: Piece, seed: int | None) -> npt.NDArray[np.int64]:
    """The rows of a piece, within its group: in the order of the seed, or as they stand there without one."""
    if "rows" in piece:
        return np.array(piece["rows"], np.int64)
    rows = Slice(*piece["slice"]).rows
    order = np.arange(rows) if seed is None else row_order(rows, seed, piece["epoch"], piece["group"])
    return order[piece["start"] : piece["stop"]]


def items_of(
    pieces: Iterable[Piece], max_rows: int, seed: int | None = None, cache: Cache | None = None
) -> Iterator[dict[str, Any]]:
    """Neighbouring pieces of one epoch as items for `decode`: few rows first, then twice as many, up to `max_rows`.

    An item of which the cache has all rows is `held`, and need not be decoded.
    """
    item: dict[str, Any] = {"pieces": []}
    rows, most, after = 0, FIRST_ROWS, None
    for piece in pieces:
        held = cache is not None and cache.holds(piece["row"] + rows_of(piece, seed))
        count = piece["stop"] - piece["start"]
        if item["pieces"] and (rows + count > most or after != (held, piece["epoch"])):
            yield item
            item, rows, most = {"pieces": []}, 0, min(2 * most, max_rows)
        item["pieces"].append(piece)
        item["held"], rows, after = held, rows + count, (held, piece["epoch"])
    if item["pieces"]:
        yield item


def through_cache(
    items: Sequence[dict[str, Any]],
    decoded: Callable[[list[dict[str, Any]]], Iterator[Block]],
    seed: int,
    cache: Cache,
) -> Iterator[Block]:
    """The items' blocks in their order: those that are held from the cache, the others decoded, and kept there."""
    missing = [item for item in items if not item["held"]]
    blocks = decoded(missing) if missing else iter(())
    for item in items:
        if item["held"]:
            rows = [piece["row"] + rows_of(piece, seed) for piece in item["pieces"]]
            yield cache.columns(np.concatenate(rows)) | _places(item["pieces"])
        else:
            block = next(blocks)
            yield {k: v for k, v in block.items() if k != "pixels"} if cache.keep(block) else block


@functools.lru_cache(maxsize=1)
def _open_once(url: str, digest: str) -> Collection:
    """The packed data set, opened once in each process that decodes; `digest` tells data sets at one URL apart."""
    return open_collection(url)


def decode(
    item: dict[str, Any],
    url: str,
    digest: str,
    spec: dict[str, Any],
    seed: int | None = None,
    crop_scale: float = 1.0,
    geometry: Sequence[Any] | None = None,
) -> Block:
    """Read and decode the pieces of one item.

    A box is taken at random from (seed, epoch, key), or about the centre without a seed. With a geometry whole images
    are made, of which boxes are taken later.
    """
    packed, shape = _open_once(url, digest), ImageSpec(**spec)
    whole = None if geometry is None else Geometry(*geometry)
    chosen, made, rows = [], [], []
    box = functools.partial(_box, shape, seed, crop_scale)
    for piece in item["pieces"]:
        samples, order = list(packed.read([Slice(*piece["slice"])])), rows_of(piece, seed)
        rows.append(piece["row"] + order)
        for i, copy in zip(order, piece.get("copies") or itertools.repeat(0), strict=False):
            sample = samples[i]
            chosen.append(sample)
            if sample.bad is not None:
                made.append(sample.bad)
            elif whole is not None:
                made.append(_whole(sample, shape, whole))
            else:
                made.append(images.pixels(sample.encoded, shape, box(piece["epoch"], copy, sample.key)))
    bad = [f"{m.status}\t{s.key}\0{m.detail}" if isinstance(m, Bad) else "" for m, s in zip(made, chosen, strict=True)]
    block = {
        "label": np.array([-1 if s.label is None else s.label for s in chosen], np.int64),
        "key": np.array([feed_key(s.key) for s in chosen], np.int64),
        "bad": np.array(bad, object),
        **_places(item["pieces"]),
    }
    if whole is not None:
        return block | {"row": np.concatenate(rows)} | _flat(made)
    pixels = np.zeros((len(made), shape.height, shape.width, shape.channels), np.uint8)
    for i, one in enumerate(made):
        if not isinstance(one, Bad):
            pixels[i] = one
    return block | {"pixels": pixels}


def _box(
    shape: ImageSpec, seed: int | None, crop_scale: float, epoch: int, copy: int, key: str
) -> images.Choose | None:
    if seed is None or crop_scale == 1:
        return None
    rng = np.random.default_rng([seed, epoch, copy, key_hash(key, "raycnn-box")])
    return images.random_box(shape, rng, scale=(crop_scale, 1.0))


def _whole(sample: Sample, shape: ImageSpec, geometry: Geometry) -> images.Pixels | Bad:
    if geometry.short:
        return images.whole(sample.encoded, geometry.short, shape.channels)
    return images.pixels(sample.encoded, shape)


def _flat(made: Sequence[images.Pixels | Bad]) -> Block:
    """Images of several sizes as one array, each of them flat; and their sizes, which are 0 where there is none."""
    shapes = [(0, 0, 0) if isinstance(one, Bad) else one.shape for one in made]
    pixels = np.zeros((len(made), max(1, *(math.prod(shape) for shape in shapes))), np.uint8)
    for i, one in enumerate(made):
        if not isinstance(one, Bad):
            pixels[i, : one.size] = one.ravel()
    return {"pixels": pixels, "size": np.array([shape[:2] for shape in shapes], np.int32)}


def _places(pieces: Sequence[Piece]) -> Block:
    counts = [piece["stop"] - piece["start"] for piece in pieces]
    columns = {name: np.repeat([piece[name] for piece in pieces], counts) for name in ("lane", "epoch")}
    ordinals = [np.arange(piece["ordinal"], piece["ordinal"] + n) for piece, n in zip(pieces, counts, strict=True)]
    copies = [piece.get("copies") or [0] * n for piece, n in zip(pieces, counts, strict=True)]
    return columns | {"ordinal": np.concatenate(ordinals), "copy": np.concatenate(copies).astype(np.int64)}


class LaneBuffers:
    """Decoded rows that wait for their step, lane by lane; a gap in their order stops the run."""

    def __init__(self, blocks: Iterator[Block], spec: ImageSpec, cache: Cache | None = None) -> None:
        """Take blocks whose pixels are there, or in the cache."""
        self._blocks, self._spec, self._cache, self._epoch = blocks, spec, cache, -1
        self._waiting: dict[int, deque[Block]] = {}
        self._next: dict[int, int] = {}

    def begin(self, epoch: int, first: Mapping[int, int]) -> None:
        """Go on to an epoch, each lane at its first row; every row of the epoch before must have been taken."""
        if any(self._waiting.values()):
            raise RuntimeError("rows of the epoch before are left over: a gap in the order of training")
        self._epoch, self._next = epoch, dict(first)

    def take(self, counts: list[tuple[int, int]]) -> FeedBatch:
        """The next rows of each lane as one batch, without those that have no pixels or no label."""
        return join([part for lane, count in counts for part in self._rows(lane, count)], self._spec, self._cache)

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


def join(parts: Sequence[Block], spec: ImageSpec, cache: Cache | None = None) -> FeedBatch:
    """The parts as one batch, without the rows that have no pixels or no label, which are counted."""
    if not parts:
        none = np.zeros(0, np.int64)
        return FeedBatch(np.zeros((0, spec.height, spec.width, spec.channels), np.uint8), none, none, none, None, [], 0)
    names = ("label", "key", "lane", "bad", "copy")
    labels, keys, lanes, bad, copies = (np.concatenate([p[name] for p in parts]) for name in names)
    sizes = np.concatenate([p["size"] for p in parts]) if "size" in parts[0] else None
    pixels = np.concatenate([p["pixels"] for p in parts]) if sizes is None else _framed(parts, sizes, spec, cache)
    # However often a row comes in an epoch, it is counted once.
    failures = [_failure(text, int(key)) for text, key, nth in zip(bad, keys, copies, strict=True) if text and not nth]
    readable = np.array([not text for text in bad], bool)
    usable = readable & (labels >= 0)
    unlabelled = int(np.count_nonzero(readable & ~usable & (copies == 0)))
    keys = keys + copies * ANOTHER
    if not usable.all():
        pixels, labels, keys, lanes = pixels[usable], labels[usable], keys[usable], lanes[usable]
        sizes = None if sizes is None else sizes[usable]
    return FeedBatch(pixels, labels, keys, lanes, sizes, failures, unlabelled)


def _failure(text: str, key: int) -> Failure:
    status, _, rest = text.partition("\t")
    name, _, detail = rest.partition("\0")
    return Failure(name, key, Bad(Status(status), detail))


def _framed(
    parts: Sequence[Block], sizes: npt.NDArray[np.int32], spec: ImageSpec, cache: Cache | None
) -> npt.NDArray[np.uint8]:
    """(n, H, W, C) of flat images, each at the top left of a frame of the largest height and width of them."""
    height, width = np.maximum(sizes.max(axis=0), 1)
    is_equal = bool(((sizes == (height, width)) | (sizes == 0)).all())
    frames = np.zeros((len(sizes), height, width, spec.channels), np.uint8)
    at = 0
    for part in parts:
        flat, rows = _flat_rows(part, cache)
        own = frames[at : at + len(rows)]
        if is_equal and flat.shape[1] == frames[0].size:
            np.take(flat, rows, axis=0, out=own.reshape(len(rows), -1), mode="clip")  # others copy all once more
        else:
            for frame, row, (high, wide) in zip(own, rows, part["size"], strict=True):
                image = flat[row, : high * wide * spec.channels]
                frame[:high, :wide] = image.reshape(high, wide, spec.channels)
        at += len(rows)
    return frames


def _flat_rows(part: Block, cache: Cache | None) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Where the flat pixels of a part are, and in which rows."""
    if "pixels" in part:
        return part["pixels"], np.arange(len(part["label"]))
    assert cache is not None
    return cache.pixels, part["row"]
