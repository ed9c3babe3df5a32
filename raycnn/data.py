"""Ray Data pipelines, the connection to Ray, and the CPU budget that keeps both from starving.

Pipelines start from small items (`ray.data.from_items`: which unit, which rows), so no read task competes with
actors for a CPU; the stage that owns an item reads, decodes and works. Rows in and out of each stage:

    map_units     {"item": json of the item}  ->  {"result": json of the result}
    stream        {"item": json of the item}  ->  what the function returns, in the order of the items
"""

import functools
import json
import logging
import math
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from raycnn.errors import ConfigError, unwrap

UNSAFE_VARIABLES = (
    "RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA",
    "RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR",
    "RAY_DATA_AUTOLOAD_PYEXTENSIONTYPE",
    "RAY_DATA_WEBDATASET_ALLOW_UNSAFE_DESERIALIZATION",
)
"""Each re-opens a hole through which a data file runs code (CVE-2026-41486, CVE-2026-57516)."""

MIN_RANK_CPUS = 0.25
"""Below this share of a CPU a training worker and its decoding make no progress worth the name."""

MAX_BLOCKS = 10_000
"""Blocks that the items of one pipeline are spread over; one item each, up to here."""

FEED_MEMORY_BYTES = 512 * 1024 * 1024
"""Decoded pixels that wait for one training worker."""


class Resources(NamedTuple):
    """CPUs and GPUs of a cluster: those that it has now, or can have when its autoscaler has added nodes."""

    cpus: float
    gpus: float = 0.0


class UnitPlan(NamedTuple):
    """How the actors or tasks of a pipeline share the machine."""

    workers: int
    min_workers: int
    cpus: float
    gpus: float


class TrainPlan(NamedTuple):
    """How one training worker and the decode tasks that feed it share the machine; times `num_workers`."""

    worker_cpus: float
    worker_gpus: float
    tasks: int
    task_cpus: float
    threads: int


def plan_units(verb: str, now: Resources, limit: Resources, units: int, use_gpu: bool = False) -> UnitPlan:
    """One worker per CPU, or per GPU with its share of the CPUs, and never more than there are units.

    Workers reserve all that they use, and there are no other tasks in such a pipeline, so nothing waits for a
    CPU that never comes free.

    Raises:
        ConfigError: the cluster cannot run a single worker; with the arithmetic.
    """
    if limit.cpus < 1:
        raise ConfigError(
            f"{verb}: a worker needs 1 CPU, the cluster has {limit.cpus:g}: "
            "start Ray with --num-cpus=1 or more, or add a worker node"
        )
    if use_gpu and limit.gpus >= 1:
        count = max(1, min(int(limit.gpus), units))
        cpus = max(1.0, math.floor(limit.cpus / int(limit.gpus)))
        return UnitPlan(count, max(1, min(count, int(now.gpus))), min(cpus, limit.cpus), 1)
    count = max(1, min(int(limit.cpus), units))
    return UnitPlan(count, max(1, min(count, int(now.cpus))), 1, 0)


def plan_training(num_workers: int, limit: Resources, use_gpu: bool) -> TrainPlan:
    """Each training worker gets an equal share of the CPUs, of which its decode tasks get a part that is its own.

    On CPUs the share is halved between training and decoding; beside a GPU one CPU drives it and the rest
    decode. Fractions are used where there are fewer CPUs than parts, so that 1 CPU runs 2 workers.

    Raises:
        ConfigError: too few CPUs or GPUs; with the arithmetic.
    """
    share = limit.cpus / num_workers
    if share < MIN_RANK_CPUS:
        raise ConfigError(
            f"train: {num_workers} workers share {limit.cpus:g} CPUs, {share:.2g} each, and need {MIN_RANK_CPUS} "
            f"each: use --num-workers {max(1, int(limit.cpus / MIN_RANK_CPUS))} or fewer"
        )
    if use_gpu and limit.gpus < num_workers:
        raise ConfigError(
            f"train: {num_workers} workers need 1 GPU each, the cluster has {limit.gpus:g}: "
            f"use --num-workers {max(1, int(limit.gpus))} or --device cpu"
        )
    worker = min(1.0, share / 2) if use_gpu else share / 2
    rest = share - worker
    tasks = max(1, int(rest))
    return TrainPlan(
        worker_cpus=_hundredths(worker),
        worker_gpus=1.0 if use_gpu else 0.0,
        tasks=tasks,
        task_cpus=_hundredths(min(1.0, rest / tasks)),
        threads=max(1, int(share)),
    )


def _hundredths(cpus: float) -> float:
    """Rounded down, so that the sum of the parts never exceeds the whole."""
    return math.floor(cpus * 100) / 100


def connect() -> None:
    """Connect to the cluster of this job or machine, or start a local one; quietly.

    Raises:
        ConfigError: a variable is set that lets data files run code.
    """
    for name in UNSAFE_VARIABLES:
        if os.environ.get(name):
            raise ConfigError(f"{name} is set, which lets a data file run code: unset it")
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    if not ray.is_initialized():
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        except ConnectionError as error:
            raise ConfigError(f"cannot connect to Ray: {str(error).splitlines()[0]}; is RAY_ADDRESS right?") from None
        except ValueError:
            # An existing cluster refuses start-up options such as include_dashboard.
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
    _quiet()


def _quiet() -> None:
    """One progress line of our own, instead of Ray Data's bars and banners."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.train", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)


def resources() -> tuple[Resources, Resources]:
    """What the cluster has now, and what its autoscaler may add up to."""
    import ray
    from ray._private.state import state

    have = ray.cluster_resources()
    now = Resources(have.get("CPU", 0.0), have.get("GPU", 0.0))
    most = state.get_max_resources_from_cluster_config() or {}
    return now, Resources(max(now.cpus, most.get("CPU", 0)), max(now.gpus, most.get("GPU", 0)))


@contextmanager
def user_errors() -> Iterator[None]:
    """Re-raise a RaycnnError that a worker raised as itself, without Ray's wrappers around it."""
    from ray.data.exceptions import SystemException
    from ray.exceptions import RayError, UserCodeException
    from ray.train import TrainingFailedError

    try:
        yield
    except (RayError, UserCodeException, SystemException, TrainingFailedError) as error:
        if (cause := unwrap(error)) is not None:
            raise cause from None
        raise


def map_units(
    worker: type,
    items: Sequence[dict[str, Any]],
    plan: UnitPlan,
    arguments: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Work on each item on one of the plan's workers; yield the results as they come.

    Without GPUs the workers are tasks, because Ray lends a later pipeline of the same driver the processes of an
    earlier one: importing torch takes longer than many a pipeline. A GPU is held by an actor.

    Args:
        worker: a class, made once in each process with `arguments`; called with an item it returns the result.
        items: JSON-able.
        plan: from `plan_units`.
        arguments: JSON-able constructor arguments.
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
            _work_in_task,
            fn_kwargs={"worker": worker, "arguments": made, "run": uuid.uuid4().hex},
            compute=TaskPoolStrategy(size=plan.workers),
            **options,
        )
    with user_errors():
        for row in mapped.iter_rows():
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
        _stream_item,
        fn_kwargs={"function": function, "arguments": arguments},
        num_cpus=plan.task_cpus,
        batch_size=1,
        batch_format="numpy",
        compute=TaskPoolStrategy(size=plan.tasks),
    )
    yield from decoded.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2)


def _stream_item(
    batch: dict[str, np.ndarray], function: Callable[..., dict[str, np.ndarray]], arguments: dict[str, Any]
) -> dict[str, np.ndarray]:
    return function(json.loads(batch["item"][0]), **arguments)
