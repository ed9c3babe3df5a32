"""Measure what a claim rests on, and leave the figures in a JSON file.

    python jobs/bench.py BENCHMARK [FOLDER] [--json jobs/results/BENCHMARK.json]
    python jobs/bench.py accuracy RECIPE [--json jobs/results/accuracy-RECIPE.json]

Each benchmark starts what it needs on this machine (an S3 server, a Ray cluster) and stops it again.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

from benchmarks.measuring import where

BENCHMARKS = {
    "accuracy": "a recipe of jobs/recipes: accuracy on the test images, from three seeds",
    "backends": "one core: classic, mobilenet_v3_small and resnet18 by torch, torch.compile and ONNX Runtime",
    "chaos": "processes killed at every step of labeling, on a Ray cluster and an S3 server: no row lost, none doubled",
    "fuzz": "a million damaged files through raycnn.images.pixels: what they become, and the matrix of hazards",
    "images": "one core: raycnn.images against bare decoding and torchvision's transform",
    "label": "all cores: images labelled per second by raycnn, Daft, Ray Data as documented and a bare loop",
    "resume": "training killed within epochs: each sample once per epoch, and weights equal to an unbroken run's",
    "scale": "planning of 100 million keys, and labeling of 10 thousand to 1 million images: time and memory of each",
    "storage": "reading, listing and racing creates on an S3 server, by the clients that could have been used",
    "train": "images trained on a second, beside a bare loop; accuracy after 5 minutes, beside fastai and Ultralytics",
}

if __name__ == "__main__":
    listed = "\n".join(f"  {name:<9} {what}" for name, what in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n{listed}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benchmark", choices=BENCHMARKS)
    help_of_subject = "a folder of real files, instead of synthetic ones; of accuracy the recipe"
    parser.add_argument("subject", nargs="?", help=help_of_subject)
    parser.add_argument("--seed", type=int, help="of what is drawn at random, instead of the benchmark's own")
    parser.add_argument("--json", metavar="FILE", help="also write the result here")
    arguments = parser.parse_args()
    benchmark = importlib.import_module(f"benchmarks.{arguments.benchmark}")
    report = {"benchmark": arguments.benchmark, **benchmark.run(arguments), **where()}
    text = json.dumps(report, indent=2)
    if arguments.json:
        Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.json).write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")
    sys.exit(bool(report.get("failed")))
