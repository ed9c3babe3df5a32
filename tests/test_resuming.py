"""Runs of `raycnn train` that are killed within an epoch: an audit of the samples that they trained on, and of weights.

`jobs/bench.py resume` does more of it.
"""

import tempfile
from collections.abc import Iterator
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
    assert not killed.train(2, resume.Kill("driver", 1, 800), imbalance="sampler")
    assert killed.train(2, imbalance="sampler")
    assert killed.digest() == whole.digest()


def test_a_run_goes_on_with_another_number_of_workers_and_each_sample_once(resume: Any, packed: str, tmp_path: Path):
    run = resume.Run(tmp_path, packed)
    assert not run.train(1, resume.Kill("driver", 1, 1500))
    assert run.train(2)
    assert run.is_exact()


def test_an_elastic_run_that_loses_a_node_goes_on_with_the_workers_that_are_left(
    resume: Any, packed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run, kill = resume.Run(tmp_path / "run", packed), resume.Kill("raylet", 1, 700)
    for name, value in run.environment(kill).items():  # that of the nodes is that of their workers
        monkeypatch.setenv(name, value)
    from benchmarks.kills import Nodes

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # whose name is short, as sockets need it
        nodes = Nodes(folder)
        try:
            monkeypatch.setenv("RAY_ADDRESS", nodes.address)
            assert run.train(2, kill, min_workers=1)
        finally:
            nodes.stop()
    assert run.is_exact()
