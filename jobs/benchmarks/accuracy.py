"""A recipe of `jobs/recipes`, from three seeds: accuracy on the test images, which each run sees once, at its end.

Trained and evaluated by the command line, on data that are packed once, as the demo packs them; which epoch is the
best one is decided on validation images, which the training split lacks.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measuring import RAYCNN, busy_s, empty_cache, last_line, mean_and_std, pack_demo_data

SEEDS = (0, 1, 2)
DATA = {"digits": "digits", "fashion-mnist-classic": "fashion-mnist", "fashion-mnist-fast": "fashion-mnist"}
"""What a recipe is trained on, by the name under which the demo knows it."""
TIMEOUT_S = 4 * 3600


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Accuracy, time and size of the models that the recipe gives, of each seed and as mean and deviation."""
    from raycnn.config import TrainConfig, from_file

    path = Path(arguments.subject or "")
    if path.stem not in DATA:
        raise SystemExit(f"accuracy: give one of these files of jobs/recipes: {', '.join(DATA)}")
    recipe = from_file(TrainConfig, str(path))
    with tempfile.TemporaryDirectory() as folder:
        packed = f"{folder}/packed"
        pack_demo_data(DATA[path.stem], packed)
        samples = []
        for seed in SEEDS:
            words = ["--recipe", str(path), "--seed", str(seed)]
            samples.append({"seed": seed} | trained(packed, f"{folder}/{seed}", words, bool(recipe.get("flip"))))
            sys.stderr.write(f"{json.dumps(samples[-1])}\n")
    result = {"recipe": path.stem, "settings": recipe, **summary(samples), "samples": samples}
    sys.stderr.write(table([result]))
    return result


def trained(packed: str, run: str, words: Sequence[str], flips: bool = False) -> dict[str, Any]:
    """Train by `raycnn train` with these words, and evaluate what it gives on the test split, once.

    `seconds` and `cpu_s` are of the whole command, `training_s` begins when its workers are ready; the CPU time is
    that of the whole machine, because Ray's processes are no children of the command's.
    """
    from raycnn import bundle as bundles
    from raycnn.models import count_parameters
    from raycnn.storage import open_store

    start, busy = time.time(), busy_s()
    with empty_cache():
        report = last_line([RAYCNN, "train", packed, run, *words, "--json"], TIMEOUT_S)
    seconds, cpu_s = time.time() - start, busy_s() - busy
    lines = list(map(json.loads, open_store(run).get("metrics.jsonl").splitlines()))
    evaluate = [RAYCNN, "evaluate", report["bundle"], packed, "--split", "test", "--json"]
    counted = last_line([*evaluate, "--flips"] if flips else evaluate, TIMEOUT_S)
    return {
        "accuracy": counted["accuracy_top1"],
        "accuracy_with_flips": counted["with_flips"]["accuracy_top1"] if flips else None,
        "test_images": counted["rows"],
        "validation_accuracy": report["accuracy_top1"],
        "epochs": report["epochs"],
        "seconds": round(seconds, 1),
        "training_s": round(lines[-1]["elapsed_s"], 1),
        "cpu_s": round(cpu_s, 1),
        "parameters": count_parameters(bundles.load(report["bundle"]).classifier),
    }


def summary(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds."""
    names = ["accuracy", "seconds", "training_s", "cpu_s"]
    if all(sample["accuracy_with_flips"] is not None for sample in samples):
        names.insert(1, "accuracy_with_flips")
    found = {name: mean_and_std([sample[name] for sample in samples]) for name in names}
    return {"test_images": samples[0]["test_images"], "parameters": samples[0]["parameters"], **found}


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The README's table, in Markdown, from one result for each recipe."""

    def percent(found: Mapping[str, float] | None) -> str:
        return f"{100 * found['mean']:.2f} ± {100 * found['std']:.2f}%" if found else ""

    lines = [
        "| recipe | accuracy on test images | with mirror images | of images | seeds | parameters | training, minutes "
        "| CPU minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        cells = [
            f"`{result['recipe']}`",
            percent(result["accuracy"]),
            percent(result.get("accuracy_with_flips")),
            f"{result['test_images']:,}",
            str(len(result["samples"])),
            f"{result['parameters']:,}",
            f"{result['training_s']['mean'] / 60:.1f}",
            f"{result['cpu_s']['mean'] / 60:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
