"""Text on pictures: letters that the font of this machine has, cut off where they would not fit."""

import unicodedata
from contextlib import suppress
from typing import Any, cast

from PIL import ImageFont

FONTS = ("NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "DejaVuSans.ttf", "Arial Unicode.ttf")
"""Looked for on this machine for what Pillow's own font has no letters for."""

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def written(words: str, size: int) -> tuple[str, Font]:
    """The words on one line, in letters that the font has, and the font."""
    words = "".join(letter if letter.isprintable() else "?" for letter in words)
    font = ImageFont.load_default(size)
    if words.isascii():
        return words, font
    for name in FONTS:
        with suppress(OSError):
            font = ImageFont.truetype(name, size)
            break

    def glyph(letter: str) -> bytes:
        return bytes(cast(Any, font.getmask(letter)))

    unknown = glyph("\U0010ffff")

    def known(letter: str) -> str:
        if letter.isascii() or letter.isspace() or glyph(letter) != unknown:
            return letter
        return unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode() or "?"

    return "".join(map(known, words)), font


def shortened(words: str, size: int, width: float, keep_end: bool = False) -> str:
    """The words, with dots for their end (or for their start) where they are wider than `width` px."""
    words, font = written(words, size)
    if font.getlength(words) <= width:
        return words
    while words and font.getlength(words + "...") > width:
        words = words[1:] if keep_end else words[:-1]
    return "..." + words if keep_end else words + "..."
