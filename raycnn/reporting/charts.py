"""Line charts as inline SVG; their colours come from the page's style sheet, for light and dark."""

import math
from html import escape
from typing import NamedTuple

from raycnn.drawing.axes import apart, ticks

CHART_WIDTH, CHART_HEIGHT = 460, 270
LEFT, RIGHT, TOP, BOTTOM = 56, 68, 34, 40
MAX_DOTS = 60


class Curve(NamedTuple):
    """One value for each epoch; `style` is the class that the style sheet colours."""

    name: str
    style: str
    values: list[float]


def chart(title: str, curves: list[Curve], number: str, low: float | None = None, high: float | None = None) -> str:
    """One SVG: a line for each curve over the epochs, its last value written at its end.

    Args:
        title: stands above the chart.
        curves: all of one length.
        number: the format of a value, such as "{:.3g} %".
        low: where the scale begins, if not at a round number near the lowest value.
        high: what no tick lies above.
    """
    values = [v for c in curves for v in c.values if math.isfinite(v)] or [0.0]
    scale = ticks(min(values) if low is None else low, max(values))
    frame = _Frame(len(curves[0].values), [t for t in scale if high is None or t <= high], values)
    labels = apart([frame.y(c.values[-1]) for c in curves], 32, TOP + 2, CHART_HEIGHT - BOTTOM - 8)
    drawn = "".join(_line(curve, frame, number, y) for curve, y in zip(curves, labels, strict=True))
    shape = f'viewBox="0 0 {CHART_WIDTH} {CHART_HEIGHT}" role="img" aria-label="{escape(title)} by epoch"'
    return f'<svg {shape}><text x="{LEFT}" y="16" class="title">{escape(title)}</text>{frame.drawn()}{drawn}</svg>'


class _Frame:
    """The axes: where an epoch and a value lie on the page."""

    def __init__(self, count: int, ticks: list[float], values: list[float]) -> None:
        self._count, self._ticks = count, ticks
        self._low, self._high = min(*ticks, *values), max(*ticks, *values)
        self._width, self._height = CHART_WIDTH - LEFT - RIGHT, CHART_HEIGHT - TOP - BOTTOM
        self.right = LEFT + self._width

    def x(self, index: int) -> float:
        return LEFT + (self._width * index / (self._count - 1) if self._count > 1 else self._width / 2)

    def y(self, value: float) -> float:
        if not math.isfinite(value):
            return TOP
        return TOP + self._height * (1 - (value - self._low) / ((self._high - self._low) or 1))

    def drawn(self) -> str:
        parts = []
        for tick in self._ticks:
            y = self.y(tick)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{self.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
        step = max(1, -(-self._count // 8))
        bottom = f'y="{CHART_HEIGHT - 20}" text-anchor="middle"'
        parts += [f'<text x="{self.x(i):.1f}" {bottom}>{i + 1}</text>' for i in range(0, self._count, step)]
        middle = LEFT + self._width / 2
        parts.append(f'<text x="{middle}" y="{CHART_HEIGHT - 4}" text-anchor="middle">epoch</text>')
        return "".join(parts)


def _line(curve: Curve, frame: _Frame, number: str, label_y: float) -> str:
    """The line with a dot for each epoch, unless there are many, and its name and last value to the right."""
    places = [(i, v, f"{frame.x(i):.1f}", f"{frame.y(v):.1f}") for i, v in enumerate(curve.values) if math.isfinite(v)]
    points = " ".join(f"{x},{y}" for _, _, x, y in places)
    parts = [f'<polyline class="{curve.style}" points="{points}"/>']
    if len(places) <= MAX_DOTS:
        parts += [
            f'<circle class="{curve.style}" cx="{x}" cy="{y}" r="3">'
            f"<title>epoch {i + 1}, {curve.name}: {number.format(v)}</title></circle>"
            for i, v, x, y in places
        ]
    at = f'x="{frame.right + 8}" class="{curve.style}"'
    parts.append(f'<text {at} y="{label_y - 2:.1f}">{curve.name}</text>')
    parts.append(f'<text {at} y="{label_y + 11:.1f}">{number.format(curve.values[-1])}</text>')
    return "".join(parts)
