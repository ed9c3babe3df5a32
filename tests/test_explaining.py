"""The pictures of what a network has learned, read back pixel by pixel."""

import io
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from raycnn import bundle as bundles
from raycnn.bundle import Bundle
from raycnn.config import ImageSpec
from raycnn.drawing.canvas import FRAME, NEGATIVE, POSITIVE
from raycnn.errors import DataError
from raycnn.explaining import SHARE, TROUGH, feature_maps_picture, filters_picture
from raycnn.models import build, feature_maps, first_filters

GRAY = ImageSpec(height=12, width=12, channels=1, crop=1.0, mean=(0.45,), std=(0.22,))
RGB = ImageSpec(height=64, width=48, channels=3, crop=1.0)

CHAIN = ["conv1", "relu1", "conv2", "relu2", "pool1", "relu3", "conv3", "relu4", "pool2", "flatten", "fc"]
"""The layers of design 2."""

Pixels = npt.NDArray[np.int64]


def decoded(png: bytes) -> Pixels:
    image = Image.open(io.BytesIO(png))
    assert (image.format, image.mode, image.width) == ("PNG", "RGB", 1600)
    return np.asarray(image).astype(np.int64)


class Tile(NamedTuple):
    """A framed part of the picture."""

    y: int
    x: int
    pixels: Pixels


def tiles(picture: Pixels) -> list[Tile]:
    """Every framed rectangle, in the order of reading."""
    frame = np.pad((picture == FRAME).all(axis=2), 1)
    corners = frame & ~np.roll(frame, 1, 0) & ~np.roll(frame, 1, 1) & np.roll(frame, -1, 0) & np.roll(frame, -1, 1)
    found = []
    for y, x in zip(*np.nonzero(corners), strict=True):
        width = int(np.argmin(frame[y, x:]))
        height = int(np.argmin(frame[y:, x]))
        if min(width, height) > 8 and frame[y + height - 1, x : x + width].all() and frame[y : y + height, x].all():
            found.append(Tile(int(y), int(x), picture[y : y + height - 2, x : x + width - 2]))
    return found


def cells(tile: Tile, height: int, width: int) -> Pixels:
    """The colour in the middle of each of the tile's enlarged pixels."""
    rows = ((np.arange(height) + 0.5) * tile.pixels.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * tile.pixels.shape[1] / width).astype(int)
    return tile.pixels[rows][:, columns]


def shows(colours: Pixels, values: npt.NDArray[np.floating]) -> bool:
    """Blue where a value is negative, red where it is positive, the darker the further it is from zero."""
    redness, light = (colours[..., 0] - colours[..., 2]).ravel(), colours.sum(axis=-1).ravel()
    flat = values.ravel()
    for side in (flat > 0, flat < 0):
        in_order = light[side][np.argsort(np.abs(flat[side]))]
        if (np.diff(in_order) > 0).any():
            return False
    strong = np.abs(flat) > 0.05 * np.abs(flat).max()
    return bool((np.sign(redness[strong]) == np.sign(flat[strong])).all())


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def photo(spec: ImageSpec) -> bytes:
    shape = (spec.height, spec.width) if spec.channels == 1 else (spec.height, spec.width, 3)
    return png(np.random.default_rng(0).integers(0, 256, shape, np.uint8))


PHOTO = np.array(Image.open(io.BytesIO(photo(GRAY))))


def saved(folder: str, names: tuple[str, ...], spec: ImageSpec, model: str = "classic") -> Bundle:
    classifier = build(model, len(names), spec, seed=3).eval()
    about = {"temperature": 2.0, "metrics": {}, "validation": {"rows": 0}, "data_fingerprint": None}
    return bundles.save(folder, classifier, names, samples=[], **about)


@pytest.fixture(scope="module")
def gray(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return saved(str(tmp_path_factory.mktemp("gray")), ("ant", "bee", "cat", "dog"), GRAY)


@pytest.fixture(scope="module")
def walk(gray: Bundle) -> Pixels:
    """The picture of one gray image's way through `classic`."""
    return decoded(feature_maps_picture(gray, photo(GRAY), "cat"))


@pytest.mark.slow
def test_every_learned_kernel_is_shown_once_in_order_and_true_to_its_numbers(gray: Bundle):
    kernels = first_filters(gray.classifier).numpy()
    _, *shown = tiles(decoded(filters_picture(gray)))  # the first is the colour scale
    assert len(shown) == len(kernels) == 16
    for kernel, tile in zip(kernels, shown, strict=True):
        assert shows(cells(tile, 3, 3), kernel[0])
    colours = np.stack([cells(tile, 3, 3) for tile in shown])
    assert shows(colours, kernels[:, 0])  # one scale for all of them
    assert not shows(colours[::-1], kernels[:, 0])


@pytest.mark.slow
def test_kernels_that_look_at_colours_are_shown_in_their_colours(tmp_path):
    bundle = saved(str(tmp_path), ("ant", "bee"), RGB)
    kernels = first_filters(bundle.classifier).numpy()
    shown = tiles(decoded(filters_picture(bundle)))
    assert len(shown) == len(kernels)
    for kernel, tile in zip(kernels, shown, strict=True):
        away_from_gray = cells(tile, 3, 3) - 127.5
        strong = np.abs(kernel.transpose(1, 2, 0)) > 0.02 * np.abs(kernels).max()
        assert (np.sign(away_from_gray) == np.sign(kernel.transpose(1, 2, 0)))[strong].all()


@pytest.mark.slow
def test_the_way_through_classic_shows_the_maps_of_every_layer(gray: Bundle, walk: Pixels):
    maps = feature_maps(gray.classifier, torch.from_numpy(PHOTO)[None, ..., None])
    assert list(maps) == CHAIN
    _, seen, *rest = tiles(walk)
    assert (cells(seen, 12, 12)[..., 0] == PHOTO).all()
    for name in CHAIN[:-2]:
        values = maps[name][0].numpy()
        count, height, width = values.shape
        drawn, rest = rest[:count], rest[count:]
        assert len(drawn) == count, name
        assert shows(np.stack([cells(tile, height, width) for tile in drawn]), values), name
    (vector,) = rest
    assert shows(cells(vector, 1, maps["flatten"].shape[1]), maps["flatten"].numpy())


def test_after_a_relu_no_blue_is_left(gray: Bundle, walk: Pixels):
    _, _, *rest = tiles(walk)
    places = dict(
        zip(CHAIN, np.split(np.arange(len(rest)), np.cumsum([16, 16, 32, 32, 32, 32, 64, 64, 64])), strict=False)
    )
    blue = {
        name: any((rest[i].pixels[..., 2] > rest[i].pixels[..., 0]).any() for i in where)
        for name, where in places.items()
    }
    assert [name for name, is_blue in blue.items() if is_blue] == ["conv1", "conv2", "conv3"]


def runs(picture: Pixels, colour: tuple[int, int, int]) -> list[int]:
    """The lengths of the bars of one colour, from the top."""
    mask = (picture == colour).all(axis=2)
    lengths = [int(np.diff(np.flatnonzero(np.diff(np.pad(row.astype(int), 1))))[::2].max(initial=0)) for row in mask]
    return [n for n, before in zip(lengths, [0, *lengths], strict=False) if n > 2 and before <= 2]


def test_the_votes_are_bars_and_so_are_the_probabilities_that_softmax_makes_of_them(gray: Bundle, walk: Pixels):
    pixels = torch.from_numpy(PHOTO)[None, ..., None]
    with torch.inference_mode():
        votes = gray.classifier(pixels)[0].sort(descending=True).values
    probabilities = torch.softmax(votes / 2.0, 0)  # the bundle's temperature
    below = walk[tiles(walk)[-1].y + 70 :]
    up, down = ([abs(float(v)) for v in votes if bool(v > 0) == wanted] for wanted in (True, False))
    scale = 400 / float(votes.max().clamp(min=0) - votes.min().clamp(max=0))
    assert runs(below, POSITIVE) == pytest.approx([v * scale for v in up], abs=2)
    assert runs(below, NEGATIVE) == pytest.approx([v * scale for v in down], abs=2)
    assert runs(below, SHARE) == pytest.approx([float(p) * 340 for p in probabilities], abs=2)
    assert runs(below, TROUGH) == pytest.approx([340 - float(p) * 340 for p in probabilities], abs=2)


@pytest.mark.slow
def test_a_torchvision_model_shows_its_first_layer_and_the_best_of_many_classes(tmp_path):
    names = tuple(f"a class with a rather long name, number {i}" for i in range(30))
    bundle = saved(str(tmp_path), names, RGB, "squeezenet1_0")
    assert len(first_filters(bundle.classifier)) == 96
    assert len(tiles(decoded(filters_picture(bundle)))) == 64
    picture = decoded(feature_maps_picture(bundle, photo(RGB)))
    _, seen, *maps = tiles(picture)
    assert seen.pixels.shape[:2] == (176, 132)
    assert len(maps) == 64
    assert len(runs(picture[maps[-1].y + 70 :], SHARE)) == 10


@pytest.mark.slow
def test_a_long_truth_does_not_run_into_the_scale(gray: Bundle):
    short, long = (decoded(feature_maps_picture(gray, photo(GRAY), truth)) for truth in ("x", "x" * 300))
    left = tiles(short)[0].x - 10
    assert (short[:140, left:] == long[:140, left:]).all()
    assert (short[:140] != long[:140]).any()


@pytest.mark.slow
def test_names_with_accents_are_written_in_letters(gray: Bundle):
    boxes = "\U0010fffe"
    written, boxed = (decoded(feature_maps_picture(gray, photo(GRAY), truth)) for truth in ("ÄŁé", 3 * boxes))
    ink = [np.flatnonzero((picture[100:140, :1200] != 255).any(axis=(0, 2))).max() for picture in (written, boxed)]
    assert ink[0] != ink[1]


def test_an_image_that_cannot_be_read_is_told(gray: Bundle):
    with pytest.raises(DataError, match="the image to explain is unsupported"):
        feature_maps_picture(gray, b"no image at all")
