"""Encoded bytes to pixels, pixels to predictions: what evaluation, labeling and serving have in common."""

import copy
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raycnn import images
from raycnn.bundle import REDUCED_TOLERANCE, Bundle, Session
from raycnn.config import FLOAT16, precision_on
from raycnn.errors import Bad, BundleError
from raycnn.metrics import top_classes


@dataclass(frozen=True)
class Predictions:
    """The k best classes of N images, best first."""

    labels: npt.NDArray[np.int64]
    """(N, k)"""
    probabilities: npt.NDArray[np.float32]
    """(N, k), calibrated with the bundle's temperature."""
    embeddings: npt.NDArray[np.float16] | None = None
    """(N, D), what the layer that casts the votes is given, where it was asked for; always finite."""


class Predictor:
    """A bundle, ready to predict on one device. Not for use by two threads at once."""

    def __init__(self, bundle: Bundle, device: str = "cpu", top_k: int = 5) -> None:
        """Choose the fastest backend of the device that passes the bundle's self-test there.

        On CPUs that is ONNX Runtime with torch's number of threads, else torch; on CUDA torch in float16, else in
        float32. `backend` says which, and why it is not the faster one. `top_k` is the number of classes that a
        prediction lists: all of them if there are fewer.

        Raises:
            BundleError: this device computes other logits.
        """
        self.bundle, self.top_k = bundle, min(top_k, len(bundle.class_names))
        self._backend = _on_cpu(bundle) if torch.device(device).type == "cpu" else _on_accelerator(bundle, device)
        self.backend = self._backend.name

    def prepare(self, encoded: bytes | None) -> images.Pixels | Bad:
        """The model's pixels (H, W, C) for an encoded image, or why there are none."""
        return images.pixels(encoded, self.bundle.spec)

    def logits(self, batch: images.Pixels) -> Tensor:
        """Uncalibrated float32 logits (N, classes), on the CPU, for pixels (N, H, W, C); N may be 0.

        An image's logits do not depend on the others in its batch, but for the last digits.

        Raises:
            ValueError: the pixels are not uint8 or do not have the model's shape.
        """
        return self._run(batch, with_embeddings=False)[0]

    def predict(self, batch: images.Pixels, with_embeddings: bool = False) -> Predictions:
        """The best classes for pixels (N, H, W, C), in the batch's order; N may be 0.

        Raises:
            ValueError: the pixels are not uint8 or do not have the model's shape.
        """
        logits, embeddings = self._run(batch, with_embeddings)
        labels = top_classes(logits, self.top_k)
        probabilities = torch.softmax(logits / self.bundle.temperature, dim=1).gather(1, labels)
        largest = torch.finfo(torch.float16).max
        half = None if embeddings is None else embeddings.clamp(-largest, largest).to(torch.float16).numpy()
        return Predictions(labels.numpy(), probabilities.numpy(), half)

    def _run(self, batch: images.Pixels, with_embeddings: bool) -> tuple[Tensor, Tensor | None]:
        spec = self.bundle.spec
        shape = (spec.height, spec.width, spec.channels)
        if batch.dtype != np.uint8 or batch.shape[1:] != shape:
            raise ValueError(
                f"expected uint8 pixels (N, {shape[0]}, {shape[1]}, {shape[2]}), got {batch.dtype} {batch.shape}"
            )
        if not len(batch):
            none = torch.zeros((0, self.bundle.classifier.embedding_size)) if with_embeddings else None
            return torch.zeros((0, len(self.bundle.class_names))), none
        return self._backend(batch, with_embeddings)


class _Torch:
    """A bundle's classifier on a device, in channels_last; called like a `Session`."""

    def __init__(self, bundle: Bundle, device: str, dtype: torch.dtype = torch.float32) -> None:
        on_cpu = torch.device(device).type == "cpu"
        classifier = bundle.classifier if on_cpu else copy.deepcopy(bundle.classifier)
        self._classifier = classifier.to(device, dtype).to(memory_format=torch.channels_last)  # pyright: ignore
        self._device = device
        self.name = f"torch {torch.__version__} {device}" + (f" {FLOAT16}" if dtype == torch.float16 else "")

    @torch.inference_mode()
    def __call__(self, pixels: images.Pixels, with_embeddings: bool = False) -> tuple[Tensor, Tensor | None]:
        # torch warns about arrays that it could not write to, which is what Ray's object store hands out.
        batch = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).to(self._device)
        if not with_embeddings:
            return self._classifier(batch).float().cpu(), None
        logits, embeddings = self._classifier.votes_and_embeddings(batch)
        return logits.float().cpu(), embeddings.float().cpu()


def _on_cpu(bundle: Bundle) -> Session | _Torch:
    """ONNX Runtime if it can; the bundle's own self-test was in torch on the CPU."""
    if bundle.graph is None:
        return _Torch(bundle, "cpu")
    try:
        session = Session(bundle.graph, bundle.weights_sha256, torch.get_num_threads())
        session.check(bundle.selftest)
    except BundleError as error:
        backend = _Torch(bundle, "cpu")
        backend.name += f" ({error})"
        return backend
    return session


def _on_accelerator(bundle: Bundle, device: str) -> _Torch:
    """Half precision where labels are held to that; accelerators convolve float32 in about as few digits (TF32)."""
    dtypes = (torch.float16, torch.float32) if precision_on(device) == FLOAT16 else (torch.float32,)
    moved = None
    for dtype in dtypes:
        backend = _Torch(bundle, device, dtype)
        moved = bundle.selftest.difference(backend(bundle.selftest.pixels)[0], REDUCED_TOLERANCE)
        if not moved:
            return backend
    raise BundleError(f"{bundle.url}: the self-test failed on {device}: {moved}")
