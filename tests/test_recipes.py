"""The recipes: each is one that `raycnn train` takes, and every option of the largest one works on small data."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import raycnn
from raycnn import bundle as bundles
from raycnn.config import TrainConfig, from_file, make
from raycnn.storage import open_store
from raycnn.training import train

RECIPES = sorted((Path(__file__).parent.parent / "jobs/recipes").glob("*.yaml"))
IMAGENET = next(path for path in RECIPES if path.stem == "imagenet-resnet50")
HEAD = ("Claim", "Hardware", "Command", "Expected")
SMALLER = {"image_size": 64, "epochs": 1, "batch_size": 16, "learning_rate": 0.5 * 16 / 1024}
SMALLER |= {"num_workers": 2, "device": "cpu"}
"""What stands for the recipe's own where 8 GPUs and a million images are not at hand."""
MODELS: dict[str, dict[str, Any]] = {
    # Not less: on CPUs oneDNN's bfloat16 gradient of a 3 x 3 convolution that strides over a single px is whatever
    # was in memory.
    "resnet18": {"start_size": 32, "compile": False},
    "classic": {"start_size": 0, "num_workers": 1},  # takes images of one size, and is quickly compiled
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_settings_that_training_takes_and_says_what_it_claims(path: Path):
    recipe = from_file(TrainConfig, str(path))
    make(TrainConfig, recipe | {"data": "packed", "run": "run"})
    assert {"data", "run", "seed"}.isdisjoint(recipe)
    comments = [line[2:] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert tuple(word for line in comments if (word := line.partition(":")[0]) in HEAD) == HEAD


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, ray_cluster: str) -> str:
    """80 packed photos of several sizes, lit from the left or from the right."""
    root, rng = tmp_path_factory.mktemp("recipes"), np.random.default_rng(0)
    store = open_store(str(root / "raw"))
    for i in range(80):
        pixels = rng.integers(0, 100, (40 + i % 9, 48, 3), np.uint8)
        pixels[:, 24 * (i % 2) : 24 * (i % 2) + 24] += 100
        sink = io.BytesIO()
        Image.fromarray(pixels).save(sink, "JPEG")
        store.put(f"{('left', 'right')[i % 2]}/{i:03d}.jpg", sink.getvalue())
    raycnn.pack(str(root / "raw"), str(root / "packed"), val=0.2, test=0.0)
    return str(root / "packed")


@pytest.mark.ray
@pytest.mark.timeout(300)
@pytest.mark.parametrize("model", MODELS)
def test_every_option_of_the_imagenet_recipe_works_together_on_small_data(photos: str, tmp_path: Path, model: str):
    settings = from_file(TrainConfig, str(IMAGENET)) | SMALLER | {"model": model} | MODELS[model]
    config = make(TrainConfig, settings | {"data": photos, "run": str(tmp_path / "run")})
    report = train(config)
    rows = sum(json.loads(open_store(photos).get("manifest.json"))["splits"]["train"]["status"].values())
    assert (report.epochs, report.steps, report.skipped) == (1, -(-rows // config.batch_size), {})
    bundle = bundles.load(report.bundle)
    assert (bundle.spec.height, bundle.spec.width, bundle.spec.channels) == (64, 64, 3)
    assert bundle.class_names == ("left", "right")
