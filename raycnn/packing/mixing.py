"""How a collection becomes mixed tasks, each of which writes whole shards; and which split a key belongs to."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from raycnn.config import MIB, PackConfig
from raycnn.errors import DataError
from raycnn.shards import SPLITS, Collection, Slice, hash_split, key_hash

BUCKETS = 64
"""Files that a listing is spilled to while it is mixed: one of them is sorted in memory at a time."""
WINDOW_BYTES = 1024 * MIB
"""What is mixed together of a source that can only be read in sequence; it lies on one worker's disk."""
TASK_ROWS = 262_144
"""Rows of one task at most, whose keys and hashes its worker holds; it ends the shards of very small images."""
SPILL_ROWS = 4096
"""Rows that wait in memory for each bucket's file."""
UNNAMED = "unnamed"
"""Stands for the split of rows whose source names none."""


class Output(NamedTuple):
    """Shards of one split that a task writes: indices first .. first + shards - 1."""

    split: str
    first: int
    shards: int


class Planner:
    """Cuts a collection into mixed tasks; memory does not grow with it, because it is sorted on disk.

    Where single rows can be read, a task is one shard of rows in the order of their hash, as if all were shuffled.
    Where only runs of rows can be, a task is a window of random runs, and writes shards of every split that it
    may hold.
    """

    def __init__(self, config: PackConfig, collection: Collection, scratch: Path) -> None:
        self._config, self._collection, self._scratch = config, collection, scratch
        self._used: Counter[str] = Counter()
        self.outputs: list[list[Output]] = []

    def tasks(self, slices: Iterator[Slice]) -> Iterator[list[Slice]]:
        """The tasks; `outputs` says of each that has been taken what it writes."""
        limit = self._config.shard_mib * MIB if self._collection.random_access else WINDOW_BYTES
        _spill(slices, self._group, self._order, self._scratch)
        for group in (*SPLITS, UNNAMED):
            mixed = (s for b in range(BUCKETS) for s in _read_bucket(self._scratch, group, b))
            for task in _cut(mixed, limit):
                self.outputs.append(self._outputs(group, sum(s.bytes for s in task)))
                yield task

    def _group(self, piece: Slice) -> str:
        """The split that the slice goes to, or for a run of rows the one that its source names."""
        named = self._collection.split_of(piece)
        if named not in (None, *SPLITS):
            raise DataError(
                f"{self._collection.store.address(piece.path)} names the split {named!r}; "
                f"call it {', '.join(SPLITS[:-1])} or {SPLITS[-1]}, or leave it empty to have one chosen by the key"
            )
        if self._collection.random_access:
            return split_for(piece.key, named, self._collection.splits, self._config)
        return named or UNNAMED

    def _order(self, piece: Slice) -> int:
        name = piece.key if self._collection.random_access else self._collection.run_of(piece)
        return key_hash(name, f"order-{self._config.seed}")

    def _outputs(self, group: str, size: int) -> list[Output]:
        shares = {group: 1.0}
        if not self._collection.random_access:
            shares = split_shares(None if group == UNNAMED else group, self._collection.splits, self._config)
        outputs = []
        for split, share in shares.items():
            count = (
                1 if self._collection.random_access else max(1, round(size * share / (self._config.shard_mib * MIB)))
            )
            outputs.append(Output(split, self._used[split], count))
            self._used[split] += count
        return outputs


def split_for(key: str, named: str | None, splits: tuple[str, ...], config: PackConfig) -> str:
    """The split of a key: the source's own; else by hash. Validation is held out of train where none is named."""
    if named is None:
        return hash_split(key, config.val, config.test)
    if named == "train" and "val" not in splits:
        return hash_split(key, config.val, 0)
    return named


def split_shares(named: str | None, splits: tuple[str, ...], config: PackConfig) -> dict[str, float]:
    """The splits that keys of a named split go to, with the share of each."""
    if named is None:
        shares = {"train": 1 - config.val - config.test, "val": config.val, "test": config.test}
    elif named == "train" and "val" not in splits:
        shares = {"train": 1 - config.val, "val": config.val}
    else:
        shares = {named: 1.0}
    return {split: share for split, share in shares.items() if share > 0}


_SPILL = pa.schema(
    [("order", pa.uint64())]
    + [(name, pa.string() if name in ("key", "path", "etag") else pa.int64()) for name in Slice._fields]
)


def _spill(
    slices: Iterator[Slice], group_of: Callable[[Slice], str], order_of: Callable[[Slice], int], scratch: Path
) -> None:
    """Append each slice to the file of its group and of the top bits of its order."""
    waiting: dict[tuple[str, int], list[tuple[Any, ...]]] = {}
    with ExitStack() as stack:
        writers: dict[tuple[str, int], pa.RecordBatchFileWriter] = {}

        def flush(place: tuple[str, int]) -> None:
            if place not in writers:
                file = scratch / f"{place[0]}-{place[1]}.arrow"
                writers[place] = stack.enter_context(pa.ipc.new_file(str(file), _SPILL))
            columns = zip(*waiting.pop(place), strict=True)
            arrays = [pa.array(c, f.type) for c, f in zip(columns, _SPILL, strict=True)]
            writers[place].write_batch(pa.RecordBatch.from_arrays(arrays, schema=_SPILL))

        for piece in slices:
            order = order_of(piece)
            place = (group_of(piece), order * BUCKETS >> 64)
            rows = waiting.setdefault(place, [])
            rows.append((order, *piece))
            if len(rows) == SPILL_ROWS:
                flush(place)
        for place in list(waiting):
            flush(place)


def _read_bucket(scratch: Path, group: str, bucket: int) -> Iterator[Slice]:
    file = scratch / f"{group}-{bucket}.arrow"
    if file.exists():
        # The rows of a run have one order: they stay together, as they lie in their object.
        table = pa.ipc.open_file(str(file)).read_all().sort_by([(c, "ascending") for c in ("order", "path", "first")])
        for batch in table.to_batches(max_chunksize=8192):
            for _, *piece in zip(*(c.to_pylist() for c in batch.columns), strict=True):
                yield Slice(*piece)


def _cut(slices: Iterable[Slice], limit: int) -> Iterator[list[Slice]]:
    """Consecutive slices as tasks of at most `limit` bytes and TASK_ROWS rows (one larger slice is a task)."""
    task: list[Slice] = []
    size = rows = 0
    for piece in slices:
        if task and (size + piece.bytes > limit or rows + piece.rows > TASK_ROWS):
            yield task
            task, size, rows = [], 0, 0
        task.append(piece)
        size, rows = size + piece.bytes, rows + piece.rows
    if task:
        yield task
