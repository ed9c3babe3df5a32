"""In a worker of Ray: notes which samples it takes to train on, and kills a process when it is told to.

`benchmarks.resume` has Ray call `install` in each of its workers, and says where to note and whom to kill by these
environment variables. What is noted is what has arrived, not what was asked for.
"""

import json
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER, KILL = "RAYCNN_BENCH_TAKES", "RAYCNN_BENCH_KILL"


def install() -> None:
    """Watch the place where samples leave the stream."""
    from raycnn.data.feed import LaneBuffers

    given, log = LaneBuffers._rows, Path(os.environ[FOLDER]) / f"{os.getpid()}.jsonl"
    kill = json.loads(os.environ.get(KILL, "{}"))
    taken = 0

    def rows(self: Any, lane: int, count: int) -> Iterator[Any]:
        nonlocal taken
        for part in given(self, lane, count):
            epoch, ordinals = int(part["epoch"][0]), part["ordinal"].tolist()
            with log.open("a") as file:
                take = {"epoch": epoch, "lane": lane, "ordinals": ordinals, "keys": part["key"].tolist()}
                file.write(json.dumps(take) + "\n")
            taken += len(ordinals)
            if kill and epoch == kill["epoch"] and taken >= kill["rows"] and _is_first(kill["once"]):
                threading.Timer(random.Random(kill["rows"]).uniform(0, 0.03), _shoot, [kill]).start()
            yield part

    LaneBuffers._rows = rows


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
