"""What a pipeline tells the driver, where the terminal is: a worker's events, and what the cluster is short of."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

POLL_S = 0.5
TIMEOUT_S = 10

QUIET_S = 20.0
"""So long may nothing come of a pipeline before it is said what the cluster is short of."""
AGAIN_S = 60.0

Progress = Callable[[dict[str, Any]], None]
"""Takes the events of a verb: {"kind": "note" | "progress" | "epoch", ...}."""


class Waiting:
    """Breaks the silence of Ray Data and Ray Train while they wait for CPUs or GPUs that others hold."""

    def __init__(self, say: Progress) -> None:
        """Watch a pipeline whose events go to `say`, on a thread of its own."""
        self._say, self._over, self._due = say, threading.Event(), time.monotonic() + QUIET_S
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Waiting":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join(timeout=5)

    def moved(self) -> None:
        """Something came of the pipeline."""
        self._due = time.monotonic() + QUIET_S

    def _watch(self) -> None:
        from ray.exceptions import RayError

        while not self._over.wait(POLL_S):
            if time.monotonic() < self._due:
                continue
            with suppress(RayError):  # the cluster's head does not answer: that is said elsewhere
                if text := shortage():
                    self._due = time.monotonic() + AGAIN_S
                    self._say({"kind": "note", "text": text})


def shortage() -> str | None:
    """What the cluster has been asked for and cannot give now, as a line for a person; None where all is given."""
    import ray
    from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
    from ray.autoscaler.v2.sdk import get_cluster_resource_state

    state = get_cluster_resource_state(GcsClient(ray.get_runtime_context().gcs_address))
    asked = [one.request.resources_bundle for one in state.pending_resource_requests]
    asked += [one.resources_bundle for gang in state.pending_gang_resource_requests for one in gang.requests]
    for name in ("GPU", "CPU"):
        if wanted := max((bundle.get(name, 0.0) for bundle in asked), default=0.0):
            free, total = (have.get(name, 0.0) for have in (ray.available_resources(), ray.cluster_resources()))
            return (
                f"waiting for {wanted:g} {name}: the cluster has {free:g} of {total:g} free; "
                "this goes on when other work ends or a node is added"
            )
    return None


class Board:
    """Carries rank 0's events to the driver, where the terminal is."""

    def __init__(self, say: Progress) -> None:
        import ray

        self._say, self._over, self._waiting = say, threading.Event(), Waiting(say)
        self.actor: Any = ray.remote(num_cpus=0)(Events).remote()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Board":
        self._thread.start()
        self._waiting.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        import ray

        self._waiting.__exit__()
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
                    self._waiting.moved()
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
