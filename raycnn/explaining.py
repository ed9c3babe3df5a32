"""What a network has learned, as pictures: its first filters, and what they make of one image.

Blue is negative, white is zero, red is positive, on one scale for a whole layer: after a ReLU no blue is left.
Both pictures are PNG on white, 1,600 px wide.
"""

import io
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from raycnn import images
from raycnn.bundle import Bundle
from raycnn.errors import Bad, DataError
from raycnn.models import feature_maps, first_filters
from raycnn.reporting.lettering import shortened, written

WIDTH = 1600
MARGIN = 48
LABEL_WIDTH = 250
"""Left of the maps: the layer's name and what it does."""
GAP, FILTER_GAP = 6, 20
TILE = 72
"""A feature map's side; half of it where there are many small ones."""
MAPS_WIDTH = 16 * (TILE + GAP) - GAP
FINE_SIDE = 16
"""Maps with more pixels than this on a side are never drawn at half size."""
MAX_TILES = 64
MAX_BARS = 10
ROW = 36
"""Height of a bar and the gap below it."""
LEGEND_WIDTH = 240

INK, QUIET, FRAME = (23, 28, 38), (98, 106, 120), (214, 218, 226)
TROUGH, SHARE = (240, 242, 246), (66, 88, 130)
NEGATIVE, POSITIVE = (33, 102, 172), (178, 24, 43)
DIVERGING = ((5, 48, 97), NEGATIVE, (146, 197, 222), (255, 255, 255), (244, 165, 130), POSITIVE, (103, 0, 31))

_WHAT = {"conv": "convolution", "relu": "ReLU", "pool": "max pooling", "flatten": "one long vector"}

Raster = npt.NDArray[np.uint8]
"""(H, W, 3) sRGB."""


def filters_picture(bundle: Bundle) -> bytes:
    """The learned kernels of the first convolution as a PNG: in colour where they look at colours."""
    kernels = first_filters(bundle.classifier).float().numpy()
    count, channels, height, width = kernels.shape
    limit = _limit(kernels)
    if channels == 3:
        tiles = [_around_gray(k.transpose(1, 2, 0) / limit) for k in kernels]
    else:
        tiles = [_diverging(k.mean(axis=0) / limit) for k in kernels]
    title = f"The first layer: {count} learned filters of {height} x {width} px"
    note = "Each slides over the image and answers where the image looks like it."
    canvas = _Canvas(title, note if count <= MAX_TILES else f"{note} {MAX_TILES} of them are shown.")
    if channels == 3:
        canvas.text(WIDTH - MARGIN, MARGIN + 12, "mid-gray is zero", 24, QUIET, anchor="rt")
    else:
        canvas.legend(limit)
    columns = 8 if len(tiles) <= 24 else 16
    size = (WIDTH - 2 * MARGIN + FILTER_GAP) // columns - FILTER_GAP
    canvas.tiles(MARGIN, tiles, columns, size, FILTER_GAP)
    return canvas.png()


def feature_maps_picture(bundle: Bundle, encoded: bytes, truth: str | None = None) -> bytes:
    """One image on its way through the network as a PNG: the maps after each layer, and the votes at the end.

    Args:
        bundle: the network.
        encoded: the bytes of an image.
        truth: the name of its class, if known.

    Raises:
        DataError: the image cannot be read.
    """
    pixels = images.pixels(encoded, bundle.spec)
    if isinstance(pixels, Bad):
        raise DataError(f"the image to explain is {pixels.status}: {pixels.detail}")
    batch = torch.from_numpy(pixels)[None]
    classifier = bundle.classifier.eval()
    maps = feature_maps(classifier, batch)
    with torch.inference_mode():
        votes = classifier(batch)[0].float()
    ranking = _Ranking.of(votes, bundle)
    said = f"prediction: {ranking.names[0]}, {ranking.probabilities[0]:.1%}"
    canvas = _Canvas("One image on its way through the network", f"{said}   truth: {truth}" if truth else said)
    canvas.legend(None)
    canvas.label("input", "what the network sees", f"{pixels.shape[0]} x {pixels.shape[1]} px")
    canvas.tiles(MARGIN + LABEL_WIDTH, [_rgb(pixels)], 1, 176, GAP)
    for name, values in maps.items():
        _draw_layer(canvas, name, values[0].float())
    canvas.votes(ranking, truth)
    return canvas.png()


class _Ranking(NamedTuple):
    """The classes with the highest votes, best first."""

    names: list[str]
    votes: list[float]
    probabilities: list[float]
    classes: int

    @classmethod
    def of(cls, votes: Tensor, bundle: Bundle) -> "_Ranking":
        best = votes.argsort(descending=True, stable=True)[:MAX_BARS].tolist()
        probabilities = torch.softmax(votes.double() / bundle.temperature, 0)
        return cls(
            [bundle.class_names[i] for i in best],
            votes[best].tolist(),
            probabilities[best].tolist(),
            len(votes),
        )


def _draw_layer(canvas: "_Canvas", name: str, values: Tensor) -> None:
    """The maps (C, H, W) of a layer, or its vector as a strip; the votes have a place of their own."""
    if name == "fc":
        return
    array = values.numpy()
    limit = _limit(array)
    what = next((words for start, words in _WHAT.items() if name.startswith(start)), "convolution")
    if array.ndim == 1:
        canvas.label(name, what, f"{array.size:,} numbers")
        canvas.strip(_diverging(array[None] / limit))
        return
    count, height, width = array.shape
    shown = f"{count}" if count <= MAX_TILES else f"{MAX_TILES} of {count}"
    canvas.label(name, what, f"{shown} maps of {height} x {width}")
    tiles = [_diverging(m / limit) for m in array]
    if count <= 32 or max(height, width) > FINE_SIDE:
        canvas.tiles(MARGIN + LABEL_WIDTH, tiles, 16, TILE, GAP)
    else:
        canvas.tiles(MARGIN + LABEL_WIDTH, tiles, 32, (TILE - GAP) // 2, GAP)


class _Canvas:
    """A picture that grows downwards while it is drawn."""

    def __init__(self, title: str, note: str) -> None:
        self._image = Image.new("RGB", (WIDTH, 8000), "white")
        self._draw = ImageDraw.Draw(self._image)
        self._y = MARGIN
        self._label_bottom = 0
        self.text(MARGIN, self._y, title, 40)
        self.fitted(MARGIN, self._y + 56, note, 26, WIDTH - 3 * MARGIN - LEGEND_WIDTH, "lt", QUIET)
        self._y += 124

    def text(
        self, x: float, y: float, words: str, size: int, colour: tuple[int, int, int] = INK, anchor: str = "lt"
    ) -> None:
        words, font = written(words, size)
        self._draw.text((x, y), words, fill=colour, font=font, anchor=anchor)

    def fitted(
        self, x: float, y: float, words: str, size: int, width: float, anchor: str, colour: tuple[int, int, int] = INK
    ) -> None:
        """Text that is cut off with dots where it is wider than `width`."""
        self.text(x, y, shortened(words, size, width), size, colour, anchor)

    def legend(self, limit: float | None) -> None:
        """The colour scale, top right, with its ends where they are the same for the whole picture."""
        width, height = LEGEND_WIDTH, 20
        left, top = WIDTH - MARGIN - width, MARGIN + 8
        ramp = _diverging(np.linspace(-1, 1, width)[None])
        self._paste(ramp, left, top, width, height)
        ends = ("negative", "positive") if limit is None else (f"-{limit:.2g}", f"+{limit:.2g}")
        for x, words, anchor in ((left, ends[0], "lt"), (left + width // 2, "0", "mt"), (left + width, ends[1], "rt")):
            self.text(x, top + height + 10, words, 22, QUIET, anchor)

    def label(self, name: str, *lines: str) -> None:
        """A layer's name and remarks, left of what is drawn next."""
        self.text(MARGIN, self._y, name, 28)
        for i, line in enumerate(lines):
            self.text(MARGIN, self._y + 38 + 26 * i, line, 20, QUIET)
        self._label_bottom = self._y + 38 + 26 * len(lines)

    def tiles(self, left: int, tiles: list[Raster], columns: int, size: int, gap: int) -> None:
        """Rasters in rows, each at most `size` px wide and high, framed."""
        shown = tiles[:MAX_TILES]
        height, width = shown[0].shape[:2]
        scale = size / max(height, width)
        box = (max(1, round(width * scale)), max(1, round(height * scale)))
        for i, tile in enumerate(shown):
            x = left + i % columns * (size + gap)
            self._paste(tile, x, self._y + i // columns * (box[1] + gap), *box)
        self._advance(-(-len(shown) // columns) * (box[1] + gap))

    def strip(self, row: Raster) -> None:
        """One row of pixels as a band over the whole width."""
        self._paste(row, MARGIN + LABEL_WIDTH, self._y, MAPS_WIDTH, 56)
        self._advance(56)

    def votes(self, ranking: _Ranking, truth: str | None) -> None:
        """Bars of the votes around zero, and beside them the probabilities that softmax makes of them."""
        more = f"the best {len(ranking.names)} of {ranking.classes:,}" if ranking.classes > MAX_BARS else ""
        self.label("votes", "what the fully", "connected layer casts,", "and what softmax makes", "of them", more)
        left = MARGIN + LABEL_WIDTH + 300
        self.text(left, self._y, "votes", 22, QUIET)
        self.text(left + 540, self._y, "probabilities", 22, QUIET)
        top = self._y + 36
        for i, name in enumerate(ranking.names):
            is_truth = f"{name}  (truth)" if name == truth else name
            self.fitted(left - 20, top + ROW * i + 13, is_truth, 22, 280, "rm")
        self._vote_bars(left, top, 400, ranking.votes)
        self._share_bars(left + 540, top, 340, ranking.probabilities)
        self._advance(36 + ROW * len(ranking.names))

    def _vote_bars(self, left: int, top: int, width: int, votes: list[float]) -> None:
        lowest, highest = min(0.0, *votes), max(0.0, *votes)
        scale = width / ((highest - lowest) or 1.0)
        zero = left - lowest * scale
        for i, vote in enumerate(votes):
            y, end = top + ROW * i, zero + vote * scale
            colour = POSITIVE if vote > 0 else NEGATIVE
            self._draw.rectangle((min(zero, end), y, max(zero, end), y + 26), colour)
            said = f"{vote:+.2f}" if highest - lowest >= 0.1 else f"{vote:+.2g}"
            self.text(max(zero, end) + 10, y + 13, said, 20, QUIET, "lm")
        self._draw.line((zero, top - 4, zero, top + ROW * len(votes) - 6), QUIET)

    def _share_bars(self, left: int, top: int, width: int, shares: list[float]) -> None:
        for i, share in enumerate(shares):
            y = top + ROW * i
            self._draw.rectangle((left, y, left + width, y + 26), TROUGH)
            if share * width >= 1:
                self._draw.rectangle((left, y, left + share * width, y + 26), SHARE)
            self.text(left + width + 10, y + 13, f"{share:.1%}", 20, QUIET, "lm")

    def png(self) -> bytes:
        """The picture, cut off below what was drawn."""
        sink = io.BytesIO()
        self._image.crop((0, 0, WIDTH, self._y + MARGIN - 28)).save(sink, "PNG")
        return sink.getvalue()

    def _advance(self, height: int) -> None:
        self._y = max(self._y + height, self._label_bottom) + 28
        self._label_bottom = 0

    def _paste(self, raster: Raster, x: int, y: int, width: int, height: int) -> None:
        # Small maps keep their pixels visible; large ones are averaged.
        grows = raster.shape[0] <= height and raster.shape[1] <= width
        kernel = Image.Resampling.NEAREST if grows else Image.Resampling.BOX
        self._image.paste(Image.fromarray(raster).resize((width, height), kernel), (x, y))
        self._draw.rectangle((x - 1, y - 1, x + width, y + height), outline=FRAME)


def _limit(values: npt.NDArray[np.float32]) -> float:
    """The end of a layer's scale: nearly the largest value, so that a lonely one does not pale all others."""
    return float(np.quantile(np.abs(values), 0.999)) or 1.0


def _diverging(values: npt.NDArray[np.floating]) -> Raster:
    """Values in [-1, 1] (H, W) as colours; beyond is the end's colour."""
    stops = np.linspace(-1, 1, len(DIVERGING))
    channels = [np.interp(values, stops, [c[i] for c in DIVERGING]) for i in range(3)]
    return np.round(np.stack(channels, axis=-1)).astype(np.uint8)


def _around_gray(values: npt.NDArray[np.floating]) -> Raster:
    """Values in [-1, 1] (H, W, 3) as colours with zero in the middle of each channel."""
    return np.round(127.5 + 127.5 * np.clip(values, -1, 1)).astype(np.uint8)


def _rgb(pixels: images.Pixels) -> Raster:
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels
