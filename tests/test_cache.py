"""Decoded images that a node keeps: the same samples with and without them, and what may go wrong on the disk."""

import io
import json
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raycnn.config import ImageSpec, TrainConfig, make
from raycnn.data.cache import Cache, Geometry, geometry_of, open_cache
from raycnn.data.feed import Block, FeedBatch, LaneBuffers, decode, items_of, through_cache
from raycnn.errors import Status
from raycnn.shards import (
    FORMAT,
    MANIFEST,
    VERSION,
    PackedCollection,
    PackedRow,
    open_collection,
    summarise,
    write_shard,
)
from raycnn.shards.order import Cursor, epoch_pieces, first_rows, step_counts, steps_per_epoch
from raycnn.storage import open_store

GRAY = {"channels": 1, "mean": (0.5,), "std": (0.5,)}
SMALL, LARGE = ImageSpec(height=8, width=8, crop=1.0, **GRAY), ImageSpec(height=32, width=32)
ROWS, BATCH, LANES, SEED, ROOM = 600, 24, 8, 5, 10**9


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this node keeps decoded images."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "raycnn" / "decoded"


def encoded(rng: np.random.Generator, height: int, width: int, channels: int) -> bytes:
    sink = io.BytesIO()
    image = np.repeat(np.repeat(rng.integers(0, 256, (height // 4, width // 4, channels), np.uint8), 4, 0), 4, 1)
    Image.fromarray(image.squeeze()).save(sink, "PNG")
    return sink.getvalue()


def packed_of(root: Path, spec: ImageSpec, sizes: list[tuple[int, int]], rows: int = ROWS) -> PackedCollection:
    """A packed training split of images of these sizes in turn, some unreadable and some without a label."""
    rng, entries = np.random.default_rng(0), []
    for shard, part in enumerate((range(rows // 4), range(rows // 4, rows))):
        path = f"data/train-{shard:05d}-of-00002.parquet"
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        made = []
        for i in part:
            height, width = sizes[i % len(sizes)]
            bad, label = i % 50 == 7, None if i % 40 == 3 else i % 2
            content = b"broken" if bad else encoded(rng, height, width, spec.channels)
            status = Status.UNSUPPORTED if bad else Status.OK
            made.append(PackedRow(f"{i:04d}", content, label, height, width, status))
        groups = write_shard(root / path, made, ["left", "right"])
        about = {"status": {"ok": len(made)}, "classes": {}, "sha256": str(shard), "split": "train"}
        size = (root / path).stat().st_size
        entries.append(about | {"path": path, "rows": len(made), "row_groups": groups, "bytes": size})
    sides = {name: [min(s), max(s)] for name, s in zip(("height", "width"), zip(*sizes, strict=True), strict=True)}
    manifest = {"format": FORMAT, "version": VERSION, "class_names": ["left", "right"], "shards": entries}
    (root / MANIFEST).write_text(json.dumps(manifest | {"splits": summarise(entries), "images": sides}))
    collection = open_collection(str(root))
    assert isinstance(collection, PackedCollection)
    return collection


def cache_of(packed: PackedCollection, geometry: Geometry, budget: int = ROOM, said: list[str] | None = None) -> Cache:
    cache = open_cache(packed.digest, geometry, ROWS, budget, [].append if said is None else said.append)
    assert cache is not None
    return cache


class Feed:
    """A rank's batches of some epochs, decoded in this process; it counts the rows that it has decoded."""

    def __init__(self, packed: PackedCollection, spec: ImageSpec, rank: int = 0, world: int = 1) -> None:
        self._packed, self._spec, self.decoded = packed, spec, 0
        self._groups = list(packed.select("train", Counter()))
        self._owned = [lane for lane in range(LANES) if lane % world == rank]

    def batches(self, epochs: range, geometry: Geometry | None, cache: Cache | None = None) -> Iterator[FeedBatch]:
        def blocks() -> Iterator[Block]:
            for epoch in epochs:
                pieces = epoch_pieces(self._groups, SEED, Cursor(epoch, 0), BATCH, LANES, self._owned, 100, 4)
                firsts = np.cumsum([0, *(g.rows for g in self._groups)])
                places = (
                    p._asdict() | {"slice": list(self._groups[p.group]), "row": int(firsts[p.group])} for p in pieces
                )
                items = list(items_of(places, 100, SEED, cache))
                yield from decoded(items) if cache is None else through_cache(items, decoded, SEED, cache)

        def decoded(items: list[dict]) -> Iterator[Block]:
            spec = self._spec.model_dump(mode="json")
            for item in items:
                block = decode(json.loads(json.dumps(item)), self._packed.store.url, "", spec, SEED, 1.0, geometry)
                self.decoded += len(block["label"])
                yield block

        buffers = LaneBuffers(blocks(), self._spec, cache)
        for epoch in epochs:
            buffers.begin(epoch, first_rows(ROWS, BATCH, LANES, self._owned, 0))
            for step in range(steps_per_epoch(ROWS, BATCH)):
                yield buffers.take(list(step_counts(ROWS, BATCH, LANES, self._owned, step)))


def assert_same(ones: Iterator[FeedBatch], others: Iterator[FeedBatch], pixels: bool = True) -> None:
    count = 0
    for one, other in zip(ones, others, strict=True):
        for name in ("labels", "keys", "lanes") + (("sizes", "pixels") if pixels else ()):
            assert np.array_equal(getattr(one, name), getattr(other, name)), name
        assert one.unlabelled == other.unlabelled
        assert [(f.hash, f.bad.status) for f in one.failures] == [(f.hash, f.bad.status) for f in other.failures]
        count += len(one.labels)
    assert count > ROWS / 2


@pytest.mark.parametrize(("spec", "sizes"), [(SMALL, [(8, 8)]), (LARGE, [(64, 48), (48, 64), (28, 40), (48, 200)])])
def test_samples_and_their_order_are_the_same_with_and_without_the_cache_and_need_the_shards_once(
    tmp_path, spec, sizes
):
    packed = packed_of(tmp_path, spec, sizes)
    geometry = geometry_of(spec, packed.manifest["images"])
    assert (geometry.short == 0) == (spec is SMALL)
    feed, epochs = Feed(packed, spec), range(3)
    boxed = list(feed.batches(epochs, None))
    decoded = list(feed.batches(epochs, geometry))
    assert_same(iter(boxed), iter(decoded), pixels=spec is SMALL and all(batch.sizes is None for batch in decoded))
    feed.decoded = 0
    kept = feed.batches(epochs, geometry, cache_of(packed, geometry))
    steps = steps_per_epoch(ROWS, BATCH)
    assert_same((next(kept) for _ in range(steps)), iter(decoded[:steps]))
    assert feed.decoded == ROWS
    for shard in (tmp_path / "data").iterdir():
        shard.unlink()
    assert_same(kept, iter(decoded[steps:]))
    assert_same(feed.batches(epochs, geometry, cache_of(packed, geometry)), iter(decoded))
    assert feed.decoded == ROWS


def test_ranks_of_a_node_share_what_they_decode(tmp_path):
    packed = packed_of(tmp_path, SMALL, [(8, 8)])
    geometry = geometry_of(SMALL, packed.manifest["images"])
    feeds = [Feed(packed, SMALL, rank, 2) for rank in range(2)]
    batches = [feed.batches(range(2), geometry, cache_of(packed, geometry)) for feed in feeds]
    seen = 0
    for _ in range(2 * steps_per_epoch(ROWS, BATCH)):
        seen += sum(len(next(mine).labels) for mine in batches)
    assert 1.8 * ROWS < seen <= 2 * ROWS
    assert ROWS <= sum(feed.decoded for feed in feeds) < 1.2 * ROWS


def block_of(rows: list[int], value: int = 7, bad: str = "") -> Block:
    count, bads = len(rows), np.full(len(rows), "", object)
    bads[-1] = bad
    size = np.array([(8, 8)] * (count - 1) + [(0, 0) if bad else (8, 8)], np.int32)
    pixels = np.full((count, 64), value, np.uint8)
    columns = {"row": np.array(rows), "label": np.arange(count), "key": -np.arange(count), "size": size}
    return columns | {"pixels": pixels, "bad": bads}


WHOLE = Geometry(0, 1, 64, 64)


def opened(digest: str = "a" * 64, geometry: Geometry = WHOLE, budget: int = ROOM, rows: int = 6) -> Cache:
    cache = open_cache(digest, geometry, rows, budget, [].append)
    assert cache is not None
    return cache


def test_what_is_kept_comes_back_with_its_status_and_only_for_its_data_and_its_geometry():
    cache, rows = opened(), np.array([4, 1, 2])
    assert cache.keep(block_of(rows.tolist(), bad=f"{Status.TRUNCATED}\tkey: ends early"))
    again = opened()
    assert again.holds(rows)
    assert not again.holds(np.array([4, 0]))
    assert (again.pixels[[4, 1]] == 7).all()
    columns = again.columns(rows)
    assert (columns["label"].tolist(), columns["key"].tolist()) == ([0, 1, 2], [0, -1, -2])
    assert columns["bad"].tolist() == ["", "", f"{Status.TRUNCATED}\t\0from the decoded cache"]
    for other in (opened("b" * 64), opened(geometry=Geometry(8, 1, 64, 64)), opened(rows=7)):
        assert not any(other.holds(np.array([row])) for row in range(6))


DYING = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from test_cache import block_of, opened
cache, write = opened(), os.pwrite
cache.keep(block_of([0, 1]))
os.pwrite = lambda *given: (write(*given), os.kill(os.getpid(), signal.SIGKILL))
cache.keep(block_of([2, 3]))
"""


def test_a_row_over_which_a_process_has_died_is_not_there():
    done = subprocess.run([sys.executable, "-c", DYING, str(Path(__file__).parent)], check=False)
    assert done.returncode < 0
    cache = opened()
    assert (cache.pixels[[2, 3]] == 7).all()
    assert cache.holds(np.array([0, 1]))
    assert not any(cache.holds(np.array([row])) for row in (2, 3, 4, 5))


def test_what_a_power_failure_may_have_torn_does_not_count_and_what_is_whole_does(home):
    for rows, is_whole in (([0, 1], False), ([0, 1, 2, 3, 4, 5], True)):
        cache = opened()
        cache.keep(block_of(rows))
        cache.close()
        (index,) = home.glob("*/index")
        with index.open("r+b") as file:
            file.write(b"another start of the machine")
        assert opened().holds(np.array(rows)) == is_whole


def test_nodes_that_share_a_home_leave_each_other_what_they_have(home):
    rows, said = [0, 1], []
    first = opened()
    first.keep(block_of(rows))
    (index,) = home.glob("*/index")
    with index.open("r+b") as file:
        file.write(b"the start of another machine")
    assert open_cache("a" * 64, WHOLE, 6, ROOM, said.append) is None
    assert "in use by another node; set XDG_CACHE_HOME" in said[0]
    assert first.holds(np.array(rows))
    assert list(home.glob("*/index")) == [index]
    first.close()
    assert not opened().holds(np.array(rows))


def test_data_that_was_not_used_for_longest_makes_room_and_data_in_use_stays(home):
    rows = [0, 1, 2, 3, 4, 5]
    for name in "abc":
        cache = opened(name * 64)
        cache.keep(block_of(rows))
        cache.close()
    opened("b" * 64).close()
    used = opened("a" * 64)
    (size,) = {sum(f.stat().st_blocks * 512 for f in index.parent.iterdir()) for index in home.glob("*/index")}
    (home / ".torn").mkdir()
    opened("d" * 64, budget=6 * 64 + 2 * size)
    assert sorted(file.name[0] for file in home.iterdir()) == ["a", "b", "d", "l"]
    opened("e" * 64, budget=6 * 64 + size)
    assert sorted(file.name[0] for file in home.iterdir()) == ["a", "e", "l"]
    assert used.holds(np.array(rows))


def lane_block(ordinals: range) -> Block:
    none = np.zeros(len(ordinals), np.int64)
    return dict.fromkeys(("label", "key", "lane", "epoch"), none) | {"ordinal": np.array(ordinals)}


@pytest.mark.parametrize(
    ("blocks", "reason"),
    [
        ([range(4), range(5, 9)], "lane 0: row 5 arrived out of the order of training"),
        ([range(4), range(3, 9)], "lane 0: row 3 arrived out of the order of training"),
        ([range(4)], "the stream of samples ended early"),
    ],
)
def test_a_gap_in_the_order_stops_a_run(blocks, reason):
    buffers = LaneBuffers(map(lane_block, blocks), SMALL)
    buffers.begin(0, {0: 0})
    with pytest.raises(RuntimeError, match=reason):
        buffers.take([(0, 6)])


@pytest.mark.parametrize("what", ["disk", "budget"])
def test_where_no_more_can_be_kept_it_is_said_once_and_what_is_kept_is_used(tmp_path, what):
    packed, said = packed_of(tmp_path, SMALL, [(8, 8)]), []
    geometry, feed = geometry_of(SMALL, packed.manifest["images"]), Feed(packed, SMALL)
    decoded = list(feed.batches(range(2), geometry))
    cache = cache_of(packed, geometry, ROOM if what == "disk" else 20_000, said)
    before, feed.decoded = resource.getrlimit(resource.RLIMIT_FSIZE), 0
    try:
        if what == "disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (64 * ROWS // 2, before[1]))
        kept = list(feed.batches(range(2), geometry, cache))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_same(iter(kept), iter(decoded))
    assert ROWS < feed.decoded <= 2 * ROWS
    (text,) = said
    assert "not kept on this node" in text


def test_a_node_without_a_place_to_keep_them_says_so_and_goes_on(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    said: list[str] = []
    assert open_cache("a" * 64, WHOLE, 6, ROOM, said.append) is None
    assert len(said) == 1


def test_a_run_goes_on_as_it_began_whatever_the_budget_is_now(tmp_path):
    from raycnn.training.folder import Claim, claim

    packed = packed_of(tmp_path / "packed", SMALL, [(8, 8)])
    for name, first, then in (("kept", WHOLE, None), ("boxed", None, WHOLE)):
        store = open_store(str(tmp_path / name))
        config = make(TrainConfig, {"data": packed.store.url, "run": store.url})
        assert claim(store, config, packed, Claim(4, first)).geometry == first
        assert json.loads(store.get("run.json"))["cached"] == (first is not None)
        assert claim(store, config.model_copy(update={"cache_gib": 0.5}), packed, Claim(4, then)).geometry == first


def test_photos_are_kept_a_little_larger_than_the_model_takes_them():
    spec = ImageSpec()
    assert geometry_of(spec, {"height": [300, 900], "width": [200, 900]})[:2] == (258, 3)
    assert geometry_of(spec, {"height": [300, 300], "width": [400, 400]}) == (258, 3, 258 * 344 * 3, 258 * 344 * 3)
    assert geometry_of(spec, {"height": [10, 64], "width": [20, 64]}).short == 64


@pytest.mark.ray
def test_a_second_run_needs_no_shard_of_what_the_first_has_decoded(ray_cluster, tmp_path):
    import raycnn
    from raycnn.training import train

    rng, store = np.random.default_rng(0), open_store(str(tmp_path / "raw"))
    for i in range(240):
        store.put(f"{i % 2}/{i:03d}.png", b"broken" if i % 60 == 1 else encoded(rng, 8, 8, 1))
    raycnn.pack(store.url, str(tmp_path / "packed"), val=0.2, test=0.0)
    given = {"data": str(tmp_path / "packed"), "epochs": 1}
    for name in ("first", "second"):
        train(make(TrainConfig, given | {"run": str(tmp_path / name)}))
        for shard in (tmp_path / "packed" / "data").glob("train-*"):
            shard.write_bytes(bytes(shard.stat().st_size))
    first, second = (json.loads((tmp_path / name / "metrics.jsonl").read_text()) for name in ("first", "second"))
    assert first["train/loss"] == second["train/loss"]
    assert first["skipped"] == second["skipped"] != {}
    with pytest.raises(Exception, match="parquet"):
        train(make(TrainConfig, given | {"run": str(tmp_path / "third"), "cache_gib": 0.0, "max_failures": 0}))
