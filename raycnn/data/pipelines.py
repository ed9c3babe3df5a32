"""Ray Data pipelines over small items: which unit, which rows. No read task competes with workers for a CPU.

Rows in and out of each stage:

    map_units     {"item": json of the item}  ->  {"result": json of the result}
    stream        {"item": json of the item}  ->  what the function returns, in the order of the items
"""

import functools
import json
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np

from raycnn.data.board import Progress, Waiting
from raycnn.data.budget import TrainPlan, UnitPlan
from raycnn.data.cluster import user_errors

MAX_BLOCKS = 1000
"""Blocks that the items of one pipeline are spread over; one item each, up to here. Ray Data takes 3 ms to submit a
block, and begins when it has submitted all."""

FEED_MEMORY_BYTES = 512 * 1024 * 1024
"""Decoded pixels that wait for one training worker."""


def map_units(
    worker: type,
    items: Sequence[dict[str, Any]],
    plan: UnitPlan,
    arguments: dict[str, Any],
    say: Progress,
) -> Iterator[dict[str, Any]]:
    """Work on each item on one of the plan's workers; yield the results as they come.

    Without GPUs the workers are tasks, because Ray lends a later pipeline of the same driver the processes of an
    earlier one: importing torch takes longer than many a pipeline. A GPU is held by an actor.

    Args:
        worker: a class, made once in each process with `arguments`; called with an item it returns the result.
        items: JSON-able.
        plan: from `plan_units`.
        arguments: JSON-able constructor arguments.
        say: is told when nothing comes for want of CPUs or GPUs.
    """
    import ray.data
    from ray.data import ActorPoolStrategy, TaskPoolStrategy

    rows = [{"item": json.dumps(item)} for item in items]
    dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS))
    options: dict[str, Any] = {"num_cpus": plan.cpus, "batch_size": 1, "batch_format": "numpy"}
    made = json.dumps(arguments)
    if plan.gpus:
        mapped = dataset.map_batches(
            _ItemActor,
            fn_constructor_args=(worker, made),
            compute=ActorPoolStrategy(min_size=plan.min_workers, max_size=plan.workers),
            num_gpus=plan.gpus,
            **options,
        )
    else:
        mapped = dataset.map_batches(
            cast(Any, _work_in_task),
            fn_kwargs={"worker": worker, "arguments": made, "run": uuid.uuid4().hex},
            compute=TaskPoolStrategy(size=plan.workers),
            **options,
        )
    with user_errors(), Waiting(say) as waiting:
        for row in mapped.iter_rows():
            waiting.moved()
            yield json.loads(row["result"])


class _ItemActor:
    def __init__(self, worker: type, arguments: str) -> None:
        self._worker = worker(**json.loads(arguments))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return _results(batch, self._worker)


def _work_in_task(batch: dict[str, np.ndarray], worker: type, arguments: str, run: str) -> dict[str, np.ndarray]:
    return _results(batch, _made_once(worker, arguments, run))


@functools.lru_cache(maxsize=1)
def _made_once(worker: type, arguments: str, run: str) -> Callable[[Any], Any]:
    """The run's worker of this process; `run` keeps a later run from seeing what this one has cached."""
    return worker(**json.loads(arguments))


def _results(batch: dict[str, np.ndarray], work: Callable[[Any], Any]) -> dict[str, np.ndarray]:
    return {"result": np.array([json.dumps(work(json.loads(item))) for item in batch["item"]], object)}


def stream(
    function: Callable[..., dict[str, np.ndarray]],
    items: Sequence[dict[str, Any]],
    plan: TrainPlan,
    arguments: dict[str, Any],
) -> Iterator[dict[str, np.ndarray]]:
    """What `function(item, **arguments)` returns for each item, in the order of the items, read ahead.

    It runs in the process that iterates, within the share of the cluster that the plan gives one worker.
    """
    import ray.data
    from ray.data import ExecutionResources, TaskPoolStrategy

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(
        cpu=plan.tasks * plan.task_cpus, object_store_memory=FEED_MEMORY_BYTES
    )
    rows = [{"item": json.dumps(item)} for item in items]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    decoded = dataset.map_batches(
        cast(Any, _stream_item),
        fn_kwargs={"function": function, "arguments": arguments},
        num_cpus=plan.task_cpus,
        batch_size=1,
        batch_format="numpy",
        compute=TaskPoolStrategy(size=plan.tasks),
    )
    batches = decoded.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2)
    yield from cast(Iterator[dict[str, np.ndarray]], batches)


def _stream_item(
    batch: dict[str, np.ndarray], function: Callable[..., dict[str, np.ndarray]], arguments: dict[str, Any]
) -> dict[str, np.ndarray]:
    return function(json.loads(batch["item"][0]), **arguments)
