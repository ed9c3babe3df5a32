"""`raycnn train`: data-parallel training with Ray Train over packed shards that Ray Data streams.

A run folder holds all that a run needs to go on: the same command again resumes it after any death, and finds
nothing to do when it is finished.

    config.yaml                     what was asked for
    checkpoints/slot-N.safetensors  model, optimizer, validation counts; slot-N.json is its marker, written last
    metrics.jsonl, tensorboard/     one line, one point for each epoch
    bundle/                         the best epoch's model
"""

import hashlib
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from raycnn import bundle as bundles
from raycnn import data, images, loop
from raycnn.config import IMAGENET_MEAN, IMAGENET_STD, ImageSpec, PackConfig, TrainConfig, make, to_yaml
from raycnn.errors import Bad, ConfigError, DataError
from raycnn.metrics import Metrics
from raycnn.models import Classifier, build
from raycnn.shards import PackedCollection, open_collection
from raycnn.shards.order import epoch_pieces, lanes_for, step_counts, steps_per_epoch
from raycnn.storage import Store, contains, open_store

SMALL_SIDE = 64
"""Images that are all of one size up to this side are trained on as they are."""
LARGE_SIDE = 224
SLOTS = 3
"""One checkpoint is the last, one the best, and the third is free to be written."""
VAL_CACHE_BYTES = 256 * 1024 * 1024
"""Decoded validation pixels that a worker keeps, so that later epochs do not decode them again."""
PROGRESS_S = 0.5
SELFTEST_IMAGES = 8

RESUMABLE = ("epochs", "num_workers", "device", "max_failures", "max_bad", "run")
"""Settings that may differ when a run goes on; the others would make it another run."""


@dataclass(frozen=True)
class TrainReport:
    """What a run has made."""

    bundle: str
    epochs: int
    steps: int
    accuracy_top1: float
    images_per_s: float
    skipped: dict[str, int]
    run: str
    resumed_at_epoch: int


def train(config: TrainConfig, progress: data.Progress | None = None) -> TrainReport:
    """Train, or resume, or find the run finished.

    Raises:
        ConfigError: the run folder belongs to another configuration, or the cluster cannot run the plan.
        DataError: the data cannot be trained on; it says why.
    """
    say = progress or (lambda event: None)
    if contains(config.data, config.run):
        raise ConfigError(f"the run folder {config.run} lies inside its data {config.data}; choose another")
    store = open_store(config.run)
    packed = _packed(config, store, say)
    _check_classes(packed)
    spec = image_spec(config, packed.manifest)
    lanes = _claim(store, config, packed)
    last = Checkpoints(store).last()
    done = last["epoch"] + 1 if last else 0
    if done < config.epochs or _bundle_epochs(store) < done:
        _fit(config, packed, spec, lanes, say)
    after = _History(store)
    last = after.lines[-1]
    return TrainReport(
        bundle=store.child("bundle").url,
        epochs=after.epochs,
        steps=last["step"],
        accuracy_top1=max(line["metrics/accuracy_top1"] for line in after.lines),
        images_per_s=last["images_per_s"],
        skipped=last["skipped"],
        run=store.url,
        resumed_at_epoch=done,
    )


def _packed(config: TrainConfig, store: Store, say: data.Progress) -> PackedCollection:
    """The packed data set to train on; any other layout is packed into the run folder first, said aloud."""
    collection = open_collection(config.data)
    if isinstance(collection, PackedCollection):
        return collection
    from raycnn.packing import pack

    target = store.child("data").url
    say(
        {
            "kind": "note",
            "text": f"{config.data}: {collection.layout} ({collection.reason}); packing it to {target}",
        }
    )
    pack(make(PackConfig, {"src": config.data, "dst": target}), say)
    again = open_collection(target)
    assert isinstance(again, PackedCollection)
    return again


def _check_classes(packed: PackedCollection) -> None:
    if len(packed.class_names) < 2:
        names = ", ".join(packed.class_names) or "none"
        raise DataError(f"{packed.store.url}: classes: {names}; training needs two or more, each with its images")
    for split in ("train", "val"):
        counts = packed.counts(split)
        missing = [name for name in packed.class_names if not counts.get(name)]
        if missing:
            raise DataError(
                f"{packed.store.url}: no {split} image of {missing[0]!r}"
                + (f" and {len(missing) - 1} other classes" if missing[1:] else "")
                + f"; add some, or pack with a larger share for {split}"
            )


def image_spec(config: TrainConfig, manifest: dict[str, Any]) -> ImageSpec:
    """The model's input, from the data: small equal images as they are, others cropped to a square."""
    seen = manifest["images"]
    gray = config.weights is None and set(seen["channels"]) == {"1"}
    colours: dict[str, Any] = {"channels": 3, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    if gray:
        colours = {"channels": 1, "mean": (sum(IMAGENET_MEAN) / 3,), "std": (sum(IMAGENET_STD) / 3,)}
    (low_h, high_h), (low_w, high_w) = seen["height"], seen["width"]
    if config.image_size != "auto":
        return ImageSpec(height=config.image_size, width=config.image_size, **colours)
    if low_h == high_h and low_w == high_w and max(high_h, high_w) <= SMALL_SIDE:
        return ImageSpec(height=high_h, width=high_w, crop=1.0, **colours)
    return ImageSpec(height=LARGE_SIDE, width=LARGE_SIDE, **colours)


def _claim(store: Store, config: TrainConfig, packed: PackedCollection) -> int:
    """Write config.yaml, or check that it is this run's; return the number of lanes.

    Raises:
        ConfigError: the folder holds a run with other settings or other data.
    """
    wanted: dict[str, Any] = yaml.safe_load(to_yaml(config)) | {"data_digest": packed.digest}
    content = yaml.safe_dump(wanted | {"lanes": lanes_for(config.num_workers)}, sort_keys=False)
    store.create("config.yaml", content.encode())
    found = yaml.safe_load(store.get("config.yaml"))
    differing = [k for k in wanted if k not in RESUMABLE and wanted[k] != found.get(k)]
    if differing:
        shown = ", ".join(f"{k} (was {found.get(k)!r}, now {wanted[k]!r})" for k in differing)
        raise ConfigError(f"{store.url} holds a run with other settings: {shown}; use another run folder")
    lanes = int(found["lanes"])
    if lanes % config.num_workers:
        raise ConfigError(f"{store.url}: this run has {lanes} lanes, which {config.num_workers} workers do not divide")
    return lanes


def _bundle_epochs(store: Store) -> int:
    """How many epochs the run's bundle has seen; 0 where there is none yet."""
    if store.head("bundle/config.json") is None:
        return 0
    return json.loads(store.get("bundle/config.json"))["metrics"].get("epochs", 0)


def _fit(config: TrainConfig, packed: PackedCollection, spec: ImageSpec, lanes: int, say: data.Progress) -> None:
    """Run Ray Train; show what rank 0 posts while it runs."""
    data.connect()
    import ray
    from ray.exceptions import RayActorError
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    class Trainer(TorchTrainer):
        """Leaves Ctrl-C alone: Ray Train's handler ends the process with its own exit code, and stays in place."""

        controller: Any = None

        def _register_sigint_handler(self, controller: Any) -> None:
            self.controller = controller

    _, limit = data.resources()
    use_gpu = config.device == "cuda" or (config.device == "auto" and limit.gpus >= config.num_workers)
    plan = data.plan_training(config.num_workers, limit, use_gpu)
    arguments = {
        "config": config.model_dump(mode="json"),
        "data": packed.store.url,
        "spec": spec.model_dump(mode="json"),
        "lanes": lanes,
        "plan": plan._asdict(),
    }
    per_worker = {"CPU": plan.worker_cpus} | ({"GPU": plan.worker_gpus} if use_gpu else {})
    with tempfile.TemporaryDirectory(prefix="raycnn-train-") as scratch, data.Board(say) as board:
        trainer = Trainer(
            _worker,
            train_loop_config=arguments | {"board": board.actor},
            scaling_config=ScalingConfig(
                num_workers=config.num_workers, use_gpu=use_gpu, resources_per_worker=per_worker
            ),
            # Our checkpoints lie in the run folder; Ray Train's own state is of no use to a later process.
            run_config=RunConfig(
                storage_path=scratch,
                name="run",
                failure_config=FailureConfig(max_failures=config.max_failures),
            ),
        )
        try:
            with data.user_errors():
                trainer.fit()
        except KeyboardInterrupt:
            if trainer.controller is not None:
                with suppress(RayActorError):
                    ray.get(trainer.controller.abort.remote())
            raise


def _worker(arguments: dict[str, Any]) -> None:
    """What each training worker runs; it starts from the last whole checkpoint, if there is one."""
    import ray.train
    from ray.train.torch import get_device, prepare_model

    config = make(TrainConfig, arguments["config"])
    plan = data.TrainPlan(**arguments["plan"])
    device = get_device()
    if device.type == "cpu":
        torch.set_num_threads(plan.threads)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    packed = open_collection(arguments["data"])
    assert isinstance(packed, PackedCollection)
    torch.manual_seed(config.seed)
    spec = ImageSpec(**arguments["spec"])
    classifier = build(config.model, len(packed.class_names), spec, config.weights)
    model = prepare_model(classifier)
    run = _Run(config, packed, spec, arguments["lanes"], plan, rank, world, arguments["board"])
    run.train(classifier, model)
    if rank == 0:
        run.hand_over(classifier)
    ray.train.report({"epochs": config.epochs})


class _Run:
    """One rank of a run, over all its epochs."""

    def __init__(
        self,
        config: TrainConfig,
        packed: PackedCollection,
        spec: ImageSpec,
        lanes: int,
        plan: data.TrainPlan,
        rank: int,
        world: int,
        board: Any,
    ) -> None:
        self._config, self._packed, self._spec, self._plan = config, packed, spec, plan
        self._rank, self._world, self._board = rank, world, board
        self._lanes = lanes
        self._owned = [lane for lane in range(lanes) if lane % world == rank]
        self._store = open_store(config.run)
        self._groups = list(packed.select("train", Counter()))
        self._rows = sum(g.rows for g in self._groups)
        self._steps = steps_per_epoch(self._rows, config.batch_size)
        self._val: list[loop.Batch] | None = None
        self._last_post = 0.0

    def train(self, classifier: Classifier, model: torch.nn.Module) -> None:
        """Run the epochs that are left."""
        trainer = loop.Trainer(model, self._config, self._steps * self._config.epochs)
        checkpoints = Checkpoints(self._store)
        first = 0
        if (last := checkpoints.last()) is not None:
            loop.unpack_state(checkpoints.load(last), classifier, trainer.optimizer)
            first = last["epoch"] + 1
        history = _History(self._store)
        history.cut(first)
        batches = self._batches(first)
        with _TensorBoard(self._store, self._rank == 0) as board:
            for epoch in range(first, self._config.epochs):
                line = self._epoch(epoch, trainer, batches)
                metrics = loop.evaluate(classifier, self._val_batches(), len(self._packed.class_names))
                if self._rank == 0:
                    line |= {"metrics/accuracy_top1": metrics.accuracy_top1, "val/loss": metrics.loss}
                    line |= {"metrics/accuracy_top5": metrics.accuracy_top5}
                    state = loop.pack_state(classifier, trainer.optimizer) | {"validation": metrics.to_vector()}
                    history.add(line)
                    board.add(line)
                    checkpoints.save(state, epoch, metrics.accuracy_top1)
                    self._post({"kind": "epoch", "epochs": self._config.epochs} | line)

    def _epoch(self, epoch: int, trainer: loop.Trainer, batches: Iterator[data.FeedBatch]) -> dict[str, Any]:
        start, total, rows, bad = time.perf_counter(), 0.0, 0, Counter[str]()
        for step in range(self._steps):
            taken = next(batches)
            loss, count = trainer.step(_to_torch(taken), epoch * self._steps + step)
            total, rows = total + loss, rows + count
            bad.update(str(f.status) for f in taken.failures)
            self._post_step(epoch, step, rows, start)
        totals = self._sum([total, float(rows), float(sum(bad.values()))])
        self._check_bad(totals[2], bad)
        seconds = time.perf_counter() - start
        return {
            "epoch": epoch,
            "step": (epoch + 1) * self._steps,
            "train/loss": totals[0] / max(1.0, totals[1]),
            "lr": trainer.optimizer.param_groups[0]["lr"],
            "images_per_s": totals[1] / seconds,
            "seconds": seconds,
            "skipped": self._gather(bad),
        }

    def _sum(self, values: list[float]) -> list[float]:
        if self._world == 1:
            return values
        from ray.train.torch import get_device

        tensor = torch.tensor(values, dtype=torch.float64, device=get_device())
        torch.distributed.all_reduce(tensor)
        return tensor.tolist()

    def _gather(self, bad: Counter[str]) -> dict[str, int]:
        if self._world == 1:
            return dict(bad)
        everyone: list[Any] = [None] * self._world
        torch.distributed.all_gather_object(everyone, dict(bad))
        return dict(sum((Counter(b) for b in everyone), Counter[str]()))

    def _check_bad(self, count: float, bad: Counter[str]) -> None:
        if count > self._config.max_bad * self._rows:
            raise DataError(
                f"{count:g} of {self._rows} training images cannot be read ({dict(bad)}), more than --max-bad "
                f"{self._config.max_bad:g}; mend them or raise it"
            )

    def _post_step(self, epoch: int, step: int, rows: int, start: float) -> None:
        now = time.perf_counter()
        if self._rank == 0 and now - self._last_post > PROGRESS_S:
            self._last_post = now
            done = (epoch * self._steps + step + 1) * self._config.batch_size
            rate = rows * self._world / max(now - start, 1e-9)
            text = f"epoch {epoch + 1}/{self._config.epochs}"
            total = self._steps * self._config.epochs * self._config.batch_size
            self._post({"kind": "progress", "done": done, "total": total, "rate": rate, "text": text})

    def _post(self, event: dict[str, Any]) -> None:
        self._board.post.remote(event)

    def _batches(self, first: int) -> Iterator[data.FeedBatch]:
        """This rank's share of every step of every epoch from `first` on, in order."""
        c = self._config
        items = (
            piece._asdict() | {"slice": list(self._groups[piece.group])}
            for epoch in range(first, c.epochs)
            for piece in epoch_pieces(self._groups, c.seed, epoch, c.batch_size, self._lanes, self._owned)
        )
        arguments = self._decode_arguments() | {"seed": c.seed, "crop_scale": c.crop_scale}
        buffers = data.LaneBuffers(self._stream(items, arguments), self._spec)
        for epoch in range(first, c.epochs):
            buffers.begin(epoch)
            for step in range(self._steps):
                counts = step_counts(self._rows, c.batch_size, self._lanes, self._owned, step)
                yield buffers.take(list(counts))

    def _stream(self, items: Iterator[dict[str, Any]], arguments: dict[str, Any]) -> Iterator[dict[str, np.ndarray]]:
        """A Ray Data execution for every few thousand pieces, so that a long run's plan is never held whole."""
        while chunk := [item for _, item in zip(range(4096), items, strict=False)]:
            yield from data.stream(data.decode_piece, chunk, self._plan, arguments)

    def _decode_arguments(self) -> dict[str, Any]:
        spec = self._spec.model_dump(mode="json")
        return {"url": self._packed.store.url, "digest": self._packed.digest, "spec": spec}

    def _val_batches(self) -> Iterator[loop.Batch]:
        """This rank's share of the validation split: whole ranges of rows, each row on exactly one rank."""
        if self._val is not None:
            yield from self._val
            return
        groups = list(self._packed.select("val", Counter()))
        rows = sum(g.rows for g in groups)
        low, high = self._rank * rows // self._world, (self._rank + 1) * rows // self._world
        size = (high - low) * self._spec.height * self._spec.width * self._spec.channels
        kept: list[loop.Batch] | None = [] if size <= VAL_CACHE_BYTES else None
        for block in data.stream(
            data.decode_piece, data.row_ranges(groups, low, high), self._plan, self._decode_arguments()
        ):
            for at in range(0, len(block["label"]), self._config.batch_size):
                part = {k: v[at : at + self._config.batch_size] for k, v in block.items()}
                batch = _to_torch(data.join([part], self._spec))
                if kept is not None:
                    kept.append(batch)
                yield batch
        self._val = kept

    def hand_over(self, classifier: Classifier) -> None:
        """Make the bundle from the best checkpoint, with its temperature and validation."""
        checkpoints = Checkpoints(self._store)
        best = checkpoints.best()
        assert best is not None
        tensors = checkpoints.load(best)
        metrics = Metrics.from_vector(tensors.pop("validation"), len(self._packed.class_names))
        loop.unpack_state(tensors, classifier)
        piece = next(self._packed.select("val", Counter()))
        samples = [s.encoded for s in self._packed.read([piece]) if s.encoded][: SELFTEST_IMAGES * 2]
        good = [s for s in samples if not isinstance(images.pixels(s, self._spec), Bad)][:SELFTEST_IMAGES]
        bundles.save(
            self._store.child("bundle").url,
            classifier.cpu().eval(),
            self._packed.class_names,
            temperature=metrics.temperature,
            metrics={
                "accuracy_top1": metrics.accuracy_top1,
                "loss": metrics.loss,
                "epochs": self._config.epochs,
            },
            validation=metrics.validation(),
            samples=good,
            data_fingerprint=self._packed.digest,
        )


def _to_torch(taken: data.FeedBatch) -> loop.Batch:
    return loop.Batch(torch.from_numpy(taken.pixels), torch.from_numpy(taken.labels))


class Checkpoints:
    """Three slots below `checkpoints/`; a checkpoint never overwrites the last or the best one.

    A slot's marker holds the sha256 of its tensors and is written after them, so that a torn write shows.
    """

    def __init__(self, store: Store) -> None:
        """Read the markers of whole checkpoints below the run folder."""
        self._store = store.child("checkpoints")

    def _markers(self) -> list[dict[str, Any]]:
        paths = [f"slot-{slot}.json" for slot in range(SLOTS)]
        return [json.loads(self._store.get(path)) for path in paths if self._store.head(path) is not None]

    def last(self) -> dict[str, Any] | None:
        """The marker of the newest whole checkpoint."""
        return self._first_whole(sorted(self._markers(), key=lambda m: -m["epoch"]))

    def best(self) -> dict[str, Any] | None:
        """The marker of the most accurate whole checkpoint; the earlier of equals."""
        return self._first_whole(sorted(self._markers(), key=lambda m: (-m["accuracy_top1"], m["epoch"])))

    def _first_whole(self, markers: list[dict[str, Any]]) -> dict[str, Any] | None:
        return next((m for m in markers if self._bytes(m) is not None), None)

    def _bytes(self, marker: dict[str, Any]) -> bytes | None:
        path = f"slot-{marker['slot']}.safetensors"
        if self._store.head(path) is None:
            return None
        content = self._store.get(path)
        return content if hashlib.sha256(content).hexdigest() == marker["sha256"] else None

    def load(self, marker: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The tensors of a whole checkpoint."""
        content = self._bytes(marker)
        assert content is not None
        return load_safetensors(content)

    def save(self, tensors: dict[str, torch.Tensor], epoch: int, accuracy_top1: float) -> None:
        """Write to the slot that is neither the last nor the best."""
        taken = {m["slot"] for m in (self.last(), self.best()) if m}
        slot = next(s for s in range(SLOTS) if s not in taken)
        content = save_safetensors(tensors)
        self._store.put(f"slot-{slot}.safetensors", content)
        marker = {"slot": slot, "epoch": epoch, "accuracy_top1": accuracy_top1}
        marker["sha256"] = hashlib.sha256(content).hexdigest()
        self._store.put(f"slot-{slot}.json", json.dumps(marker).encode())


class _History:
    """metrics.jsonl: one line for each epoch that is done."""

    PATH = "metrics.jsonl"

    def __init__(self, store: Store) -> None:
        self._store = store
        text = store.get(self.PATH).decode() if store.head(self.PATH) else ""
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]

    @property
    def epochs(self) -> int:
        return len(self.lines)

    def cut(self, epochs: int) -> None:
        """Forget what came after the checkpoint that the run resumes from."""
        self.lines = self.lines[:epochs]

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        self._store.put(self.PATH, "".join(json.dumps(entry) + "\n" for entry in self.lines).encode())


class _TensorBoard:
    """Event files below `tensorboard/`, uploaded after every epoch."""

    def __init__(self, store: Store, is_writer: bool) -> None:
        self._store, self._is_writer = store, is_writer

    def __enter__(self) -> "_TensorBoard":
        if self._is_writer:
            from tensorboardX import SummaryWriter

            self._folder = tempfile.TemporaryDirectory(prefix="raycnn-tensorboard-")
            self._writer = SummaryWriter(self._folder.name)
        return self

    def add(self, line: dict[str, Any]) -> None:
        for name, value in line.items():
            if isinstance(value, int | float) and name not in ("epoch", "step"):
                self._writer.add_scalar(name, value, line["step"])
        self._writer.flush()
        for file in Path(self._folder.name).iterdir():
            self._store.put(f"tensorboard/{file.name}", file.read_bytes())

    def __exit__(self, *error: object) -> None:
        if self._is_writer:
            self._writer.close()
            self._folder.cleanup()
