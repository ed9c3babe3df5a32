import os
import socket
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest
from hypothesis import settings

from raycnn.s3local import S3Server

for name in ("http_proxy", "https_proxy", "all_proxy"):
    os.environ.pop(name, None)
    os.environ.pop(name.upper(), None)
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

settings.register_profile("shared", deadline=None)  # what takes 200 ms elsewhere may take a second beside a cluster
settings.load_profile("shared")

LEAN_RAY = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
}
"""Ends are seen sooner, and no process is started that might not be needed."""
os.environ.update(LEAN_RAY)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two processes run the tests: those that share a cluster go to one of them, other modules to whichever is free.

    What takes long comes first, so that both end at about the same time.
    """
    for item in items:
        shares = "ray_cluster" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("ray" if shares else item.path.stem))
    first = ["test_jobs", "ray", "test_small_cluster", "test_cluster", "test_demo"]
    groups = {item: next(item.iter_markers("xdist_group")).args[0] for item in items}
    items.sort(key=lambda item: first.index(groups[item]) if groups[item] in first else len(first))


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
