"""Decoded images that a node keeps on its disk, so that later epochs and later runs need not decode them.

What is kept of a data set is a folder below `~/.cache/raycnn/decoded` (or that of $XDG_CACHE_HOME), shared by all ranks
of the node:

    pixels   a slot of equal length for each row of the training split; sparse: what is not written takes no room
    index    of each row its label, key, height, width and state

The state is written after all else, so that a row over which a process has died is not there. After a start of the
machine a folder counts only where all of it was known to be on the disk: a power failure may lose pixels and keep their
states.
"""

import contextlib
import fcntl
import hashlib
import mmap
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from raycnn import images
from raycnn.config import ImageSpec
from raycnn.errors import Status

MARGIN = 1.15
"""Short side of a kept photo over that of the model's input: boxes that cover most of it are not enlarged."""
USUAL_ASPECT = 4 / 3
"""Of photos, as far as the budget is concerned."""
FORMAT = 1
STATES = list(Status)
"""A row's state is 1 + the index of its status; 0 where it is not there."""
_HEADER = np.dtype([("boot", "S48"), ("is_complete", "u1"), ("", "V15")])


class Geometry(NamedTuple):
    """How decoded images are kept."""

    short: int
    """Most px of the short side; 0: all images have the model's size, and are kept as they are."""
    channels: Literal[1, 3]
    slot_bytes: int
    """Most bytes of one image."""
    usual_bytes: int
    """What one takes, as far as it is known beforehand."""


def geometry_of(spec: ImageSpec, seen: Mapping[str, Any]) -> Geometry:
    """How to keep images of which a manifest has `seen` these heights and widths, so that boxes can be taken later."""
    (low_height, height), (low_width, width) = seen["height"], seen["width"]
    is_one_size, channels = low_height == height and low_width == width, spec.channels
    if is_one_size and (height, width, 1.0) == (spec.height, spec.width, spec.crop):
        return Geometry(0, channels, height * width * channels, height * width * channels)
    short = min(round(MARGIN * min(spec.height, spec.width)), height, width)
    if is_one_size:
        height, width = images.whole_size(height, width, short)
        return Geometry(short, channels, height * width * channels, height * width * channels)
    row = short * channels
    return Geometry(short, channels, row * images.LONGEST * short, row * round(USUAL_ASPECT * short))


class Cache:
    """What this node has of a data set's training split; rows are counted in the order of the manifest."""

    def __init__(self, folder: Path, geometry: Geometry, rows: int, budget: int, say: Callable[[str], None]) -> None:
        """Open a folder that `open_cache` has made."""
        self._geometry, self._budget, self._say = geometry, budget, say
        self._is_full, self._completing = False, None
        self._files = [(folder / name).open("r+b", buffering=0) for name in ("index", "pixels")]
        fcntl.flock(self._files[0], fcntl.LOCK_SH)  # so that nobody removes it
        self._index = mmap.mmap(self._files[0].fileno(), _index_bytes(rows))
        self.pixels = np.frombuffer(
            mmap.mmap(self._files[1].fileno(), rows * geometry.slot_bytes, prot=mmap.PROT_READ), np.uint8
        )
        """uint8 (rows, slot_bytes): each image's height x width x channels bytes, and whatever follows."""
        self.pixels = self.pixels.reshape(rows, geometry.slot_bytes)
        columns = _columns(self._index, rows)
        self._header, self._label, self._key, self._size, self._state = columns

    def holds(self, rows: npt.NDArray[np.int64]) -> bool:
        """Whether all of these rows are there, readable or not."""
        return bool(self._state[rows].all())

    def columns(self, rows: npt.NDArray[np.int64]) -> dict[str, np.ndarray]:
        """Of each of these rows, which are there, all that a decoded block has of it but its pixels."""
        bad, states = np.full(len(rows), "", object), self._state[rows]
        for i in np.flatnonzero(states > 1):
            bad[i] = f"{STATES[states[i] - 1]}\t\0from the decoded cache"
        label, key, size = self._label[rows], self._key[rows], self._size[rows]
        return {"row": rows, "label": label, "key": key, "size": size, "bad": bad}

    def keep(self, block: Mapping[str, np.ndarray]) -> bool:
        """Write a decoded block; False where it is not there afterwards, because the disk or the budget is full."""
        rows, pixels, size = block["row"], block["pixels"], block["size"]
        if self._is_full or pixels.shape[1] > self._geometry.slot_bytes:
            return False
        states = [1 + STATES.index(Status(text.split("\t", 1)[0])) if text else 1 for text in block["bad"]]
        self._label[rows], self._key[rows], self._size[rows] = block["label"], block["key"], size
        try:
            if os.fstat(self._files[1].fileno()).st_blocks * 512 > self._budget:
                raise OSError("cache_gib is used up")
            self._write(rows, pixels, size)
        except OSError as error:
            self._is_full = True
            self._say(_not_kept(error))
            return False
        self._state[rows] = states
        if self._state.all():
            self._completing = threading.Thread(target=self._complete, name="decoded cache", daemon=True)
            self._completing.start()
        return True

    def _write(self, rows: npt.NDArray[np.int64], pixels: npt.NDArray[np.uint8], size: npt.NDArray[np.int32]) -> None:
        """By calls and not through memory, where a full disk would end the process."""
        slot, order = self._geometry.slot_bytes, np.argsort(rows)
        rows, lengths = rows[order], size[order].prod(axis=1) * self._geometry.channels
        is_apart = (np.diff(rows, prepend=-2) != 1) | (lengths < slot)
        is_apart[1:] |= lengths[:-1] < slot
        starts = np.flatnonzero(is_apart)
        for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
            _write_at(self._files[1].fileno(), pixels[order[start:stop], : lengths[start]], int(rows[start]) * slot)

    def _complete(self) -> None:
        with contextlib.suppress(OSError):
            os.fsync(self._files[1].fileno())
            self._index.flush()
            self._header["is_complete"] = 1
            self._index.flush()

    def close(self) -> None:
        """Wait until what is complete is known to be on the disk; others may remove it now."""
        if self._completing is not None:
            self._completing.join()
        fcntl.flock(self._files[0], fcntl.LOCK_UN)
        for file in self._files:
            file.close()


def open_cache(digest: str, geometry: Geometry, rows: int, budget: int, say: Callable[[str], None]) -> Cache | None:
    """What this node has of the training split of a data set; None where it cannot keep any, which is said.

    Other data sets that no process has open are removed, the one that was opened longest ago first, until all of them
    take no more than the budget.

    Args:
        digest: Of the data set.
        geometry: How its images are kept.
        rows: Of the training split.
        budget: Bytes on disk that all that is kept may take.
        say: Is told, once, why no more can be kept.
    """
    shape = hashlib.sha256(repr((FORMAT, STATES, images.DECODER, geometry, rows)).encode()).hexdigest()[:8]
    name = f"{digest[:12]}-{geometry.short or 'as-is'}-{shape}"
    try:
        root = _root()
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / "lock"):
            _clear(root, name, budget, rows * geometry.usual_bytes)
            if not _counts(root / name, geometry, rows):
                _make(root / name, geometry, rows)
            return Cache(root / name, geometry, rows, budget, say)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        say(_not_kept(error))
        return None


def _not_kept(error: Exception) -> str:
    return f"decoded images are not kept on this node any more, later epochs decode them again: {error}"


def _root() -> Path:
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "raycnn" / "decoded"


def _boot() -> bytes:
    """What tells one start of this machine from the next, where it says so."""
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_bytes().strip() if file.exists() else b""


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """No other process of this node looks for, makes or removes a folder meanwhile."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _clear(root: Path, name: str, budget: int, usual: int) -> None:
    """Remove what no process has made whole, and others until all fit into the budget."""
    for folder in root.glob(".*"):
        shutil.rmtree(folder, ignore_errors=True)
    sizes = {index.parent: _bytes_on_disk(index.parent) for index in root.glob("*/index")}
    own = max(usual, sizes.pop(root / name, 0))
    for folder in sorted(sizes, key=lambda f: (f / "index").stat().st_mtime):
        if own + sum(sizes.values()) <= budget:
            return
        if not _is_in_use(folder):
            _remove(folder)
            del sizes[folder]


def _is_in_use(folder: Path) -> bool:
    """Whether a process has it open, here or on another node that shares the disk."""
    with (folder / "index").open("r+b") as file:  # for writing: NFS wants it for an exclusive lock
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _remove(folder: Path) -> None:
    """Under another name, so that nobody takes what is left for whole if this process dies."""
    removed = folder.rename(folder.with_name(f".{folder.name}.old"))
    shutil.rmtree(removed)


def _bytes_on_disk(folder: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in folder.iterdir())


def _make(folder: Path, geometry: Geometry, rows: int) -> None:
    """An empty folder in the place of what stands there: whole, or not at all."""
    if folder.exists() and _is_in_use(folder):
        raise OSError(f"{folder} is in use by another node; set XDG_CACHE_HOME to a disk of this one")
    made = folder.with_name(f".{folder.name}")
    made.mkdir()
    with (made / "pixels").open("wb") as file:
        file.truncate(rows * geometry.slot_bytes)
    with (made / "index").open("wb") as file:
        content = np.zeros(_index_bytes(rows), np.uint8)  # written out: a sparse file may find no room later
        content[: _HEADER.itemsize].view(_HEADER)["boot"] = _boot()
        content.tofile(file)
    if folder.exists():
        _remove(folder)
    made.rename(folder)


def _counts(folder: Path, geometry: Geometry, rows: int) -> bool:
    """Whether what the folder says to be there is there."""
    sizes = {"index": _index_bytes(rows), "pixels": rows * geometry.slot_bytes}
    if not folder.exists() or any((folder / name).stat().st_size != size for name, size in sizes.items()):
        return False
    with (folder / "index").open("r+b") as file:
        header = np.frombuffer(file.read(_HEADER.itemsize), _HEADER)[0]
        os.utime(folder / "index")
    return bool(header["is_complete"]) or bytes(header["boot"]) == _boot()


def _index_bytes(rows: int) -> int:
    return _HEADER.itemsize + rows * (8 + 8 + 8 + 1)


def _columns(index: mmap.mmap, rows: int) -> tuple[np.ndarray, ...]:
    """Header, label (n,) int64, key (n,) int64, size (n, 2) int32, state (n,) uint8: views of the mapped index."""
    kinds = ((_HEADER, 1), (np.dtype(np.int64), rows), (np.dtype(np.int64), rows))
    kinds += ((np.dtype(np.int32), 2 * rows), (np.dtype(np.uint8), rows))
    views, at = [], 0
    for kind, count in kinds:
        views.append(np.frombuffer(index, kind, count, at))
        at += kind.itemsize * count
    views[3] = views[3].reshape(rows, 2)
    return tuple(views)


def _write_at(file: int, content: np.ndarray, offset: int) -> None:
    left = memoryview(content.tobytes())
    while left:
        written = os.pwrite(file, left, offset)
        left, offset = left[written:], offset + written
