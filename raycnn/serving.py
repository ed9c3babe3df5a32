"""`raycnn serve`: bundles behind HTTP, on Ray Serve.

    POST /v1/classify    an encoded image as the body  ->  label, class_name, probability, top_k
    GET  /v1/model       what is served
    GET  /livez /readyz  the process answers; the model has passed its self-test and predicted once

A bad image is answered 422 (413 if too large) with the same status word as in a label file, as a problem
document (RFC 9457). The endpoint has no authentication: put it behind something that has.
"""

# No `from __future__ import annotations` here: Ray Serve looks at the builder's annotation as a class.
import asyncio
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, cast

import numpy as np
import ray
import torch
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray import serve as ray_serve
from ray.exceptions import RayActorError, RayError

from raycnn import bundle as bundles
from raycnn import data
from raycnn.config import Limits, ServeConfig, absolute
from raycnn.errors import Bad, ConfigError, Status
from raycnn.images import Pixels
from raycnn.predictor import Predictor
from raycnn.storage import open_store

MAX_BATCH = 32
MAX_TOP_K = 100
DEFAULT_TOP_K = 5
DECODE_THREADS = 2
STOP_S = 30
"""So long may replicas take to answer what they have begun when the endpoint ends."""
SERVE = "serve"
"""The namespace of Ray Serve's own actors."""

_SLOW_START = {
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
}
"""The default of 5 s kills the HTTP proxy of a small, busy machine while it is still importing."""


@dataclass(frozen=True)
class ServeReport:
    """Where the endpoint was."""

    address: str
    models: dict[str, str]


class _Batcher:
    """Collects what has arrived while the model was busy; a lonely request never waits for company."""

    def __init__(self, run: Callable[[list[Pixels]], list[dict[str, Any]]]) -> None:
        self._run, self._queue = run, asyncio.Queue[tuple[Pixels, asyncio.Future[dict[str, Any]]]]()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="predict")
        self._task: asyncio.Task[None] | None = None

    async def submit(self, pixels: Pixels) -> dict[str, Any]:
        """The prediction for one image."""
        if self._task is None:
            self._task = asyncio.create_task(self._loop())
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((pixels, future))
        return await future

    async def _loop(self) -> None:
        while True:
            batch = [await self._queue.get()]
            while len(batch) < MAX_BATCH and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            batch = [(pixels, future) for pixels, future in batch if not future.done()]
            if batch:
                await self._answer([p for p, _ in batch], [f for _, f in batch])

    async def _answer(self, pixels: list[Pixels], futures: list[asyncio.Future[dict[str, Any]]]) -> None:
        loop = asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(self._thread, self._run, pixels)
        except RuntimeError as error:  # torch's; the loop must survive it, the requests are answered 500
            for future in futures:
                if not future.done():
                    future.set_exception(error)
            return
        for future, result in zip(futures, results, strict=True):
            if not future.done():
                future.set_result(result)


# These stand above the endpoint because `ingress` copies the routes, with the globals that there are by then.
def _bad_image(bad: Bad) -> JSONResponse:
    code = 413 if bad.status is Status.TOO_LARGE else 422
    return _problem(code, "the image cannot be classified", bad.detail, image_status=str(bad.status))


def _problem(code: int, title: str, detail: str, **more: str) -> JSONResponse:
    content = {"type": "about:blank", "title": title, "status": code, "detail": detail} | more
    return JSONResponse(content, status_code=code, media_type="application/problem+json")


web = FastAPI(title="raycnn", docs_url=None, redoc_url=None)


@web.exception_handler(RequestValidationError)
async def _bad_request(request: Request, error: Exception) -> JSONResponse:
    first = cast(RequestValidationError, error).errors()[0]
    return _problem(400, "bad request", f"{first['loc'][-1]}: {first['msg']}, got {first['input']!r}")


@ray_serve.deployment
@ray_serve.ingress(web)
class Endpoint:
    """One replica of one model: decodes in threads, predicts in batches."""

    def __init__(self, bundle: str, max_bytes: int) -> None:
        """Load the bundle, whose self-test runs here, and predict once, so that the first request is not slow."""
        loaded = bundles.load(bundle)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._predictor = Predictor(loaded, device, top_k=min(MAX_TOP_K, len(loaded.class_names)))
        self._limits = Limits(max_bytes=max_bytes)
        self._decoders = ThreadPoolExecutor(DECODE_THREADS, thread_name_prefix="decode")
        self._batcher = _Batcher(self._predict)
        self._blank = np.zeros((loaded.spec.height, loaded.spec.width, loaded.spec.channels), np.uint8)
        self._predict([self._blank])

    def _predict(self, pixels: list[Pixels]) -> list[dict[str, Any]]:
        predictions = self._predictor.predict(np.stack(pixels))
        names = self._predictor.bundle.class_names
        rows = zip(predictions.labels.tolist(), predictions.probabilities.tolist(), strict=True)
        return [
            {
                "top_k": [
                    {"label": label, "class_name": names[label], "probability": probability}
                    for label, probability in zip(labels, probabilities, strict=True)
                ]
            }
            for labels, probabilities in rows
        ]

    @web.post("/v1/classify")
    async def classify(
        self, request: Request, top_k: Annotated[int, Query(ge=1, le=MAX_TOP_K)] = DEFAULT_TOP_K
    ) -> JSONResponse:
        """Classify the image that is the request's body."""
        if request.headers.get("content-type", "").startswith("multipart/"):
            return _problem(415, "unsupported media type", "send the image itself as the body, not a form")
        encoded = await self._body(request)
        if encoded is None:
            return _bad_image(Bad(Status.TOO_LARGE, f"more than {self._limits.max_bytes} bytes"))
        loop = asyncio.get_running_loop()
        pixels = await loop.run_in_executor(self._decoders, self._predictor.prepare, encoded)
        if isinstance(pixels, Bad):
            return _bad_image(pixels)
        result = await self._batcher.submit(pixels)
        top = result["top_k"][:top_k]
        return JSONResponse({"status": str(Status.OK), **top[0], "top_k": top})

    async def _body(self, request: Request) -> bytes | None:
        """The body, or None as soon as it is known to be over the cap."""
        announced = request.headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > self._limits.max_bytes:
            return None
        chunks, size = [], 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > self._limits.max_bytes:
                return None
            chunks.append(chunk)
        return b"".join(chunks)

    @web.get("/v1/model")
    async def model(self) -> dict[str, Any]:
        """What is served."""
        bundle = self._predictor.bundle
        image = bundle.spec.model_dump(mode="json", include={"height", "width", "channels"})
        return {"class_names": list(bundle.class_names), "digest": bundle.digest, "image": image}

    @web.get("/livez")
    async def live(self) -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @web.get("/readyz")
    async def ready(self) -> dict[str, str]:
        """A replica answers only after its model has passed the self-test and predicted once."""
        return {"status": "ok"}

    async def check_health(self) -> None:
        """Called by Ray Serve: the model still predicts, in its turn."""
        await self._batcher.submit(self._blank)


def app(config: ServeConfig) -> ray_serve.Application:
    """The application of one bundle, for `serve run raycnn.serving:app bundle=DIR` and `serve deploy`.

    Each application is planned as if it had the cluster to itself. `serve run` builds it before it connects to a
    cluster, so there it takes a GPU if this machine has one for each replica.
    """
    models = named_bundles(config.bundle)
    if len(models) > 1:
        raise ConfigError("one application serves one bundle; list an application for each in the Serve file")
    if ray.is_initialized():
        limit = data.resources()[1]
    else:
        limit = data.Resources((data.Node(config.replicas, torch.cuda.device_count()),))
    return _application(next(iter(models.values())), config, data.plan_serving(1, config.replicas, limit))


def _application(bundle: str, config: ServeConfig, plan: data.ServePlan) -> ray_serve.Application:
    deployment: Any = Endpoint
    return deployment.options(
        num_replicas=config.replicas,
        max_ongoing_requests=2 * MAX_BATCH,
        max_queued_requests=config.max_queued,
        ray_actor_options={"num_cpus": plan.cpus, "num_gpus": plan.gpus},
        graceful_shutdown_timeout_s=5,
    ).bind(bundle, config.max_bytes)


def named_bundles(arguments: tuple[str, ...]) -> dict[str, str]:
    """Name -> bundle of `[NAME=]BUNDLE` arguments; without a name it is the last part of the path.

    Raises:
        ConfigError: two have one name.
    """
    found: dict[str, str] = {}
    for argument in arguments:
        # A path may hold an equals sign, too, as in s3://bucket/date=2026-01-01/bundle.
        named = re.fullmatch(r"([A-Za-z0-9_-]+)=(.*)", argument, re.DOTALL)
        url = absolute(named[2] if named else argument)
        name = named[1] if named else open_store(url).address().rpartition("/")[2]
        if name in found:
            raise ConfigError(f"two bundles are named {name!r}; give them names: --bundle NAME={url}")
        found[name] = url
    return found


def serve(config: ServeConfig) -> ServeReport:
    """Serve until Ctrl-C or SIGTERM. One bundle answers at `/`; of several, each at `/NAME`.

    Raises:
        ConfigError: the port is taken, the cluster has too few CPUs, or serves something already.
        BundleError: a bundle is altered.
    """
    if threading.current_thread() is not threading.main_thread():
        raise ConfigError(
            "serve: call it from the main thread, the only one that hears Ctrl-C and SIGTERM; "
            "from another one, deploy raycnn.serving.app by ray.serve.run"
        )
    models = named_bundles(config.bundle)
    for url in models.values():
        bundles.load(url)
    _check_port(config.host, config.port)
    os.environ.update({k: os.environ.get(k, v) for k, v in _SLOW_START.items()})
    data.connect(_say)
    _, limit = data.resources()
    plan = data.plan_serving(len(models), config.replicas, limit)
    if limit.gpus and not plan.gpus:
        wanted = len(models) * config.replicas
        _say({"text": f"predicting on CPUs: {wanted} replicas need a GPU each, the cluster has {limit.gpus:g}"})
    _check_idle()
    prefixes = {name: "/" if len(models) == 1 else f"/{name}" for name in models}
    try:
        with data.user_errors(), data.Waiting(_say):
            ray_serve.start(http_options={"host": config.host, "port": config.port})
            for name, url in models.items():
                _deploy(_application(url, config, plan), name, prefixes[name])
        address = f"http://{config.host}:{config.port}"
        for name, prefix in prefixes.items():
            print(f"ready {address}{prefix.rstrip('/')}/v1/classify {name}", file=sys.stderr, flush=True)
        _wait()
    finally:
        _stop()
    return ServeReport(address, models)


def _say(event: dict[str, Any]) -> None:
    print(event["text"], file=sys.stderr, flush=True)


def _check_idle() -> None:
    """Refuse a cluster that serves already: it listens elsewhere, and ending this would end that, too."""
    status = ray_serve.status()
    if status.applications or status.proxies:
        names = ", ".join(status.applications) or "nothing"
        raise ConfigError(
            f"this cluster runs Ray Serve already, with {names}: add the bundle to its `serve deploy` file, as "
            "raycnn.serving:app, or end it by `serve shutdown`"
        )


def _deploy(application: ray_serve.Application, name: str, prefix: str) -> None:
    """Return when every replica is ready.

    Raises:
        RayError: a replica does not start; it quotes what the replica raised, which Serve's own error leaves out.
    """
    try:
        ray_serve.run(application, name=name, route_prefix=prefix)
    except RuntimeError as error:
        deployments = ray_serve.status().applications[name].deployments.values()
        raise RayError("\n".join([str(error), *(deployment.message for deployment in deployments)])) from None


def _stop() -> None:
    """`ray.serve.shutdown` without the error line that Ray prints because the controller ends itself."""
    try:
        controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace=SERVE)
    except ValueError:  # it has not come so far
        return
    with suppress(RayActorError):
        ray.get(controller.graceful_shutdown.remote(wait=False))
    give_up = time.monotonic() + STOP_S
    while _serve_actors() and time.monotonic() < give_up:
        time.sleep(0.1)


def _serve_actors() -> list[Any]:
    named: list[Any] = ray.util.list_named_actors(all_namespaces=True)
    return [actor for actor in named if actor["namespace"] == SERVE]


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from None


def _wait() -> None:
    """Return on Ctrl-C or SIGTERM. A second one meets the handlers that were there before."""
    over = threading.Event()
    ends = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: over.set()) for number in ends}
    try:
        over.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
