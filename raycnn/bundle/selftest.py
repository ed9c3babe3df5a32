"""The self-test of a bundle: a few images, what becomes of them, and whether it still does."""

import hashlib
import io
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from raycnn import images
from raycnn.errors import Bad, BundleError, one_line
from raycnn.models import Classifier

EXPECTED = "selftest/expected.json"
SELFTEST_IMAGES = 8

TOLERANCE = 1e-3
"""How far a float32 logit may move, as a share of the logits' range."""
REDUCED_TOLERANCE = 5e-2
"""The same where the arithmetic has about half of float32's digits."""


@dataclass(frozen=True)
class SelfTest:
    """Pixels as this machine makes them from the bundle's images, and the logits seen when it was saved."""

    pixels: images.Pixels
    """(K, H, W, C)"""
    logits: Tensor
    """(K, classes) float32"""

    def difference(self, logits: Tensor, tolerance: float = TOLERANCE) -> str | None:
        """What differs from the saved logits by more than `tolerance` of their range, in words, or None.

        Another top class is a difference, unless the saved logits of the two are closer than the tolerance.
        """
        span = self.logits.max(dim=1).values - self.logits.min(dim=1).values
        allowed = tolerance * span + 1e-6 * self.logits.abs().max(dim=1).values
        moved = (logits - self.logits).abs().max(dim=1).values
        best, now = self.logits.argmax(dim=1, keepdim=True), logits.argmax(dim=1, keepdim=True)
        lead = (self.logits.gather(1, best) - self.logits.gather(1, now))[:, 0]
        # Negated, so that NaN fails.
        failed = (~(moved <= allowed) | ~(lead <= allowed)).nonzero().flatten().tolist()
        if not failed:
            return None
        i = failed[0]
        return (
            f"image {i}: a logit moved by {float(moved[i] / span[i].clamp(min=1e-12)):.2g} of the range, "
            f"{tolerance:g} is allowed, and the best class was {int(best[i])} and is {int(now[i])}"
        )


class _Expected(BaseModel):
    """One image of the self-test."""

    file: str
    pixels_sha256: str
    logits: list[float]


def _logits(classifier: Classifier, pixels: images.Pixels) -> Tensor:
    with torch.inference_mode():
        return classifier(torch.from_numpy(pixels)).float()


def selftest_files(classifier: Classifier, samples: Sequence[bytes]) -> tuple[dict[str, bytes], SelfTest]:
    """The self-test of a classifier (on the CPU, in evaluation mode): its files under their names, and what it is.

    Raises:
        BundleError: logits are not finite.
    """
    made = [(sample, images.pixels(sample, classifier.spec)) for sample in samples]
    good = [(sample, p) for sample, p in made if not isinstance(p, Bad)]
    if not good:
        drawn = ((image, images.pixels(image, classifier.spec)) for image in _drawn_images())
        good = [(image, p) for image, p in drawn if not isinstance(p, Bad)]
    good = good[:SELFTEST_IMAGES]
    stacked = np.stack([p for _, p in good])
    logits = _logits(classifier, stacked)
    if not bool(torch.isfinite(logits).all()):
        raise BundleError(f"{classifier.name}: its logits are not finite, so it is of no use; nothing was saved")
    files: dict[str, bytes] = {}
    expected: list[dict[str, Any]] = []
    for i, ((encoded, pixels), row) in enumerate(zip(good, logits, strict=True)):
        header = images.read_header(encoded)
        assert not isinstance(header, Bad)
        path = f"selftest/{i}.{header.format.lower()}"
        files[path] = encoded
        digest = hashlib.sha256(pixels.tobytes()).hexdigest()
        expected.append({"file": path, "pixels_sha256": digest, "logits": row.tolist()})
    files[EXPECTED] = (json.dumps(expected, indent=1, allow_nan=False) + "\n").encode()
    return files, SelfTest(stacked, logits)


def run_selftest(url: str, files: Mapping[str, bytes], classifier: Classifier, decoder: str | None) -> SelfTest:
    """Repeat the self-test in a bundle's `files`; `decoder` is what made the pixels when it was saved.

    Warns if this machine makes other pixels.

    Raises:
        BundleError: the self-test is unreadable, or it fails.
    """
    try:
        expected = [_Expected.model_validate(line) for line in json.loads(files[EXPECTED])]
        logits = torch.tensor([line.logits for line in expected])
    except (ValidationError, ValueError) as error:
        raise BundleError(f"{url}/{EXPECTED} is not readable: {one_line(error)}") from None
    if logits.ndim != 2 or logits.shape[1] != classifier.num_classes:
        raise BundleError(f"{url}/{EXPECTED} has logits for another number of classes")
    pixels: list[images.Pixels] = []
    moved = 0
    for line in expected:
        made = images.pixels(files.get(line.file), classifier.spec)
        if isinstance(made, Bad):
            raise BundleError(f"{url}/{line.file}: the self-test failed: {made.status}, {made.detail}")
        moved += hashlib.sha256(made.tobytes()).hexdigest() != line.pixels_sha256
        pixels.append(made)
    if moved:
        warnings.warn(
            f"{url}: {moved} of {len(pixels)} self-test images have other pixels here than where the bundle was "
            f"saved; decoders: {images.DECODER} here, {decoder} there",
            stacklevel=4,
        )
    selftest = SelfTest(np.stack(pixels), logits)
    if difference := selftest.difference(_logits(classifier, selftest.pixels)):
        raise BundleError(f"{url}: the self-test failed: {difference}; the bundle or an installed library changed")
    return selftest


def _drawn_images() -> list[bytes]:
    """Gradients, stripes and noise as PNG and JPEG: the same on every machine, for models without data."""
    from PIL import Image

    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:240, 0:320]
    drawings = [
        np.stack([x * 255 // 319, y * 255 // 239, (x + y) % 256], axis=2),
        np.stack([(x // 16 + y // 16) % 2 * 255, x % 64 * 4, np.full_like(x, 96)], axis=2),
        rng.integers(0, 256, (30, 40, 3)).repeat(8, axis=0).repeat(8, axis=1),
        rng.integers(0, 256, (240, 320, 3)),
    ]
    encoded: list[bytes] = []
    for drawing in drawings:
        for style in ("PNG", "JPEG"):
            file = io.BytesIO()
            Image.fromarray(drawing.astype(np.uint8)).save(file, style)
            encoded.append(file.getvalue())
    return encoded
