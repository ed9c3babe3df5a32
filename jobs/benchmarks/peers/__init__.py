"""The contenders of `benchmarks.label` and `benchmarks.train`, each a program: it takes a JSON object as its argument
and prints another as its last line.

One that labels is given the `source` (s3://bucket/prefix of Parquet files with the columns key and image), the `out` of
its labels, the `model` (`null` or an architecture of torchvision) and a file for its `calls`. One that trains is given
a `Training`.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    import torch

NULL = "null"

T = TypeVar("T")


class Task(NamedTuple):
    """What a contender is told."""

    source: str
    out: str
    bundle: str
    model: str
    calls: str

    def called(self, images: int) -> None:
        """The model is done with so many images: a line in the file that all processes of a contender share."""
        with open(self.calls, "a", encoding="utf-8") as file:
            file.write(f"{time.time()} {images}\n")


class Training(NamedTuple):
    """What a contender is told that trains for a time and then predicts."""

    images: str
    """Folder with train/CLASS/*.png and val/CLASS/*.png."""
    unseen: str
    """Folder with the *.png to predict, of unknown class."""
    scratch: str
    """An empty folder of its own."""
    seconds: float
    """How long it may train."""
    seed: int


def told(kind: Callable[..., T]) -> T:
    """What this process was started with."""
    return kind(**json.loads(sys.argv[1]))


def predicted(names: dict[str, str], epochs: float, seconds: float, parameters: int) -> None:
    """Print the class name of each file to predict, and what training took."""
    say({"predicted": names, "epochs": epochs, "training_s": round(seconds, 1), "parameters": parameters})


def done(task: Task) -> None:
    """All is written. Print when the model had predicted a quarter of the images, how many those were, and the end."""
    ended, before = time.time(), 0
    lines = Path(task.calls).read_text(encoding="utf-8").splitlines()
    calls = sorted((float(when), int(images)) for when, images in map(str.split, lines))
    quarter = sum(images for _, images in calls) / 4
    for when, images in calls:
        before += images
        if before >= quarter:
            say({"began": when, "before": before, "ended": ended})
            return


def say(report: dict[str, Any]) -> None:
    """The report, as the last line on standard output."""
    sys.stdout.write("\n" + json.dumps(report) + "\n")


def network(model: str) -> "torch.nn.Module":
    """What a peer predicts with, as its authors do: eager, float32. `null` costs nothing."""
    import torch
    from torchvision import models

    class Null(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(x), 10)

    return Null() if model == NULL else models.get_model(model, weights=None).eval()
