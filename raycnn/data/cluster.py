"""The connection to Ray, quiet and checked, and the way of a worker's error back to its user."""

import importlib
import logging
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import yaml

from raycnn.data.board import Progress
from raycnn.data.budget import Node, Resources
from raycnn.errors import ConfigError, RaycnnError, StorageError, unwrap

LAUNCHED = "~/ray_bootstrap_config.yaml"
"""Where `ray up` puts the cluster's own description, on its head."""

MAX_WARM = 64

ANSWER_S = 20
"""So long may the head of a busy cluster take to answer; where nobody listens the answer is immediate."""

UNSAFE_VARIABLES = (
    "RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA",
    "RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR",
    "RAY_DATA_AUTOLOAD_PYEXTENSIONTYPE",
    "RAY_DATA_WEBDATASET_ALLOW_UNSAFE_DESERIALIZATION",
)
"""Each re-opens a hole through which a data file runs code (CVE-2026-41486, CVE-2026-57516)."""


T = TypeVar("T")


def connect(say: Progress | None = None) -> None:
    """Connect to the cluster of this job or machine, or start a local one; quietly, but for a note to `say`.

    Raises:
        ConfigError: the cluster does not answer, or wants a token; or a variable is set that lets data files run code.
    """
    for name in UNSAFE_VARIABLES:
        if os.environ.get(name):
            raise ConfigError(f"{name} is set, which lets a data file run code: unset it")
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not ray.is_initialized():
        _start_or_join(_running(), say)
    _quiet()


def call_early(function: Callable[[str], T], argument: str, module: str) -> T:
    """What a function returns, which is called in a worker and may import torch, so that the driver need not.

    Meanwhile others import the module with which all of them will work.
    """
    import ray

    result = ray.remote(num_cpus=0)(function).remote(argument)  # which need not wait for a CPU
    warm_up([module], int(ray.available_resources().get("CPU", 0)) - 1, cpus=1)
    with user_errors():
        return ray.get(result)


def warm_up(modules: Sequence[str], count: int, cpus: float, environment: Mapping[str, str] | None = None) -> None:
    """Start so many processes for the tasks that are to come in this environment, which import what these will need.

    Two actors for which Ray Data and Ray Train wait start as well: from here they take processes that Ray has in store.
    """
    import ray
    from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator
    from ray.data._internal.stats import get_or_create_stats_actor

    options: dict[str, Any] = {"runtime_env": {"env_vars": dict(environment)}} if environment else {}
    get_or_create_autoscaling_coordinator()
    task = ray.remote(num_cpus=cpus, **options)(_import)
    for _ in range(min(count, MAX_WARM)):
        task.options(name="warm up").remote(modules)
    get_or_create_stats_actor()


def _import(modules: Sequence[str]) -> None:
    for module in modules:
        importlib.import_module(module)


def is_connected() -> bool:
    """Whether this process has a cluster already."""
    import ray

    return ray.is_initialized()


@contextmanager
def session() -> Iterator[None]:
    """Disconnect at the end, which ends a cluster that was started inside; not from one that was there before."""
    import ray

    was_connected = is_connected()
    try:
        yield
    finally:
        if not was_connected:
            ray.shutdown()


def _start_or_join(head: str | None, say: Progress | None) -> None:
    import ray

    is_token_wanted = head is not None and _wants_token(head)
    if say is not None:
        say({"kind": "note", "text": f"connecting to Ray at {head}" if head else "starting Ray on this machine"})
    # Where a token file lies, Ray sends the token to the cluster that it finds by itself, wanted or not; one that
    # has none then never answers the driver. An address that it is given keeps it from that.
    address = None if is_token_wanted else head
    before = signal.getsignal(signal.SIGTERM)
    try:
        with nullcontext() if head else _interrupted_later():
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except ConnectionError as error:
        raise ConfigError(f"cannot connect to Ray: {str(error).splitlines()[0]}; {_remedy(is_token_wanted)}") from None
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)  # Ray has put its own in place, which prints its stack


@contextmanager
def _interrupted_later() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait the seconds until Ray is up: a half-started one leaves its agents behind for minutes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in found.items() if handler not in (None, signal.SIG_IGN)}
    for number in before:
        signal.signal(number, lambda number, _: waiting.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if waiting:
        signal.raise_signal(waiting[0])


def _running() -> str | None:
    """The head of the cluster that Ray would connect to: HOST:PORT; None where it would start one."""
    from ray._private.services import find_bootstrap_address

    named = os.environ.get("RAY_ADDRESS")
    if not named or named == "auto":
        return find_bootstrap_address(None) or None
    if named == "local":
        return None
    if not re.fullmatch(r".+:\d+", named) or "://" in named:
        raise ConfigError(
            f"RAY_ADDRESS is {named}, and should be HOST:PORT of a cluster's head, such as 10.0.0.5:6379, or local. "
            "To work in a cluster from outside: ray job submit --address http://HEAD:8265 -- python jobs/VERB.py ..."
        )
    return named


def _wants_token(head: str) -> bool:
    """Whether the cluster asks for a token; asked without one, which takes milliseconds where Ray takes minutes.

    Raises:
        ConfigError: nobody answers there, or what `RAY_AUTH_MODE` says does not suit the cluster.
    """
    import grpc

    mode = os.environ.get("RAY_AUTH_MODE")
    if os.environ.get("RAY_USE_TLS") == "1":
        return mode == "token"
    is_wanted = False
    with grpc.insecure_channel(head, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")(b"", timeout=ANSWER_S)
        except grpc.RpcError as error:
            reply: Any = error
            is_wanted = reply.code() is grpc.StatusCode.UNAUTHENTICATED
            if not is_wanted:
                raise ConfigError(f"no Ray cluster answers at {head}; {_remedy(False)}") from None
    if is_wanted and mode != "token" and (mode or os.environ.get("RAY_ADDRESS")):
        raise ConfigError(f"the Ray cluster at {head} wants a token; {_remedy(True)}")
    if mode == "token" and not is_wanted:
        raise ConfigError(f"RAY_AUTH_MODE=token is set, and the Ray cluster at {head} knows no tokens: unset it")
    return is_wanted


def _remedy(is_token_wanted: bool) -> str:
    if is_token_wanted:
        return "set RAY_AUTH_MODE=token, and have its token in ~/.ray/auth_token or RAY_AUTH_TOKEN"
    if os.environ.get("RAY_ADDRESS"):
        return "is it running, and RAY_ADDRESS right?"
    return "the one that `ray start` began here is gone: start it again, or set RAY_ADDRESS=local to do without"


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
            raise _placed(cause) from None
        raise


def _placed(cause: RaycnnError) -> RaycnnError:
    """A worker's trouble with the store says that it is a worker's: this process may have other credentials."""
    import ray

    if type(cause) is not StorageError or not is_connected() or _is_own_cluster():
        return cause
    where = f"the Ray cluster at {ray.get_runtime_context().gcs_address}"
    return StorageError(f"{cause} (on a node of {where}: it has the environment in which Ray was started there)")


def _is_own_cluster() -> bool:
    """Whether this process has started the cluster that it is connected to, which ends with it."""
    from ray._private.worker import _global_node

    return _global_node is not None and _global_node.is_head()
