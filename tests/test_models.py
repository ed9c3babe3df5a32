import contextlib
import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from raycnn import models
from raycnn.config import ImageSpec
from raycnn.errors import BundleError, ConfigError, StorageError

SMALLEST = {
    "alexnet": 64,
    "convnext_tiny": 32,
    "densenet121": 32,
    "efficientnet_b0": 32,
    "googlenet": 32,
    "inception_v3": 96,
    "maxvit_t": 224,
    "mnasnet0_5": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "regnet_y_400mf": 32,
    "resnet18": 32,
    "shufflenet_v2_x0_5": 32,
    "squeezenet1_1": 32,
    "swin_t": 32,
    "swin_v2_t": 64,
    "vgg11": 32,
    "vit_b_32": 64,
}
"""One of each family, with a size in px that it takes."""


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors lose more to waiting for a second thread than they win."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def spec(height=28, width=28, channels=1) -> ImageSpec:
    return ImageSpec(height=height, width=width, channels=channels, mean=(0.5,) * channels, std=(0.25,) * channels)


def noise(spec: ImageSpec, n=2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (n, spec.height, spec.width, spec.channels)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def test_classic_is_the_chain_of_three_convolutions_two_poolings_and_one_fully_connected_layer():
    chain = [type(layer) for layer in models.build("classic", 10, spec()).net.children()]
    expected = [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.ReLU, nn.Conv2d, nn.ReLU, nn.MaxPool2d]
    assert chain == [*expected, nn.Flatten, nn.Linear]


@pytest.mark.parametrize(
    ("height", "width", "channels", "classes"),
    [
        (1, 1, 1, 2),
        (8, 8, 1, 10),
        (28, 28, 1, 10),
        (31, 47, 3, 5),
        (64, 64, 3, 7),
        (100, 20, 3, 2),
        (224, 224, 3, 1000),
    ],
)
def test_classic_takes_any_size_and_stays_small(height, width, channels, classes):
    shape = spec(height, width, channels)
    classifier = models.build("classic", classes, shape, seed=0)
    assert classifier(noise(shape)).shape == (2, classes)
    assert models.count_parameters(classifier) < 30_000 + 64 * 64 * classes + classes


def test_classic_has_fewer_than_100_000_parameters_on_fashion_mnist():
    assert models.count_parameters(models.build("classic", 10, spec())) == 54_666


@pytest.mark.parametrize(("side", "channels"), [(8, 1), (28, 1), (28, 3), (96, 3), (224, 3)])
def test_residual_takes_any_size_and_each_pair_adds_to_what_it_is_given(side, channels):
    classifier = models.build("residual", 7, spec(side, side, channels), seed=0).eval()
    maps = models.feature_maps(classifier, noise(classifier.spec, 2))
    assert list(maps) == ["conv1", "conv2", "pair1", "conv3", "pair2", "pair3", "mean", "flatten", "fc"]
    assert maps["fc"].shape == (2, 7)
    assert maps["pair3"].shape[2:] == maps["conv3"].shape[2:]
    for given, pair in (("conv2", "pair1"), ("conv3", "pair2"), ("pair2", "pair3")):
        assert (maps[pair] >= maps[given]).all(), "a ReLU comes before the sum"
        assert (maps[pair] > maps[given]).any()


def test_residual_is_as_small_as_its_description_says():
    assert models.count_parameters(models.build("residual", 10, spec())) == 424_026


@pytest.mark.slow
def test_classic_reads_handwritten_digits():
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(1))
    pixels = torch.from_numpy((digits.images / 16 * 255).astype(np.uint8))[order, :, :, None]
    labels = torch.from_numpy(digits.target)[order].long()
    classifier = models.build("classic", 10, spec(8, 8), seed=0)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=5 * 23)
    for start in [*range(0, 1437, 64)] * 5:
        optimizer.zero_grad()
        rows = slice(start, min(start + 64, 1437))
        nn.functional.cross_entropy(classifier(pixels[rows]), labels[rows]).backward()
        optimizer.step()
        schedule.step()
    right = classifier.eval()(pixels[1437:]).argmax(dim=1) == labels[1437:]
    assert right.float().mean() > 0.95


def test_pixels_are_normalised_inside_the_model():
    shape = ImageSpec(height=9, width=12, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    classifier, pixels = models.build("classic", 4, shape).eval(), noise(shape)
    by_hand = (pixels.numpy() / 255 - np.array(shape.mean)) / np.array(shape.std)
    nchw = torch.from_numpy(by_hand.transpose(0, 3, 1, 2).astype(np.float32))
    torch.testing.assert_close(classifier(pixels), classifier.net(nchw))


def test_mean_and_std_are_not_among_the_weights():
    assert not {"mean", "std"} & {key.rpartition(".")[2] for key in models.build("classic", 4, spec()).state_dict()}


@pytest.mark.slow
def test_embeddings_of_a_convolutional_head_are_means_of_its_maps():
    shape = spec(32, 32, 3)
    classifier, maps = models.build("squeezenet1_1", 3, shape, seed=0).eval(), []
    classifier.net.features.register_forward_hook(lambda _module, _inputs, output: maps.append(output))
    with torch.inference_mode():
        votes, embeddings = classifier.votes_and_embeddings(noise(shape))
        torch.testing.assert_close(embeddings, maps[0].mean(dim=(2, 3)))
        torch.testing.assert_close(votes, classifier(noise(shape)))


@pytest.mark.slow
def test_every_torchvision_classification_model_gets_a_head_for_the_class_count():
    names = models.architectures()
    assert {"classic", "resnet18", "resnet152", "mobilenet_v3_small", "convnext_tiny"} <= set(names)
    assert len(names) > 75
    for name in names:
        # Without memory, where the architecture can be built so.
        with contextlib.nullcontext() if name.startswith("regnet") else torch.device("meta"):
            classifier = models.blank(name, 7, spec(224, 224, 3))
        outputs = [m.weight.shape[0] for m in classifier.net.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        assert outputs[-1] == 7, name


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_every_family_runs_on_grayscale(name):
    shape = spec(SMALLEST[name], SMALLEST[name])
    classifier = models.blank(name, 7, shape).eval()
    with torch.inference_mode():
        for parameter in classifier.parameters():
            parameter.zero_()
        votes, embeddings = classifier.votes_and_embeddings(noise(shape))
    assert votes.shape == (2, 7)
    assert embeddings.shape == (2, classifier.embedding_size)
    assert models.first_filters(classifier).shape[1] == 1


def test_a_seed_decides_the_weights_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (models.build("classic", 3, spec(), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.net[0].weight, same.net[0].weight)
    assert not torch.equal(one.net[0].weight, other.net[0].weight)


@pytest.mark.parametrize(
    ("name", "told"),
    [("resnet-18", "'resnet18'"), ("clasic", "'classic'"), ("resnet_200x", "unknown architecture"), ("", "unknown")],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(name, told):
    with pytest.raises(ConfigError, match=told):
        models.build(name, 3, spec())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("alexnet", 32), ("maxvit_t", 100), ("vit_b_32", 60)])
def test_an_image_size_that_an_architecture_cannot_take_is_said_before_training(name, size):
    with pytest.raises(ConfigError, match=f"{name} cannot take images of {size} x {size} px") as caught:
        models.build(name, 3, spec(size, size, 3))
    assert "\n" not in str(caught.value)


def test_timm_models_are_built_by_name_or_the_extra_is_named():
    if not _has_timm():
        with pytest.raises(ConfigError, match=re.escape("pip install 'raycnn[timm]'")):
            models.build("timm/resnet18", 3, spec())
        return
    classifier = models.build("timm/vit_tiny_patch16_224", 3, spec(64, 64))
    assert classifier.eval()(noise(classifier.spec)).shape == (2, 3)
    with pytest.raises(ConfigError, match="'resnet18'"):
        models.build("timm/resnet18x", 3, spec())


def _has_timm() -> bool:
    try:
        import timm  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    return True


def save_as(path: Path, state) -> str:
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return str(path)


@pytest.mark.parametrize("leaf", ["w.safetensors", "w.pth"])
def test_weights_from_a_file_are_copied_and_a_head_for_other_classes_starts_fresh(tmp_path, leaf):
    trained = models.build("classic", 10, spec(), seed=1)
    file = save_as(tmp_path / leaf, trained.net.state_dict())
    same = models.build("classic", 10, spec(), file, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(same.net.parameters(), trained.net.parameters(), strict=True))
    other = models.build("classic", 3, spec(), file, seed=2)
    assert torch.equal(other.net.conv3.weight, trained.net.conv3.weight)
    assert torch.equal(other.net.fc.weight, models.build("classic", 3, spec(), seed=2).net.fc.weight)


def test_weights_over_rgb_are_summed_for_grayscale(tmp_path):
    rgb = models.build("squeezenet1_1", 5, spec(32, 32, 3), seed=1).eval()
    file = save_as(tmp_path / "rgb.safetensors", rgb.net.state_dict())
    gray = models.build("squeezenet1_1", 5, spec(32, 32), file).eval()
    pixels = noise(spec(32, 32))
    torch.testing.assert_close(gray(pixels), rgb(pixels.expand(-1, -1, -1, 3)))


def test_a_training_checkpoint_of_a_wrapped_model_is_understood(tmp_path):
    trained = models.build("classic", 3, spec(), seed=1)
    wrapped = {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in trained.net.state_dict().items()}}
    loaded = models.build("classic", 3, spec(), save_as(tmp_path / "checkpoint.pt", wrapped))
    assert torch.equal(loaded.net.fc.weight, trained.net.fc.weight)


@pytest.mark.slow
def test_keys_of_published_densenet_and_googlenet_files_are_understood():
    dense = models.build("densenet121", 3, spec(32, 32, 3))
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", k): v for k, v in dense.net.state_dict().items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    models.fill(dense, old, "published")
    google = models.build("googlenet", 3, spec(32, 32, 3))
    models.fill(google, google.net.state_dict() | {"aux1.fc1.weight": torch.zeros(1)}, "published")


def test_weights_that_do_not_fit_are_refused_with_the_first_difference():
    classifier = models.build("classic", 3, spec())
    state = classifier.net.state_dict()
    with pytest.raises(BundleError, match=r"lacks conv2\.weight$"):
        models.fill(classifier, {k: v for k, v in state.items() if k != "conv2.weight"}, "w")
    with pytest.raises(BundleError, match=r"unexpected extra$"):
        models.fill(classifier, state | {"extra": torch.zeros(1)}, "w")
    with pytest.raises(BundleError, match=r"conv2.weight is \(2, 2\), expected \(32, 16, 3, 3\)"):
        models.fill(classifier, state | {"conv2.weight": torch.zeros(2, 2)}, "w")
    with pytest.raises(BundleError, match="a head for 5 classes, but 3 are named"):
        models.fill(classifier, state | {"fc.weight": torch.zeros(5, 9), "fc.bias": torch.zeros(5)}, "w")


def test_weights_that_are_no_finite_real_numbers_are_refused():
    classifier = models.build("classic", 3, spec())
    state = classifier.net.state_dict()
    for value in (float("nan"), float("inf")):
        with pytest.raises(BundleError, match=r"^w: conv2\.bias holds NaN or infinity; "):
            models.fill(classifier, state | {"conv2.bias": torch.full((32,), value)}, "w")
    with pytest.raises(BundleError, match=r"conv2\.bias holds complex numbers$"):
        models.fill(classifier, state | {"conv2.bias": torch.zeros(32, dtype=torch.complex64)}, "w")
    with pytest.raises(BundleError, match=r"fc\.weight is \(\), expected"):
        models.fill(classifier, state | {"fc.weight": torch.tensor(1.0)}, "w")


def test_a_type_of_weights_that_torch_does_not_have_is_one_clear_line(tmp_path):
    header = json.dumps({"conv1.weight": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(BundleError, match=r"w\.safetensors has weights of type F8_E8M0; save them as F32$"):
        models.build("classic", 3, spec(), str(tmp_path / "w.safetensors"))


class Code:
    """Would run code when unpickled."""

    def __reduce__(self):
        return print, ("unpickled",)


@pytest.mark.parametrize("leaf", ["w.safetensors", "w.pth"])
def test_a_weights_file_that_is_something_else_is_one_clear_line(tmp_path, leaf):
    file = tmp_path / leaf
    for content in (b"", b"not weights", b"\x80\x02junk", b"PK\x03\x04zip"):
        file.write_bytes(content)
        with pytest.raises(BundleError, match=leaf) as caught:
            models.build("classic", 3, spec(), str(file))
        assert "\n" not in str(caught.value)


def test_a_pickle_with_code_in_it_is_refused(tmp_path, capsys):
    torch.save({"conv1.weight": Code()}, tmp_path / "w.pth")
    with pytest.raises(BundleError, match="weights_only"):
        models.build("classic", 3, spec(), str(tmp_path / "w.pth"))
    assert "unpickled" not in capsys.readouterr().out


def test_a_missing_weights_file_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match=r"none\.safetensors"):
        models.build("classic", 3, spec(), str(tmp_path / "none.safetensors"))


def test_published_weights_that_cannot_be_downloaded_name_their_source_and_the_way_round(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for variable in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"https://\S+/squeezenet1_1-\w+\.pth: .* give its path") as caught:
        models.build("squeezenet1_1", 3, spec(32, 32, 3), "DEFAULT")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_an_unknown_published_name_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match="IMAGENET1K_V2"):
        models.build("resnet50", 3, spec(32, 32, 3), "IMAGENET1K_V3")
    with pytest.raises(ConfigError, match="classic"):
        models.build("classic", 3, spec(), "DEFAULT")
    with pytest.raises(ConfigError, match="nobody publishes DEFAULT for residual"):
        models.build("residual", 3, spec(), "DEFAULT")


def test_what_torchvision_publishes_comes_with_its_image_spec():
    v2, v1 = models.published("resnet50")
    assert (v2.name, v2.spec.crop, v1.name, v1.spec.crop) == ("IMAGENET1K_V2", 224 / 232, "IMAGENET1K_V1", 0.875)
    assert len(set(v1.class_names)) == 1000
    assert models.published("efficientnet_b4")[0].spec.height == 380
    assert models.published("inception_v3")[0].spec.mean == (0.5, 0.5, 0.5)


def test_feature_maps_of_classic_show_every_layer_up_to_the_votes():
    shape = spec(28, 28)
    classifier, pixels = models.build("classic", 10, shape).eval(), noise(shape, 1)
    maps = models.feature_maps(classifier, pixels)
    assert list(maps) == [name for name, _ in classifier.net.named_children()]
    assert maps["conv1"].min() < 0 <= maps["relu1"].min()
    assert maps["pool2"].shape == (1, 64, 7, 7)
    torch.testing.assert_close(maps["fc"], classifier(pixels))
    assert models.first_filters(classifier).shape == (16, 1, 3, 3)


def test_feature_maps_of_other_models_show_the_first_convolution():
    shape = spec(32, 32, 3)
    maps = models.feature_maps(models.blank("squeezenet1_1", 3, shape).eval(), noise(shape, 1))
    assert {key: tuple(value.shape) for key, value in maps.items()} == {"features.0": (1, 64, 15, 15)}


@pytest.mark.parametrize(("name", "takes"), [("resnet18", True), ("classic", False), ("vit_b_32", False)])
def test_whether_a_model_takes_images_of_another_size_is_known(name, takes):
    assert models.takes_size(name, ImageSpec(), 160) == takes
