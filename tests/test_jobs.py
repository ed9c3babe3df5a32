"""The verbs as jobs on a cluster that `ray start --head` made, and the endpoint on the same cluster."""

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import kill_tree
from PIL import Image

from raycnn.s3local import S3Server
from raycnn.storage import open_store

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.timeout(240)]

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
URL = "s3://raycnn/jobs"
CHAIN = (
    ("pack", f"{URL}/raw", f"{URL}/packed"),
    ("train", f"{URL}/packed", f"{URL}/run", "--epochs", "2"),
    ("evaluate", f"{URL}/run/bundle", f"{URL}/packed"),
    ("label", f"{URL}/raw", f"{URL}/labels", "--bundle", f"{URL}/run/bundle"),
)


class Cluster(NamedTuple):
    dashboard: int
    environment: dict[str, str]

    def submit(self, verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`ray job submit -- python VERB.py ARGUMENTS`, as the README gives it."""
        command = [BIN / "ray", "job", "submit", "--working-dir", "jobs", "--", "python", f"{verb}.py", *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=120, check=False
        )


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def cluster(s3: S3Server) -> Iterator[Cluster]:
    """`ray start --head` with 2 CPUs in an environment that knows the S3 server; its home holds no token."""
    home = Path(tempfile.mkdtemp(prefix="rj", dir="/tmp"))
    gcs, dashboard, client, agent = free_ports(4)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(home), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [BIN / "ray", "start", "--head", "--block", "--num-cpus=2", f"--temp-dir={home}/r"]
    command += [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    command += [f"--dashboard-agent-listen-port={agent}", "--min-worker-port=0", "--max-worker-port=0"]
    with (home / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    found = environment | {
        "RAY_ADDRESS": f"127.0.0.1:{gcs}",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    try:
        while "Ray runtime started" not in (home / "log").read_text():
            assert process.poll() is None, (home / "log").read_text()
            time.sleep(0.1)
        yield Cluster(dashboard, found)
    finally:
        kill_tree(process)
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def raw(s3: S3Server) -> dict[str, bytes]:
    """Images on S3 that are lit on their left or on their right half."""
    store, rng, files = open_store(f"{URL}/raw"), np.random.default_rng(0), {}
    for i in range(160):
        image = rng.integers(0, 60, (8, 8), np.uint8)
        image[:, : 4 if i % 2 else 8][:, -4:] += 150
        sink = io.BytesIO()
        Image.fromarray(image).save(sink, "PNG")
        files[f"{'left' if i % 2 else 'right'}/{i:03d}.png"] = sink.getvalue()
    for name, encoded in files.items():
        store.put(name, encoded)
    return files


def report(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The JSON object that a job printed last, before what `ray job submit` adds."""
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))


@pytest.fixture(scope="module")
def first(cluster: Cluster, raw: dict[str, bytes]) -> dict[str, dict[str, Any]]:
    """What each verb of the chain reported."""
    return {verb: report(cluster.submit(verb, *arguments, "--json")) for verb, *arguments in CHAIN}


def test_the_chain_runs_as_jobs(first: dict[str, dict[str, Any]], raw: dict[str, bytes]):
    assert first["pack"]["rows"] == len(raw)
    assert first["train"]["epochs"] == 2
    assert first["evaluate"]["rows"] == first["pack"]["splits"]["test"]
    assert (first["label"]["rows"], first["label"]["status"]) == (len(raw), {"ok": len(raw)})


def test_the_same_jobs_again_find_nothing_to_do(cluster: Cluster, first: dict[str, dict[str, Any]]):
    before = {e.path: e.etag for e in open_store(URL).list()}
    again = {verb: report(cluster.submit(verb, *arguments, "--json")) for verb, *arguments in CHAIN}
    assert {e.path: e.etag for e in open_store(URL).list()} == before
    assert again["pack"]["shards_written"] == 0
    assert again["train"]["resumed_at_epoch"] == 2
    assert again["label"]["units_written"] == 0
    assert again["evaluate"]["confusion"] == first["evaluate"]["confusion"]


def test_a_job_of_a_user_who_mistyped_fails_with_the_line_that_says_so(cluster: Cluster):
    done = cluster.submit("pack", f"{URL}/nothing", f"{URL}/x")
    assert done.returncode == 1
    assert "no images there; check the path" in done.stdout
    assert "Traceback" not in done.stdout
    assert "exit code 3" in done.stdout + done.stderr


def test_serve_run_answers_as_the_labels_say(cluster: Cluster, first: dict[str, dict[str, Any]], raw: dict[str, bytes]):
    (port,) = free_ports(1)
    config = Path(tempfile.mkdtemp()) / "serve.yaml"
    application = {
        "name": "raycnn",
        "route_prefix": "/",
        "import_path": "raycnn.serving:app",
        "args": {"bundle": f"{URL}/run/bundle"},
    }
    config.write_text(json.dumps({"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}))
    process = subprocess.Popen(
        [BIN / "serve", "run", str(config)], env=cluster.environment, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            wait_until_ready(client, process)
            rows = label_rows()
            for key in ("left/001.png", "right/000.png"):
                reply = client.post("/v1/classify", content=raw[key]).json()
                assert reply["class_name"] == rows[key]["class_name"]
                assert reply["probability"] == pytest.approx(rows[key]["probability"], abs=1e-5)
            assert client.post("/v1/classify", content=b"nonsense").status_code == 422
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
        shutil.rmtree(config.parent)


def wait_until_ready(client: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    while True:
        assert process.poll() is None
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)


def label_rows() -> dict[str, dict[str, Any]]:
    store = open_store(f"{URL}/labels")
    parts = [e.path for e in store.list("labels/")]
    return {row["key"]: row for path in parts for row in pq.read_table(io.BytesIO(store.get(path))).to_pylist()}
