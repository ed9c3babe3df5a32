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
import psutil
import pyarrow.parquet as pq
import pytest
from conftest import LEAN_RAY, free_ports, kill_tree
from PIL import Image

import raycnn
from raycnn import bundle as bundles
from raycnn.s3local import S3Server
from raycnn.shards.order import steps_per_epoch
from raycnn.storage import open_store
from raycnn.training import Checkpoints
from raycnn.training.folder import resume_at

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.timeout(600)]

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
URL = "s3://raycnn/jobs"
BUNDLE = f"{URL}/run/bundle"
PACK = ("pack", f"{URL}/raw", f"{URL}/packed", "--json")
TRAIN = ("train", f"{URL}/packed", f"{URL}/run", "--batch-size", "16", "--json")
FOR_EVER = (*TRAIN, "--epochs", "100000")
EVALUATE = ("evaluate", BUNDLE, f"{URL}/packed", "--json")
LABEL = ("label", f"{URL}/photos", f"{URL}/labels", "--bundle", BUNDLE, "--json")
MISTYPED = ("pack", f"{URL}/rwa", f"{URL}/packed2", "--json")
ROWS = 6 * 2048

Program = subprocess.Popen[str]


class Cluster(NamedTuple):
    """A running head; `environment` is that of the shell that started it, `beside` that of another one."""

    processes: list[subprocess.Popen[bytes]]
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

    def kill(self, command: str) -> None:
        """Kill one of the cluster's processes, whose command line begins so."""
        family = [p for root in self.processes for p in psutil.Process(root.pid).children(recursive=True)]
        next(p for p in family if command_line(p).startswith(command)).kill()

    def ask(self, path: str, content: dict[str, Any] | None = None, method: str | None = None) -> Any:
        """What the dashboard answers to a GET, or to a POST where there is content."""
        body = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self.api + path, body, method=method)
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.loads(reply.read() or "null")


def command_line(process: psutil.Process) -> str:
    """Nothing where the process has ended meanwhile."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


@pytest.fixture(scope="module")
def cluster(s3: S3Server) -> Iterator[Cluster]:
    """A head without CPUs and a node with one, in an environment that knows the S3 server; its home holds no token.

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
    common = ["--block", "--min-worker-port=0", "--max-worker-port=0", "--include-log-monitor=False"]
    head = ["--head", "--num-cpus=0", f"--port={gcs}", f"--dashboard-port={dashboard}", *common]
    head += [f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"]
    node = [f"--address=127.0.0.1:{gcs}", "--num-cpus=1", *common]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for name, options in (("head", head), ("node", node)):
            with (home / name).open("w") as log:
                command = [BIN / "ray", "start", *options]
                processes.append(
                    subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
                )
            while "Ray runtime started" not in (home / name).read_text():
                assert processes[-1].poll() is None, (home / name).read_text()
                time.sleep(0.1)
        yield Cluster(processes, gcs, api, environment, environment | {"HOME": str(home / "beside")})
    finally:
        for process in processes:
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
    epochs: list[list[int]]
    """Those with a checkpoint when a worker was killed, when the driver was, and all in the end."""
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
    """pack, train, evaluate, label. A worker of the training is killed, and then its driver.

    The first label job is stopped when it has committed a part.
    """
    reports = {"pack": report(cluster.submit(*PACK))}
    mistyped, train = cluster.post(*MISTYPED), cluster.post(*FOR_EVER)
    epochs = [until_epoch(0)]
    cluster.kill("ray::RayTrainWorker")
    epochs.append(until_epoch(epochs[0][-1] + 3))
    cluster.kill("python train.py")
    cluster.wait(train, "FAILED")
    tear_the_last_epoch()
    to_the_end = (*TRAIN, "--epochs", str(done_epochs()[-1] + 3), "--num-workers", "2")
    reports["train"] = report(cluster.submit(*to_the_end))
    epochs.append(done_epochs())
    evaluate, label = cluster.submit(*EVALUATE), cluster.post(*LABEL)
    while not any(path.startswith("labels/") for path in etags(f"{URL}/labels")):
        assert cluster.ask(f"/api/jobs/{label}")["status"] in ("PENDING", "RUNNING")
        time.sleep(0.05)
    cluster.ask(f"/api/jobs/{label}/stop", {})
    stopped, committed = cluster.wait(label, "STOPPED"), etags(f"{URL}/labels")
    reports |= {"evaluate": report(evaluate), "label": report(cluster.submit(*LABEL))}
    return Chain(reports, epochs, mistyped, stopped, committed)


def done_epochs() -> list[int]:
    """The epochs in metrics.jsonl."""
    store = open_store(f"{URL}/run")
    text = store.get("metrics.jsonl").decode() if store.head("metrics.jsonl") else ""
    return [json.loads(line)["epoch"] for line in text.splitlines()]


def until_epoch(epoch: int) -> list[int]:
    """The epochs that a run goes on behind, once that one is among them."""
    checkpoints = Checkpoints(open_store(f"{URL}/run"))
    while (first := resume_at(checkpoints.last())) <= (epoch, 0):
        time.sleep(0.1)
    return done_epochs()[: first.epoch]


def tear_the_last_epoch() -> None:
    """A driver could die anywhere: between metrics and checkpoint, tensors and marker, config.json and weights."""
    store = open_store(f"{URL}/run")
    checkpoints = Checkpoints(store)
    last, best = checkpoints.last(), checkpoints.best()
    assert last is not None
    assert best is not None
    lines = store.get("metrics.jsonl").decode().splitlines()[: last["epoch"] + 1]
    lines.append(json.dumps(json.loads(lines[-1]) | {"epoch": last["epoch"] + 1, "train/loss": 99.0}))
    store.put("metrics.jsonl", "".join(line + "\n" for line in lines).encode())
    free = ({0, 1, 2} - {last["slot"], best["slot"]}).pop()
    store.put(f"checkpoints/slot-{free}.safetensors", b"half")
    store.put("bundle/config.json", b'{"incomplete": true, "metrics": {}}')


def test_the_chain_runs_as_jobs(chain: Chain):
    pack, train, evaluate, label = (chain.reports[verb] for verb in ("pack", "train", "evaluate", "label"))
    assert pack["status"] == {"ok": 160}
    assert train["epochs"] == len(chain.epochs[-1])
    assert evaluate["rows"] == pack["splits"]["test"]
    assert label["status"] == {"ok": ROWS}


def test_training_survives_the_death_of_a_worker_and_goes_on_after_that_of_its_driver(chain: Chain):
    _, by_driver, end = chain.epochs
    assert by_driver == list(range(len(by_driver)))
    assert end == list(range(len(end)))
    train = chain.reports["train"]
    assert len(by_driver) <= train["resumed_at_epoch"] < len(end)
    assert bundles.load(BUNDLE).config["metrics"]["epochs"] == len(end)
    lines = [json.loads(line) for line in open_store(f"{URL}/run").get("metrics.jsonl").decode().splitlines()]
    steps = steps_per_epoch(chain.reports["pack"]["splits"]["train"], 16)
    assert [line["step"] for line in lines] == [steps * (e + 1) for e in end]
    assert all(line["train/loss"] < 99 for line in lines)


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
    train = (*TRAIN, "--epochs", str(chain.reports["train"]["epochs"]), "--num-workers", "2")
    jobs = [cluster.post(*arguments) for arguments in (PACK, train, LABEL)]
    pack, trained, label = (json.loads(cluster.wait(job, "SUCCEEDED")[-1]) for job in jobs)
    assert etags(URL) == before
    assert pack["shards_written"] == 0
    assert trained["resumed_at_epoch"] == trained["epochs"]
    assert label["units_written"] == 0


def test_a_verb_typed_beside_the_cluster_works_on_it_and_says_so(cluster: Cluster, chain: Chain):
    pack = start("raycnn", "pack", f"{URL}/raw", f"{URL}/beside", "--json", environment=cluster.beside)
    out, err = pack.communicate(timeout=120)
    assert pack.returncode == 0, err
    assert re.search(rf"^connecting to Ray at \S+:{cluster.gcs}$", err, re.MULTILINE)
    found = {name: json.loads(out)[name] for name in ("rows", "splits", "status")}
    assert found.items() <= chain.reports["pack"].items()


def test_serve_run_answers_as_the_labels_say(cluster: Cluster, chain: Chain, images: np.ndarray):
    (port,) = free_ports(1)  # `serve run` has no option for it; Serve that runs already keeps its own
    http = {"host": "127.0.0.1", "port": port}
    nothing = {"http_options": http, "proxy_location": "HeadOnly", "applications": []}
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
