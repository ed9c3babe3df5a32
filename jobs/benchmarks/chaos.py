"""Processes killed at every step of `raycnn label`, on a real Ray cluster and a real S3 server: is a row lost?

Each run kills three times or so at one step. The same command is started again until it ends well; then the rows
are counted by other code, `raycnn verify` has to agree, and the command once more has to write nothing.
"""

import argparse
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.kills import WORKERS, Nodes, Scenario, Site, chaos, of_tests, scenarios
from raycnn.errors import RaycnnError
from raycnn.s3local import S3Server

oracle = of_tests("oracle")

SEED = 20261124
IMAGES = 1500
FAILURES = (AssertionError, RaycnnError, OSError, StopIteration, subprocess.SubprocessError, psutil.Error)

RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
    "OMP_NUM_THREADS": "1",
}
"""A dead node is seen after seconds, and no process starts that is not needed."""


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Kills at every step of `raycnn label`, on a Ray cluster and an S3 server behind a proxy."""
    seed = SEED if arguments.seed is None else arguments.seed
    os.environ.update(RAY)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores Ctrl-C
    logging.getLogger("ray").setLevel(logging.ERROR)
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        S3Server(Path(folder, "s3")) as server,
        chaos.FaultProxy(server.endpoint, seed) as proxy,
    ):
        os.environ.update(server.environment())
        os.environ.update(dict.fromkeys(("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"), proxy.endpoint))
        server.create_bucket(oracle.BUCKET)
        bundle = oracle.make_bundle(str(Path(folder, "bundle")))
        nodes = Nodes(folder)
        try:
            site = Site(server, proxy, oracle.Bucket(server), nodes, bundle)
            _fill(site)
            return _report(site, scenarios(site), seed)
        finally:
            nodes.stop()


def _fill(site: Site) -> None:
    """The same images as single objects, as a tar, and packed."""
    images = oracle.images(IMAGES)
    site.bucket.put({f"flat/{name}": content for name, content in images.items()})
    site.bucket.put({"tar/images.tar": oracle.in_tar(images)})
    site.sources = {layout: oracle.Source(layout, layout) for layout in ("flat", "tar", "packed")}
    pack = ["pack", f"s3://{oracle.BUCKET}/flat", f"s3://{oracle.BUCKET}/packed", "--val", "0", "--test", "0"]
    # In a process of its own: this one would be ended with the first cluster that it has been connected to.
    subprocess.run([chaos.RAYCNN, *pack], env=os.environ | {"RAY_ADDRESS": site.nodes.address}, check=True, stdout=-3)


def _report(site: Site, chosen: list[Scenario], seed: int) -> dict[str, Any]:
    tally, steps, errors, start = oracle.Tally(), list[dict[str, Any]](), list[str](), time.perf_counter()
    for number, scenario in enumerate(chosen):
        name = f"{scenario.step}, {scenario.target}, {scenario.layout}, {scenario.source}"
        try:
            kills = scenario.kills(random.Random(f"{seed}:{number}:{name}"))
            step = _run(site, scenario, _labeling(site, scenario, f"out/{number:03d}"), kills, tally)
        except FAILURES as error:
            errors.append(f"{name}: {type(error).__name__} {error}")
            print(f"{number + 1}/{len(chosen)} {errors[-1]}", file=sys.stderr, flush=True)
            site.nodes.replace()
        else:
            steps.append(step)
            print(f"{number + 1}/{len(chosen)} {step}", file=sys.stderr, flush=True)
        site.proxy.rules = ()
        site.nodes.settle()
    kills = sum(step["kills"] for step in steps)
    line = f"runs {len(steps)}, kills {kills}: {tally}"
    again, bound = (sum(step.get(name, 0) for step in steps if "bound" in step) for name in ("read_again", "bound"))
    print(line, f"redone {again} units, at most {bound} were in flight", sep="\n", flush=True)
    totals = {"runs": len(steps), "kills": kills, **vars(tally), "redone": again, "bound": bound}
    return {
        "line": line,
        "seed": seed,
        "images": IMAGES,
        "workers": WORKERS,
        **totals,
        "errors": errors,
        "failed": bool(errors) or not tally.is_right,
        "seconds": round(time.perf_counter() - start, 1),
        "steps": steps,
    }


def _run(site: Site, scenario: Scenario, labeling: Any, kills: list[Any], tally: Any) -> dict[str, Any]:
    """What one run has come to; its rows are added to the tally."""
    start = time.perf_counter()
    _work(labeling, scenario, kills)
    tally += labeling.tally()
    redone = _checked(site, labeling, scenario)
    return {
        "step": scenario.step,
        "target": scenario.target,
        "layout": scenario.layout,
        "source": scenario.source,
        "runs": 1,
        "kills": len(labeling.killed) if scenario.target != "none" else 0,
        "events": len(labeling.killed),
        **redone,
        "exits": labeling.codes,
        "seconds": round(time.perf_counter() - start, 1),
    }


def _labeling(site: Site, scenario: Scenario, out: str) -> Any:
    environment = {"RAY_ADDRESS": site.nodes.address}
    options = ("--layout", scenario.layout)
    source = site.sources[scenario.source]
    return chaos.Labeling(site.proxy, site.bucket, source, out, site.bundle, environment, options)


def _work(labeling: Any, scenario: Scenario, kills: list[Any]) -> None:
    others = [labeling.start() for _ in range(scenario.drivers - 1)]
    try:
        labeling.work(kills)
        scenario.finish(labeling)
        for other in others:
            code = other.wait(chaos.DRIVER_S)
            labeling.codes.append(code)
            assert code == 0, f"the other driver ended with {code}: {labeling.last_words(other)}"
    finally:
        for process in labeling.processes:
            if process.poll() is None:
                chaos.shoot(process.pid)
                process.wait()


def _checked(site: Site, labeling: Any, scenario: Scenario) -> dict[str, int]:
    """What was done again; refused where any promise is broken."""
    chaos.proven(labeling)
    labels, redone = labeling.labels(), labeling.redone()
    assert labels == site.reference.setdefault(scenario.source, labels), "other labels than another run has made"
    found = {"read_again": redone.read, "sent_again": redone.put, "in_flight": redone.in_flight}
    if scenario.drivers > 1 or labeling.is_shared:  # by drivers which share nothing but the output
        return found
    bound = labeling.bound()
    assert redone.read <= bound, f"{redone.read} units were read again, more than {bound}"
    return found | {"bound": bound}
