"""The driver of a packing run: it plans, has the shards written, and writes the manifest."""

import itertools
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from raycnn import data
from raycnn.config import PackConfig, to_yaml
from raycnn.errors import ConfigError, DataError, in_words
from raycnn.ledger import Ledger, Plan, UnitRef
from raycnn.packing.manifest import write_manifest
from raycnn.packing.mixing import Output, Planner
from raycnn.packing.writing import Packer, labels_path
from raycnn.shards import (
    MANIFEST,
    VERSION,
    WORK,
    Collection,
    GivenLabels,
    is_manifest,
    open_collection,
    read_labels,
)
from raycnn.storage import Store, contains, open_store, scratch_folder


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
        write_manifest(config, store, ledger, plan)
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
        planned = Planner(config, collection, scratch)
        tasks = planned.tasks(labels.found_in(collection, collection.slices(skipped, config.exclude)))
        first = next(tasks, None)
        if first is None:  # said before there is a plan, which the next command would have to follow
            raise DataError(f"{config.src}: no images to pack; left out: {dict(skipped) or 'none'}")
        tasks = itertools.chain([first], tasks)
        if config.labels:
            ledger.store.create(labels_path(labels.digest), labels.dump())
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
        text = in_words(bad)
        say({"kind": "progress", "done": done, "total": plan.rows, "text": text})
    return shards


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
