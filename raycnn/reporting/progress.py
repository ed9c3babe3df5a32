"""One line that says how far a verb is, how fast, and how long it will still take."""

import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Self, TextIO

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from raycnn.errors import in_words

WINDOW_S = 60.0
"""Speed is measured over the images of this many last seconds, or of two reports where they come slower."""
BURST_S = 0.5
"""Reports that come this close together count as one: workers that started together also finish together."""
PLAIN_EVERY_S = 30.0
PLAIN_EVERY_SHARE = 0.05
PLAIN_GAP_S = 2.0
"""Where there is no terminal: a line every 30 s or every 5 %, but not a flood when the work is quick."""
SILENCE_S = 10.0
"""Where there is no terminal and nothing to count yet, a sign of life: after 10, 20, 40 ... seconds."""
TICK_S = 0.5
WAITING = 0.1
"""Share of an epoch's time above which waiting for data is told: it is what slows the run down."""


class Meter:
    """Speed and time left of one stage of work, from its progress events alone."""

    def __init__(self, total: int, unit: str, start: float) -> None:
        """Measure work of `total` images that began at `start`; all times are seconds of one clock."""
        self.total, self.unit, self.done, self.start = total, unit, 0, start
        self._points: deque[tuple[float, int]] = deque()
        self._burst, self._end = -math.inf, math.inf

    @property
    def is_done(self) -> bool:
        """Whether nothing is left."""
        return self.done >= self.total

    def add(self, done: int, now: float, most_s: float = math.inf) -> None:
        """So many are done now, and the work ends in so many seconds in any case."""
        self.done, self._end = done, now + most_s
        if now - self._burst < BURST_S:
            self._points.pop()
        else:
            self._burst = now
        self._points.append((now, done))
        while len(self._points) > 2 and now - self._points[1][0] >= WINDOW_S:
            self._points.popleft()

    def rate(self, now: float) -> float | None:
        """Images per second lately, or None before two reports; falls when a report is overdue."""
        if len(self._points) < 2:
            return None
        (first, before), (last, after) = self._points[0], self._points[-1]
        gap = (last - first) / (len(self._points) - 1)
        elapsed = max(last, now - 2 * gap) - first
        return (after - before) / elapsed if elapsed >= BURST_S else None

    def seconds_left(self, now: float) -> float | None:
        """At the speed of late, or None where nothing is known yet."""
        rate = self.rate(now)
        return min((self.total - self.done) / rate, max(0.0, self._end - now)) if rate else None


class ProgressLine:
    """Takes the events of a verb and draws them; never writes to standard output.

        {"kind": "note", "text"}                             a line that stays
        {"kind": "status", "text"}                           what is done where nothing can be counted yet
        {"kind": "progress", "done", "total", "text"}        moves the line; a `rate` in it is shown until there is one
                                                             of our own; `unit` is what is counted, else images;
                                                             after `most_s` more seconds it ends in any case
        {"kind": "epoch", "epoch", "epochs", ...metrics}     a line that stays

    On a terminal the line is redrawn in place and gone at the end; elsewhere it is printed now and then. What a
    stage took stays in both.
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """Draw on `stream`, standard error by default."""
        self._console = Console(file=stream or sys.stderr, highlight=False, markup=False, emoji=False)
        self._clock, self._lock = clock, threading.Lock()
        self._meter: Meter | None = None
        self._event: dict[str, Any] = {}
        self._begin_stage()
        self._printed = (self._stage, 0.0)
        self._live: Live | None = None
        self._spinner = Spinner("dots")
        self._over = threading.Event()
        self._ticker = threading.Thread(target=self._tick_on, daemon=True)

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            live = Live(
                get_renderable=self._drawn,
                console=self._console,
                refresh_per_second=8,
                transient=True,
                redirect_stdout=False,
            )
            live.start()
            self._live = live
        else:
            self._ticker.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        else:
            self._over.set()
            self._ticker.join()

    def __call__(self, event: dict[str, Any]) -> None:
        """Show one event; may be called from any thread."""
        with self._lock:
            if event["kind"] == "progress":
                self._advance(event)
            elif event["kind"] == "status":
                self._status = event["text"]
            elif event["kind"] == "epoch":
                self._print(_epoch_text(event))
                if event["epoch"] + 1 == event["epochs"]:
                    self._begin_stage()
            else:
                self._print(event["text"])
                self._begin_stage()

    def tick(self) -> None:
        """Where there is no terminal: print how far it is if that is due, or a sign of life."""
        with self._lock:
            now = self._clock()
            if self._is_plainly_due(now):
                assert self._meter is not None
                self._printed = (now, self._meter.done / max(1, self._meter.total))
                self._print(self._text(now))
            elif self._is_waiting and now - self._stage >= self._patience:
                self._patience *= 2
                self._print(f"    still at work, {self._waiting_text(now)}")

    def _tick_on(self) -> None:
        while not self._over.wait(TICK_S):
            self.tick()

    def _begin_stage(self) -> None:
        """What is counted next began now, after what has been said."""
        self._stage, self._is_waiting, self._patience = self._clock(), True, SILENCE_S
        self._status = ""

    def _advance(self, event: dict[str, Any]) -> None:
        now, done, total = self._clock(), event["done"], event["total"]
        meter, unit = self._meter, event.get("unit", "images")
        if meter is None or meter.is_done or (meter.total, meter.unit) != (total, unit) or done < meter.done:
            meter = self._meter = Meter(total, unit, self._stage)
            self._printed = (now, done / max(1, total))
        meter.add(done, now, event.get("most_s", math.inf))
        self._event, self._is_waiting = event, False
        if meter.is_done:
            self._print(self._text(now))
            self._begin_stage()

    def _is_plainly_due(self, now: float) -> bool:
        if self._meter is None or self._is_waiting:
            return False
        since, before = self._printed
        share = self._meter.done / max(1, self._meter.total)
        is_far = share - before >= PLAIN_EVERY_SHARE and now - since >= PLAIN_GAP_S
        return is_far or now - since >= PLAIN_EVERY_S

    def _print(self, text: str) -> None:
        if self._live is None:
            # Not wrapped: the reader is a file or a pipe.
            self._console.file.write(text + "\n")
            self._console.file.flush()
        else:
            self._console.print(text)

    def _text(self, now: float) -> str:
        meter, event = self._meter, self._event
        assert meter is not None
        parts = [f"{min(meter.done, meter.total):,}/{meter.total:,} {meter.unit}"]
        if meter.is_done:
            parts.append(f"in {_clock_text(now - meter.start)}")
        else:
            rate, left = meter.rate(now) or event.get("rate"), meter.seconds_left(now)
            parts.append(f"{_rate_text(rate)} {meter.unit}/s" if rate else "")
            parts.append(f"{_clock_text(left)} left" if left is not None else "")
        parts.append(event.get("text", ""))
        return "  ".join(part for part in parts if part)

    def _waiting_text(self, now: float) -> str:
        return "  ".join(filter(None, [_clock_text(now - self._stage), self._status]))

    def _drawn(self) -> RenderableType:
        now = self._clock()
        if self._meter is None or self._is_waiting:
            self._spinner.update(text=Text(self._waiting_text(now)))
            return self._spinner
        width = 24 if self._console.width >= 90 else 10
        bar = ProgressBar(total=max(1, self._meter.total), completed=self._meter.done, width=width)
        line = Table.grid(padding=(0, 1))
        line.add_row(bar, Text(self._text(now), no_wrap=True, overflow="ellipsis"))
        return line


def _epoch_text(event: dict[str, Any]) -> str:
    parts = [
        f"epoch {event['epoch'] + 1}/{event['epochs']}",
        f"train loss {event['train/loss']:.4f}",
        f"val loss {event['val/loss']:.4f}",
        f"accuracy {event['metrics/accuracy_top1']:.2%}",
        f"{event['images_per_s']:,.0f} images/s",
    ]
    if (waiting := event.get("time", {}).get("data", 0.0)) > WAITING:
        parts.append(f"{waiting:.0%} waiting for data")
    if skipped := event.get("skipped"):
        parts.append(f"skipped {in_words(skipped)}")
    return "  ".join(parts)


def _clock_text(seconds: float) -> str:
    """1:05 for 65 seconds, 2:01:05 for more than an hour, 3 d 4 h for more than two days."""
    whole = round(seconds)
    if whole >= 172_800:
        return f"{whole // 86400} d {whole % 86400 // 3600} h"
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"


def _rate_text(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
