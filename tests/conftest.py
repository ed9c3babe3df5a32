import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from raycnn.s3local import S3Server

for name in ("http_proxy", "https_proxy", "all_proxy"):
    os.environ.pop(name, None)
    os.environ.pop(name.upper(), None)
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

RAY_TRAIN = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
"""Ends are seen sooner, and a process less is started."""
os.environ.update(RAY_TRAIN)


class SmallCluster(NamedTuple):
    """The folder that the program worked in, what each of its steps made, and what its trainings told."""

    folder: Path
    steps: dict[str, dict[str, Any]]
    events: list[dict[str, Any]]


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """A running S3 server with the bucket `raycnn`, found through the AWS_* variables of this process."""
    with S3Server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        patch.delenv("AWS_PROFILE", raising=False)
        server.create_bucket("raycnn")
        yield server


@pytest.fixture
def s3_url(s3: S3Server) -> str:
    """A prefix that nobody else uses."""
    return f"s3://raycnn/{uuid.uuid4().hex}"


@pytest.fixture(scope="session")
def ray_cluster(s3: S3Server) -> Iterator[None]:
    """A local cluster of 2 CPUs for the whole session; its workers know the S3 server."""
    import ray

    from raycnn import data

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    data.connect()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def small_cluster(tmp_path_factory: pytest.TempPathFactory) -> SmallCluster:
    """What `small_cluster.py` did before it was killed in the middle of its last training."""
    folder = tmp_path_factory.mktemp("small")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # Its home is where it looks for what the cluster launcher left, and where it finds nothing else of ours.
    environment |= {"HOME": str(folder), "RAY_USAGE_STATS_ENABLED": "0"} | RAY_TRAIN
    # A folder of its own, or every ray.init() on this machine would join it; a short one, for its sockets.
    own = tempfile.mkdtemp(prefix="rc", dir="/tmp")
    environment["RAY_TMPDIR"] = own
    program = [sys.executable, str(Path(__file__).with_name("small_cluster.py")), str(folder)]
    events: list[dict[str, Any]] = []
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, stderr=log, start_new_session=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            events.append(json.loads(line))
            if events[-1].get("epoch") == 2:
                break
        assert events[-1].get("epoch") == 2, (folder / "log").read_text()
    finally:
        kill_tree(process)
        shutil.rmtree(own, ignore_errors=True)
    return SmallCluster(folder, {e["step"]: e for e in events if "kind" not in e}, [e for e in events if "kind" in e])


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and what it has started, all of it at once and without a warning."""
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
        for member in (psutil.Process(process.pid), *family):
            with suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait()


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
