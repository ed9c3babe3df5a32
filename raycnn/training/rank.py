"""What each training worker runs, from the last whole checkpoint to the bundle."""

import functools
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from raycnn import bundle as bundles
from raycnn import data, images, loop
from raycnn.config import GIB, MIB, ImageSpec, TrainConfig, make
from raycnn.errors import Bad, DataError, Status
from raycnn.metrics import Metrics
from raycnn.models import Classifier, build
from raycnn.shards import PackedCollection, open_collection
from raycnn.shards.order import Cursor, epoch_pieces, first_rows, step_counts, steps_per_epoch
from raycnn.storage import open_store
from raycnn.training.folder import (
    FIND_LR,
    FIND_LR_PLOT,
    PICTURES,
    Checkpoints,
    History,
    Saving,
    TensorBoard,
    ended,
    resume_at,
)
from raycnn.training.pictures import find_lr_picture, run_pictures

PIECE_BYTES = 96 * MIB
"""Most pixels that a decode task makes at a time. Ray Data cuts what exceeds 128 MiB into blocks, and a task that
waits for its blocks to be taken keeps its CPU: those of training would starve those of validation for ever."""
VAL_CACHE_BYTES = 256 * MIB
"""Decoded validation pixels that a worker keeps, so that later epochs do not decode them again."""
PIECE_ROWS = 4096
"""Most rows that it makes; a task takes 10 ms beside its work, in which it could decode hundreds of tiny images."""
HEAD_ROWS = 16
"""Least rows of each lane that are decoded first of all, so that the first step comes soon."""
STREAM_ITEMS = (64, 512)
"""Items that one Ray Data execution is made of: the first, and at most. Each takes 2 ms to be submitted, all of which
pass before the first is decoded; so the first step does not wait long, and later executions are rare."""
BATCHES_AHEAD = 2
"""Batches that are ready before a step asks for them: pages of the decoded cache may have to come from the disk."""
PROGRESS_S = 0.5
PREEMPTION_S = 2.0
"""Between two questions whether a node is about to be taken away; each is a barrier of all ranks."""
COUNTS, ELAPSED, VALIDATION = "counts", "elapsed_s", "validation"
"""Tensors of a checkpoint beside those of the trainer."""
NO_COUNTS = [0.0] * (3 + len(Status))
"""Of an epoch, over all ranks: the sum of the losses, trained rows, rows without a label, bad ones of each status."""
SELFTEST_IMAGES = 8
FIND_LR_STEPS = 200


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
        classifier = classifier.to(device, memory_format=torch.channels_last)
        if config.freeze:
            classifier.freeze()
        if config.compile:
            classifier.compile()
        geometry = arguments["geometry"] and data.Geometry(*arguments["geometry"])
        run = _Run(config, packed, spec, arguments["lanes"], plan, arguments["board"], geometry)
        trainer = run.trainer(classifier, prepare_model(classifier))
        if config.find_lr:
            run.find_rate(trainer)
        else:
            run.train(trainer)
            if run.rank == 0:
                hand_over(config, packed, classifier)
    ray.train.report({})


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
        geometry: data.Geometry | None,
    ) -> None:
        import ray.train
        from ray.train.torch import get_device

        context = ray.train.get_context()
        self.rank, self._world, self._device = context.get_world_rank(), context.get_world_size(), get_device()
        self._config, self._packed, self._spec, self._plan = config, packed, spec, plan
        self._board, self._lanes, self._geometry = board, lanes, geometry
        self._is_first_of_node = context.get_local_rank() == 0
        self._owned = [lane for lane in range(lanes) if lane % self._world == self.rank]
        self._store = open_store(config.run)
        self._groups = list(packed.select("train", Counter()))
        self._rows = sum(g.rows for g in self._groups)
        self._steps = steps_per_epoch(self._rows, config.batch_size)
        self._val: list[loop.Batch] | None = None
        self._last_post = self._last_look = 0.0
        self._began = time.perf_counter()
        self._first_step_at: float | None = None
        self._leaving: set[str] = set()

    def trainer(self, classifier: Classifier, model: torch.nn.Module) -> loop.Trainer:
        """What trains the classifier, called as `model`, on this data."""
        per_class = self._packed.counts("train")
        counts = [per_class.get(name, 0) for name in self._packed.class_names]
        return loop.Trainer(classifier, self._config, self._steps * self._config.epochs, model, counts)

    def find_rate(self, trainer: loop.Trainer) -> None:
        """Leave a range test of learning rates in the run folder, and nothing else."""
        batches = map(_to_torch, self._batches(Cursor(0, 0)))
        found = loop.range_test(trainer, batches, min(FIND_LR_STEPS, self._steps * self._config.epochs))
        if self.rank == 0:
            self._store.put(FIND_LR_PLOT, find_lr_picture(*found))
            self._store.put(FIND_LR, json.dumps(found._asdict()).encode())

    def train(self, trainer: loop.Trainer) -> None:
        """Run the epochs that are left."""
        with Saving(self._store) as saving:
            first, counts = self._resume(saving.checkpoints, trainer)
            history = History(self._store)
            history.cut(first.epoch)
            batches = self._batches(first)
            with TensorBoard(self._store, self.rank == 0, first.epoch * self._steps) as board:
                is_over = ended(self._config, history.lines) is not None
                while not is_over:
                    line, metrics = self._epoch(first, counts, trainer, batches, saving)
                    if self.rank == 0:
                        history.add(line)
                        board.add(line)
                        saving.save(
                            self._state(trainer) | {VALIDATION: metrics.to_vector()}, first, metrics.accuracy_top1
                        )
                        self._post({"kind": "epoch", "epochs": self._config.epochs} | line)
                    is_over = bool(
                        self._sum([float(self.rank == 0 and ended(self._config, history.lines) is not None)])[0]
                    )
                    first, counts = Cursor(first.epoch + 1, 0), list(NO_COUNTS)

    def _resume(self, checkpoints: Checkpoints, trainer: loop.Trainer) -> tuple[Cursor, list[float]]:
        """Load the checkpoint that rank 0 finds, so that all ranks go on from one; where, and what it had counted."""
        last = checkpoints.last() if self.rank == 0 else None
        first = Cursor(*map(int, self._sum(list(map(float, resume_at(last))))))
        counts = list(NO_COUNTS)
        if first > (0, 0):
            tensors = checkpoints.load(last or checkpoints.at(first))
            if first.step and self.rank == 0:  # they are those of all ranks
                counts = tensors[COUNTS].tolist()
            trainer.restore(tensors)
            self._began -= float(tensors[ELAPSED])
        return first, counts

    def _state(self, trainer: loop.Trainer) -> dict[str, torch.Tensor]:
        return trainer.state() | {ELAPSED: torch.tensor(self._elapsed(), dtype=torch.float64)}

    def _elapsed(self) -> float:
        """Seconds that the run has trained, in this process and in those before it."""
        return time.perf_counter() - self._began

    def _epoch(
        self,
        first: Cursor,
        counts: list[float],
        trainer: loop.Trainer,
        batches: Iterator[data.FeedBatch],
        saving: Saving,
    ) -> tuple[dict[str, Any], Metrics]:
        """What is left of an epoch, its line, and how the model does after it.

        `counts` is what an earlier process had counted of it.
        """
        epoch, start, rows_before = first.epoch, time.perf_counter(), counts[1]
        trainer.clock.begin()
        for step in range(first.step, self._steps):
            taken = next(batches)
            done = trainer.step(_to_torch(taken), epoch * self._steps + step, epoch, self._told())
            self._first_step_at = self._first_step_at or time.time()
            found = [sum(f.status == word for f in taken.failures) for word in Status]
            found = [done.loss, done.rows, taken.unlabelled, *found]
            counts = [a + b for a, b in zip(counts, found, strict=True)]
            self._post_step(epoch, step, int(counts[1] - rows_before), start)
            if done.told.time_used >= 1:
                break
            is_due = (step + 1) % self._config.checkpoint_every == 0 or self._is_preempted(done.told)
            if is_due and step + 1 < self._steps:
                so_far = self._sum(counts)
                self._skipped(so_far)
                if self.rank == 0:
                    saving.save(self._state(trainer) | {COUNTS: torch.tensor(so_far)}, Cursor(epoch, step + 1))
                trainer.clock.mark("checkpoint")
        total, all_rows, *_ = everything = self._sum(counts)
        skipped = self._skipped(everything)
        seconds = time.perf_counter() - start
        trainer.clock.begin()
        metrics = loop.evaluate(trainer.evaluated, self._val_batches(), len(self._packed.class_names))
        trainer.clock.mark("validation")
        line = {
            "epoch": epoch,
            "step": epoch * self._steps + step + 1,
            "train/loss": total / max(1.0, all_rows),
            "val/loss": metrics.loss,
            "metrics/accuracy_top1": metrics.accuracy_top1,
            "metrics/accuracy_top5": metrics.accuracy_top5,
            "lr": loop.learning_rate(self._config, done.done),
            "images_per_s": (all_rows - rows_before) / seconds,  # of rank 0, which alone knows the rows before
            "seconds": seconds,
            "elapsed_s": self._elapsed(),
            "time": _shares(trainer.clock.take()),
            "skipped": skipped,
        }
        if epoch == 0 and first.step == 0:
            line["first_step_at"] = self._first_step_at  # Unix time; who has started the driver knows when
        return line, metrics

    def _told(self) -> loop.Told:
        """What rank 0 tells all others with a step; they say nothing."""
        if self.rank:
            return loop.Told()
        used = self._elapsed() / self._config.max_time if self._config.max_time else 0.0
        is_due = time.perf_counter() - self._last_look > PREEMPTION_S
        if is_due:
            self._last_look = time.perf_counter()
        return loop.Told(used, float(is_due))

    def _is_preempted(self, told: loop.Told) -> bool:
        """Whether a node of this run is about to be taken away, as was not known before; asked by all ranks at once."""
        import ray.train

        if not told.looks:
            return False
        info = ray.train.get_preemption_info()
        nodes = set(info.preempted_node_ids) if info is not None else set[str]()
        news = nodes - self._leaving
        self._leaving |= news
        return bool(news)

    def _skipped(self, counts: list[float]) -> dict[str, int]:
        """The images of an epoch that were not trained on, by reason; DataError where they are too many."""
        _, _, unlabelled, *bad = counts
        skipped = {str(word): int(count) for word, count in zip(Status, bad, strict=True) if count}
        check_bad(skipped, self._rows, self._config.max_bad)
        return skipped | ({"unlabelled": int(unlabelled)} if unlabelled else {})

    def _sum(self, values: list[float]) -> list[float]:
        """Each value added up over the ranks."""
        return loop.summed(values, self._device)

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
        """This rank's share of every step of every epoch from `first` on, in order, made ahead on a thread."""
        return data.read_ahead(self._made_batches(first), BATCHES_AHEAD)

    def _made_batches(self, first: Cursor) -> Iterator[data.FeedBatch]:
        c, geometry = self._config, self._geometry
        starts = [first, *(Cursor(epoch, 0) for epoch in range(first.epoch + 1, c.epochs))]
        cache = None if geometry is None else self._cache(geometry)
        epochs = map(
            self._pieces, starts, itertools.chain([max(HEAD_ROWS, c.batch_size // self._lanes)], itertools.repeat(0))
        )
        if cache is None:
            # What is decoded anyway is best decoded without a pause between epochs.
            epochs = iter([itertools.chain.from_iterable(epochs)])
        arguments = self._decode_arguments() | {"seed": c.seed, "crop_scale": c.crop_scale, "geometry": geometry}
        blocks = (block for pieces in epochs for block in self._stream(pieces, arguments, cache))
        buffers = data.LaneBuffers(blocks, self._spec, cache)
        has_boxes = geometry is None or (not geometry.short and c.crop_scale == 1)
        for start in starts:
            rows = first_rows(self._rows, c.batch_size, self._lanes, self._owned, start.step)
            buffers.begin(start.epoch, rows)
            for step in range(start.step, self._steps):
                counts = step_counts(self._rows, c.batch_size, self._lanes, self._owned, step)
                taken = buffers.take(list(counts))
                yield taken._replace(sizes=None) if has_boxes else taken

    def _pieces(self, start: Cursor, head: int) -> Iterator[dict[str, Any]]:
        """What is left of an epoch for this rank to read; `head` rows of each lane first, unless it is 0."""
        c, positions = self._config, [0, *itertools.accumulate(g.rows for g in self._groups)]
        for piece in epoch_pieces(
            self._groups, c.seed, start, c.batch_size, self._lanes, self._owned, self._most_rows(), head
        ):
            yield piece._asdict() | {"slice": list(self._groups[piece.group]), "row": positions[piece.group]}

    def _most_rows(self) -> int:
        """That one task may decode, of the training or of the validation split."""
        sizes = [self._spec.height * self._spec.width * self._spec.channels]
        sizes += [self._geometry.slot_bytes] if self._geometry else []
        return max(1, min(PIECE_ROWS, PIECE_BYTES // max(sizes)))

    def _cache(self, geometry: data.Geometry) -> data.Cache | None:
        budget = int(self._config.cache_gib * GIB)
        if not budget:
            return None
        say = self._say if self._is_first_of_node else _say_nothing
        return data.open_cache(self._packed.digest, geometry, self._rows, budget, say)

    def _say(self, text: str) -> None:
        self._post({"kind": "note", "text": text})

    def _stream(
        self, pieces: Iterable[dict[str, Any]], arguments: dict[str, Any], cache: data.Cache | None = None
    ) -> Iterator[data.Block]:
        size, most = STREAM_ITEMS
        items = data.items_of(pieces, self._most_rows(), arguments.get("seed"), cache)
        while chunk := list(itertools.islice(items, size)):
            decoded = functools.partial(data.stream, data.decode, plan=self._plan, arguments=arguments)
            yield from decoded(chunk) if cache is None else data.through_cache(chunk, decoded, self._config.seed, cache)
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
        pieces = data.row_ranges(groups, low, high, self._most_rows())
        for block in self._stream(pieces, self._decode_arguments()):
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
    metrics = Metrics.from_vector(tensors[VALIDATION], len(packed.class_names))
    classifier.load_state_dict(loop.evaluated_weights(tensors))
    for name, png in run_pictures(classifier.eval(), packed, metrics, History(store).lines).items():
        store.put(f"{PICTURES}/{name}", png)
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


def _shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Of the time of an epoch and its validation, what went into each part of it."""
    whole = sum(seconds.values()) or 1.0
    return {name: round(spent / whole, 4) for name, spent in seconds.items()}


def _say_nothing(text: str) -> None:
    """Another rank of the node has said it."""


def _to_torch(taken: data.FeedBatch) -> loop.Batch:
    pixels, labels, keys, lanes = map(torch.from_numpy, (taken.pixels, taken.labels, taken.keys, taken.lanes))
    return loop.Batch(pixels, labels, keys, lanes, None if taken.sizes is None else torch.from_numpy(taken.sizes))
