"""What a network has learned, as pictures: its first filters, and what they make of one image.

Blue is negative, white is zero, red is positive, on one scale for a whole layer: after a ReLU no blue is left.
Both pictures are PNG on white, 1,600 px wide.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from raycnn import images
from raycnn.bundle import Bundle
from raycnn.drawing.canvas import MARGIN, NEGATIVE, POSITIVE, QUIET, Canvas, Raster, diverging, limit_of, rgb
from raycnn.drawing.filters import filters
from raycnn.errors import Bad, DataError
from raycnn.models import feature_maps, first_filters

LABEL_WIDTH = 250
"""Left of the maps: the layer's name and what it does."""
GAP = 6
TILE = 72
"""A feature map's side; half of it where there are many small ones."""
MAPS_WIDTH = 16 * (TILE + GAP) - GAP
FINE_SIDE = 16
"""Maps with more pixels than this on a side are never drawn at half size."""
MAX_TILES = 64
MAX_BARS = 10
ROW = 36
"""Height of a bar and the gap below it."""

TROUGH, SHARE = (240, 242, 246), (66, 88, 130)

_WHAT = {
    "conv": "convolution",
    "pair": "residual pair",
    "relu": "ReLU",
    "pool": "max pooling",
    "mean": "mean of each map",
    "flatten": "one long vector",
}


def filters_picture(bundle: Bundle) -> bytes:
    """The learned kernels of the first convolution as a PNG: in colour where they look at colours."""
    return filters(first_filters(bundle.classifier).float().numpy())


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
    canvas.tiles(MARGIN + LABEL_WIDTH, [rgb(pixels)], 1, 176, GAP)
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
    limit = limit_of(array)
    what = next((words for start, words in _WHAT.items() if name.startswith(start)), "convolution")
    if array.ndim == 1:
        canvas.label(name, what, f"{array.size:,} numbers")
        canvas.strip(diverging(array[None] / limit))
        return
    count, height, width = array.shape
    shown = f"{count}" if count <= MAX_TILES else f"{MAX_TILES} of {count}"
    canvas.label(name, what, f"{shown} maps of {height} x {width}")
    tiles = [diverging(m / limit) for m in array[:MAX_TILES]]
    if count <= 32 or max(height, width) > FINE_SIDE:
        canvas.tiles(MARGIN + LABEL_WIDTH, tiles, 16, TILE, GAP)
    else:
        canvas.tiles(MARGIN + LABEL_WIDTH, tiles, 32, (TILE - GAP) // 2, GAP)


class _Canvas(Canvas):
    """A picture of layers, one below the other."""

    def strip(self, row: Raster) -> None:
        """One row of pixels as a band over the whole width."""
        self.paste(row, MARGIN + LABEL_WIDTH, self.y, MAPS_WIDTH, 56)
        self.advance(56)

    def votes(self, ranking: _Ranking, truth: str | None) -> None:
        """Bars of the votes around zero, and beside them the probabilities that softmax makes of them."""
        more = f"the best {len(ranking.names)} of {ranking.classes:,}" if ranking.classes > MAX_BARS else ""
        self.label("votes", "what the fully", "connected layer casts,", "and what softmax makes", "of them", more)
        left = MARGIN + LABEL_WIDTH + 300
        self.text(left, self.y, "votes", 22, QUIET)
        self.text(left + 540, self.y, "probabilities", 22, QUIET)
        top = self.y + 36
        for i, name in enumerate(ranking.names):
            is_truth = f"{name}  (truth)" if name == truth else name
            self.fitted(left - 20, top + ROW * i + 13, is_truth, 22, 280, "rm")
        self._vote_bars(left, top, 400, ranking.votes)
        self._share_bars(left + 540, top, 340, ranking.probabilities)
        self.advance(36 + ROW * len(ranking.names))

    def _vote_bars(self, left: int, top: int, width: int, votes: list[float]) -> None:
        lowest, highest = min(0.0, *votes), max(0.0, *votes)
        scale = width / ((highest - lowest) or 1.0)
        zero = left - lowest * scale
        for i, vote in enumerate(votes):
            y, end = top + ROW * i, zero + vote * scale
            colour = POSITIVE if vote > 0 else NEGATIVE
            self.draw.rectangle((min(zero, end), y, max(zero, end), y + 26), colour)
            said = f"{vote:+.2f}" if highest - lowest >= 0.1 else f"{vote:+.2g}"
            self.text(max(zero, end) + 10, y + 13, said, 20, QUIET, "lm")
        self.draw.line((zero, top - 4, zero, top + ROW * len(votes) - 6), QUIET)

    def _share_bars(self, left: int, top: int, width: int, shares: list[float]) -> None:
        for i, share in enumerate(shares):
            y = top + ROW * i
            self.draw.rectangle((left, y, left + width, y + 26), TROUGH)
            if share * width >= 1:
                self.draw.rectangle((left, y, left + share * width, y + 26), SHARE)
            self.text(left + width + 10, y + 13, f"{share:.1%}", 20, QUIET, "lm")
