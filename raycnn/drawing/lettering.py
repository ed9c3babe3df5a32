"""Text on pictures: letters that the font of this machine has, cut off where they would not fit."""

import functools
import unicodedata
from bisect import bisect_left
from contextlib import suppress
from typing import Any, cast

from PIL import ImageFont

FONTS = ("NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "DejaVuSans.ttf", "Arial Unicode.ttf")
"""Looked for on this machine for what Pillow's own font has no letters for."""

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def written(words: str, size: int) -> tuple[str, Font]:
    """The words on one line, in letters that the font has, and the font."""
    words = "".join(letter if letter.isprintable() else "?" for letter in words)
    if words.isascii():
        return words, _font(size, False)
    return "".join(_known(letter, size) for letter in words), _font(size, True)


@functools.cache
def _font(size: int, has_many_letters: bool) -> Font:
    for name in FONTS if has_many_letters else ():
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


@functools.lru_cache(4096)
def _known(letter: str, size: int) -> str:
    """The letter, or what comes near it where the font does not have it."""
    if letter.isascii() or letter.isspace() or _glyph(letter, size) != _glyph("\U0010ffff", size):
        return letter
    return unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode() or "?"


def _glyph(letter: str, size: int) -> bytes:
    return bytes(cast(Any, _font(size, True).getmask(letter)))


def shortened(words: str, size: int, width: float, keep_end: bool = False) -> str:
    """The words, with dots for their end (or for their start) where they are wider than `width` px."""
    words, font = written(words, size)
    if font.getlength(words) <= width:
        return words

    def without(count: int) -> str:
        return "..." + words[count:] if keep_end else words[: len(words) - count] + "..."

    return without(bisect_left(range(len(words)), True, key=lambda count: font.getlength(without(count)) <= width))
