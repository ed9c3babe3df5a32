"""What image files say about themselves, read from their bytes alone: no decoder, and nothing raised."""

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
)


def format_of(encoded: bytes) -> str | None:
    """The format that the first bytes announce."""
    if encoded.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if encoded.startswith(b"RIFF") and encoded[8:12] == b"WEBP":
        return "WEBP"
    if encoded.startswith(b"BM") and not any(encoded[15:18]):  # the length of its header; a text has letters
        return "BMP"
    return next((name for signature, name in _SIGNATURES if encoded.startswith(signature)), None)


def may_become(encoded: bytes) -> bool:
    """Whether these bytes, of no known format, are the first few of one."""
    if len(encoded) < 12 and b"RIFF".startswith(encoded[:4]) and b"WEBP".startswith(encoded[8:]):
        return True
    return any(start.startswith(encoded) for start in (b"\xff\xd8\xff", b"BM", *dict(_SIGNATURES)))


class JpegHeader(NamedTuple):
    """What comes before the first scan of a JPEG."""

    height: int
    width: int
    components: int
    exif: bytes
    many_scans: bool  # one scan does not hold the whole picture


def jpeg_header(encoded: bytes) -> JpegHeader | None:
    """The header of a JPEG (ITU-T T.81, annex B); None where it is anything but plain and in order.

    What it takes for plain leaves no two ways to read it, so that no decoder can find another size there.
    """
    frame, progressive, exif, at = None, False, b"", 2
    try:
        while True:
            marker, length = _SEGMENT.unpack_from(encoded, at)
            body = at + 4
            at += 2 + length
            if marker in _FRAMES and frame is None:
                frame = _FRAME.unpack_from(encoded, body)
                progressive = marker == 0xFFC2
            elif marker == 0xFFE1 and encoded.startswith(b"Exif\0\0", body):  # others are XMP
                exif = exif or encoded[body:at]
            elif marker == 0xFFDA and frame:
                _, height, width, components = frame
                many_scans = progressive or encoded[body] != components
                return JpegHeader(height, width, components, exif, many_scans) if height and width else None
            elif marker not in _PASSED or length < 2:
                return None
    except (struct.error, IndexError):
        return None


def jpeg_scans(encoded: bytes) -> int:
    """The scans that a decoder finds in a JPEG: what looks like one in a segment or behind the end is none."""
    scans, at = 0, 2
    while found := _MARKER.search(encoded, at):
        marker, at = found[1][0], found.end()
        if marker == 0xD9:
            break
        scans += marker == 0xDA
        if marker >= 0xC0:
            at += int.from_bytes(encoded[at : at + 2], "big")
    return scans


_MARKER = re.compile(rb"\xff([^\x00\x01\xff\xd0-\xd7])")  # not stuffed, and not one that stands alone within a scan
_SEGMENT = struct.Struct(">HH")  # marker, length
_FRAME = struct.Struct(">BHHB")  # bits, height, width, components
_FRAMES = frozenset((0xFFC0, 0xFFC1, 0xFFC2))
_PASSED = frozenset((0xFFC4, 0xFFDB, 0xFFDD, *range(0xFFE0, 0xFFF0), 0xFFFE))  # tables, APPn, comments


def png_essentials(encoded: bytes) -> tuple[bytes, bytes]:
    """A PNG without the chunks that make no pixels, and the EXIF block that was among those.

    Texts and profiles may be bombs, broken or out of place, and must not cost an image its row. Of an
    animation the default image is left.
    """
    kept, exif, at = [encoded[:8]], b"", 8
    while at + 8 <= len(encoded):
        length, kind = struct.unpack_from(">I4s", encoded, at)
        end = at + length + 12
        if kind == b"eXIf":
            exif = encoded[at + 8 : end - 4]
        elif kind == b"tRNS" or not kind[0] & 0x20:  # the first letter of critical chunks is a capital
            kept.append(encoded[at:end])
        at = end
        if kind == b"IEND":
            break
    return b"".join(kept), exif


def png_size(encoded: bytes) -> tuple[int, int]:
    """Height and width of a PNG, which its first chunk has to hold; (0, 0) where that is another."""
    if encoded[12:16] != b"IHDR" or len(encoded) < 24:
        return 0, 0
    width, height = struct.unpack_from(">II", encoded, 16)
    return height, width


def webp_canvas(encoded: bytes) -> tuple[int, int]:
    """Height and width of an extended WebP (RFC 9649, 2.7); (0, 0) for others, which end at 16384 px."""
    if encoded[12:16] != b"VP8X" or len(encoded) < 30:
        return 0, 0
    width, height = (int.from_bytes(encoded[at : at + 3], "little") + 1 for at in (24, 27))
    return height, width


def orientation(exif: bytes) -> int:
    """Tag 0x0112 of an EXIF block, 1..8; 1 (upright) where it is missing or broken."""
    if not exif:
        return 1
    try:
        for tag, kind, _, value in _entries(exif.removeprefix(b"Exif\0\0")):
            if tag == 0x0112:
                return value if kind == 3 and 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def ends_early(name: str, encoded: bytes) -> bool:
    """Whether the file announces more bytes than it has, or does not reach where its pixels begin."""
    match name:
        case "JPEG":
            return b"\xff\xda" not in encoded
        case "PNG":
            return b"IEND" not in encoded
        case "WEBP":
            return int.from_bytes(encoded[4:8], "little") + 8 > len(encoded)
        case "TIFF":
            return _tiff_ends_early(encoded)
    return False


def _tiff_ends_early(encoded: bytes) -> bool:
    order = "little" if encoded.startswith(b"II") else "big"
    ends, last = [0], {}
    try:
        for tag, kind, count, value in _entries(encoded):
            width = {3: 2, 4: 4, 5: 8}.get(kind, 1)  # SHORT, LONG, RATIONAL; in bytes
            size = width * count
            if size > 4:  # the values lie elsewhere, at an offset
                ends.append(value + size)
                value = int.from_bytes(encoded[value + size - width : value + size], order)
            last[tag] = value
    except struct.error:
        return True
    for offsets, sizes in ((273, 279), (324, 325)):  # of strips, of tiles
        ends.append(last.get(offsets, 0) + last.get(sizes, 0))
    return max(ends) > len(encoded)


def _entries(tiff: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Tag, type, count and value (or its offset) from a TIFF's first directory (TIFF 6.0, section 2).

    struct.error where the bytes end before it does; nothing for a BigTIFF.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return
    (start,) = struct.unpack_from(order + "I", tiff, 4)
    (entries,) = struct.unpack_from(order + "H", tiff, start)
    for at in range(start + 2, start + 2 + 12 * entries, 12):
        tag, kind, count = struct.unpack_from(order + "HHI", tiff, at)
        (value,) = struct.unpack_from(order + ("Hxx" if kind == 3 and count == 1 else "I"), tiff, at + 8)
        yield tag, kind, count, value
