"""Where the time of training goes."""

import time
from collections import defaultdict

import torch

MOST_EVENTS = 10_000
"""That wait to be read: each is an object of the driver of the GPU."""


class Clock:
    """Seconds by what they went into: each `mark` gives the time since the one before it to a name.

    A GPU works behind the program, so there the marks are events in its queue, read when the shares are asked for.
    """

    def __init__(self, device: torch.device) -> None:
        """Begin now."""
        self._is_cuda = device.type == "cuda"
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event]] = []
        self.begin()

    def begin(self) -> None:
        """What has passed since the last mark belongs to nothing."""
        self._last = time.perf_counter()
        if self._is_cuda:
            self._record("")

    def mark(self, name: str) -> None:
        """The time since the last mark went into `name`."""
        if self._is_cuda:
            self._record(name)
            return
        now = time.perf_counter()
        self._seconds[name] += now - self._last
        self._last = now

    def add(self, name: str, seconds: float) -> None:
        """Time that was measured elsewhere."""
        self._seconds[name] += seconds

    def _record(self, name: str) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append((name, event))
        if len(self._events) > MOST_EVENTS:
            self._read()

    def _read(self) -> None:
        """Wait for the GPU, and count what it took."""
        torch.cuda.synchronize()
        for (_, before), (name, event) in zip(self._events, self._events[1:], strict=False):
            if name:
                self._seconds[name] += before.elapsed_time(event) / 1000
        self._events = self._events[-1:]

    def take(self) -> dict[str, float]:
        """Seconds by name since this was last asked for."""
        if self._is_cuda:
            self._read()
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken
