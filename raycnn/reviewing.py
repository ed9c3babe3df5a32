"""Which images a person should look at first: `raycnn review` picks them and lays them out.

    images/           the picked images, as they are in the collection
    contact.png       all of them at one glance
    review.csv        one line each; what a person writes into `corrected` is what `raycnn pack --labels` reads
    tasks.json        the same for Label Studio: tasks with the model's predictions, and
    config.xml        the labelling interface that they belong to

An image is worth a look where the two best classes are nearly as probable (a low margin) and where the model
has abstained. The classes take turns, so that one that is often unsure does not fill the sheet.
"""

import base64
import csv
import heapq
import io
import itertools
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import quoteattr

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from raycnn import images
from raycnn.config import ReviewConfig
from raycnn.drawing.canvas import FRAME, GROUND, INK, QUIET, WARNING, Colour
from raycnn.drawing.lettering import shortened, written
from raycnn.errors import Bad, ConfigError, DataError, Status
from raycnn.exchange import READ_THREADS, FinishedLabels, Progress
from raycnn.ledger import UnitRef, fingerprint_id
from raycnn.shards import Slice, open_collection, path_order
from raycnn.storage import Store, open_store

LARGE_SIDE = 1024
"""Longest side in px of the copies that Label Studio shows; they are part of tasks.json, which needs no server."""
SMALL_SIDE = 256
"""Smaller images are shown as large as a whole number of times fits into this."""
MANY_CLASSES = 20
"""From so many classes on, Label Studio shows a list to choose from instead of buttons."""
PART_WINDOW = 32
"""Parts that are fetched ahead."""

SHEET_IMAGES = 200
"""Thumbnails on the contact sheet at most."""
SHEET_WIDTH, MARGIN, GAP, COLUMNS = 1600, 40, 20, 8
CELL = (SHEET_WIDTH - 2 * MARGIN + GAP) // COLUMNS - GAP
CELL_HEIGHT = CELL + 100
TOP = MARGIN + 96


@dataclass(frozen=True)
class ReviewReport:
    """What was picked; `unreadable` were picked too, but are gone or changed since they were labelled."""

    rows: int
    picked: int
    abstained: int
    unreadable: int
    classes: dict[str, int]
    contact: str
    tasks: str
    review: str


class Pick(NamedTuple):
    """One label row that is worth a look."""

    rank: float
    """Its margin; abstained rows come before all others."""
    ref: UnitRef
    row: int
    """Its place in the unit."""
    key: str
    class_name: str
    """The most probable class, also where the model has abstained."""
    second: str | None
    probability: float
    margin: float
    """Probability of the best class less that of the second; where only one is listed, that of the best."""
    is_abstained: bool


class Shown(NamedTuple):
    """A pick, and where its image is."""

    pick: Pick
    source: str
    """The object that holds it in the collection."""
    file: str
    """Its copy below the folder."""
    seen: bytes
    """A PNG or JPEG that a browser shows."""


def review(config: ReviewConfig, progress: Progress | None = None) -> ReviewReport:
    """Pick the images most worth a look, read just these, and lay them out.

    Raises:
        ConfigError: the folder is not empty, or lies inside the labels or what was labelled.
        DataError: the labels are not finished, none of them has a prediction, or a shard has changed since.
        StorageError: the folder cannot be written.
    """
    say = progress or (lambda event: None)
    folder = Path(config.dst)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty, and may hold somebody's corrections; choose a new folder")
    labels = FinishedLabels(config.out)
    labels.check_apart(config.dst)
    picking = _Picking(config.count, len(labels.class_names))
    for ref, part in _parts(labels, say):
        picking.add(ref, part)
    picks = picking.picks()
    if not picks:
        raise DataError(f"{labels.store.address()}: none of its {picking.rows:,} rows has a prediction to look at")
    try:
        return _laid_out(labels, picks, picking.rows, folder)
    except BaseException:
        _clear(folder)
        raise


def _laid_out(labels: FinishedLabels, picks: Sequence[Pick], rows: int, folder: Path) -> ReviewReport:
    """Read the picked images, and write everything into the folder."""
    store = open_store(folder)
    shown = _read(labels, picks, store)
    if not shown:
        raise DataError(
            f"{labels.selection['data']}: the {len(picks)} picked images are gone or changed; label it anew"
        )
    _write(store, shown, labels, rows)
    return ReviewReport(
        rows=rows,
        picked=len(shown),
        abstained=sum(s.pick.is_abstained for s in shown),
        unreadable=len(picks) - len(shown),
        classes=dict(sorted(Counter(s.pick.class_name for s in shown).items())),
        contact=str(folder / "contact.png"),
        tasks=str(folder / "tasks.json"),
        review=str(folder / "review.csv"),
    )


def _clear(folder: Path) -> None:
    """Take away what was begun in a folder that was empty, so that the same command can begin again."""
    for child in folder.iterdir() if folder.is_dir() else ():
        if child.is_dir():
            shutil.rmtree(child, ignore_errors=True)
        else:
            child.unlink(missing_ok=True)


def _parts(labels: FinishedLabels, say: Progress) -> Iterator[tuple[UnitRef, bytes]]:
    """Every part, a few fetched ahead."""
    refs, done, total = iter(labels.refs(labels.plans)), 0, sum(p.rows for p in labels.plans)
    with ThreadPoolExecutor(READ_THREADS) as pool:
        while window := list(itertools.islice(refs, PART_WINDOW)):
            for ref, part in zip(window, pool.map(labels.part, window), strict=True):
                yield ref, part
                done += ref.rows
                say({"kind": "progress", "done": done, "total": total, "text": "", "unit": "rows"})


class _Picking:
    """The rows of lowest margin of each class, in bounded memory however many rows are added."""

    def __init__(self, count: int, classes: int) -> None:
        self._count, self.rows = count, 0
        self._heaps: dict[int, list[tuple[float, int, Pick]]] = {}
        self._limits = np.full(classes, np.inf)
        """By class: a row has to rank below this to be among the picks."""

    def add(self, ref: UnitRef, part: bytes) -> None:
        """The rows of the next part."""
        table = pq.read_table(io.BytesIO(part))
        before, self.rows = self.rows, self.rows + len(table)
        index = np.flatnonzero(table["status"].to_numpy() == Status.OK)
        if not index.size:
            return
        table = table.take(index)
        labels, names, probabilities = _best_two(table["top_k"].combine_chunks())
        margins = probabilities[0] - probabilities[1]
        ranks = margins - 2.0 * table["label"].is_null().to_numpy()
        keys = table["key"]
        for i in np.flatnonzero(ranks < self._limits[labels]):
            rank = float(ranks[i])
            pick = Pick(
                rank,
                ref,
                int(index[i]),
                keys[i].as_py(),
                names[0][i].as_py(),
                names[1][i].as_py(),
                float(probabilities[0][i]),
                float(margins[i]),
                bool(rank < margins[i]),
            )
            self._push(int(labels[i]), (-rank, -(before + int(index[i])), pick))

    def _push(self, label: int, entry: tuple[float, int, Pick]) -> None:
        heap = self._heaps.setdefault(label, [])
        if len(heap) < self._count:
            heapq.heappush(heap, entry)
        else:
            heapq.heappushpop(heap, entry)
        if len(heap) == self._count:
            self._limits[label] = -heap[0][0]

    def picks(self) -> list[Pick]:
        """The classes in turn, each with its next lowest row; the first turn begins with the lowest of all."""
        queues = [[pick for *_, pick in sorted(heap, key=lambda e: (-e[0], -e[1]))] for heap in self._heaps.values()]
        turns = itertools.zip_longest(*queues)
        ordered = (pick for turn in turns for pick in sorted((p for p in turn if p), key=lambda p: (p.rank, p.key)))
        return list(itertools.islice(ordered, self._count))


def _best_two(top: pa.ListArray) -> tuple[np.ndarray, list[pa.Array], list[np.ndarray]]:
    """Labels of the best class of each row; class names and probabilities of the best and of the second."""
    flat = top.flatten()
    starts = np.asarray(top.offsets)[:-1] - top.offsets[0].as_py()
    seconds = pa.array(starts + 1, mask=np.asarray(top.value_lengths()) < 2)
    places = [pa.array(starts), seconds]
    names = [flat.field("class_name").take(p) for p in places]
    probabilities = [flat.field("probability").take(p).fill_null(0).to_numpy() for p in places]
    return flat.field("label").take(places[0]).to_numpy(), names, probabilities


def _read(labels: FinishedLabels, picks: Sequence[Pick], store: Store) -> list[Shown]:
    """The picks whose image can be read now, in their order; each image is copied to the store on the way."""
    collection = open_collection(labels.selection["data"], ())
    by_unit = sorted(range(len(picks)), key=lambda i: picks[i].ref)
    pieces = [(_piece(labels.ledger.slices(picks[i].ref), picks[i].row), i) for i in by_unit]
    pieces.sort(key=lambda placed: (path_order(placed[0].path), placed[0].first))
    found: dict[int, Shown] = {}
    for (piece, i), sample in zip(pieces, collection.read([piece for piece, _ in pieces]), strict=True):
        if sample.key != picks[i].key:
            raise DataError(f"{piece.path}: {sample.key!r} stands where {picks[i].key!r} was labelled; label it anew")
        pixels = sample.bad or images.decode(sample.encoded, 3)
        header = images.read_header(sample.encoded)
        if not isinstance(pixels, Bad) and not isinstance(header, Bad):
            file = _file_name(i + 1, sample.key, header.format)
            store.put(file, sample.encoded or b"")
            found[i] = Shown(picks[i], collection.store.address(piece.path), file, _for_browsers(pixels))
    return [found[i] for i in sorted(found)]


def _piece(slices: Sequence[Slice], row: int) -> Slice:
    """The one row of a unit as a slice of its own."""
    for piece in slices:
        if row < piece.rows:
            return piece._replace(first=piece.first + row, rows=1)
        row -= piece.rows
    raise AssertionError("a part has the rows of its unit")


def _file_name(number: int, key: str, format: str) -> str:
    stem = re.split(r"[/:]", key)[-1]
    stem = re.sub(r"[^\w.-]", "_", re.sub(r"\.\w{1,5}$", "", stem))[-80:]
    return f"images/{number:04d}-{stem}.{'jpg' if format == 'JPEG' else format.lower()}"


def _for_browsers(pixels: images.Pixels) -> bytes:
    """An image that is neither too small to be seen nor too large to be sent."""
    image, sink = Image.fromarray(pixels), io.BytesIO()
    if (side := max(image.size)) < SMALL_SIDE:
        _scaled(image, SMALL_SIDE // side * side).save(sink, "PNG")
    else:
        _scaled(image, min(side, LARGE_SIDE)).save(sink, "JPEG", quality=90)
    return sink.getvalue()


def _scaled(image: Image.Image, side: int) -> Image.Image:
    """The image with that longest side; what grows keeps its pixels visible."""
    scale = side / max(image.size)
    kernel = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    width, height = (max(1, round(length * scale)) for length in image.size)
    return image.resize((width, height), kernel)


def _write(store: Store, shown: Sequence[Shown], labels: FinishedLabels, rows: int) -> None:
    model = f"raycnn {fingerprint_id(labels.fingerprint)}"
    tasks = [_task(s, model) for s in shown]
    store.put("contact.png", contact_sheet(shown, rows))
    store.put("config.xml", _interface(labels.class_names).encode())
    store.put("tasks.json", json.dumps(tasks, indent=1, ensure_ascii=False).encode())
    store.put("review.csv", _table(shown).encode())


def _table(shown: Sequence[Shown]) -> str:
    """The picks as CSV, with a column for a person to write into."""
    sink = io.StringIO(newline="")
    table = csv.writer(sink)
    table.writerow(("key", "label", "probability", "margin", "corrected"))
    table.writerows(
        (s.pick.key, s.pick.class_name, f"{s.pick.probability:.4f}", f"{s.pick.margin:.4f}", "") for s in shown
    )
    return sink.getvalue()


def _interface(names: Sequence[str]) -> str:
    """Label Studio's labelling interface: one image, one class of it."""
    layout = ' layout="select"' if len(names) > MANY_CLASSES else ' showInLine="true"'
    choices = "".join(f"    <Choice value={quoteattr(name)}/>\n" for name in names)
    return (
        '<View>\n  <Header value="$key"/>\n  <Image name="image" value="$image"/>\n'
        f'  <Choices name="label" toName="image" choice="single"{layout}>\n{choices}  </Choices>\n</View>\n'
    )


def _task(shown: Shown, model: str) -> dict[str, Any]:
    """A task with the model's prediction, as Label Studio imports it. Its image is in it: no server has to have it."""
    pick = shown.pick
    kind = "png" if shown.seen.startswith(b"\x89PNG") else "jpeg"
    result = {"from_name": "label", "to_name": "image", "type": "choices", "value": {"choices": [pick.class_name]}}
    return {
        "data": {
            "image": f"data:image/{kind};base64,{base64.b64encode(shown.seen).decode()}",
            "key": pick.key,
            "source": shown.source,
            "predicted": pick.class_name,
            "margin": round(pick.margin, 4),
        },
        "predictions": [{"model_version": model, "score": round(pick.probability, 4), "result": [result]}],
    }


def contact_sheet(shown: Sequence[Shown], rows: int) -> bytes:
    """Thumbnails in rows as a PNG on white, 1,600 px wide, each with its key, its best classes and how sure they are.

    Args:
        shown: The first SHEET_IMAGES of them are drawn.
        rows: Of how many images they were picked.
    """
    drawn = shown[:SHEET_IMAGES]
    height = TOP + -(-len(drawn) // COLUMNS) * (CELL_HEIGHT + GAP) + MARGIN - GAP
    sheet = Image.new("RGB", (SHEET_WIDTH, height), "white")
    draw = ImageDraw.Draw(sheet)
    count = f"The {len(drawn)}" if len(drawn) == len(shown) else f"The first {len(drawn)} of {len(shown)}"
    _text(draw, MARGIN, MARGIN, f"{count} images most worth a look, of {rows:,}", 36)
    note = "p: probability of the class    m: margin to the next best class    red, with ?: the model has abstained"
    _text(draw, MARGIN, MARGIN + 50, note, 20, QUIET)
    for i, one in enumerate(drawn):
        x, y = MARGIN + i % COLUMNS * (CELL + GAP), TOP + i // COLUMNS * (CELL_HEIGHT + GAP)
        _cell(sheet, draw, x, y, i + 1, one)
    sink = io.BytesIO()
    sheet.save(sink, "PNG")
    return sink.getvalue()


def _cell(sheet: Image.Image, draw: ImageDraw.ImageDraw, x: int, y: int, number: int, shown: Shown) -> None:
    draw.rectangle((x, y, x + CELL - 1, y + CELL - 1), fill=GROUND, outline=FRAME)
    picture = _scaled(Image.open(io.BytesIO(shown.seen)).convert("RGB"), CELL - 2)
    sheet.paste(picture, (x + (CELL - picture.width) // 2, y + (CELL - picture.height) // 2))
    draw.rectangle((x, y, x + 8 + 9 * len(str(number)), y + 21), fill="white", outline=FRAME)
    _text(draw, x + 5, y + 5, str(number), 15)
    pick, below = shown.pick, y + CELL + 8
    name = f"{pick.class_name}?" if pick.is_abstained else pick.class_name
    _text(draw, x, below, shortened(name, 22, CELL), 22, WARNING if pick.is_abstained else INK)
    _text(draw, x, below + 28, f"p {pick.probability:.2f}   m {pick.margin:.2f}", 17)
    _text(draw, x, below + 51, shortened(f"or {pick.second}" if pick.second else "", 17, CELL), 17, QUIET)
    _text(draw, x, below + 74, shortened(pick.key, 15, CELL, keep_end=True), 15, QUIET)


def _text(draw: ImageDraw.ImageDraw, x: int, y: int, words: str, size: int, colour: Colour = INK) -> None:
    words, font = written(words, size)
    draw.text((x, y), words, fill=colour, font=font, anchor="lt")
