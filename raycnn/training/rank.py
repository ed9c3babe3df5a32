"""What each training worker runs, from the last whole checkpoint to the bundle."""

import functools
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raycnn import bundle as bundles
from raycnn import data, images, loop
from raycnn.config import ImageSpec, TrainConfig, make
from raycnn.errors import Bad, ConfigError, Status, StorageError
from raycnn.metrics import Metrics
from raycnn.models import Classifier, build
from raycnn.shards import PackedCollection, open_collection
from raycnn.shards.order import Cursor
from raycnn.storage import open_store
from raycnn.training.folder import (
    CUT,
    FIND_LR,
    FIND_LR_PLOT,
    PICTURES,
    BadImages,
    Checkpoints,
    History,
    Saving,
    TensorBoard,
    check_bad,
    claim,
    cut_at,
    ended,
    resume_at,
)
from raycnn.training.pictures import confusion_picture, find_lr_picture, run_pictures, samples_picture
from raycnn.training.samples import Samples

PROGRESS_S = 0.5
PREEMPTION_S = 2.0
"""Between two questions whether a node is about to be taken away; each is a barrier of all ranks."""
COUNTS, ELAPSED, VALIDATION = "counts", "elapsed_s", "validation"
"""Tensors of a checkpoint beside those of the trainer."""
NO_COUNTS = [0.0] * (3 + len(Status))
"""Of an epoch, over all ranks: the sum of the losses, trained rows, rows without a label, bad ones of each status."""
UNLABELLED = "unlabelled"
SELFTEST_IMAGES = 8
FIND_LR_STEPS = 200

_Batches = Iterator[tuple[loop.Batch, data.FeedBatch]]
"""As `Samples.batches` gives them."""


def work(arguments: dict[str, Any]) -> None:
    """Train as one of Ray Train's workers; of all of them the first writes what the run leaves."""
    import ray.train
    from ray.train.torch import get_device

    config = make(TrainConfig, arguments["config"])
    plan = data.TrainPlan(**arguments["plan"])
    device = get_device()
    if device.type == "cpu":
        torch.set_num_threads(plan.threads)
    else:
        torch.cuda.set_device(device)
    with data.user_errors():
        packed = open_collection(arguments["data"])
        assert isinstance(packed, PackedCollection)
        spec = ImageSpec(**arguments["spec"])
        board, context = arguments["board"], ray.train.get_context()
        say = functools.partial(_note, board) if context.get_local_rank() == 0 else _say_nothing
        samples = Samples(config, packed, spec, plan, arguments["claim"], say)
        run = _Run(config, packed, samples, device, board)
        if config.find_lr:
            run.find_rate()
        else:
            classifier = run.train()
            if loop.rank() == 0:
                hand_over(config, packed, classifier)
    ray.train.report({})


class _Run:
    """One rank of a run, over all its epochs."""

    _trainer: loop.Trainer
    _began: float

    def __init__(
        self, config: TrainConfig, packed: PackedCollection, samples: Samples, device: torch.device, board: Any
    ) -> None:
        self._rank, self._config, self._packed, self._board = loop.rank(), config, packed, board
        self._samples, self._device = samples, device
        self._store = open_store(config.run)
        self._steps, self._rows = samples.steps, samples.rows
        self._last_post = self._last_look = 0.0
        self._first_step_at: float | None = None
        self._leaving: set[str] = set()

    def find_rate(self) -> None:
        """Leave a range test of learning rates in the run folder, and nothing else."""
        batches = self._samples.batches(Cursor(0, 0), self._device)
        self._make_model()
        steps = min(FIND_LR_STEPS, self._steps * self._config.epochs)
        found = loop.range_test(self._trainer, (batch for batch, _ in batches), steps)
        if self._rank == 0:
            self._store.put(FIND_LR_PLOT, find_lr_picture(*found))
            self._store.put(FIND_LR, json.dumps(found._asdict()).encode())

    def train(self) -> Classifier:
        """Run the epochs that are left."""
        with Saving(self._store) as saving:
            history, bad = History(self._store), BadImages(self._store)
            first, marker = self._place(saving.checkpoints, history)
            history.cut(first.epoch)
            is_over = self._is_over(history)
            batches = iter(()) if is_over else self._samples.batches(first, self._device)
            classifier = self._make_model()  # while the first images are decoded
            self._claim(is_new=first == (0, 0))
            counts = self._restored(first, marker, saving.checkpoints)
            self._trainer.clock.begin()
            with TensorBoard(self._store, self._rank == 0, first.epoch * self._steps) as board:
                while not is_over:
                    tally = _Tally(counts)
                    line = self._epoch(first, tally, batches, saving, bad)
                    metrics = self._evaluated(line)
                    if self._rank == 0:
                        history.add(line)
                        board.add(line, self._pictures(metrics, tally))
                        state = self._state(tally.total) | {VALIDATION: metrics.to_vector()}
                        saving.save(state, Cursor(first.epoch, line.get(CUT, 0)), metrics.accuracy_top1)
                        self._trainer.clock.mark("checkpoint")  # which the next epoch tells
                        self._post({"kind": "epoch", "epochs": self._config.epochs} | line)
                    first, counts = Cursor(first.epoch + 1, 0), list(NO_COUNTS)
                    is_over = self._is_over(history)
        return classifier

    def _make_model(self) -> Classifier:
        """The model, and what trains it; the time of training is counted from here."""
        from ray.train.torch import prepare_model

        config, names = self._config, self._packed.class_names
        classifier = build(config.model, len(names), self._samples.spec, config.weights, seed=config.seed)
        classifier = classifier.to(self._device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if config.freeze:
            classifier.freeze()
        if config.compile:
            classifier.compile()
        per_class, steps = self._packed.counts("train"), self._steps * config.epochs
        counts = [per_class.get(name, 0) for name in names]
        self._trainer = loop.Trainer(classifier, config, steps, prepare_model(classifier), counts)
        self._began = time.perf_counter()
        return classifier

    def _claim(self, *, is_new: bool) -> None:
        """Make the folder this run's, now that its model could be made.

        Raises:
            ConfigError: another run has begun there since this one's driver looked, or a new one cannot.
        """
        wanted = self._samples.claim
        try:
            found = claim(self._store, self._config, self._packed, wanted)
        except StorageError as error:
            if is_new:
                raise ConfigError(str(error)) from None  # which Ray Train does not try again
            raise
        if found != wanted:
            raise ConfigError(f"{self._store.address()}: another run has just begun there; use another run folder")

    def _is_over(self, history: History) -> bool:
        """As rank 0 has it, whose history is whole."""
        is_over = self._rank == 0 and ended(self._config, history.lines) is not None
        return bool(self._sum([float(is_over)])[0])

    def _place(self, checkpoints: Checkpoints, history: History) -> tuple[Cursor, dict[str, Any] | None]:
        """Where the run goes on: after the checkpoint that rank 0 finds, whose marker it has; the same on all ranks."""
        last = checkpoints.last() if self._rank == 0 else None
        if last is not None:
            checkpoints.best()  # of which it is said, too, if it is torn
        first, history.lines = resume_at(last), history.until(last)
        is_over = ended(self._config, history.lines) is not None
        if last is not None and not is_over:
            first = cut_at(last) or first  # there is more time now
        if checkpoints.torn:
            names = ", ".join(checkpoints.torn)
            where = f"epoch {first.epoch + 1}, step {first.step + 1}" if last else "the beginning"
            then = f"going on from {where}"
            if is_over:
                then = "the bundle is made of another"
            self._post({"kind": "note", "text": f"torn or altered, and not used: {names}; {then}"})
        return Cursor(*map(int, self._sum(list(map(float, first))))), last

    def _restored(self, first: Cursor, marker: dict[str, Any] | None, checkpoints: Checkpoints) -> list[float]:
        """What the epoch had counted until then; the trainer goes on as it was."""
        if first == (0, 0):
            return list(NO_COUNTS)
        tensors = checkpoints.load(marker or checkpoints.at(first))
        self._trainer.restore(tensors)
        self._began -= float(tensors[ELAPSED])
        is_counted = first.step and self._rank == 0  # they are those of all ranks
        return tensors[COUNTS].tolist() if is_counted else list(NO_COUNTS)

    def _state(self, counts: list[float]) -> dict[str, torch.Tensor]:
        more = {
            ELAPSED: torch.tensor(self._elapsed(), dtype=torch.float64),
            COUNTS: torch.tensor(counts, dtype=torch.float64),
        }
        return self._trainer.state() | more

    def _elapsed(self) -> float:
        """Seconds that the run has trained, in this process and in those before it."""
        return time.perf_counter() - self._began

    def _epoch(
        self, first: Cursor, tally: "_Tally", batches: _Batches, saving: Saving, bad: BadImages
    ) -> dict[str, Any]:
        """What is left of an epoch, and its line."""
        steps, share = self._steps_left(first, tally, batches, saving, bad)
        skipped = self._counted(tally, bad)
        total, all_rows, *_ = tally.total
        seconds = time.perf_counter() - tally.began
        line = {
            "epoch": first.epoch,
            "step": steps,
            "train/loss": total / max(1.0, all_rows),
            "lr": loop.learning_rate(self._config, share),
            "images_per_s": (all_rows - tally.rows_before) / seconds,  # of rank 0, which alone knows the rows before
            "seconds": seconds,
            "skipped": skipped,
        }
        if steps < (first.epoch + 1) * self._steps:
            line[CUT] = steps - first.epoch * self._steps
        if first == (0, 0):
            line["first_step_at"] = self._first_step_at  # Unix time; who has started the driver knows when
        return line

    def _steps_left(
        self, first: Cursor, tally: "_Tally", batches: _Batches, saving: Saving, bad: BadImages
    ) -> tuple[int, float]:
        """How many steps the run has taken then, and which share of it that is."""
        trainer, share = self._trainer, 0.0
        at = first.epoch * self._steps + first.step
        for step in range(first.step, self._steps):
            batch, taken = next(batches)
            if tally.shown is None and first.epoch == 0 and self._rank == 0:
                tally.shown = trainer.prepared(batch, at, 0, 0.0)[0].round().byte().cpu().numpy()
            done = trainer.step(batch, at, first.epoch, self._told())
            self._first_step_at = self._first_step_at or time.time()
            at, share = at + 1, done.done
            tally.add(done, taken)
            self._post_step(first.epoch, step, tally)
            if done.told.time_used >= 1:
                break
            is_due = (step + 1) % self._config.checkpoint_every == 0 or self._is_preempted(done.told)
            if is_due and step + 1 < self._steps:
                self._counted(tally, bad)
                if self._rank == 0:
                    saving.save(self._state(tally.total), Cursor(first.epoch, step + 1))
                trainer.clock.mark("checkpoint")
        return at, share

    def _evaluated(self, line: dict[str, Any]) -> Metrics:
        """How the model does now; also what the epoch's line says of it, and of the time of both."""
        trainer = self._trainer
        trainer.clock.mark("other")
        metrics = loop.evaluate(trainer.evaluated, self._samples.validation(), len(self._packed.class_names))
        trainer.clock.mark("validation")
        skipped = self._sum([float(self._samples.val_skipped[word]) for word in Status])
        line |= {
            "val/loss": metrics.loss,
            "metrics/accuracy_top1": metrics.accuracy_top1,
            "metrics/accuracy_top5": metrics.accuracy_top5,
            "val/skipped": _by_status(skipped),
            "elapsed_s": self._elapsed(),
            "time": _shares(trainer.clock.take()),
        }
        return metrics

    def _counted(self, tally: "_Tally", bad: BadImages) -> dict[str, int]:
        """The images of an epoch so far that were not trained on, by reason; DataError where they are too many.

        The unreadable ones of all ranks are listed, by name: what the decoded cache knows by its hash alone, packing
        has listed.
        """
        tally.total = self._sum(tally.counts)
        _, _, unlabelled, *counts = tally.total
        skipped = _by_status(counts)
        if count := sum(skipped.values()):
            failures = list(itertools.chain.from_iterable(loop.gathered(tally.failures)))
            if self._rank == 0:
                names = self._names if any(not failure.key for failure in failures) else {}
                found = {f.key or names.get(f.hash, ""): f.bad for f in failures}
                found.pop("", None)
                bad.write(found, count)
        check_bad(skipped, self._rows, self._config.max_bad, self._store.address(BadImages.PATH))
        return skipped | ({UNLABELLED: int(unlabelled)} if unlabelled else {})

    @functools.cached_property
    def _names(self) -> dict[int, str]:
        """Keys that packing could not read, by their hashes."""
        return {data.feed_key(key): key for key in self._packed.unreadable()}

    def _pictures(self, metrics: Metrics, tally: "_Tally") -> dict[str, bytes]:
        """For TensorBoard."""
        shown = {"confusion matrix": confusion_picture(metrics.confusion.numpy(), self._packed.class_names)}
        return shown | ({"training images": samples_picture(tally.shown)} if tally.shown is not None else {})

    def _told(self) -> loop.Told:
        """What rank 0 tells all others with a step; they say nothing."""
        if self._rank:
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

    def _sum(self, values: list[float]) -> list[float]:
        """Each value added up over the ranks."""
        return loop.summed(values, self._device)

    def _post_step(self, epoch: int, step: int, tally: "_Tally") -> None:
        now = time.perf_counter()
        if self._rank == 0 and now - self._last_post > PROGRESS_S:
            self._last_post = now
            done = epoch * self._rows + min(self._rows, (step + 1) * self._config.batch_size)
            rows = tally.counts[1] - tally.rows_before
            rate = rows * loop.world_size() / max(now - tally.began, 1e-9)
            text = f"epoch {epoch + 1}/{self._config.epochs}"
            event = {"kind": "progress", "done": done, "total": self._config.epochs * self._rows, "rate": rate}
            if self._config.max_time:
                event["most_s"] = max(0.0, self._config.max_time - self._elapsed())
            self._post(event | {"text": text})

    def _post(self, event: dict[str, Any]) -> None:
        self._board.post.remote(event)


class _Tally:
    """What an epoch has come to on this rank."""

    def __init__(self, counts: list[float]) -> None:
        """Go on with what an earlier process had counted, on all ranks."""
        self.counts, self.rows_before, self.began = counts, counts[1], time.perf_counter()
        self.total = counts
        """As `counts`, over all ranks, when they were last added up."""
        self.failures: list[data.Failure] = []
        self.shown: npt.NDArray[np.uint8] | None = None
        """A batch of the run's first epoch, as the network is given it."""

    def add(self, done: loop.Step, taken: data.FeedBatch) -> None:
        """One step more."""
        found = [sum(f.bad.status == word for f in taken.failures) for word in Status]
        found = [done.loss, done.rows, taken.unlabelled, *found]
        self.counts = [a + b for a, b in zip(self.counts, found, strict=True)]
        self.failures += taken.failures[: BadImages.MOST - len(self.failures)]


def _note(board: Any, text: str) -> None:
    board.post.remote({"kind": "note", "text": text})


def _say_nothing(text: str) -> None:
    """Another rank of the node has said it."""


def hand_over(config: TrainConfig, packed: PackedCollection, classifier: Classifier) -> None:
    """Make the run's bundle from its best checkpoint, with that one's temperature and validation."""
    store = open_store(config.run)
    checkpoints, lines = Checkpoints(store), History(store).lines
    last, best = checkpoints.last(), checkpoints.best()
    assert last is not None
    assert best is not None
    tensors = checkpoints.load(best)
    metrics = Metrics.from_vector(tensors[VALIDATION], len(packed.class_names))
    classifier.load_state_dict(loop.evaluated_weights(tensors))
    for name, png in run_pictures(classifier.eval(), packed, metrics, lines).items():
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
            "steps": lines[-1]["step"],
        },
        validation=metrics.validation(),
        samples=good,
        data_fingerprint=packed.digest,
    )


def _by_status(counts: Sequence[float]) -> dict[str, int]:
    return {str(word): int(count) for word, count in zip(Status, counts, strict=True) if count}


def _shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Of the time of an epoch, its validation and the checkpoint before it, what went into each part of it."""
    whole = sum(seconds.values()) or 1.0
    return {name: round(spent / whole, 4) for name, spent in seconds.items()}
