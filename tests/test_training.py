"""Training on a real cluster: it learns, it resumes, and every worker takes the same steps."""

import io
import json
import os
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from PIL import Image

import raycnn
from raycnn import bundle as bundles
from raycnn import data
from raycnn.config import TrainConfig, make
from raycnn.errors import ConfigError, DataError
from raycnn.storage import open_store
from raycnn.training import Checkpoints, image_spec, train

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def png(rng: np.random.Generator, bright: bool) -> bytes:
    """An image that is lit on its left or on its right half."""
    image = rng.integers(0, 60, (8, 8), np.uint8)
    image[:, : 4 if bright else 8][:, -4:] += 150
    sink = io.BytesIO()
    Image.fromarray(image).save(sink, "PNG")
    return sink.getvalue()


@pytest.fixture(scope="module")
def packed(tmp_path_factory, ray_cluster) -> str:
    """300 images of two classes, 5 of which cannot be read."""
    root, rng = tmp_path_factory.mktemp("train"), np.random.default_rng(0)
    store = open_store(str(root / "raw"))
    for i in range(300):
        name = "left" if i % 2 else "right"
        store.put(f"{name}/{i:03d}.png", b"broken" if i % 60 == 1 else png(rng, bool(i % 2)))
    raycnn.pack(str(root / "raw"), str(root / "packed"), val=0.2, test=0.1)
    return str(root / "packed")


def config_of(packed: str, run: Path | str, **more) -> TrainConfig:
    return make(TrainConfig, {"data": packed, "run": str(run), "batch_size": 32, "epochs": 3} | more)


def train_rows(packed: str) -> int:
    manifest = json.loads(Path(packed, "manifest.json").read_text())
    return sum(manifest["splits"]["train"]["status"].values())


@pytest.mark.s3
def test_a_run_on_s3_learns_leaves_a_bundle_and_is_not_done_twice(packed, s3_url, tmp_path):
    report = train(config_of(packed, f"{s3_url}/run"))
    assert report.accuracy_top1 > 0.95
    assert report.epochs == 3
    assert report.steps == 3 * -(-train_rows(packed) // 32)
    bundle = bundles.load(report.bundle)
    assert bundle.class_names == ("left", "right")
    store = open_store(f"{s3_url}/run")
    names = [e.path for e in store.list()]
    assert any(n.startswith("tensorboard/events") for n in names)
    assert {"config.yaml", "metrics.jsonl", "bundle/validation.json"} <= set(names)
    lines = [json.loads(line) for line in store.get("metrics.jsonl").decode().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    skipped = json.loads(Path(packed, "manifest.json").read_text())["splits"]["train"]["status"]
    assert sum(lines[0]["skipped"].values()) == sum(n for word, n in skipped.items() if word != "ok")
    before = {e.path: e.etag for e in store.list()}
    assert train(config_of(packed, f"{s3_url}/run")).resumed_at_epoch == 3
    assert {e.path: e.etag for e in store.list()} == before
    with pytest.raises(ConfigError, match=r"other settings: learning_rate \(was 0\.002, now 0\.1\)"):
        train(config_of(packed, f"{s3_url}/run", learning_rate=0.1))
    recipe = make(TrainConfig, yaml.safe_load(store.get("config.yaml")))
    assert recipe == config_of(packed, f"{s3_url}/run")
    shutil.copytree(packed, tmp_path / "moved")
    assert train(config_of(str(tmp_path / "moved"), f"{s3_url}/run")).resumed_at_epoch == 3
    with pytest.raises(ConfigError, match=r"3 workers cannot go on with this run.*: use --num-workers 1, 2, 4, 8"):
        train(config_of(packed, f"{s3_url}/run", num_workers=3))
    manifest = tmp_path / "moved" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"right"', '"rightly"'))
    with pytest.raises(ConfigError, match="holds a run on other data than"):
        train(config_of(str(tmp_path / "moved"), f"{s3_url}/run"))


@pytest.mark.timeout(300)
def test_a_killed_run_goes_on_with_other_workers_and_survives_the_death_of_one(small_cluster):
    run, killed = small_cluster.folder / "run", threading.Event()
    done = Checkpoints(open_store(str(run))).last()
    assert done is not None
    last = done["epoch"] + 6
    # It could have died anywhere: between metrics and checkpoint, tensors and marker, config.json and weights.
    lines = (run / "metrics.jsonl").read_text().splitlines()[: done["epoch"] + 1]
    lines.append(json.dumps(json.loads(lines[-1]) | {"epoch": done["epoch"] + 1, "train/loss": 99.0}))
    (run / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    free = ({0, 1, 2} - {done["slot"], Checkpoints(open_store(str(run))).best()["slot"]}).pop()
    (run / "checkpoints" / f"slot-{free}.safetensors").write_bytes(b"half")
    open_store(str(run)).put("bundle/config.json", b'{"incomplete": true, "metrics": {}}')

    def kill_a_worker(event: dict) -> None:
        if event["kind"] == "epoch" and event["epoch"] < last - 1 and not killed.is_set():
            workers = [p for p in psutil.process_iter() if is_train_worker(p)]
            assert len(workers) == 2
            os.kill(workers[0].pid, signal.SIGKILL)
            killed.set()

    packed = str(small_cluster.folder / "packed")
    report = train(config_of(packed, run, batch_size=16, num_workers=2, epochs=last + 1), kill_a_worker)
    assert killed.is_set()
    assert (report.resumed_at_epoch, report.epochs) == (done["epoch"] + 1, last + 1)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(last + 1))
    steps = -(-train_rows(packed) // 16)
    assert [line["step"] for line in lines] == [steps * (e + 1) for e in range(last + 1)]
    assert all(line["train/loss"] < 99 for line in lines)
    assert report.accuracy_top1 > 0.95
    assert bundles.load(report.bundle).config["metrics"]["epochs"] == last + 1


def is_train_worker(process: psutil.Process) -> bool:
    """A training worker of this test run's own cluster; others on the machine are left alone."""
    try:
        return "RayTrainWorker" in " ".join(process.cmdline()) and psutil.Process() in process.parents()
    except psutil.Error:
        return False


def test_a_torn_checkpoint_is_not_used(tmp_path):
    checkpoints = Checkpoints(open_store(str(tmp_path)))
    for epoch, accuracy in enumerate((0.9, 0.7, 0.8, 0.6)):
        checkpoints.save({"x": torch.full((3,), float(epoch))}, epoch, accuracy)
    last, best = checkpoints.last(), checkpoints.best()
    assert last is not None
    assert best is not None
    assert (last["epoch"], best["epoch"]) == (3, 0)
    slot = tmp_path / "checkpoints" / f"slot-{last['slot']}.safetensors"
    slot.write_bytes(slot.read_bytes()[:-1])
    checkpoints = Checkpoints(open_store(str(tmp_path)))
    before = checkpoints.last()
    assert before is not None
    assert before["epoch"] == 2
    assert checkpoints.load(before)["x"].tolist() == [2.0, 2.0, 2.0]
    marker = tmp_path / "checkpoints" / f"slot-{before['slot']}.json"
    marker.write_bytes(marker.read_bytes()[:-1])
    left = Checkpoints(open_store(str(tmp_path))).last()
    assert left is not None
    assert left["epoch"] == 0


def test_a_mistake_that_only_one_worker_meets_ends_the_run_at_once(ray_cluster):
    from raycnn.training.launch import launch

    def work(arguments: dict) -> None:
        import ray.train
        import torch

        if ray.train.get_context().get_world_rank() == 1:
            raise DataError("mend it")
        torch.distributed.all_reduce(torch.zeros(1))  # waits for the other one

    settings = config_of("data", "run", num_workers=2, max_failures=1000)
    with pytest.raises(DataError, match=r"^mend it$"), data.user_errors():
        launch(work, {}, settings, data.TrainPlan(0.5, 0, 1, 0.5, 1))


def test_more_unreadable_images_than_allowed_are_said_before_any_work(packed, tmp_path):
    with pytest.raises(
        DataError, match=r"^4 of \d+ training images cannot be read \(4 unsupported\), more than --max-"
    ):
        train(config_of(packed, tmp_path / "run", max_bad=0.01))
    assert not (tmp_path / "run").exists()


def test_a_plan_that_cannot_run_leaves_no_run_folder(packed, tmp_path):
    with pytest.raises(ConfigError, match=r"9 workers share 2 CPUs, .* use --num-workers 8 or fewer"):
        train(config_of(packed, tmp_path / "run", num_workers=9))
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_something_else_is_refused(packed, tmp_path):
    (tmp_path / "config.yaml").write_text("out: labels\n")
    with pytest.raises(ConfigError, match=r"holds a config\.yaml that belongs to no training run"):
        train(config_of(packed, tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


def test_data_of_which_nothing_can_be_read_is_refused():
    seen = {"images": {"height": [0, 0], "width": [0, 0], "channels": {}}}
    with pytest.raises(DataError, match="not one of the packed images can be read"):
        image_spec(config_of("data", "run"), seen)


def test_data_with_one_class_is_refused(tmp_path):
    store, rng = open_store(str(tmp_path / "raw")), np.random.default_rng(0)
    for i in range(10):
        store.put(f"only/{i}.png", png(rng, True))
    raycnn.pack(str(tmp_path / "raw"), str(tmp_path / "packed"))
    with pytest.raises(DataError, match="training needs two or more"):
        train(config_of(str(tmp_path / "packed"), tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_class_without_training_images_is_named(tmp_path):
    store, rng = open_store(str(tmp_path / "raw")), np.random.default_rng(0)
    for split, names in (("train", ("a", "b")), ("val", ("a", "b", "c"))):
        for name in names:
            store.put(f"{split}/{name}/{split}{name}.png", png(rng, True))
    raycnn.pack(str(tmp_path / "raw"), str(tmp_path / "packed"))
    with pytest.raises(DataError, match="no train image of 'c'; add some"):
        train(config_of(str(tmp_path / "packed"), tmp_path / "run"))
