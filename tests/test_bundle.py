"""The hand-over folder: what was saved is what is loaded, and nothing else is."""

import hashlib
import io
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import raycnn
from raycnn import bundle as bundles
from raycnn import images
from raycnn.bundle import SelfTest
from raycnn.bundle.folder import _sha256_of
from raycnn.bundle.graph import graph_files
from raycnn.bundle.selftest import selftest_files
from raycnn.config import ImageSpec
from raycnn.errors import Bad, BundleError, ConfigError, StorageError
from raycnn.models import Classifier, build
from raycnn.storage import open_store

NAMES = ("cat", "dog", "eel")


def png(seed: int) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 24, 3), np.uint8)).save(sink, "PNG")
    return sink.getvalue()


def classifier(seed: int = 0) -> Classifier:
    return build("classic", len(NAMES), ImageSpec(height=16, width=16), seed=seed).eval()


def save(url: str, model: Classifier | None = None, **changes) -> bundles.Bundle:
    arguments = {
        "temperature": 1.25,
        "metrics": {"accuracy_top1": 0.5},
        "validation": {"rows": 4},
        "samples": [png(i) for i in range(3)],
        "data_fingerprint": "abc",
    }
    return bundles.save(url, model or classifier(), NAMES, **arguments | changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(str(tmp_path / "bundle"))
    return tmp_path / "bundle"


def forge(folder: Path, **changes) -> None:
    """Change files of a bundle and sign them again, as somebody would who wants it to be believed."""
    config = json.loads((folder / "config.json").read_text()) | changes
    for path in config["files"]:
        config["files"][path] = hashlib.sha256((folder / path).read_bytes()).hexdigest()
    config["sha256"] = _sha256_of(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("place", ["folder", pytest.param("s3", marks=pytest.mark.s3)])
def test_what_is_saved_is_what_is_loaded(place, tmp_path, request):
    url = str(tmp_path / "b") if place == "folder" else request.getfixturevalue("s3_url")
    model = classifier(seed=5)
    save(url, model)
    loaded = bundles.load(url)
    assert (loaded.class_names, loaded.temperature, loaded.spec) == (NAMES, 1.25, model.spec)
    assert loaded.validation == {"rows": 4}
    batch = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3), np.uint8))
    with torch.inference_mode():
        assert torch.equal(loaded.classifier(batch), model(batch))


def test_the_same_model_gives_the_same_bytes_and_another_another_digest(tmp_path):
    first, second, other = (
        save(str(tmp_path / "a")),
        save(str(tmp_path / "b")),
        save(str(tmp_path / "c"), classifier(1)),
    )
    for file in (tmp_path / "a").rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()
    assert first.digest == second.digest != other.digest


def test_a_changed_byte_in_any_file_is_refused_by_the_files_name(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    assert len(files) >= 8
    for file in files:
        good = file.read_bytes()
        file.write_bytes(good[:-3] + bytes([good[-3] ^ 1]) + good[-2:])
        with pytest.raises(BundleError, match=file.name):
            bundles.load(str(folder))
        file.write_bytes(good[: len(good) // 2])
        with pytest.raises(BundleError, match=file.name):
            bundles.load(str(folder))
        file.write_bytes(good)
    bundles.load(str(folder))


def test_a_missing_file_is_named(folder):
    for name in ("model.safetensors", "model.onnx", "validation.json", "selftest/expected.json", "selftest/0.png"):
        (folder / name).rename(folder.parent / "away")
        with pytest.raises(BundleError, match=f"{name} is missing"):
            bundles.load(str(folder))
        (folder.parent / "away").rename(folder / name)
    (folder / "config.json").unlink()
    with pytest.raises(BundleError, match="is no bundle"):
        bundles.load(str(folder))


def test_changed_weights_are_refused_by_the_self_test_even_if_they_are_signed(folder):
    weights = load_file(folder / "model.safetensors")
    weights["conv1.weight"][0] += 0.05
    save_file(weights, folder / "model.safetensors")
    forge(folder)
    with pytest.raises(BundleError, match="the self-test failed: image 0: a logit moved"):
        bundles.load(str(folder))


def test_another_normalisation_is_refused_by_the_self_test(folder):
    spec = json.loads((folder / "config.json").read_text())["image_spec"]
    forge(folder, image_spec=spec | {"mean": [0.1, 0.1, 0.1]})
    with pytest.raises(BundleError, match="the self-test failed"):
        bundles.load(str(folder))


def test_another_best_class_is_a_difference_and_a_tie_is_none():
    pixels = np.zeros((1, 1, 1, 1), np.uint8)
    saved = SelfTest(pixels, torch.tensor([[1.0, 1.0 - 1e-5, -1.0]]))
    assert saved.difference(torch.tensor([[1.0 - 1e-5, 1.0, -1.0]])) is None
    clear = SelfTest(pixels, torch.tensor([[1.0, 0.0, -1.0]]))
    assert "best class was 0 and is 1" in (clear.difference(torch.tensor([[0.0, 1.0, -1.0]])) or "")
    assert clear.difference(torch.tensor([[1.0 + 1e-3, 0.0, -1.0]])) is None
    assert clear.difference(torch.tensor([[1.0 + 3e-3, 0.0, -1.0]])) is not None
    assert clear.difference(torch.tensor([[float("nan"), 0.0, -1.0]])) is not None


def test_pixels_that_another_decoder_makes_are_a_warning(folder):
    expected = json.loads((folder / "selftest" / "expected.json").read_text())
    expected[0]["pixels_sha256"] = "0" * 64
    (folder / "selftest" / "expected.json").write_text(json.dumps(expected))
    forge(folder)
    with pytest.warns(UserWarning, match="1 of 3 self-test images have other pixels here"):
        bundles.load(str(folder))


def test_a_good_bundle_loads_without_a_warning(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bundles.load(str(folder))


def test_a_save_that_is_cut_short_leaves_no_bundle_and_a_later_one_mends_it(folder, monkeypatch):
    puts: list[str] = []

    def cut(store, path: str, data: bytes) -> None:
        puts.append(path)
        if len(puts) == 3:
            raise StorageError("the cable was pulled")
        Path(store.url, path).write_bytes(data)

    from raycnn.storage.local import LocalStore

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "put", cut)
        with pytest.raises(StorageError, match="cable"):
            save(str(folder), classifier(seed=9))
    with pytest.raises(BundleError, match="incomplete"):
        bundles.load(str(folder))
    save(str(folder), classifier(seed=9))
    bundles.load(str(folder))


def test_a_bundle_of_a_newer_format_asks_for_an_upgrade(folder):
    forge(folder, version=2)
    with pytest.raises(BundleError, match="upgrade raycnn"):
        bundles.load(str(folder))


def test_there_is_no_pickle_in_a_bundle_and_others_find_their_keys(folder):
    assert {p.suffix for p in folder.rglob("*") if p.is_file()} == {".json", ".safetensors", ".md", ".png", ".onnx"}
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "classic"
    assert config["num_classes"] == 3
    assert config["id2label"] == {"0": "cat", "1": "dog", "2": "eel"}
    assert config["label2id"] == {"cat": 0, "dog": 1, "eel": 2}
    assert config["pretrained_cfg"]["input_size"] == [3, 16, 16]
    assert set(load_file(folder / "model.safetensors")) == set(classifier().net.state_dict())


def test_others_run_the_graph_with_onnx_runtime_alone(folder):
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    batch = np.random.default_rng(0).integers(0, 255, (5, 16, 16, 3), np.uint8)
    logits, embeddings = session.run(["logits", "embeddings"], {"pixels": batch})
    with torch.inference_mode():
        expected, inner = classifier().votes_and_embeddings(torch.from_numpy(batch))
    assert torch.allclose(torch.from_numpy(logits), expected, atol=1e-5)
    assert torch.allclose(torch.from_numpy(embeddings), inner, atol=1e-5)
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert session.get_modelmeta().custom_metadata_map == {"raycnn.weights_sha256": weights}


def test_a_bundle_without_a_graph_is_whole(folder):
    with_graph = bundles.load(str(folder))
    (folder / "model.onnx").unlink()
    files = json.loads((folder / "config.json").read_text())["files"]
    del files["model.onnx"]
    forge(folder, files=files)
    loaded = bundles.load(str(folder))
    assert (loaded.graph, loaded.digest) == (None, with_graph.digest)


class Repeated(nn.Module):
    """Works in torch, and becomes a graph for batches of one size."""

    def __init__(self, broadcast: bool):
        super().__init__()
        self.broadcast = broadcast

    def forward(self, x):
        rows = int(x.shape[0])
        x = x.mean(dim=(2, 3)) if self.broadcast else x.mean(dim=(2, 3)).reshape(rows, 3)
        return x + torch.zeros(rows, 1)


@pytest.mark.parametrize(
    ("layer", "told"),
    [
        (nn.Sequential(nn.AdaptiveAvgPool2d(5), nn.Flatten(), nn.Linear(75, 3)), "cannot be exported: .*adaptive_avg"),
        (nn.Sequential(Repeated(broadcast=False), nn.Linear(3, 3)), "onnxruntime cannot run model.onnx"),
        (nn.Sequential(Repeated(broadcast=True), nn.Linear(3, 3)), "made for another size of batch"),
    ],
)
def test_an_architecture_that_cannot_become_a_graph_is_said(layer, told, capfd):
    model = Classifier("classic", layer, ImageSpec(height=16, width=16), 3).eval()
    files, selftest = selftest_files(model, [png(i) for i in range(3)])
    assert "selftest/expected.json" in files
    with pytest.warns(UserWarning, match=told) as caught:
        assert graph_files(model, selftest, "0" * 64) == {}
    assert "CPUs will run it in torch" in str(caught[0].message)
    assert capfd.readouterr() == ("", "")


class Attention(nn.Module):
    """What vision transformers consist of."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 8, stride=8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.conv(x).flatten(2).transpose(1, 2)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(dim=1))


def test_attention_becomes_a_graph():
    model = Classifier("vit_tiny", Attention(), ImageSpec(height=16, width=16), 3).eval().requires_grad_(False)
    _, selftest = selftest_files(model, [png(i) for i in range(3)])
    assert set(graph_files(model, selftest, "0" * 64)) == {"model.onnx"}
    assert torch.backends.mha.get_fastpath_enabled()


def test_names_and_outputs_have_to_agree(tmp_path):
    for names, told in (
        (("a", "b"), "2 class names for a model with 3 outputs"),
        (("a", "b", "a"), "'a' stands twice"),
    ):
        with pytest.raises(BundleError, match=told):
            bundles.save(
                str(tmp_path / "x"),
                classifier(),
                names,
                temperature=1.0,
                metrics={},
                validation={},
                samples=[],
                data_fingerprint=None,
            )
    assert not (tmp_path / "x").exists()


def test_classes_that_the_bundle_does_not_know_are_named(folder):
    bundle = bundles.load(str(folder))
    bundles.check_classes(bundle, ("eel", "cat"))
    with pytest.raises(BundleError, match="does not know the class 'fox', but cat, dog, eel"):
        bundles.check_classes(bundle, ("cat", "fox"))


# -- raycnn import ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """squeezenet1_1 as torchvision saves it, with weights from a seed, and 1,000 classes."""
    file = tmp_path_factory.mktemp("weights") / "squeezenet.pth"
    torch.save(build("squeezenet1_1", 1000, ImageSpec(), seed=0).net.state_dict(), file)
    return file


@pytest.mark.slow
def test_a_torchvision_model_is_imported_with_the_names_of_imagenet(weights, tmp_path):
    report = raycnn.import_model("squeezenet1_1", str(tmp_path / "b"), weights=str(weights))
    loaded = bundles.load(report.bundle)
    assert (len(loaded.class_names), loaded.class_names[0], loaded.class_names[999]) == (1000, "tench", "toilet tissue")
    assert (loaded.spec.height, loaded.spec.crop) == (224, 0.875)
    assert report.parameters == 1_235_496
    assert report.selftest > 0
    assert loaded.graph is not None
    ours = images.pixels(png(0), loaded.spec)
    assert not isinstance(ours, Bad)
    twin = build("squeezenet1_1", 1000, loaded.spec, str(weights)).eval()
    with torch.inference_mode():
        batch = torch.from_numpy(ours)[None]
        assert torch.allclose(loaded.classifier(batch), twin(batch), atol=1e-4)


@pytest.mark.slow
def test_an_import_with_own_names_and_safetensors_and_again_by_the_same_command(tmp_path):
    model = build("classic", 3, ImageSpec(height=32, width=32), seed=1)
    save_file(model.net.state_dict(), tmp_path / "w.safetensors")
    (tmp_path / "names.txt").write_text("cat\ndog\neel\n")
    arguments = {"weights": str(tmp_path / "w.safetensors"), "classes": str(tmp_path / "names.txt"), "image_size": 32}
    first = raycnn.import_model("classic", str(tmp_path / "b"), **arguments)
    assert bundles.load(first.bundle).class_names == NAMES
    assert raycnn.import_model("classic", str(tmp_path / "b"), **arguments) == first
    with pytest.raises(ConfigError, match=r"another config\.json already"):
        raycnn.import_model("classic", str(tmp_path / "b"), **arguments | {"image_size": 40})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "names", "told"),
    [
        ("classic", "cat\ndog\n", "a head for 3 classes, but 2 are named"),
        ("resnet18", "cat\ndog\neel\n", "does not fit resnet18"),
        ("classic", "cat\ncat\neel\n", "'cat' stands twice"),
    ],
)
def test_an_import_that_does_not_fit_is_refused_and_writes_nothing(model, names, told, tmp_path):
    save_file(build("classic", 3, ImageSpec(height=32, width=32), seed=1).net.state_dict(), tmp_path / "w.safetensors")
    (tmp_path / "names.txt").write_text(names)
    with pytest.raises(BundleError, match=told):
        raycnn.import_model(
            model,
            str(tmp_path / "b"),
            weights=str(tmp_path / "w.safetensors"),
            classes=str(tmp_path / "names.txt"),
            image_size=32,
        )
    assert not (tmp_path / "b").exists()


def test_a_copied_bundle_is_the_same_bundle(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    assert bundles.load(str(tmp_path / "copy")).digest == bundles.load(str(folder)).digest
    assert open_store(str(tmp_path / "copy")).head("config.json") is not None
