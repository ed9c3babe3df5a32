"""The worker of a packing run: it writes the shards of one task after another, and commits each with a record."""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from raycnn import images
from raycnn.config import Limits, PackConfig, make
from raycnn.errors import Bad, Status
from raycnn.ledger import Ledger, UnitRef
from raycnn.packing.mixing import Output, split_for
from raycnn.shards import WORK, GivenLabels, PackedRow, Sample, key_hash, open_collection, write_shard
from raycnn.storage import open_store, scratch_folder


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
        self._labels = GivenLabels.load(self._ledger.store.get(labels_path(labels))) if labels else GivenLabels({})

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


def labels_path(digest: str) -> str:
    """Where the workers find what --labels has given: the file itself may be on the driver's machine only."""
    return f"labels-{digest[:32]}.json"
