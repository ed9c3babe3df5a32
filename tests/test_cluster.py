"""cluster.yaml: what it promises, and its start commands on this machine with the AWS parts taken out."""

import json
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from conftest import free_ports, kill_tree

pytestmark = [pytest.mark.ray, pytest.mark.timeout(60)]

ROOT = Path(__file__).parent.parent
FILE: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
TYPES: dict[str, Any] = FILE["available_node_types"]
HEAD = FILE["head_node_type"]
WORKERS = {name: node for name, node in TYPES.items() if name != HEAD}
TOKEN = "~/.ray/auth_token"


def test_rays_schema_accepts_the_file():
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(FILE))


@pytest.mark.parametrize("name", TYPES)
def test_ec2_knows_every_key_of_every_node_type(name: str):
    import botocore.session
    from botocore.validate import ParamValidator

    ec2 = botocore.session.get_session().get_service_model("ec2")
    request = TYPES[name]["node_config"] | {"MinCount": 1, "MaxCount": 1}
    report = ParamValidator().validate(request, ec2.operation_model("RunInstances").input_shape)
    assert not report.has_errors(), report.generate_report()


def test_the_head_offers_no_gpu_and_no_cpu_to_tasks_and_is_not_spot():
    assert TYPES[HEAD]["resources"] == {"CPU": 0, "GPU": 0}
    assert "--num-cpus=0" in shlex.split(start_command("head"))
    assert "InstanceMarketOptions" not in TYPES[HEAD]["node_config"]


def test_workers_of_both_kinds_come_when_needed_and_go_when_idle():
    assert any(node["resources"].get("GPU") for node in WORKERS.values())
    assert any("GPU" not in node["resources"] for node in WORKERS.values())
    assert all(node["min_workers"] == 0 < node["max_workers"] for node in WORKERS.values())
    assert 0 < FILE["idle_timeout_minutes"] <= 15
    assert FILE["provider"]["cache_stopped_nodes"] is False


def test_every_spot_type_has_a_twin_on_demand():
    spot = {name for name, node in WORKERS.items() if "InstanceMarketOptions" in node["node_config"]}
    assert {name.removesuffix("-spot") for name in spot} == {"cpu", "gpu"}
    for name in spot:
        twin = WORKERS[name.removesuffix("-spot") + "-on-demand"]
        market = {"InstanceMarketOptions": {"MarketType": "spot"}}
        assert WORKERS[name] == twin | {"node_config": twin["node_config"] | market}
    assert len(WORKERS) == 2 * len(spot)


@pytest.mark.parametrize(("demand", "kind"), [({"CPU": 1}, "cpu"), ({"CPU": 1, "GPU": 1}, "gpu")])
def test_an_on_demand_node_is_started_while_aws_has_no_spot_capacity(
    demand: dict[str, float], kind: str, monkeypatch: pytest.MonkeyPatch
):
    from ray.autoscaler._private.node_provider_availability_tracker import NodeProviderAvailabilityTracker
    from ray.autoscaler.node_launch_exception import NodeLaunchException

    for word in shlex.split(start_command("head")):
        if word.startswith("RAY_AUTOSCALER_"):
            monkeypatch.setenv(*word.rstrip(";").split("="))
    minutes = 0
    tracker = NodeProviderAvailabilityTracker(timer=lambda: 60 * minutes)
    refusal = NodeLaunchException("InsufficientInstanceCapacity", "no spot capacity", None)

    assert next_node(demand, tracker) == f"{kind}-spot"
    tracker.update_node_availability(f"{kind}-spot", 0, refusal)
    assert next_node(demand, tracker) == f"{kind}-on-demand"
    minutes = 31
    assert next_node(demand, tracker) == f"{kind}-spot"


def next_node(demand: dict[str, float], tracker: Any) -> str:
    """The node type that Ray's autoscaler, configured as on the head, starts for one task."""
    from ray.autoscaler._private.resource_demand_scheduler import ResourceDemandScheduler
    from ray.autoscaler._private.util import prepare_config

    config = prepare_config(FILE)
    scheduler = ResourceDemandScheduler(
        provider=None,
        node_types=config["available_node_types"],
        max_workers=config["max_workers"],
        head_node_type=HEAD,
        upscaling_speed=config["upscaling_speed"],
    )
    no_nodes: dict[str, Any] = {
        "nodes": [],
        "launching_nodes": {HEAD: 1},
        "unused_resources_by_ip": {},
        "pending_placement_groups": [],
        "max_resources_by_ip": {},
        "ensure_min_cluster_size": [],
    }
    launch, _ = scheduler.get_nodes_to_launch(
        resource_demands=[demand], node_availability_summary=tracker.summary(), **no_nodes
    )
    (name,) = launch
    return name


def test_machines_have_an_instance_profile_and_no_keys():
    profiles = {name: node["node_config"]["IamInstanceProfile"]["Name"] for name, node in TYPES.items()}
    assert profiles.pop(HEAD) not in profiles.values()
    text = json.dumps(FILE).lower()
    assert not any(word in text for word in ("aws_credentials", "access_key", "secret", "akia"))


def test_ssh_is_open_to_nobody():
    # Where a type names no group, Ray makes one with port 22 open to 0.0.0.0/0.
    assert all(node["node_config"]["SecurityGroupIds"] for node in TYPES.values())
    assert "security_group" not in FILE["provider"]
    assert FILE["auth"]["ssh_proxy_use_node_id"] is True
    proxy = shlex.split(FILE["auth"]["ssh_proxy_command"])
    assert proxy[:3] == ["aws", "ssm", "start-session"]
    assert proxy[proxy.index("--region") + 1] == FILE["provider"]["region"]


def test_only_imdsv2_answers_and_only_on_the_machine_itself():
    for node in TYPES.values():
        options = node["node_config"]["MetadataOptions"]
        assert (options["HttpTokens"], options["HttpPutResponseHopLimit"]) == ("required", 1)


def test_every_node_gets_the_token_and_keeps_it_to_itself():
    assert FILE["file_mounts"][TOKEN] == TOKEN
    assert f"chmod 600 {TOKEN}" in FILE["setup_commands"][0]
    for node in ("head", "worker"):
        before, _, _ = start_command(node).partition("ray start")
        assert "RAY_AUTH_MODE=token" in before


def test_what_is_sent_to_the_nodes_is_what_an_installation_needs():
    sent = {Path(local) for remote, local in FILE["file_mounts"].items() if remote != TOKEN}
    assert all((ROOT / path).exists() for path in sent)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {Path("pyproject.toml"), Path("raycnn"), Path(project["readme"])} <= sent
    assert {Path(name) for name in project["license-files"]} <= sent


def test_a_node_that_comes_later_gets_the_same_ray_and_the_same_decoder():
    (remote,) = (there for there, here in FILE["file_mounts"].items() if here == ".ci/constraints.txt")
    commands = [c for key in FILE if key.endswith("setup_commands") for c in FILE[key] if "pip install" in c]
    assert len(commands) == 3
    assert all(f"pip install -q -c {remote} " in command for command in commands)
    pinned = [line.split("==")[0] for line in (ROOT / ".ci/constraints.txt").read_text().splitlines() if "==" in line]
    assert {"ray", "torch", "torchvision", "numpy", "simplejpeg", "pillow", "pyarrow", "obstore"} <= set(pinned)


def start_command(node: str) -> str:
    """The command that starts Ray on the head or a worker. Before it comes `ray stop`, which stops every Ray
    on the machine: right on a machine of its own, out of the question in a test.
    """
    stop, start = FILE[f"{node}_start_ray_commands"]
    assert stop == "ray stop"
    return start


class Cluster(NamedTuple):
    """A running head, started by the file's command."""

    home: Path
    gcs: int
    dashboard: int

    def environment(self, **changes: str) -> dict[str, str]:
        """What a shell has whose user holds the token."""
        return clean_environment(self.home, RAY_API_SERVER_ADDRESS=f"http://127.0.0.1:{self.dashboard}", **changes)

    def submit(self, *command: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """`ray job submit -- command`."""
        return subprocess.run(
            ["ray", "job", "submit", "--", *command],
            env=self.environment(**changes),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=50,
            check=False,
        )


def clean_environment(home: Path, **changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return kept | {"HOME": str(home), "PATH": path, "RAY_USAGE_STATS_ENABLED": "0"} | changes


def start(command: str, home: Path, log: Path, **changes: str) -> subprocess.Popen[bytes]:
    """Run a start command in a process group of its own, in the foreground."""
    own_session = f" --block --object-manager-port=0 --min-worker-port=0 --max-worker-port=0 --temp-dir={home}/r"
    with log.open("wb") as out:
        return subprocess.Popen(
            ["bash", "-c", command + own_session],
            env=clean_environment(home, **changes),
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_for(text: str, log: Path, process: subprocess.Popen[bytes]) -> None:
    """Return when the process has logged the text; it has 40 s."""
    deadline = time.monotonic() + 40
    while text not in log.read_text(errors="replace"):
        assert process.poll() is None, log.read_text(errors="replace")
        assert time.monotonic() < deadline, log.read_text(errors="replace")
        time.sleep(0.1)


def without_aws(gcs: int) -> dict[str, Any]:
    """What the launcher would put on the head as ~/ray_bootstrap_config.yaml, with Ray's pretended cloud."""
    from ray.autoscaler._private.util import prepare_config

    config = prepare_config(FILE)
    types = {name: node | {"node_config": {}} for name, node in config["available_node_types"].items()}
    types["ray.head.default"] = types.pop(HEAD)  # Ray's pretended cloud gives the head this name.
    cloud = {
        "type": "fake_multinode",
        "gcs_address": f"127.0.0.1:{gcs}",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    }
    changed = {"provider": cloud, "available_node_types": types, "head_node_type": "ray.head.default"}
    return config | changed | {"file_mounts": {}}


@pytest.fixture(scope="module")
def empty_home() -> Iterator[Path]:
    """A home folder without a token; its path is short, because the paths of sockets have to be."""
    home = Path(tempfile.mkdtemp(prefix="rc", dir="/tmp"))
    yield home
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """The head and, perhaps still on its way, one worker, started as `ray up` and the autoscaler do it."""
    home = Path(tempfile.mkdtemp(prefix="rc", dir="/tmp"))
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text(secrets.token_hex(32))
    gcs, dashboard, client, agent = free_ports(4)
    (home / "ray_bootstrap_config.yaml").write_text(json.dumps(without_aws(gcs)))
    command = (
        "export RAY_enable_autoscaler_v2=1; "  # as the launcher does
        + start_command("head")
        + f" --port={gcs} --dashboard-port={dashboard} --ray-client-server-port={client}"
        + f" --dashboard-agent-listen-port={agent}"
    )
    log = home / "head.log"
    process = start(
        command,
        home,
        log,
        RAY_FAKE_CLUSTER="1",
        RAY_OVERRIDE_NODE_ID_FOR_TESTING="f" * 51 + "00000",
        AUTOSCALER_UPDATE_INTERVAL_S="1",
    )
    started = [process]
    try:
        wait_for("Ray runtime started", log, process)
        joining = f" --address=127.0.0.1:{gcs} --num-cpus=0 --resources='{{\"joined\": 1}}'"
        started.append(start(start_command("worker") + joining, home, home / "worker.log"))
        yield Cluster(home, gcs, dashboard)
    finally:
        for process in started:
            kill_tree(process)
        shutil.rmtree(home, ignore_errors=True)


def test_a_job_without_the_token_is_refused(cluster: Cluster, empty_home: Path):
    job = cluster.submit("touch", f"{cluster.home}/ran", HOME=str(empty_home), RAY_AUTH_MODE="disabled")
    assert job.returncode == 1
    assert "token" in job.stdout
    assert not (cluster.home / "ran").exists()


@pytest.mark.parametrize(("headers", "status"), [({}, 401), ({"Authorization": "Bearer " + "0" * 64}, 403)])
def test_a_request_with_no_or_another_token_is_refused(cluster: Cluster, headers: dict[str, str], status: int):
    request = urllib.request.Request(
        f"http://127.0.0.1:{cluster.dashboard}/api/jobs/",
        data=json.dumps({"entrypoint": f"touch {cluster.home}/ran"}).encode(),
        headers=headers | {"Content-Type": "application/json"},
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=10)
    assert refused.value.code == status


JOB = """
import ray
ray.init()
head = next(node for node in ray.nodes() if node["NodeID"] == ray.get_runtime_context().get_node_id())
assert "CPU" not in head["Resources"], head
where = ray.remote(lambda: ray.get_runtime_context().get_node_id())
ids = ray.get([where.options(num_cpus=1).remote(), where.options(num_cpus=0, resources={"joined": 1}).remote()])
nodes = {node["NodeID"]: node for node in ray.nodes()}
print("CPUs of the autoscaler's node:", nodes[ids[0]]["Resources"]["CPU"])
"""


def test_a_job_with_the_token_runs_on_a_new_spot_node_and_on_one_that_joined(cluster: Cluster):
    (cluster.home / "job.py").write_text(JOB)
    job = cluster.submit("python", f"{cluster.home}/job.py", RAY_AUTH_MODE="token")
    assert job.returncode == 0, job.stdout + (cluster.home / "worker.log").read_text()
    assert f"CPUs of the autoscaler's node: {float(TYPES['cpu-spot']['resources']['CPU'])}" in job.stdout
    assert "of type cpu-spot" in job.stdout


def test_no_node_starts_without_the_token(cluster: Cluster, empty_home: Path):
    ports = {"head": "--port=0", "worker": f"--address=127.0.0.1:{cluster.gcs}"}
    logs = {node: empty_home / f"{node}.log" for node in ports}
    tries = [start(f"{start_command(node)} {ports[node]}", empty_home, logs[node]) for node in ports]
    try:
        assert [process.wait(30) for process in tries] == [1, 1]
        assert all("no authentication token was found" in log.read_text() for log in logs.values())
    finally:
        for process in tries:
            kill_tree(process)


CONNECT = """
import json, os, sys
from raycnn import data, errors
for environment in json.loads(sys.argv[1]):
    os.environ.clear()
    os.environ.update(environment)
    try:
        data.connect()
    except errors.ConfigError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def refusals(cluster: Cluster, empty_home: Path) -> list[str]:
    """What `data.connect` says, one after the other, in environments in which it must not connect."""
    (empty_home / "ray").mkdir()
    (empty_home / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    environments = [
        cluster.environment(RAY_ADDRESS=f"127.0.0.1:{cluster.gcs}"),
        clean_environment(empty_home, RAY_ADDRESS="http://127.0.0.1:8265"),
        clean_environment(empty_home, RAY_ADDRESS="127.0.0.1:1"),
        clean_environment(empty_home, RAY_TMPDIR=str(empty_home)),
    ]
    command = [sys.executable, "-c", CONNECT, json.dumps(environments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=50, check=True).stdout.splitlines()


def test_a_verb_learns_at_once_that_a_cluster_wants_a_token_or_is_not_there(cluster: Cluster, refusals: list[str]):
    token, no_address, nobody, gone = refusals
    assert token.startswith(f"the Ray cluster at 127.0.0.1:{cluster.gcs} wants a token; set RAY_AUTH_MODE=token")
    assert no_address.startswith("RAY_ADDRESS is http://127.0.0.1:8265, and should be HOST:PORT")
    assert nobody == "no Ray cluster answers at 127.0.0.1:1; is it running, and RAY_ADDRESS right?"
    assert gone.startswith("no Ray cluster answers at 127.0.0.1:1; the one that `ray start` began here is gone")
