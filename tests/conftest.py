from __future__ import annotations

import functools
import io
import os
import signal
import socket
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import psutil
import pytest
from hypothesis import settings
from PIL import Image
from xdist.scheduler import LoadScopeScheduling

from raycnn.s3local import S3Server

if TYPE_CHECKING:
    from raycnn.demo import DemoReport

for name in ("http_proxy", "https_proxy", "all_proxy"):
    os.environ.pop(name, None)
    os.environ.pop(name.upper(), None)
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes share what may be two CPUs

signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores Ctrl-C

settings.register_profile("shared", deadline=None)  # what takes 200 ms elsewhere may take a second beside a cluster
settings.load_profile("shared")

LEAN_RAY = {
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_worker_niceness": "0",
}
"""Ends are seen sooner, no process is started that might not be needed, and nobody counts what each one uses."""
os.environ.update(LEAN_RAY)


class TwoProcesses(LoadScopeScheduling):
    """Modules that share the session's Ray cluster run in one process, the others in whichever is free."""

    def _split_scope(self, nodeid: str) -> str:
        module = Path(nodeid.partition("::")[0]).name
        return "the session's cluster" if _shares(module) else module


@functools.cache
def _shares(module: str) -> bool:
    text = Path(__file__).with_name(module).read_text(encoding="utf-8")
    return "ray_cluster" in text or "demonstrated" in text


@pytest.hookimpl(tryfirst=True)  # before `-m` is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs a cluster or the S3 server is slow. What takes longest comes first: both processes end together."""
    for item in items:
        if item.get_closest_marker("ray") or item.get_closest_marker("s3"):
            item.add_marker("slow")
    items.sort(key=lambda item: (item.path.name != "test_jobs.py", not _shares(item.path.name)))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> TwoProcesses:
    """Called where `-n` is not 0."""
    return TwoProcesses(config, log)


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Decoded images of this session, and of no other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


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
def ray_cluster(s3: S3Server) -> Iterator[str]:
    """The address of a local cluster of 2 CPUs for the whole session; its workers know the S3 server."""
    import ray

    from raycnn import data

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    data.connect()
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


class Demonstrated(NamedTuple):
    """What a demo has reported and said, the objects that it has left, and the same of a second one."""

    report: DemoReport
    again: DemoReport
    notes: list[str]
    notes_again: list[str]
    objects: dict[str, str | None]
    objects_again: dict[str, str | None]
    store: str


@pytest.fixture(scope="session")
def stripes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 images of three classes; and one to train on and one of those held out that cannot be read."""
    from raycnn.shards import hash_split

    root, rng = tmp_path_factory.mktemp("demo") / "stripes", np.random.default_rng(0)
    for side, name in enumerate(("bottom", "middle", 'top, "high"')):
        (root / name).mkdir(parents=True)
        for i in range(80):
            (root / name / f"{i:03d}.png").write_bytes(_striped(rng, side))
    for split in ("train", "test"):
        broken = next(f"middle/b{i}.png" for i in range(1000) if hash_split(f"middle/b{i}.png", 0.1, 0.1) == split)
        (root / broken).write_bytes(_striped(rng, 1)[:40])
    return root


def _striped(rng: np.random.Generator, side: int) -> bytes:
    """A PNG image that is lit at its top, its middle or its bottom."""
    image = rng.integers(0, 60, (9, 9), np.uint8)
    image[3 * side : 3 * side + 3] += 150
    sink = io.BytesIO()
    Image.fromarray(image).save(sink, "PNG")
    return sink.getvalue()


@pytest.fixture(scope="session")
def demonstrated(
    s3: S3Server, ray_cluster: str, stripes: Path, tmp_path_factory: pytest.TempPathFactory
) -> Demonstrated:
    """The demo, run twice against the S3 server and the cluster of the session: its training serves others, too."""
    from raycnn.config import DemoConfig, make
    from raycnn.demo import demo
    from raycnn.storage import open_store

    store, folder = "s3://raycnn/demo", tmp_path_factory.mktemp("made")
    config = make(DemoConfig, {"data": str(stripes), "dir": str(folder), "store": store})
    runs: list[tuple[DemoReport, list[str], dict[str, str | None]]] = []
    for _ in range(2):
        notes: list[str] = []
        report = demo(config, lambda event, notes=notes: notes.append(event.get("text", "")))
        runs.append((report, notes, {e.path: e.etag for e in open_store(store).list()}))
    (first, notes, objects), (again, notes_again, objects_again) = runs
    return Demonstrated(first, again, notes, notes_again, objects, objects_again, f"{store}/stripes")


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
