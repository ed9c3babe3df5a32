"""The layout for GPUs: CPU tasks decode, actors predict batches across units, the driver gathers units and commits.

    {"number", "items"} -> {"unit", "ordinal", "key", "bad", "pixels"} -> {..., "labels", "probabilities"}

What comes twice, because a process died, is told apart by (unit, ordinal); what never comes leaves its unit pending.
"""

import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any, cast

import numpy as np
import torch

from raycnn import data
from raycnn.config import MIB, LabelConfig
from raycnn.data.pipelines import actors, begun_before, dataset, made_once, run_name, tasks, waves
from raycnn.errors import Bad, Status
from raycnn.labeling.fused import Committer, Reader, load_checked
from raycnn.labeling.rows import UnitRows
from raycnn.labeling.speed import Stopwatch
from raycnn.ledger import Ledger, UnitRef
from raycnn.predictor import Predictions, Predictor
from raycnn.storage import open_store

GPU_BATCH = 256
CPU_BATCH = 64
BLOCK_BYTES = 32 * MIB
"""Pixels that travel together; Ray Data's own 128 MiB would keep a GPU waiting for its first batch."""
COMMITTERS = 8

Block = dict[str, np.ndarray]


def label_staged(
    items: Sequence[dict[str, Any]], plan: data.StagePlan, arguments: dict[str, Any], say: data.Progress
) -> Iterator[dict[str, Any]]:
    """Label and commit the units; their reports, as they come."""
    arguments = arguments | {"device": "cuda" if plan.actor_gpus else "cpu"}
    made = json.dumps(arguments)
    refs = {ref.unit: ref for ref in (UnitRef(**item) for item in items)}
    with run_name() as run, closing(_Gather(arguments, refs)) as gather:
        for rows in waves(items, plan.tasks):
            decoded = dataset(rows, BLOCK_BYTES).map_batches(
                cast(Any, _decode_in_task),
                fn_kwargs={"arguments": made, "run": run},
                num_cpus=plan.task_cpus,
                batch_size=1,
                batch_format="numpy",
                compute=tasks(plan.tasks),
            )
            predicted = decoded.map_batches(
                PredictActor,
                fn_constructor_kwargs=arguments,
                num_cpus=plan.actor_cpus,
                num_gpus=plan.actor_gpus,
                batch_size=GPU_BATCH if plan.actor_gpus else CPU_BATCH,
                batch_format="numpy",
                compute=actors(plan.min_actors, plan.actors),
            )
            with data.user_errors(), data.Waiting(say) as waiting:
                for block in predicted.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2):
                    waiting.moved()
                    yield from gather.add(cast(Block, block))
                yield from gather.rest()


class UnitDecoder:
    """Lives in one Ray worker: reads and decodes one unit after another."""

    def __init__(self, config: dict[str, Any], parts: str, fingerprint: dict[str, Any], device: str) -> None:
        """Check that this node makes the same pixels."""
        torch.set_num_threads(1)
        self._config = LabelConfig(**config)
        self._spec = load_checked(self._config, fingerprint).spec
        self._ledger = Ledger(open_store(self._config.out), parts)
        self._reader = Reader(self._config, self._ledger)

    def __call__(self, items: list[dict[str, Any]], is_again: bool) -> Iterator[Block]:
        """Blocks of up to 64 decoded rows; a row that has no pixels says why."""
        watch = Stopwatch()
        with data.Decoder(self._spec, is_again) as decoder:
            groups = data.read_ahead(self._read([UnitRef(**item) for item in items], is_again))
            while True:
                with watch.stage("read"):
                    found = next(groups, None)
                if found is None:
                    return
                ref, first, group = found
                with watch.stage("decode"):
                    made = decoder.decode(group)
                watch.count(len(group), is_again)
                yield self._block(ref, first, [s.key for s in group], made, watch)

    def _read(self, refs: list[UnitRef], is_again: bool) -> Iterator[tuple[UnitRef, int, list[Any]]]:
        for ref in refs:
            first = 0
            # Ray drops as many blocks of a task that is done again as it had got of it: those have to be the same.
            if not is_again and self._ledger.is_committed(ref):
                continue
            for group in self._reader.groups(ref):
                yield ref, first, group
                first += len(group)
            self._ledger.check_rows(ref, first)

    def _block(self, ref: UnitRef, first: int, keys: list[str], made: list[Any], watch: Stopwatch) -> Block:
        spec = self._spec
        pixels = np.zeros((len(made), spec.height, spec.width, spec.channels), np.uint8)
        bad = [""] * len(made)
        for i, one in enumerate(made):
            if isinstance(one, Bad):
                bad[i] = f"{one.status}\t{one.detail}"
            else:
                pixels[i] = one
        return {
            "unit": np.full(len(made), ref.unit, np.int64),
            "ordinal": first + np.arange(len(made)),
            "key": np.array(keys, object),
            "bad": np.array(bad, object),
            "spent": np.array([json.dumps(watch.take()), *[""] * (len(made) - 1)], object),
            "pixels": pixels,
        }


def _decode_in_task(batch: Block, arguments: str, run: str) -> Iterator[Block]:
    decoder = made_once(UnitDecoder, arguments, run)
    yield from decoder(json.loads(batch["items"][0]), begun_before(run, batch))


class PredictActor:
    """Holds a GPU, or a CPU, and predicts batches of whatever units."""

    def __init__(self, config: dict[str, Any], parts: str, fingerprint: dict[str, Any], device: str) -> None:
        """Load the bundle and check that this node computes the same logits."""
        if device == "cpu":
            torch.set_num_threads(1)
        self._with_embeddings: bool = config["embeddings"]
        bundle = load_checked(LabelConfig(**config), fingerprint)
        self._predictor = Predictor(bundle, device, top_k=fingerprint["top_k"])
        self._watch = Stopwatch()

    def __call__(self, block: Block) -> Block:
        """The block with predictions, in order, for the rows that have pixels, and zeros for the others."""
        good = np.array([not text for text in block["bad"]], bool)
        with self._watch.stage("model"):
            pixels = block["pixels"] if good.all() else block["pixels"][good]
            predictions = self._predictor.predict(pixels, self._with_embeddings)
        spent = [text for text in block["spent"] if text] + [json.dumps(self._watch.take())]
        block = {name: block[name] for name in ("unit", "ordinal", "key", "bad")}
        block["labels"] = _placed(predictions.labels, good)
        block["probabilities"] = _placed(predictions.probabilities, good)
        if predictions.embeddings is not None:
            block["embeddings"] = _placed(predictions.embeddings, good)
        block["backend"] = np.array([self._predictor.backend] * len(good), object)
        block["spent"] = np.array([json.dumps(spent), *[""] * (len(good) - 1)], object)
        return block


def _placed(values: np.ndarray, good: np.ndarray) -> np.ndarray:
    placed = np.zeros((len(good), *values.shape[1:]), values.dtype)
    placed[good] = values
    return placed


class _Gather:
    """Predicted rows on the driver until their unit is complete; commits on threads."""

    def __init__(self, arguments: dict[str, Any], refs: dict[int, UnitRef]) -> None:
        self._config = LabelConfig(**arguments["config"])
        self._fingerprint: dict[str, Any] = arguments["fingerprint"]
        self._ledger = Ledger(open_store(self._config.out), arguments["parts"])
        self._bundle = load_checked(self._config, self._fingerprint)
        self._refs = refs
        self._rows: dict[int, dict[int, tuple[Block, int]]] = {}
        self._pool = ThreadPoolExecutor(COMMITTERS)
        self._committing: deque[tuple[UnitRef, Future[dict[str, Any]]]] = deque()
        self._done: set[int] = set()
        self._spent: list[dict[str, float]] = []

    def add(self, block: Block) -> Iterator[dict[str, Any]]:
        """Take rows, in any order; reports of units that have been committed meanwhile."""
        for text in filter(None, block["spent"]):
            self._spent += map(json.loads, json.loads(text))
        for i, (unit, ordinal) in enumerate(zip(block["unit"].tolist(), block["ordinal"].tolist(), strict=True)):
            if unit in self._done:
                continue  # of a process that died after all of it had been sent
            rows = self._rows.setdefault(unit, {})
            rows[ordinal] = (block, i)
            if len(rows) == self._refs[unit].rows:
                self._done.add(unit)
                self._commit(self._refs[unit], self._rows.pop(unit))
        while self._committing and self._committing[0][1].done():
            yield self._result()

    def close(self) -> None:
        """End the threads, after what they are committing."""
        self._pool.shutdown()

    def rest(self) -> Iterator[dict[str, Any]]:
        """Reports of the units that are still being committed."""
        while self._committing:
            yield self._result()

    def _commit(self, ref: UnitRef, rows: dict[int, tuple[Block, int]]) -> None:
        backend = str(rows[0][0]["backend"][0])
        committer = Committer(self._config, self._ledger, self._bundle, self._fingerprint, backend)
        self._committing.append((ref, self._pool.submit(lambda: committer.commit(_unit_rows(ref, rows)))))

    def _result(self) -> dict[str, Any]:
        _, future = self._committing.popleft()
        result, self._spent = future.result() | {"spent": self._spent}, []
        return result


def _unit_rows(ref: UnitRef, rows: dict[int, tuple[Block, int]]) -> UnitRows:
    unit = UnitRows(ref)
    for ordinal in range(ref.rows):
        block, i = rows[ordinal]
        if text := block["bad"][i]:
            status, detail = text.split("\t", 1)
            unit.add(str(block["key"][i]), Bad(Status(status), detail))
            continue
        unit.add(str(block["key"][i]), None)
        embeddings = block.get("embeddings")
        predictions = Predictions(block["labels"], block["probabilities"], embeddings)
        unit.predict(predictions, i, i + 1)
    unit.is_read = True
    return unit
