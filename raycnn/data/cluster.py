"""The connection to Ray, quiet and checked, and the way of a worker's error back to its user."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from raycnn.data.budget import Resources
from raycnn.errors import ConfigError, unwrap

UNSAFE_VARIABLES = (
    "RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA",
    "RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR",
    "RAY_DATA_AUTOLOAD_PYEXTENSIONTYPE",
    "RAY_DATA_WEBDATASET_ALLOW_UNSAFE_DESERIALIZATION",
)
"""Each re-opens a hole through which a data file runs code (CVE-2026-41486, CVE-2026-57516)."""


def connect() -> None:
    """Connect to the cluster of this job or machine, or start a local one; quietly.

    Raises:
        ConfigError: a variable is set that lets data files run code.
    """
    for name in UNSAFE_VARIABLES:
        if os.environ.get(name):
            raise ConfigError(f"{name} is set, which lets a data file run code: unset it")
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not ray.is_initialized():
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        except ConnectionError as error:
            raise ConfigError(f"cannot connect to Ray: {str(error).splitlines()[0]}; is RAY_ADDRESS right?") from None
        except ValueError:
            # An existing cluster refuses start-up options such as include_dashboard.
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
    _quiet()


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
    from ray._private.state import state

    have = ray.cluster_resources()
    now = Resources(have.get("CPU", 0.0), have.get("GPU", 0.0))
    most = state.get_max_resources_from_cluster_config() or {}
    return now, Resources(max(now.cpus, most.get("CPU", 0)), max(now.gpus, most.get("GPU", 0)))


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
