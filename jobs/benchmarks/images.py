"""One core: bare JPEG decoding, `raycnn.images.pixels`, and torchvision's usual transform."""

import argparse
import io
import statistics
from typing import Any

from benchmarks.measuring import cpu_rates, encode, photos_of, ratio


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """One core: bare JPEG decoding, `raycnn.images.pixels`, and torchvision's usual transform."""
    import numpy as np
    import simplejpeg
    import torch
    from PIL import Image
    from torchvision.transforms import v2

    from raycnn.config import ImageSpec
    from raycnn.images import pixels

    torch.set_num_threads(1)
    files, source = photos_of(arguments.subject, 48)
    usual = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()])
    spec = ImageSpec.model_validate({})
    rng = np.random.default_rng(0)
    blobs = [np.outer(*rng.integers(0, 16, (2, 28))).astype(np.uint8) for _ in files]
    small = {"height": 28, "width": 28, "channels": 1, "crop": 1, "mean": [0.5], "std": [0.5]}
    digit = ImageSpec.model_validate(small)
    rates = cpu_rates(
        {
            "simplejpeg.decode_jpeg": (simplejpeg.decode_jpeg, files),
            "pixels": (lambda file: pixels(file, spec), files),
            "pillow + torchvision": (lambda file: usual(Image.open(io.BytesIO(file)).convert("RGB")), files),
            "pixels, 28x28 PNG": (lambda file: pixels(file, digit), [encode(blob, "PNG") for blob in blobs]),
        }
    )
    return {
        "files": {"count": len(files), "mean_bytes": round(statistics.mean(map(len, files)))},
        "source": source,
        "images_per_cpu_s": {name: round(statistics.median(rate), 1) for name, rate in rates.items()},
        "pixels_to_bare_decode": ratio(rates, "pixels", "simplejpeg.decode_jpeg"),
        "pixels_to_pillow_torchvision": ratio(rates, "pixels", "pillow + torchvision"),
        "samples": rates,
    }
