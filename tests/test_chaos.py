"""Some of the kill matrix that `jobs/bench.py chaos` runs whole: real processes, killed at chosen moments."""

import json
from collections.abc import Iterator
from pathlib import Path

import chaos
import oracle
import pytest
from fault_proxy import FaultProxy

from raycnn.s3local import S3Server

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.timeout(240)]


@pytest.fixture
def run(s3: S3Server, s3_url: str, ray_cluster: str, tmp_path: Path) -> Iterator[chaos.Labeling]:
    """600 images to be labelled in 3 units, by way of a proxy, which the workers' environment names, too."""
    name = s3_url.rpartition("/")[2]
    bucket = oracle.Bucket(s3)
    bucket.put({f"{name}/photos/{key}": content for key, content in oracle.images(600).items()})
    bundle = oracle.make_bundle(str(tmp_path / "bundle"))
    with FaultProxy(s3.endpoint) as proxy:
        near = dict.fromkeys(("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"), proxy.endpoint)
        job = {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"env_vars": near}})}
        environment = {"RAY_ADDRESS": ray_cluster} | near | job
        source = oracle.Source(f"{name}/photos", "flat")
        yield chaos.Labeling(proxy, bucket, source, f"{name}/labels", bundle, environment)


def test_killed_workers_and_a_killed_driver_lose_nothing_and_double_nothing(run: chaos.Labeling):
    run.work(
        [
            chaos.Kill("PUT half sent", "PUT", chaos.PART, "half", "worker", chaos.shoot_sender),
            chaos.Kill("PUT stored, unanswered", "PUT", chaos.PART, "stored", "worker", chaos.shoot_sender),
            chaos.Kill("before _SUCCESS", "PUT", chaos.SUCCESS, "request", "driver", chaos.shoot_sender, exits=(-9,)),
        ]
    )
    assert run.codes == [-9, 0]
    assert len(run.killed) == 3
    assert str(chaos.proven(run)) == "expected 600, present 600, lost 0, duplicate 0, foreign 0, altered 0"
    redone = run.redone()
    assert redone.put == 1  # what was stored without an answer is not done again
    assert redone.read <= min(redone.in_flight, 3)  # of each of two workers a unit and the next, without the stored one
    assert redone.finished == 0


def test_a_stopped_worker_that_goes_on_when_others_have_done_its_work_changes_nothing(run: chaos.Labeling):
    zombie = chaos.Zombie()
    run.work([zombie.kill("worker", chaos.PART, 1)])
    zombie.go_on(run)
    assert [process.returncode for process in run.processes] == [0, 0]
    assert chaos.proven(run).is_right
    redone = run.redone()
    assert 1 <= redone.put <= redone.in_flight == 2  # of the stopped worker: what it committed, and what it had read
