"""`raycnn.label` for the second time in one driver: the cluster runs, and its workers have torch imported."""

import sys
import threading
import time

import raycnn
from benchmarks.peers import Task, say, told
from raycnn.storage import open_store

POLL_S = 0.2
"""A look costs 5 ms of CPU, which what is measured here has to spare."""


def first_part(out: str, is_over: threading.Event) -> float | None:
    """When the first committed part of an output was seen; None if there was none when all was `over`."""
    store = open_store(out)
    while True:
        was_over = is_over.is_set()
        if next(iter(store.list("labels/")), None) is not None:
            return time.time()
        if was_over:
            return None
        time.sleep(POLL_S)


def main() -> None:
    """Label what the second argument names, then the source; print how long the second call took to its first part."""
    task, seen = told(Task), []
    raycnn.label(sys.argv[2], task.out + "-before", bundle=task.bundle)
    is_over = threading.Event()
    watch = threading.Thread(target=lambda: seen.append(first_part(task.out, is_over)))
    start = time.time()
    watch.start()
    report = raycnn.label(task.source, task.out, bundle=task.bundle)
    is_over.set()
    watch.join()
    say({"first_part_s": round(seen[0] - start, 2), "seconds": report.seconds, "speed": report.speed})


if __name__ == "__main__":
    main()
