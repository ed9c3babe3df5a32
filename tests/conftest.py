import functools
import os
import signal
import socket
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

from raycnn.s3local import S3Server

for name in ("http_proxy", "https_proxy", "all_proxy"):
    os.environ.pop(name, None)
    os.environ.pop(name.upper(), None)
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes share what may be two CPUs

signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores Ctrl-C

settings.register_profile("shared", deadline=None)  # what takes 200 ms elsewhere may take a second beside a cluster
settings.load_profile("shared")

LEAN_RAY = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_worker_niceness": "0",
}
"""Ends are seen sooner, and no process is started that might not be needed."""
os.environ.update(LEAN_RAY)


class TwoProcesses(LoadScopeScheduling):
    """Modules that share the session's Ray cluster run in one process, the others in whichever is free."""

    def _split_scope(self, nodeid: str) -> str:
        module = Path(nodeid.partition("::")[0]).name
        return "the session's cluster" if _shares(module) else module


@functools.cache
def _shares(module: str) -> bool:
    return "ray_cluster" in Path(__file__).with_name(module).read_text(encoding="utf-8")


@pytest.hookimpl(tryfirst=True)  # before `-m` is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs a cluster or the S3 server is slow. What takes longest comes first: both processes end together."""
    for item in items:
        if item.get_closest_marker("ray") or item.get_closest_marker("s3"):
            item.add_marker("slow")
    items.sort(key=lambda item: item.path.name != "test_jobs.py")


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> TwoProcesses:
    """Called where `-n` is not 0."""
    return TwoProcesses(config, log)


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
