"""From 10 thousand images to 100 million keys: the time for each, and whether memory stays flat."""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from typing_extensions import override

from benchmarks.measuring import RAYCNN, encode
from raycnn.config import MIB, ImageSpec
from raycnn.ledger import Growth, Ledger, Plan, label_ledger, new_slices, plan_path
from raycnn.s3local import S3Server
from raycnn.shards import Slice, units
from raycnn.shards.objects import ObjectCollection
from raycnn.storage import Entry, open_store
from raycnn.storage.local import LocalStore

PLANNED = (1_000_000, 10_000_000, 100_000_000)
GROWN = 10_000_000
"""Keys of which a second generation is planned, when there is 1 % more."""
LISTED = 100_000
"""Objects on a real S3 server."""
LABELLED = (10_000, 100_000, 1_000_000)
PAGE = 1000
"""Keys in one answer of S3."""
DISTINCT = 5000
"""Different images; the files hold them over and over."""
FILE_ROWS, GROUP_ROWS = 100_000, 2000
SAMPLE_S = 0.5


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Planning of simulated listings, planning of what was added, a listing of a real server, and labeling."""
    del arguments
    return {
        "planning": [apart(planning, keys) for keys in PLANNED],
        "next_generation": apart(next_generation, GROWN),
        "s3_listing": s3_listing(LISTED),
        **labeling(LABELLED),
    }


def apart(measure: Callable[[int], dict[str, Any]], count: int) -> dict[str, Any]:
    """A measurement in a process of its own, whose peak of memory is the measurement's."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(measure, count).result()


class Watch:
    """Seconds and memory of this process, step by step."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def lap(self) -> dict[str, float]:
        """What passed since the last call, and the most memory that the process has ever held."""
        wall, cpu = time.perf_counter(), time.process_time()
        taken = {"seconds": round(wall - self._wall, 2), "cpu_s": round(cpu - self._cpu, 2), "peak_rss_mib": peak_mib()}
        self._wall, self._cpu = wall, cpu
        return taken


def peak_mib() -> float:
    """The most memory that this process has held; `getrusage` would tell that of its parent, where that was more."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return round(int(status.partition("VmHWM:")[2].split()[0]) / 1024, 1)


# Planning


class Listing(LocalStore):
    """A prefix that is listed as S3 lists it, and holds nothing: sizes and ETags as of photos, none like another."""

    def __init__(self, root: str, keys: int, grown: bool = False) -> None:
        """List so many keys and, where it has `grown`, 1 % more, all over it."""
        super().__init__(root)
        self._keys, self._grown = keys, grown

    @override
    def list(self, prefix: str = "") -> Iterator[Entry]:
        for first in range(0, self._keys, PAGE):
            numbers = range(first, min(first + PAGE, self._keys))
            digests = random.Random(first).randbytes(16 * PAGE).hex()
            folder = f"photos/{first // 10_000:05d}/"
            yield from map(
                Entry,
                [f"{folder}{i:09d}.jpg" for i in numbers],
                [50_000 + i * 7919 % 40_000 for i in numbers],
                [f'"{digests[at : at + 32]}"' for at in range(0, 32 * PAGE, 32)],
            )
            if self._grown:
                new = (f"{folder}{numbers[-1]:09d}.jpg.{i}.jpg" for i in range(PAGE // 100))
                yield from (Entry(path, 50_000, f'"{digests[:32]}"') for path in new)


def listed_slices(keys: int, folder: str, grown: bool = False) -> Iterator[Slice]:
    """What `raycnn label` would plan of a flat prefix with so many keys."""
    collection = ObjectCollection(Listing(folder, keys, grown), "flat prefix", "it is simulated")
    return collection.select("all", Counter())


def planned(ledger: Ledger, keys: int) -> Plan:
    """Generation 0 of so many keys."""
    return ledger.plan(0, units(listed_slices(keys, ledger.store.url)), {}, {}, Counter())


def planning(keys: int) -> dict[str, Any]:
    """Plan a simulated listing on a local folder, and look for what is pending with no and with every part there."""
    with tempfile.TemporaryDirectory(prefix="raycnn-scale-") as folder:
        ledger = label_ledger(open_store(folder), {})
        watch, before = Watch(), peak_mib()
        for _ in Listing(folder, keys).list():
            pass
        generating = watch.lap()
        plan = planned(ledger, keys)
        taken = watch.lap()
        result = {
            "keys": keys,
            "listing_alone": generating,
            "plan": {**taken, "keys_per_s": round(keys / taken["seconds"]), "rss_before_mib": before},
            **sizes(ledger, plan),
            "pending_of_none_done": {**lap_of(lambda: ledger.pending(plan)), "units": len(ledger.pending(plan))},
        }
        parts = Path(folder, ledger.parts)
        parts.mkdir(parents=True)
        for ref in plan.refs:
            Path(folder, ledger.path(ref)).touch()
        resumed: list[Plan] = []
        reading = lap_of(lambda: resumed.extend(ledger.plans()))
        result["resume"] = {"plans": reading, "pending_of_all_done": lap_of(lambda: ledger.pending(resumed[0]))}
        assert not ledger.pending(resumed[0])
        return result


def lap_of(call: Callable[[], object]) -> dict[str, float]:
    """What one call takes."""
    watch = Watch()
    call()
    return watch.lap()


def sizes(ledger: Ledger, plan: Plan) -> dict[str, Any]:
    """What a plan takes in the store."""
    pages = [entry.size for entry in ledger.store.list("plan/pages/")]
    document = len(ledger.store.get(plan_path(0)))
    return {
        "units": len(plan.refs),
        "pages": len(pages),
        "pages_bytes": sum(pages),
        "pages_bytes_per_key": round(sum(pages) / plan.rows, 2),
        "plan_bytes": document,
        "plan_bytes_per_unit": round(document / len(plan.refs), 1),
    }


def next_generation(keys: int) -> dict[str, Any]:
    """Compare a listing that has grown by 1 %, all over it, with what was planned, and plan what is new."""
    with tempfile.TemporaryDirectory(prefix="raycnn-scale-") as folder:
        ledger = label_ledger(open_store(folder), {})
        first = planned(ledger, keys)
        watch, growth = Watch(), Growth()
        new = new_slices(listed_slices(keys, folder, grown=True), ledger.planned([first]), growth)
        second = ledger.plan(1, units(new), {}, {}, Counter())
        taken = watch.lap()
        assert (growth.changed, growth.gone) == (0, 0)
        listed = keys + second.rows
        return {"planned": keys, "new": second.rows, **taken, "keys_per_s": round(listed / taken["seconds"])}


def s3_listing(objects: int) -> dict[str, Any]:
    """Plan small objects on a real server with `raycnn label`, which is interrupted when the plan is there."""
    with S3Server() as server, tempfile.TemporaryDirectory(prefix="raycnn-scale-") as folder:
        server.create_bucket("scale")
        os.environ.update(server.environment())
        store, files = open_store("s3://scale/photos"), images()
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda i: store.put(f"{i:07d}.png", files[i % DISTINCT]), range(objects)))
        listing = lap_of(lambda: sum(1 for _ in store.list()))
        pieces = ObjectCollection(store, "flat prefix", "it is").select("all", Counter())
        ledger = label_ledger(open_store("s3://scale/labels"), {})
        taken = lap_of(lambda: ledger.plan(0, units(pieces), {}, {}, Counter()))
        return {
            "objects": objects,
            "listing_alone": {"seconds": listing["seconds"], "keys_per_s": round(objects / listing["seconds"])},
            "plan": {**taken, "keys_per_s": round(objects / taken["seconds"])},
            "progress_shown": progress_while_planning(store.url, Path(folder, "labels"), make_bundle(folder)),
        }


def progress_while_planning(data: str, out: Path, bundle: str) -> list[str]:
    """What `raycnn label` says of a listing where there is no terminal; it is interrupted when the plan is there."""
    shown: list[str] = []
    command = [RAYCNN, "label", data, str(out), "--bundle", bundle]
    environment = os.environ | {"RAY_ADDRESS": "local"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "images listed" in line:
                shown.append(line.strip())
            if (out / plan_path(0)).exists():
                process.send_signal(signal.SIGINT)
                break
        process.communicate()
    return shown


# Labeling


def images() -> list[bytes]:
    """Small PNGs as of digits: blobs on black."""
    rng = np.random.default_rng(0)
    return [encode(np.outer(*rng.integers(0, 16, (2, 28))).astype(np.uint8), "PNG") for _ in range(DISTINCT)]


def make_bundle(folder: str) -> str:
    """A bundle of `classic` for 28 x 28 gray, with random weights."""
    from raycnn import bundle as bundles  # torch, which would be in the memory of whoever plans
    from raycnn.models import build

    url = str(Path(folder, "bundle"))
    spec = ImageSpec(height=28, width=28, channels=1, crop=1.0, mean=(0.5,), std=(0.25,))
    classifier = build("classic", 10, spec, seed=0).eval()
    names = tuple("0123456789")
    samples = images()[:3]
    bundles.save(
        url, classifier, names, temperature=1.0, metrics={}, validation={}, samples=samples, data_fingerprint=None
    )
    return url


def make_parquet(folder: Path, rows: int) -> None:
    """Files as Hugging Face writes them, with a key column."""
    files = images()
    folder.mkdir()
    for first in range(0, rows, FILE_ROWS):
        numbers = range(first, min(first + FILE_ROWS, rows))
        table = pa.table(
            {
                "key": [f"{i:09d}" for i in numbers],
                "image": [{"bytes": files[i % DISTINCT], "path": None} for i in numbers],
            }
        )
        pq.write_table(table, folder / f"part-{first // FILE_ROWS:05d}.parquet", row_group_size=GROUP_ROWS)


def labeling(counts: tuple[int, ...]) -> dict[str, Any]:
    """`raycnn label` and `raycnn verify` of ever more images on a local folder, each on a Ray of its own."""
    with tempfile.TemporaryDirectory(prefix="raycnn-scale-") as folder:
        bundle = make_bundle(folder)
        runs = [label_run(Path(folder, str(count)), bundle, count) for count in counts]
    # What starting Ray and loading take is in both, and goes out.
    less, more = runs[-2:]
    cost = (more["workers_cpu_s"] - less["workers_cpu_s"]) / (more["images"] - less["images"])
    return {
        "labeling": runs,
        "distinct_images": DISTINCT,
        "marginal_worker_cpu_us_per_image": round(1e6 * cost, 1),
        "growth": {
            f"{who}_mib": round(more[f"{who}_peak_mib"] - less[f"{who}_peak_mib"], 1) for who in ("driver", "worker")
        },
    }


def label_run(folder: Path, bundle: str, count: int) -> dict[str, Any]:
    """One size, end to end."""
    folder.mkdir()
    make_parquet(folder / "data", count)
    out = str(folder / "labels")
    command = [RAYCNN, "label", str(folder / "data"), out, "--bundle", bundle, "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ | {"RAY_ADDRESS": "local"}, text=True
    ) as process:
        samples = Samples(process.pid)
        while process.poll() is None:
            samples.take()
            time.sleep(SAMPLE_S)
        assert process.stdout is not None
        report = json.loads(process.stdout.read().splitlines()[-1])
    proof = subprocess.run(
        [sys.executable, "-c", _VERIFY, out], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    shutil.rmtree(folder)
    return {
        "images": count,
        "units": report["units"],
        "seconds": round(report["seconds"], 1),
        "images_per_s": report["speed"]["images_per_s"],
        "of_floor": report["speed"]["of_floor"],
        "busy": report["speed"]["busy"],
        **samples.summary(),
        "verify": json.loads(proof.stdout),
    }


_VERIFY = """
import json, sys
from benchmarks.scale import Watch
import raycnn
watch = Watch()
report = raycnn.verify(sys.argv[1])
assert report.error is None and report.present == report.expected
print(json.dumps({"rows": report.present, **watch.lap()}))
"""


class Samples:
    """CPU seconds and peaks of memory of a driver and of the Ray workers below it, looked at now and then."""

    def __init__(self, pid: int) -> None:
        self._driver = psutil.Process(pid)
        self._cpu_s: dict[int, float] = {}
        self._peak: dict[int, int] = {}
        self._workers: set[int] = set()

    def take(self) -> None:
        """One look at all of them."""
        try:
            family = [self._driver, *self._driver.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in family:
            try:
                self._take_one(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue

    def _take_one(self, process: psutil.Process) -> None:
        with process.oneshot():
            spent, memory, line = process.cpu_times(), process.memory_info(), process.cmdline()
        # What is shared is Ray's object store, which all of them map, and code.
        self._peak[process.pid] = max(self._peak.get(process.pid, 0), memory.rss - memory.shared)
        self._cpu_s[process.pid] = spent.user + spent.system
        if line and line[0].startswith("ray::"):
            self._workers.add(process.pid)

    def summary(self) -> dict[str, Any]:
        """Of the driver, and of the workers that labelled: those that have used the most memory are told."""
        driver = self._driver.pid
        peaks = sorted((self._peak[pid] for pid in self._workers), reverse=True)
        return {
            "driver_cpu_s": round(self._cpu_s[driver], 1),
            "driver_peak_mib": round(self._peak[driver] / MIB, 1),
            "workers": len(peaks),
            "workers_cpu_s": round(sum(self._cpu_s[pid] for pid in self._workers), 1),
            "worker_peak_mib": round(peaks[0] / MIB, 1) if peaks else 0.0,
            "workers_peak_mib": [round(peak / MIB, 1) for peak in peaks],
        }
