"""Ray Data pipelines over small items: which unit, which rows. No read task competes with workers for a CPU.

Rows in and out of each stage:

    map_units     {"number", "items": json of a few items}  ->  {"result": json of the result} for each item
    stream        {"item": json of the item}  ->  what the function returns, in the order of the items
"""

import functools
import json
import math
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from raycnn.data.board import Progress, Waiting
from raycnn.data.budget import TrainPlan, UnitPlan
from raycnn.data.cluster import user_errors
from raycnn.errors import DataError

if TYPE_CHECKING:
    import ray.data

MAX_BLOCKS = 1000
"""Batches of items that one Ray Data execution has. Ray Data takes 3 ms to submit a block, and begins when it has
submitted all."""

MAX_BATCH = 32
FIRST_SHARE = 0.75
"""Items that one worker gets at once, so that it reads the next while it works on one: between two batches it has
nothing to do until Ray Data looks again. Of what is left 3/4 are handed out in equal batches, one to each worker, then
3/4 of the rest, and so on (Hummel et al. 1992, "Factoring"), so that all end at about the same time; and never more
than 32 items at once."""

MAX_DEATHS = 8
"""Processes that may die over one batch: Ray itself would start another one for ever. Nodes that leave count, too."""

FEED_MEMORY_BYTES = 512 * 1024 * 1024
"""Decoded pixels that wait for one training worker."""


class UnitWorker(Protocol):
    """What works on items in a process of its own."""

    def __call__(self, items: list[dict[str, Any]], is_again: bool) -> Iterator[dict[str, Any]]:
        """One JSON-able result for each item, as they are done; `is_again` where a process has died over them."""
        ...


def map_units(
    worker: Callable[..., UnitWorker],
    items: Sequence[dict[str, Any]],
    plan: UnitPlan,
    arguments: dict[str, Any],
    say: Progress,
) -> Iterator[dict[str, Any]]:
    """Work on each item on one of the plan's workers; yield the results as they come.

    Without GPUs the workers are tasks, because Ray lends a later pipeline of the same driver the processes of an
    earlier one: importing torch takes longer than many a pipeline. A GPU is held by an actor.

    Args:
        worker: makes what works, once in each process, from `arguments`.
        items: JSON-able.
        plan: from `plan_units`.
        arguments: JSON-able keyword arguments.
        say: is told when nothing comes for want of CPUs or GPUs.
    """
    with run_name() as run:
        for rows in waves(items, plan.workers):
            items_read = dataset(rows, block_bytes=1)  # so that each result comes when it is there
            options: dict[str, Any] = {"num_cpus": plan.cpus, "batch_size": 1, "batch_format": "numpy"}
            made = {"worker": worker, "arguments": json.dumps(arguments), "run": run}
            if plan.gpus:
                mapped = items_read.map_batches(
                    BatchActor,
                    fn_constructor_kwargs=made,
                    compute=actors(plan.min_workers, plan.workers),
                    num_gpus=plan.gpus,
                    **options,
                )
            else:
                mapped = items_read.map_batches(
                    cast(Any, _work_in_task),
                    fn_kwargs=made,
                    compute=tasks(plan.workers),
                    **options,
                )
            with user_errors(), Waiting(say) as waiting:
                for row in mapped.iter_rows():
                    waiting.moved()
                    yield json.loads(row["result"])


def waves(items: Sequence[dict[str, Any]], workers: int) -> Iterator[list[dict[str, Any]]]:
    """The items as rows of batches, as many as one execution may have."""
    rows: list[dict[str, Any]] = []
    start = 0
    while start < len(items):
        size = min(MAX_BATCH, math.ceil(FIRST_SHARE * (len(items) - start) / workers))
        begins = range(start, min(start + size * workers, len(items)), size)
        rows += [{"number": begin, "items": json.dumps(items[begin : begin + size])} for begin in begins]
        start += size * workers
    for start in range(0, len(rows), MAX_BLOCKS):
        yield rows[start : start + MAX_BLOCKS]


def dataset(rows: list[dict[str, Any]], block_bytes: int | None = None) -> "ray.data.Dataset":
    """A dataset of which each row is a block, and so a task; what is made of it is cut into blocks of `block_bytes`."""
    import ray.data

    made = ray.data.from_items(rows, override_num_blocks=len(rows))
    if block_bytes is not None:
        made.context.target_max_block_size = block_bytes
    return made


def tasks(count: int) -> "ray.data.TaskPoolStrategy":
    """At most so many tasks at once."""
    from ray.data import TaskPoolStrategy

    return TaskPoolStrategy(size=count)


def actors(least: int, most: int) -> "ray.data.ActorPoolStrategy":
    """Actors, as many at the start as the cluster has room for, because Ray Data adds them slowly."""
    from ray.data import ActorPoolStrategy

    return ActorPoolStrategy(min_size=least, max_size=most)


@contextmanager
def run_name() -> Iterator[str]:
    """A name for one run of a pipeline, under which its workers note which batches they have begun."""
    import ray
    from ray.exceptions import RayError
    from ray.experimental.internal_kv import _internal_kv_del

    run = uuid.uuid4().hex
    try:
        yield run
    finally:
        if ray.is_initialized():
            with suppress(RayError):  # the cluster's head is gone, and the notes with it
                _internal_kv_del(_note(run, ""), del_by_prefix=True)


def _note(run: str, number: object) -> bytes:
    return f"raycnn:{run}:{number}".encode()


def begun_before(run: str, batch: dict[str, np.ndarray]) -> bool:
    """Whether a process has begun this batch before, which then died over it; from now on one has.

    Raises:
        DataError: so many have, most of them while a child process decoded, that the next one would, too.
    """
    from ray.experimental.internal_kv import _internal_kv_put

    for deaths in range(MAX_DEATHS):
        if not _internal_kv_put(_note(run, f"{batch['number'][0]}.{deaths}"), b"", overwrite=False):
            return deaths > 0
    raise DataError(
        f"{MAX_DEATHS} processes have died over the same batch of work, and not while they decoded an image: does the "
        "node have too little memory, or is a file of it damaged? What is done stays; run the same command again "
        f"when that is mended. The batch: {str(batch['items'][0])[:200]}"
    )


class BatchActor:
    """A worker that stays: it holds a GPU."""

    def __init__(self, worker: Callable[..., UnitWorker], arguments: str, run: str) -> None:
        self._work, self._run = worker(**json.loads(arguments)), run

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        """Results of one batch of items."""
        yield from _results(batch, self._work, self._run)


def _work_in_task(
    batch: dict[str, np.ndarray], worker: Callable[..., UnitWorker], arguments: str, run: str
) -> Iterator[dict[str, np.ndarray]]:
    yield from _results(batch, made_once(worker, arguments, run), run)


@functools.lru_cache(maxsize=1)
def made_once(worker: Callable[..., Any], arguments: str, run: str) -> Callable[..., Any]:
    """The run's worker of this process; `run` keeps a later run from seeing what this one has cached."""
    return worker(**json.loads(arguments))


def _results(batch: dict[str, np.ndarray], work: Callable[..., Any], run: str) -> Iterator[dict[str, np.ndarray]]:
    is_again = begun_before(run, batch)
    for result in work(json.loads(batch["items"][0]), is_again):
        yield {"result": np.array([json.dumps(result)], object)}


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
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(
        cpu=plan.tasks * plan.task_cpus or None, object_store_memory=FEED_MEMORY_BYTES
    )
    rows = [{"item": json.dumps(item)} for item in items]
    decoded = dataset(rows).map_batches(
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
