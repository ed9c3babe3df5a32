"""Files that break image pipelines, made by code: one expected status each."""

import functools
import io
import struct
import tarfile
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

from raycnn.errors import Status

ORANGE, BLUE = (220, 130, 40), (30, 60, 200)
HEIGHT, WIDTH = 32, 48


class Hazard(NamedTuple):
    """A file and what becomes of it."""

    encoded: bytes
    status: Status
    size: tuple[int, int] | None = (HEIGHT, WIDTH)  # of the upright image; None where it has no pixels
    centre: tuple[int, int, int] = ORANGE
    corner: tuple[int, int, int] = BLUE  # top left
    tolerance: int = 3  # gray levels


class TarHazard(NamedTuple):
    """A tar, and what is left of it for a reader."""

    tar: bytes
    images: list[tuple[str, bytes]]  # names as they stand in keys, and contents, in order
    skipped: dict[str, int]


@functools.cache
def hazards() -> dict[str, Hazard]:
    """File name -> hazard. The names have the suffixes that such files are met with, right or wrong."""
    return {
        **_no_images(),
        **_cut(),
        **_damaged(),
        **_bombs(),
        **_jpegs(),
        **_samples(),
        **_frames(),
        **_orientations(),
        **_names_and_neighbours(),
    }


# How such files are made


def flag() -> Image.Image:
    """Orange, with a blue field at the top left: no two of its eight orientations look alike."""
    image = Image.new("RGB", (WIDTH, HEIGHT), ORANGE)
    image.paste(BLUE, (0, 0, 16, 16))
    return image


def encode(image, form, **options):
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image.squeeze())
    image.save(file, form, **options)
    return file.getvalue()


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_png_chunks(encoded, *chunks):
    return encoded[:33] + b"".join(chunks) + encoded[33:]  # right behind IHDR


def with_jpeg_segment(encoded, marker, content):
    return encoded[:2] + struct.pack(">HH", marker, len(content) + 2) + content + encoded[2:]


def with_size(encoded, at, layout, size=30_000):
    """The file with another height and width in its header."""
    changed = bytearray(encoded)
    struct.pack_into(layout, changed, at, size, size)
    return bytes(changed)


def tiff(samples, bits, size=0, tile=0, more=()):
    """An uncompressed grayscale TIFF, such as Pillow does not write: of few bits, or with lies in its header."""
    height, width = (size, size) if size else samples.shape
    data = samples.tobytes()
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 277: 1, 278: height, 279: len(data)}
    if tile:
        entries |= {322: tile, 323: tile, 325: len(data)}
    listed = [(tag, 4, 1, value) for tag, value in entries.items()] + list(more)
    offset = 10 + 12 * (len(listed) + 2) + 4
    listed += [(273, 4, 1, offset), *([(324, 4, 1, offset)] if tile else [])]
    directory = b"".join(struct.pack("<HHII", *entry) for entry in sorted(listed))
    return (struct.pack("<2sHIH", b"II", 42, 8, len(listed)) + directory).ljust(offset, b"\0") + data


def exif(orientation):
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def run_length_bmp(height, width, runs):
    """Of two colours, orange and blue. A run is its length and colour; lines are stored from the bottom."""
    palette = bytes([*ORANGE[::-1], 0, *BLUE[::-1], 0])
    offset = 54 + len(palette)
    file = struct.pack("<2sIHHI", b"BM", offset + len(runs), 0, 0, offset)
    return file + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(runs), 0, 0, 2, 0) + palette + runs


def many_scans(encoded, count):
    """A progressive JPEG whose last scan comes again and again: each a pass over all pixels, in 14 bytes."""
    last = encoded.rindex(b"\xff\xda")
    header = encoded[last : last + 2 + encoded[last + 3]]
    return encoded[:-2] + (header + b"\0") * count + encoded[-2:]


def arithmetic_jpeg():
    """Gray, 8 x 8 px: the arithmetic code of a block without coefficients is zeros, which need not be written."""
    tables = struct.pack(">HHB", 0xFFDB, 67, 0) + bytes([1] * 64)
    frame = struct.pack(">HHBHHBBBB", 0xFFC9, 11, 8, 8, 8, 1, 1, 0x11, 0)
    scan = struct.pack(">HHBBBBBB", 0xFFDA, 8, 1, 1, 0, 0, 63, 0)
    return b"\xff\xd8" + tables + frame + scan + b"\0\0\xff\xd9"


def ycck_jpeg():
    """As Adobe writes it: inks as if they were colours in YCbCr, and black, all of it inverted."""
    inks = flag().convert("CMYK").split()
    ycbcr = Image.merge("RGB", inks[:3]).convert("YCbCr").split()
    stored = Image.merge("CMYK", [*(plane.point(lambda value: 255 - value) for plane in ycbcr), inks[3]])
    encoded = encode(stored, "JPEG", quality=95)
    return encoded.replace(b"Adobe\0\x64\0\0\0\0\0", b"Adobe\0\x64\0\0\0\0\2")


# The set


def _bad(status, **files):
    return {name: Hazard(encoded, status, None) for name, encoded in files.items()}


def _no_images():
    html, svg = b"<!DOCTYPE html><title>404 Not Found</title>", b'<svg xmlns="http://www.w3.org/2000/svg"/>'
    others = {
        "html.jpg": html,
        "svg.svg": svg,
        "pdf.png": b"%PDF-1.7 ",
        "zeros.jpg": bytes(1000),
        "bitmap.bmp": b"BMW is no bitmap",
        "sound.webp": b"RIFF\x24\0\0\0WAVEfmt ",
        "heic.jpg": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        "avif.avif": b"\0\0\0\x18ftypavif\0\0\0\0mif1avif",
        "icon.ico": encode(flag(), "ICO"),
        "pixmap.ppm": encode(flag(), "PPM"),
        "jpeg2000.jp2": encode(flag(), "JPEG2000"),
    }
    return _bad(Status.EMPTY, **{"zero-bytes.jpg": b""}) | _bad(Status.UNSUPPORTED, **others)


def _cut():
    whole = {
        "jpg": encode(flag(), "JPEG"),
        "progressive.jpg": encode(flag(), "JPEG", progressive=True),
        "cmyk.jpg": encode(flag().convert("CMYK"), "JPEG"),
        "png": encode(flag(), "PNG"),
        "webp": encode(flag(), "WEBP"),
        "gif": encode(flag(), "GIF"),
        "bmp": encode(flag(), "BMP"),
        "tif": encode(flag(), "TIFF"),
        "lzw.tif": encode(flag(), "TIFF", compression="tiff_lzw"),
    }
    cut = {f"half.{name}": file[: len(file) // 2] for name, file in whole.items()}
    cut |= {f"start.{name}": file[:7] for name, file in whole.items()}
    return _bad(Status.TRUNCATED, **cut, **{"no-end.jpg": whole["jpg"][:-2]})


def _damaged():
    jpeg, png, webp = encode(flag(), "JPEG"), encode(flag(), "PNG"), encode(flag(), "WEBP", lossless=True)
    gray_tiff = tiff(np.full((HEIGHT, WIDTH), 90, np.uint8), 8)
    scan = jpeg.index(b"\xff\xda")
    broken_scan = jpeg[: scan + 20] + bytes(3) + jpeg[scan + 23 :]
    undecodable = {
        "no-pixels.png": png.replace(b"IDAT", b"IDAX"),
        "checksum.png": png[:-20] + bytes([png[-20] ^ 1]) + png[-19:],
        "no-frame.jpg": jpeg[:scan].replace(b"\xff\xc0", b"\xff\xc7") + jpeg[scan:],
        "no-tables.jpg": jpeg[:2] + jpeg[jpeg.index(b"\xff\xc0") : scan] + jpeg[scan:],
        "twelve-bit.jpg": jpeg.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c"),
        "zeros.webp": webp[:20] + bytes(len(webp) - 20),
        "missing-strips.tif": gray_tiff.replace(
            struct.pack("<HHII", 257, 4, 1, HEIGHT), struct.pack("<HHII", 257, 4, 1, 2 * HEIGHT)
        ),
        "no-entries.tif": struct.pack("<2sHIHI", b"II", 42, 8, 0, 0) + bytes(100),
    }
    whole = {"broken-scan.jpg": Hazard(broken_scan, Status.OK, tolerance=255)}
    return _bad(Status.UNDECODABLE, **undecodable) | whole


def _bombs():
    jpeg, cmyk = encode(flag(), "JPEG"), encode(flag().convert("CMYK"), "JPEG")
    png, one = encode(flag(), "PNG"), np.zeros((1, 1), np.uint8)
    huge_ihdr = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    too_large = {
        "pixel-bomb.jpg": with_size(jpeg, jpeg.index(b"\xff\xc0") + 5, ">HH"),
        "pixel-bomb-cmyk.jpg": with_size(cmyk, cmyk.index(b"\xff\xc0") + 5, ">HH"),
        "pixel-bomb.png": png[:8] + huge_ihdr + png[33:],
        "pixel-bomb.gif": with_size(encode(flag(), "GIF"), 6, "<HH"),
        "pixel-bomb.bmp": with_size(encode(flag(), "BMP"), 18, "<ii"),
        "pixel-bomb.webp": b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + 2 * (29_999).to_bytes(3, "little"),
        "pixel-bomb.tif": tiff(one, 8, size=30_000),
        "pixel-bomb-tile.tif": tiff(one, 8, tile=30_000),
        "run-length-bomb.bmp": run_length_bmp(10_000, 10_000, b"\1\0\0\0" * 10_000),  # each line is filled up
        "thousand-scans.jpg": many_scans(encode(flag(), "JPEG", progressive=True), 1000),
    }
    bomb = zlib.compress(bytes(20 << 20), 1)
    rows = zlib.decompress(png[png.index(b"IDAT") + 4 : -16])
    gif = encode(flag().quantize(2), "GIF")
    behind_palette = 13 + 3 * 2 ** ((gif[10] & 7) + 1)
    comment = b"\x21\xfe" + (b"\xff" + b"x" * 255) * 2000 + b"\0"
    harmless = {
        "text-bomb.png": with_png_chunks(png, png_chunk(b"zTXt", b"a\0\0" + bomb)),
        "unicode-text-bomb.png": with_png_chunks(png, png_chunk(b"iTXt", b"a\0\1\0\0\0" + bomb)),
        "profile-bomb.png": with_png_chunks(png, png_chunk(b"iCCP", b"a\0\0" + bomb)),
        "zlib-bomb.png": png[:33] + png_chunk(b"IDAT", zlib.compress(rows + bytes(20 << 20))) + png_chunk(b"IEND", b""),
        "comment-bomb.gif": gif[:behind_palette] + comment + gif[behind_palette:],
    }
    gray = np.full((HEIGHT, WIDTH), 90, np.uint8)
    tags = [(40_000 + tag, 1, 1000, 8) for tag in range(300)]  # all of them the same bytes of the file
    tags_bomb = Hazard(tiff(gray, 8, more=tags), Status.OK, centre=(90, 90, 90), corner=(90, 90, 90))
    return (
        _bad(Status.TOO_LARGE, **too_large)
        | {name: Hazard(encoded, Status.OK) for name, encoded in harmless.items()}
        | {"tags-bomb.tif": tags_bomb}
    )


def _jpegs():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    jpeg = encode(flag(), "JPEG", quality=95, subsampling=0)
    gray = (128, 128, 128)
    lossy = {
        "baseline.jpg": jpeg,
        "progressive.jpg": encode(flag(), "JPEG", quality=95, progressive=True),
        "restart-markers.jpg": encode(flag(), "JPEG", quality=95, restart_marker_blocks=1),
        "rgb.jpg": encode(flag(), "JPEG", quality=95, keep_rgb=True),
        "cmyk.jpg": encode(flag().convert("CMYK"), "JPEG", quality=95),
        "ycck.jpg": ycck_jpeg(),
        "profile.jpg": encode(flag(), "JPEG", quality=95, icc_profile=profile),
        "broken-profile.jpg": with_jpeg_segment(jpeg, 0xFFE2, b"ICC_PROFILE\0\x09\x01not a profile"),
        "many-comments.jpg": jpeg[:2] + b"\xff\xfe\0\x03x" * 5000 + jpeg[2:],
    }
    arithmetic = Hazard(arithmetic_jpeg(), Status.OK, (8, 8), gray, gray)
    return {name: Hazard(file, Status.OK, tolerance=12) for name, file in lossy.items()} | {
        "arithmetic.jpg": arithmetic
    }


def _samples():
    """Other samples than three of 8 bits."""
    array = np.asarray(flag())
    gray = np.asarray(flag().convert("L"))
    clear = flag().convert("RGBA")
    clear.paste((0, 0, 0, 0), (0, 0, 16, 16))
    palette = flag().quantize(2)
    blue = palette.getpixel((0, 0))
    deep_rows = b"".join(b"\0" + row.tobytes() for row in (array.astype(">u2") * 257).reshape(HEIGHT, -1))
    deep = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0)
    deep_rgb = png_chunk(b"IHDR", deep) + png_chunk(b"IDAT", zlib.compress(deep_rows)) + png_chunk(b"IEND", b"")
    big_endian = Image.frombytes("I;16B", (WIDTH, HEIGHT), (gray.astype(">u2") * 257).tobytes())
    lab = ImageCms.applyTransform(
        flag(), ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    )
    grays = {
        "16-bit.png": encode(gray.astype(np.uint16) * 257, "PNG"),
        "16-bit-big-endian.tif": encode(big_endian, "TIFF"),
        "float.tif": encode(gray.astype(np.float32) / 255, "TIFF"),
        "32-bit.tif": encode(gray.astype(np.int32) * 257, "TIFF"),
        "gray-alpha.png": encode(flag().convert("LA"), "PNG"),
    }
    one_bit = Image.fromarray(gray > 100)
    black_and_white = {
        "1-bit.png": encode(one_bit, "PNG"),
        "fax.tif": encode(one_bit, "TIFF", compression="group4"),
        "1-bit.bmp": encode(one_bit, "BMP"),
    }
    on_white = {
        "palette-transparency.png": encode(palette, "PNG", transparency=blue),
        "palette-transparency.gif": encode(palette, "GIF", transparency=blue),
        "alpha.png": encode(clear, "PNG"),
        "alpha.webp": encode(clear, "WEBP", lossless=True),
        "alpha.tif": encode(clear, "TIFF"),
    }
    of_gray = {"centre": (int(gray[20, 30]),) * 3, "corner": (int(gray[0, 0]),) * 3}
    return {
        "16-bit-rgb.png": Hazard(b"\x89PNG\r\n\x1a\n" + deep_rgb, Status.OK),
        "lab.tif": Hazard(encode(lab, "TIFF"), Status.OK, tolerance=8),
        "jpeg-inside.tif": Hazard(encode(flag(), "TIFF", compression="jpeg", quality=95), Status.OK, tolerance=12),
        "palette.png": Hazard(encode(palette, "PNG"), Status.OK),
        "palette.bmp": Hazard(encode(palette, "BMP"), Status.OK),
        "run-length.bmp": Hazard(
            run_length_bmp(HEIGHT, WIDTH, b"\x30\0\0\0" * 16 + b"\x10\1\x20\0\0\0" * 16), Status.OK
        ),
        **{name: Hazard(file, Status.OK, **of_gray) for name, file in grays.items()},
        **{
            name: Hazard(file, Status.OK, centre=(255, 255, 255), corner=(0, 0, 0))
            for name, file in black_and_white.items()
        },
        **{name: Hazard(file, Status.OK, corner=(255, 255, 255)) for name, file in on_white.items()},
    }


def _frames():
    second = {"save_all": True, "append_images": [Image.new("RGB", (WIDTH, HEIGHT), "green")]}
    files = {
        "animated.gif": encode(flag(), "GIF", **second),
        "animated.png": encode(flag(), "PNG", **second),
        "animated.webp": encode(flag(), "WEBP", lossless=True, **second),
        "pages.tif": encode(flag(), "TIFF", **second),
        "mpo.jpg": encode(flag(), "MPO", quality=95, subsampling=0, **second),
        "broken-animation.png": with_png_chunks(
            encode(flag(), "PNG"), png_chunk(b"acTL", b""), png_chunk(b"fcTL", b"x")
        ),
    }
    return {name: Hazard(file, Status.OK, tolerance=6) for name, file in files.items()}


def _orientations():
    found = {}
    for orientation in range(1, 9):
        size = (HEIGHT, WIDTH) if orientation < 5 else (WIDTH, HEIGHT)
        corner = BLUE if orientation in (1, 5) else ORANGE
        for form, suffix in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("TIFF", "tif")):
            encoded = encode(flag(), form, exif=exif(orientation), **_EXACT[form])
            found[f"exif-{orientation}.{suffix}"] = Hazard(encoded, Status.OK, size, corner=corner, tolerance=6)
    jpeg = encode(flag(), "JPEG", **_EXACT["JPEG"])
    loop = b"Exif\0\0II*\0" + struct.pack("<IHHHIII", 8, 1, 0x8769, 4, 1, 8, 8)  # a directory that contains itself
    broken = {
        "broken-exif.jpg": with_jpeg_segment(jpeg, 0xFFE1, b"Exif\0\0II*\0\xff\xff\xff\xff"),
        "exif-in-a-loop.jpg": with_jpeg_segment(jpeg, 0xFFE1, loop),
        "exif-9.jpg": encode(flag(), "JPEG", exif=exif(9), **_EXACT["JPEG"]),
        "broken-exif.png": with_png_chunks(encode(flag(), "PNG"), png_chunk(b"eXIf", b"MM\0*\0\0\0\x08\xff\xff")),
    }
    turned = with_jpeg_segment(found["exif-6.jpg"].encoded, 0xFFE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta/>")
    return {
        **found,
        **{name: Hazard(file, Status.OK, tolerance=6) for name, file in broken.items()},
        "exif-behind-xmp.jpg": found["exif-6.jpg"]._replace(encoded=turned),
    }


_EXACT = {"JPEG": {"quality": 95, "subsampling": 0}, "PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}}


def _names_and_neighbours():
    jpeg, png = encode(flag(), "JPEG", **_EXACT["JPEG"]), encode(flag(), "PNG")
    green = Image.new("RGB", (99, 99), "green")
    found = {
        "png-as.jpg": png,
        "jpeg-as.png": jpeg,
        "text.txt": png,
        "without-a-suffix": jpeg,
        "garbage-behind.jpg": jpeg + b"\0\xff<html>" * 1000,
        "garbage-behind.png": png + b"\0\xff<html>" * 1000,
        "two-in-one.jpg": jpeg + encode(green, "JPEG"),
        "two-in-one.png": png + encode(green, "PNG"),
        "a-zip-behind.gif": encode(flag().quantize(2), "GIF") + b"PK\x05\x06" + bytes(18),
        "video-behind-progressive.jpg": encode(flag(), "JPEG", progressive=True, **_EXACT["JPEG"])
        + b"\xff\xda\0\x08" * 2000,
    }
    hazards = {name: Hazard(file, Status.OK, tolerance=6) for name, file in found.items()}
    orange = {"centre": ORANGE, "corner": ORANGE, "tolerance": 6}
    for height, width in ((1, 1), (1, 20_000), (20_000, 1)):
        line = Image.new("RGB", (width, height), ORANGE)
        for form, suffix in (("PNG", "png"), ("JPEG", "jpg")):
            hazards[f"{height}x{width}.{suffix}"] = Hazard(encode(line, form), Status.OK, (height, width), **orange)
    return hazards


def tar_of_hazards() -> TarHazard:
    """Names and members that must not be believed: nothing is ever written to where they point."""
    one, two = encode(flag(), "PNG"), encode(flag().rotate(180), "PNG")
    images = {
        "again.png": one,
        "/absolute.png": one,
        "../../above.png": two,
        "a/../b.png": two,
        "line\nbreak.png": one,
        "n" * 200 + ".png": two,
        "": one,
    }
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.GNU_FORMAT, encoding="utf-8") as tar:
        for name, encoded in [*images.items(), ("again.png", two), ("caf\udce9.png", one), ("._again.png", one)]:
            info = tarfile.TarInfo(name)
            info.size = len(encoded)
            tar.addfile(info, io.BytesIO(encoded))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo("link.png")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    found = [*images.items(), ("again.png", two), ("caf?.png", one)]
    return TarHazard(sink.getvalue(), found, {"hidden": 1, "links in tars": 4})


def sparse_tar() -> bytes:
    """One member of which the tar holds two pieces, and says that zeros lie around them (GNU, old format)."""
    info = tarfile.TarInfo("sparse.png")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 1024
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (1 << 20, 512)
    header[410:434] = b"%011o\0%011o\0" % (2 << 20, 512)
    header[482:495] = b"\0%011o\0" % (3 << 20)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + b"x" * 1024 + bytes(1024)
