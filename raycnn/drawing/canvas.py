"""A PNG on white, 1,600 px wide, that grows downwards while it is drawn."""

import io

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from raycnn.drawing.lettering import shortened, written

WIDTH = 1600
MARGIN = 48
LEGEND_WIDTH = 240
MOST_HEIGHT = 8000
TITLE_HEIGHT = 124

Colour = tuple[int, int, int]
INK, QUIET, FRAME, GROUND, WARNING = (23, 28, 38), (98, 106, 120), (214, 218, 226), (240, 242, 246), (178, 24, 43)
NEGATIVE, POSITIVE = (33, 102, 172), (178, 24, 43)
DIVERGING = ((5, 48, 97), NEGATIVE, (146, 197, 222), (255, 255, 255), (244, 165, 130), POSITIVE, (103, 0, 31))

Raster = npt.NDArray[np.uint8]
"""(H, W, 3) sRGB."""


class Canvas:
    """A picture with a title; `y` is where the next thing is drawn."""

    def __init__(self, title: str, note: str) -> None:
        """A title and a remark below it; `MOST_HEIGHT` px are left for what follows."""
        self._image = Image.new("RGB", (WIDTH, MOST_HEIGHT), "white")
        self.draw = ImageDraw.Draw(self._image)
        self.y = MARGIN
        self._bottom = 0
        self.fitted(MARGIN, self.y, title, 40, WIDTH - 3 * MARGIN - LEGEND_WIDTH)
        self.fitted(MARGIN, self.y + 56, note, 26, WIDTH - 3 * MARGIN - LEGEND_WIDTH, colour=QUIET)
        self.y += TITLE_HEIGHT

    def text(self, x: float, y: float, words: str, size: int, colour: Colour = INK, anchor: str = "lt") -> None:
        """One line of text; `anchor` is Pillow's."""
        words, font = written(words, size)
        self.draw.text((x, y), words, fill=colour, font=font, anchor=anchor)

    def length(self, words: str, size: int) -> float:
        """The width of a line of text in px."""
        words, font = written(words, size)
        return font.getlength(words)

    def fitted(
        self,
        x: float,
        y: float,
        words: str,
        size: int,
        width: float,
        anchor: str = "lt",
        colour: Colour = INK,
        keep_end: bool = False,
    ) -> None:
        """Text that is cut off with dots at its end, or at its start, where it is wider than `width`."""
        self.text(x, y, shortened(words, size, width, keep_end), size, colour, anchor)

    def upright(self, x: float, bottom: float, words: str, size: int, height: float, colour: Colour = INK) -> None:
        """Text that is read upwards, from `bottom` on, with its middle at `x`; cut off beyond `height`."""
        words, font = written(shortened(words, size, height), size)
        left, top, right, low = (int(edge) for edge in font.getbbox(words, anchor="ls"))
        if right <= left or low <= top:
            return
        strip = Image.new("RGB", (right - left + 2, size + size // 2), "white")
        ImageDraw.Draw(strip).text((1 - left, size), words, fill=colour, font=font, anchor="ls")
        turned = strip.transpose(Image.Transpose.ROTATE_90)
        self._image.paste(turned, (round(x - 0.65 * size), round(bottom - turned.height)))

    def legend(self, limit: float | None) -> None:
        """The scale of `diverging`, top right, with its ends where they are the same for the whole picture."""
        width, height = LEGEND_WIDTH, 20
        left, top = WIDTH - MARGIN - width, MARGIN + 8
        ramp = diverging(np.linspace(-1, 1, width)[None])
        self.paste(ramp, left, top, width, height)
        ends = ("negative", "positive") if limit is None else (f"-{limit:.2g}", f"+{limit:.2g}")
        for x, words, anchor in ((left, ends[0], "lt"), (left + width // 2, "0", "mt"), (left + width, ends[1], "rt")):
            self.text(x, top + height + 10, words, 22, QUIET, anchor)

    def label(self, name: str, *lines: str) -> None:
        """A name and remarks, left of what is drawn next."""
        self.text(MARGIN, self.y, name, 28)
        for i, line in enumerate(lines):
            self.text(MARGIN, self.y + 38 + 26 * i, line, 20, QUIET)
        self._bottom = self.y + 38 + 26 * len(lines)

    def paste(self, raster: Raster, x: int, y: int, width: int, height: int) -> None:
        """A raster at that size, framed."""
        # Small ones keep their pixels visible; large ones are averaged.
        grows = raster.shape[0] <= height and raster.shape[1] <= width
        kernel = Image.Resampling.NEAREST if grows else Image.Resampling.BOX
        self._image.paste(Image.fromarray(raster).resize((width, height), kernel), (x, y))
        self.draw.rectangle((x - 1, y - 1, x + width, y + height), outline=FRAME)

    def paste_within(self, raster: Raster, x: int, y: int, side: int) -> None:
        """A raster as large as fits into a square, in its middle."""
        height, width = raster.shape[:2]
        scale = side / max(height, width)
        box = (max(1, round(width * scale)), max(1, round(height * scale)))
        self.draw.rectangle((x - 1, y - 1, x + side, y + side), fill=GROUND)
        self.paste(raster, x + (side - box[0]) // 2, y + (side - box[1]) // 2, *box)

    def paste_smooth(self, image: Image.Image, x: int, y: int, factor: int) -> None:
        """A drawing that was made so many times as large, with edges that are smooth now."""
        self._image.paste(image.reduce(factor), (x, y))

    def tiles(self, left: int, tiles: list[Raster], columns: int, size: int, gap: int) -> None:
        """Rasters in rows, each at most `size` px wide and high."""
        height, width = tiles[0].shape[:2]
        scale = size / max(height, width)
        box = (max(1, round(width * scale)), max(1, round(height * scale)))
        for i, tile in enumerate(tiles):
            x = left + i % columns * (size + gap)
            self.paste(tile, x, self.y + i // columns * (box[1] + gap), *box)
        self.advance(-(-len(tiles) // columns) * (box[1] + gap))

    def advance(self, height: int) -> None:
        """What was drawn last is so high."""
        self.y = max(self.y + height, self._bottom) + 28
        self._bottom = 0

    def png(self, colours: int | None = None) -> bytes:
        """The picture, cut off below what was drawn; with `colours` reduced to so many, which takes less space."""
        sink, image = io.BytesIO(), self._image.crop((0, 0, WIDTH, self.y + MARGIN - 28))
        (image.quantize(colours) if colours else image).save(sink, "PNG", optimize=colours is not None)
        return sink.getvalue()


def diverging(values: npt.NDArray[np.floating]) -> Raster:
    """Values in [-1, 1] (H, W) as colours, blue to white to red; beyond is the end's colour."""
    stops = np.linspace(-1, 1, len(DIVERGING))
    channels = [np.interp(values, stops, [c[i] for c in DIVERGING]) for i in range(3)]
    return np.round(np.stack(channels, axis=-1)).astype(np.uint8)


def limit_of(values: npt.NDArray[np.float32]) -> float:
    """The end of a scale: nearly the largest value, so that a lonely one does not pale all others."""
    return float(np.quantile(np.abs(values), 0.999)) or 1.0


def encoded(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Pixels (H, W, 1 or 3) as a PNG."""
    sink = io.BytesIO()
    Image.fromarray(rgb(pixels)).save(sink, "PNG")
    return sink.getvalue()


def rgb(pixels: npt.NDArray[np.uint8]) -> Raster:
    """Pixels (H, W, 1 or 3) in colour."""
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels
