"""The end of a packing run: what its tasks have recorded becomes the manifest and the lists of what is wrong."""

import io
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow.parquet as pq

import raycnn
from raycnn.config import PackConfig
from raycnn.errors import StorageError
from raycnn.ledger import Ledger, Plan
from raycnn.shards import FORMAT, MANIFEST, UNREADABLE, VERSION, summarise
from raycnn.storage import Store

DUPLICATE_ROWS = 4_000_000
"""Content hashes that are compared in memory at a time."""
DUPLICATE_EXAMPLES = 1000


def write_manifest(config: PackConfig, store: Store, ledger: Ledger, plan: Plan) -> None:
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
    store.put(UNREADABLE, "".join(lines).encode())
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
