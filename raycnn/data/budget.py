"""How pipelines share CPUs and GPUs, so that nothing waits for a CPU that never comes free.

Ray Data waits without a word where actors or training workers reserve all CPUs and the tasks that feed them find
none. Every verb asks here for its shares; a plan that cannot run is refused with the arithmetic. What is reserved
has to fit on single nodes: 2 nodes of 2 CPUs do not run a worker of 3.
"""

import math
from typing import NamedTuple

from raycnn.errors import ConfigError

MIN_RANK_CPUS = 0.25
"""Below this share of a CPU a training worker and its decoding make no progress worth the name."""

MAX_TASKS = 64
"""Decode tasks for one training worker, however many CPUs an autoscaler could add."""


UNLIKE = 0.001
"""Ray Data makes one stage of two that ask for the same; so they ask for not quite the same."""


class Node(NamedTuple):
    """What one machine of a cluster offers."""

    cpus: float
    gpus: float = 0.0


class Resources(NamedTuple):
    """The nodes of a cluster: those that it has now, or can have when its autoscaler has added some."""

    nodes: tuple[Node, ...]

    @property
    def cpus(self) -> float:
        """CPUs of all nodes."""
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        """GPUs of all nodes."""
        return sum(node.gpus for node in self.nodes)

    def room(self, cpus: float, gpus: float = 0.0) -> int:
        """How many workers of this size fit, each on one node; in whatever order they are placed."""
        return sum(
            min(_times(node.cpus, cpus), _times(node.gpus, gpus) if gpus else _times(node.cpus, cpus))
            for node in self.nodes
        )


class UnitPlan(NamedTuple):
    """How the actors or tasks of a pipeline share the machine."""

    workers: int
    min_workers: int
    cpus: float
    gpus: float


class StagePlan(NamedTuple):
    """How decode tasks and the actors that predict share the machine."""

    tasks: int
    task_cpus: float
    actors: int
    min_actors: int
    actor_cpus: float
    actor_gpus: float


KEEP_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
"""To glibc, where CPUs train: keep freed memory for the next step, which needs as much.

Otherwise each step gives the system back its activations, and waits while it clears new pages for them. One arena,
because those of threads other than the main one always give back what is free.
"""


class TrainPlan(NamedTuple):
    """How one training worker and the decode tasks that feed it share the machine; times `num_workers`."""

    worker_cpus: float
    worker_gpus: float
    tasks: int
    task_cpus: float
    threads: int

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the workers, and of the tasks that decode for them."""
        return {} if self.worker_gpus else KEEP_MEMORY


class ServePlan(NamedTuple):
    """What each replica of an endpoint reserves; one process decodes and predicts."""

    cpus: float
    gpus: float


def plan_units(verb: str, now: Resources, limit: Resources, units: int, use_gpu: bool = False) -> UnitPlan:
    """One worker per CPU, or per GPU with its share of the node's CPUs, and never more than there are units.

    Workers reserve all that they use, and there are no other tasks in such a pipeline, so nothing waits for a
    CPU that never comes free.

    Raises:
        ConfigError: the cluster cannot run a single worker; with the arithmetic.
    """
    cpus, gpus = 1.0, 0.0
    shares = [node.cpus // node.gpus for node in limit.nodes if node.gpus >= 1 and node.cpus >= 1]
    if use_gpu and shares:
        cpus, gpus = max(1.0, min(shares)), 1.0
    if not (room := limit.room(cpus, gpus)):
        raise ConfigError(
            f"{verb}: a worker needs 1 CPU on one node, and the cluster has {_described(limit)}: "
            "start Ray with --num-cpus=1 or more, or add a worker node"
        )
    workers = max(1, min(room, units))
    return UnitPlan(workers, max(1, min(workers, now.room(cpus, gpus))), cpus, gpus)


def plan_stages(verb: str, now: Resources, limit: Resources, units: int) -> StagePlan:
    """One actor for each GPU, or for every second CPU where there are none; the other CPUs decode.

    An actor drives its GPU with one CPU. Where that leaves no CPU to decode, actors and tasks get half a CPU each, and
    GPUs for which there is none stay idle.

    Raises:
        ConfigError: the cluster cannot run one of each; with the arithmetic.
    """
    gpus = 1.0 if limit.gpus >= 1 else 0.0
    for cpus in (1.0, 0.5):
        room = limit.room(cpus)
        fitting = limit.room(cpus, gpus) if gpus else room // 2
        actors = min(fitting, units, room if cpus == 1 else room // 2)
        tasks = room - actors
        if actors >= 1 and tasks >= 1:
            least = max(1, min(actors, now.room(cpus, gpus) if gpus else now.room(cpus) // 2))
            return StagePlan(min(tasks, units), cpus, actors, least, cpus - UNLIKE * (not gpus), gpus)
    raise ConfigError(
        f"{verb}: decoding and predicting need half a CPU each on one node, and the cluster has {_described(limit)}: "
        "start Ray with --num-cpus=1 or more, or add a worker node"
    )


def plan_training(num_workers: int, limit: Resources, use_gpu: bool) -> TrainPlan:
    """Each training worker gets an equal share of the CPUs, of which its decode tasks get a part that is its own.

    On CPUs half a share is reserved to train, though never more than half a node, and the rest to decode; beside a
    GPU one CPU drives it. Where that leaves less than one CPU for each, workers and tasks all get the same fraction,
    so that 1 CPU runs 2 workers. Whatever is reserved, torch gets as many threads as its share has CPUs: decoding
    takes a small part of them, and with the decoded cache none.

    Raises:
        ConfigError: too few CPUs or GPUs; with the arithmetic.
    """
    gpus = 1.0 if use_gpu else 0.0
    if use_gpu and limit.gpus < num_workers:
        fewer = f"--num-workers {int(limit.gpus)} or " if limit.gpus >= 1 else ""
        raise ConfigError(
            f"train: {num_workers} workers need 1 GPU each, the cluster has {limit.gpus:g}: use {fewer}--device cpu"
        )
    largest = max((node.cpus for node in limit.nodes), default=0.0)
    share = min(limit.cpus / num_workers, largest)
    threads = max(1, int(share))
    for cpus in [1] if use_gpu else range(int(share / 2), 0, -1):
        # Whole CPUs: whatever node Ray puts a worker on, what is left is whole CPUs again.
        tasks = (limit.room(1) - num_workers * cpus) // num_workers
        if limit.room(cpus, gpus) >= num_workers and tasks >= 1:
            return TrainPlan(cpus, gpus, min(tasks, MAX_TASKS), 1, threads)
    for hundredths in range(100, int(MIN_RANK_CPUS * 50) - 1, -1):
        # One fraction for all of them: however Ray mixes them, a node always has room for the same number.
        cpus = hundredths / 100
        if limit.room(cpus, gpus) >= num_workers and limit.room(cpus) >= 2 * num_workers:
            return TrainPlan(cpus, gpus, 1, cpus, threads)
    raise _too_few(num_workers, limit, gpus)


def plan_elastic(least: int, most: int, limit: Resources, use_gpu: bool) -> TrainPlan:
    """Shares for a number of workers that changes: whole CPUs, because Ray Train counts them by their floor.

    A worker reserves all CPUs of its share and its decode tasks none: Ray Train starts as many workers as there is room
    for, and where nodes have left, tasks with reservations of their own would find none.

    Raises:
        ConfigError: not even the least number of workers fits.
    """
    gpus = 1.0 if use_gpu else 0.0
    if (room := limit.room(1, gpus)) < least:
        remedy = f"use --min-workers {room}" if room else "start Ray with more CPUs"
        raise ConfigError(
            f"train: {least} workers, the least number, need 1 CPU{' and 1 GPU' * use_gpu} each on one node, and the "
            f"cluster has {_described(limit)}{f' and {limit.gpus:g} GPUs' * use_gpu}: {remedy}, or add a worker node"
        )
    shares = range(max(1, int(limit.cpus / most)), 0, -1)
    cpus = next(share for share in shares if limit.room(share, gpus) >= min(most, room))
    return TrainPlan(cpus, gpus, max(1, cpus // 2), 0, cpus)


def plan_serving(models: int, replicas: int, limit: Resources) -> ServePlan:
    """One CPU for each replica of each model, and a GPU for each where there is one for all of them.

    Raises:
        ConfigError: too few CPUs; with the arithmetic.
    """
    wanted = models * replicas
    for gpus in (1.0, 0.0):
        if limit.room(1, gpus) >= wanted:
            return ServePlan(1, gpus)
    fitting = limit.room(1) // models
    remedy = f"use --replicas {fitting}" if fitting else "serve fewer models, or add a worker node"
    raise ConfigError(
        f"serve: {models} model{'s' * (models > 1)} x {replicas} replica{'s' * (replicas > 1)} = {wanted}, each with "
        f"1 CPU on one node, and the cluster has {_described(limit)}: {remedy}"
    )


def _too_few(num_workers: int, limit: Resources, gpus: float) -> ConfigError:
    least = int(MIN_RANK_CPUS * 50) / 100
    most = min(limit.room(least) // 2, limit.room(least, gpus))
    remedy = f"use --num-workers {most} or fewer" if most else "start Ray with more CPUs, or add a worker node"
    beside = ", on a node with a GPU," if gpus else ""
    return ConfigError(
        f"train: {num_workers} workers{beside} share {_described(limit)}, "
        f"{limit.cpus / num_workers:.2g} CPUs each, and need {MIN_RANK_CPUS} each with their decoding: {remedy}"
    )


def _described(resources: Resources) -> str:
    """`3 CPUs`, or `4 CPUs (nodes of 2 and 2)`."""
    sizes = [f"{node.cpus:g}" for node in sorted(resources.nodes, reverse=True) if node.cpus or node.gpus]
    total = f"{resources.cpus:g} CPU{'' if resources.cpus == 1 else 's'}"
    if len(sizes) < 2:
        return total
    listed = ", ".join(sizes) if len(sizes) <= 8 else f"{sizes[0]} down to {sizes[-1]}"
    return f"{total} (nodes of {listed})"


def _times(whole: float, part: float) -> int:
    """How often a part fits; a hair more than the whole still does, since 0.3 is three times 0.1 for Ray."""
    return math.floor(whole / part + 1e-6)
