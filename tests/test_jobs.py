"""The verbs as jobs on a cluster that `ray start --head` made, typed beside it, and the endpoint on that cluster."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import free_ports, kill_tree
from PIL import Image

import raycnn
from raycnn.s3local import S3Server
from raycnn.storage import open_store

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.timeout(240)]

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
URL = "s3://raycnn/jobs"
BUNDLE = f"{URL}/run/bundle"
PACK = ("pack", f"{URL}/raw", f"{URL}/packed", "--json")
TRAIN = ("train", f"{URL}/packed", f"{URL}/run", "--epochs", "2", "--json")
EVALUATE = ("evaluate", BUNDLE, f"{URL}/packed", "--json")
LABEL = ("label", f"{URL}/raw", f"{URL}/labels", "--bundle", BUNDLE, "--json")
MANY = ("label", "s3://raycnn/many/raw", "s3://raycnn/many/labels", "--bundle", BUNDLE, "--json")

Program = subprocess.Popen[str]


class Cluster(NamedTuple):
    """A running head; `environment` is that of the shell that started it, `beside` that of another one."""

    gcs: int
    api: str
    environment: dict[str, str]
    beside: dict[str, str]

    def submit(self, verb: str, *arguments: str, options: tuple[str, ...] = ()) -> Program:
        """`ray job submit -- python VERB.py ARGUMENTS`, as the README gives it."""
        work = ("--working-dir", "jobs", "--", "python", f"{verb}.py", *arguments)
        return start("ray", "job", "submit", *options, *work, environment=self.environment)

    def ask(self, path: str, method: str = "GET") -> dict[str, Any]:
        """What the job server answers."""
        with urllib.request.urlopen(urllib.request.Request(self.api + path, method=method), timeout=30) as reply:
            return json.load(reply)


@pytest.fixture(scope="module")
def cluster(s3: S3Server) -> Iterator[Cluster]:
    """`ray start --head` with 2 CPUs in an environment that knows the S3 server; its home holds no token.

    The home of the other shell holds the token that a Ray started there before has left.
    """
    home = Path(tempfile.mkdtemp(prefix="rj", dir="/tmp"))  # short: the paths of sockets have to be
    (home / "beside" / ".ray").mkdir(parents=True)
    (home / "beside" / ".ray" / "auth_token").write_text("0" * 64)
    gcs, dashboard, client, agent = free_ports(4)
    api = f"http://127.0.0.1:{dashboard}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(home), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"RAY_TMPDIR": str(home), "RAY_USAGE_STATS_ENABLED": "0", "RAY_API_SERVER_ADDRESS": api}
    environment |= {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}  # a busy machine does not import in the usual 5 s
    command = [BIN / "ray", "start", "--head", "--block", "--num-cpus=2", "--min-worker-port=0", "--max-worker-port=0"]
    command += [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    command += [f"--dashboard-agent-listen-port={agent}"]
    with (home / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        while "Ray runtime started" not in (home / "log").read_text():
            assert process.poll() is None, (home / "log").read_text()
            time.sleep(0.1)
        yield Cluster(gcs, api, environment, environment | {"HOME": str(home / "beside")})
    finally:
        kill_tree(process)
        shutil.rmtree(home, ignore_errors=True)


def start(*command: str, environment: dict[str, str]) -> Program:
    return subprocess.Popen(
        [BIN / command[0], *command[1:]],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def report(job: Program) -> dict[str, Any]:
    """The JSON object that a job printed last, before what `ray job submit` adds."""
    out, err = job.communicate(timeout=120)
    assert job.returncode == 0, out + err
    assert "Traceback" not in out
    told = [line for line in out.splitlines() if " -- " not in line]  # the others are Ray's
    return json.loads(told[-1])


def etags(url: str) -> dict[str, str]:
    return {e.path: e.etag for e in open_store(url).list()}


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


@pytest.fixture(scope="module")
def first(cluster: Cluster, raw: dict[str, bytes]) -> dict[str, dict[str, Any]]:
    """What each verb of the chain reported."""
    found = {"pack": report(cluster.submit(*PACK)), "train": report(cluster.submit(*TRAIN))}
    together = {"evaluate": cluster.submit(*EVALUATE), "label": cluster.submit(*LABEL)}
    return found | {verb: report(job) for verb, job in together.items()}


def test_the_chain_runs_as_jobs(first: dict[str, dict[str, Any]], raw: dict[str, bytes]):
    assert first["pack"]["rows"] == len(raw)
    assert first["train"]["epochs"] == 2
    assert first["evaluate"]["rows"] == first["pack"]["splits"]["test"]
    assert (first["label"]["rows"], first["label"]["status"]) == (len(raw), {"ok": len(raw)})


def test_the_same_jobs_again_find_nothing_to_do(cluster: Cluster, first: dict[str, dict[str, Any]]):
    before = etags(URL)
    jobs = [cluster.submit(*arguments) for arguments in (PACK, TRAIN, EVALUATE, LABEL)]
    pack, train, evaluate, label = map(report, jobs)
    assert etags(URL) == before
    assert pack["shards_written"] == 0
    assert train["resumed_at_epoch"] == 2
    assert label["units_written"] == 0
    assert evaluate["confusion"] == first["evaluate"]["confusion"]


def test_a_job_of_a_user_who_mistyped_fails_with_the_line_that_says_so(cluster: Cluster):
    job = cluster.submit("pack", f"{URL}/nothing", f"{URL}/x", options=("--submission-id", "mistyped"))
    out, err = job.communicate(timeout=120)
    assert job.returncode == 1
    assert f"\nraycnn: {URL}/nothing: no images there; check the path" in out
    assert "Traceback" not in out + err
    assert cluster.ask("/api/jobs/mistyped")["driver_exit_code"] == 3
    assert not etags(f"{URL}/x")


def test_a_job_that_was_stopped_is_finished_by_the_same_command_in_another_shell(
    cluster: Cluster, first: dict[str, dict[str, Any]]
):
    rows, store = 12 * 2048, open_store("s3://raycnn/many")
    header = np.array([0x803, rows, 8, 8], ">u4").tobytes()
    store.put("raw/t10k-images-idx3-ubyte", header + np.random.default_rng(0).bytes(rows * 64))
    cluster.submit(*MANY, options=("--submission-id", "many", "--no-wait")).communicate(timeout=60)
    while not any(True for _ in store.list("labels/labels/")):
        assert cluster.ask("/api/jobs/many")["status"] in ("PENDING", "RUNNING")
        time.sleep(0.05)
    cluster.ask("/api/jobs/many/stop", "POST")
    while (status := cluster.ask("/api/jobs/many")["status"]) == "RUNNING":
        time.sleep(0.05)
    assert status == "STOPPED"
    log = cluster.ask("/api/jobs/many/logs")["logs"]
    assert log.splitlines()[-1] == "raycnn: interrupted; the same command again resumes"
    assert "Traceback" not in log
    committed = etags("s3://raycnn/many/labels")
    parts = sum(path.startswith("labels/") for path in committed)

    beside = start("raycnn", *MANY, environment=cluster.beside)
    out, err = beside.communicate(timeout=120)
    assert beside.returncode == 0, err
    assert re.search(rf"^connecting to Ray at \S+:{cluster.gcs}$", err, re.MULTILINE)
    resumed = json.loads(out)
    assert resumed["rows"] == rows
    assert 1 <= parts < resumed["units"]
    assert 1 <= resumed["units_written"] <= resumed["units"] - parts
    assert committed.items() <= etags("s3://raycnn/many/labels").items()
    proof = raycnn.verify("s3://raycnn/many/labels")
    assert (proof.error, proof.present) == (None, rows)


@contextmanager
def running(ready: str, *command: str, environment: dict[str, str]) -> Iterator[Program]:
    """A program that has said on standard error that it is ready; it must end by itself when it is told to."""
    program = start(*command, environment=environment)
    assert program.stderr is not None
    said = []
    try:
        for line in program.stderr:
            said.append(line)
            if ready in line:
                break
        else:
            pytest.fail("".join(said))
        yield program
    finally:
        if program.poll() is None:
            os.killpg(program.pid, signal.SIGKILL)


def test_serve_run_answers_as_the_labels_say(cluster: Cluster, first: dict[str, dict[str, Any]], raw: dict[str, bytes]):
    (port,) = free_ports(1)
    listening = start("serve", "start", "--http-port", str(port), environment=cluster.environment)
    assert listening.wait(60) == 0
    command = ("serve", "run", "raycnn.serving:app", f"bundle={BUNDLE}")
    with running("is ready at", *command, environment=cluster.environment) as endpoint:
        store = open_store(f"{URL}/labels")
        parts = [io.BytesIO(store.get(e.path)) for e in store.list("labels/")]
        rows = {row["key"]: row for part in parts for row in pq.read_table(part).to_pylist()}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            for key in ("left/001.png", "right/000.png"):
                reply = client.post("/v1/classify", content=raw[key]).json()
                assert reply["class_name"] == rows[key]["class_name"]
                assert reply["probability"] == pytest.approx(rows[key]["probability"], abs=1e-5)
        other = start("raycnn", "serve", "--bundle", BUNDLE, environment=cluster.beside)
        assert "this cluster runs Ray Serve already, with default: " in other.communicate(timeout=60)[1]
        assert other.returncode == 2
        endpoint.send_signal(signal.SIGINT)
        endpoint.communicate(timeout=60)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_raycnn_serve_answers_until_it_is_told_to_end(
    number: signal.Signals, cluster: Cluster, first: dict[str, dict[str, Any]], raw: dict[str, bytes]
):
    (port,) = free_ports(1)
    command = ("raycnn", "serve", "--bundle", f"photos={BUNDLE}", "--port", str(port), "--json")
    url = f"http://127.0.0.1:{port}"
    with running(f"ready {url}/v1/classify photos\n", *command, environment=cluster.beside) as endpoint:
        assert httpx.post(f"{url}/v1/classify", content=raw["left/001.png"]).json()["class_name"] == "left"
        assert httpx.post(f"{url}/v1/classify", content=b"nonsense").status_code == 422
        endpoint.send_signal(number)
        out, err = endpoint.communicate(timeout=60)
    assert (endpoint.returncode, err) == (0, "")
    assert json.loads(out) == {"address": url, "models": {"photos": BUNDLE}}
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/livez")
