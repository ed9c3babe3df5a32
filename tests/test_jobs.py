"""The verbs as jobs on a cluster that `ray start --head` made, typed beside it, and the endpoint on that cluster."""

import io
import json
import os
import re
import shlex
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
from conftest import LEAN_RAY, free_ports, kill_tree
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
LABEL = ("label", f"{URL}/photos", f"{URL}/labels", "--bundle", BUNDLE, "--json")
MISTYPED = ("pack", f"{URL}/rwa", f"{URL}/packed2", "--json")
ROWS = 6 * 2048

Program = subprocess.Popen[str]


class Cluster(NamedTuple):
    """A running head; `environment` is that of the shell that started it, `beside` that of another one."""

    gcs: int
    api: str
    environment: dict[str, str]
    beside: dict[str, str]

    def submit(self, verb: str, *arguments: str) -> Program:
        """`ray job submit -- python VERB.py ARGUMENTS`, as the README gives it."""
        work = ("--working-dir", "jobs", "--", "python", f"{verb}.py", *arguments)
        return start("ray", "job", "submit", *work, environment=self.environment)

    def post(self, verb: str, *arguments: str) -> str:
        """What that command sends, without the seconds that it takes to start; returns the job's id."""
        (uploaded, *_) = {job["runtime_env"]["working_dir"] for job in self.ask("/api/jobs/") if job["runtime_env"]}
        entrypoint = shlex.join(["python", f"{verb}.py", *arguments])
        job = {"entrypoint": entrypoint, "runtime_env": {"working_dir": uploaded}}
        return self.ask("/api/jobs/", job)["submission_id"]

    def wait(self, job: str, status: str) -> list[str]:
        """The lines that a job had printed when it came to its end."""
        while (now := self.ask(f"/api/jobs/{job}")["status"]) in ("PENDING", "RUNNING"):
            time.sleep(0.1)
        lines = self.ask(f"/api/jobs/{job}/logs")["logs"].splitlines()
        assert now == status, lines
        return lines

    def ask(self, path: str, content: dict[str, Any] | None = None, method: str | None = None) -> Any:
        """What the dashboard answers to a GET, or to a POST where there is content."""
        body = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self.api + path, body, method=method)
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.loads(reply.read() or "null")


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
    environment |= LEAN_RAY | {"HOME": str(home), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
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


class Chain(NamedTuple):
    """What became of the jobs, each submitted when the one before it had ended."""

    reports: dict[str, dict[str, Any]]
    mistyped: str
    stopped: list[str]
    committed: dict[str, str]


@pytest.fixture(scope="module")
def images(s3: S3Server) -> np.ndarray:
    """Images that are lit on their right half or, the odd ones, on their left; 160 in class folders, all in one IDX."""
    pixels = np.random.default_rng(0).integers(0, 60, (ROWS, 8, 8), np.uint8)
    pixels[0::2, :, 4:] += 150
    pixels[1::2, :, :4] += 150
    store = open_store(URL)
    for i in range(160):
        store.put(f"raw/{'left' if i % 2 else 'right'}/{i:03d}.png", png(pixels[i]))
    store.put("photos/t10k-images-idx3-ubyte", np.array([0x803, ROWS, 8, 8], ">u4").tobytes() + pixels.tobytes())
    return pixels


def png(pixels: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


@pytest.fixture(scope="module")
def chain(cluster: Cluster, images: np.ndarray) -> Chain:
    """pack, train, evaluate, label; the first label job is stopped when it has committed a part."""
    reports = {"pack": report(cluster.submit(*PACK))}
    mistyped = cluster.post(*MISTYPED)
    reports["train"] = report(cluster.submit(*TRAIN))
    evaluate, label = cluster.submit(*EVALUATE), cluster.post(*LABEL)
    while not any(path.startswith("labels/") for path in etags(f"{URL}/labels")):
        assert cluster.ask(f"/api/jobs/{label}")["status"] in ("PENDING", "RUNNING")
        time.sleep(0.05)
    cluster.ask(f"/api/jobs/{label}/stop", {})
    stopped, committed = cluster.wait(label, "STOPPED"), etags(f"{URL}/labels")
    reports |= {"evaluate": report(evaluate), "label": report(cluster.submit(*LABEL))}
    return Chain(reports, mistyped, stopped, committed)


def test_the_chain_runs_as_jobs(chain: Chain):
    pack, train, evaluate, label = (chain.reports[verb] for verb in ("pack", "train", "evaluate", "label"))
    assert pack["status"] == {"ok": 160}
    assert train["epochs"] == 2
    assert evaluate["rows"] == pack["splits"]["test"]
    assert label["status"] == {"ok": ROWS}


def test_a_job_of_a_user_who_mistyped_fails_with_the_line_that_says_so(cluster: Cluster, chain: Chain):
    lines = cluster.wait(chain.mistyped, "FAILED")
    assert lines[-1].startswith(f"raycnn: {MISTYPED[1]}: no images there; check the path")
    assert not any("Traceback" in line for line in lines)
    assert cluster.ask(f"/api/jobs/{chain.mistyped}")["driver_exit_code"] == 3
    assert not etags(MISTYPED[2])


def test_a_job_that_was_stopped_is_finished_by_the_same_command(chain: Chain):
    assert chain.stopped[-1] == "raycnn: interrupted; the same command again resumes"
    assert not any("Traceback" in line for line in chain.stopped)
    label, parts = chain.reports["label"], sum(path.startswith("labels/") for path in chain.committed)
    assert 1 <= parts < label["units"]
    assert 1 <= label["units_written"] <= label["units"] - parts
    assert chain.committed.items() <= etags(f"{URL}/labels").items()
    proof = raycnn.verify(f"{URL}/labels")
    assert (proof.error, proof.present) == (None, ROWS)


def test_the_same_jobs_again_find_nothing_to_do(cluster: Cluster, chain: Chain):
    before = etags(URL)
    jobs = [cluster.post(*arguments) for arguments in (PACK, TRAIN, LABEL)]
    pack, train, label = (json.loads(cluster.wait(job, "SUCCEEDED")[-1]) for job in jobs)
    assert etags(URL) == before
    assert pack["shards_written"] == 0
    assert train["resumed_at_epoch"] == 2
    assert label["units_written"] == 0


def test_a_verb_typed_beside_the_cluster_works_on_it_and_says_so(cluster: Cluster, chain: Chain):
    evaluate = start("raycnn", *EVALUATE, environment=cluster.beside)
    out, err = evaluate.communicate(timeout=120)
    assert evaluate.returncode == 0, err
    assert re.search(rf"^connecting to Ray at \S+:{cluster.gcs}$", err, re.MULTILINE)
    assert json.loads(out)["confusion"] == chain.reports["evaluate"]["confusion"]


def test_serve_run_answers_as_the_labels_say(cluster: Cluster, chain: Chain, images: np.ndarray):
    (port,) = free_ports(1)  # `serve run` has no option for it; Serve that runs already keeps its own
    nothing = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": []}
    cluster.ask("/api/serve/applications/", nothing, "PUT")
    store = open_store(f"{URL}/labels")
    part = pq.read_table(io.BytesIO(store.get(min(e.path for e in store.list("labels/"))))).to_pylist()
    command = ("serve", "run", "raycnn.serving:app", f"bundle={BUNDLE}")
    with running("is ready at", *command, environment=cluster.environment) as endpoint:
        for row in part[:2]:
            image = png(images[int(row["key"].rpartition("#")[2])])
            reply = httpx.post(f"http://127.0.0.1:{port}/v1/classify", content=image, timeout=30).json()
            assert reply["class_name"] == row["class_name"]
            assert reply["probability"] == pytest.approx(row["probability"], abs=1e-5)
        endpoint.send_signal(signal.SIGINT)
        endpoint.communicate(timeout=60)


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
