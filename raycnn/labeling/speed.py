"""Where the time of a labeling run goes, and how near it comes to the floor of its machine.

The floor is what the same CPUs would do if they did nothing but decode and predict: one over the CPU seconds that
these two take for an image, as this run has measured them. What is lost to it is waiting for storage, committing,
Ray, and whatever else runs on the machine.
"""

import os
import socket
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

STAGES = ("read", "decode", "model", "commit")
"""What a worker does, or waits for, one after the other."""


_WORKER = f"{socket.gethostname()}:{os.getpid()}"


class Stopwatch:
    """Seconds of wall clock and of CPU that a worker has spent in each stage since they were last taken."""

    def __init__(self) -> None:
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._began = time.time()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what is done inside."""
        wall, cpu = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            self._spent[name] += time.perf_counter() - wall
            self._spent[name + "_cpu"] += time.thread_time() - cpu

    def count(self, rows: int, is_isolated: bool) -> None:
        """So many images have been through; the CPU time of those that a child process has decoded is not known."""
        self._spent["rows"] += rows
        self._spent["measured"] += 0 if is_isolated else rows

    def take(self) -> dict[str, Any]:
        """What was spent since the last call, as JSON for `Speed.add`."""
        now = time.time()
        taken = dict(self._spent) | {"worker": _WORKER, "began": self._began, "ended": now}
        self._spent, self._began = defaultdict(float), now
        return taken


class Speed:
    """The run's speed, added up on the driver."""

    def __init__(self, cpus: float, has_gpus: bool = False) -> None:
        """Judge what `cpus` CPUs do; beside GPUs their time says nothing of a floor."""
        self._cpus, self._has_gpus = cpus, has_gpus
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._workers_s, self._ended = 0.0, 0.0
        self._began: dict[str, float] = {}
        self._rows: defaultdict[str, float] = defaultdict(float)

    def add(self, taken: Mapping[str, Any]) -> None:
        """What a worker's stopwatch has taken."""
        for name in taken.keys() - {"worker", "began", "ended"}:
            self._spent[name] += taken[name]
        self._workers_s += taken["ended"] - taken["began"]
        self._ended = max(self._ended, taken["ended"])
        worker = taken["worker"]
        self._began[worker] = min(self._began.get(worker, taken["began"]), taken["began"])
        self._rows[worker] += taken.get("rows", 0)

    @property
    def images_per_s(self) -> float:
        """The workers' own rates added up, each from when that one was ready until now: without what starting takes."""
        return sum(rows / max(self._ended - self._began[worker], 1e-9) for worker, rows in self._rows.items())

    @property
    def floor(self) -> float:
        """Images/s if the CPUs did nothing but decode and predict; 0 where that is not known."""
        spent, measured = self._spent, self._spent["measured"]
        if not measured or self._has_gpus:
            return 0.0
        return self._cpus / (spent["decode_cpu"] / measured + spent["model_cpu"] / spent["rows"])

    @property
    def busy(self) -> dict[str, float]:
        """The share of the workers' time that each stage takes."""
        return {stage: round(self._spent[stage] / self._workers_s, 3) if self._workers_s else 0.0 for stage in STAGES}

    def report(self) -> dict[str, Any] | None:
        """For the verb's report; None where nothing was labelled."""
        if not self._spent["rows"]:
            return None
        return {
            "images_per_s": round(self.images_per_s, 1),
            "images_per_s_per_cpu": round(self.images_per_s / self._cpus, 1),
            "floor_images_per_s": round(self.floor, 1),
            "of_floor": round(self.images_per_s / self.floor, 3) if self.floor else None,
            "busy": self.busy,
            "bottleneck": max(STAGES, key=self.busy.__getitem__),
        }

    def text(self) -> str:
        """The same for the progress line: `decode 52%, model 44%, read 2%; 93% of the floor`."""
        busy = sorted(self.busy.items(), key=lambda item: -item[1])
        shares = ", ".join(f"{name} {share:.0%}" for name, share in busy if share >= 0.005)
        return f"{shares}; {self.images_per_s / self.floor:.0%} of the floor" if self.floor else shares
