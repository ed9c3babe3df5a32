"""What lies in a run folder, written so that a death at any moment leaves a run that goes on.

torch, which takes seconds to import, waits until tensors are read or written: the driver does neither.
"""

import hashlib
import json
import math
import shlex
import struct
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import yaml

from raycnn.config import TrainConfig, to_yaml
from raycnn.data import Geometry
from raycnn.drawing.canvas import encoded
from raycnn.errors import Bad, ConfigError, DataError, StorageError, in_words, one_line
from raycnn.shards import MANIFEST, PackedCollection
from raycnn.shards.order import Cursor
from raycnn.storage import Store

if TYPE_CHECKING:
    import torch

CONFIG, IDENTITY, DATA, PICTURES = "config.yaml", "run.json", "data", "pictures"
FIND_LR, FIND_LR_PLOT = "find_lr.json", "find_lr.png"
CUT = "cut"
"""In the line of an epoch that --max-time has cut, after how many of its steps; a longer one goes on within it."""
SLOTS = 3
"""One checkpoint is the last, one the best, and the third is free to be written."""

RESUMABLE = (
    "data",
    "run",
    "epochs",
    "max_time",
    "patience",
    "num_workers",
    "min_workers",
    "device",
    "max_failures",
    "max_bad",
    "checkpoint_every",
    "cache_gib",
)
"""Settings that may differ when a run goes on; the others would make it another run. Data is known by its digest."""

BINDING = ("num_workers", "min_workers", "cache_gib")
"""Of these its claim was made: config.yaml, which repeats the run, keeps them as they were when it began."""


class Claim(NamedTuple):
    """What was decided when a run began, and holds until its end."""

    lanes: int
    geometry: Geometry | None
    """How its decoded images are kept, of which boxes are taken later; None: boxes are taken when it decodes."""


def _parsed(store: Store, path: str, parse: Callable[[bytes], Any], *needed: str) -> Any:
    """What a file of the run folder holds: an object with these keys, or lines of such.

    Raises:
        ConfigError: it is torn or was altered.
    """
    try:
        found = parse(store.get(path))
        for one in found if parse is _lines else [found]:
            if not isinstance(one, dict) or not one.keys() >= set(needed):
                raise ValueError("it holds something else")
    except (ValueError, yaml.YAMLError) as error:
        raise _damaged(store.address(path), f"cannot be read ({one_line(error)})") from None
    return found


def _damaged(address: str, what: str) -> ConfigError:
    return ConfigError(f"{address} {what}: restore it, or use another run folder")


def _lines(content: bytes) -> list[Any]:
    return [json.loads(line) for line in content.splitlines()]


def check_before_packing(store: Store, config: TrainConfig) -> None:
    """Refuse a folder that is another's before any data is packed into it: hours may go into that.

    Raises:
        ConfigError: the folder holds a run on other data, or something else.
    """
    if store.head(IDENTITY) is None:
        _refuse_stranger(store)
    elif store.head(f"{DATA}/{MANIFEST}") is None:
        raise _on_other_data(store, config)


def _refuse_stranger(store: Store) -> None:
    if store.head(CONFIG) is not None:
        raise ConfigError(f"{store.address()} holds a {CONFIG} that belongs to no training run; use another run folder")


def _on_other_data(store: Store, config: TrainConfig) -> ConfigError:
    return ConfigError(f"{store.address()} holds a run on other data than {config.data}; use another run folder")


def claimed(store: Store, config: TrainConfig, packed: PackedCollection) -> Claim | None:
    """The claim of the run in a folder, which has to be this one; None where the folder holds no run.

    Raises:
        ConfigError: the folder holds a run with other settings or other data, or something else.
    """
    if store.head(IDENTITY) is None:
        _refuse_stranger(store)
        return None
    identity = _parsed(store, IDENTITY, json.loads, "data_digest", "lanes")
    if identity["data_digest"] != packed.digest:
        raise _on_other_data(store, config)
    if store.head(CONFIG) is not None:
        wanted, found = yaml.safe_load(to_yaml(config)), _parsed(store, CONFIG, yaml.safe_load)
        differing = [k for k in wanted if k not in RESUMABLE and wanted[k] != found.get(k)]
        if differing:
            shown = ", ".join(f"{k} (was {found.get(k)!r}, now {wanted[k]!r})" for k in differing)
            raise ConfigError(f"{store.address()} holds a run with other settings: {shown}; use another run folder")
    lanes = int(identity["lanes"])
    if config.num_workers > lanes:
        raise ConfigError(
            f"{store.address()}: {config.num_workers} workers cannot go on with this run, whose batches are made of "
            f"{lanes} equal lanes: use --num-workers {lanes} or fewer"
        )
    return Claim(lanes, Geometry(**identity["geometry"]) if identity.get("cached") else None)


def claim(store: Store, config: TrainConfig, packed: PackedCollection, wanted: Claim) -> Claim:
    """Make the folder this run's, unless it is; what it is bound to then. Of several who try at once one decides.

    Raises:
        ConfigError: the folder holds another run.
    """
    identity = {"data_digest": packed.digest, "lanes": wanted.lanes, "cached": wanted.geometry is not None}
    if wanted.geometry is not None:
        identity["geometry"] = wanted.geometry._asdict()
    store.create(IDENTITY, (json.dumps(identity) + "\n").encode())
    store.create(CONFIG, to_yaml(config).encode())
    found = claimed(store, config, packed)
    assert found is not None
    before = _parsed(store, CONFIG, yaml.safe_load)
    content = to_yaml(config.model_copy(update={name: before[name] for name in BINDING if name in before}))
    if before != yaml.safe_load(content):
        store.put(CONFIG, content.encode())
    return found


def resume_at(marker: dict[str, Any] | None) -> Cursor:
    """Where a run with this checkpoint goes on."""
    if marker is None:
        return Cursor(0, 0)
    is_within = marker["accuracy_top1"] is None
    return Cursor(marker["epoch"], marker["step"]) if is_within else Cursor(marker["epoch"] + 1, 0)


def cut_at(marker: dict[str, Any]) -> Cursor | None:
    """Where --max-time has cut the epoch of a checkpoint; None where it has not."""
    return Cursor(marker["epoch"], marker["step"]) if marker["accuracy_top1"] is not None and marker["step"] else None


def ended(config: TrainConfig, lines: list[dict[str, Any]]) -> str | None:
    """Why a run with these lines of metrics is over; None where it goes on."""
    whole = sum(not line.get(CUT) for line in lines)
    if whole >= config.epochs:
        return f"{whole} epochs are done"
    if config.max_time and lines and lines[-1].get("elapsed_s", 0.0) >= config.max_time:
        return f"it has trained for --max-time {config.max_time:g} s"
    accuracies = [line["metrics/accuracy_top1"] for line in lines]
    if config.patience and accuracies and len(lines) - 1 - accuracies.index(max(accuracies)) >= config.patience:
        return f"accuracy has not risen for --patience {config.patience} epochs"
    return None


class Checkpoints:
    """Three slots below `checkpoints/`; a checkpoint never overwrites the last or the best one.

    A slot's marker holds the sha256 of its tensors and its own, and is written after them, so that a torn write shows.
    It has an accuracy where the model was evaluated, which is at an epoch's end, or where --max-time has cut the epoch;
    and the number of steps that are done within an epoch whose end it is not.
    """

    def __init__(self, store: Store) -> None:
        """Read the markers of whole checkpoints below the run folder."""
        self._store = store.child("checkpoints")
        self._whole: set[str] = set()
        self.torn: dict[str, None] = {}
        """Addresses of what was found torn or altered, and is not used; a set that keeps its order."""

    def last(self) -> dict[str, Any] | None:
        """The marker of the newest whole checkpoint."""
        return self._first_whole(self._newest_first())

    def best(self) -> dict[str, Any] | None:
        """The marker of the most accurate whole checkpoint of an epoch's end; the earlier of equals."""
        ends = [m for m in self._markers() if m["accuracy_top1"] is not None]
        return self._first_whole(sorted(ends, key=lambda m: (-m["accuracy_top1"], m["epoch"])))

    def at(self, cursor: Cursor) -> dict[str, Any]:
        """The marker of the checkpoint to go on with there, which another worker has found whole."""
        found = next((m for m in self._newest_first() if cursor in (resume_at(m), cut_at(m))), None)
        if found is None:
            raise StorageError(
                f"{self._store.address()}: not every worker sees the checkpoint of epoch {cursor.epoch}; "
                "on several nodes the run folder has to be s3:// or a folder that all of them share"
            )
        return found

    def load(self, marker: dict[str, Any]) -> dict[str, "torch.Tensor"]:
        """The tensors of a whole checkpoint."""
        from safetensors.torch import load

        content = self._bytes(marker)
        if content is None:
            raise StorageError(
                f"{self._store.address(_tensors(marker['slot']))} was changed; is another run writing there?"
            )
        return load(content)

    def save(self, tensors: dict[str, "torch.Tensor"], at: Cursor, accuracy_top1: float | None = None) -> None:
        """Write to the slot that is neither the last nor the best.

        Args:
            tensors: What the run goes on with.
            at: The epoch that is done, with 0 steps; or the one of which so many steps are.
            accuracy_top1: On validation; None within an epoch that goes on.
        """
        from safetensors.torch import save

        taken = {m["slot"] for m in (self.last(), self.best()) if m}
        slot = next(s for s in range(SLOTS) if s not in taken)
        content = save(tensors)
        self._store.put(_tensors(slot), content)
        digest = hashlib.sha256(content).hexdigest()
        marker = {"slot": slot, **at._asdict(), "accuracy_top1": accuracy_top1, "sha256": digest}
        self._store.put(_marker(slot), json.dumps(marker | {"marker_sha256": _digest(marker)}).encode())
        self._whole.add(digest)

    def _newest_first(self) -> list[dict[str, Any]]:
        """An epoch's end comes after all of its steps."""

        def place(marker: dict[str, Any]) -> tuple[int, float]:
            is_end = marker["accuracy_top1"] is not None and cut_at(marker) is None
            return marker["epoch"], math.inf if is_end else marker["step"]

        return sorted(self._markers(), key=place, reverse=True)

    def _markers(self) -> list[dict[str, Any]]:
        markers: list[dict[str, Any]] = []
        for path in map(_marker, range(SLOTS)):
            if self._store.head(path) is not None:
                marker = _unsealed(self._store.get(path))
                if marker is None:
                    self.torn[self._store.address(path)] = None
                else:
                    markers.append(marker)
        return markers

    def _first_whole(self, markers: list[dict[str, Any]]) -> dict[str, Any] | None:
        return next((m for m in markers if m["sha256"] in self._whole or self._bytes(m) is not None), None)

    def _bytes(self, marker: dict[str, Any]) -> bytes | None:
        path = _tensors(marker["slot"])
        content = self._store.get(path) if self._store.head(path) is not None else b""
        if hashlib.sha256(content).hexdigest() != marker["sha256"]:
            self.torn[self._store.address(path)] = None
            return None
        self._whole.add(marker["sha256"])
        return content


def _digest(marker: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(marker, sort_keys=True).encode()).hexdigest()


def _unsealed(content: bytes) -> dict[str, Any] | None:
    """A marker that is as it was written."""
    try:
        marker = json.loads(content)
    except ValueError:
        return None
    is_whole = isinstance(marker, dict) and marker.pop("marker_sha256", None) == _digest(marker)
    return marker if is_whole else None


def _marker(slot: int) -> str:
    return f"slot-{slot}.json"


def _tensors(slot: int) -> str:
    return f"slot-{slot}.safetensors"


class Saving:
    """Checkpoints written on a thread, while training goes on: one at a time, and none is left when this is closed."""

    def __init__(self, store: Store) -> None:
        """Below the run folder."""
        self.checkpoints = Checkpoints(store)
        self._thread, self._last = ThreadPoolExecutor(1, "checkpoint"), Future[None]()
        self._last.set_result(None)

    def save(self, tensors: dict[str, "torch.Tensor"], at: Cursor, accuracy_top1: float | None = None) -> None:
        """As `Checkpoints.save`, once the one before is written; raises what that has failed with."""
        self._last.result()
        self._last = self._thread.submit(self.checkpoints.save, tensors, at, accuracy_top1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        if kind is None:
            self._last.result()


class History:
    """metrics.jsonl: one line for each epoch that is done."""

    PATH = "metrics.jsonl"

    def __init__(self, store: Store) -> None:
        """Read the lines that there are."""
        self._store = store
        self.lines: list[dict[str, Any]] = _parsed(store, self.PATH, _lines, "epoch") if store.head(self.PATH) else []

    def until(self, marker: dict[str, Any] | None) -> list[dict[str, Any]]:
        """The lines of what a checkpoint has, in whose place others may have been written since.

        Raises:
            ConfigError: some are not there any more.
        """
        done = resume_at(marker).epoch
        lines = [line for line in self.lines if line["epoch"] < done]
        if [line["epoch"] for line in lines] != list(range(done)):
            raise _damaged(self._store.address(self.PATH), f"lacks some of the {done} epochs that are done")
        if marker is not None and cut_at(marker) is not None and lines[-1].get(CUT) != marker["step"]:
            lines.pop()  # of more of the epoch, whose checkpoint was not written any more
        return lines

    def cut(self, epochs: int) -> None:
        """Forget what came after the checkpoint that the run resumes from."""
        self.lines = [line for line in self.lines if line["epoch"] < epochs]

    def add(self, line: dict[str, Any]) -> None:
        """Write the line of one more epoch."""
        self.lines.append(line)
        self._store.put(self.PATH, "".join(json.dumps(entry) + "\n" for entry in self.lines).encode())


class BadImages:
    """bad.jsonl: the training images that cannot be read, each once, and how many are not listed."""

    PATH = "bad.jsonl"
    MOST = 1000
    """Lines of images; a last line `{"not_listed": N}` counts the others."""

    def __init__(self, store: Store) -> None:
        """Go on with the lines that there are."""
        self._store = store
        self._written = store.get(self.PATH) if store.head(self.PATH) else b""
        lines: list[dict[str, Any]] = _parsed(store, self.PATH, _lines) if self._written else []
        self._lines = {line["key"]: line for line in lines if "key" in line}

    def write(self, found: Mapping[str, Bad], count: int) -> None:
        """Add what an epoch has found; `count` is how many there are, listed or not."""
        for key, bad in found.items():
            if len(self._lines) < self.MOST:
                self._lines.setdefault(key, {"key": key, "status": str(bad.status), "detail": bad.detail})
        others = count - len(self._lines)
        lines = [*self._lines.values(), *([{"not_listed": others}] if others > 0 else [])]
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        if content != self._written:
            self._store.put(self.PATH, content)
            self._written = content


def check_bad(bad: Mapping[str, int], rows: int, max_bad: float, listed: str) -> None:
    """DataError if more of the training images are unreadable than are allowed; it says where they are listed."""
    if (count := sum(bad.values())) > max_bad * rows:
        raise DataError(
            f"{count} of {rows} training images cannot be read ({in_words(bad)}), more than --max-bad {max_bad:g}: "
            f"see {listed}, mend them or raise it"
        )


def repeat_command(store: Store) -> str:
    """What repeats the run in a folder into another one beside it, from the configuration that it has left."""
    options = store.url.removeprefix(store.address())
    again = f"{store.address()}-again{options}"
    return f"raycnn train --config {shlex.quote(store.child(CONFIG).url)} --run {shlex.quote(again)}"


class TensorBoard:
    """An event file below `tensorboard/`, uploaded after every epoch; in memory until then: a worker may be killed.

    tensorboardX's own SummaryWriter writes on a thread, and does not wait for it before it says that all is written.
    """

    def __init__(self, store: Store, is_writer: bool, first_step: int) -> None:
        """Points of an earlier file at `first_step` or later belong to an epoch that is done again."""
        self._store, self._is_writer, self._first_step = store, is_writer, first_step
        self._files: dict[str, _EventFile] = {}

    def __enter__(self) -> "TensorBoard":
        if self._is_writer:
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import SessionLog  # pyright: ignore[reportAttributeAccessIssue]
            from tensorboardX.record_writer import register_writer_factory

            register_writer_factory("raycnn", self)
            self._writer = EventsWriter("raycnn:/events")
            self._write(self._first_step + 1, session_log=SessionLog(status=SessionLog.START))
        return self

    def open(self, path: str) -> "_EventFile":
        """What tensorboardX writes an event file to."""
        return self._files.setdefault(path.rpartition("/")[2], _EventFile())

    def directory_check(self, path: str) -> None:
        """No folder has to be made."""

    def add(self, line: dict[str, Any], images: Mapping[str, bytes | npt.NDArray[np.uint8]] | None = None) -> None:
        """One point for each of the line's numbers and for each image: a PNG, or pixels (H, W, 1 or 3)."""
        from tensorboardX.summary import scalar

        for name, image in (images or {}).items():
            self._write(line["step"], summary=_image(name, image if isinstance(image, bytes) else encoded(image)))
        for name, value in line.items():
            if isinstance(value, int | float) and name not in ("epoch", "step", CUT):
                self._write(line["step"], summary=scalar(name, value))
        for name, file in self._files.items():
            self._store.put(f"tensorboard/{name}", bytes(file.content))

    def _write(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

        self._writer.write_event(Event(wall_time=time.time(), step=step, **content))

    def __exit__(self, *error: object) -> None:
        """Nothing is open."""


def _image(name: str, png: bytes) -> Any:
    from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

    width, height = struct.unpack(">II", png[16:24])
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
    return Summary(value=[Summary.Value(tag=name, image=image)])


class _EventFile:
    def __init__(self) -> None:
        self.content = bytearray()

    def write(self, data: bytes) -> None:
        self.content += data

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass
