"""Daft, in the shape of its own image classification benchmark.

Source: Eventual-Inc/Daft, benchmarking/ai/image_classification/daft_main.py (2025, read 2026-11): read_parquet, decode
to RGB, `apply` with torchvision's ToTensor and the weights' transforms to float32 (3, 224, 224), a class of one process
per device that predicts batches of 100 in eager torch, write_parquet.

What is other here: bytes come from the Parquet files, where the original downloads URLs; CPUs for GPUs, so that
`gpus=1` and the Ray runner of a cluster are left out; one instance of the model, whose torch uses all cores.
"""

import os

import daft  # pyright: ignore[reportMissingImports]
import numpy as np
import torch
from daft import DataType, col  # pyright: ignore[reportMissingImports]
from torchvision import transforms
from torchvision.models import MobileNet_V3_Small_Weights

from benchmarks.peers import Task, done, network, told

BATCH = 100
INSTANCES = 1

task = told(Task)
transform = transforms.Compose([transforms.ToTensor(), MobileNet_V3_Small_Weights.DEFAULT.transforms()])


@daft.cls(max_concurrency=INSTANCES)
class Model:
    """Predicts batches of transformed images."""

    def __init__(self) -> None:
        self.model = network(task.model)

    @daft.method.batch(return_dtype=DataType.string(), batch_size=BATCH)
    def __call__(self, images: daft.Series) -> list[str]:
        """The names of the best classes."""
        if len(images) == 0:
            return []
        batch = torch.from_numpy(np.array(images.to_pylist()))
        with torch.inference_mode():
            best = self.model(batch).argmax(dim=1)
        task.called(len(images))
        return [f"class {i}" for i in best]


def main() -> None:
    """Label the source."""
    server = daft.io.S3Config(
        endpoint_url=os.environ["AWS_ENDPOINT_URL"],
        key_id=os.environ["AWS_ACCESS_KEY_ID"],
        access_key=os.environ["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
        use_ssl=False,
    )
    daft.set_planning_config(default_io_config=daft.IOConfig(s3=server))
    tensor = DataType.tensor(dtype=DataType.float32(), shape=(3, 224, 224))
    frame = daft.read_parquet(f"{task.source}/*.parquet")
    frame = frame.with_column("decoded", col("image").decode_image(mode=daft.ImageMode.RGB))
    frame = frame.with_column("norm", col("decoded").apply(lambda image: transform(image), return_dtype=tensor))
    frame = frame.with_column("label", Model()(col("norm")))
    frame.select("key", "label").write_parquet(task.out)
    done(task)


if __name__ == "__main__":
    main()
