"""Runs of `raycnn train` that are killed within an epoch: an audit of the samples that they trained on, and of weights.

`jobs/bench.py resume` does more of it.
"""

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(480)]

JOBS = Path(__file__).parent.parent / "jobs"


@pytest.fixture(scope="module")
def resume() -> Iterator[Any]:
    """The benchmark's module; each command has a Ray of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(JOBS)
        patch.setenv("RAY_ADDRESS", "local")
        import benchmarks.resume

        yield benchmarks.resume


@pytest.fixture(scope="module")
def packed(resume: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return resume.pack(tmp_path_factory.mktemp("images"))


def test_a_killed_run_ends_with_the_weights_of_one_that_nobody_killed(resume: Any, packed: str, tmp_path: Path):
    whole, killed, other = (resume.Run(tmp_path / name, packed, seed) for name, seed in (("w", 0), ("k", 0), ("o", 1)))
    assert whole.train(1)
    assert not killed.train(1, resume.Kill("driver", 1, 1500))
    assert killed.train(1)
    assert killed.is_exact()
    assert killed.digest() == whole.digest()
    assert other.train(1)
    assert other.digest() != whole.digest()


def test_a_killed_run_that_shows_rare_classes_more_often_goes_on_alike(resume: Any, packed: str, tmp_path: Path):
    whole, killed = (resume.Run(tmp_path / name, packed) for name in "wk")
    assert whole.train(2, imbalance="sampler")
    assert killed.train(2, resume.Kill("worker", 1, 800), imbalance="sampler")  # another worker takes its place
    assert killed.digest() == whole.digest()


def test_a_run_goes_on_with_another_number_of_workers_and_each_sample_once(resume: Any, packed: str, tmp_path: Path):
    run = resume.Run(tmp_path, packed)
    assert not run.train(1, resume.Kill("driver", 1, 1500))
    assert run.train(2)
    assert run.is_exact()


@contextmanager
def nodes_of_one_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two of them, where commands then run."""
    from benchmarks.kills import Nodes

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # whose name is short, as sockets need it
        nodes = Nodes(folder)
        try:
            monkeypatch.setenv("RAY_ADDRESS", nodes.address)
            yield nodes
        finally:
            nodes.stop()


def test_an_elastic_run_that_loses_a_node_goes_on_with_the_workers_that_are_left(
    resume: Any, packed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run, kill = resume.Run(tmp_path / "run", packed), resume.Kill("raylet", 1, 700)
    for name, value in run.environment(kill).items():  # that of the nodes is that of their workers
        monkeypatch.setenv(name, value)
    with nodes_of_one_cpu(monkeypatch):
        assert run.train(2, kill, min_workers=1)
    assert run.is_exact()


def wait(what: Callable[[], object]) -> None:
    until = time.monotonic() + 120
    while not what():
        assert time.monotonic() < until
        time.sleep(0.1)


@contextmanager
def training(resume: Any, packed: str, run: Path, options: str) -> Iterator[None]:
    """A command that trains until it is killed, once its first epoch is done."""
    with (run / "log").open("w") as log:
        driver = subprocess.Popen([resume.RAYCNN, "train", packed, str(run), *options.split()], stdout=log, stderr=log)
        try:
            wait((run / "metrics.jsonl").exists)
            yield
        finally:
            driver.kill()
            driver.wait()


def test_an_elastic_run_takes_more_workers_when_there_is_room(
    resume: Any, packed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def epochs() -> int:
        return len((tmp_path / "metrics.jsonl").read_text().splitlines())

    options = "--num-workers 3 --min-workers 1 --epochs 1000 --batch-size 16"
    with nodes_of_one_cpu(monkeypatch) as nodes, training(resume, packed, tmp_path, options):
        assert nodes.count("RayTrainWorker") == 2
        nodes.add()
        wait(lambda: nodes.count("RayTrainWorker") == 3)
        done = epochs()
        wait(lambda: epochs() > done + 1)


def test_a_run_writes_a_checkpoint_when_one_of_its_nodes_is_about_to_be_taken_away(
    resume: Any, packed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def is_saved_within_an_epoch() -> bool:
        slots = (tmp_path / "checkpoints").glob("slot-*.json")
        return any(json.loads(slot.read_text())["accuracy_top1"] is None for slot in slots)

    options = "--num-workers 2 --min-workers 1 --epochs 1000 --batch-size 4 --checkpoint-every 1000000"
    with nodes_of_one_cpu(monkeypatch) as nodes, training(resume, packed, tmp_path, options):
        assert not is_saved_within_an_epoch()
        nodes.drain("RayTrainWorker")
        wait(is_saved_within_an_epoch)
    assert "core_worker.cc" not in (tmp_path / "log").read_text()
