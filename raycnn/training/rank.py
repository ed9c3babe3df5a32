"""What each training worker runs, from the last whole checkpoint to the bundle."""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from raycnn import bundle as bundles
from raycnn import data, images, loop
from raycnn.config import MIB, ImageSpec, TrainConfig, make
from raycnn.errors import Bad, DataError, Status
from raycnn.metrics import Metrics
from raycnn.models import Classifier, build
from raycnn.shards import PackedCollection, open_collection
from raycnn.shards.order import Cursor, epoch_pieces, first_rows, step_counts, steps_per_epoch
from raycnn.storage import open_store
from raycnn.training.folder import Checkpoints, History, TensorBoard, resume_at

PIECE_BYTES = 96 * MIB
"""Most pixels that a decode task makes at a time. Ray Data cuts what exceeds 128 MiB into blocks, and a task that
waits for its blocks to be taken keeps its CPU: those of training would starve those of validation for ever."""
VAL_CACHE_BYTES = 256 * MIB
"""Decoded validation pixels that a worker keeps, so that later epochs do not decode them again."""
STREAM_PIECES = (64, 512)
"""Pieces that one Ray Data execution is made of: the first, and at most. Each takes 2 ms to be submitted, all of which
pass before the first is decoded; so the first step does not wait long, and later executions are rare."""
PROGRESS_S = 0.5
COUNTS = "counts"
NO_COUNTS = [0.0] * (3 + len(Status))
"""Of an epoch, over all ranks: the sum of the losses, trained rows, rows without a label, bad ones of each status."""
SELFTEST_IMAGES = 8


def check_bad(bad: Mapping[str, int], rows: int, max_bad: float) -> None:
    """DataError if more of the training images are unreadable than are allowed."""
    if (count := sum(bad.values())) > max_bad * rows:
        words = ", ".join(f"{n} {status}" for status, n in sorted(bad.items()))
        raise DataError(
            f"{count} of {rows} training images cannot be read ({words}), more than --max-bad {max_bad:g}; "
            "mend them or raise it"
        )


def work(arguments: dict[str, Any]) -> None:
    """Train as one of Ray Train's workers; of all of them the first writes what the run leaves."""
    import ray.train
    from ray.train.torch import get_device, prepare_model

    config = make(TrainConfig, arguments["config"])
    plan = data.TrainPlan(**arguments["plan"])
    device = get_device()
    if device.type == "cpu":
        torch.set_num_threads(plan.threads)
    with data.user_errors():
        packed = open_collection(arguments["data"])
        assert isinstance(packed, PackedCollection)
        spec = ImageSpec(**arguments["spec"])
        classifier = build(config.model, len(packed.class_names), spec, config.weights, seed=config.seed)
        model = prepare_model(classifier)
        run = _Run(config, packed, spec, arguments["lanes"], plan, arguments["board"])
        run.train(classifier, model)
        if run.rank == 0:
            hand_over(config, packed, classifier)
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
        board: Any,
    ) -> None:
        import ray.train
        from ray.train.torch import get_device

        context = ray.train.get_context()
        self.rank, self._world, self._device = context.get_world_rank(), context.get_world_size(), get_device()
        self._config, self._packed, self._spec, self._plan = config, packed, spec, plan
        self._board, self._lanes = board, lanes
        self._owned = [lane for lane in range(lanes) if lane % self._world == self.rank]
        self._store = open_store(config.run)
        self._groups = list(packed.select("train", Counter()))
        self._rows = sum(g.rows for g in self._groups)
        self._steps = steps_per_epoch(self._rows, config.batch_size)
        self._piece_rows = max(1, PIECE_BYTES // (spec.height * spec.width * spec.channels))
        self._val: list[loop.Batch] | None = None
        self._last_post = 0.0

    def train(self, classifier: Classifier, model: torch.nn.Module) -> None:
        """Run the epochs that are left."""
        trainer = loop.Trainer(model, self._config, self._steps * self._config.epochs)
        checkpoints = Checkpoints(self._store)
        first, counts = self._resume(checkpoints, classifier, trainer)

        def save_within(epoch: int, step: int, so_far: list[float]) -> None:
            state = loop.pack_state(classifier, trainer.optimizer)
            checkpoints.save(state | {COUNTS: torch.tensor(so_far, dtype=torch.float64)}, epoch, None, step)

        history = History(self._store)
        history.cut(first.epoch)
        batches = self._batches(first)
        with TensorBoard(self._store, self.rank == 0, first.epoch * self._steps) as board:
            for epoch in range(first.epoch, self._config.epochs):
                here = first if epoch == first.epoch else Cursor(epoch, 0)
                line = self._epoch(here, counts, trainer, batches, save_within)
                counts = list(NO_COUNTS)
                metrics = loop.evaluate(classifier, self._val_batches(), len(self._packed.class_names))
                if self.rank == 0:
                    line |= {"metrics/accuracy_top1": metrics.accuracy_top1, "val/loss": metrics.loss}
                    line |= {"metrics/accuracy_top5": metrics.accuracy_top5}
                    state = loop.pack_state(classifier, trainer.optimizer) | {"validation": metrics.to_vector()}
                    history.add(line)
                    board.add(line)
                    checkpoints.save(state, epoch, metrics.accuracy_top1)
                    self._post({"kind": "epoch", "epochs": self._config.epochs} | line)

    def _resume(
        self, checkpoints: Checkpoints, classifier: Classifier, trainer: loop.Trainer
    ) -> tuple[Cursor, list[float]]:
        """Load the checkpoint that rank 0 finds, so that all ranks go on from one; where, and what it had counted."""
        last = checkpoints.last() if self.rank == 0 else None
        first = Cursor(*map(int, self._sum(list(map(float, resume_at(last))))))
        counts = list(NO_COUNTS)
        if first > (0, 0):
            tensors = checkpoints.load(last or checkpoints.at(first))
            if first.step and self.rank == 0:  # they are those of all ranks
                counts = tensors[COUNTS].tolist()
            loop.unpack_state(tensors, classifier, trainer.optimizer)
        return first, counts

    def _epoch(
        self,
        first: Cursor,
        counts: list[float],
        trainer: loop.Trainer,
        batches: Iterator[data.FeedBatch],
        save_within: Callable[[int, int, list[float]], None],
    ) -> dict[str, Any]:
        """What is left of an epoch, and its line; `counts` is what an earlier process had counted of it."""
        epoch, start, rows_before = first.epoch, time.perf_counter(), counts[1]
        for step in range(first.step, self._steps):
            taken = next(batches)
            loss, count = trainer.step(_to_torch(taken), epoch * self._steps + step)
            found = [loss, count, taken.unlabelled, *(sum(f.status == word for f in taken.failures) for word in Status)]
            counts = [a + b for a, b in zip(counts, found, strict=True)]
            self._post_step(epoch, step, int(counts[1] - rows_before), start)
            if (step + 1) % self._config.checkpoint_every == 0 and step + 1 < self._steps:
                so_far = self._sum(counts)
                self._skipped(so_far)
                if self.rank == 0:
                    save_within(epoch, step + 1, so_far)
        total, all_rows, *_ = everything = self._sum(counts)
        skipped = self._skipped(everything)
        seconds = time.perf_counter() - start
        return {
            "epoch": epoch,
            "step": (epoch + 1) * self._steps,
            "train/loss": total / max(1.0, all_rows),
            "lr": trainer.optimizer.param_groups[0]["lr"],
            "images_per_s": (all_rows - rows_before) / seconds,  # of rank 0, which alone knows the rows before
            "seconds": seconds,
            "skipped": skipped,
        }

    def _skipped(self, counts: list[float]) -> dict[str, int]:
        """The images of an epoch that were not trained on, by reason; DataError where they are too many."""
        _, _, unlabelled, *bad = counts
        skipped = {str(word): int(count) for word, count in zip(Status, bad, strict=True) if count}
        check_bad(skipped, self._rows, self._config.max_bad)
        return skipped | ({"unlabelled": int(unlabelled)} if unlabelled else {})

    def _sum(self, values: list[float]) -> list[float]:
        """Each value summed up over the ranks."""
        if self._world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(tensor)
        return tensor.tolist()

    def _post_step(self, epoch: int, step: int, rows: int, start: float) -> None:
        now = time.perf_counter()
        if self.rank == 0 and now - self._last_post > PROGRESS_S:
            self._last_post = now
            done = epoch * self._rows + min(self._rows, (step + 1) * self._config.batch_size)
            rate = rows * self._world / max(now - start, 1e-9)
            text = f"epoch {epoch + 1}/{self._config.epochs}"
            total = self._config.epochs * self._rows
            self._post({"kind": "progress", "done": done, "total": total, "rate": rate, "text": text})

    def _post(self, event: dict[str, Any]) -> None:
        self._board.post.remote(event)

    def _batches(self, first: Cursor) -> Iterator[data.FeedBatch]:
        """This rank's share of every step of every epoch from `first` on, in order."""
        c = self._config
        starts = [first, *(Cursor(epoch, 0) for epoch in range(first.epoch + 1, c.epochs))]
        items = (
            piece._asdict() | {"slice": list(self._groups[piece.group])}
            for start in starts
            for piece in epoch_pieces(
                self._groups, c.seed, start, c.batch_size, self._lanes, self._owned, self._piece_rows
            )
        )
        arguments = self._decode_arguments() | {"seed": c.seed, "crop_scale": c.crop_scale}
        buffers = data.LaneBuffers(self._stream(items, arguments), self._spec)
        for start in starts:
            rows = first_rows(self._rows, c.batch_size, self._lanes, self._owned, start.step)
            buffers.begin(start.epoch, rows)
            for step in range(start.step, self._steps):
                counts = step_counts(self._rows, c.batch_size, self._lanes, self._owned, step)
                yield buffers.take(list(counts))

    def _stream(self, items: Iterator[dict[str, Any]], arguments: dict[str, Any]) -> Iterator[dict[str, np.ndarray]]:
        size, most = STREAM_PIECES
        while chunk := list(itertools.islice(items, size)):
            yield from data.stream(data.decode_piece, chunk, self._plan, arguments)
            size = min(2 * size, most)

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
        low, high = self.rank * rows // self._world, (self.rank + 1) * rows // self._world
        size = (high - low) * self._spec.height * self._spec.width * self._spec.channels
        kept: list[loop.Batch] | None = [] if size <= VAL_CACHE_BYTES else None
        items = iter(data.row_ranges(groups, low, high, self._piece_rows))
        for block in self._stream(items, self._decode_arguments()):
            for at in range(0, len(block["label"]), self._config.batch_size):
                part = {k: v[at : at + self._config.batch_size] for k, v in block.items()}
                batch = _to_torch(data.join([part], self._spec))
                if kept is not None:
                    kept.append(batch)
                yield batch
        self._val = kept


def hand_over(config: TrainConfig, packed: PackedCollection, classifier: Classifier) -> None:
    """Make the run's bundle from its best checkpoint, with that one's temperature and validation."""
    store = open_store(config.run)
    checkpoints = Checkpoints(store)
    last, best = checkpoints.last(), checkpoints.best()
    assert last is not None
    assert best is not None
    tensors = checkpoints.load(best)
    metrics = Metrics.from_vector(tensors.pop("validation"), len(packed.class_names))
    loop.unpack_state(tensors, classifier)
    piece = next(packed.select("val", Counter()))
    samples = [s.encoded for s in packed.read([piece]) if s.encoded][: SELFTEST_IMAGES * 2]
    good = [s for s in samples if not isinstance(images.pixels(s, classifier.spec), Bad)][:SELFTEST_IMAGES]
    bundles.save(
        store.child("bundle").url,
        classifier.cpu().eval(),
        packed.class_names,
        temperature=metrics.temperature,
        metrics={
            "accuracy_top1": metrics.accuracy_top1,
            "loss": metrics.loss,
            "epochs": resume_at(last).epoch,
        },
        validation=metrics.validation(),
        samples=good,
        data_fingerprint=packed.digest,
    )


def _to_torch(taken: data.FeedBatch) -> loop.Batch:
    return loop.Batch(torch.from_numpy(taken.pixels), torch.from_numpy(taken.labels))
