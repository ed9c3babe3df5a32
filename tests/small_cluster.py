"""Every verb on a cluster of 1 CPU. A program of its own, because it starts the cluster, and ends by being killed.

python small_cluster.py FOLDER      one JSON object a line: {"step", "seconds", ...}
"""

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import ray
from PIL import Image
from ray.cluster_utils import Cluster

import raycnn
from raycnn import bundle as bundles
from raycnn import data
from raycnn.config import ImageSpec, PackConfig, TrainConfig, make
from raycnn.data import board
from raycnn.models import build
from raycnn.packing import pack
from raycnn.training import train

out = sys.stdout
sys.stdout = sys.stderr  # Ray prints, too
IMAGES = 64
LAUNCHER = """
max_workers: 1
head_node_type: head
available_node_types:
  head: {resources: {CPU: 0, GPU: 0}, max_workers: 0}
  cpu: {resources: {CPU: 1}, max_workers: 1}
"""


def draw(folder: Path) -> None:
    """Images that are bright on the left or on the right."""
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        image = rng.integers(0, 60, (8, 8), np.uint8)
        image[:, i % 2 * 4 :][:, :4] += 150
        file = folder / ("left", "right")[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)


def untrained(url: str) -> str:
    spec = ImageSpec(height=8, width=8, channels=1, crop=1.0, mean=(0.5,), std=(0.25,))
    model = build("classic", 2, spec, seed=0).eval()
    empty: dict[str, Any] = {"metrics": {}, "validation": {}, "samples": (), "data_fingerprint": None}
    return bundles.save(url, model, ("left", "right"), temperature=1.0, **empty).url


def step(name: str, work: Callable[[], Any]) -> None:
    start = time.monotonic()
    made = work()
    tell({"step": name, "seconds": time.monotonic() - start} | made)


def tell(event: dict[str, Any]) -> None:
    print(json.dumps(event), file=out, flush=True)


def main(folder: Path) -> None:
    raw, packed, run = (str(folder / name) for name in ("raw", "packed", "run"))
    draw(folder / "raw")
    bundle = untrained(str(folder / "bundle"))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")

    def first_pack() -> dict[str, Any]:
        notes: Queue[str] = Queue()
        board.QUIET_S = 1
        with ThreadPoolExecutor() as pool:
            packing = pool.submit(
                pack,
                make(PackConfig, {"src": raw, "dst": packed, "val": 0.2, "test": 0.2}),
                lambda event: notes.put(event["text"]) if event["kind"] == "note" else None,
            )
            while not (note := notes.get(timeout=60)).startswith("waiting for"):
                pass
            cluster.add_node(num_cpus=1)  # what the autoscaler does
            rows = packing.result().rows
        board.QUIET_S = 20
        return {"rows": rows, "note": note}

    def labelled() -> dict[str, Any]:
        report = raycnn.label(packed, str(folder / "labels"), bundle=bundle)
        return {"rows": report.rows, "status": report.status}

    Path(data.cluster.LAUNCHED).expanduser().write_text(LAUNCHER)
    step("pack where there is no CPU yet", first_pack)
    step("evaluate", lambda: {"rows": raycnn.evaluate(bundle, packed, split="all").rows})
    step("label", labelled)
    for_ever = {"data": packed, "run": run, "batch_size": 16, "num_workers": 2, "epochs": 100_000}
    train(make(TrainConfig, for_ever), tell)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
