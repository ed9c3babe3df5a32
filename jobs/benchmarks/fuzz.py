"""A million damaged files through `raycnn.images.pixels`: what they become, and whether anything else happens."""

import argparse
import importlib
import logging
import multiprocessing
import os
import random
import resource
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterable
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawArray, RawValue
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import encode, synthetic_photos
from raycnn.config import ImageSpec
from raycnn.errors import Bad, Status
from raycnn.images import decode, pixels, prepare_to_resize
from raycnn.images.isolated import DECODE_TIMEOUT_S

INPUTS = 1_000_000
SEED = 20261124
PROCESSES = 2
MEMORY = 3 << 30  # bytes that a process may take for images

_SLOW_CPU_S = 1.0
_LARGE = 16 << 10  # bytes; larger files are drawn less often
_SPECS = [
    ImageSpec.model_validate({"height": 32, "width": 40}),
    ImageSpec.model_validate({"height": 28, "width": 28, "channels": 1, "mean": [0.5], "std": [0.5]}),
]


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """A million damaged files through `raycnn.images.pixels`, and the matrix of hazards."""
    del arguments
    with warnings.catch_warnings(action="ignore"):
        return {**campaign(INPUTS), "hazards": matrix()}


def matrix() -> dict[str, str]:
    """File name -> status of each hazard; with what was expected instead, where it is another."""
    found = {}
    for name, hazard in _hazards().hazards().items():
        image = decode(hazard.encoded, 3)
        status = image.status if isinstance(image, Bad) else Status.OK
        found[name] = str(status) if status == hazard.status else f"{status}, expected {hazard.status}"
    return found


def campaign(inputs: int) -> dict[str, Any]:
    """Attack in processes that may die, and sum up what they met."""
    start = time.perf_counter()
    lanes = [_Lane(range(first, inputs, PROCESSES)) for first in range(PROCESSES)]
    while sum(lane.go_on() for lane in lanes):  # any() would look after the first only
        time.sleep(0.2)
    tallies = [lane.tally for lane in lanes]
    counts = {name: sum(tally.counts[at] for tally in tallies) for at, name in enumerate(COUNTED)}
    slowest = max(tallies, key=lambda tally: tally.slowest_s.value)
    cpu_s = sum(tally.cpu_s.value for tally in tallies)
    return {
        "inputs": inputs,
        "seed": SEED,
        "processes": PROCESSES,
        "sources": {"files": len(sources()), "bytes": sum(map(len, sources()))},
        "status": {status: counts[status] for status in Status if counts[status]},
        "uncaught": counts["uncaught"],
        "crashed": sum(lane.crashed for lane in lanes),
        f"over_{DECODE_TIMEOUT_S:g}_s": sum(lane.hung for lane in lanes),
        f"over_{_SLOW_CPU_S:g}_cpu_s": counts["slow"],
        "slowest": {"input": slowest.slowest.value, "cpu_s": round(slowest.slowest_s.value, 2)},
        "peak_rss_mib": max(tally.peak_kib.value for tally in tallies) >> 10,
        "inputs_per_cpu_s": round(inputs / cpu_s),
        "seconds": round(time.perf_counter() - start),
    }


# The inputs: each is a function of the seed and its number


def sources() -> list[bytes]:
    """The files to damage: the hazards, pictures in each format, and photos."""
    if not _SOURCES:
        rng = np.random.default_rng(SEED)
        noise = rng.integers(0, 256, (16, 16, 3)).repeat(4, axis=0).repeat(4, axis=1).astype(np.uint8)
        forms = [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("WEBP", {"lossless": True})]
        forms += [("GIF", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})]
        forms += [("TIFF", {"compression": "tiff_adobe_deflate"}), ("TIFF", {"compression": "jpeg"})]
        hazards = [hazard.encoded for hazard in _hazards().hazards().values() if 0 < len(hazard.encoded) < 1 << 18]
        pictures = [encode(noise[:side, :side], form, "RGB", **options) for form, options in forms for side in (24, 64)]
        _SOURCES.extend(sorted([*hazards, *pictures, *synthetic_photos(2)], key=len))
    return _SOURCES


_SOURCES: list[bytes] = []


def damaged(index: int) -> bytes:
    """Input number `index`."""
    rng = random.Random(SEED << 32 | index)
    data = bytearray(_source(rng))
    signature = data[:4]
    for _ in range(rng.choice((1, 1, 1, 1, 2, 2, 4, 9))):
        rng.choice(_MUTATIONS)(rng, data)
    if rng.random() < 0.8:  # without it no decoder is asked
        data[:4] = signature
    if data.startswith(b"\x89PNG") and rng.random() < 0.7:
        _mend_checksums(data)
    return bytes(data)


def _hazards() -> Any:
    tests = str(Path(__file__).parents[2] / "tests")
    if tests not in sys.path:
        sys.path.append(tests)
    return importlib.import_module("hazards")


def _source(rng: random.Random) -> bytes:
    files = sources()
    small = sum(len(file) < _LARGE for file in files)
    return files[rng.randrange(small if rng.random() < 0.98 else len(files))]


def _place(rng: random.Random, data: bytearray) -> int:
    """Where to strike: mostly near the start, where headers are."""
    return rng.randrange(min(len(data), rng.choice((40, 200, 700, 1 << 30, 1 << 30))) or 1)


def _flip_bits(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 2, 8)) if data else 0):
        data[_place(rng, data)] ^= 1 << rng.randrange(8)


def _overwrite(rng: random.Random, data: bytearray) -> None:
    at, length = _place(rng, data), rng.choice((1, 2, 4, 16, 60))
    data[at : at + length] = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))


def _insert(rng: random.Random, data: bytearray) -> None:
    at = _place(rng, data)
    data[at:at] = rng.randbytes(rng.choice((1, 2, 4, 30)))


def _delete(rng: random.Random, data: bytearray) -> None:
    at = _place(rng, data)
    del data[at : at + rng.choice((1, 2, 4, 30, 300))]


def _truncate(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data) or 1) :]


def _splice(rng: random.Random, data: bytearray) -> None:
    other = _source(rng)
    del data[rng.randrange(len(data) or 1) :]
    data += other[rng.randrange(len(other)) :]


def _set_number(rng: random.Random, data: bytearray) -> None:
    """A number that is small, or next to where a type ends, as a size, a count, an offset or a type."""
    layout = rng.choice(("B", "<H", ">H", "<I", ">I"))
    bits = 8 * struct.calcsize(layout)
    number = rng.choice((0, 1, 2, 3, 7, 64, 255, 256, 1000, -1, -2, 1 << bits - 1, (1 << bits - 1) - 1)) % (1 << bits)
    at = _place(rng, data)
    if at + bits // 8 <= len(data):
        struct.pack_into(layout, data, at, number)


def _repeat(rng: random.Random, data: bytearray) -> None:
    """A piece comes again, at once or elsewhere; it starts with what marks chunks and segments, where there is one."""
    at = _place(rng, data)
    mark = data.find(rng.choice((b"\xff", b"\0\0", b"ID", b"VP8", b"\x21", b"\x2c")), at)
    at = at if mark < 0 else mark
    piece = data[at : at + rng.choice((4, 12, 20, 70, 300))] * rng.choice((1, 1, 2, 50))
    to = rng.choice((at, _place(rng, data)))
    data[to:to] = piece


_MUTATIONS: list[Callable[[random.Random, bytearray], None]] = [
    *(_flip_bits, _flip_bits, _overwrite, _insert, _delete, _truncate, _splice, _set_number, _set_number, _repeat)
]


def _mend_checksums(png: bytearray) -> None:
    """Damage that the checksums of its chunks give away would not reach the decoder."""
    at = 8
    while at + 12 <= len(png):
        end = at + 8 + int.from_bytes(png[at : at + 4], "big")
        if end + 4 > len(png):
            return
        struct.pack_into(">I", png, end, zlib.crc32(png[at + 4 : end]))
        at = end + 4


# The attack

COUNTED = [*Status, "uncaught", "slow"]
"""What became of an input; and that it took more than a second of CPU."""


class Tally:
    """What was met so far, in memory that outlives the process that counts."""

    def __init__(self) -> None:
        self.at = RawValue("q", -1)
        self.counts = RawArray("q", len(COUNTED))
        self.slowest = RawValue("q", -1)
        self.slowest_s = RawValue("d", 0)
        self.cpu_s = RawValue("d", 0)
        self.peak_kib = RawValue("q", 0)

    def count(self, name: str) -> None:
        """One more of a status or of what must not happen."""
        self.counts[COUNTED.index(name)] += 1


def attack(indices: Iterable[int], tally: Tally) -> None:
    """Make pixels of each input, and count what comes of it."""
    last = time.process_time()
    for index in indices:
        tally.at.value = index
        encoded = damaged(index)
        start = time.process_time()
        try:
            tally.count(_outcome(encoded, _SPECS[index // PROCESSES % 2]))
        except Exception:  # noqa: BLE001 - each is a finding
            tally.count("uncaught")
            _save(index, traceback.format_exc())
        end = time.process_time()
        if end - start > _SLOW_CPU_S:
            tally.count("slow")
        if end - start > tally.slowest_s.value:
            tally.slowest_s.value, tally.slowest.value = end - start, index
        tally.cpu_s.value += end - last
        last = end
        tally.peak_kib.value = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tally.at.value = -1


def _outcome(encoded: bytes, spec: ImageSpec) -> Status:
    image = pixels(encoded, spec)
    if isinstance(image, Bad):
        assert image.status in Status
        assert image.detail
        assert "\n" not in image.detail
        return image.status
    assert image.shape == (spec.height, spec.width, spec.channels)
    assert image.dtype == np.uint8
    return Status.OK


def _save(index: int, what: str) -> None:
    folder = Path(tempfile.gettempdir(), "raycnn-fuzz")
    folder.mkdir(exist_ok=True)
    (folder / f"{index}.bin").write_bytes(damaged(index))
    sys.stderr.write(f"input {index}, saved in {folder}: {what}\n")


def _work(indices: range, tally: Tally) -> None:
    """What a process does: a crash ends it, as memory beyond its share ends an image."""
    import torch

    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff says there what it does not like
    torch.set_num_threads(1)
    prepare_to_resize()
    warnings.simplefilter("ignore")
    logging.disable()
    mapped = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    attack(indices, tally)


class _Lane:
    """A part of the inputs, and one process after the other that works on it."""

    def __init__(self, indices: range) -> None:
        self.tally = Tally()
        self.crashed = self.hung = 0
        self._process = self._start(indices)
        self._indices = indices
        self._seen, self._since = -1, time.monotonic()

    def _start(self, indices: range) -> BaseProcess:
        process = multiprocessing.get_context("spawn").Process(target=_work, args=(indices, self.tally), daemon=True)
        process.start()
        return process

    def go_on(self) -> bool:
        """Look after the process; whether there is work left."""
        at = self.tally.at.value
        if self._process.is_alive():
            if at != self._seen:
                self._seen, self._since = at, time.monotonic()
            elif at >= 0 and time.monotonic() - self._since > DECODE_TIMEOUT_S:
                self._process.kill()
                self._process.join()
                self._pass_over(at, "hung")
            return True
        if self._process.exitcode == 0:
            return False
        if at < 0:
            raise SystemExit(f"a process of the attack ended with {self._process.exitcode} before its first input")
        self._pass_over(at, f"crashed with {self._process.exitcode}")
        return True

    def _pass_over(self, at: int, what: str) -> None:
        self.hung += what == "hung"
        self.crashed += what != "hung"
        _save(at, what)
        rest = self._indices[self._indices.index(at) + 1 :]
        self.tally.at.value = -1
        self._process = self._start(rest)
