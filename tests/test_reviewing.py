"""What a person is shown: the images that the model is least sure of, in forms that a person can work with."""

import base64
import csv
import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from label_output import CLASSES, make_labels, png
from PIL import Image

import raycnn
from raycnn.errors import ConfigError, DataError, StorageError
from raycnn.reviewing import ReviewReport
from raycnn.shards import read_labels


def labelled(out: Path) -> list[dict]:
    """Every row that has a prediction, with its margin."""
    rows = [r for part in sorted(out.glob("labels/*/*.parquet")) for r in pq.read_table(part).to_pylist()]
    return [
        r | {"margin": r["top_k"][0]["probability"] - r["top_k"][1]["probability"], "best": r["top_k"][0]["class_name"]}
        for r in rows
        if r["status"] == "ok"
    ]


@pytest.fixture
def photos(tmp_path: Path) -> str:
    for i in range(60):
        file = tmp_path / "photos" / f"shelf {i % 4}" / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(i))
    return str(tmp_path / "photos")


def review(out: Path, dst: Path, **options: int) -> tuple[ReviewReport, list[dict]]:
    report = raycnn.review(str(out), str(dst), **options)
    with (dst / "review.csv").open(newline="", encoding="utf-8") as file:
        return report, list(csv.DictReader(file))


@pytest.mark.slow
def test_the_least_sure_of_every_class_are_picked_and_the_classes_take_turns(photos, tmp_path):
    make_labels(photos, str(tmp_path / "labels"))
    report, lines = review(tmp_path / "labels", tmp_path / "review", count=9)
    assert (report.rows, report.picked, report.unreadable) == (60, 9, 0)
    assert report.classes == {"cat": 3, "dog": 3, "eel": 3}
    rows = labelled(tmp_path / "labels")
    for name in CLASSES:
        lowest = sorted((r["margin"], r["key"]) for r in rows if r["class_name"] == name)[:3]
        assert [line["key"] for line in lines if line["label"] == name] == [key for _, key in lowest]
    assert lines[0]["key"] == min(rows, key=lambda r: r["margin"])["key"]
    assert all(line["corrected"] == "" for line in lines)
    assert [{line["label"] for line in lines[i : i + 3]} for i in (0, 3, 6)] == [set(CLASSES)] * 3


@pytest.mark.slow
def test_what_the_model_abstained_from_comes_first(photos, tmp_path):
    make_labels(photos, str(tmp_path / "labels"), abstain=0.5)
    abstained = {r["key"] for r in labelled(tmp_path / "labels") if r["class_name"] is None}
    assert 3 < len(abstained) < 40
    report, lines = review(tmp_path / "labels", tmp_path / "review", count=len(abstained))
    best = Counter(r["best"] for r in labelled(tmp_path / "labels") if r["class_name"] is None)
    turns = min(best.values())
    assert {line["key"] for line in lines[: turns * len(best)]} <= abstained
    assert report.abstained >= turns * len(best)


@pytest.mark.slow
def test_the_images_are_those_of_the_collection(photos, tmp_path):
    make_labels(photos, str(tmp_path / "labels"))
    _, lines = review(tmp_path / "labels", tmp_path / "review", count=20)
    files = sorted((tmp_path / "review" / "images").iterdir())
    assert len(files) == 20
    for number, (file, line) in enumerate(zip(files, lines, strict=True), 1):
        assert file.name == f"{number:04d}-{Path(line['key']).stem}.png"
        assert file.read_bytes() == (Path(photos) / line["key"]).read_bytes()


def parquet(folder: Path) -> None:
    """Several rows a slice, whose keys are their places."""
    pq.write_table(pa.table({"image": [png(i) for i in range(40)]}), folder / "all.parquet", row_group_size=7)


def tar(folder: Path) -> None:
    with tarfile.open(folder / "all.tar", "w") as file:
        for i in range(40):
            info = tarfile.TarInfo(f"{i:03d}.png")
            info.size = len(png(i))
            file.addfile(info, io.BytesIO(png(i)))


@pytest.mark.slow
@pytest.mark.parametrize("source", [parquet, tar])
def test_images_inside_of_larger_objects_are_found(source, tmp_path):
    (tmp_path / "data").mkdir()
    source(tmp_path / "data")
    make_labels(str(tmp_path / "data"), str(tmp_path / "labels"), per_unit=3)
    report, lines = review(tmp_path / "labels", tmp_path / "review", count=12)
    assert (report.rows, report.picked) == (40, 12)
    for file, line in zip(sorted((tmp_path / "review" / "images").iterdir()), lines, strict=True):
        assert file.read_bytes() == png(int(line["key"].partition("#")[2].partition(":")[0]))


def test_label_studio_gets_tasks_with_predictions_and_an_interface_with_every_class(photos, tmp_path):
    make_labels(photos, str(tmp_path / "labels"))
    _, lines = review(tmp_path / "labels", tmp_path / "review", count=5)
    tasks = json.loads((tmp_path / "review" / "tasks.json").read_text(encoding="utf-8"))
    interface = ElementTree.parse(tmp_path / "review" / "config.xml").getroot()
    choices, image = interface.find("Choices"), interface.find("Image")
    assert choices is not None
    assert image is not None
    assert [c.get("value") for c in choices] == list(CLASSES)
    assert image.get("value") == "$image"
    for task, line in zip(tasks, lines, strict=True):
        (prediction,) = task["predictions"]
        (result,) = prediction["result"]
        assert (result["from_name"], result["to_name"]) == (choices.get("name"), image.get("name"))
        assert (result["type"], result["value"]) == ("choices", {"choices": [line["label"]]})
        assert prediction["score"] == pytest.approx(float(line["probability"]))
        assert task["data"]["key"] == line["key"]
        assert task["data"]["source"] == f"{photos}/{line['key']}"
        kind, _, content = task["data"]["image"].partition(";base64,")
        shown = Image.open(io.BytesIO(base64.b64decode(content)))
        assert kind == "data:image/png"
        assert np.array_equal(np.asarray(shown)[::32, ::32], np.asarray(Image.open(io.BytesIO(png(_number(line))))))


def _number(line: dict[str, str]) -> int:
    return int(Path(line["key"]).stem)


@pytest.mark.slow
def test_the_contact_sheet_shows_every_image(photos, tmp_path):
    make_labels(photos, str(tmp_path / "labels"))
    _, lines = review(tmp_path / "labels", tmp_path / "review", count=10)
    sheet = Image.open(tmp_path / "review" / "contact.png").convert("RGB")
    assert sheet.width == 1600
    pixels = np.asarray(sheet).astype(int)
    for number in (0, 9):  # in the first row and in the second
        expected = np.asarray(Image.open(io.BytesIO(png(_number(lines[number]))))).astype(int)
        x, y = 40 + number % 8 * 192, 136 + number // 8 * 292
        drawn = pixels[y + 1 : y + 171, x + 1 : x + 171]
        centres = drawn[170 // 16 :: 170 // 8, 170 // 16 :: 170 // 8][:8, :8]
        assert np.abs(centres - expected).mean() < 12
    assert (pixels[-40:] == 255).all()


@pytest.mark.slow
def test_images_that_are_gone_or_changed_are_left_out_and_counted(photos, tmp_path):
    make_labels(photos, str(tmp_path / "labels"))
    _, lines = review(tmp_path / "labels", tmp_path / "before", count=10)
    (Path(photos) / lines[0]["key"]).unlink()
    (Path(photos) / lines[4]["key"]).write_bytes(png(99))
    report, after = review(tmp_path / "labels", tmp_path / "after", count=10)
    assert (report.picked, report.unreadable) == (8, 2)
    assert after == [line for i, line in enumerate(lines) if i not in (0, 4)]


def test_a_folder_with_something_in_it_is_not_written_to(photos, tmp_path):
    make_labels(photos, str(tmp_path / "labels"))
    (tmp_path / "review").mkdir()
    (tmp_path / "review" / "review.csv").write_text("key,label,corrected\n")
    with pytest.raises(ConfigError, match="is not empty, and may hold somebody's corrections"):
        raycnn.review(str(tmp_path / "labels"), str(tmp_path / "review"))
    assert len(list((tmp_path / "review").iterdir())) == 1
    for dst in (tmp_path / "labels" / "review", tmp_path / "photos" / "review"):
        with pytest.raises(ConfigError, match="lie inside each other"):
            raycnn.review(str(tmp_path / "labels"), str(dst))
        assert not dst.exists()
    with pytest.raises(StorageError, match="name a folder that is free"):
        raycnn.review(str(tmp_path / "labels"), str(tmp_path / "review" / "review.csv" / "more"))


@pytest.mark.slow
def test_a_review_that_fails_leaves_nothing_in_the_way_of_the_next(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        parquet(tmp_path / "data" / name)
    make_labels(str(tmp_path / "data"), str(tmp_path / "labels"), per_unit=3)
    last = tmp_path / "data" / "b" / "all.parquet"
    last.rename(tmp_path / "kept")
    pq.write_table(pa.table({"image": [png(i) for i in range(9)]}), last)
    with pytest.raises(DataError):
        raycnn.review(str(tmp_path / "labels"), str(tmp_path / "review"), count=12)
    assert list((tmp_path / "review").iterdir()) == []
    (tmp_path / "kept").rename(last)
    assert raycnn.review(str(tmp_path / "labels"), str(tmp_path / "review"), count=12).picked == 12


HOSTILE = (
    "new\nline.png",
    'a,b;"c".png',
    "=1+2.png",
    "<b>&amp;.png",
    "写真 🙂.png",
    "tab\there.png",
    "x" * 200,
    "%41+#?.png",
)


def test_any_name_is_shown_and_comes_back_as_it_is(tmp_path):
    (tmp_path / "photos").mkdir()
    for i, name in enumerate(("0", *HOSTILE)):
        (tmp_path / "photos" / name).write_bytes(png(i))
    make_labels(str(tmp_path / "photos"), str(tmp_path / "labels"), per_unit=100)
    _, lines = review(tmp_path / "labels", tmp_path / "review")
    keys = {line["key"] for line in lines}
    assert keys == {"0", *HOSTILE} - {"%41+#?.png"}
    text = (tmp_path / "review" / "review.csv").read_text(encoding="utf-8")
    (tmp_path / "review" / "review.csv").write_text(text.replace(",\n", ",dog\n"), encoding="utf-8")
    assert read_labels(str(tmp_path / "review" / "review.csv")).by_key == dict.fromkeys(keys, "dog")


def test_nothing_to_look_at_is_said(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "empty.png").touch()
    make_labels(str(tmp_path / "photos"), str(tmp_path / "labels"))
    with pytest.raises(DataError, match="none of its 1 rows has a prediction"):
        raycnn.review(str(tmp_path / "labels"), str(tmp_path / "review"))
    assert not (tmp_path / "review").exists()
