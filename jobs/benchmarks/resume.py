"""Training that is killed within epochs: each sample once per epoch, and the weights of a run that nobody killed.

Real runs of `raycnn train`, each with a Ray of its own. A worker, the driver or the raylet is killed by SIGKILL at a
drawn sample of a drawn epoch; after the death of a driver or a raylet the same command is given again.
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.measuring import RAYCNN, python_path
from benchmarks.takes import FOLDER, KILL

KILLS = 20
TARGETS = ("worker", "driver", "raylet")
CHANGES = ((1, 2), (2, 4), (4, 1))
"""Workers before and after a death of the driver."""
EPOCHS, IMAGES, BATCH, CHECKPOINT_EVERY = 3, 1200, 16, 7
TIMEOUT_S = 300


class Kill(NamedTuple):
    """Who is killed when a worker has trained on so many rows in all, the last ones in this epoch."""

    target: str
    epoch: int
    rows: int


class Run:
    """One run folder, and the commands that were given for it."""

    def __init__(self, folder: Path, packed: str, seed: int = 0) -> None:
        self.url, self._takes = str(folder / "run"), folder / "takes"
        self._takes.mkdir(parents=True)
        self._once, self._packed, self._seed = folder / "once", packed, seed

    def train(self, workers: int, kill: Kill | None = None, **more: Any) -> bool:
        """Whether the command, with `more` options, came to its end; what it has left is gone."""
        import psutil

        options = {"epochs": EPOCHS, "batch_size": BATCH, "checkpoint_every": CHECKPOINT_EVERY}
        options |= {"num_workers": workers, "seed": self._seed, "device": "cpu"} | more
        words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        environment = os.environ | self.environment(kill)
        # The shell becomes the program, so that the workers can be told its number.
        shell = ["sh", "-c", 'RAYCNN_BENCH_DRIVER=$$ exec "$0" "$@"', RAYCNN, "train", self._packed, self.url, *words]
        with (self._takes.parent / "log").open("a") as log:
            driver = subprocess.Popen(shell, env=environment, stdout=log, stderr=log, start_new_session=True)
            family: dict[int, psutil.Process] = {}
            until = time.monotonic() + TIMEOUT_S
            while driver.poll() is None:
                if time.monotonic() > until:
                    driver.kill()
                    raise SystemExit(f"no end within {TIMEOUT_S} s: {self._takes.parent}/log")
                for child in psutil.Process(driver.pid).children(recursive=True) if driver.poll() is None else ():
                    family.setdefault(child.pid, child)
                time.sleep(0.2)
        for child in family.values():
            if child.is_running():
                child.kill()
        if kill and not self._once.exists():
            raise SystemExit(f"nobody was killed: {self._takes.parent}/log")
        return driver.returncode == 0

    def environment(self, kill: Kill | None = None) -> dict[str, str]:
        """What has Ray's workers note what they take, and kill."""
        found = {
            FOLDER: str(self._takes),
            "PYTHONPATH": python_path(),
            "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR": "benchmarks.takes.install",
        }
        return found | ({KILL: json.dumps(kill._asdict() | {"once": str(self._once)})} if kill else {})

    def digest(self) -> str:
        """Of weights and optimizer at the end."""
        from raycnn.storage import open_store
        from raycnn.training import Checkpoints

        checkpoints = Checkpoints(open_store(self.url))
        last = checkpoints.last()
        assert last is not None
        assert last["epoch"] == EPOCHS - 1
        tensors, found = checkpoints.load(last), hashlib.sha256()
        for name in sorted(tensors):
            if name.startswith(("model.", "optimizer.")):
                found.update(name.encode() + tensors[name].numpy().tobytes())
        return found.hexdigest()

    def epochs(self) -> Iterator[list[int]]:
        """What each epoch has trained on, lane by lane: hashes of keys, up to where the next process went on."""
        lanes: defaultdict[tuple[int, int], list[list[int]]] = defaultdict(list)
        for log in sorted(self._takes.glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns):
            mine: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
            for line in log.read_text().splitlines():
                step = json.loads(line)
                mine[step["epoch"], step["lane"]] += step["keys"]
            for lane, keys in mine.items():
                lanes[lane].append(keys)
        for epoch in range(EPOCHS):
            yield [key for lane in sorted(k for k in lanes if k[0] == epoch) for key in _followed(lanes[lane])]

    def is_exact(self) -> bool:
        """Whether each epoch has trained on every sample once, each at its place in the order."""
        from raycnn.data import feed_key

        orders = [list(map(feed_key, keys_in_order(self._packed, epoch))) for epoch in range(EPOCHS)]
        return list(self.epochs()) == orders


def _followed(processes: Sequence[Sequence[int]]) -> list[int]:
    """What counts of what the processes trained on of a lane, one after the other: later ones do some of it again."""
    kept: list[int] = []
    for keys in processes:
        if keys[0] in kept:
            kept = kept[: kept.index(keys[0])]
        kept += keys
    return kept


def keys_in_order(packed: str, epoch: int) -> list[str]:
    """The keys of the training split in an epoch's order."""
    from raycnn.shards import PackedCollection, open_collection
    from raycnn.shards.order import group_order, row_order

    collection = open_collection(packed)
    assert isinstance(collection, PackedCollection)
    groups = list(collection.select("train", Counter()))
    keys: list[str] = []
    for group in group_order(len(groups), 0, epoch):
        inside = [sample.key for sample in collection.read([groups[group]])]
        keys += [inside[row] for row in row_order(len(inside), 0, epoch, int(group))]
    return keys


def pack(folder: Path) -> str:
    """Images of two classes, packed."""
    import numpy as np

    import raycnn
    from benchmarks.measuring import encode

    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        pixels = rng.integers(0, 200, (8, 8), np.uint8)
        pixels[:, : 4 if i % 2 else 8][:, -4:] += 50
        path = folder / "raw" / str(i % 2) / f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(pixels, "PNG"))
    raycnn.pack(str(folder / "raw"), str(folder / "packed"), val=0.1, test=0.0)
    return str(folder / "packed")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """How many of the killed runs ended as one that nobody killed, on as many workers and on others."""
    rng = random.Random(arguments.seed or 0)
    os.environ["RAY_ADDRESS"], os.environ["RAY_USAGE_STATS_ENABLED"] = "local", "0"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        packed = pack(folder)
        whole = {n: Run(folder / f"whole{n}", packed) for n in (1, 2)}
        other = {n: Run(folder / f"other{n}", packed, seed=1) for n in (1, 2)}
        for workers in (1, 2):
            assert whole[workers].train(workers)
            assert other[workers].train(workers)
        killed, changed = [], []
        for number in range(KILLS):
            workers, target = 1 + number % 2, TARGETS[number // 2 % len(TARGETS)]
            one = Run(folder / f"k{number}", packed)
            killed.append(_killed(one, rng, target, workers, workers))
            killed[-1]["is_equal"] = one.digest() == whole[workers].digest()
            killed[-1]["visits_are_exact"] = one.is_exact()
            sys.stderr.write(f"{number + 1} of {KILLS}: {json.dumps(killed[-1])}\n")
        for before, after in CHANGES:
            one = Run(folder / f"c{before}{after}", packed)
            changed.append(_killed(one, rng, "driver", before, after))
            changed[-1]["visits_are_exact"] = one.is_exact()
            sys.stderr.write(f"{json.dumps(changed[-1])}\n")
        controls = [other[n].digest() != whole[n].digest() for n in (1, 2)]
    equal, exact = (sum(k[name] for k in killed) for name in ("is_equal", "visits_are_exact"))
    elsewhere = sum(k["visits_are_exact"] for k in changed)
    line = (
        f"{KILLS} kills: {equal} of {KILLS} with equal weights, {exact} of {KILLS} with each sample once per epoch; "
        f"{elsewhere} of {len(changed)} on another number of workers; {sum(controls)} of 2 controls differ"
    )
    sys.stderr.write(line + "\n")
    is_right = equal == exact == KILLS and elsewhere == len(changed) and all(controls)
    return {"line": line, "failed": not is_right, "kills": killed, "changed": changed}


def _killed(one: Run, rng: random.Random, target: str, workers: int, after: int) -> dict[str, Any]:
    share = int(0.9 * IMAGES) // workers
    epoch = rng.randrange(EPOCHS)
    kill = Kill(target, epoch, epoch * share + rng.randrange(share // 20, share * 9 // 10))
    came_to_its_end = one.train(workers, kill)
    if target != "worker":  # whose death the run survives; of the others it may have ended just before
        came_to_its_end = one.train(after)
    assert came_to_its_end
    return kill._asdict() | {"workers": workers, "workers_after": after}
