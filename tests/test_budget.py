"""The CPU budget: nothing is reserved that does not fit, what cannot run is refused, and small clusters do run."""

import math
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from raycnn.config import PackConfig, make
from raycnn.data import Node, Resources, board, plan_elastic, plan_serving, plan_stages, plan_training, plan_units
from raycnn.data.board import shortage
from raycnn.data.cluster import _most as launchable
from raycnn.errors import ConfigError
from raycnn.packing import pack


def cluster(*nodes: float | tuple[float, float]) -> Resources:
    return Resources(tuple(Node(*n) if isinstance(n, tuple) else Node(n) for n in nodes))


def place(nodes: list[list[float]], cpus: float, gpus: float, seed: int) -> bool:
    """Put one worker on some node that has room for it, in hundredths of a CPU, as Ray does with its own."""
    need = round(cpus * 100), round(gpus * 100)
    fitting = [node for node in nodes if node[0] >= need[0] and node[1] >= need[1]]
    if fitting:
        node = random.Random(seed).choice(fitting)
        node[0], node[1] = node[0] - need[0], node[1] - need[1]
    return bool(fitting)


NODES = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 7.0, 16.0, 64.0]), st.sampled_from([0.0, 0.0, 1, 2, 8])
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.slow
@given(nodes=NODES, num_workers=st.integers(1, 9), use_gpu=st.booleans(), seed=st.integers(0, 99))
def test_training_workers_and_their_decode_tasks_fit_on_the_nodes_wherever_ray_puts_them(
    nodes, num_workers, use_gpu, seed
):
    limit = cluster(*nodes)
    try:
        plan = plan_training(num_workers, limit, use_gpu)
    except ConfigError:
        few_gpus = use_gpu and sum(min(g, c / 0.12) // 1 for c, g in nodes) < num_workers
        assert few_gpus or sum(math.floor(c / 0.12 + 1e-6) for c, _ in nodes) < 2 * num_workers
        return
    left = [[round(c * 100), round(g * 100)] for c, g in nodes]
    assert all(place(left, plan.worker_cpus, plan.worker_gpus, seed + i) for i in range(num_workers))
    assert plan.tasks >= 1
    assert all(place(left, plan.task_cpus, 0, seed + i) for i in range(num_workers * plan.tasks))
    assert 1 <= plan.threads <= max(1, *(c for c, _ in nodes))


@given(nodes=NODES, units=st.integers(1, 50), use_gpu=st.booleans(), seed=st.integers(0, 99))
def test_the_workers_of_a_pipeline_fit_on_the_nodes(nodes, units, use_gpu, seed):
    limit = cluster(*nodes)
    if max(c for c, _ in nodes) < 1:
        with pytest.raises(ConfigError, match="a worker needs 1 CPU on one node"):
            plan_units("label", limit, limit, units, use_gpu)
        return
    plan = plan_units("label", limit, limit, units, use_gpu)
    left = [[round(c * 100), round(g * 100)] for c, g in nodes]
    assert all(place(left, plan.cpus, plan.gpus, seed + i) for i in range(plan.workers))
    assert plan.workers == units or not place(left, plan.cpus, plan.gpus, 0)
    assert plan.gpus == (1 if use_gpu and any(g and c >= 1 for c, g in nodes) else 0)


@pytest.mark.parametrize(
    ("cpus", "num_workers", "worker", "tasks", "task"),
    [
        (1, 1, 0.5, 1, 0.5),
        (1, 2, 0.25, 1, 0.25),
        (1, 4, 0.12, 1, 0.12),
        (2, 1, 1, 1, 1),
        (2, 2, 0.5, 1, 0.5),
        (3, 1, 1, 2, 1),
        (3, 2, 0.75, 1, 0.75),
        (4, 1, 2, 2, 1),
        (4, 3, 0.66, 1, 0.66),
        (64, 1, 32, 32, 1),
        (64, 4, 8, 8, 1),
    ],
)
def test_on_one_machine_training_and_decoding_halve_the_cpus(cpus, num_workers, worker, tasks, task):
    plan = plan_training(num_workers, cluster(cpus), use_gpu=False)
    assert (plan.worker_cpus, plan.tasks, plan.task_cpus) == (worker, tasks, task)


def test_a_worker_is_never_larger_than_a_node():
    assert plan_training(1, cluster(2, 2), use_gpu=False)[:4] == (1, 0, 3, 1)
    assert plan_training(1, cluster(*[2] * 32), use_gpu=False)[:4] == (1, 0, 63, 1)
    # 768 CPUs that an autoscaler could add: 16 CPUs go with each GPU on its node, not 48.
    aws = cluster(0, *[(16, 1)] * 16, *[32] * 16)
    assert plan_units("label", cluster(0), aws, 1000, use_gpu=True) == (16, 1, 16, 1)
    assert plan_training(16, aws, use_gpu=True)[:4] == (1, 1, 47, 1)


def test_one_cpu_drives_a_gpu_and_the_rest_decode():
    assert plan_training(2, cluster((16, 2)), use_gpu=True)[:4] == (1, 1, 7, 1)
    assert plan_training(1, cluster((1, 1)), use_gpu=True)[:4] == (0.5, 1, 1, 0.5)


@given(nodes=NODES, units=st.integers(1, 99))
def test_a_cluster_with_half_a_cpu_for_each_decodes_and_predicts(nodes, units):
    has = cluster(*nodes)
    if has.room(0.5) < 2 or (has.gpus >= 1 and not has.room(0.5, 1)):
        with pytest.raises(ConfigError, match="half a CPU each"):
            plan_stages("label", has, has, units)
        return
    plan = plan_stages("label", has, has, units)
    assert 1 <= plan.min_actors <= plan.actors <= units
    assert 1 <= plan.tasks <= units
    assert plan.actors + plan.tasks <= has.room(plan.task_cpus)
    assert plan.actors <= has.room(plan.task_cpus, plan.actor_gpus)


def test_gpus_beyond_the_cpus_do_not_keep_a_pipeline_from_starting():
    assert plan_stages("label", cluster((4, 8)), cluster((4, 8)), 100)[:3] == (4, 0.5, 4)
    assert plan_stages("label", cluster((16, 2)), cluster((16, 2)), 100)[:3] == (14, 1, 2)


def test_a_pipeline_grows_to_what_the_autoscaler_may_add_and_begins_with_what_is_there():
    assert plan_units("pack", cluster(0), cluster(0, 4, 4), 100) == (8, 1, 1, 0)
    assert plan_units("pack", cluster(4), cluster(4, 4), 100) == (8, 4, 1, 0)
    assert plan_units("pack", cluster(64), cluster(64), 3) == (3, 3, 1, 0)


def test_what_the_autoscaler_of_cluster_yaml_may_add_is_known_on_its_head(tmp_path, monkeypatch):
    file = Path(__file__).parents[1] / "cluster.yaml"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert launchable() == Resources(())
    (tmp_path / "ray_bootstrap_config.yaml").write_bytes(file.read_bytes())
    found = launchable()
    assert len(found.nodes) == yaml.safe_load(file.read_bytes())["max_workers"] == 16
    assert plan_units("label", cluster(0), found, 1000, use_gpu=True) == (16, 1, 16, 1)
    assert plan_units("pack", cluster(0), found, 1000).workers == found.cpus


@pytest.mark.slow
@given(nodes=NODES, models=st.integers(1, 4), replicas=st.integers(1, 4), seed=st.integers(0, 99))
def test_the_replicas_of_all_models_fit_on_the_nodes(nodes, models, replicas, seed):
    limit, wanted = cluster(*nodes), models * replicas
    if sum(c // 1 for c, _ in nodes) < wanted:
        with pytest.raises(ConfigError, match="serve: "):
            plan_serving(models, replicas, limit)
        return
    plan = plan_serving(models, replicas, limit)
    left = [[round(c * 100), round(g * 100)] for c, g in nodes]
    assert all(place(left, plan.cpus, plan.gpus, seed + i) for i in range(wanted))
    assert plan.gpus == (1 if sum(min(c // 1, g) for c, g in nodes) >= wanted else 0)


def test_two_models_do_not_wait_for_ever_for_one_gpu():
    assert plan_serving(1, 1, cluster((8, 1))) == (1, 1)
    assert plan_serving(2, 1, cluster((8, 1))) == (1, 0)
    assert plan_serving(2, 1, cluster((8, 1), (8, 1))) == (1, 1)


@pytest.mark.parametrize(
    ("models", "replicas", "nodes", "message"),
    [
        (2, 3, [4], r"2 models x 3 replicas = 6, each with 1 CPU .* has 4 CPUs: use --replicas 2$"),
        (3, 1, [2], r"3 models x 1 replica = 3, .* has 2 CPUs: serve fewer models, or add a worker node$"),
        (1, 2, [1.5, 0.5], r"has 2 CPUs \(nodes of 1\.5, 0\.5\): use --replicas 1$"),
    ],
)
def test_an_endpoint_that_cannot_start_is_refused_with_the_arithmetic(models, replicas, nodes, message):
    with pytest.raises(ConfigError, match=message):
        plan_serving(models, replicas, cluster(*nodes))


@pytest.mark.parametrize(
    ("num_workers", "nodes", "use_gpu", "message"),
    [
        (5, [1], False, r"5 workers share 1 CPU, 0\.2 CPUs each, and need 0\.25 .* use --num-workers 4 or fewer"),
        (40, [2, 2], False, r"4 CPUs \(nodes of 2, 2\), 0\.1 CPUs each, .* use --num-workers 16 or fewer"),
        (1, [0], False, "share 0 CPUs, .* start Ray with more CPUs, or add a worker node"),
        (2, [(8, 1)], True, "2 workers need 1 GPU each, the cluster has 1: use --num-workers 1 or --device cpu"),
        (2, [(0, 1), (8, 1)], True, r"on a node with a GPU.*use --num-workers 1 or fewer"),
    ],
)
def test_what_cannot_run_is_refused_with_the_arithmetic(num_workers, nodes, use_gpu, message):
    with pytest.raises(ConfigError, match=message):
        plan_training(num_workers, cluster(*nodes), use_gpu)


def test_a_pipeline_without_a_whole_cpu_on_any_node_is_refused_with_the_arithmetic():
    with pytest.raises(ConfigError, match=r"label: a worker needs 1 CPU .* 1 CPU \(nodes of 0\.5, 0\.5\): start Ray"):
        plan_units("label", cluster(0.5, 0.5), cluster(0.5, 0.5), 3)


@pytest.mark.ray
def test_what_others_hold_is_said_and_no_more_once_it_is_free(ray_cluster):
    from ray.util.placement_group import placement_group, remove_placement_group

    theirs = placement_group([{"CPU": 2}])
    assert theirs.wait(20)
    ours = placement_group([{"CPU": 0.5}] * 2)
    wait_until(lambda: shortage() is not None)
    assert shortage() == (
        "waiting for 0.5 CPU: the cluster has 0 of 2 free; this goes on when other work ends or a node is added"
    )
    remove_placement_group(theirs)
    assert ours.wait(20)
    wait_until(lambda: shortage() is None)
    remove_placement_group(ours)


@pytest.mark.ray
def test_a_verb_that_waits_for_others_says_so_and_goes_on(ray_cluster, tmp_path, monkeypatch):
    from ray.util.placement_group import placement_group, remove_placement_group

    monkeypatch.setattr(board, "QUIET_S", 1)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.png").write_bytes(b"anything")
    config = make(PackConfig, {"src": str(tmp_path / "raw"), "dst": str(tmp_path / "packed")})
    theirs, notes = placement_group([{"CPU": 2}]), Queue()
    assert theirs.wait(20)
    with ThreadPoolExecutor() as pool:
        packing = pool.submit(pack, config, lambda event: notes.put(event.get("text")))
        while not str(note := notes.get(timeout=60)).startswith("waiting for"):
            pass
        assert note.startswith("waiting for 1 CPU: the cluster has 0 of 2 free")
        remove_placement_group(theirs)
        assert packing.result().rows == 1


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_an_elastic_run_is_planned_for_its_least_number_of_workers_and_refused_below_it():
    assert plan_elastic(2, 4, cluster(2), use_gpu=False).worker_cpus == 1
    assert plan_elastic(2, 4, cluster(8, 8), use_gpu=False).worker_cpus == 4
    with pytest.raises(ConfigError, match=r"3 workers, .* need 1 CPU each .* has 2 CPUs: use --min-workers 2"):
        plan_elastic(3, 4, cluster(2), use_gpu=False)
    with pytest.raises(ConfigError, match=r"need 1 CPU and 1 GPU each .* has 8 CPUs and 1 GPUs: use --min-workers 1"):
        plan_elastic(2, 4, cluster((8, 1)), use_gpu=True)
    assert plan_elastic(1, 4, cluster((8, 2)), use_gpu=True).worker_gpus == 1
