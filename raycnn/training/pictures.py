"""What a run has come to, as PNGs: how it went, what was learned, and where the network is wrong."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from raycnn.drawing.axes import MATRIX_CLASSES, strength
from raycnn.drawing.canvas import GROUND, INK, MARGIN, QUIET, WARNING, WIDTH, Canvas, Colour, rgb
from raycnn.drawing.filters import filters
from raycnn.drawing.plots import TRAIN, VALIDATION, Curve, Plot, plots
from raycnn.metrics import Metrics, confused_pairs
from raycnn.models import Classifier, first_filters
from raycnn.shards import PackedCollection
from raycnn.training.mistakes import EXAMPLES, Examined, Mistake, examine, validation_samples

PAIRS = 12
"""Pairs of classes that examples are shown of."""
COLUMNS = 8
GAP = 20
CELL = (WIDTH - 2 * MARGIN + GAP) // COLUMNS - GAP
CAPTION = 104
PAIR_WIDTH = 340
SAMPLES = 64
MOST_COLOURS = 128
"""Of a picture that TensorBoard keeps for every epoch."""
RIGHT, WRONG = (47, 133, 90), (197, 48, 48)
REST = "others"


def run_pictures(
    classifier: Classifier, packed: PackedCollection, metrics: Metrics, lines: Sequence[Mapping[str, Any]]
) -> dict[str, bytes]:
    """The pictures of a finished run: PNGs by file name. The same run gives the same bytes.

    Args:
        classifier: What becomes the bundle, in evaluation mode, on its device.
        packed: The data set; some or all images of its validation split are predicted once more.
        metrics: How the classifier does on all of that split.
        lines: Those of metrics.jsonl.
    """
    names, confusion = packed.class_names, metrics.confusion.numpy()
    pairs = confused_pairs(confusion)[:PAIRS]
    found = examine(
        classifier, validation_samples(packed, classifier.spec), metrics.temperature, [(i, j) for _, i, j in pairs]
    )
    return {
        "curves.png": curves_picture(lines),
        "filters.png": filters(first_filters(classifier).float().numpy()),
        "confusion.png": confusion_picture(confusion, names),
        "mistakes.png": mistakes_picture(found, metrics.rows, names),
        "confused.png": confused_picture(found, confusion, pairs, names),
    }


# -- curves -------------------------------------------------------------------------------------------------


def curves_picture(lines: Sequence[Mapping[str, Any]]) -> bytes:
    """Loss, accuracy and learning rate over the epochs, from the lines of metrics.jsonl."""
    epochs = [line["epoch"] + 1 for line in lines]

    def curve(name: str, key: str, colour: Colour, factor: float = 1.0) -> Curve:
        return Curve(name, colour, epochs, [line[key] * factor for line in lines])

    best = max(lines, key=lambda line: line["metrics/accuracy_top1"])
    top = f"{best['metrics/accuracy_top1']:.2%} after epoch {best['epoch'] + 1}"
    loss = [curve("train", "train/loss", TRAIN), curve("val", "val/loss", VALIDATION)]
    accuracy = [curve("val", "metrics/accuracy_top1", VALIDATION, 100)]
    canvas = Canvas("Learning curves", f"The best validation accuracy: {top} of {len(lines)}")
    row = [
        Plot("Loss", "epoch", loss, low=0),
        Plot("Validation accuracy in %", "epoch", accuracy, high=100),
        Plot("Learning rate", "epoch", [curve("rate", "lr", INK)], "{:.2g}", low=0),
    ]
    plots(canvas, row, 460)
    return canvas.png()


def find_lr_picture(rates: Sequence[float], losses: Sequence[float], suggestion: float) -> bytes:
    """A range test of learning rates: the smoothed loss over the rate, and the rate to try."""
    canvas = Canvas(
        f"Learning rates: try {suggestion:g}", "The rate rises from step to step. The loss falls most steeply there."
    )
    curve = Curve("loss", TRAIN, rates, losses)
    plots(canvas, [Plot("Loss", "learning rate", [curve], is_log=True, mark=(suggestion, f"{suggestion:g}"))], 640)
    return canvas.png()


# -- images -------------------------------------------------------------------------------------------------


def samples_picture(pixels: npt.NDArray[np.uint8]) -> bytes:
    """The first training images of a run, up to 64, as the network is given them: uint8 (N, H, W, C)."""
    shown = pixels[:SAMPLES]
    canvas = Canvas("Training images", f"The first {len(shown)}, as the network is given them.")
    side, columns = (WIDTH - 2 * MARGIN + 8) // (2 * COLUMNS) - 8, 2 * COLUMNS
    for i, one in enumerate(shown):
        canvas.paste_within(rgb(one), MARGIN + i % columns * (side + 8), canvas.y + i // columns * (side + 8), side)
    canvas.advance(-(-len(shown) // columns) * (side + 8))
    return canvas.png()


def mistakes_picture(found: Examined, rows: int, class_names: Sequence[str]) -> bytes:
    """The images that the network is surest of and wrong about, of `rows` that there are."""
    note = f"{_examined(found, rows)}, those with the highest probability first, as the network sees them."
    if not found.worst:
        return Canvas("No mistake", f"{_examined(found, rows)}: the network got each of them right.").png()
    canvas = Canvas(f"The {len(found.worst)} most confident mistakes", note)
    for i, mistake in enumerate(found.worst):
        x, y = MARGIN + i % COLUMNS * (CELL + GAP), canvas.y + i // COLUMNS * (CELL + CAPTION + GAP)
        canvas.paste_within(rgb(mistake.pixels), x, y, CELL)
        said = f"{mistake.probability:.1%} {class_names[mistake.prediction]}"
        canvas.fitted(x, y + CELL + 8, said, 20, CELL, colour=WARNING)
        canvas.fitted(x, y + CELL + 36, f"is {class_names[mistake.label]}", 20, CELL)
        canvas.fitted(x, y + CELL + 64, mistake.key, 15, CELL, colour=QUIET, keep_end=True)
    canvas.advance(-(-len(found.worst) // COLUMNS) * (CELL + CAPTION + GAP) - GAP)
    return canvas.png()


def _examined(found: Examined, rows: int) -> str:
    return (
        f"Of {rows:,} validation images" if found.rows >= rows else f"Of {found.rows:,} of {rows:,} validation images"
    )


def confused_picture(
    found: Examined,
    confusion: npt.NDArray[np.int64],
    pairs: Sequence[tuple[int, int, int]],
    class_names: Sequence[str],
) -> bytes:
    """A row of examples for each of the pairs (images, label, prediction) that are confused most."""
    if not pairs:
        return Canvas("No confusion", "Each validation image was taken for what it is.").png()
    counted = f"counted on all {int(confusion.sum()):,} validation images"
    shown = "" if found.rows >= confusion.sum() else f", examples from {found.rows:,} of them"
    canvas = Canvas(
        f"The {len(pairs)} pairs of classes that are confused most", f"What is taken for what, {counted}{shown}."
    )
    side = (WIDTH - 2 * MARGIN - PAIR_WIDTH) // EXAMPLES - GAP
    for count, label, prediction in pairs:
        total = int(confusion[label].sum())
        canvas.fitted(MARGIN, canvas.y + 4, class_names[label], 24, PAIR_WIDTH - GAP)
        canvas.fitted(
            MARGIN, canvas.y + 38, f"taken for {class_names[prediction]}", 24, PAIR_WIDTH - GAP, colour=WARNING
        )
        canvas.text(MARGIN, canvas.y + 76, f"{count:,} of {total:,}, {count / total:.1%}", 20, QUIET)
        _examples(canvas, found.of_pairs.get((label, prediction), []), side)
        canvas.advance(side)
    return canvas.png()


def _examples(canvas: Canvas, mistakes: Sequence[Mistake], side: int) -> None:
    left = MARGIN + PAIR_WIDTH
    if not mistakes:
        canvas.text(left, canvas.y + 40, "none of them among the images that were examined", 20, QUIET)
    for i, mistake in enumerate(mistakes):
        canvas.paste_within(rgb(mistake.pixels), left + i * (side + GAP), canvas.y, side)


# -- the confusion matrix -----------------------------------------------------------------------------------


def confusion_picture(confusion: npt.NDArray[np.int64], class_names: Sequence[str]) -> bytes:
    """The confusion matrix: labels are rows, predictions columns; of many classes those that are confused most."""
    rows, wrong = int(confusion.sum()), int(confusion.sum() - confusion.trace())
    shown = shown_classes(confusion)
    title = "Confusion matrix"
    if len(shown) < len(class_names):
        title += f": {len(shown)} of {len(class_names):,} classes" + (", those that are confused most" if wrong else "")
    canvas = Canvas(title, f"Rows are the truth, columns the prediction: {rows:,} validation images, {wrong:,} wrong.")
    cells, names = confusion[np.ix_(shown, shown)], [class_names[i] for i in shown]
    if len(shown) < len(class_names):
        rest = confusion[shown].sum(axis=1) - cells.sum(axis=1)
        cells, names = np.column_stack([cells, rest]), [*names, REST]
    _matrix(canvas, cells, confusion[shown].sum(axis=1), names)
    return canvas.png(MOST_COLOURS)


def shown_classes(confusion: npt.NDArray[np.int64], most: int = MATRIX_CLASSES) -> list[int]:
    """All classes, in order, or of many those of the most confused pairs, as many as fit."""
    if len(confusion) <= most:
        return list(range(len(confusion)))
    chosen = set[int]()
    for _, *pair in confused_pairs(confusion):
        if len(chosen.union(pair)) <= most:
            chosen.update(pair)
    return sorted(chosen) or list(range(most))


def _matrix(canvas: Canvas, cells: npt.NDArray[np.int64], totals: npt.NDArray[np.int64], names: Sequence[str]) -> None:
    """Cells (R, C), the first R names being those of the rows; `totals` (R,) with what has no column."""
    count = len(names)
    head = round(min(240.0, max(canvas.length(name, 20) for name in names) + 16))
    left = MARGIN + head + 16
    size = min(120, (WIDTH - MARGIN - left) // count, 1300 // count)
    font = max(11, min(24, size // 3))
    top = canvas.y + head
    for j, name in enumerate(names):
        canvas.upright(left + j * size + size / 2, top - 8, name, min(20, size - 4), head, QUIET)
    for i, row in enumerate(cells):
        y = top + i * size
        canvas.fitted(left - 12, y + size / 2, names[i], min(20, size - 4), head, "rm")
        for j, images in enumerate(row.tolist()):
            _cell(canvas, left + j * size, y, size, images, int(totals[i]), i == j, font)
    canvas.advance(head + len(cells) * size)


def _cell(canvas: Canvas, x: int, y: int, size: int, count: int, total: int, is_right: bool, font: int) -> None:
    strong = strength(count / total, is_right) if count else 0.0
    target = np.array(RIGHT if is_right else WRONG)
    colour = tuple(np.round(np.array(GROUND) + (target - GROUND) * strong).astype(int).tolist())
    canvas.draw.rectangle((x, y, x + size - 2, y + size - 2), fill=colour)
    if count:
        words = f"{count:,}" if canvas.length(f"{count:,}", font) <= size - 4 else f"{count / 1000:.0f}k"
        canvas.text(x + size / 2 - 1, y + size / 2 - 1, words, font, (255, 255, 255) if strong > 0.6 else INK, "mm")
