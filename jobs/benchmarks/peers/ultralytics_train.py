"""Ultralytics, as its documentation trains on Fashion-MNIST.

Source: ultralytics/ultralytics, docs/en/datasets/classify/fashion-mnist.md (2026, read 2026-11): the nano model of the
YOLO26 classification family at 28 px, all settings as they come. Its limit is the package's own argument `time`.

What is other here: weights begin at random (`.yaml` for `.pt`), as those of all others do, and nothing can be
downloaded; no plots, which want a font from the network. Seconds are those up to
the last epoch's validation.
"""
# ultralytics, which is not installed everywhere, does not always do what its types say.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportArgumentType=false, reportFunctionMemberAccess=false

import os
import time
from pathlib import Path

from benchmarks.peers import Training, predicted, told

MODEL, SIDE, BATCH = "yolo26n-cls.yaml", 28, 128
"""`BATCH` is of predictions; that of training is the package's own."""


def main() -> None:
    """Train, predict."""
    task = told(Training)
    os.environ["YOLO_CONFIG_DIR"], os.environ["YOLO_OFFLINE"] = task.scratch, "true"  # read when it is imported
    from ultralytics import YOLO

    ended: list[float] = []  # of each epoch; once more when the best one is validated again
    model = YOLO(MODEL)
    model.add_callback("on_fit_epoch_end", lambda _trainer: ended.append(time.time()))
    model.train(
        data=task.images,
        imgsz=SIDE,
        time=task.seconds / 3600,
        seed=task.seed,
        device="cpu",
        plots=False,
        project=task.scratch,
    )
    names = {}
    for result in model.predict(task.unseen, imgsz=SIDE, batch=BATCH, stream=True, verbose=False):
        names[Path(result.path).name] = result.names[result.probs.top1]
    done = model.trainer
    weights = sum(p.numel() for p in model.model.parameters())
    predicted(names, done.epoch + 1, ended[done.epoch] - done.train_time_start, weights)


if __name__ == "__main__":
    main()
