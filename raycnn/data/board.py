"""Carries a remote worker's events to the driver, where the terminal is."""

import threading
from collections.abc import Callable
from typing import Any

POLL_S = 0.5
TIMEOUT_S = 10

Progress = Callable[[dict[str, Any]], None]
"""Takes the events of a verb: {"kind": "note" | "progress" | "epoch", ...}."""


class Board:
    """Carries rank 0's events to the driver, where the terminal is."""

    def __init__(self, say: Progress) -> None:
        import ray

        self._say, self._over = say, threading.Event()
        self.actor: Any = ray.remote(num_cpus=0)(Events).remote()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Board":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        import ray

        self._over.set()
        self._thread.join(timeout=5)
        ray.kill(self.actor)

    def _watch(self) -> None:
        import ray
        from ray.exceptions import GetTimeoutError, RayError

        is_over = False
        while not is_over:
            is_over = self._over.wait(POLL_S)
            try:
                for event in ray.get(self.actor.drain.remote(), timeout=TIMEOUT_S):
                    self._say(event)
            except GetTimeoutError:
                continue  # the actor is still starting, or the machine is busy
            except RayError:
                return


class Events:
    """The actor that holds events until the driver fetches them."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []

    def post(self, event: dict[str, Any]) -> None:
        """Keep an event."""
        self._events.append(event)

    def drain(self) -> list[dict[str, Any]]:
        """The events since the last call, oldest first."""
        events, self._events = self._events, []
        return events
