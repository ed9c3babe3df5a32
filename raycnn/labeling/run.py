"""The driver of a labeling run: it plans, has the units labelled, and finishes. It does without torch."""

import io
import itertools
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raycnn import data
from raycnn.config import LabelConfig, precision_on, to_yaml
from raycnn.errors import ConfigError, DataError, Status
from raycnn.labeling.counts import add_counts, counts_of, shift
from raycnn.labeling.facts import Facts, fingerprint_of, read_facts
from raycnn.labeling.report import LabelReport, price_of_abstaining
from raycnn.labeling.speed import Speed
from raycnn.ledger import ALTERED, Growth, Ledger, Plan, UnitRef, label_ledger, new_slices, success_path
from raycnn.shards import Collection, Slice, open_collection, units
from raycnn.storage import contains, open_store

READERS = 16
"""Parts of earlier runs that are read at once."""


def label(config: LabelConfig, progress: data.Progress | None = None) -> LabelReport:
    """Label a collection, or resume, or label what is new, or find nothing to do.

    Raises:
        ConfigError: the output lies inside the input, or belongs to another selection or model.
        DataError: the collection cannot be read, a shard of it was replaced, or too many images are bad.
        BundleError: the bundle is altered, or a worker's copy behaves otherwise.
        StorageError: the store cannot promise create-once, or cannot be reached.
    """
    start = time.perf_counter()
    say = progress or (lambda event: None)
    if contains(config.data, config.out) or contains(config.out, config.data):
        raise ConfigError(f"output {config.out} and input {config.data} lie inside each other; choose another output")
    collection = open_collection(config.data, ())
    collection.accept_unreadable = config.accept_unreadable
    collection.check_split(config.split)
    say({"kind": "note", "text": f"{config.data}: {collection.layout}, because {collection.reason}"})
    if _looks_finished(config.out) or open_store(config.bundle).head("config.json") is None:
        facts = read_facts(config.bundle)  # which may say what is missing; Ray need not start for that
    else:
        data.connect(say)
        facts = data.call_early(read_facts, config.bundle, "raycnn.labeling.fused")
    for text in facts.warnings:
        say({"kind": "note", "text": text})
    return _LabelRun(config, facts, collection, say).run(start)


def _looks_finished(out: str) -> bool:
    return open_store(out).head(success_path(0)) is not None


class _LabelRun:
    def __init__(self, config: LabelConfig, facts: Facts, collection: Collection, say: data.Progress) -> None:
        self._config, self._facts, self._collection, self._say = config, facts, collection, say
        store = open_store(config.out)
        self._store = store.single_driver() if config.single_driver else store
        self._selection = {
            "data": collection.store.url,
            "split": config.split,
            "exclude": list(config.exclude),
        }
        self._growth = Growth()
        self._has_listed = False
        self._plan_speed: Speed | None = None

    def run(self, start: float) -> LabelReport:
        """Plan or adopt, label what is pending, finish, report."""
        if self._config.abstain:
            said = price_of_abstaining(self._config.abstain, self._facts.validation)
            self._say({"kind": "note", "text": said})
        plans = self.plans()
        written, rows = self._work(plans)
        if not self._has_listed and (more := self._plan_next(plans)):
            plans += more  # what came while an earlier run was interrupted
            written, rows = (one + other for one, other in zip((written, rows), self._work(more), strict=True))
        return self._report(plans, written, rows, time.perf_counter() - start)

    def _work(self, plans: list[Plan]) -> tuple[int, int]:
        """(units, rows) that this run has committed to finish the plans."""
        written = rows = 0
        for plan in plans:
            if (pending := self._ledger.pending(plan)) or self._ledger.success(plan.generation) is None:
                ours, counts = {}, add_counts([])
                for result in self._label_all(plan, pending):
                    if result["written"]:
                        # Added up at once: counts by class of every part would fill the memory of a large run.
                        counts = add_counts([counts, result.pop("counts")])
                        ours[result["path"]] = result
                written, rows = written + len(ours), rows + sum(r["rows"] for r in ours.values())
                self._finish(plan, ours, counts)
        return written, rows

    def _report(self, plans: list[Plan], written: int, rows: int, seconds: float) -> LabelReport:
        counts = add_counts([m["counts"] for p in plans if (m := self._ledger.success(p.generation)) is not None])
        names = self._facts.class_names
        return LabelReport(
            rows=sum(p.rows for p in plans),
            status=counts["status"],
            classes={names[int(label)]: n for label, n in counts["labels"].items()},
            confidence=counts["confidence"],
            abstained=counts["abstained"],
            shift=shift(counts, self._facts.validation),
            units=sum(len(p.refs) for p in plans),
            units_written=written,
            images_per_s=rows / seconds,
            speed=self._plan_speed.report() if self._plan_speed else None,
            seconds=seconds,
            output=self._store.address(),
            generations=len(plans),
            changed=self._growth.changed,
            gone=self._growth.gone,
        )

    def _fingerprinted(self) -> dict[str, Any]:
        """The fingerprint of this run; a plan that exists has decided the precision."""
        found = Ledger(self._store, "").plans()
        if found:
            precision = found[0].content["fingerprint"].get("precision", precision_on("cpu"))
        else:
            data.connect(self._say)
            precision = precision_on(self._device)
        self._fingerprint = fingerprint_of(self._facts, self._config, precision)
        return self._fingerprint

    @property
    def _device(self) -> str:
        is_cpu = self._config.layout == "fused" or data.resources()[1].gpus < 1
        return "cpu" if is_cpu else "cuda"

    def plans(self) -> list[Plan]:
        """All generations, with a new one where every earlier one is finished and the collection has grown."""
        self._ledger = label_ledger(self._store, self._fingerprinted())
        plans = self._ledger.plans()
        for plan in plans:
            self._ledger.check(plan, self._selection, self._fingerprint)
        if not plans or all(self._ledger.success(p.generation) for p in plans):
            plans += self._plan_next(plans)
        self._ledger.probe(plans[0])
        return plans

    def _plan_next(self, plans: list[Plan]) -> list[Plan]:
        self._has_listed = True
        skipped: Counter[str] = Counter()
        listed = self._collection.select(self._config.split, skipped, self._config.exclude)
        if plans:
            listed = self._new(listed, plans)
        listed = self._counting(listed)
        first = next(listed, None)
        if first is None:
            if plans:
                return []
            raise DataError(
                f"{self._collection.store.address()}: no images to label; left out: {dict(skipped) or 'none'}"
            )
        grouped = units(itertools.chain([first], listed))
        plan = self._ledger.plan(len(plans), grouped, self._selection, self._fingerprint, skipped)
        self._store.create("config.yaml", to_yaml(self._config).encode())
        left_out = f"; left out: {_listed(skipped)}" if skipped else ""
        new = "new " if plans else ""
        text = f"planned {plan.rows:,} {new}images in {len(plan.refs):,} units{left_out}"
        self._say({"kind": "note", "text": text})
        return [plan]

    def _new(self, listed: Iterator[Slice], plans: list[Plan]) -> Iterator[Slice]:
        """What earlier generations do not have. A file that names its rows, and has another name now, is no news."""
        has_news = False
        for piece in new_slices(listed, self._ledger.planned(plans), self._growth):
            has_news = True
            yield piece
        if has_news and self._growth.gone and self._collection.names_rows:
            raise DataError(
                f"{self._collection.store.address()}: files whose rows are labelled have gone, and others have come "
                "that may hold the same keys: put the old files back beside the new ones, or use another output"
            )

    def _counting(self, slices: Iterator[Slice]) -> Iterator[Slice]:
        rows, last = 0, time.perf_counter()
        for piece in slices:
            rows += piece.rows
            if time.perf_counter() - last > 1:
                last = time.perf_counter()
                self._say({"kind": "status", "text": f"planning: {rows:,} images listed"})
            yield piece

    def _label_all(self, plan: Plan, pending: list[UnitRef]) -> Iterator[dict[str, Any]]:
        """Label until nothing is pending, or no round commits anything: rows may be lost with a node in between."""
        while True:
            yield from self._label(plan, pending)
            left = self._ledger.pending(plan)
            if not left or len(left) == len(pending):
                return
            pending = left

    def _label(self, plan: Plan, pending: list[UnitRef]) -> Iterator[dict[str, Any]]:
        bad = self._bad_before(plan, pending)
        self._check_bad(bad, plan)
        if not pending:
            return
        done = plan.rows - sum(r.rows for r in pending)
        for result in self._results(plan, pending):
            done += result["rows"]
            bad.update(_bad_of(result.get("counts", {"status": {}})))
            assert self._plan_speed is not None
            text = "; ".join(filter(None, [self._plan_speed.text(), _listed(bad)]))
            self._say({"kind": "progress", "done": done, "total": plan.rows, "text": text})
            self._check_bad(bad, plan)
            yield result

    def _results(self, plan: Plan, pending: list[UnitRef]) -> Iterator[dict[str, Any]]:
        """The units' reports, from the layout that the cluster calls for."""
        data.connect(self._say)
        self._ledger.check(plan, self._selection, self._fingerprint | {"precision": precision_on(self._device)})
        now, limit = data.resources()
        items = [r._asdict() for r in pending]
        arguments = {
            "config": self._config.model_dump(mode="json") | {"out": self._store.url},
            "parts": self._ledger.parts,
            "fingerprint": self._fingerprint,
        }
        if self._config.layout == "staged" or self._device == "cuda":
            from raycnn.labeling.staged import label_staged

            stages = data.plan_stages("label", now, limit, len(pending))
            cpus = stages.tasks * stages.task_cpus + stages.actors * stages.actor_cpus
            speed = Speed(cpus, has_gpus=stages.actor_gpus > 0)
            results = label_staged(items, stages, arguments, self._say)
        else:
            workers = data.plan_units("label", now, limit, len(pending))
            speed = Speed(workers.workers * workers.cpus)
            results = data.map_units(_labeler, items, workers, arguments | {"device": "cpu"}, self._say)
        self._plan_speed = speed
        for result in results:
            for spent in result.pop("spent"):
                speed.add(spent)
            yield result

    def _bad_before(self, plan: Plan, pending: list[UnitRef]) -> Counter[str]:
        """Bad images of units that an earlier run has committed, where there may not be many."""
        if self._config.max_bad >= 1:
            return Counter()
        left = {ref.unit for ref in pending}
        parts = self._described(ref for ref in plan.refs if ref.unit not in left)
        return sum((_bad_of(part["counts"]) for part in parts), Counter[str]())

    def _check_bad(self, bad: Counter[str], plan: Plan) -> None:
        if (count := bad.total()) / plan.rows > self._config.max_bad:
            raise DataError(
                f"{count:,} of {plan.rows:,} images are bad ({_listed(bad)}), more than --max-bad "
                f"{self._config.max_bad:.2%}; what is labelled stays: look at it, then go on with a larger --max-bad"
            )

    def _finish(self, plan: Plan, written: dict[str, dict[str, Any]], counts: dict[str, Any]) -> None:
        """The success marker, with what this run wrote and counted, and what it reads again of earlier runs' parts."""
        missing = self._described(ref for ref in plan.refs if self._ledger.path(ref) not in written)
        for part in missing:
            counts = add_counts([counts, part.pop("counts")])
            written[part["path"]] = part
        self._check_bad(_bad_of(counts), plan)  # also those that another driver, or a process that died, has counted
        parts = (written[self._ledger.path(ref)] for ref in plan.refs)
        listed = [{k: part[k] for k in ("path", "bytes", "sha256", "rows")} for part in parts]
        summary = {"status": counts["status"], "counts": counts, "shift": shift(counts, self._facts.validation)}
        self._ledger.finish(plan, {**summary, "class_names": list(self._facts.class_names), "parts": listed})

    def _described(self, refs: Iterable[UnitRef]) -> Iterator[dict[str, Any]]:
        """What is known of parts that lie there already; some are read at once, and no more than that are held."""
        waiting = iter(refs)
        with ThreadPoolExecutor(READERS) as pool:
            while some := list(itertools.islice(waiting, READERS)):
                yield from pool.map(self._describe, some)

    def _describe(self, ref: UnitRef) -> dict[str, Any]:
        path = self._ledger.path(ref)
        part = self._store.get(path)
        try:
            table = pq.read_table(io.BytesIO(part), columns=["status", "label", "probability"])
        except (pa.ArrowException, OSError):
            raise DataError(f"{self._store.address(path)} {ALTERED}") from None
        return self._ledger.describe(ref, part) | {"counts": counts_of(table)}


def _labeler(**arguments: Any) -> data.UnitWorker:
    from raycnn.labeling.fused import Labeler  # imports torch, which this process need not

    return Labeler(**arguments)


def _bad_of(counts: dict[str, Any]) -> Counter[str]:
    return Counter({status: n for status, n in counts["status"].items() if status != Status.OK})


def _listed(bad: Counter[str]) -> str:
    return ", ".join(f"{n:,} {s}" for s, n in sorted(bad.items()))
