"""Training on a real cluster: it learns, it resumes, and every worker takes the same steps."""

import asyncio
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import Demonstrated
from PIL import Image
from safetensors.torch import save_file

import raycnn
from raycnn import bundle as bundles
from raycnn import loop
from raycnn.config import IMAGENET_MEAN, ImageSpec, TrainConfig, make
from raycnn.errors import ConfigError, DataError, StorageError
from raycnn.models import build
from raycnn.shards import PackedCollection, open_collection
from raycnn.shards.order import Cursor
from raycnn.storage import open_store
from raycnn.training import Checkpoints, RateReport, folder, train
from raycnn.training.folder import Claim, History, claim, ended, resume_at
from raycnn.training.model_input import image_spec
from raycnn.training.rank import hand_over

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


@pytest.mark.s3
def test_a_run_on_s3_has_learned_left_a_bundle_and_is_not_done_twice(demonstrated):
    packed, store = open_store(f"{demonstrated.store}/packed"), open_store(f"{demonstrated.store}/run")
    config = config_of_demo(demonstrated)
    report = train(config)
    assert demonstrated.objects.items() >= {f"stripes/run/{e.path}": e.etag for e in store.list()}.items()
    train_split = json.loads(packed.get("manifest.json"))["splits"]["train"]["status"]
    assert report.accuracy_top1 > 0.95
    assert report.resumed_at_epoch == report.epochs == config.epochs
    assert report.steps == config.epochs * -(-sum(train_split.values()) // config.batch_size)
    assert bundles.load(report.bundle).class_names == ("bottom", "middle", 'top, "high"')
    names = [e.path for e in store.list()]
    assert any(n.startswith("tensorboard/events") for n in names)
    assert {"config.yaml", "metrics.jsonl", "bundle/validation.json"} <= set(names)
    lines = [json.loads(line) for line in store.get("metrics.jsonl").decode().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(config.epochs))
    assert sum(lines[0]["skipped"].values()) == sum(n for word, n in train_split.items() if word != "ok") == 1
    assert make(TrainConfig, yaml.safe_load(store.get("config.yaml"))) == config


@pytest.mark.s3
def test_a_run_goes_on_with_the_settings_and_the_data_that_it_began_with(demonstrated, tmp_path):
    with pytest.raises(ConfigError, match=r"other settings: learning_rate \(was 0\.002, now 0\.1\)"):
        train(config_of_demo(demonstrated, learning_rate=0.1))
    with pytest.raises(ConfigError, match=r"9 workers cannot go on .* of 8 equal lanes: use --num-workers 8 or fewer"):
        train(config_of_demo(demonstrated, num_workers=9))
    packed, moved = open_store(f"{demonstrated.store}/packed"), open_store(str(tmp_path / "moved"))
    for entry in packed.list():
        moved.put(entry.path, packed.get(entry.path))
    assert train(config_of_demo(demonstrated, data=moved.url)).resumed_at_epoch > 0
    moved.put("manifest.json", packed.get("manifest.json").replace(b'"middle"', b'"medium"'))
    with pytest.raises(ConfigError, match="holds a run on other data than"):
        train(config_of_demo(demonstrated, data=moved.url))


def config_of_demo(demonstrated: Demonstrated, **more) -> TrainConfig:
    """What the demo has trained with."""
    run = {"data": f"{demonstrated.store}/packed", "run": f"{demonstrated.store}/run"}
    return make(TrainConfig, run | more)


@pytest.mark.slow
def test_the_driver_of_a_run_imports_no_torch():
    code = "import sys, raycnn.reporting.page, raycnn.training.launch; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout == "False\n"


def test_a_model_that_nobody_knows_is_named_and_leaves_the_folder_free(packed, tmp_path):
    with pytest.raises(ConfigError, match=r"unknown architecture 'resnet-18' .did you mean 'resnet18'"):
        train(config_of(packed, tmp_path / "run", model="resnet-18"))
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_notebook_whose_event_loop_runs_can_train(packed, tmp_path):
    async def cell() -> int:
        return train(config_of(packed, tmp_path, epochs=1)).epochs

    assert asyncio.run(cell()) == 1


def test_a_torn_checkpoint_is_not_used(tmp_path):
    checkpoints = Checkpoints(open_store(str(tmp_path)))
    for epoch, accuracy in enumerate((0.9, 0.7, 0.8, 0.6)):
        checkpoints.save({"x": torch.full((3,), float(epoch))}, Cursor(epoch, 0), accuracy)
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
    whole = marker.read_bytes()
    for damaged in (whole[:-1], b"null", b"{}", whole.replace(b'"step": 0', b'"step": 2')):
        marker.write_bytes(damaged)
        checkpoints = Checkpoints(open_store(str(tmp_path)))
        left = checkpoints.last()
        assert left is not None
        assert left["epoch"] == 0
        assert set(checkpoints.torn) == {str(slot), str(marker)}


def test_a_run_says_which_checkpoint_it_does_not_use_and_where_it_goes_on(packed, tmp_path):
    train(config_of(packed, tmp_path, epochs=2))
    last = Checkpoints(open_store(str(tmp_path))).last()
    assert last is not None
    slot = tmp_path / "checkpoints" / f"slot-{last['slot']}.safetensors"
    slot.write_bytes(slot.read_bytes()[:-1])
    events: list[dict[str, Any]] = []
    assert train(config_of(packed, tmp_path, epochs=3), events.append).epochs == 3
    text = f"torn or altered, and not used: {slot}; going on from epoch 2, step 1"
    assert text in [event.get("text") for event in events]


def test_more_time_goes_on_within_the_epoch_that_less_time_has_cut(packed, tmp_path):
    train(config_of(packed, tmp_path, epochs=2, max_time="0.001s", max_bad=0.5))
    (line,) = History(open_store(str(tmp_path))).lines
    assert (line["step"], line["cut"]) == (1, True)
    report = train(config_of(packed, tmp_path, epochs=2, max_bad=0.5))
    first, second = History(open_store(str(tmp_path))).lines
    assert (report.epochs, second["step"]) == (2, 2 * first["step"])
    assert first["skipped"] == second["skipped"] != {}  # each of them sees each image once
    assert "cut" not in first
    events = [file.read_bytes() for file in (tmp_path / "tensorboard").iterdir()]
    assert [b"training images" in content for content in events] == [True, True]  # the second hides the first


def test_the_rest_of_a_cut_epoch_is_done_again_where_its_checkpoint_was_not_written_any_more(packed, tmp_path):
    train(config_of(packed, tmp_path, epochs=1, max_time="0.001s"))
    cut = shutil.copytree(tmp_path / "checkpoints", tmp_path / "cut")
    whole = train(config_of(packed, tmp_path, epochs=1))
    weights = (tmp_path / "bundle" / "model.safetensors").read_bytes()
    for name in ("checkpoints", "bundle"):  # as a kill would have left it after the epoch's line
        shutil.rmtree(tmp_path / name)
    cut.rename(tmp_path / "checkpoints")
    assert train(config_of(packed, tmp_path, epochs=1)).steps == whole.steps
    assert (tmp_path / "bundle" / "model.safetensors").read_bytes() == weights


def test_the_sampler_counts_what_cannot_be_read_once(packed, tmp_path):
    report = train(config_of(packed, tmp_path, epochs=2, imbalance="sampler"))
    assert (report.epochs, report.skipped) == (2, {"unsupported": 4})
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 4


def test_a_best_checkpoint_that_was_altered_is_named(packed, tmp_path):
    train(config_of(packed, tmp_path, epochs=2))
    shutil.rmtree(tmp_path / "bundle")
    marker = {"slot": 2, "epoch": 0, "step": 0, "accuracy_top1": 2.0, "sha256": "0" * 64}  # of other tensors
    tensors = tmp_path / "checkpoints" / "slot-2.safetensors"
    tensors.with_suffix(".json").write_text(json.dumps(marker | {"marker_sha256": folder._digest(marker)}))
    tensors.write_bytes(b"altered")
    events: list[dict[str, Any]] = []
    train(config_of(packed, tmp_path, epochs=2), events.append)
    text = f"torn or altered, and not used: {tensors}; the bundle is made of another"
    assert text in [event.get("text") for event in events]


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.json", "config.yaml"])
def test_a_damaged_file_of_a_run_is_named(packed, tmp_path, name):
    config = config_of(packed, tmp_path, epochs=1)
    train(config)
    file = tmp_path / name
    whole = file.read_bytes()
    file.write_bytes(b"{" + whole[:20])
    with pytest.raises(ConfigError, match=f"{file} cannot be read .*: restore it, or use another run folder"):
        train(config)
    for other in (b"1", b"[1]", b"[]" if name != "metrics.jsonl" else b'{"step": 1}', b""):
        file.write_bytes(other)
        with pytest.raises(ConfigError, match=f"{file} .*: restore it, or use another run folder"):
            train(config)
    if name == "metrics.jsonl":
        file.unlink()
        with pytest.raises(ConfigError, match=f"{file} lacks some of the 1 epochs that are done: restore it"):
            train(config)
    file.write_bytes(whole)
    assert train(config).epochs == 1


def test_what_repeats_a_run_has_as_many_workers_as_it_began_with(packed, tmp_path):
    config = config_of(packed, tmp_path)
    collection = open_collection(packed)
    assert isinstance(collection, PackedCollection)
    store, wanted = open_store(str(tmp_path)), Claim(9, None)
    claim(store, config.model_copy(update={"num_workers": 3, "cache_gib": 0.0}), collection, wanted)
    claim(store, config.model_copy(update={"epochs": 7}), collection, wanted)
    found = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert (found["num_workers"], found["cache_gib"], found["epochs"]) == (3, 0.0, 7)


def test_mixing_is_refused_where_a_batch_holds_one_image_of_a_lane(packed, tmp_path):
    with pytest.raises(
        ConfigError, match=r"mixup wants two images of each of the run's 8 lanes .* use --batch-size 16"
    ):
        train(config_of(packed, tmp_path / "run", batch_size=15, mixup=0.2))
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_within_an_epoch_is_the_last_and_never_the_best(tmp_path):
    checkpoints = Checkpoints(open_store(str(tmp_path)))
    checkpoints.save({"x": torch.zeros(1)}, Cursor(0, 0), 0.7)
    for step in (10, 20, 30):
        checkpoints.save({"x": torch.full((1,), float(step))}, Cursor(1, step))
    last, best = checkpoints.last(), checkpoints.best()
    assert last is not None
    assert best is not None
    assert (resume_at(last), resume_at(best)) == ((1, 30), (1, 0))
    assert checkpoints.load(checkpoints.at(resume_at(last)))["x"].tolist() == [30.0]
    checkpoints.save({"x": torch.ones(1)}, Cursor(1, 0), 0.6)
    assert resume_at(checkpoints.last()) == (2, 0)
    assert checkpoints.best() == best


def test_a_run_that_is_to_end_sooner_than_it_has_come_is_finished(packed, tmp_path):
    config, collection = config_of(packed, tmp_path, epochs=2), open_collection(packed)
    assert isinstance(collection, PackedCollection)
    store = open_store(str(tmp_path))
    claim(store, config, collection, Claim(4, None))
    classifier = build("classic", 2, image_spec(config, collection.manifest), seed=0)
    state = loop.Trainer(classifier, config, 10).state()
    pixels, labels = torch.zeros((2, 8, 8, 1), dtype=torch.uint8), torch.tensor([0, 1])
    metrics = loop.evaluate(classifier, [loop.Batch(pixels, labels, labels, labels)], 2)
    Checkpoints(store).save(state | {"validation": metrics.to_vector()}, Cursor(6, 0), 0.5)
    numbers = dict.fromkeys(("train/loss", "val/loss", "metrics/accuracy_top1", "lr", "images_per_s"), 0.5)
    history = History(store)
    for epoch in range(7):
        history.add({"epoch": epoch, "step": 10 * (epoch + 1), "skipped": {}} | numbers)
    hand_over(config, collection, classifier)
    assert train(config).epochs == 7
    assert train(config_of(packed, tmp_path, epochs=7)).resumed_at_epoch == 7


@pytest.mark.parametrize("file", ["run.json", "config.yaml"])
def test_nothing_is_packed_into_the_folder_of_another_run(tmp_path, file):
    store, rng = open_store(str(tmp_path / "raw")), np.random.default_rng(0)
    for i in range(4):
        store.put(f"{i % 2}/{i}.png", png(rng, True))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / file).write_text('{"data_digest": "another", "lanes": 8}')
    with pytest.raises(ConfigError, match="use another run folder"):
        train(config_of(str(tmp_path / "raw"), tmp_path / "run"))
    assert [f.name for f in (tmp_path / "run").iterdir()] == [file]


def test_a_model_starts_from_weights_with_the_input_that_they_were_made_for(tmp_path):
    color, large = {"height": [8, 9], "width": [8, 9], "channels": {"1": 5, "3": 5}}, {"model": "inception_v3"}
    gray = build("classic", 10, ImageSpec(channels=1, mean=(0.4,), std=(0.2,)), seed=0)
    save_file(gray.net.state_dict(), tmp_path / "gray.safetensors")
    spec = image_spec(config_of("d", "r", weights=str(tmp_path / "gray.safetensors")), {"images": color})
    assert (spec.channels, len(spec.mean)) == (1, 1)
    build("classic", 2, spec, str(tmp_path / "gray.safetensors"))
    spec = image_spec(config_of("d", "r", weights="DEFAULT", **large), {"images": color | {"channels": {"1": 9}}})
    assert (spec.height, spec.channels, spec.mean) == (299, 3, (0.5, 0.5, 0.5))
    spec = image_spec(config_of("d", "r", **large), {"images": color})
    assert (spec.height, spec.mean) == (224, IMAGENET_MEAN)


@pytest.mark.parametrize(
    ("failure", "decision"),
    [(DataError("mend it"), "RAISE"), (StorageError("busy"), "RETRY"), (RuntimeError("a node is gone"), "RETRY")],
)
def test_what_a_user_has_to_mend_ends_a_run_whichever_worker_meets_it(failure, decision):
    from ray.train import FailureConfig
    from ray.train.v2.api.exceptions import WorkerGroupError

    from raycnn.training.launch import Policy

    policy = Policy(FailureConfig(max_failures=1000))
    assert policy.make_decision(WorkerGroupError("one worker failed", {1: failure})).name == decision


def test_more_unreadable_images_than_allowed_are_said_before_any_work(packed, tmp_path):
    with pytest.raises(
        DataError, match=r"^4 of \d+ training images cannot be read \(4 unsupported\), more than --max-"
    ):
        train(config_of(packed, tmp_path / "run", max_bad=0.01))
    assert not (tmp_path / "run").exists()


def test_more_unreadable_images_than_allowed_end_a_run_that_meets_them(packed, tmp_path):
    copy = shutil.copytree(packed, tmp_path / "packed")
    manifest = json.loads((copy / "manifest.json").read_text())
    train_split = manifest["splits"]["train"]
    train_split["status"] = {"ok": sum(train_split["status"].values())}  # as if they had been damaged since
    (copy / "manifest.json").write_text(json.dumps(manifest))
    run = tmp_path / "run"
    with pytest.raises(DataError, match=r"^4 of \d+ training images cannot be read .* see .*bad.jsonl, mend them"):
        train(config_of(str(copy), run, num_workers=2, max_bad=0.01))
    assert len((run / "bad.jsonl").read_text().splitlines()) == 4
    assert not (run / "bundle").exists()


@pytest.mark.parametrize("count", [1, 2])
def test_validation_images_that_cannot_be_read_are_named_and_counted(tmp_path, count):
    store, rng, events = open_store(str(tmp_path / "raw")), np.random.default_rng(0), list[dict[str, Any]]()
    for i in range(60):
        split, label = "val" if i < 4 else "train", i % 2
        store.put(f"{split}/{label}/{i:02d}.png", b"broken" if i < 2 * count else png(rng, bool(label)))
    raycnn.pack(str(tmp_path / "raw"), str(tmp_path / "packed"))
    config = config_of(str(tmp_path / "packed"), tmp_path / "run", epochs=1)
    text = rf"{2 * count} of 4 validation images cannot be read \({2 * count} unsupported\): see .*unreadable.jsonl"
    if count == 2:
        with pytest.raises(DataError, match=f"^{text}, mend them"):
            train(config)
        assert not (tmp_path / "run").exists()
        return
    train(config, events.append)
    assert any(re.fullmatch(f"{text}; accuracy is that of the others", e.get("text", "")) for e in events)
    (line,) = History(open_store(str(tmp_path / "run"))).lines
    assert line["val/skipped"] == {"unsupported": 2}


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


def test_a_class_without_validation_images_is_trained_on_and_named(tmp_path):
    store, rng = open_store(str(tmp_path / "raw")), np.random.default_rng(0)
    for split, names in (("train", "abc"), ("val", "ab")):
        for number in range(8):
            for name in names:
                store.put(f"{split}/{name}/{number}.png", png(rng, name == "a"))
    raycnn.pack(str(tmp_path / "raw"), str(tmp_path / "packed"))
    events: list[dict[str, Any]] = []
    report = train(config_of(str(tmp_path / "packed"), tmp_path / "run", epochs=1), events.append)
    assert any("no val image of 'c': nothing is known" in event.get("text", "") for event in events)
    found = json.loads((tmp_path / "run/bundle/validation.json").read_text())
    assert found["class_counts"] == [8, 8, 0]
    assert report.epochs == 1


def test_learning_rates_are_tried_before_the_run_that_takes_one(packed, tmp_path):
    from raycnn.reporting import train as train_or_find

    settings = {"batch_size": 4, "learning_rate": 0.5, "model": "classic"}
    found = train_or_find(config_of(packed, tmp_path, find_lr=True, **settings))
    assert isinstance(found, RateReport)
    assert 1e-5 < found.suggestion < 1
    assert found.steps >= 20
    assert Image.open(found.plot).format == "PNG"
    assert not (tmp_path / "run.json").exists()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_run_ends_when_its_time_is_up_and_its_schedule_with_it(packed, tmp_path):
    # Long enough that the last validation, in which time may run out with some rate left, is a small part of it.
    config = config_of(packed, tmp_path, epochs=10_000, max_time="20s")
    report = train(config)
    lines = History(open_store(str(tmp_path))).lines
    assert report.epochs == len(lines) < 1000
    assert lines[-1]["lr"] < 1e-3 * config.learning_rate
    assert lines[-1]["elapsed_s"] > 20
    assert train(config).resumed_at_epoch == report.epochs  # it has ended, and stays so


@pytest.mark.parametrize(
    ("more", "accuracies", "over"),
    [
        ({"epochs": 2}, [0.5, 0.6], True),
        ({"epochs": 9}, [0.5, 0.6], False),
        ({"epochs": 9, "patience": 2}, [0.6, 0.5, 0.6], True),
        ({"epochs": 9, "patience": 2}, [0.6, 0.5, 0.7], False),
        ({"epochs": 9, "max_time": 25.0}, [0.5, 0.6], False),
        ({"epochs": 9, "max_time": 15.0}, [0.5, 0.6], True),
        ({"epochs": 2, "max_time": 20.0, "cut": True}, [0.5, 0.6], True),
        ({"epochs": 2, "max_time": 25.0, "cut": True}, [0.5, 0.6], False),
    ],
)
def test_when_a_run_is_over(more, accuracies, over):
    more = dict(more)
    is_cut = more.pop("cut", False)
    lines = [{"metrics/accuracy_top1": a, "elapsed_s": 10.0 * (i + 1)} for i, a in enumerate(accuracies)]
    lines[-1] |= {"cut": True} if is_cut else {}
    assert (ended(config_of("d", "r", **more), lines) is not None) == over


def test_what_a_run_leaves_says_what_it_has_met_and_where_its_time_went(packed, tmp_path):
    more = {"flip": True, "ema": 0.9, "mixup": 0.2, "max_bad": 0.5}
    report = train(config_of(packed, tmp_path, epochs=2, num_workers=2, **more))
    store = open_store(str(tmp_path))
    lines, bad = History(store).lines, [json.loads(line) for line in store.get("bad.jsonl").splitlines()]
    assert lines[0]["skipped"] == lines[1]["skipped"] == {"unsupported": len(bad)}
    assert all((line["status"], line["key"][:5]) == ("unsupported", "left/") for line in bad)
    for line in lines:
        assert line["time"].keys() >= {"data", "forward", "backward", "all_reduce", "optimizer", "validation"}
        assert 0.99 < sum(line["time"].values()) < 1.01
    assert lines[1]["time"]["checkpoint"] > 0  # that of the first epoch's end
    found, alone = (raycnn.evaluate(report.bundle, packed, split="train", flips=flips) for flips in (True, False))
    assert (found.accuracy_top1, found.loss, alone.with_flips) == (alone.accuracy_top1, alone.loss, None)
    assert found.with_flips["loss"] != found.loss
    assert raycnn.evaluate(report.bundle, packed, split="val").accuracy_top1 == report.accuracy_top1


def test_a_size_to_grow_from_is_refused_where_the_model_cannot(packed, tmp_path):
    with pytest.raises(ConfigError, match="start_size: classic takes images of 8 x 8 px only"):
        train(config_of(packed, tmp_path / "run", start_size=4))
    with pytest.raises(ConfigError, match="start_size: 9 is more than the images' side of 8 px"):
        train(config_of(packed, tmp_path / "run", start_size=9))
    assert not (tmp_path / "run").exists()
