"""The driver's part of a run: checks before any work, the plan, Ray Train, and the report."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from raycnn import data
from raycnn.config import GIB, ImageSpec, PackConfig, TrainConfig, make
from raycnn.errors import ConfigError, DataError, Status, StorageError
from raycnn.models import (
    GRAY_MEAN,
    GRAY_STD,
    blank,
    channels_in,
    check_name,
    is_published_name,
    load_weights,
    published_spec,
    require_file,
    takes_size,
)
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
    check_before_packing,
    claim,
    claimed,
    ended,
    repeat_command,
    resume_at,
)
from raycnn.training.rank import check_bad, work

SMALL_SIDE = 64
"""Images that are all of one size up to this side are trained on as they are."""


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
    found = claimed(store, config, packed)
    _check_mixes(config, found.lanes if found else lanes_for(config.num_workers))
    done = resume_at(Checkpoints(store).last()).epoch
    lines = History(store).lines[:done]
    if ended(config, lines) is None or _bundle_steps(store) < _steps(lines):
        _check_readable(config, packed)
        _fit(config, packed, spec, say, lambda: claim(store, config, packed, _geometry(config, packed, spec)))
    return _report(store, done)


def find_rate(config: TrainConfig, progress: data.Progress | None = None) -> RateReport:
    """Try learning rates on a copy of the model; the run that is to come in this folder may have other settings.

    Raises:
        ConfigError: the cluster cannot run the plan.
        DataError: the data cannot be trained on, or is too little; it says why.
    """
    say = progress or (lambda event: None)
    config, store, packed, spec = _prepared(config, say)
    _check_mixes(config, lanes_for(config.num_workers))
    _check_readable(config, packed)
    _fit(config, packed, spec, say, lambda: Claim(lanes_for(config.num_workers), _geometry(config, packed, spec)))
    found = json.loads(store.get(FIND_LR))
    return RateReport(found["suggestion"], len(found["rates"]), store.address(FIND_LR_PLOT))


def _prepared(config: TrainConfig, say: data.Progress) -> tuple[TrainConfig, Store, PackedCollection, ImageSpec]:
    """What is checked before any work: the run folder, the packed data, and the model's input."""
    if contains(config.data, config.run):
        raise ConfigError(f"the run folder {config.run} lies inside its data {config.data}; choose another")
    config = _checked(config)
    store = open_store(config.run)
    packed = _packed(config, store, say)
    _check_classes(packed, say)
    spec = image_spec(config, packed.manifest)
    _check_grows(config, spec)
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


def _checked(config: TrainConfig) -> TrainConfig:
    """The configuration as workers need it. A model or a file that does not exist is said before any work."""
    check_name(config.model)
    if config.weights is None or is_published_name(config.weights):
        return config
    return config.model_copy(update={"weights": require_file(config.weights)})


def _check_grows(config: TrainConfig, spec: ImageSpec) -> None:
    """Progressive resizing is for models that take images of any size."""
    side = min(spec.height, spec.width)
    if config.start_size > side:
        raise ConfigError(f"start_size: {config.start_size} is more than the images' side of {side} px; choose less")
    if config.start_size and not takes_size(config.model, spec, config.start_size):
        raise ConfigError(
            f"start_size: {config.model} takes images of {spec.height} x {spec.width} px only, so they cannot grow; "
            "choose another model, or 0"
        )


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
    from raycnn.packing import pack

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


def _check_readable(config: TrainConfig, packed: PackedCollection) -> None:
    """What packing could not read, training cannot either: said before any work."""
    status = packed.manifest["splits"]["train"]["status"]
    bad = Counter({word: n for word, n in status.items() if word != Status.OK})
    check_bad(bad, packed.rows("train"), config.max_bad, packed.store.address(UNREADABLE))


def image_spec(config: TrainConfig, manifest: dict[str, Any]) -> ImageSpec:
    """The model's input, from the data: small equal images as they are, others cropped to a square.

    Raises:
        DataError: no image can be read.
    """
    seen = manifest["images"]
    if not seen["channels"]:
        raise DataError("not one of the packed images can be read, so there is nothing to train on")
    known = published_spec(config.model, config.weights) if config.weights else None
    if _channels(config, seen) == 1:
        colours: dict[str, Any] = {"channels": 1, "mean": GRAY_MEAN, "std": GRAY_STD}
    else:
        colours = (known or ImageSpec()).model_dump(include={"channels", "mean", "std"})
    (low_h, high_h), (low_w, high_w) = seen["height"], seen["width"]
    if config.image_size != "auto":
        return ImageSpec(height=config.image_size, width=config.image_size, **colours)
    if low_h == high_h and low_w == high_w and max(high_h, high_w) <= SMALL_SIDE:
        return ImageSpec(height=high_h, width=high_w, crop=1.0, **colours)
    return (known or ImageSpec()).model_copy(update=colours)


def _channels(config: TrainConfig, seen: dict[str, Any]) -> int:
    """1 or 3: those of the weights to start from, else those of the data, which are 1 only if all of it is gray."""
    if config.weights is None:
        return 1 if set(seen["channels"]) == {"1"} else 3
    if is_published_name(config.weights):
        return 3
    state = load_weights(config.model, config.weights)
    return channels_in(blank(config.model, 2, ImageSpec()), state)


def _bundle_steps(store: Store) -> int:
    """How many steps the run had taken when it made its bundle; 0 where there is none yet."""
    if store.head("bundle/config.json") is None:
        return 0
    return json.loads(store.get("bundle/config.json"))["metrics"].get("steps", 0)


def _steps(lines: list[dict[str, Any]]) -> int:
    return lines[-1]["step"] if lines else 0


def _geometry(config: TrainConfig, packed: PackedCollection, spec: ImageSpec) -> data.Geometry | None:
    """How each node keeps the decoded training split, where the budget has room for all of it."""
    geometry = data.geometry_of(spec, packed.manifest["images"])
    return geometry if packed.rows("train") * geometry.usual_bytes <= config.cache_gib * GIB else None


def _fit(
    config: TrainConfig, packed: PackedCollection, spec: ImageSpec, say: data.Progress, decide: Callable[[], Claim]
) -> None:
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
    decided = decide()
    data.start_coordinator()
    arguments = {
        "config": config.model_dump(mode="json"),
        "data": packed.store.url,
        "spec": spec.model_dump(mode="json"),
        "lanes": decided.lanes,
        "geometry": decided.geometry,
        "plan": plan._asdict(),
    }
    from raycnn.training.launch import launch

    with data.Board(say) as board, data.user_errors():
        launch(work, arguments | {"board": board.actor}, config, plan)
