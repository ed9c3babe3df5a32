"""What training images go through, against torchvision, the pixels of evaluation and plain arithmetic."""

import io
import math
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from raycnn import augment as augmentation
from raycnn import images
from raycnn.augment import augment, mixed, uniform
from raycnn.config import ImageSpec, TrainConfig

GEOMETRY = {"crop_scale": 0.35, "flip": True, "shift": 2}
SETTINGS: list[dict] = [
    {"flip": True},
    {"shift": 3},
    {"erase": 0.6},
    {"augment": "trivial"},
    {"augment": "rand"},
    GEOMETRY | {"augment": "trivial", "erase": 0.4},
    GEOMETRY | {"augment": "rand", "erase": 0.4},
]


def configured(**settings) -> TrainConfig:
    return TrainConfig.model_validate({"data": "data", "run": "run", "crop_scale": 1} | settings)


def photos(count: int, height: int, width: int, channels: int, seed: int = 0) -> Tensor:
    """Smooth with some noise, no two alike."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.uniform(-40, 295, (count, channels, 4, 5))).float()
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    noisy = smooth.numpy() + rng.normal(0, 4, (count, channels, height, width))
    return torch.from_numpy(noisy.clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1).copy())


def keys_for(count: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(-(2**63), 2**63, count))


def off_by(a: Tensor, b: Tensor) -> int:
    return int((a.int() - b.int()).abs().max())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("settings", SETTINGS)
def test_an_image_is_augmented_alike_in_any_batch(settings, channels):
    frames, keys, config = photos(24, 24, 30, channels), keys_for(24), configured(**settings)
    sizes = torch.tensor([[24 - i % 5, 30 - i % 7] for i in range(24)])
    state = torch.get_rng_state()
    for given in (None, sizes):
        size = (24, 30) if given is None else (20, 20)
        whole = augment(frames, keys, 3, config, size, given)
        assert whole.dtype == torch.uint8
        assert whole.shape == (24, *size, channels)
        order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
        for rows in (order, *order.split([1, 16, 7])):
            part = frames[rows]
            if given is not None:  # a batch's frame is only as large as its largest image
                high, wide = sizes[rows].amax(0).tolist()
                part = part[:, :high, :wide]
            of_rows = augment(part, keys[rows], 3, config, size, None if given is None else given[rows])
            assert torch.equal(of_rows, whole[rows])
        none = augment(frames[:0], keys[:0], 3, config, size, None if given is None else given[:0])
        assert none.shape == (0, *size, channels)
        assert none.dtype == torch.uint8
    assert torch.equal(torch.get_rng_state(), state)


def test_a_small_image_is_augmented_alike_beside_large_ones():
    """CPUs resize small boxes and large ones differently."""
    frames, keys, config = photos(24, 60, 90, 3), keys_for(24), configured(**GEOMETRY)
    sizes = torch.tensor([[37 + i, 50 if i % 2 else 60 + i] for i in range(24)])
    whole = augment(frames, keys, 0, config, (32, 32), sizes)
    for rows in torch.arange(24).split([5, 6, 13]):
        high, wide = sizes[rows].amax(0).tolist()
        part = augment(frames[rows, :high, :wide], keys[rows], 0, config, (32, 32), sizes[rows])
        assert torch.equal(part, whole[rows])


@pytest.mark.parametrize("settings", SETTINGS)
def test_seed_epoch_and_key_each_change_what_is_drawn(settings):
    frames, sizes = photos(1, 20, 20, 3).expand(40, -1, -1, -1), torch.full((40, 2), 20)
    keys = keys_for(40)
    made = [
        augment(frames, keys, 0, configured(**settings), (20, 20), sizes),
        augment(frames, keys, 1, configured(**settings), (20, 20), sizes),
        augment(frames, keys, 0, configured(**settings, seed=1), (20, 20), sizes),
        augment(frames, keys_for(40, seed=1), 0, configured(**settings), (20, 20), sizes),
    ]
    assert not any(torch.equal(a, b) for i, a in enumerate(made) for b in made[:i])


def test_without_settings_pixels_are_returned_as_they_are():
    pixels = photos(3, 8, 8, 1)
    assert augment(pixels, keys_for(3), 0, configured(), (8, 8)) is pixels


def test_random_numbers_are_those_of_splitmix64():
    def scrambled(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    keys = [0, 1, -1, 2**63 - 1, -(2**63), 1234567890123456789]
    drawn = uniform(torch.tensor(keys), 5, 7, 3, "box")
    start = 0xB42A3ABD8EB7531C  # must never change: runs that are resumed would go on with other draws
    for key, row in zip(keys, drawn.tolist(), strict=True):
        state = scrambled(key % 2**64 ^ start)
        expected = [scrambled((state + (i + 1) * 0x9E3779B97F4A7C15) % 2**64) >> 11 for i in range(5)]
        assert [int(value * 2**53) for value in row] == expected


def test_random_numbers_are_even_and_of_each_other_independent():
    keys = torch.arange(20_000)  # neighbours differ in few bits
    drawn = torch.cat([uniform(keys, 2, seed, epoch, name) for seed, epoch, name in product((0, 1), (0, 1), "ab")], 1)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = torch.stack([torch.histc(column, 20, 0, 1) for column in drawn.T])
    assert ((counts - 1000) ** 2 / 1000).sum(1).max() < 45  # chi-square, 19 degrees of freedom
    series = torch.cat((drawn[:-1], drawn[1:]), 1).T  # with those of the neighbouring key
    assert (torch.corrcoef(series) - torch.eye(len(series))).abs().max() < 0.035  # 5 standard deviations


def test_every_second_image_is_mirrored():
    pixels = photos(400, 6, 7, 3)
    made = augment(pixels, keys_for(400), 0, configured(flip=True), (6, 7))
    mirrored = (made == pixels.flip(2)).flatten(1).all(1)
    assert torch.equal(made[~mirrored], pixels[~mirrored])
    assert 160 < mirrored.sum() < 240


@pytest.mark.parametrize(("shift", "flip", "channels"), [(2, False, 3), (1, True, 1)])
def test_images_move_by_whole_px_over_the_whole_range_onto_black(shift, flip, channels):
    pixels = photos(1, 9, 7, channels).clamp(min=1).expand(600, -1, -1, -1)
    made = augment(pixels, keys_for(600), 0, configured(shift=shift, flip=flip), (9, 7))
    seen = {}
    for mirrored, down, right in product([False, True][: flip + 1], *[range(-shift, shift + 1)] * 2):
        image = pixels[0].flip(1) if mirrored else pixels[0]
        expected = torch.zeros_like(image)
        rows, columns = slice(max(0, down), 9 + min(0, down)), slice(max(0, right), 7 + min(0, right))
        from_rows, from_columns = slice(max(0, -down), 9 + min(0, -down)), slice(max(0, -right), 7 + min(0, -right))
        expected[rows, columns] = image[from_rows, from_columns]
        seen[mirrored, down, right] = int((made == expected).flatten(1).all(1).sum())
    assert sum(seen.values()) == 600
    assert min(seen.values()) > 5


def test_a_shift_larger_than_the_image_leaves_black():
    made = augment(photos(50, 4, 4, 1), keys_for(50), 0, configured(shift=4096), (4, 4))
    assert made.shape == (50, 4, 4, 1)


def encoded(pixels: Tensor) -> bytes:
    sink = io.BytesIO()
    array = pixels.numpy()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(sink, "PNG")
    return sink.getvalue()


@pytest.mark.parametrize("small", [0, 4096], ids=["one by one", "all at once"])
@pytest.mark.parametrize("channels", [1, 3])
def test_without_random_boxes_a_whole_image_becomes_what_evaluation_sees(small, channels, monkeypatch):
    monkeypatch.setattr(augmentation, "SMALL", small)
    spec = ImageSpec(height=32, width=40, channels=channels, crop=0.875, mean=(0.5,) * channels, std=(0.5,) * channels)
    frames = torch.full((6, 90, 120, channels), 255, dtype=torch.uint8)  # what lies beside an image must not matter
    sizes = torch.tensor([[90, 120], [37, 46], [32, 40], [90, 41], [20, 30], [1, 1]], dtype=torch.int32)
    for i, (height, width) in enumerate(sizes.tolist()):
        frames[i, :height, :width] = photos(1, height, width, channels, seed=i)[0]
    made = augment(frames, keys_for(6), 0, configured(), (32, 40), sizes, crop=0.875)
    for i, (height, width) in enumerate(sizes.tolist()):
        seen = images.pixels(encoded(frames[i, :height, :width]), spec)
        assert isinstance(seen, np.ndarray)
        assert off_by(made[i], torch.from_numpy(seen)) <= 1


def test_images_that_grow_in_training_are_shrunk_as_a_whole():
    spec = ImageSpec(height=12, width=20, crop=1.0)
    pixels = photos(3, 48, 80, 3)
    made = augment(pixels, keys_for(3), 0, configured(), (12, 20))
    for row, image in zip(made, pixels, strict=True):
        seen = images.pixels(encoded(image), spec)
        assert isinstance(seen, np.ndarray)
        assert off_by(row, torch.from_numpy(seen)) <= 1


@pytest.mark.parametrize("small", [0, 4096], ids=["one by one", "all at once"])
@pytest.mark.parametrize(("height", "width", "size"), [(60, 80, (32, 32)), (24, 80, (24, 24)), (60, 60, (20, 40))])
def test_random_boxes_are_spread_like_those_of_decoding(height, width, size, small, monkeypatch):
    monkeypatch.setattr(augmentation, "SMALL", small)
    count, spec = 1000, ImageSpec(height=size[0], width=size[1])
    ramp = torch.stack(torch.meshgrid(torch.arange(height) * 3, torch.arange(width) * 3, indexing="ij"), 2)
    frames = torch.cat((ramp, ramp[..., :1]), 2).to(torch.uint8).expand(count, -1, -1, -1)
    sizes = torch.tensor([[height, width]]).expand(count, -1)
    made = augment(frames, keys_for(count), 0, configured(crop_scale=0.35), size, sizes).double() / 3
    y, x = made[:, :, 2, 0], made[:, 2, :, 1]  # a ramp tells the places that its px come from
    extents = [(line[:, -4] - line[:, 3]) / (line.shape[1] - 7) * line.shape[1] for line in (y, x)]
    centers = [(line[:, -4] + line[:, 3] + 1) / 2 for line in (y, x)]
    choose = images.random_box(spec, np.random.default_rng(0))
    boxes = torch.tensor([choose(height, width) for _ in range(count)]).double()
    expected = [boxes[:, 2], boxes[:, 3], boxes[:, 0] + boxes[:, 2] / 2, boxes[:, 1] + boxes[:, 3] / 2]
    for ours, theirs in zip([*extents, *centers], expected, strict=True):
        spread = float(theirs.std())
        assert abs(ours.mean() - theirs.mean()) < 5 * spread * math.sqrt(2 / count) + 0.1
        assert abs(ours.std() - spread) < 0.15 * spread + 0.1
    ours, theirs = (torch.corrcoef(torch.stack(sides))[0, 1] for sides in (extents, expected[:2]))
    assert abs(ours - theirs) < 0.1


def test_erased_rectangles_have_the_mean_colour_and_the_stated_share():
    pixels = photos(1, 30, 40, 3).expand(1000, -1, -1, -1)
    made = augment(pixels, keys_for(1000), 0, configured(erase=0.25), (30, 40))
    changed = (made != pixels).any(3)
    erased = changed.flatten(1).any(1)
    assert 200 < erased.sum() < 300
    mean = pixels[0].double().mean((0, 1)).floor().to(torch.uint8)
    areas = []
    for image, inside in zip(made[erased], changed[erased], strict=True):
        rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
        rectangle = image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert (rectangle == mean).all()
        areas.append(rectangle[..., 0].numel() / 1200)
    assert 0.01 < min(areas) < 0.05
    assert 0.3 < max(areas) < 0.35


def shown(image: Tensor, name: str, strength: float, is_rand: bool) -> Tensor:
    """An operation by torchvision, at a strength in -1..1: (C, H, W)."""
    height, width = image.shape[1:]
    bilinear = InterpolationMode.BILINEAR
    slope = math.degrees(math.atan(strength * (0.3 if is_rand else 0.99)))
    factor = 1 + strength * (0.9 if is_rand else 0.99)
    far = [int(strength * (side * 150 / 331 if is_rand else 32)) for side in (width, height)]
    match name:
        case "Identity":
            return image
        case "ShearX":
            return transforms.affine(image, 0, [0, 0], 1.0, [slope, 0], bilinear, center=[0, 0])
        case "ShearY":
            return transforms.affine(image, 0, [0, 0], 1.0, [0, slope], bilinear, center=[0, 0])
        case "TranslateX":
            return transforms.affine(image, 0, [far[0], 0], 1.0, [0, 0], bilinear)
        case "TranslateY":
            return transforms.affine(image, 0, [0, far[1]], 1.0, [0, 0], bilinear)
        case "Rotate":
            return transforms.rotate(image, strength * (30 if is_rand else 135), bilinear)
        case "Brightness":
            return transforms.adjust_brightness(image, factor)
        case "Color":
            return transforms.adjust_saturation(image, factor)
        case "Contrast":
            return transforms.adjust_contrast(image, factor)
        case "Sharpness":
            return transforms.adjust_sharpness(image, factor)
        case "Posterize":
            return transforms.posterize(image, 8 - round(abs(strength) * (4 if is_rand else 6)))
        case "Solarize":
            return transforms.solarize(image, 255 * (1 - abs(strength)))
        case "AutoContrast":
            return transforms.autocontrast(image)
        case _:
            return transforms.equalize(image)


def nearest(made: Tensor, candidates: Tensor) -> tuple[list[int], Tensor]:
    """For each image the candidate that it is most like, and how far it is from that in its worst px."""
    planes = made.permute(0, 3, 1, 2).flatten(1).float()
    least = torch.cdist(planes, candidates.flatten(1).float(), p=math.inf).min(1)
    return least.indices.tolist(), least.values


def paler(count: int, height: int, width: int, channels: int) -> Tensor:
    """One photo that autocontrast changes, many times."""
    return (photos(1, height, width, channels) // 2 + 60).expand(count, -1, -1, -1)


@pytest.mark.parametrize("channels", [1, 3])
def test_trivial_augment_is_one_operation_of_torchvision(channels):
    pixels = paler(200, 16, 18, channels)
    made = augment(pixels, keys_for(200), 0, configured(augment="trivial"), (16, 18))
    image = pixels[0].permute(2, 0, 1)
    strengths = [0.0, *(sign * level / 30 for level in range(1, 31) for sign in (1, -1))]
    tried = list(product(augmentation.OPERATIONS, strengths))
    which, distance = nearest(made, torch.stack([shown(image, *each, is_rand=False) for each in tried]))
    assert distance.max() <= 1
    names, found = zip(*(tried[i] for i in which), strict=True)
    # Without colour that of Color looks like Identity.
    assert set(names) >= set(augmentation.OPERATIONS) - ({"Color"} if channels == 1 else set())
    turned = [strength for name, strength in zip(names, found, strict=True) if name == "Rotate"]
    assert min(turned) < -0.5
    assert max(turned) > 0.5
    assert 1 / 30 < (made == pixels).flatten(1).all(1).double().mean() < 1 / 4


@pytest.mark.parametrize("channels", [1, 3])
def test_rand_augment_is_two_operations_of_torchvision(channels):
    pixels = paler(200, 16, 18, channels)
    made = augment(pixels, keys_for(200), 0, configured(augment="rand"), (16, 18))
    tried = list(product(augmentation.OPERATIONS, (0.3, -0.3)))
    once = [shown(pixels[0].permute(2, 0, 1), *each, is_rand=True) for each in tried]
    which, distance = nearest(
        made, torch.stack([shown(first, *each, is_rand=True) for first in once for each in tried])
    )
    # The second operation may make more of the half level by which the first is off: equalize jumps.
    assert (distance <= 3).double().mean() > 0.95
    assert len(set(which)) > 100


def lanes_of(*counts: int) -> Tensor:
    return torch.cat([torch.full((count,), lane) for lane, count in enumerate(counts)])


def test_partners_are_the_next_of_the_lane_and_its_first_for_its_last():
    lanes, labels = lanes_of(3, 1, 0, 4), torch.arange(8)
    _, partners, _ = mixed(photos(8, 4, 4, 1), labels, lanes, 0, configured(mixup=1.0))
    assert partners.tolist() == [1, 2, 0, 3, 5, 6, 7, 4]


@pytest.mark.parametrize("settings", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_mixing_does_not_depend_on_how_lanes_are_spread_over_workers(settings):
    pixels, lanes, labels, config = photos(12, 8, 8, 3), lanes_of(3, 4, 2, 3), torch.arange(12), configured(**settings)
    for step in range(6):
        whole = mixed(pixels, labels, lanes, step, config)
        parts = [mixed(pixels[rows], labels[rows], lanes[rows], step, config) for rows in (slice(7), slice(7, 12))]
        for ours, theirs in zip(whole, zip(*parts, strict=True), strict=True):
            assert torch.equal(ours, torch.cat(theirs))


def test_mixup_weighs_pixels_like_labels():
    pixels, labels, lanes = photos(6, 5, 5, 3), torch.arange(6), lanes_of(6)
    shares = []
    for step in range(120):
        made, partners, share = mixed(pixels, labels, lanes, step, configured(mixup=0.4))
        weight = share[:, None, None, None]
        expected = pixels * weight + pixels[partners] * (1 - weight)
        torch.testing.assert_close(made, expected, atol=1e-3, rtol=0)
        assert made.dtype == torch.float32
        shares.append(float(share[0]))
    assert np.mean(shares) == pytest.approx(0.5, abs=0.1)
    assert np.var(shares) == pytest.approx(0.25 / 1.8, abs=0.03)  # of Beta(0.4, 0.4)


def test_cutmix_weighs_labels_by_the_exact_area():
    pixels = torch.tensor([10, 200], dtype=torch.uint8)[:, None, None, None].expand(-1, 9, 13, 3)
    shares = []
    for step in range(60):
        made, partners, share = mixed(pixels, torch.tensor([0, 1]), lanes_of(2), step, configured(cutmix=1.0))
        assert partners.tolist() == [1, 0]
        for row in (0, 1):
            own = (made[row] == pixels[row]).all(2)
            assert (made[row][~own] == pixels[1 - row][~own]).all()
            assert float(share[row]) == pytest.approx(float(own.double().mean()), abs=1e-6)
            rows, columns = (~own).any(1), (~own).any(0)
            assert torch.equal(~own, rows[:, None] & columns[None, :])
        shares.append(float(share[0]))
    assert min(shares) < 0.3
    assert max(shares) > 0.95


def test_with_both_each_step_takes_one_of_the_two_by_chance():
    pixels = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(-1, 8, 8, 1)
    cut = 0
    for step in range(200):
        made, _, _ = mixed(pixels, torch.tensor([0, 1]), lanes_of(2), step, configured(mixup=1.0, cutmix=1.0))
        cut += int(((made == 0) | (made == 255)).all())
    assert 70 < cut < 130


@pytest.mark.parametrize("settings", [{"mixup": 0.4}, {"cutmix": 1.0}])
@pytest.mark.parametrize("count", [0, 1])
def test_whoever_is_alone_in_a_batch_is_mixed_with_nobody(settings, count):
    pixels, labels = photos(2, 6, 6, 1)[:count], torch.arange(count)
    made, partners, share = mixed(pixels, labels, lanes_of(count), 5, configured(**settings))
    torch.testing.assert_close(made, pixels.float())
    assert torch.equal(partners, labels)
    assert share.shape == (count,)
