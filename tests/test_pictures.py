"""The pictures of a finished run, and what is chosen to be on them; what TensorBoard is given; unreadable images."""

import io
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from raycnn import images
from raycnn.config import ImageSpec
from raycnn.drawing.plots import TRAIN
from raycnn.errors import Bad, Status
from raycnn.metrics import Metrics, confused_pairs
from raycnn.models import Classifier, build
from raycnn.shards import (
    FORMAT,
    MANIFEST,
    VERSION,
    PackedCollection,
    PackedRow,
    Sample,
    open_collection,
    summarise,
    write_shard,
)
from raycnn.storage import Store, open_store
from raycnn.training.folder import BadImages, TensorBoard
from raycnn.training.mistakes import EXAMPLES, MOST_MISTAKES, examine, validation_samples
from raycnn.training.pictures import (
    RIGHT,
    confused_picture,
    confusion_picture,
    curves_picture,
    find_lr_picture,
    mistakes_picture,
    run_pictures,
    samples_picture,
    shown_classes,
)

GRAY = ImageSpec(height=8, width=8, channels=1, crop=1.0, mean=(0.45,), std=(0.22,))
RGB = ImageSpec(height=48, width=32, channels=3, crop=1.0)
LONG = ("x" * 300, "Äpfel", "日本", "a\nb")


def classifier_of(classes: int, spec: ImageSpec) -> Classifier:
    return build("classic", classes, spec, seed=1).eval()


def encoded(rng: np.random.Generator, spec: ImageSpec) -> bytes:
    shape = (spec.height, spec.width) if spec.channels == 1 else (spec.height, spec.width, 3)
    sink = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(sink, "PNG")
    return sink.getvalue()


def samples_of(count: int, classes: int, spec: ImageSpec) -> list[Sample]:
    rng = np.random.default_rng(0)
    return [Sample(f"{i:04d}.png", encoded(rng, spec), i % classes) for i in range(count)]


def size_of(png: bytes) -> tuple[int, int]:
    image = Image.open(io.BytesIO(png))
    image.load()
    assert image.format == "PNG"
    return image.size


# -- what is chosen -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def predicted() -> tuple[Classifier, list[Sample], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """A network, 300 images, and of each the class that it is taken for and how probable that is at temperature 2."""
    classifier, samples = classifier_of(4, GRAY), samples_of(300, 4, GRAY)
    pixels = torch.from_numpy(np.stack([images.pixels(s.encoded, GRAY) for s in samples]))
    with torch.no_grad():
        probabilities = torch.softmax(classifier(pixels).double() / 2.0, 1)
    return classifier, samples, probabilities.argmax(1).numpy(), probabilities.amax(1).numpy()


def test_the_mistakes_shown_are_those_that_the_network_is_surest_of(predicted):
    classifier, samples, said, probable = predicted
    found = examine(classifier, samples, 2.0)
    wrong = [i for i, s in enumerate(samples) if s.label != said[i]]
    surest = sorted(wrong, key=lambda i: -probable[i])[:MOST_MISTAKES]
    assert len(wrong) > MOST_MISTAKES
    assert found.rows == 300
    assert [m.probability for m in found.worst] == pytest.approx(probable[surest].tolist(), abs=1e-6)
    for mistake in found.worst:
        at = int(mistake.key[:4])
        assert (mistake.label, mistake.prediction) == (samples[at].label, said[at])
        assert (mistake.pixels == images.pixels(samples[at].encoded, GRAY)).all()


def test_the_examples_of_a_pair_are_of_that_pair_and_the_surest_of_it(predicted):
    classifier, samples, said, probable = predicted
    pairs = [(label, int(said[i])) for i, label in enumerate(s.label for s in samples) if label != said[i]]
    most = max(set(pairs), key=pairs.count)
    nothing = next((i, j) for i in range(4) for j in range(4) if i != j and (i, j) not in pairs)
    found = examine(classifier, samples, 2.0, [most, nothing])
    of_pair = sorted((i for i, s in enumerate(samples) if (s.label, said[i]) == most), key=lambda i: -probable[i])
    assert len(of_pair) > EXAMPLES
    assert {m.key for m in found.of_pairs[most]} == {samples[i].key for i in of_pair[:EXAMPLES]}
    assert found.of_pairs[nothing] == []


def test_equally_sure_mistakes_are_chosen_by_their_keys_and_what_cannot_be_judged_is_passed_over():
    classifier = classifier_of(2, GRAY)
    one = samples_of(1, 1, GRAY)[0]
    label = 1 - int(classifier(torch.from_numpy(images.pixels(one.encoded, GRAY))[None]).argmax())
    same = [one._replace(key=f"{i:03d}", label=label) for i in reversed(range(100))]
    others = [
        Sample("broken", b"broken", label),
        Sample("gone", None, label, Bad(Status.MISSING, "")),
        one._replace(label=None),
    ]
    found = examine(classifier, [*others, *same], 1.0)
    assert found.rows == 100
    assert [m.key for m in found.worst] == [f"{i:03d}" for i in range(MOST_MISTAKES)]


@pytest.mark.slow
def test_of_a_large_validation_split_a_bounded_part_is_examined_from_all_over_it(tmp_path):
    rng = np.random.default_rng(0)
    rows = [PackedRow(f"{i:05d}", encoded(rng, GRAY), i % 2, 8, 8, Status.OK) for i in range(5 * 512)]
    packed = packed_of(tmp_path, rows, ("cat", "dog"))
    assert len(list(validation_samples(packed, GRAY))) == len(rows)
    large = ImageSpec(height=500, width=500, channels=1, crop=1.0, mean=(0.45,), std=(0.22,))
    keys = [s.key for s in validation_samples(packed, large)]  # 250 million pixels are 1,000 of these images
    assert len(keys) <= 1000
    assert keys[0] == "00000"
    assert keys[-1] > "01500"


def test_of_many_classes_the_matrix_shows_those_that_are_confused_most():
    confusion = np.diag(np.full(1000, 5))
    assert shown_classes(confusion) == list(range(30))
    confusion[700, 3], confusion[3, 900], confusion[8, 9] = 4, 3, 1
    assert shown_classes(confusion, 4) == [3, 700, 900]
    assert shown_classes(confusion, 5) == [3, 8, 9, 700, 900]
    assert shown_classes(confusion[:10, :10]) == list(range(10))


def test_pairs_are_ordered_by_how_often_they_are_confused():
    assert confused_pairs([[9, 1, 0], [2, 9, 2], [0, 0, 9]]) == [(2, 1, 0), (2, 1, 2), (1, 0, 1)]
    assert confused_pairs(np.eye(3, dtype=np.int64)) == []


# -- how it is drawn ----------------------------------------------------------------------------------------


def packed_of(root: Path, rows: list[PackedRow], names: tuple[str, ...]) -> PackedCollection:
    """A packed data set whose rows are all of the validation split."""
    path = "data/val-00000-of-00001.parquet"
    (root / path).parent.mkdir(parents=True)
    groups = write_shard(root / path, rows, names)
    entry = {"path": path, "split": "val", "rows": len(rows), "row_groups": groups, "sha256": ""}
    entry |= {"bytes": (root / path).stat().st_size, "status": {"ok": len(rows)}, "classes": {}}
    about = {"format": FORMAT, "version": VERSION, "class_names": names, "shards": [entry]}
    (root / MANIFEST).write_text(json.dumps(about | {"splits": summarise([entry])}))
    packed = open_collection(str(root))
    assert isinstance(packed, PackedCollection)
    return packed


def lines_of(epochs: int) -> list[dict[str, Any]]:
    numbers = {"train/loss": 1.0, "val/loss": 2.0, "metrics/accuracy_top1": 0.5, "lr": 1e-3}
    return [{"epoch": i} | {name: value / (i + 1) for name, value in numbers.items()} for i in range(epochs)]


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "names"), [(GRAY, ("ant", "bee")), (RGB, LONG)])
def test_a_finished_run_gives_the_same_pictures_each_time(tmp_path, spec, names):
    classifier, samples = classifier_of(len(names), spec), samples_of(60, len(names), spec)
    rows = [PackedRow(s.key, s.encoded, s.label, spec.height, spec.width, Status.OK) for s in samples]
    packed, metrics = packed_of(tmp_path, rows, names), Metrics(len(names))
    pixels = torch.from_numpy(np.stack([images.pixels(s.encoded, spec) for s in samples]))
    with torch.no_grad():
        metrics.update(classifier(pixels), torch.tensor([s.label for s in samples]))
    made = run_pictures(classifier, packed, metrics, lines_of(3))
    assert sorted(made) == ["confused.png", "confusion.png", "curves.png", "filters.png", "mistakes.png"]
    assert {size_of(png)[0] for png in made.values()} == {1600}
    assert run_pictures(classifier, packed, metrics, lines_of(3)) == made


def test_a_network_without_mistakes_is_told_so():
    classifier = classifier_of(2, GRAY)
    found = examine(classifier, [], 1.0)
    perfect = np.array([[5, 0], [0, 5]])
    assert size_of(mistakes_picture(found, 10, ("ant", "bee")))[1] < 250
    assert size_of(confused_picture(found, perfect, [], ("ant", "bee")))[1] < 250


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 30, 31, 1000])
def test_the_matrix_is_readable_however_many_classes_there_are(classes):
    confusion = np.diag(np.full(classes, 7))
    confusion[0, classes - 1] = 123_456
    names = [f"{i} {LONG[i % 4]}" for i in range(classes)]
    png = confusion_picture(confusion, names)
    width, height = size_of(png)
    assert width == 1600
    assert height < 1800
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    green = (np.abs(pixels - RIGHT).sum(axis=2) < 12).any(axis=1)
    shown = {2: 1, 30: 29, 31: 1, 1000: 1}[classes]  # of the first row nearly all is wrong; of 31 two are confused
    assert np.count_nonzero(np.diff(green.astype(int)) == 1) == shown
    assert confusion_picture(confusion.T, names) != png


@pytest.mark.parametrize("epochs", [1, 3, 300])
def test_curves_of_any_length_are_drawn(epochs):
    assert size_of(curves_picture(lines_of(epochs))) == (1600, 680)


def test_the_suggestion_stands_at_its_place_among_the_rates():
    rates = [10 ** (-6 + 6 * i / 199) for i in range(200)]
    pixels = np.asarray(Image.open(io.BytesIO(find_lr_picture(rates, [1.0] * 200, 1e-4)))).astype(int)
    curve = np.flatnonzero((np.abs(pixels - TRAIN).sum(axis=2) < 12)[:, :1480].any(axis=0))
    # The mark is a line over the whole height; the frame of the axes is not drawn.
    dark = (pixels.sum(axis=2) < 600).sum(axis=0)
    (mark,) = {round(x / 4) for x in np.flatnonzero(dark > 400)}
    assert (4 * mark - curve[0]) / (curve[-1] - curve[0]) == pytest.approx(1 / 3, abs=0.01)


@pytest.mark.parametrize(("count", "last"), [(100, 63), (3, 2)])
def test_the_first_training_samples_are_shown_each_in_its_place(count: int, last: int):
    black = np.zeros((count, 30, 20, 1), np.uint8)
    white = black.copy()
    white[last] = 255
    found = [np.asarray(Image.open(io.BytesIO(samples_picture(p)))).astype(int) for p in (black, white)]
    assert found[0].shape[1] == 1600
    rows, columns = np.nonzero((found[0] != found[1]).any(axis=2))
    assert np.ptp(rows) + 1 == pytest.approx(1.5 * (np.ptp(columns) + 1), abs=2)
    if count > last + 1:
        white[last] = 0
        white[last + 1 :] = 255
        assert samples_picture(white) == samples_picture(black)


# -- what else a run leaves ---------------------------------------------------------------------------------


def events_of(store: Store) -> Iterator[Any]:
    """The events in TensorBoard's file, as its format has them: length, checksum, event, checksum."""
    from tensorboardX.proto.event_pb2 import Event  # takes long to import

    (entry,) = store.list("tensorboard/")
    content, at = store.get(entry.path), 0
    while at < len(content):
        (size,) = struct.unpack("<Q", content[at : at + 8])
        yield Event.FromString(content[at + 12 : at + 12 + size])
        at += size + 16


def test_tensorboard_is_given_numbers_and_pictures_of_each_epoch(tmp_path):
    store = open_store(str(tmp_path))
    matrix = confusion_picture(np.array([[3, 1], [0, 2]]), ("ant", "bee"))
    gray = np.arange(32, dtype=np.uint8).reshape(4, 8, 1)
    with TensorBoard(store, True, 0) as board:
        board.add({"epoch": 0, "step": 10, "val/loss": 0.5}, images={"confusion": matrix, "samples": gray})
        board.add({"epoch": 1, "step": 20, "val/loss": 0.25, "time": {"data": 0.1}}, images={"confusion": matrix})
    found = [(event.step, value) for event in events_of(store) for value in event.summary.value]
    assert [(step, v.simple_value) for step, v in found if v.tag == "val/loss"] == [(10, 0.5), (20, 0.25)]
    shown = [(step, v.tag, v.image) for step, v in found if v.HasField("image")]
    assert [(step, tag) for step, tag, _ in shown] == [(10, "confusion"), (10, "samples"), (20, "confusion")]
    assert shown[0][2].encoded_image_string == matrix
    assert (shown[0][2].width, shown[0][2].height) == size_of(matrix)
    assert (shown[1][2].width, shown[1][2].height) == (8, 4)
    decoded = np.asarray(Image.open(io.BytesIO(shown[1][2].encoded_image_string)))
    assert (decoded == gray).all()


def listed(store: Store) -> list[dict]:
    return [json.loads(line) for line in store.get("bad.jsonl").decode().splitlines()]


def test_an_unreadable_image_is_listed_once_however_many_epochs_meet_it(tmp_path):
    store = open_store(str(tmp_path))
    found = {"a": Bad(Status.TRUNCATED, "why a"), "b: c": Bad(Status.EMPTY, "why b: c")}
    for _ in range(2):  # the second is the run, resumed
        bad = BadImages(store)
        for _ in range(2):
            bad.write(found, 2)
    assert listed(store) == [
        {"key": "a", "status": "truncated", "detail": "why a"},
        {"key": "b: c", "status": "empty", "detail": "why b: c"},
    ]


def test_of_very_many_unreadable_images_a_thousand_are_listed_and_all_are_counted(tmp_path):
    store = open_store(str(tmp_path))
    for process in range(2):
        count = 1500 + 100 * process
        BadImages(store).write({str(i): Bad(Status.EMPTY, "") for i in range(count)}, count)
        *lines, last = listed(store)
        assert [line["key"] for line in lines] == [str(i) for i in range(1000)]
        assert last == {"not_listed": 500 + 100 * process}


def test_a_run_whose_images_are_all_good_has_no_list_of_bad_ones(tmp_path):
    BadImages(open_store(str(tmp_path))).write({}, 0)
    assert list(tmp_path.iterdir()) == []
