"""No framework: one process per core, and raycnn's own decoder and backend.

With `bare` as its second argument a loop that reads row groups from S3, decodes, predicts and writes Parquet; with
`images` only `raycnn.images.pixels`, over bytes that lie in memory. Work goes to whichever process is free.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from benchmarks.peers import Task, say, told

BATCH = 64
START_S = 120
"""For torch to be imported and the source to be opened, or one of the processes has failed."""
Ready = Callable[[int], Iterator[int]]
"""Waits until all processes are ready, then yields the numbers below its argument that are this process's."""


class _Source:
    """The source's row groups, numbered over all files."""

    def __init__(self, task: Task) -> None:
        import pyarrow.fs
        import pyarrow.parquet as pq

        self.server = pyarrow.fs.S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"], region="us-east-1")
        below = pyarrow.fs.FileSelector(task.source.removeprefix("s3://"))
        paths = sorted(info.path for info in self.server.get_file_info(below))
        files = [pq.ParquetFile(path, filesystem=self.server, pre_buffer=True) for path in paths]
        self.groups = [(file, group) for file in files for group in range(file.num_row_groups)]

    def read(self, number: int) -> tuple[list[str], list[bytes]]:
        """Keys and encoded images of a row group."""
        file, group = self.groups[number]
        table = file.read_row_group(group)
        return table["key"].to_pylist(), table["image"].to_pylist()


def bare(task: Task, ready: Ready) -> None:
    """Label this process's row groups, each read while the one before it is worked on."""
    import numpy as np
    import torch

    from raycnn import bundle as bundles
    from raycnn.predictor import Predictor

    torch.set_num_threads(1)
    predictor, source = Predictor(bundles.load(task.bundle)), _Source(task)
    with ThreadPoolExecutor(1) as pool:
        for number, (keys, encoded) in _ahead(pool, source, ready(len(source.groups))):
            predicted = []
            for first in range(0, len(keys), BATCH):
                pixels: list[Any] = [predictor.prepare(image) for image in encoded[first : first + BATCH]]
                predicted.append(predictor.predict(np.stack(pixels)))
            _write(source, f"{task.out}/{number:05d}.parquet", keys, predicted)


def _ahead(
    pool: ThreadPoolExecutor, source: _Source, numbers: Iterator[int]
) -> Iterator[tuple[int, tuple[list[str], list[bytes]]]]:
    """(number, row group), of which one is read ahead."""
    reading: list[tuple[int, Future[tuple[list[str], list[bytes]]]]] = []
    for number in numbers:
        reading.append((number, pool.submit(source.read, number)))
        if len(reading) == 2:
            first, future = reading.pop(0)
            yield first, future.result()
    for number, future in reading:
        yield number, future.result()


def _write(source: _Source, url: str, keys: list[str], predicted: list[Any]) -> None:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    labels = np.concatenate([p.labels[:, 0] for p in predicted])
    probabilities = np.concatenate([p.probabilities[:, 0] for p in predicted])
    table = pa.table({"key": keys, "label": labels, "probability": probabilities})
    pq.write_table(table, url.removeprefix("s3://"), filesystem=source.server)


def images(task: Task, ready: Ready) -> None:
    """Pixels of this process's images."""
    import torch

    from raycnn import bundle as bundles
    from raycnn.images import pixels, prepare_to_resize

    torch.set_num_threads(1)
    spec, source = bundles.load(task.bundle).spec, _Source(task)
    encoded = [image for number in range(len(source.groups)) for image in source.read(number)[1]]
    prepare_to_resize()
    for batch in ready(-(-len(encoded) // BATCH)):
        for image in encoded[batch * BATCH : (batch + 1) * BATCH]:
            pixels(image, spec)


def main(work: Callable[[Task, Ready], None]) -> None:
    """Work in one process per core; print when the last of them was ready, and when the last was done."""
    context = multiprocessing.get_context("fork")  # before anything that has threads is imported
    cores = os.cpu_count() or 1
    barrier, following, ended = context.Barrier(cores + 1), context.Value("q", 0), context.Value("d", 0.0)

    def ready(count: int) -> Iterator[int]:
        barrier.wait()
        while True:
            with following.get_lock():
                number, following.value = following.value, following.value + 1
            if number >= count:
                return
            yield number

    def work_and_note() -> None:
        work(told(Task), ready)
        with ended.get_lock():
            ended.value = max(ended.value, time.time())

    processes = [context.Process(target=work_and_note) for _ in range(cores)]
    for process in processes:
        process.start()
    barrier.wait(timeout=START_S)
    began = time.time()
    for process in processes:
        process.join()
        if process.exitcode:
            sys.exit(f"a process ended with {process.exitcode}")
    say({"began": began, "before": 0, "ended": ended.value})


if __name__ == "__main__":
    main({"bare": bare, "images": images}[sys.argv[2]])
