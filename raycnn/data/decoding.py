"""Samples read ahead on a thread, and decoded where a decoder that crashes or hangs costs one image and not the run.

A process that dies over an image is replaced by Ray, and the batch that it had begun comes to another one with
`is_again`. There all decoding happens in a child process, whose death says which image it was.
"""

import faulthandler
import os
import queue
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self, TypeVar

from raycnn import images
from raycnn.config import MIB, ImageSpec
from raycnn.errors import Bad
from raycnn.images.isolated import DECODE_TIMEOUT_S, Isolated
from raycnn.shards import Sample

GROUP = 64
"""Samples that are handed on together, because a hand-over costs as much as decoding a tiny image."""
GROUP_BYTES = 4 * MIB
AHEAD = 8
"""Groups that wait: at most 32 MiB, or so many images of the largest size."""
REARM_S = 1.0

T = TypeVar("T")


def groups(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    """The samples in lists of at most 64 and about 4 MiB."""
    group: list[Sample] = []
    size = 0
    for sample in samples:
        group.append(sample)
        size += len(sample.encoded or b"")
        if len(group) == GROUP or size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def read_ahead(items: Iterator[T], ahead: int = AHEAD) -> Generator[T, None, None]:
    """The items, up to `ahead` of them made on a thread that starts now; its exception is raised where they are taken.

    They have to be taken, or the iterator closed after the first of them: else the thread waits for ever.
    """
    waiting: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(ahead)
    is_over = threading.Event()

    def put(item: T | None, error: BaseException | None = None) -> None:
        while not is_over.is_set():
            with suppress(queue.Full):
                waiting.put((item, error), timeout=0.2)
                return

    def fill() -> None:
        try:
            for item in items:
                put(item)
                if is_over.is_set():
                    return
            put(None, StopIteration())
        except BaseException as error:  # noqa: BLE001  whatever it is, it is raised where the items are taken
            put(None, error)

    def taken() -> Generator[T, None, None]:
        try:
            while True:
                item, error = waiting.get()
                if isinstance(error, StopIteration):
                    return
                if error is not None:
                    raise error
                assert item is not None
                yield item
        finally:
            is_over.set()
            thread.join()

    thread = threading.Thread(target=fill, name="read ahead", daemon=True)
    thread.start()
    return taken()


class Decoder:
    """Encoded images to pixels, for the samples of one batch of units; not for use by two threads at once."""

    def __init__(self, spec: ImageSpec, is_again: bool) -> None:
        """Decode in this process, or with `is_again` in a child process that may die."""
        self._spec = spec
        self._isolated = Isolated() if is_again else None
        self._silent = open(os.devnull, "w")  # noqa: SIM115  closed in __exit__

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._silent.close()
        if self._isolated is not None:
            self._isolated.__exit__(kind, error, trace)

    @property
    def is_isolated(self) -> bool:
        """Whether a child process decodes."""
        return self._isolated is not None

    def decode(self, samples: Sequence[Sample]) -> list[images.Pixels | Bad]:
        """(H, W, C) uint8 of each sample, or why there are none.

        An image that hangs ends this process, from a thread that needs no GIL.
        """
        isolated = self._isolated
        if isolated is not None:
            return [s.bad or isolated.pixels(s.encoded, self._spec) for s in samples]
        made: list[images.Pixels | Bad] = []
        armed = 0.0
        try:
            for sample in samples:
                if (now := time.monotonic()) - armed > REARM_S:
                    # Arming starts a thread, so it is not done for each image: those of one second share a deadline.
                    faulthandler.dump_traceback_later(DECODE_TIMEOUT_S, exit=True, file=self._silent)
                    armed = now
                made.append(sample.bad or images.pixels(sample.encoded, self._spec))
        finally:
            faulthandler.cancel_dump_traceback_later()
        return made
