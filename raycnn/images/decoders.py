"""simplejpeg and Pillow behind one door: what they raise comes out as a `Bad`."""

import functools
import importlib.metadata
import io
import struct
import zlib
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageCms,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from raycnn.config import Limits
from raycnn.errors import Bad, Status, one_line
from raycnn.images import structure

Pixels = npt.NDArray[np.uint8]
"""(height, width, channels), C-contiguous; channels is 1 (grayscale) or 3 (RGB)."""

DECODER = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("simplejpeg", "pillow", "torch"))
"""The libraries whose versions may move a pixel by a grey level: lineage for what is made from pixels."""

# These are called directly, not through Image.open: no other format is ever tried, and no warning is printed
# about large images, for which there are Limits.
_READERS: dict[str, type[ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
}

# What the decoders may raise for damaged files: seen with Pillow's own test files and with mutated ones, or
# allowed by Pillow's fuzz test. Warnings are among them for programs that turn warnings into errors.
_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    RuntimeError,
    EOFError,
    MemoryError,
    BufferError,
    Warning,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    ImageCms.PyCMSError,
)

# In one JPEG: encoders make about ten, and cjpeg takes scripts of up to a hundred. Each costs a pass over all pixels,
# and may be 14 bytes long: a hundred over the most pixels that are allowed take seconds, a thousand a minute.
_MAX_SCANS = 100

# Pixels or bytes of a run-length coded BMP, which Pillow decodes in Python: one to four million of them in a second.
_MAX_RUN_LENGTH = 10_000_000


class Header(NamedTuple):
    """What a file's first bytes say. `channels` is 1 for grayscale without transparency, else 3."""

    format: str
    height: int  # of the upright image, in px
    width: int
    channels: int


class File(NamedTuple):
    """An encoded image whose header has been read and is within the limits."""

    encoded: bytes
    header: Header
    orientation: int  # EXIF 1..8, which the decoder does not apply
    image: ImageFile.ImageFile | None  # None: a JPEG that simplejpeg decodes

    @property
    def stored(self) -> tuple[int, int]:
        """Height and width as stored, before it is turned upright."""
        height, width = self.header.height, self.header.width
        return (height, width) if self.orientation < 5 else (width, height)


def open_file(encoded: bytes | None, limits: Limits) -> File | Bad:
    """Read the header and check the limits; takes no memory for pixels."""
    if not encoded:
        return Bad(Status.EMPTY, "no bytes")
    if len(encoded) > limits.max_bytes:
        return Bad(Status.TOO_LARGE, f"{len(encoded)} bytes, the limit is {limits.max_bytes}")
    name = structure.format_of(encoded)
    if name is None:
        return _not_an_image(encoded)
    file = _open_jpeg(encoded, limits) if name == "JPEG" else _open_with_pillow(encoded, name, limits)
    if isinstance(file, Bad):
        return file
    return _too_large(file.header.height, file.header.width, limits) or file


def raster(file: File, channels: Literal[1, 3], scale: int = 1) -> Pixels | Bad:
    """Decode the image as it is stored, not yet upright; a JPEG may come `scale` (2, 4, 8) times smaller."""
    name, image = file.header.format, file.image
    try:
        if image is None:
            try:
                return _decode_jpeg(file, channels, scale)
            except _ERRORS:  # it is strict and stops at any warning; Pillow stops at what is fatal
                image = _READERS[name](io.BytesIO(file.encoded))
        image.load()
        decoded = _to_array(image, channels)
    except _ERRORS as error:
        return _bad(name, file.encoded, error)
    if decoded.shape[:2] != file.stored:
        return Bad(Status.UNDECODABLE, f"{name}: the size of its pixels is not the one in its header")
    return decoded


def _not_an_image(encoded: bytes) -> Bad:
    if structure.may_become(encoded):
        return Bad(Status.TRUNCATED, f"only {len(encoded)} bytes")
    start = encoded[:16]
    return Bad(Status.UNSUPPORTED, f"not a JPEG, PNG, WebP, GIF, BMP or TIFF: it starts with {start!r}")


def _too_large(height: int, width: int, limits: Limits) -> Bad | None:
    if height * width <= limits.max_pixels:
        return None
    return Bad(Status.TOO_LARGE, f"{height} x {width} px, the limit is {limits.max_pixels} px")


def _open_jpeg(encoded: bytes, limits: Limits) -> File | Bad:
    plain = structure.jpeg_header(encoded)
    if (plain is None or plain.many_scans) and encoded.count(b"\xff\xda") > _MAX_SCANS:
        scans = structure.jpeg_scans(encoded)
        if scans > _MAX_SCANS:
            return Bad(Status.TOO_LARGE, f"JPEG: {scans} scans, the limit is {_MAX_SCANS}")
    if plain is None or plain.components not in (1, 3):
        return _open_with_pillow(encoded, "JPEG", limits)
    stored = plain.height, plain.width, plain.components
    return _file(encoded, "JPEG", stored, structure.orientation(plain.exif), None)


def _open_with_pillow(encoded: bytes, name: str, limits: Limits) -> File | Bad:
    content, exif = structure.png_essentials(encoded) if name == "PNG" else (encoded, b"")
    # Before the file is opened: that takes the memory of a WebP's canvas, and fails for a PNG that ends early.
    announced = {"WEBP": structure.webp_canvas, "PNG": structure.png_size}.get(name)
    if announced and (bad := _too_large(*announced(encoded), limits)):
        return bad
    try:
        image = _READERS[name](io.BytesIO(content))
        tile = _check_tiff(image) if isinstance(image, TiffImagePlugin.TiffImageFile) else (0, 0)
    except _ERRORS as error:
        return _bad(name, encoded, error)
    if bad := _too_large(*tile, limits) or _too_slow(image, len(encoded)):
        return bad
    if name == "TIFF":
        image.info.pop("xmp", None)  # Pillow turns TIFFs itself, and would go by this where EXIF is missing
    if name in ("JPEG", "WEBP"):
        exif = image.info.get("exif", b"")
    gray = _is_deep(image) or image.mode in ("1", "L")
    channels = 1 if gray and "transparency" not in image.info else 3
    return _file(encoded, name, (image.height, image.width, channels), structure.orientation(exif), image)


def _too_slow(image: ImageFile.ImageFile, size: int) -> Bad | None:
    amount = max(image.width * image.height, size)
    if amount <= _MAX_RUN_LENGTH or not image.tile or image.tile[0].codec_name != "bmp_rle":
        return None
    return Bad(Status.TOO_LARGE, f"run-length coded BMP of {amount} px or bytes, the limit is {_MAX_RUN_LENGTH}")


def _check_tiff(image: TiffImagePlugin.TiffImageFile) -> tuple[int, int]:
    """Height and width of its tiles, which take their memory however small the image is; or (0, 0).

    ValueError where parts of it are missing, which Pillow would leave black.
    """
    corners = [tile.extents or (0, 0, 0, 0) for tile in image.tile]
    covered = sum((right - left) * (bottom - top) for left, top, right, bottom in corners)
    if covered < image.width * image.height:
        raise ValueError("its strips or tiles do not cover it")
    height, width = (image.tag_v2.get(tag, 0) for tag in (323, 322))
    return (height, width) if isinstance(height, int) and isinstance(width, int) else (0, 0)


def _file(
    encoded: bytes, name: str, stored: tuple[int, int, int], orientation: int, image: ImageFile.ImageFile | None
) -> File:
    height, width, channels = stored
    if orientation >= 5:
        height, width = width, height
    return File(encoded, Header(name, height, width, channels), orientation, image)


def _decode_jpeg(file: File, channels: Literal[1, 3], scale: int) -> Pixels:
    colorspace = "RGB" if channels == 3 else "GRAY"
    if scale == 1:
        return simplejpeg.decode_jpeg(file.encoded, colorspace)
    height, width = file.stored
    return simplejpeg.decode_jpeg(
        file.encoded, colorspace, min_height=-(-height // scale), min_width=-(-width // scale)
    )


def _to_array(image: Image.Image, channels: Literal[1, 3]) -> Pixels:
    if _is_deep(image):
        gray = _to_8_bits(image)[..., np.newaxis]
        return gray if channels == 1 else np.repeat(gray, 3, axis=2)
    if image.mode == "LAB":
        image = ImageCms.applyTransform(image, _lab_to_srgb()) or image
    elif image.has_transparency_data:
        image = _on_white(image)
    if channels == 1 and image.mode not in ("1", "L"):
        image = image.convert("RGB")
    image = image.convert("L" if channels == 1 else "RGB")
    return np.array(image).reshape(image.height, image.width, channels)


def _is_deep(image: Image.Image) -> bool:
    """Whether it has one sample of more than 8 bits in a pixel."""
    return image.mode in ("I", "F") or image.mode.startswith("I;")


def _to_8_bits(image: Image.Image) -> npt.NDArray[np.uint8]:
    samples = np.array(image)
    if image.mode.startswith("I;"):
        bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]  # a TIFF may have 12 of them
        gray = (samples >> max(bits - 8, 0)).astype(np.uint8)
        transparent = image.info.get("transparency")
        return gray if transparent is None else np.where(samples == transparent, np.uint8(255), gray)
    samples = np.nan_to_num(samples.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0).clip(-1e38, 1e38)
    low, high = float(samples.min()), float(samples.max())
    top = next((top for top in (1, 255, 65535) if low >= 0 and high <= top), None)
    if top is None:
        samples, top = samples - low, max(high - low, 1e-30)
    return np.rint(samples * (255 / top)).astype(np.uint8)


def _on_white(image: Image.Image) -> Image.Image:
    layer = image.convert("LA" if image.mode in ("LA", "La") else "RGBA")
    opaque = layer.convert(layer.mode[:-1])
    white = Image.new(opaque.mode, opaque.size, "white")
    white.paste(opaque, mask=layer.getchannel("A"))
    return white


@functools.cache
def _lab_to_srgb() -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")


def _bad(name: str, encoded: bytes, error: BaseException) -> Bad:
    said = one_line(error) or type(error).__name__
    if isinstance(error, (MemoryError, Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return Bad(Status.TOO_LARGE, f"{name}: {said}")
    # A WebP decoder says end-of-file for damage, too.
    out_of_data = (struct.error, IndexError) if name == "WEBP" else (struct.error, IndexError, EOFError)
    if "truncated" in said.lower():
        return Bad(Status.TRUNCATED, f"{name}: {said}")
    if isinstance(error.__cause__ or error, out_of_data) or structure.ends_early(name, encoded):
        return Bad(Status.TRUNCATED, f"{name}: the file ends early ({said})")
    return Bad(Status.UNDECODABLE, f"{name}: {said}")
