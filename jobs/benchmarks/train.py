"""Training on all cores: images per second beside a bare PyTorch loop, and accuracy after five minutes beside peers.

Rates: packed shards on a local S3 server; the bare loop has the same images decoded in its memory, and the same model,
batches and threads, no augmentation. In turns, after one that warms up; what is compared ran within minutes. Accuracy:
each contender trains for five minutes on Fashion-MNIST as its authors do on such images, on all cores, and predicts the
10,000 test images, which it sees once.

timm is not among the peers: its training script is no part of its package.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.accuracy import trained
from benchmarks.measuring import (
    RAYCNN,
    busy_s,
    empty_cache,
    last_line,
    local_s3,
    mean_and_std,
    pack_demo_data,
    photos_of,
    run_peer,
    spread,
)
from benchmarks.peers import Training

ROUNDS, EPOCHS = 5, 2
PHOTOS, FEW = 480, 64
SMALL = "fashion-mnist"
BUCKET = "bench"
TIMEOUT_S = 3600

BUDGET_S = 300
SEEDS = (0, 1)
RECIPE = Path(__file__).parents[1] / "recipes" / "fashion-mnist-fast.yaml"

BARE, ONE, TWO = "bare loop", "raycnn train", "raycnn train, 2 workers"
FIRST, LATER = "first epoch", "later epochs"
DEFAULTS, BY_RECIPE = "raycnn train, its defaults", f"raycnn train, recipe {RECIPE.stem}"
PEERS = {"fastai": "fastai_train", "ultralytics": "ultralytics_train"}


class Case(NamedTuple):
    """A model, and the images that it is trained on."""

    model: str
    batch_size: int
    data: str
    contenders: tuple[str, ...]


CASES = {
    "classic": Case("classic", 128, SMALL, (BARE, ONE, TWO)),
    "resnet18": Case("resnet18", 32, "photos", (BARE, ONE)),
}
BARS = [
    ("resnet18", ONE, BARE, FIRST, 0.95),
    ("resnet18", ONE, BARE, LATER, 0.95),
    ("classic", ONE, BARE, FIRST, 0.75),
    ("classic", ONE, BARE, LATER, 0.90),
    ("classic", TWO, ONE, LATER, 0.85),
]
"""What `raycnn train` is held to: so many times the rate of that contender, in these epochs."""
FIRST_STEP_BAR_S = 15.0
"""From the command to the end of the first step, where no Ray runs."""

Sample = dict[str, Any]


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Rates of each case and contender and how they compare, seconds to the first step, and accuracy after a time."""
    photos, source = photos_of(arguments.subject, PHOTOS)
    with local_s3(BUCKET), tempfile.TemporaryDirectory() as folder:
        pack_demo_data(SMALL, f"s3://{BUCKET}/{SMALL}")
        _pack_photos(photos, "photos")
        _pack_photos(photos[:FEW], "few")
        _turn("warm-up", {"resnet18": CASES["resnet18"]._replace(data="few")})
        rounds = [_turn(f"round {i + 1} of {ROUNDS}", CASES) for i in range(ROUNDS)]
        after = _accuracy(Path(folder))
    result = {
        "source": source,
        "photos": len(photos),
        "rounds": ROUNDS,
        "cases": {name: case._asdict() for name, case in CASES.items()},
        **summary({name: [samples[name] for samples in rounds] for name in rounds[0]}),
        **after,
    }
    sys.stderr.write(table(result))
    missed = misses(result)
    sys.stderr.write("".join(f"missed: {line}\n" for line in missed))
    return result | {"failed": missed}


def _pack_photos(photos: Sequence[bytes], name: str) -> None:
    """Two classes of equal size, a fifth of them held out; what they are does not matter to the time that they take."""
    with tempfile.TemporaryDirectory() as folder:
        for number, photo in enumerate(photos):
            file = Path(folder) / "ab"[number % 2] / f"{number:05d}.jpg"
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(photo)
        last_line([RAYCNN, "pack", folder, f"s3://{BUCKET}/{name}", "--val", "0.2", "--test", "0", "--json"], TIMEOUT_S)


def _turn(title: str, cases: Mapping[str, Case]) -> dict[str, Sample]:
    """One sample of each case and contender, under `case, contender`."""
    samples: dict[str, Sample] = {}
    for name, case in cases.items():
        for contender in case.contenders:
            samples[f"{name}, {contender}"] = sample = _epochs(case, contender)
            sys.stderr.write(f"{title}: {name}, {contender}: {json.dumps(sample)}\n")
    return samples


def _epochs(case: Case, contender: str) -> Sample:
    """Images per second of each epoch, and seconds to the first step where `raycnn train` tells."""
    from raycnn.storage import open_store

    data, run = f"s3://{BUCKET}/{case.data}", f"s3://{BUCKET}/runs/{uuid.uuid4().hex}"
    settings = {"model": case.model, "batch_size": case.batch_size, "epochs": EPOCHS, "crop_scale": 1.0}
    if contender == BARE:
        told = {"settings": settings | {"data": data, "run": run}, "threads": os.cpu_count()}
        return run_peer("bare_train", told, TIMEOUT_S)
    settings["num_workers"] = 2 if contender == TWO else 1
    words = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    start = time.time()
    with empty_cache():
        last_line([RAYCNN, "train", data, run, *words, "--json"], TIMEOUT_S)
    lines = list(map(json.loads, open_store(run).get("metrics.jsonl").splitlines()))
    first = lines[0].get("first_step_at")
    return {
        "images_per_s": [line["images_per_s"] for line in lines],
        "first_step_s": round(first - start, 2) if first else None,
    }


def _accuracy(folder: Path) -> dict[str, Any]:
    """Accuracy on the test images after a time of training, by raycnn and by the peers that are installed."""
    packed = f"s3://{BUCKET}/{SMALL}"
    truth = _write_images(packed, folder)
    missing = [name for name in PEERS if importlib.util.find_spec(name) is None]
    samples: dict[str, list[Sample]] = {}
    for seed in SEEDS:
        for contender, sample in _contenders(packed, folder, truth, missing, seed):
            sys.stderr.write(f"accuracy, seed {seed}: {contender}: {json.dumps(sample)}\n")
            samples.setdefault(contender, []).append({"seed": seed} | sample)
    return {
        "budget_s": BUDGET_S,
        "test_images": len(truth),
        "peer_versions": {name: importlib.metadata.version(name) for name in PEERS if name not in missing},
        "peers_not_installed": missing,
        "accuracy": accuracy_summary(samples),
        "accuracy_samples": samples,
    }


def _contenders(
    packed: str, folder: Path, truth: Mapping[str, str], missing: Sequence[str], seed: int
) -> Iterator[tuple[str, Sample]]:
    """One run of each."""
    budget = ["--max-time", f"{BUDGET_S}s", "--seed", str(seed)]
    for name, words in ((DEFAULTS, budget), (BY_RECIPE, ["--recipe", str(RECIPE), *budget])):
        sample = trained(packed, f"s3://{BUCKET}/runs/{uuid.uuid4().hex}", words)
        yield name, {key: sample[key] for key in ("accuracy", "training_s", "seconds", "cpu_s", "epochs", "parameters")}
    for peer in PEERS:
        if peer in missing:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            told = Training(str(folder / "images"), str(folder / "unseen"), scratch, BUDGET_S, seed)
            start, busy = time.time(), busy_s()
            report = run_peer(PEERS[peer], told._asdict(), TIMEOUT_S)
            taken = {"seconds": round(time.time() - start, 1), "cpu_s": round(busy_s() - busy, 1)}
        names = report.pop("predicted")
        if names.keys() != truth.keys():
            raise SystemExit(f"{peer} has predicted {len(names)} images of {len(truth)}")
        correct = sum(names[name] == label for name, label in truth.items())
        yield peer, {"accuracy": correct / len(truth), **report, **taken}


def _write_images(packed: str, folder: Path) -> dict[str, str]:
    """The images as files: images/train/CLASS/, images/val/CLASS/ and unseen/; returns what those of the last are."""
    from raycnn.shards import open_collection

    collection, truth = open_collection(packed), {}
    for split in ("train", "val", "test"):
        for number, sample in enumerate(collection.read(list(collection.select(split, Counter())))):
            assert sample.encoded is not None
            name, label = f"{number:05d}.png", str(sample.label)
            place = folder / "unseen" if split == "test" else folder / "images" / split / label
            if split == "test":
                truth[name] = label
            place.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(sample.encoded)
    return truth


def summary(samples: Mapping[str, list[Sample]]) -> dict[str, Any]:
    """Medians and spreads, and how contenders compare turn by turn, from the samples under `case, contender`."""

    def rates(name: str, part: str) -> list[float]:
        epochs = (sample["images_per_s"] for sample in samples[name])
        return [every[0] if part == FIRST else statistics.mean(every[1:]) for every in epochs]

    compared = []
    for case, contender, other, part, bar in BARS:
        ours, theirs = rates(f"{case}, {contender}", part), rates(f"{case}, {other}", part)
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        found = {name: round(value, 3) for name, value in spread(ratios).items()}
        compared.append({"case": case, "of": contender, "to": other, "in": part, "ratio": found, "bar": bar})
    firsts = {
        name: [sample["first_step_s"] for sample in every]
        for name, every in samples.items()
        if all(sample.get("first_step_s") for sample in every)
    }
    return {
        "images_per_s": {name: {part: spread(rates(name, part)) for part in (FIRST, LATER)} for name in samples},
        "compared": compared,
        "first_step_s": {name: spread(seconds) for name, seconds in firsts.items()},
        "first_step_bar_s": FIRST_STEP_BAR_S,
        "samples": dict(samples),
    }


def misses(result: Mapping[str, Any]) -> list[str]:
    """Each bar that was not reached, each peer that was not installed, and each that raycnn is not ahead of."""
    missed = [
        f"{one['case']}, {one['of']}, {one['in']}: {one['ratio']['median']:.2f} of {one['to']}, not {one['bar']:g}"
        for one in result["compared"]
        if one["ratio"]["median"] < one["bar"]
    ]
    for name, found in result["first_step_s"].items():
        if found["median"] > result["first_step_bar_s"]:
            missed.append(f"{name}: first step after {found['median']:.1f} s, not {result['first_step_bar_s']:g}")
    means = {name: found["accuracy"]["mean"] for name, found in result["accuracy"].items()}
    ours = max(means.pop(name) for name in (DEFAULTS, BY_RECIPE))
    missed += [f"{name}: accuracy {mean:.4f}, raycnn {ours:.4f}" for name, mean in means.items() if mean >= ours]
    return missed + [f"{name} is not installed" for name in result["peers_not_installed"]]


def accuracy_summary(samples: Mapping[str, list[Sample]]) -> dict[str, Any]:
    """Mean and standard deviation of accuracy, seconds of training, CPU seconds; and the number of weights."""
    return {
        name: {
            **{key: mean_and_std([sample[key] for sample in every]) for key in ("accuracy", "training_s", "cpu_s")},
            "parameters": every[0]["parameters"],
        }
        for name, every in samples.items()
    }


def table(result: Mapping[str, Any]) -> str:
    """The README's tables, in Markdown, from a result."""

    def cell(found: Mapping[str, float]) -> str:
        return f"{found['median']:.0f} ({found['min']:.0f} to {found['max']:.0f})"

    lines = [f"| images/s, median of {result['rounds']} (least to most) | {FIRST} | {LATER} |", "|---|---|---|"]
    for name, found in result["images_per_s"].items():
        lines.append(f"| {name} | {cell(found[FIRST])} | {cell(found[LATER])} |")
    lines += ["", "| images/s of | to those of | in | ratio (least to most) | at least |", "|---|---|---|---|---|"]
    for one in result["compared"]:
        ratio = "{median:.2f} ({min:.2f} to {max:.2f})".format(**one["ratio"])
        lines.append(f"| {one['case']}, {one['of']} | {one['to']} | {one['in']} | {ratio} | {one['bar']:g} |")
    if result["first_step_s"]:
        bar = f"{result['first_step_bar_s']:g}"
        lines += [
            "",
            "| first step after the command, no Ray running | s, median (least to most) | at most |",
            "|---|---|---|",
        ]
        for name, found in result["first_step_s"].items():
            lines.append(f"| {name} | {found['median']:.1f} ({found['min']:.1f} to {found['max']:.1f}) | {bar} |")
    return "\n".join(lines) + "\n\n" + _accuracy_table(result)


def _accuracy_table(result: Mapping[str, Any]) -> str:
    lines = [
        f"| after {result['budget_s'] / 60:g} minutes on Fashion-MNIST | accuracy on {result['test_images']:,} images "
        "| parameters | training, s | CPU, s |",
        "|---|---|---|---|---|",
    ]
    for name, found in result["accuracy"].items():
        version = result["peer_versions"].get(name, "")
        deviation = f" ± {100 * found['accuracy']['std']:.2f}" if found["accuracy"]["std"] else ""
        accuracy = f"{100 * found['accuracy']['mean']:.2f}{deviation}%"
        spent = f"{found['training_s']['mean']:.0f} | {found['cpu_s']['mean']:.0f}"
        lines.append(f"| {f'{name} {version}'.strip()} | {accuracy} | {found['parameters']:,} | {spent} |")
    return "\n".join(lines) + "\n"
