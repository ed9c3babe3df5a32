"""Ray Data, as its documentation writes it.

Source: docs.ray.io, Ray Data, "Working with Images" (doc/source/data/working-with-images.rst, read 2026-11): Parquet
with read_parquet, `map` a function that decodes a row with Pillow, `map` one that transforms it with torchvision,
`map_batches` a class that predicts in eager torch, write_parquet.

What is other here: the transform is the one that belongs to the model; batches of 100 instead of 4; one actor
instead of two. Two would reserve both CPUs of the machine, and the tasks that read would wait for ever.
"""

import io
import os
from typing import Any

import numpy as np
import pyarrow.fs
import ray
import torch
from PIL import Image
from torchvision import transforms
from torchvision.models import MobileNet_V3_Small_Weights

from benchmarks.peers import Task, done, network, told

BATCH = 100
ACTORS = 1
ACTOR_CPUS = 1

task = told(Task)


def decode_image(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its image as pixels (H, W, 3)."""
    row["image"] = np.asarray(Image.open(io.BytesIO(row["image"])))
    return row


def transform_image(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its image as float32 (3, 224, 224)."""
    transform = transforms.Compose([transforms.ToTensor(), MobileNet_V3_Small_Weights.DEFAULT.transforms()])
    row["image"] = transform(row["image"])
    return row


class ImageClassifier:
    """Predicts batches of transformed images."""

    def __init__(self, task: Task) -> None:
        self.task, self.model = task, network(task.model)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The keys and the best classes."""
        inputs = torch.from_numpy(np.asarray(batch["image"]))
        with torch.inference_mode():
            outputs = self.model(inputs)
        self.task.called(len(inputs))
        return {"key": batch["key"], "class": outputs.argmax(dim=1).numpy()}


def main() -> None:
    """Label the source."""
    ray.init("local", include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    server = pyarrow.fs.S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"], region="us-east-1")
    source, out = task.source.removeprefix("s3://"), task.out.removeprefix("s3://")
    images = ray.data.read_parquet(source, filesystem=server).map(decode_image).map(transform_image)
    predictions = images.map_batches(
        ImageClassifier,
        fn_constructor_args=(task,),
        compute=ray.data.ActorPoolStrategy(size=ACTORS),
        num_cpus=ACTOR_CPUS,
        batch_size=BATCH,
    )
    predictions.write_parquet(out, filesystem=server)
    done(task)


if __name__ == "__main__":
    main()
