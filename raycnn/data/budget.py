"""How pipelines share CPUs and GPUs, so that nothing waits for a CPU that never comes free.

Ray Data waits without a word where actors or training workers reserve all CPUs and the tasks that feed them find
none. Every verb asks here for its shares; a plan that cannot run is refused with the arithmetic.
"""

import math
from typing import NamedTuple

from raycnn.errors import ConfigError

MIN_RANK_CPUS = 0.25
"""Below this share of a CPU a training worker and its decoding make no progress worth the name."""


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
