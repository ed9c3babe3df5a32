"""Augmentation of training batches, on their device.

    pixels -> random box -> flip, shift -> TrivialAugment or RandAugment -> random erasing -> mixup or cutmix

What is drawn for an image follows from (seed, epoch, key) alone: not from torch's generators, nor from the rows
beside it, nor from the number of workers. What is drawn for a step's mixing follows from (seed, step).
"""

import hashlib
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from raycnn.config import TrainConfig

ATTEMPTS = 10
"""Boxes that are drawn for an image before it goes without one; as in `images.random_box`."""
BOX_RATIO = (3 / 4, 4 / 3)
"""Least and greatest width / height of a random box, relative to the model's input (Szegedy et al. 2014)."""
ERASED_AREA, ERASED_RATIO = (0.02, 0.33), (0.3, 3.3)
"""Of erased rectangles: share of the image's area, and width / height relative to the image's own."""
SMALL = 64
"""Longest side in px of boxes that a CPU resizes all at once."""
LEVELS = 30
"""Magnitudes of the operations go from 0 to 30."""
RAND_LEVEL = 9
"""That of every operation of RandAugment, as its authors train ResNet-50."""
WARPS = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
OPERATIONS = ("Identity", *WARPS, "Brightness", "Color", "Contrast", "Sharpness", "Posterize", "Solarize")
OPERATIONS += ("AutoContrast", "Equalize")
"""Of which TrivialAugment and RandAugment draw, all alike often."""
TURNS = {"none": 0, "trivial": 1, "rand": 2}
"""Operations that an image goes through."""


def augment(
    pixels: Tensor,
    keys: Tensor,
    epoch: int,
    config: TrainConfig,
    size: tuple[int, int],
    sizes: Tensor | None = None,
    crop: float = 1.0,
) -> Tensor:
    """The batch as the model is to see it in this epoch: uint8 (N, height, width, C), on the device of `pixels`.

    Where nothing is to be done the pixels are returned as they are. Nothing waits for a GPU, except for the
    operations of TrivialAugment and RandAugment, which are grouped by what was drawn: once for each turn.

    Args:
        pixels: uint8 (N, H, W, C); N may be 0.
        keys: int64 (N,): hashes of the images' keys.
        epoch: Each has its own draws.
        config: `seed`, `crop_scale`, `flip`, `shift`, `augment` and `erase` count here.
        size: Height and width to return, in px.
        sizes: Integers (N, 2): height and width of each image in the upper left of its frame (H, W). A box is
            taken from it, as `images.random_box` would, or `images.center_box` where `crop_scale` is 1. None: the
            box was taken already, and the whole frame is the image.
        crop: The `ImageSpec.crop` of the model, for the centre box.
    """
    if not len(keys):
        return pixels.new_zeros((0, *size, pixels.shape[3]))
    if sizes is not None:
        pixels = _resized(pixels, _boxes(keys, epoch, config, size, sizes.long(), crop), size)
    elif tuple(pixels.shape[1:3]) != tuple(size):
        frames = _frames(pixels)
        pixels = _resized(pixels, torch.cat((torch.zeros_like(frames), frames), 1), size)
    if config.flip or config.shift:
        pixels = _placed(pixels, uniform(keys, 3, config.seed, epoch, "place"), config)
    for turn in range(TURNS[config.augment]):
        pixels = _operated(pixels, uniform(keys, 3, config.seed, epoch, "operation", turn), config.augment)
    if config.erase:
        pixels = _erased(pixels, uniform(keys, 1 + 4 * ATTEMPTS, config.seed, epoch, "erase"), config.erase)
    return pixels


def mixed(
    pixels: Tensor, labels: Tensor, lanes: Tensor, step: int, config: TrainConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Every image mixed with a partner, by mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019).

    One of the settings `mixup` and `cutmix` must be above 0; with both, one of the two is drawn for the step. The
    partner of a row is the next one of its lane, that of a lane's last row its first, so that pairs do not depend on
    how lanes are spread over workers.

    Args:
        pixels: uint8 (N, H, W, C); N may be 0.
        labels: int64 (N,).
        lanes: int64 (N,); rows of a lane stand together.
        step: Of the run; which of the two, the share and the rectangle follow from it and `config.seed`.
        config: How.

    Returns:
        Pixels, float32 (N, H, W, C) in 0..255; the labels of the partners, int64 (N,); and the share of each row's
        own label, float32 (N,), the rest being that of its partner. With cutmix it is the exact share of the area.
    """
    rng = np.random.default_rng([config.seed, step, 0x6D6978])
    kinds = [kind for kind in ("mixup", "cutmix") if getattr(config, kind)]
    kind = kinds[int(rng.integers(len(kinds)))]
    share = float(rng.beta(*[getattr(config, kind)] * 2))
    partners = _partners(lanes)
    own = pixels.float()
    if kind == "mixup":
        own = torch.lerp(own[partners], own, share)
    else:
        height, width = pixels.shape[1:3]
        rows, columns = (_cut(rng, side, math.sqrt(1 - share)) for side in (height, width))
        own[:, rows, columns] = pixels[:, rows, columns][partners].float()
        share = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
    return own, labels[partners], torch.full(labels.shape, share, device=pixels.device)


def uniform(keys: Tensor, count: int, *stream: object) -> Tensor:
    """Random numbers in [0, 1), multiples of 2^-53: float64 (N, count), from the key and the stream's name alone.

    A SplitMix64 generator (Steele, Lea and Flood 2014) for each row, begun at its key mixed with the hash of the
    stream's name. It is integer arithmetic until the last step, and so the same on every device.
    """
    digest = hashlib.blake2b(" ".join(map(str, stream)).encode(), digest_size=8).digest()
    state = _scrambled(keys ^ int.from_bytes(digest, "big", signed=True))
    counter = torch.arange(1, count + 1, device=keys.device) * _signed(0x9E3779B97F4A7C15)
    return _shifted(_scrambled(state[:, None] + counter), 11).double() * 2.0**-53


def _scrambled(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64; products wrap."""
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, filled with zeros, where torch repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64)


def _frames(pixels: Tensor) -> Tensor:
    """int64 (N, 2): height and width of the frame for each row, made on the device."""
    return torch.stack([torch.full(pixels.shape[:1], side, device=pixels.device) for side in pixels.shape[1:3]], 1)


def _boxes(keys: Tensor, epoch: int, config: TrainConfig, size: tuple[int, int], sizes: Tensor, crop: float) -> Tensor:
    """int64 (N, 4): top, left, height and width of what is kept of each image."""
    if config.crop_scale == 1:
        return _center_boxes(sizes, size, crop)
    draws = uniform(keys, 4 * ATTEMPTS, config.seed, epoch, "box")
    boxes, fits = _random_boxes(draws, sizes, (config.crop_scale, 1.0), BOX_RATIO, size[1] / size[0])
    return torch.where(fits[:, None], boxes, _center_boxes(sizes, size, 1.0))


def _center_boxes(sizes: Tensor, size: tuple[int, int], crop: float) -> Tensor:
    """`images.center_box` for many images."""
    height, width = sizes.double().unbind(1)
    side = crop * torch.minimum(height / size[0], width / size[1])
    extent = torch.stack((side * size[0], side * size[1]), 1).round().long().clamp(min=1)
    return torch.cat(((sizes - extent) // 2, extent), 1)


def _random_boxes(
    draws: Tensor, sizes: Tensor, area: tuple[float, float], ratio: tuple[float, float], aspect: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Boxes of random area and shape, and whether one fits: int64 (N, 4), bool (N,).

    All attempts are made at once, because to look at the first would be to wait for the GPU.

    Args:
        draws: (N, 4 * ATTEMPTS) in [0, 1).
        sizes: int64 (N, 2): height and width of the images.
        area: Least and greatest share of an image's area; uniform.
        ratio: Least and greatest width / height, relative to `aspect`; log-uniform.
        aspect: One for all, or (N, 1).
    """
    share, shape, y, x = draws.view(-1, 4, ATTEMPTS).unbind(1)
    height, width = sizes.double()[:, :, None].unbind(1)
    wanted = (area[0] + (area[1] - area[0]) * share) * height * width
    low, high = math.log(ratio[0]), math.log(ratio[1])
    shape = aspect * (low + (high - low) * shape).exp()
    box_height, box_width = (wanted / shape).sqrt().round(), (wanted * shape).sqrt().round()
    fits = (box_height >= 1) & (box_height <= height) & (box_width >= 1) & (box_width <= width)
    top, left = y * (height - box_height + 1), x * (width - box_width + 1)
    boxes = torch.stack((top.floor(), left.floor(), box_height, box_width), 2).long()
    first = fits.byte().argmax(1)
    return boxes.take_along_dim(first[:, None, None], 1).squeeze(1), fits.any(1)


def _resized(pixels: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Each box as an image of the size wanted, antialiased bilinear as in evaluation: uint8 (N, height, width, C).

    The two ways differ by a level here and there, so which is taken depends on the box alone, not on its neighbours.
    """
    if pixels.device.type != "cpu":
        return _resized_at_once(pixels, boxes, size)
    is_large = (boxes[:, 2:] > SMALL).any(1)
    if not is_large.any():
        return _resized_at_once(pixels, boxes, size)
    made = pixels.new_empty((len(pixels), *size, pixels.shape[3]))
    _resize_one_by_one(pixels, boxes, is_large.nonzero().squeeze(1).tolist(), made)
    if not is_large.all():
        made[~is_large] = _resized_at_once(pixels[~is_large], boxes[~is_large], size)
    return made


def _resized_at_once(pixels: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    (count, _, width, channels), (new_height, new_width) = pixels.shape, size
    places, shares = _taps(boxes[:, 0], boxes[:, 2], new_height, pixels.shape[1])
    rows = _weighted(pixels.flatten(2), places, shares)
    columns = rows.view(count, new_height, width, channels).transpose(1, 2).flatten(2)
    places, shares = _taps(boxes[:, 1], boxes[:, 3], new_width, width)
    made = _weighted(columns, places, shares).round_().to(torch.uint8)
    return made.view(count, new_width, new_height, channels).transpose(1, 2)


def _resize_one_by_one(pixels: Tensor, boxes: Tensor, rows: list[int], made: Tensor) -> None:
    """The same by torch's kernel for bytes on CPUs: 15 times as fast for photos, 3 times as slow for digits."""
    images, resized, places = pixels.permute(0, 3, 1, 2), made.permute(0, 3, 1, 2), boxes.tolist()
    for row in rows:
        top, left, height, width = places[row]
        box = images[row : row + 1, :, top : top + height, left : left + width]
        resized[row] = functional.interpolate(box, made.shape[1:3], mode="bilinear", antialias=True)[0]


def _taps(start: Tensor, length: Tensor, count: int, frame: int) -> tuple[Tensor, Tensor]:
    """Which of a frame's px, and how much of each, make the px that `length` of them, from `start` on, shrink to.

    Returns:
        int64 and float32 (N, count, K), where K holds for the whole frame, the longest that a box can be.
    """
    device = start.device
    start, length = start[:, None, None], length[:, None, None]
    scale = length.double() / count
    reach = scale.clamp(min=1)
    center = scale * (torch.arange(count, device=device)[:, None] + 0.5)
    place = (center - reach + 0.5).floor() + torch.arange(math.ceil(2 * max(1.0, frame / count)), device=device)
    share = (1 - (place + 0.5 - center).abs() / reach).clamp(min=0) * ((place >= 0) & (place < length))
    nearest = torch.minimum(place.long().clamp(min=0), length - 1)
    return start + nearest, (share / share.sum(2, keepdim=True)).float()


def _weighted(lines: Tensor, places: Tensor, shares: Tensor) -> Tensor:
    """Sums of lines: float32 (N, count, D) from (N, L, D), for places and shares (N, count, K)."""
    first = torch.arange(len(lines), device=lines.device)[:, None, None] * lines.shape[1]
    places, flat = places + first, lines.flatten(0, 1)
    total = torch.zeros((*places.shape[:2], lines.shape[2]), device=lines.device)
    for tap in range(places.shape[2]):
        line = flat.index_select(0, places[:, :, tap].flatten()).view(total.shape)
        total.addcmul_(line.float(), shares[:, :, tap, None])
    return total


def _placed(pixels: Tensor, draws: Tensor, config: TrainConfig) -> Tensor:
    """Mirrored and then moved, in one go; what moves in is black (He et al. 2016 pad with zeros and crop).

    Each row of a moved image is a run of bytes of the padded batch, so that runs are gathered, not px.
    """
    count, height, width, channels = pixels.shape
    down, across = min(config.shift, height), min(config.shift, width)
    both = torch.stack((pixels, pixels.flip(2)), 1) if config.flip else pixels[:, None]
    padded = functional.pad(both, (0, 0, across, across, down, down))
    index = torch.arange(count, device=pixels.device)
    if config.flip:
        index = 2 * index + (draws[:, 2] < 0.5)
    top, left = (draws[:, 0] * (2 * down + 1)).long(), (draws[:, 1] * (2 * across + 1)).long()
    rows = (index * padded.shape[2] + top)[:, None] + torch.arange(height, device=pixels.device)
    starts = (rows * padded.shape[3] + left[:, None]) * channels
    return padded.flatten().unfold(0, width * channels, 1)[starts].view(pixels.shape)


def _erased(pixels: Tensor, draws: Tensor, share: float) -> Tensor:
    """Some images with a random rectangle in their own mean colour (Zhong et al. 2020, who take the data's mean)."""
    height, width = pixels.shape[1:3]
    boxes, fits = _random_boxes(draws[:, 1:], _frames(pixels), ERASED_AREA, ERASED_RATIO, width / height)
    top, left, box_height, box_width = boxes[:, :, None].unbind(1)
    y, x = (torch.arange(side, device=pixels.device)[None, :] for side in (height, width))
    in_rows = (y >= top) & (y < top + box_height) & (fits & (draws[:, 0] < share))[:, None]
    in_columns = (x >= left) & (x < left + box_width)
    mean = (pixels.sum((1, 2), keepdim=True) // (height * width)).to(torch.uint8)
    inside = (in_rows[:, :, None] & in_columns[:, None, :])[..., None]
    return pixels + inside * (mean - pixels)  # bytes wrap; torch.where takes many times as long on them


def _partners(lanes: Tensor) -> Tensor:
    """int64 (N,): for each row the next one of its lane."""
    index = torch.arange(len(lanes), device=lanes.device)
    if len(lanes) < 2:
        return index
    ends = functional.pad(lanes[1:] != lanes[:-1], (0, 1), value=True)
    begins = torch.where(ends.roll(1), index, 0).cummax(0).values
    return torch.where(ends, begins, index + 1)


def _cut(rng: np.random.Generator, side: int, share: float) -> slice:
    """A run of px around a random place, cut off at the borders."""
    center, half = int(rng.integers(side)), int(side * share) // 2
    return slice(max(0, center - half), min(side, center + half))


def _operated(pixels: Tensor, draws: Tensor, kind: str) -> Tensor:
    """Every image after one random operation: TrivialAugment, or one turn of RandAugment.

    TrivialAugment "wide" (Mueller and Hutter 2021, arXiv 2103.10158) draws the magnitude too; RandAugment (Cubuk et
    al. 2020, arXiv 1909.13719) has one. Operations and magnitudes are those of torchvision; what comes from outside
    the image is black, and places between px are interpolated.
    """
    operation = (draws[:, 0] * len(OPERATIONS)).long()
    level = torch.full_like(draws[:, 1], RAND_LEVEL) if kind == "rand" else (draws[:, 1] * (LEVELS + 1)).floor()
    strength = torch.where(draws[:, 2] < 0.5, -level, level).float() / LEVELS
    ranges = _trivial_ranges() if kind == "trivial" else _rand_ranges(*pixels.shape[1:3])
    order = operation.argsort(stable=True)
    groups = order.split(torch.bincount(operation, minlength=len(OPERATIONS)).tolist())
    made = []
    for name, rows in zip(OPERATIONS, groups, strict=True):
        if not len(rows):
            continue
        images = pixels.index_select(0, rows).permute(0, 3, 1, 2)
        if name != "Identity":
            operate = _warped if name in WARPS else _recoloured
            images = operate(name, images, strength[rows, None, None], ranges)
        made.append(images.permute(0, 2, 3, 1))
    return torch.cat(made).index_select(0, order.argsort())


class _Ranges(NamedTuple):
    """The magnitudes at level 30."""

    shear: float
    translate_x: float
    """px."""
    translate_y: float
    rotate: float
    """Degrees."""
    enhance: float
    """Of Brightness, Color, Contrast and Sharpness: difference of the factor from 1."""
    posterize: int
    """Bits that are lost."""


def _trivial_ranges() -> _Ranges:
    return _Ranges(shear=0.99, translate_x=32, translate_y=32, rotate=135, enhance=0.99, posterize=6)


def _rand_ranges(height: int, width: int) -> _Ranges:
    # 150 px of 331 are what AutoAugment translates by, at the size that it was found at.
    return _Ranges(0.3, 150 / 331 * width, 150 / 331 * height, rotate=30, enhance=0.9, posterize=4)


def _warped(name: str, images: Tensor, strength: Tensor, ranges: _Ranges) -> Tensor:
    """uint8 (n, C, H, W) after one of the WARPS; strength (n, 1, 1) in -1..1.

    The grid is made element by element: a matrix product would round differently in batches of another size.
    """
    height, width = images.shape[2:]
    y = torch.arange(height, device=images.device)[None, :, None] - (height - 1) / 2
    x = torch.arange(width, device=images.device)[None, None, :] - (width - 1) / 2
    match name:
        case "ShearX":
            x = x + strength * ranges.shear * (y + height / 2)
        case "ShearY":
            y = y + strength * ranges.shear * (x + width / 2)
        case "TranslateX":
            x = x - (strength * ranges.translate_x).trunc()
        case "TranslateY":
            y = y - (strength * ranges.translate_y).trunc()
        case _:
            angle = (strength * ranges.rotate).deg2rad()
            x, y = angle.cos() * x - angle.sin() * y, angle.sin() * x + angle.cos() * y
    shape = (len(images), height, width)
    grid = torch.stack(((x * (2 / width)).expand(shape), (y * (2 / height)).expand(shape)), 3)
    sampled = functional.grid_sample(images.float(), grid, mode="bilinear", align_corners=False)
    return sampled.round_().to(torch.uint8)


def _recoloured(name: str, images: Tensor, strength: Tensor, ranges: _Ranges) -> Tensor:
    """uint8 (n, C, H, W) after one of the other OPERATIONS; strength (n, 1, 1) in -1..1."""
    from torchvision.transforms.v2 import functional as transforms  # takes a second, so that it waits for a need

    strength = strength[..., None]
    match name:
        case "AutoContrast":
            return transforms.autocontrast(images)
        case "Equalize":
            return transforms.equalize(images)
        case "Solarize":
            return torch.where(images >= 255 * (1 - strength.abs()), 255 - images, images)
        case "Posterize":
            lost = (strength.abs() * ranges.posterize).round().int()
            return ((images.int() >> lost) << lost).to(torch.uint8)
        case "Brightness":
            plain = torch.zeros_like(images)
        case "Color":
            plain = transforms.rgb_to_grayscale(images)
        case "Contrast":
            # Summed as integers: means of floats would round differently in batches of another size.
            gray = transforms.rgb_to_grayscale(images)
            plain = gray.sum((1, 2, 3), keepdim=True) / gray[0].numel()
        case _:
            plain = transforms.adjust_sharpness(images, 0.0)
    # `plain` is the image at a factor of 0, from which others follow in a line (Haeberli and Voorhies 1994).
    blended = torch.lerp(plain.float(), images.float(), 1 + strength * ranges.enhance)
    return blended.round_().clamp_(0, 255).to(torch.uint8)
