"""One core: the model alone, by the backends that could run it on a CPU, and what each costs before its first batch."""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.measuring import cpu_rates, ratio

ROUNDS = 5
BATCHES = (32, 64)
GRAY = {"height": 28, "width": 28, "channels": 1, "mean": [0.5], "std": [0.5]}
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "classic": (GRAY, 10),
    "mobilenet_v3_small": ({}, 1000),
    "resnet18": ({}, 1000),
}
"""The image spec, where it is not ImageNet's, and the classes of each."""
COMPILED = ("mobilenet_v3_small", 32)
"""torch.compile is measured with one model and batch size: each takes it about a minute."""


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Images per CPU second of each model, batch size and backend; seconds to export, to load and to compile."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # nothing is compiled already
        models = {name: _measure(name, *about) for name, about in MODELS.items()}
    return {"threads": 1, "onnxruntime": importlib.metadata.version("onnxruntime"), "models": models}


def _measure(name: str, spec: dict[str, Any], classes: int) -> dict[str, Any]:
    import numpy as np

    from raycnn.config import ImageSpec
    from raycnn.models import build

    classifier = build(name, classes, ImageSpec.model_validate(spec), seed=0).eval().requires_grad_(False)
    backends, seconds = _backends(classifier)
    shape = (classifier.spec.height, classifier.spec.width, classifier.spec.channels)
    pixels = np.random.default_rng(0).integers(0, 256, (max(BATCHES), *shape), np.uint8)
    result: dict[str, Any] = {"cpu_seconds": seconds}
    for size in BATCHES:
        batches = [pixels[:size]] * (20 if shape[0] < 100 else 1)
        calls = {backend: (call, batches) for backend, call in backends.items()}
        if (name, size) == COMPILED:
            with _timed(seconds, "torch.compile, frozen: first batch"):
                calls["torch.compile, frozen"] = _compiled(classifier, batches[0]), batches
        rates = {key: [round(r * size, 1) for r in rate] for key, rate in cpu_rates(calls, ROUNDS).items()}
        result[f"batch {size}"] = {
            "images_per_cpu_s": {key: round(statistics.median(rate), 1) for key, rate in rates.items()},
            "onnxruntime_to_channels_last": ratio(rates, "onnxruntime", "torch, channels_last"),
            "samples": rates,
        }
    return result


def _backends(classifier: Any) -> tuple[dict[str, Callable[[Any], object]], dict[str, float]]:
    """What takes pixels to logits, by name; and the CPU seconds that each takes to be ready."""
    from raycnn import bundle as bundles
    from raycnn.bundle.graph import graph_files
    from raycnn.predictor import Predictor

    about: dict[str, Any] = {
        "temperature": 1.0,
        "metrics": {},
        "validation": {},
        "samples": (),
        "data_fingerprint": None,
    }
    names = tuple(f"class {i}" for i in range(classifier.num_classes))
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        with _timed(seconds, "save the bundle"):
            bundle = bundles.save(folder, classifier, names, **about)
        with _timed(seconds, "load the bundle"):
            bundle = bundles.load(folder)
    with _timed(seconds, "of saving: the graph and its check"):
        graph_files(classifier, bundle.selftest, bundle.weights_sha256)
    with _timed(seconds, "onnxruntime: session and self-test"):
        fast = Predictor(bundle)
    plain = Predictor(dataclasses.replace(bundle, graph=None))
    backends = {
        "torch": lambda pixels: _forward(classifier, pixels),
        "torch, channels_last": plain.logits,
        "onnxruntime": fast.logits,
    }
    return backends, seconds


def _compiled(classifier: Any, pixels: Any) -> Callable[[Any], object]:
    """The classifier by torch.compile, its weights frozen into the code, after its first batch."""
    import torch
    from torch._inductor import config as inductor

    with inductor.patch(freezing=True, compile_threads=1):
        model = torch.compile(classifier, dynamic=False)
        _forward(model, pixels)
    return lambda pixels: _forward(model, pixels)


def _forward(model: Any, pixels: Any) -> object:
    import torch

    with torch.inference_mode():
        return model(torch.from_numpy(pixels))


@contextlib.contextmanager
def _timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    start = sum(os.times()[:4])  # this process and the compilers that it has started
    yield
    seconds[what] = round(sum(os.times()[:4]) - start, 2)
