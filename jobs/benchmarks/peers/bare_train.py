"""No framework: a loop over batches of pixels that lie decoded in memory, on the GPU if there is one, where it
computes in bfloat16; the model and the rates of raycnn.
"""

import time
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from benchmarks.peers import say, told
from raycnn import images
from raycnn.config import TrainConfig, make
from raycnn.errors import Bad
from raycnn.models import build
from raycnn.shards import PackedCollection, open_collection
from raycnn.training.model_input import image_spec


class Loop(NamedTuple):
    """What this contender is told: the settings of `raycnn train`, and how many threads may compute."""

    settings: dict[str, object]
    threads: int


def main() -> None:
    """Train; print the images per second of each epoch."""
    task = told(Loop)
    torch.set_num_threads(task.threads)
    config = make(TrainConfig, task.settings)
    torch.manual_seed(config.seed)
    packed = open_collection(config.data)
    assert isinstance(packed, PackedCollection)
    spec = image_spec(config, packed.manifest)
    pixels, labels = [], []
    for sample in packed.read(list(packed.select("train", Counter()))):
        assert sample.encoded is not None
        made = images.pixels(sample.encoded, spec)
        assert not isinstance(made, Bad)
        pixels.append(made)
        labels.append(sample.label)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x, y = torch.from_numpy(np.stack(pixels)).to(device), torch.tensor(labels, device=device)
    model = build(config.model, len(packed.class_names), spec, seed=config.seed)
    model = model.to(device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    rates = []
    for _ in range(config.epochs):
        start = time.perf_counter()
        for batch in torch.randperm(len(x), device=device).split(config.batch_size):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(x[batch])
            loss = nn.functional.cross_entropy(logits.float(), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        rates.append(len(x) / (time.perf_counter() - start))
    say({"images_per_s": rates})


if __name__ == "__main__":
    main()
