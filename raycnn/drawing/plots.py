"""Curves with their axes, on a canvas."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw

from raycnn.drawing.axes import apart, ticks
from raycnn.drawing.canvas import FRAME, INK, MARGIN, QUIET, WIDTH, Canvas, Colour

TRAIN, VALIDATION = (37, 99, 201), (194, 87, 12)
FINER = 3
"""Lines are drawn so many times as large, for smooth edges."""
EDGE = 4
"""Around the axes, for dots that lie on them."""
TITLE, FOOT, LEFT = 40, 64, 86
GAP = 36
MOST_DOTS = 60


class Curve(NamedTuple):
    """Numbers over numbers; those that are not finite are left out."""

    name: str
    colour: Colour
    xs: Sequence[float]
    ys: Sequence[float]


class Plot(NamedTuple):
    """One pair of axes; `number` formats what stands at a curve's end."""

    title: str
    x_name: str
    curves: Sequence[Curve]
    number: str = "{:.4g}"
    is_log: bool = False
    """Whether the horizontal axis has a decade between two ticks."""
    low: float | None = None
    """Where the vertical axis begins, if not at a round number near the lowest value."""
    high: float | None = None
    """What no tick lies above."""
    mark: tuple[float, str] | None = None
    """A place on the horizontal axis, and what is said of it."""


def plots(canvas: Canvas, row: Sequence[Plot], height: int) -> None:
    """Plots side by side over the whole width."""
    width = (WIDTH - 2 * MARGIN + GAP) // len(row) - GAP
    for i, plot in enumerate(row):
        _Axes(canvas, plot, MARGIN + i * (width + GAP), width, height).drawn()
    canvas.advance(height)


class _Axes:
    """Where a plot's numbers lie on the canvas."""

    def __init__(self, canvas: Canvas, plot: Plot, left: int, width: int, height: int) -> None:
        self._canvas, self._plot, self._start = canvas, plot, left
        ends = max(canvas.length(c.name, 22) for c in plot.curves) if plot.curves else 0
        self._left, self._top = left + LEFT, canvas.y + TITLE
        self._width, self._height = width - LEFT - max(64, round(ends) + 12), height - TITLE - FOOT
        points = [(x, y) for c in plot.curves for x, y in _finite(c)] or [(1.0, 0.0)]
        self._scale: Callable[[float], float] = math.log10 if plot.is_log else float
        across, up = [self._scale(x) for x, _ in points], [y for _, y in points]
        self._across = (min(across), max(across))
        found = ticks(min(up) if plot.low is None else plot.low, max(up))
        self._ticks = [t for t in found if plot.high is None or t <= plot.high + 1e-9]
        self._up = (min(*self._ticks, *up), max(*self._ticks, *up))

    def _x(self, value: float) -> float:
        low, high = self._across
        return self._width * ((self._scale(value) - low) / (high - low) if high > low else 0.5)

    def _y(self, value: float) -> float:
        low, high = self._up
        return self._height * (1 - (value - low) / ((high - low) or 1))

    def drawn(self) -> None:
        """Grid, curves, and words around them."""
        size = ((self._width + 2 * EDGE) * FINER, (self._height + 2 * EDGE) * FINER)
        image = Image.new("RGB", size, "white")
        draw = ImageDraw.Draw(image)
        for tick in self._ticks:
            self._line(draw, [(0, self._y(tick)), (self._width, self._y(tick))], FRAME, 1)
        if self._plot.mark is not None:
            x = self._x(self._plot.mark[0])
            self._line(draw, [(x, 0), (x, self._height)], QUIET, 1.5)
        for curve in self._plot.curves:
            self._curve(draw, curve)
        self._canvas.paste_smooth(image, self._left - EDGE, self._top - EDGE, FINER)
        self._words()

    def _line(self, draw: ImageDraw.ImageDraw, points: list[tuple[float, float]], colour: Colour, wide: float) -> None:
        finer = [((x + EDGE) * FINER, (y + EDGE) * FINER) for x, y in points]
        draw.line(finer, colour, round(wide * FINER), joint="curve")

    def _curve(self, draw: ImageDraw.ImageDraw, curve: Curve) -> None:
        places = [(self._x(x), self._y(y)) for x, y in _finite(curve)]
        if len(places) > 1:
            self._line(draw, places, curve.colour, 2.5)
        if len(places) <= MOST_DOTS:
            for x, y in places:
                draw.circle(((x + EDGE) * FINER, (y + EDGE) * FINER), EDGE * FINER, curve.colour)

    def _words(self) -> None:
        canvas, plot = self._canvas, self._plot
        right, bottom = self._left + self._width, self._top + self._height
        canvas.fitted(self._start, canvas.y, plot.title, 26, self._width + LEFT)
        for tick in self._ticks:
            canvas.text(self._left - 10, self._top + self._y(tick), f"{tick:.4g}", 18, QUIET, "rm")
        for value, words in self._x_ticks():
            canvas.text(self._left + self._x(value), bottom + 10, words, 18, QUIET, "mt")
        canvas.text(self._left + self._width / 2, bottom + 36, plot.x_name, 20, QUIET, "mt")
        if plot.mark is not None:
            value, words = plot.mark
            x = self._x(value)
            canvas.text(
                self._left + x + (8 if x < self._width / 2 else -8),
                self._top + 4,
                words,
                20,
                INK,
                "lt" if x < self._width / 2 else "rt",
            )
        named = [(c, _finite(c)[-1][1]) for c in plot.curves if _finite(c)]
        ends = apart([self._y(y) for _, y in named], 46, 0, self._height - 12)
        for (curve, y), place in zip(named, ends, strict=True):
            canvas.text(right + 12, self._top + place - 2, curve.name, 20, curve.colour, "lb")
            canvas.text(right + 12, self._top + place + 2, plot.number.format(y), 20, curve.colour, "lt")

    def _x_ticks(self) -> list[tuple[float, str]]:
        low, high = self._across
        if self._plot.is_log:
            return [(10.0**p, f"1e{p}") for p in range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)]
        step = next(m * 10**p for p in range(9) for m in (1, 2, 5) if m * 10**p * 8 > high - low)
        round_ones = range(-(-round(low + step / 2) // step) * step, round(high) + 1, step)
        return [(value, f"{value:g}") for value in (low, *round_ones)]


def _finite(curve: Curve) -> list[tuple[float, float]]:
    return [(x, y) for x, y in zip(curve.xs, curve.ys, strict=True) if math.isfinite(y)]
