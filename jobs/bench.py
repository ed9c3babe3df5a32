"""Measure what a claim about speed rests on, and leave the figures in a JSON file.

python jobs/bench.py images [FOLDER_OF_JPEGS] [--json jobs/results/images.json]
python jobs/bench.py storage [--json jobs/results/storage.json]

`storage` starts an S3 server of its own on this machine and compares the clients that could have been used.
"""

import argparse
import importlib.metadata
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROUNDS = 9
OBJECT_BYTES = 64 * 1024 * 1024
KEYS = 4096
RACERS = 16


def images(folder: str | None) -> dict[str, Any]:
    """One core: bare JPEG decoding, `raycnn.images.pixels`, and torchvision's usual transform."""
    import numpy as np
    import simplejpeg
    import torch
    from PIL import Image
    from torchvision.transforms import v2

    from raycnn.config import ImageSpec
    from raycnn.images import pixels

    torch.set_num_threads(1)
    files = _jpegs(Path(folder)) if folder else _synthetic_photos(48)
    usual = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()])
    spec = ImageSpec.model_validate({})
    rng = np.random.default_rng(0)
    blobs = [np.outer(*rng.integers(0, 16, (2, 28))).astype(np.uint8) for _ in files]
    small = {"height": 28, "width": 28, "channels": 1, "crop": 1, "mean": [0.5], "std": [0.5]}
    digit = ImageSpec.model_validate(small)
    rates = _rates(
        {
            "simplejpeg.decode_jpeg": (simplejpeg.decode_jpeg, files),
            "pixels": (lambda file: pixels(file, spec), files),
            "pillow + torchvision": (lambda file: usual(Image.open(io.BytesIO(file)).convert("RGB")), files),
            "pixels, 28x28 PNG": (lambda file: pixels(file, digit), [_encode(blob, "PNG") for blob in blobs]),
        }
    )
    return {
        "files": {"count": len(files), "mean_bytes": round(statistics.mean(map(len, files)))},
        "source": "folder" if folder else "synthetic",
        "images_per_cpu_s": {name: round(statistics.median(rate), 1) for name, rate in rates.items()},
        "pixels_to_bare_decode": _ratio(rates, "pixels", "simplejpeg.decode_jpeg"),
        "pixels_to_pillow_torchvision": _ratio(rates, "pixels", "pillow + torchvision"),
        "samples": rates,
    }


def _jpegs(folder: Path) -> list[bytes]:
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg")]
    if not paths:
        raise SystemExit(f"no .jpg or .jpeg file below {folder}")
    return [path.read_bytes() for path in paths]


def _synthetic_photos(count: int) -> list[bytes]:
    """JPEGs of 500 x 375 px and about 75 KB: noise that falls with frequency as it does in photos."""
    import numpy as np

    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(375)[:, None], np.fft.rfftfreq(500)[None, :])
    frequency[0, 0] = 1
    photos = []
    for _ in range(count):
        spectra = np.fft.rfft2(rng.normal(size=(3, 375, 500))) / frequency**1.35
        planes = np.fft.irfft2(spectra, (375, 500))
        planes *= np.array([50, 15, 15])[:, None, None] / planes.std(axis=(1, 2), keepdims=True)
        ycbcr = np.clip(128 + planes.transpose(1, 2, 0), 0, 255).astype(np.uint8)
        photos.append(_encode(ycbcr, "JPEG", "YCbCr", quality=90))
    return photos


def _encode(array: Any, form: str, mode: str | None = None, **options: Any) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    size = (array.shape[1], array.shape[0])
    Image.frombytes(mode or "L", size, array.tobytes()).save(file, form, **options)
    return file.getvalue()


def _rates(tasks: Mapping[str, tuple[Callable[[Any], object], list[Any]]]) -> dict[str, list[float]]:
    """Calls per second of CPU time, task after task in turn, so that a busy machine slows all alike."""
    rates: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(ROUNDS + 1):
        for name, (call, items) in tasks.items():
            start = time.process_time()
            for item in items:
                call(item)
            rates[name].append(round(len(items) / (time.process_time() - start), 1))
    return {name: rate[1:] for name, rate in rates.items()}  # the first round warms up


def _ratio(rates: Mapping[str, list[float]], of: str, to: str) -> float:
    """Median over the rounds, whose two parts ran within a second of each other."""
    return round(statistics.median(one / other for one, other in zip(rates[of], rates[to], strict=True)), 3)


def storage(_: str | None) -> dict[str, Any]:
    """One local S3 server: reading one large object, listing many keys, and creating one key in a race."""
    from concurrent.futures import ThreadPoolExecutor

    import obstore
    import pyarrow.fs

    from raycnn.s3local import S3Server
    from raycnn.storage import fsspec_filesystem, open_store

    with S3Server() as server:
        os.environ.update(server.environment())
        server.create_bucket("bench")
        store = open_store("s3://bench/bench")
        store.put("large", os.urandom(OBJECT_BYTES))
        with ThreadPoolExecutor(RACERS) as pool:
            list(pool.map(lambda i: store.put(f"keys/{i % 7}/{i:06d}.jpg", b"x"), range(KEYS)))
            races = [sum(pool.map(lambda _, r=r: store.create(f"race/{r}", b"x"), range(RACERS))) for r in range(60)]
        bare = obstore.store.S3Store(
            "bench", endpoint=server.endpoint, client_options={"allow_http": True}, virtual_hosted_style_request=False
        )
        arrow = pyarrow.fs.S3FileSystem(
            access_key=server.access_key, secret_key=server.secret_key, endpoint_override=server.endpoint
        )
        s3fs, _ = fsspec_filesystem("s3://bench/bench")
        below = pyarrow.fs.FileSelector("bench/bench/keys", recursive=True)
        reads = _durations(
            {
                "raycnn.storage": lambda: store.get("large"),
                "pyarrow": lambda: arrow.open_input_file("bench/bench/large").read(),
                "s3fs": lambda: s3fs.cat_file("bench/bench/large"),
            }
        )
        lists = _durations(
            {
                "raycnn.storage": lambda: list(store.list("keys/")),
                "obstore": lambda: [e for page in bare.list("bench/keys/") for e in page],
                "pyarrow, without ETags": lambda: arrow.get_file_info(below),
                "s3fs": lambda: s3fs.find("bench/bench/keys", detail=True),
            }
        )
    megabytes = OBJECT_BYTES / 1e6
    return {
        "object_bytes": OBJECT_BYTES,
        "keys": KEYS,
        "read_mb_per_s": {name: round(megabytes / statistics.median(taken), 1) for name, taken in reads.items()},
        "list_keys_per_s": {name: round(KEYS / statistics.median(taken)) for name, taken in lists.items()},
        "races": {"creators": RACERS, "rounds": len(races), "rounds_with_one_winner": races.count(1)},
        "samples_s": {"read": reads, "list": lists},
    }


def _durations(tasks: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each call, task after task in turn; the first round warms up."""
    taken: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(ROUNDS + 1):
        for name, call in tasks.items():
            start = time.perf_counter()
            call()
            taken[name].append(round(time.perf_counter() - start, 4))
    return {name: times[1:] for name, times in taken.items()}


BENCHMARKS: dict[str, Callable[[str | None], dict[str, Any]]] = {"images": images, "storage": storage}


def _where() -> dict[str, Any]:
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    git = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    packages = ("raycnn", "numpy", "pillow", "simplejpeg", "torch", "torchvision", "obstore", "pyarrow", "s3fs")
    return {
        "cpu": cpu or platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "commit": commit or None,
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("folder", nargs="?", help="real files, instead of synthetic ones")
    parser.add_argument("--json", metavar="FILE", help="also write the result here")
    arguments = parser.parse_args()
    report = {"benchmark": arguments.benchmark, **BENCHMARKS[arguments.benchmark](arguments.folder), **_where()}
    text = json.dumps(report, indent=2)
    if arguments.json:
        Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.json).write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")
