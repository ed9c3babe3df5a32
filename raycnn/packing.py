"""`raycnn pack`: any layout becomes packed shards, as a Ray Data job that streams and resumes by the ledger.

A task writes whole shards and then commits them with a record below `_pack/parts/`; the manifest is made of the
records. Listings are mixed before they are cut into shards, in buckets on disk; sources that can only be read
in sequence are mixed in windows, each of random row groups, spilled to disk and split by the hash of the key.
"""

import hashlib
import io
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import raycnn
from raycnn import data, images
from raycnn.config import MIB, Limits, PackConfig, make, to_yaml
from raycnn.errors import Bad, ConfigError, DataError, Status, StorageError
from raycnn.ledger import Ledger, Plan, UnitRef
from raycnn.shards import (
    FORMAT,
    MANIFEST,
    SPLITS,
    VERSION,
    WORK,
    Collection,
    GivenLabels,
    PackedRow,
    Sample,
    Slice,
    hash_split,
    is_manifest,
    key_hash,
    open_collection,
    read_labels,
    summarise,
    write_shard,
)
from raycnn.storage import Store, contains, open_store, scratch_folder

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
DUPLICATE_ROWS = 4_000_000
"""Content hashes that are compared in memory at a time."""
DUPLICATE_EXAMPLES = 1000


@dataclass(frozen=True)
class PackReport:
    """What the packed data set holds."""

    rows: int
    classes: int
    splits: dict[str, int]
    shards: int
    status: dict[str, int]
    duplicates: dict[str, int]
    manifest: str
    shards_written: int
    labels: int
    """Images whose label comes from --labels."""


class Output(NamedTuple):
    """Shards of one split that a task writes: indices first .. first + shards - 1."""

    split: str
    first: int
    shards: int


def pack(config: PackConfig, progress: data.Progress | None = None) -> PackReport:
    """Pack a collection, or resume, or find it packed.

    Raises:
        ConfigError: the output lies inside the input, or belongs to another source or other settings.
        DataError: the source cannot be read, or lacks a key of `labels`.
    """
    say = progress or (lambda event: None)
    if contains(config.src, config.dst) or contains(config.dst, config.src):
        raise ConfigError(f"{config.dst} and its source {config.src} lie inside each other; choose another output")
    store = open_store(config.dst)
    ledger = Ledger(store.child(WORK), "parts", ".json")
    plan = _plan(config, ledger, say)
    pending = ledger.pending(plan)
    written = _write_shards(config, ledger, plan, pending, say) if pending else 0
    if pending or not _is_finished(store):
        store.put("config.yaml", to_yaml(config).encode())
        _finish(config, store, ledger, plan)
    else:
        text = f"{store.address()} is packed; what {config.src} has got since is not in it: pack to another place"
        say({"kind": "note", "text": text})
    return _report(store, written)


def _is_finished(store: Store) -> bool:
    return store.head(MANIFEST) is not None and is_manifest(store.get(MANIFEST))


def _plan(config: PackConfig, ledger: Ledger, say: data.Progress) -> Plan:
    """The plan that exists, or a new one from a listing of the source."""
    selection = {"data": open_store(config.src).url, "exclude": list(config.exclude)}
    settings: dict[str, Any] = config.model_dump(mode="json", include={"val", "test", "seed", "shard_mib"})
    labels = read_labels(config.labels) if config.labels else GivenLabels({})
    settings |= {"version": VERSION, "labels": labels.digest if config.labels else None}
    if plans := ledger.plans():
        ledger.check(plans[0], selection, settings)
        return plans[0]
    collection = open_collection(config.src)
    say({"kind": "note", "text": f"{config.src}: {collection.layout}, because {collection.reason}"})
    about = _about(collection, labels, say)
    skipped: Counter[str] = Counter()
    with scratch_folder() as scratch:
        planned = _Planner(config, collection, scratch)
        tasks = planned.tasks(labels.found_in(collection, collection.slices(skipped, config.exclude)))
        first = next(tasks, None)
        if first is None:  # said before there is a plan, which the next command would have to follow
            raise DataError(f"{config.src}: no images to pack; left out: {dict(skipped) or 'none'}")
        tasks = itertools.chain([first], tasks)
        if config.labels:
            ledger.store.create(_labels_path(labels.digest), labels.dump())
        return ledger.plan(0, tasks, selection, settings, skipped, about | {"outputs": planned.outputs})


def _about(collection: Collection, labels: GivenLabels, say: data.Progress) -> dict[str, Any]:
    """What the plan says of the source and its classes."""
    known = collection.class_names
    if known and (new := Counter(name for name in labels.by_key.values() if name not in known)):
        told = ", ".join(f"{name} ({count:,})" for name, count in sorted(new.items()))
        say({"kind": "note", "text": f"--labels adds classes that the source does not have: {told}"})
    return {
        "class_names": list(labels.class_names(known)),
        "source_class_names": list(known),
        "labels": len(labels.by_key),
        "layout": collection.layout,
    }


def _labels_path(digest: str) -> str:
    """Where the workers find what --labels has given: the file itself may be on the driver's machine only."""
    return f"labels-{digest[:32]}.json"


class _Planner:
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


def _write_shards(config: PackConfig, ledger: Ledger, plan: Plan, pending: list[UnitRef], say: data.Progress) -> int:
    """Write the shards of every pending task; how many they are."""
    data.connect(say)
    now, limit = data.resources()
    workers = data.plan_units("pack", now, limit, len(pending))
    outputs, totals = plan.content["outputs"], Counter[str]()
    for output in (Output(*o) for unit in outputs for o in unit):
        totals[output.split] += output.shards
    items = [{"ref": r._asdict(), "outputs": outputs[r.unit]} for r in pending]
    arguments = {
        "config": config.model_dump(mode="json"),
        "totals": dict(totals),
        "class_names": plan.content["class_names"],
        "source_class_names": plan.content.get("source_class_names", plan.content["class_names"]),
        "labels": plan.content["fingerprint"].get("labels"),
    }
    done, shards = plan.rows - sum(r.rows for r in pending), 0
    bad: Counter[str] = Counter()
    for result in data.map_units(Packer, items, workers, arguments, say):
        done, shards = done + result["rows"], shards + result["shards"]
        bad.update(result["bad"])
        text = ", ".join(f"{n} {s}" for s, n in sorted(bad.items()))
        say({"kind": "progress", "done": done, "total": plan.rows, "text": text})
    return shards


class Packer:
    """Lives in one Ray worker: writes and commits the shards of one task after another."""

    def __init__(
        self,
        config: dict[str, Any],
        totals: dict[str, int],
        class_names: list[str],
        source_class_names: list[str],
        labels: str | None,
    ) -> None:
        """Open the source and the output; `labels` is the digest of what --labels has given."""
        self._config, self._totals, self._class_names = make(PackConfig, config), totals, class_names
        self._source_class_names = source_class_names
        self._store = open_store(self._config.dst)
        self._ledger = Ledger(self._store.child(WORK), "parts", ".json")
        self._collection = open_collection(self._config.src, tuple(source_class_names))
        self._labels = GivenLabels.load(self._ledger.store.get(_labels_path(labels))) if labels else GivenLabels({})

    def __call__(self, items: list[dict[str, Any]], is_again: bool) -> Iterator[dict[str, Any]]:
        """Write and commit the shards of each task."""
        return map(self._task, items)

    def _task(self, item: dict[str, Any]) -> dict[str, Any]:
        ref, outputs = UnitRef(**item["ref"]), [Output(*o) for o in item["outputs"]]
        if self._ledger.is_committed(ref):  # by somebody whose shards are not to be written over
            return {"rows": ref.rows, "shards": 0, "bad": {}}
        self._seen = _Seen()
        slices = self._ledger.slices(ref)
        read = self._collection.read(slices)
        samples = self._labels.applied(read, self._source_class_names, self._class_names)
        with scratch_folder() as scratch:
            if self._collection.random_access:
                parts = [(outputs[0].split, outputs[0].first, samples)]
            else:
                parts = self._spill(samples, self._collection.split_of(slices[0]), outputs, scratch)
            shards = [self._shard(scratch, split, index, rows) for split, index, rows in parts]
        self._ledger.store.put(f"hashes/{ref.name}.parquet", self._seen.hashes())
        record = {"shards": shards, "images": self._seen.images(), "bad": self._seen.bad}
        self._ledger.commit(ref, json.dumps(record).encode(), sum(s["rows"] for s in shards))
        bad = Counter(status for _, status, _ in self._seen.bad)
        return {"rows": ref.rows, "shards": len(shards), "bad": bad}

    def _shard(self, scratch: Path, split: str, index: int, samples: Iterable[Sample]) -> dict[str, Any]:
        name = f"data/{split}-{index:05d}-of-{self._totals[split]:05d}.parquet"
        statuses, classes = Counter[str](), Counter[str]()

        def rows() -> Iterator[PackedRow]:
            for sample in samples:
                row = self._seen.row(sample, split)
                statuses[str(row.status)] += 1
                if row.label is not None:
                    classes[self._class_names[row.label]] += 1
                yield row

        file = scratch / "shard.parquet"
        groups = write_shard(file, rows(), self._class_names)
        with file.open("rb") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
        size = file.stat().st_size
        self._store.put_file(name, file)
        return {
            "path": name,
            "split": split,
            "rows": sum(groups),
            "row_groups": groups,
            "bytes": size,
            "sha256": digest,
            "status": dict(statuses),
            "classes": dict(classes),
        }

    def _spill(
        self, samples: Iterable[Sample], named: str | None, outputs: list[Output], scratch: Path
    ) -> Iterator[tuple[str, int, Iterator[Sample]]]:
        """Write all bytes to one file, and read them again shard by shard in the order of the keys' hashes."""
        by_split = {o.split: o for o in outputs}
        index: dict[tuple[str, int], list[tuple[int, int, int, Sample]]] = {}
        with (scratch / "spill").open("w+b") as spill:
            for sample in samples:
                split = split_for(sample.key, named, self._collection.splits, self._config)
                order = key_hash(sample.key, f"order-{self._config.seed}")
                output = by_split[split]
                place = (split, output.first + order % output.shards)
                encoded = sample.encoded or b""
                index.setdefault(place, []).append((order, spill.tell(), len(encoded), sample._replace(encoded=None)))
                spill.write(encoded)
            for output in outputs:
                for shard in range(output.first, output.first + output.shards):
                    yield output.split, shard, _unspill(spill, index.pop((output.split, shard), []))


def _unspill(spill: BinaryIO, rows: list[tuple[int, int, int, Sample]]) -> Iterator[Sample]:
    for _, offset, length, sample in sorted(rows, key=lambda row: row[:2]):
        spill.seek(offset)
        yield sample._replace(encoded=spill.read(length))


class _Seen:
    """What a task learns of its images on the way."""

    def __init__(self) -> None:
        self.bad: list[tuple[str, str, str]] = []
        self._hashes: list[tuple[bytes, str, str, int]] = []
        self._heights: list[int] = []
        self._widths: list[int] = []
        self._channels: Counter[str] = Counter()

    def row(self, sample: Sample, split: str) -> PackedRow:
        """The row of one image; an unreadable one keeps its bytes, up to the cap, and has its status."""
        limits = Limits()
        header = sample.bad or images.read_header(sample.encoded or b"", limits)
        outcome = header if isinstance(header, Bad) else images.decode(sample.encoded, 3, limits)
        height = width = 0
        if not isinstance(header, Bad):
            height, width = header.height, header.width
        if isinstance(outcome, Bad):
            self.bad.append((sample.key, str(outcome.status), outcome.detail))
        elif not isinstance(header, Bad):
            self._heights.append(height)
            self._widths.append(width)
            self._channels[str(header.channels)] += 1
        if sample.encoded:
            digest = hashlib.blake2b(sample.encoded, digest_size=16).digest()
            self._hashes.append((digest, sample.key, split, -1 if sample.label is None else sample.label))
        encoded = sample.encoded if len(sample.encoded or b"") <= limits.max_bytes else None
        status = outcome.status if isinstance(outcome, Bad) else Status.OK
        return PackedRow(sample.key, encoded, sample.label, height, width, status)

    def hashes(self) -> bytes:
        """Content hash, key, split and label of each image, as Parquet."""
        columns = list(zip(*self._hashes, strict=True)) or [(), (), (), ()]
        kinds = (pa.binary(16), pa.string(), pa.string(), pa.int64())
        arrays = [pa.array(c, kind) for c, kind in zip(columns, kinds, strict=True)]
        sink = io.BytesIO()
        pq.write_table(pa.table(arrays, names=["hash", "key", "split", "label"]), sink, compression="zstd")
        return sink.getvalue()

    def images(self) -> dict[str, Any]:
        """Ranges of the readable images' sizes, and how many are grayscale (1) or colour (3)."""
        return {
            "height": [min(self._heights, default=0), max(self._heights, default=0)],
            "width": [min(self._widths, default=0), max(self._widths, default=0)],
            "channels": dict(self._channels),
        }


def _finish(config: PackConfig, store: Store, ledger: Ledger, plan: Plan) -> None:
    """Write the lists of what is wrong, and the manifest last."""
    records = [json.loads(ledger.store.get(ledger.path(ref))) for ref in plan.refs]
    shards = sorted((s for r in records for s in r["shards"] if s["rows"]), key=lambda s: s["path"])
    sizes = {e.path: e.size for e in store.list("data/")}
    if altered := [s["path"] for s in shards if sizes.get(s["path"]) != s["bytes"]]:
        raise StorageError(
            f"{store.address(altered[0])} is not what was written here; is something else writing there? "
            "pack to another place"
        )
    bad = sorted(tuple(b) for r in records for b in r["bad"])
    lines = (json.dumps({"key": k, "status": s, "detail": d}) + "\n" for k, s, d in bad)
    store.put("unreadable.jsonl", "".join(lines).encode())
    class_names = plan.content["class_names"]
    duplicates, examples = _duplicates(ledger, plan, class_names)
    store.put("duplicates.jsonl", "".join(json.dumps(e) + "\n" for e in examples).encode())
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "class_names": class_names,
        "rows": plan.rows,
        "splits": summarise(shards),
        "images": _merge_images([r["images"] for r in records]),
        "duplicates": duplicates,
        "labels": plan.content.get("labels", 0),
        "skipped": plan.content["skipped"],
        "source": plan.content["selection"]["data"],
        "layout": plan.content["layout"],
        "split": f"the source's own; else by key hash, val {config.val:g}, test {config.test:g}",
        "order": f"mixed by key hash with seed {config.seed}",
        "raycnn": raycnn.__version__,
        "shards": shards,
    }
    store.put(MANIFEST, json.dumps(manifest, indent=1).encode())


def _merge_images(seen: list[dict[str, Any]]) -> dict[str, Any]:
    seen = [s for s in seen if s["channels"]]
    channels = sum((Counter(s["channels"]) for s in seen), Counter[str]())
    ranges = {
        side: [min((s[side][0] for s in seen), default=0), max((s[side][1] for s in seen), default=0)]
        for side in ("height", "width")
    }
    return ranges | {"channels": dict(channels)}


def _duplicates(ledger: Ledger, plan: Plan, class_names: list[str]) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Exact duplicates by content hash: groups, surplus images, groups across splits and across classes."""
    counts: Counter[str] = Counter(groups=0, images=0, across_splits=0, across_classes=0)
    examples: list[dict[str, Any]] = []
    passes = -(-plan.rows // DUPLICATE_ROWS)
    for number in range(passes):
        members = _members_of_pass(ledger, plan, number, passes)
        for keys, splits, labels in members:
            across_splits, across_classes = len(set(splits)) > 1, len({i for i in labels if i >= 0}) > 1
            counts.update(groups=1, images=len(keys) - 1)
            counts.update(across_splits=across_splits, across_classes=across_classes)
            if len(examples) < DUPLICATE_EXAMPLES:
                names = [class_names[i] if i >= 0 else None for i in labels]
                examples.append({"keys": keys, "splits": splits, "classes": names})
    return dict(counts), examples


def _members_of_pass(
    ledger: Ledger, plan: Plan, number: int, passes: int
) -> Iterator[tuple[list[str], list[str], list[int]]]:
    """(keys, splits, labels) of each group of equal images whose hash falls into this pass."""
    groups: dict[bytes, list[tuple[str, str, int]]] = {}
    for ref in plan.refs:
        table = pq.read_table(io.BytesIO(ledger.store.get(f"hashes/{ref.name}.parquet")))
        starts = np.frombuffer(b"".join(table["hash"].to_pylist()), ">u4")[::4]
        mine = table.filter(starts % passes == number)
        for digest, *member in zip(*(c.to_pylist() for c in mine.columns), strict=True):
            groups.setdefault(digest, []).append(tuple(member))
    for members in groups.values():
        if len(members) > 1:
            keys, splits, labels = zip(*sorted(members), strict=True)
            yield list(keys), list(splits), list(labels)


def _report(store: Store, written: int) -> PackReport:
    manifest = json.loads(store.get(MANIFEST))
    status: Counter[str] = Counter()
    for split in manifest["splits"].values():
        status.update(split["status"])
    return PackReport(
        rows=manifest["rows"],
        classes=len(manifest["class_names"]),
        splits={s: sum(c["status"].values()) for s, c in manifest["splits"].items()},
        shards=len(manifest["shards"]),
        status=dict(sorted(status.items())),
        duplicates=manifest["duplicates"],
        manifest=store.address(MANIFEST),
        shards_written=written,
        labels=manifest.get("labels", 0),
    )
