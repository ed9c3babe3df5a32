"""In a worker of Ray: notes which samples it has trained on, and kills a process when it is told to.

`benchmarks.resume` has Ray call `install` in each of its workers, and says where to note and whom to kill by these
environment variables. What is noted are the keys in the batches of steps that are done, not what was read or asked for.
"""

import json
import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

FOLDER, KILL = "RAYCNN_BENCH_TAKES", "RAYCNN_BENCH_KILL"


def install() -> None:
    """Watch the steps of a process that trains; others need not import what it takes."""
    from raycnn.data.feed import LaneBuffers

    begin = LaneBuffers.begin

    def begun(self: Any, epoch: int, first: Any) -> None:
        if LaneBuffers.begin is begun:  # the first samples of this process
            LaneBuffers.begin = begin
            _watch_steps()
        begin(self, epoch, first)

    LaneBuffers.begin = begun


def _watch_steps() -> None:
    from raycnn.loop import Batch, Trainer

    given, log = Trainer.step, Path(os.environ[FOLDER]) / f"{os.getpid()}.jsonl"
    kill = json.loads(os.environ.get(KILL, "{}"))
    taken = 0

    def step(self: Any, batch: Batch, at: int, epoch: int, *more: Any) -> Any:
        nonlocal taken
        done = given(self, batch, at, epoch, *more)
        keys, lanes = batch.keys.tolist(), batch.lanes.tolist()
        with log.open("a") as file:
            for lane in sorted(set(lanes)):
                of_lane = [key for key, its in zip(keys, lanes, strict=True) if its == lane]
                file.write(json.dumps({"epoch": epoch, "lane": lane, "keys": of_lane}) + "\n")
        taken += len(keys)
        if kill and epoch == kill["epoch"] and taken >= kill["rows"] and _is_first(kill["once"]):
            threading.Timer(random.Random(kill["rows"]).uniform(0, 0.03), _shoot, [kill]).start()
        return done

    Trainer.step = step  # pyright: ignore[reportAttributeAccessIssue]


def _is_first(path: str) -> bool:
    """Whether nobody has killed yet: a worker that comes after the dead one lives."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _shoot(kill: dict[str, Any]) -> None:
    whom = {"worker": os.getpid(), "raylet": os.getppid(), "driver": int(os.environ["RAYCNN_BENCH_DRIVER"])}
    os.kill(whom[kill["target"]], signal.SIGKILL)
