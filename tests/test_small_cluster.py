"""Every verb where there is but one CPU, beside a head without any; and a training that is killed, twice over."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from conftest import LEAN_RAY, kill_tree

from raycnn import bundle as bundles
from raycnn.config import TrainConfig, make
from raycnn.shards.order import steps_per_epoch
from raycnn.storage import open_store
from raycnn.training import Checkpoints, train

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


class SmallCluster(NamedTuple):
    """The folder that the program worked in, what each of its steps made, and what its training told."""

    folder: Path
    steps: dict[str, dict[str, Any]]
    events: list[dict[str, Any]]

    @property
    def epochs(self) -> list[int]:
        return [event["epoch"] for event in self.events if event["kind"] == "epoch"]


@pytest.fixture(scope="module")
def small_cluster(tmp_path_factory: pytest.TempPathFactory) -> SmallCluster:
    """What `small_cluster.py` did before it was killed while it trained, after one of its workers had been."""
    folder = tmp_path_factory.mktemp("small")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # Its home is where it looks for what the cluster launcher left, and where it finds nothing else of ours.
    environment |= {"HOME": str(folder), "RAY_USAGE_STATS_ENABLED": "0"} | LEAN_RAY
    # A folder of its own, or every ray.init() on this machine would join it; a short one, for its sockets.
    own = tempfile.mkdtemp(prefix="rc", dir="/tmp")
    environment["RAY_TMPDIR"] = own
    program = [sys.executable, str(Path(__file__).with_name("small_cluster.py")), str(folder)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, stderr=log, start_new_session=True)
    assert process.stdout is not None
    try:
        events = until_epoch(1, process.stdout)
        assert events, (folder / "log").read_text()
        kill_a_worker(process.pid)
        events += until_epoch(4, process.stdout)
        assert events[-1].get("epoch") == 4, (folder / "log").read_text()
    finally:
        kill_tree(process)
        shutil.rmtree(own, ignore_errors=True)
    return SmallCluster(folder, {e["step"]: e for e in events if "kind" not in e}, [e for e in events if "kind" in e])


def until_epoch(epoch: int, lines: Iterable[bytes]) -> list[dict[str, Any]]:
    events = []
    for line in lines:
        events.append(json.loads(line))
        if events[-1].get("epoch") == epoch and events[-1]["kind"] == "epoch":
            break
    return events


def kill_a_worker(program: int) -> None:
    """Kill one of the program's training workers, while the other one waits for it in an all-reduce."""
    family = psutil.Process(program).children(recursive=True)
    workers = [p for p in family if "RayTrainWorker" in " ".join(p.cmdline())]
    assert len(workers) == 2
    workers[0].send_signal(signal.SIGKILL)


def test_every_verb_runs_on_a_single_cpu_beside_a_head_without_any(small_cluster: SmallCluster):
    made = small_cluster.steps
    assert made["evaluate"]["rows"] == 64
    assert made["label"]["status"] == {"ok": 64}
    assert small_cluster.epochs  # of a training with 2 workers


def test_a_verb_that_waits_for_the_autoscaler_says_so_and_goes_on_when_a_node_comes(small_cluster: SmallCluster):
    made = small_cluster.steps["pack where there is no CPU yet"]
    assert made["note"].startswith("waiting for 1 CPU: the cluster has 0 of 0 free")
    assert made["rows"] == 64


def test_a_run_survives_the_death_of_a_worker(small_cluster: SmallCluster):
    assert sorted(set(small_cluster.epochs)) == [0, 1, 2, 3, 4]
    assert len(small_cluster.epochs) <= 6  # at most the one epoch that was under way is done again


def test_a_run_that_was_killed_goes_on_with_another_number_of_workers(
    small_cluster: SmallCluster, request: pytest.FixtureRequest
):
    request.getfixturevalue("ray_cluster")
    run = small_cluster.folder / "run"
    done = Checkpoints(open_store(str(run))).last()
    assert done is not None
    last = done["epoch"] + 3
    # It could have died anywhere: between metrics and checkpoint, tensors and marker, config.json and weights.
    lines = (run / "metrics.jsonl").read_text().splitlines()[: done["epoch"] + 1]
    lines.append(json.dumps(json.loads(lines[-1]) | {"epoch": done["epoch"] + 1, "train/loss": 99.0}))
    (run / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    best = Checkpoints(open_store(str(run))).best()
    assert best is not None
    free = ({0, 1, 2} - {done["slot"], best["slot"]}).pop()
    (run / "checkpoints" / f"slot-{free}.safetensors").write_bytes(b"half")
    open_store(str(run)).put("bundle/config.json", b'{"incomplete": true, "metrics": {}}')

    packed = str(small_cluster.folder / "packed")
    settings = {"data": packed, "run": str(run), "batch_size": 16, "num_workers": 1, "epochs": last + 1}
    report = train(make(TrainConfig, settings))
    assert (report.resumed_at_epoch, report.epochs) == (done["epoch"] + 1, last + 1)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(last + 1))
    rows = json.loads(Path(packed, "manifest.json").read_text())["splits"]["train"]["status"]["ok"]
    steps = steps_per_epoch(rows, 16)
    assert [line["step"] for line in lines] == [steps * (e + 1) for e in range(last + 1)]
    assert all(line["train/loss"] < 99 for line in lines)
    assert report.accuracy_top1 > 0.95
    assert bundles.load(report.bundle).config["metrics"]["epochs"] == last + 1
