"""The connection to Ray, quiet and checked, and the way of a worker's error back to its user."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from raycnn.data.board import Progress
from raycnn.data.budget import Node, Resources
from raycnn.errors import ConfigError, unwrap

LAUNCHED = "~/ray_bootstrap_config.yaml"
"""Where `ray up` puts the cluster's own description, on its head."""

UNSAFE_VARIABLES = (
    "RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA",
    "RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR",
    "RAY_DATA_AUTOLOAD_PYEXTENSIONTYPE",
    "RAY_DATA_WEBDATASET_ALLOW_UNSAFE_DESERIALIZATION",
)
"""Each re-opens a hole through which a data file runs code (CVE-2026-41486, CVE-2026-57516)."""


def connect(say: Progress | None = None) -> None:
    """Connect to the cluster of this job or machine, or start a local one; quietly, but for a note to `say`.

    Raises:
        ConfigError: a variable is set that lets data files run code.
    """
    for name in UNSAFE_VARIABLES:
        if os.environ.get(name):
            raise ConfigError(f"{name} is set, which lets a data file run code: unset it")
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not ray.is_initialized():
        if say is not None:
            say({"kind": "note", "text": _where(os.environ.get("RAY_ADDRESS"))})
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        except ConnectionError as error:
            raise ConfigError(f"cannot connect to Ray: {str(error).splitlines()[0]}; is RAY_ADDRESS right?") from None
        except ValueError:
            # An existing cluster refuses start-up options such as include_dashboard.
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
    _quiet()


def _where(address: str | None) -> str:
    if address == "local":
        return "starting Ray on this machine"
    return f"connecting to Ray at {address}" if address else "connecting to Ray, or starting it on this machine"


def _quiet() -> None:
    """One progress line of our own, instead of Ray Data's bars and banners; what fails is raised, and told once."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.train", "ray.serve"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def resources() -> tuple[Resources, Resources]:
    """What the cluster has now, and what its autoscaler may add up to."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    now = Resources(tuple(_node(offer) for offer in alive))
    return now, max(now, _most(), key=lambda r: (r.gpus, r.cpus))


def _node(offer: dict[str, float]) -> Node:
    return Node(offer.get("CPU", 0.0), offer.get("GPU", 0.0))


def _most() -> Resources:
    """The nodes that the cluster launcher's autoscaler may start, those with GPUs first.

    Ray tells a driver nothing of this: the launcher's file lies on the head, where jobs run. Of node types that
    exclude each other under the cluster's own `max_workers` the larger ones count.
    """
    file = Path(LAUNCHED).expanduser()
    if not file.is_file():
        return Resources(())
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    types: dict[str, Any] = config.get("available_node_types") or {}
    nodes: list[Node] = []
    for name, kind in types.items():
        count = 1 if name == config.get("head_node_type") else kind.get("max_workers", 0)
        nodes += [_node(kind.get("resources") or {})] * count
    nodes.sort(key=lambda node: (node.gpus, node.cpus), reverse=True)
    return Resources(tuple(nodes[: config.get("max_workers", 0)]))


@contextmanager
def user_errors() -> Iterator[None]:
    """Re-raise a RaycnnError that a worker raised as itself, without Ray's wrappers around it."""
    from ray.data.exceptions import SystemException
    from ray.exceptions import RayError, UserCodeException
    from ray.train import TrainingFailedError

    try:
        yield
    except (RayError, UserCodeException, SystemException, TrainingFailedError) as error:
        if (cause := unwrap(error)) is not None:
            raise cause from None
        raise
