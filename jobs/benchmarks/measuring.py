"""What the benchmarks have in common: images to measure with, programs, timing in turns, and where it was measured."""

import contextlib
import importlib.metadata
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROUNDS = 9
RAYCNN = str(Path(sys.executable).with_name("raycnn"))


class Photos(NamedTuple):
    """What a benchmark measures with."""

    files: list[bytes]
    source: str
    """"folder" or "synthetic"."""


def photos_of(subject: str | None, count: int) -> Photos:
    """The JPEG files of a folder, or that many synthetic ones where none was given."""
    return Photos(jpegs(Path(subject)), "folder") if subject else Photos(synthetic_photos(count), "synthetic")


@contextlib.contextmanager
def local_s3(bucket: str) -> Iterator[None]:
    """An S3 server with an empty bucket for the programs of this process, each of which has a Ray of its own."""
    from raycnn.s3local import S3Server

    with S3Server() as server:
        os.environ.update(server.environment())
        os.environ["RAY_ADDRESS"], os.environ["RAY_USAGE_STATS_ENABLED"] = "local", "0"
        server.create_bucket(bucket)
        yield


@contextlib.contextmanager
def empty_cache() -> Iterator[None]:
    """No decoded images of runs before: with them a first epoch is like later ones, and reads no shard."""
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("XDG_CACHE_HOME")
        os.environ["XDG_CACHE_HOME"] = folder
        try:
            yield
        finally:
            del os.environ["XDG_CACHE_HOME"]
            if before is not None:
                os.environ["XDG_CACHE_HOME"] = before


def jpegs(folder: Path) -> list[bytes]:
    """The JPEG files below a folder."""
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg")]
    if not paths:
        raise SystemExit(f"no .jpg or .jpeg file below {folder}")
    return [path.read_bytes() for path in paths]


def synthetic_photos(count: int) -> list[bytes]:
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
        photos.append(encode(ycbcr, "JPEG", "YCbCr", quality=90))
    return photos


def encode(array: Any, form: str, mode: str | None = None, **options: Any) -> bytes:
    """The pixels (height, width[, channels]) as a file of a format of Pillow's."""
    from PIL import Image

    file = io.BytesIO()
    size = (array.shape[1], array.shape[0])
    Image.frombytes(mode or "L", size, array.tobytes()).save(file, form, **options)
    return file.getvalue()


def pack_demo_data(name: str, out: str, timeout_s: float = 600) -> None:
    """Pack `digits` or `fashion-mnist` as the demo does, in a process of its own, whose Ray ends with it."""
    from raycnn.config import DemoConfig, make
    from raycnn.demo.sources import find_source

    source = find_source(make(DemoConfig, {"data": name}))
    with tempfile.TemporaryDirectory() as folder:
        for path, content in source.files():
            file = Path(folder) / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        words = [word for key, value in source.pack.items() for word in (f"--{key}", str(value))]
        last_line([RAYCNN, "pack", folder, out, *words, "--json"], timeout_s)


def run_peer(name: str, told: Mapping[str, Any], timeout_s: float, *rest: str) -> Any:
    """What a program of `benchmarks.peers` prints last."""
    return last_line([sys.executable, "-m", f"benchmarks.peers.{name}", json.dumps(told), *rest], timeout_s)


def last_line(command: Sequence[str], timeout_s: float) -> Any:
    """The JSON that a program prints last; what it says otherwise is shown where it fails."""
    environment = os.environ | {"PYTHONPATH": python_path()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def python_path() -> str:
    """Where a program finds the benchmarks' modules, and what this process was given."""
    return os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])


def busy_s() -> float:
    """CPU seconds that all processes of this machine have used since it was started.

    Ray's workers are no children of the process that waits for them, so that only the whole can be told.
    """
    user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, _lines("/proc/stat")[0].split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median, and the least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def mean_and_std(values: Sequence[float]) -> dict[str, float]:
    """The mean, and the standard deviation of a sample of two or more."""
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def cpu_rates(
    tasks: Mapping[str, tuple[Callable[[Any], object], list[Any]]], rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """Calls per second of CPU time, task after task in turn, so that a busy machine slows all alike."""
    rates: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds + 1):
        for name, (call, items) in tasks.items():
            start = time.process_time()
            for item in items:
                call(item)
            rates[name].append(float(f"{len(items) / (time.process_time() - start):.4g}"))
    return {name: rate[1:] for name, rate in rates.items()}  # the first round warms up


def ratio(rates: Mapping[str, list[float]], of: str, to: str) -> float:
    """Median over the rounds, whose two parts ran within a second of each other."""
    return round(statistics.median(one / other for one, other in zip(rates[of], rates[to], strict=True)), 3)


def wall_seconds(tasks: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each call, task after task in turn; the first round warms up."""
    taken: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(ROUNDS + 1):
        for name, call in tasks.items():
            start = time.perf_counter()
            call()
            taken[name].append(round(time.perf_counter() - start, 4))
    return {name: times[1:] for name, times in taken.items()}


def where() -> dict[str, Any]:
    """The machine, the versions and the commit that a result belongs to."""
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
