"""What a labeling run tells at its end."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MAX_CLASSES = 12


@dataclass(frozen=True)
class LabelReport:
    """What the output holds, all generations together; `units_written`, `speed` and `seconds` are of this run."""

    rows: int
    status: dict[str, int]
    classes: dict[str, int]
    """Labels by class name."""
    confidence: list[int]
    """Predictions by probability, in 100 equal bins from 0 to 1."""
    abstained: int
    shift: dict[str, float] | None
    """Distance of classes and confidence from those on validation: 0 alike, 1 wholly different."""
    units: int
    units_written: int
    images_per_s: float
    """With everything from the first step to the last; `speed` has the steady state."""
    speed: dict[str, Any] | None
    seconds: float
    output: str
    generations: int
    changed: int
    gone: int

    def readable(self) -> Iterator[str]:
        """The report as lines for a person."""
        told = {
            "rows": f"{self.rows:,}: {_counted(self.status)}" if self.status else f"{self.rows:,}",
            "classes": _most(self.classes),
            "abstained": f"{self.abstained:,}" if self.abstained else "",
            "confidence": _deciles(self.confidence),
            "shift": _shift(self.shift),
            "units": f"{self.units:,}, of which this run has written {self.units_written:,}",
            "generations": _generations(self.generations, self.changed, self.gone),
            "speed": _speed(self.speed),
            "seconds": f"{self.seconds:.1f}, {self.images_per_s:,.1f} images/s with start and end",
            "output": self.output,
        }
        width = max(len(name) for name, text in told.items() if text)
        for name, text in told.items():
            if text:
                yield f"{name:<{width}}  {text}"


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {name}" for name, n in counts.items())


def _most(classes: Mapping[str, int]) -> str:
    largest = sorted(classes.items(), key=lambda item: -item[1])
    text = ", ".join(f"{name} {n:,}" for name, n in largest[:MAX_CLASSES])
    more = len(largest) - MAX_CLASSES
    return f"{text} and {more:,} more classes" if more > 0 else text


def _deciles(confidence: list[int]) -> str:
    total = sum(confidence)
    if not total:
        return ""
    shares = {f"{at}%": sum(confidence[at:]) / total for at in (50, 80, 90, 95)}
    return ", ".join(f"at least {name}: {share:.1%} of the images" for name, share in shares.items())


def _shift(shift: Mapping[str, float] | None) -> str:
    if shift is None:
        return ""
    return (
        f"from validation: classes {shift['classes']:.2f}, confidence {shift['confidence']:.2f} "
        "(0 alike, 1 wholly different)"
    )


def _generations(generations: int, changed: int, gone: int) -> str:
    if generations == 1 and not changed and not gone:
        return ""
    return f"{generations}; of earlier images {changed:,} have changed and {gone:,} are gone"


def _speed(speed: Mapping[str, Any] | None) -> str:
    if speed is None:
        return ""
    busy = ", ".join(f"{name} {share:.0%}" for name, share in speed["busy"].items())
    floor = f"{speed['of_floor']:.0%} of the floor, {speed['floor_images_per_s']:,.0f}; " if speed["of_floor"] else ""
    return (
        f"{speed['images_per_s']:,.0f} images/s, {speed['images_per_s_per_cpu']:,.0f} a CPU; {floor}"
        f"busy: {busy}; bottleneck: {speed['bottleneck']}"
    )


def price_of_abstaining(threshold: float, validation: Mapping[str, Any]) -> str:
    """What the bundle's validation says of leaving predictions below a threshold without a label."""
    lines = [line for line in validation.get("coverage", []) if line["threshold"] <= threshold + 1e-9]
    if not lines:
        return f"--abstain {threshold:g}: this bundle was not validated, so what that costs is unknown"
    line = max(lines, key=lambda line: line["threshold"])
    right = "none" if line["accuracy"] is None else f"{line['accuracy']:.2%}"
    return (
        f"--abstain {threshold:g}: on validation {line['coverage']:.1%} of the images were at least "
        f"{line['threshold']:g} sure, and {right} of those right; of all images {validation['accuracy_top1']:.2%}"
    )
