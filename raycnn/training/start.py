"""The driver's part of a run: checks before any work, the plan, Ray Train, and the report; without torch."""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from raycnn import data
from raycnn.config import GIB, ImageSpec, PackConfig, TrainConfig, make
from raycnn.errors import ConfigError, DataError, Status, StorageError, in_words
from raycnn.shards import UNREADABLE, Collection, PackedCollection, open_collection
from raycnn.shards.order import lanes_for
from raycnn.storage import Store, contains, open_store
from raycnn.training.folder import (
    DATA,
    FIND_LR,
    FIND_LR_PLOT,
    Checkpoints,
    Claim,
    History,
    check_bad,
    check_before_packing,
    claimed,
    ended,
    repeat_command,
    resume_at,
)
from raycnn.training.model_input import check_grows, image_spec


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
    repeat: str
    """The command that does the same again, into another folder."""


@dataclass(frozen=True)
class RateReport:
    """What a range test of learning rates has found."""

    suggestion: float
    """Where the loss falls most steeply: a learning rate to try as the schedule's peak."""
    steps: int
    plot: str


def train(config: TrainConfig, progress: data.Progress | None = None) -> TrainReport:
    """Train, or resume, or find the run finished.

    Raises:
        ConfigError: the run folder belongs to another configuration, or the cluster cannot run the plan.
        DataError: the data cannot be trained on; it says why.
    """
    say = progress or (lambda event: None)
    config, store, packed, spec = _prepared(config, say)
    claim = claimed(store, config, packed) or _new_claim(config, packed, spec)
    _check_mixes(config, claim.lanes)
    last = Checkpoints(store).last()
    lines = History(store).until(last)
    if ended(config, lines) is None or _bundle_steps(store) < _steps(lines):
        _check_readable(config, packed, say)
        _fit(config, packed, spec, claim, say)
    return _report(store, resume_at(last).epoch)


def find_rate(config: TrainConfig, progress: data.Progress | None = None) -> RateReport:
    """Try learning rates on a copy of the model; the run that is to come in this folder may have other settings.

    Raises:
        ConfigError: the cluster cannot run the plan.
        DataError: the data cannot be trained on, or is too little; it says why.
    """
    say = progress or (lambda event: None)
    config, store, packed, spec = _prepared(config, say)
    claim = _new_claim(config, packed, spec)
    _check_mixes(config, claim.lanes)
    _check_readable(config, packed, say)
    _fit(config, packed, spec, claim, say)
    found = json.loads(store.get(FIND_LR))
    return RateReport(found["suggestion"], len(found["rates"]), store.address(FIND_LR_PLOT))


def _prepared(config: TrainConfig, say: data.Progress) -> tuple[TrainConfig, Store, PackedCollection, ImageSpec]:
    """What is checked before Ray starts: the run folder, the weights, the packed data, and the model's input."""
    if contains(config.data, config.run):
        raise ConfigError(f"the run folder {config.run} lies inside its data {config.data}; choose another")
    config = _with_weights(config)
    store = open_store(config.run)
    packed = _packed(config, store, say)
    _check_classes(packed, say)
    spec = image_spec(config, packed.manifest)
    check_grows(config, spec)
    return config, store, packed, spec


def _report(store: Store, resumed_at: int) -> TrainReport:
    lines = History(store).lines
    if not lines or _bundle_steps(store) < _steps(lines):
        raise StorageError(
            f"{store.address()} lacks what the training workers should have left there; "
            "on several nodes the run folder has to be s3:// or a folder that all of them share"
        )
    return TrainReport(
        bundle=store.child("bundle").url,
        epochs=len(lines),
        steps=lines[-1]["step"],
        accuracy_top1=json.loads(store.get("bundle/config.json"))["metrics"]["accuracy_top1"],
        images_per_s=lines[-1]["images_per_s"],
        skipped=lines[-1]["skipped"],
        run=store.url,
        resumed_at_epoch=resumed_at,
        repeat=repeat_command(store),
    )


def _with_weights(config: TrainConfig) -> TrainConfig:
    """The configuration with the weights' file as workers need it; one that does not exist is said before any work."""
    if config.weights is None:
        return config
    from raycnn.models import is_published_name, require_file

    if is_published_name(config.weights):
        return config
    return config.model_copy(update={"weights": require_file(config.weights)})


def _check_mixes(config: TrainConfig, lanes: int) -> None:
    """Images are mixed with the next one of their lane, so that any number of workers mixes the same."""
    for name in ("mixup", "cutmix"):
        if getattr(config, name) and config.batch_size < 2 * lanes:
            raise ConfigError(
                f"{name} wants two images of each of the run's {lanes} lanes in a batch: "
                f"use --batch-size {2 * lanes} or more, or --{name} 0"
            )


def _packed(config: TrainConfig, store: Store, say: data.Progress) -> PackedCollection:
    """The packed data set to train on; any other layout is packed into the run folder first, said aloud."""
    collection = open_collection(config.data)
    if isinstance(collection, PackedCollection):
        return collection
    _check_two_classes(collection)
    check_before_packing(store, config)
    from raycnn.models import check_name
    from raycnn.packing import pack

    check_name(config.model)  # packing takes long
    target = store.child(DATA).url
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


def _check_two_classes(collection: Collection) -> None:
    if len(collection.class_names) < 2:
        names = ", ".join(collection.class_names) or "none"
        where = collection.store.address()
        raise DataError(f"{where}: classes: {names}; training needs two or more, each with its images")


def _check_classes(packed: PackedCollection, say: data.Progress) -> None:
    """Each class has images to train on; of rare ones all may have come into the training split by chance."""
    _check_two_classes(packed)
    for split in ("train", "val"):
        counts = packed.counts(split)
        missing = [name for name in packed.class_names if not counts.get(name)]
        if not missing:
            continue
        others = f" and {len(missing) - 1} other classes" if missing[1:] else ""
        text = f"{packed.store.address()}: no {split} image of {missing[0]!r}{others}"
        if split == "train" or len(missing) == len(packed.class_names):
            remedy = f"add some, or give {split} more of them: raycnn pack SRC DST --val SHARE --test SHARE"
            raise DataError(f"{text}; {remedy}")
        say({"kind": "note", "text": f"{text}: nothing is known of how well they are told apart"})


def _check_readable(config: TrainConfig, packed: PackedCollection, say: data.Progress) -> None:
    """What packing could not read, training and validation cannot either: said before any work."""
    listed = packed.store.address(UNREADABLE)
    check_bad(_bad(packed, "train"), packed.rows("train"), config.max_bad, listed)
    bad, rows = _bad(packed, "val"), packed.rows("val")
    if bad:
        text = f"{bad.total()} of {rows} validation images cannot be read ({in_words(bad)}): see {listed}"
        if bad.total() == rows:
            raise DataError(f"{text}, mend them and pack again, or take others: raycnn pack SRC DST --val SHARE")
        say({"kind": "note", "text": f"{text}; accuracy is that of the others"})


def _bad(packed: PackedCollection, split: str) -> Counter[str]:
    status = packed.manifest["splits"][split]["status"]
    return Counter({word: n for word, n in status.items() if word != Status.OK})


def _bundle_steps(store: Store) -> int:
    """How many steps the run had taken when it made its bundle; 0 where there is none yet."""
    if store.head("bundle/config.json") is None:
        return 0
    return json.loads(store.get("bundle/config.json"))["metrics"].get("steps", 0)


def _steps(lines: list[dict[str, Any]]) -> int:
    return lines[-1]["step"] if lines else 0


def _new_claim(config: TrainConfig, packed: PackedCollection, spec: ImageSpec) -> Claim:
    """Each node keeps the decoded training split where the budget has room for all of it."""
    geometry = data.geometry_of(spec, packed.manifest["images"])
    has_room = packed.rows("train") * geometry.usual_bytes <= config.cache_gib * GIB
    return Claim(lanes_for(config.num_workers), geometry if has_room else None)


def _fit(config: TrainConfig, packed: PackedCollection, spec: ImageSpec, claim: Claim, say: data.Progress) -> None:
    """Run Ray Train, once it is known that the cluster can; show what rank 0 posts while it runs."""
    data.connect(say)
    _, limit = data.resources()
    least = config.min_workers or config.num_workers
    use_gpu = config.device == "cuda" or (config.device == "auto" and limit.gpus >= least)
    if config.min_workers:
        plan = data.plan_elastic(least, config.num_workers, limit, use_gpu)
    else:
        plan = data.plan_training(config.num_workers, limit, use_gpu)
    share = "a GPU" if use_gpu else f"{plan.threads} CPU threads"
    count = f"{config.min_workers} to {config.num_workers}" if config.min_workers else config.num_workers
    say({"kind": "note", "text": f"starting training workers: {count}, with {share} each"})
    if len(limit.nodes) == 1:  # of several nobody knows which will decode
        data.warm_up(_decode_modules(claim), plan.tasks, 0, plan.environment)
    arguments = {
        "config": config.model_dump(mode="json"),
        "data": packed.store.url,
        "spec": spec.model_dump(mode="json"),
        "claim": claim,
        "plan": plan._asdict(),
    }
    from raycnn.training.launch import launch

    with data.Board(say) as board, data.user_errors():
        launch(arguments | {"board": board.actor}, config, plan)


def _decode_modules(claim: Claim) -> list[str]:
    """What the tasks that decode import: torch is what resizes."""
    resizes = claim.geometry is None or claim.geometry.short > 0
    return ["raycnn.data.feed", *(["torch"] if resizes else [])]
