"""Encoded bytes to uint8 pixels, or a `Bad`: the only place where pixels are made.

    encoded -> header (caps) -> decode -> crop to a box -> antialiased bilinear resize -> (H, W, C) uint8

Training, evaluation, labeling and serving all call `pixels`; they differ only in the function that chooses
the box. Where training keeps decoded images it calls `whole`, and chooses the box later. The rules, all
decided by the content and never by a file's name:

- JPEG, PNG, WebP, GIF, BMP and TIFF; of several frames or pages the first.
- Upright by the EXIF orientation; without a valid one, as stored. Colour profiles are not applied.
- Transparent images are laid on white, which is where people see most of them.
- 16-bit samples keep their high byte. Float and 32-bit samples are taken as 0..1, 0..255 or 0..65535,
  whichever is the first to hold them all, and are stretched from minimum to maximum where none does.
- A file that ends early is `truncated`. A JPEG that is damaged inside is what libjpeg makes of it, as in
  other viewers, and `undecodable` only where that is nothing.
- What would take memory or time out of all proportion is `too_large` by its header: see `Limits`; and a
  JPEG of more than 100 scans, each of which is a pass over all pixels; and a run-length coded BMP of more
  than 10 million px or bytes.

What a decoder raises becomes a `Bad`. One that crashes or hangs needs a process of its own: `images.isolated`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from raycnn.config import ImageSpec, Limits
from raycnn.errors import Bad
from raycnn.images.decoders import DECODER, File, Header, Pixels, open_file, raster

__all__ = ["DECODER", "Box", "Choose", "Header", "Pixels", "center_box", "decode", "pixels", "random_box"]
__all__ += ["prepare_to_resize", "read_header", "whole", "whole_size"]

Box = tuple[int, int, int, int]
"""top, left, height, width in px of the upright image."""

Choose = Callable[[int, int], Box]
"""Takes height and width of the upright image, returns the box to keep: inside it, and at least 1 x 1 px."""

LONGEST = 2
"""How many times longer than its short side a whole image is kept."""

_DEFAULT_LIMITS = Limits.model_validate({})


def read_header(encoded: bytes | None, limits: Limits = _DEFAULT_LIMITS) -> Header | Bad:
    """Format, upright size and channels, without decoding. Never raises for what the bytes are."""
    file = open_file(encoded, limits)
    return file if isinstance(file, Bad) else file.header


def decode(encoded: bytes | None, channels: Literal[1, 3], limits: Limits = _DEFAULT_LIMITS) -> Pixels | Bad:
    """The whole image, upright: (height, width, channels). Never raises for what the bytes are."""
    file = open_file(encoded, limits)
    if isinstance(file, Bad):
        return file
    stored = raster(file, channels)
    return stored if isinstance(stored, Bad) else np.ascontiguousarray(_upright(stored, file.orientation))


def pixels(
    encoded: bytes | None, spec: ImageSpec, choose: Choose | None = None, limits: Limits = _DEFAULT_LIMITS
) -> Pixels | Bad:
    """Decode, crop to the chosen box, resize: (spec.height, spec.width, spec.channels).

    Never raises for what the bytes are; ValueError where `choose` returns a box that is not in the image.

    Args:
        encoded: The file; None counts as empty.
        spec: The model's input.
        choose: Chooses the box; None is `center_box(spec)`.
        limits: Checked before memory is taken.
    """
    file = open_file(encoded, limits)
    if isinstance(file, Bad):
        return file
    box = (choose or center_box(spec))(file.header.height, file.header.width)
    return _resized(file, box, spec.height, spec.width, spec.channels)


def whole(encoded: bytes | None, short: int, channels: Literal[1, 3], limits: Limits = _DEFAULT_LIMITS) -> Pixels | Bad:
    """Decode and shrink to the size that `whole_size` says: (height, width, channels), for boxes chosen later.

    Never raises for what the bytes are.
    """
    file = open_file(encoded, limits)
    if isinstance(file, Bad):
        return file
    height, width = file.header.height, file.header.width
    box_height, box_width = min(height, LONGEST * width), min(width, LONGEST * height)
    box = (height - box_height) // 2, (width - box_width) // 2, box_height, box_width
    return _resized(file, box, *whole_size(height, width, short), channels)


def whole_size(height: int, width: int, short: int) -> tuple[int, int]:
    """Height and width in px of what `whole` makes of an image: its short side is `short` at most.

    The long side is cut about the centre to twice the short one. Nothing is enlarged.
    """
    height, width = min(height, LONGEST * width), min(width, LONGEST * height)
    share = min(1.0, short / min(height, width))
    return round(height * share), round(width * share)


def _resized(file: File, box: Box, height: int, width: int, channels: Literal[1, 3]) -> Pixels | Bad:
    """The box of the upright image, at the size that is wanted."""
    scale = _scale(box, height, width)
    stored = raster(file, channels, scale)
    if isinstance(stored, Bad):
        return stored
    place = _as_stored(box, file.header.height, file.header.width, file.orientation)
    if stored.shape[:2] != file.stored:
        place = _scaled(place, scale)
    # Turning the few pixels that come out is cheaper than turning all that go in.
    size = (height, width) if file.orientation < 5 else (width, height)
    resized = _resize(_crop(stored, place), *size)
    return resized if file.orientation == 1 else np.ascontiguousarray(_upright(resized, file.orientation))


def prepare_to_resize() -> None:
    """Import what the first resize would import, which takes seconds: for whoever measures or limits time."""
    _torch()


def center_box(spec: ImageSpec) -> Choose:
    """The largest centred box of the model's aspect ratio, shrunk to `spec.crop` of its sides."""

    def choose(height: int, width: int) -> Box:
        side = spec.crop * min(height / spec.height, width / spec.width)
        box_height, box_width = max(1, round(side * spec.height)), max(1, round(side * spec.width))
        return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width

    return choose


def random_box(
    spec: ImageSpec,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.35, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Choose:
    """A box of random area and shape at a random place (Szegedy et al. 2014, arXiv:1409.4842, section 6).

    Args:
        spec: The model's input.
        rng: Where the randomness comes from.
        scale: Least and greatest share of the image's area.
        ratio: Least and greatest width / height, relative to the model's own; log-uniform.
    """
    whole = center_box(spec.model_copy(update={"crop": 1.0}))

    def choose(height: int, width: int) -> Box:
        for _ in range(10):
            area = rng.uniform(*scale) * height * width
            aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1]))) * spec.width / spec.height
            box_height, box_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
            if 0 < box_height <= height and 0 < box_width <= width:
                top = int(rng.integers(height - box_height + 1))
                left = int(rng.integers(width - box_width + 1))
                return top, left, box_height, box_width
        return whole(height, width)

    return choose


def _upright(stored: Pixels, orientation: int) -> Pixels:
    """A view of the stored image as its EXIF orientation wants it seen."""
    if orientation >= 5:
        stored = stored.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        stored = stored[::-1]
    return stored[:, ::-1] if orientation in (2, 3, 6, 7) else stored


def _as_stored(box: Box, height: int, width: int, orientation: int) -> Box:
    """A box of the upright image, whose size is given, as a box of the stored one."""
    top, left, box_height, box_width = box
    if orientation in (3, 4, 7, 8):
        top = height - top - box_height
    if orientation in (2, 3, 6, 7):
        left = width - left - box_width
    if not (0 <= top < top + box_height <= height and 0 <= left < left + box_width <= width):
        raise ValueError(f"box {box} (top, left, height, width) is not in an image of {height} x {width} px")
    return (top, left, box_height, box_width) if orientation < 5 else (left, top, box_width, box_height)


def _scale(box: Box, height: int, width: int) -> int:
    """How many times smaller a JPEG may be decoded: 8, 4 or 2, which libjpeg does fast, else 1.

    What is left must be at least twice the height and width that are wanted, so that it is the antialiased resize,
    not libjpeg's block averages, that decides the pixels. It depends on the box and the size alone, and so is the
    same in training, evaluation, labeling and serving.
    """
    room = min(box[2] / height, box[3] / width) / 2
    return 1 if room < 2 else 2 if room < 4 else 4 if room < 8 else 8


def _scaled(box: Box, scale: int) -> Box:
    """The box in an image that was decoded `scale` times smaller, to the nearest px."""
    top, left, height, width = box
    edges = (top, left, top + height, left + width)
    top, left, bottom, right = ((2 * edge + scale) // (2 * scale) for edge in edges)
    return top, left, bottom - top, right - left


def _crop(stored: Pixels, box: Box) -> Pixels:
    top, left, height, width = box
    return np.ascontiguousarray(stored[top : top + height, left : left + width])


def _resize(image: Pixels, height: int, width: int) -> Pixels:
    """Antialiased bilinear by torch's uint8 kernel, several times as fast as Pillow's."""
    if image.shape[:2] == (height, width):
        return image
    from_numpy, kernel = _torch()
    # The batch dimension comes from reshape because torch wants its stride to be that of a channels_last
    # batch: with the 0 of image[None] it returns planes, and takes half as long again.
    batch = from_numpy(image.reshape(1, *image.shape).transpose(0, 3, 1, 2))
    if height < image.shape[0]:
        # The kernel does rows three times as fast as columns: fewer rows first leave it fewer columns to do.
        batch = kernel(batch, (height, image.shape[1]), False, None)
    return kernel(batch, (height, width), False, None).numpy()[0].transpose(1, 2, 0)


@functools.cache
def _torch() -> tuple[Callable[[np.ndarray], Any], Callable[..., Any]]:
    """What is called of torch, which is imported with the first resize: packing images does without.

    The operator is what `torch.nn.functional.interpolate(mode="bilinear", antialias=True)` calls. The lookups
    and the checks on the way there take a tenth of the time that is left beside decoding.
    """
    import torch

    kernel = torch._C._nn._upsample_bilinear2d_aa  # pyright: ignore[reportAttributeAccessIssue]
    return torch.from_numpy, kernel
