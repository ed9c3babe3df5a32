"""Packing: nothing is dropped, nothing is redone, and other tools read the result."""

import csv
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import raycnn
from raycnn import bundle as bundles
from raycnn.config import ImageSpec, PackConfig, make
from raycnn.errors import ConfigError, DataError
from raycnn.models import build
from raycnn.packing.mixing import Planner, split_for, split_shares
from raycnn.shards import PackedCollection, Slice, open_collection
from raycnn.shards.containers import TarCollection
from raycnn.storage import open_store

RAYCNN = str(Path(sys.executable).with_name("raycnn"))

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def png(value: int, size: int = 8, mode: str = "L") -> bytes:
    sink = io.BytesIO()
    Image.new(mode, (size, size), value if mode == "L" else (value, 0, 0)).save(sink, "PNG")
    return sink.getvalue()


def fill(url: str, files: dict[str, bytes]) -> str:
    store = open_store(url)
    for name, content in files.items():
        store.put(name, content)
    return url


def images(count: int, classes: int = 3) -> dict[str, bytes]:
    """`count` images that all differ, spread over class folders."""
    return {f"class{i % classes}/{i:04d}.png": png(i % 256, 8 + i // 256) for i in range(count)}


def rows_of(url: str, split: str | None = None) -> list[dict]:
    store = open_store(url)
    shards = [s for s in json.loads(store.get("manifest.json"))["shards"] if split in (None, s["split"])]
    tables = [pq.read_table(io.BytesIO(store.get(s["path"]))) for s in shards]
    return [row for table in tables for row in table.to_pylist()]


@pytest.mark.s3
def test_every_image_of_an_s3_prefix_is_packed_once_with_its_label_and_status(s3_url):
    files = images(300) | {
        "class0/empty.png": b"",
        "class1/page.jpg": b"<html>not found</html>",
        "class2/half.png": png(9, 64, "RGB")[:60],
    }
    source = fill(f"{s3_url}/raw", files)
    report = raycnn.pack(source, f"{s3_url}/packed", val=0.2, test=0.2)
    assert report.rows == 303
    assert sum(report.splits.values()) == 303
    assert report.status == {"ok": 300, "empty": 1, "unsupported": 1, "truncated": 1}
    rows = rows_of(f"{s3_url}/packed")
    assert sorted(r["key"] for r in rows) == sorted(files)
    names = open_collection(f"{s3_url}/packed").class_names
    for row in rows:
        assert names[row["label"]] == row["key"].split("/")[0]
        assert (row["image"]["bytes"] or b"") == files[row["key"]]
    unreadable = open_store(f"{s3_url}/packed").get("unreadable.jsonl").decode().splitlines()
    assert {json.loads(line)["key"] for line in unreadable} == {
        "class0/empty.png",
        "class1/page.jpg",
        "class2/half.png",
    }


def test_packing_again_writes_nothing(tmp_path):
    source = fill(str(tmp_path / "raw"), images(40))
    first = raycnn.pack(source, str(tmp_path / "packed"))
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "packed").rglob("*") if f.is_file()}
    again = raycnn.pack(source, str(tmp_path / "packed"))
    assert first.shards_written > 0
    assert again.shards_written == 0
    assert again.rows == first.rows
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "packed").rglob("*") if f.is_file()} == before


def test_duplicates_across_splits_and_classes_are_found(tmp_path):
    files = images(60) | {f"class1/copy{i}.png": png(0) for i in range(12)}
    report = raycnn.pack(fill(str(tmp_path / "raw"), files), str(tmp_path / "packed"), val=0.3, test=0.3)
    assert report.duplicates == {"groups": 1, "images": 12, "across_splits": 1, "across_classes": 1}
    line = json.loads((tmp_path / "packed" / "duplicates.jsonl").read_text())
    assert "class0/0000.png" in line["keys"]
    assert set(line["classes"]) == {"class0", "class1"}


def test_rows_are_mixed_and_the_order_depends_on_the_seed_alone(tmp_path):
    source = fill(str(tmp_path / "raw"), images(200, classes=2))
    keys = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        raycnn.pack(source, str(tmp_path / name), seed=seed, val=0, test=0)
        keys[name] = [r["key"] for r in rows_of(str(tmp_path / name))]
    assert keys["a"] == keys["b"] != keys["c"]
    assert sorted(keys["a"]) == sorted(keys["c"])
    first_half = sum(k.startswith("class0/") for k in keys["a"][:100])
    assert 30 < first_half < 70


def test_class_sorted_parquet_is_mixed_through_a_window(tmp_path):
    source = fill(str(tmp_path / "raw"), images(400, classes=2))
    raycnn.pack(source, str(tmp_path / "once"), val=0, test=0)
    table = pq.read_table(tmp_path / "once" / "data" / "train-00000-of-00001.parquet").sort_by("label")
    (tmp_path / "sorted").mkdir()
    pq.write_table(table, tmp_path / "sorted" / "all.parquet", row_group_size=50)
    report = raycnn.pack(str(tmp_path / "sorted"), str(tmp_path / "mixed"), val=0.1, test=0.1)
    rows = rows_of(str(tmp_path / "mixed"))
    assert sorted(r["key"] for r in rows) == sorted(table["key"].to_pylist())
    assert set(report.splits) == {"train", "val", "test"}
    train = [
        r["label"] for r in rows if split_for(r["key"], None, (), make(PackConfig, {"src": "", "dst": ""})) == "train"
    ]
    assert 0.35 < np.mean(train[:100]) < 0.65


def test_class_sorted_tars_are_mixed_and_nothing_of_them_is_lost(tmp_path):
    (tmp_path / "tars").mkdir()
    for name in ("cat", "dog"):
        with tarfile.open(tmp_path / "tars" / f"{name}.tar", "w") as tar:
            for i in range(100):
                add(tar, f"{i:03d}.png", png(i))
                add(tar, f"{i:03d}.cls", name.encode())
    report = raycnn.pack(str(tmp_path / "tars"), str(tmp_path / "packed"), val=0.2, test=0)
    rows = [row for row in rows_of(str(tmp_path / "packed")) if row["key"]]
    assert (report.rows, len(rows), len({r["key"] for r in rows})) == (200, 200, 200)
    names = open_collection(str(tmp_path / "packed")).class_names
    assert all(r["key"].startswith(f"{names[r['label']]}.tar#") for r in rows)
    train = rows_of(str(tmp_path / "packed"), "train")
    assert 0.3 < np.mean([r["label"] for r in train[: len(train) // 2]]) < 0.7


def test_a_plan_keeps_runs_of_a_tar_together_and_windows_within_their_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr("raycnn.packing.mixing.WINDOW_BYTES", 100 * 2**20)
    slices = [Slice(f"k{i}", "a.tar", 0, "", i, 1, i * 2**20, 2**20, 0) for i in range(1000)]
    config = make(PackConfig, {"src": "a", "dst": "b"})
    planner = Planner(config, TarCollection(open_store(str(tmp_path)), "", ()), tmp_path)
    tasks = list(planner.tasks(iter(slices)))
    assert sorted(s.first for task in tasks for s in task) == list(range(1000))
    assert max(len(task) for task in tasks) <= 100
    flat = [s.first for task in tasks for s in task]
    assert flat != sorted(flat)
    assert sum(b != a + 1 for a, b in itertools.pairwise(flat)) <= 1000 // 32 + 1
    assert all({o.split for o in outputs} == {"train", "val", "test"} for outputs in planner.outputs)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


@pytest.mark.timeout(180)
def test_a_pack_that_was_killed_resumes_and_keeps_what_was_done(ray_cluster, tmp_path):
    source = fill(str(tmp_path / "raw"), {f"c{i % 2}/{i}.png": os.urandom(700_000) for i in range(16)})
    command = [RAYCNN, "pack", source, str(tmp_path / "packed"), "--shard-mib", "1"]
    environment = os.environ | {"RAY_ADDRESS": ray_cluster}
    process = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    parts = tmp_path / "packed" / "_pack" / "parts"
    while process.poll() is None and not (parts.exists() and len(list(parts.glob("*.json"))) >= 2):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {f: f.stat().st_mtime_ns for f in parts.glob("*.json")}
    assert not (tmp_path / "packed" / "manifest.json").exists()
    report = raycnn.pack(source, str(tmp_path / "packed"), shard_mib=1)
    assert report.rows == 16
    assert sorted(r["key"] for r in rows_of(str(tmp_path / "packed"))) == sorted(f"c{i % 2}/{i}.png" for i in range(16))
    assert 0 < report.shards_written <= 16 - len(done)
    assert all(f.stat().st_mtime_ns == at for f, at in done.items())


def test_a_source_with_a_split_that_nobody_knows_is_refused_before_anything_is_written(tmp_path):
    source = fill(str(tmp_path / "raw"), {f"{i}.png": png(i) for i in range(6)})
    words = ("train", "test", "unlabeled", "train", "test", "val")
    lines = [f"{i}.png,{i % 2},{word}" for i, word in enumerate(words)]
    Path(source, "labels.csv").write_text("\n".join(["image,label,split", *lines]))
    with pytest.raises(DataError, match=r"2\.png names the split 'unlabeled'; call it train, val or test, or leave it"):
        raycnn.pack(source, str(tmp_path / "packed"))
    assert not (tmp_path / "packed").exists()


def test_a_source_of_which_everything_is_excluded_leaves_no_plan_behind(tmp_path):
    source = fill(str(tmp_path / "raw"), images(6))
    for _ in range(2):
        with pytest.raises(DataError, match="no images to pack; left out"):
            raycnn.pack(source, str(tmp_path / "packed"), exclude=("*",))
    assert not (tmp_path / "packed").exists()


def test_an_output_inside_its_input_is_refused(tmp_path):
    source = fill(str(tmp_path / "raw"), images(4))
    with pytest.raises(ConfigError, match="lie inside each other"):
        raycnn.pack(source, f"{source}/packed")
    assert not Path(source, "packed").exists()


def test_another_source_does_not_mix_into_a_packed_set(tmp_path):
    raycnn.pack(fill(str(tmp_path / "a"), images(10)), str(tmp_path / "packed"))
    with pytest.raises(ConfigError, match="begun with another selection"):
        raycnn.pack(fill(str(tmp_path / "b"), images(10)), str(tmp_path / "packed"))


def test_a_packed_shard_that_was_cut_is_named(tmp_path):
    raycnn.pack(fill(str(tmp_path / "raw"), images(30)), str(tmp_path / "packed"), val=0, test=0)
    shard = tmp_path / "packed" / "data" / "train-00000-of-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-10])
    packed = open_collection(str(tmp_path / "packed"))
    assert isinstance(packed, PackedCollection)
    with pytest.raises(DataError, match="its manifest says"):
        list(packed.select("all", __import__("collections").Counter()))


def test_a_source_with_its_own_splits_keeps_them_and_validation_is_held_out_of_train():
    config = make(PackConfig, {"src": "a", "dst": "b", "val": 0.5})
    assert split_for("x", "test", ("train", "test"), config) == "test"
    assert {split_for(str(i), "train", ("train", "test"), config) for i in range(50)} == {"train", "val"}
    assert split_for("x", "train", ("train", "val"), config) == "train"
    assert split_shares("train", ("train", "test"), config) == {"train": 0.5, "val": 0.5}


def test_labels_that_came_back_from_a_person_are_those_of_the_next_data_set(tmp_path):
    """label -> review -> a person -> pack --labels."""
    source = fill(str(tmp_path / "raw"), {f"{i:02d}.png": png(i * 5) for i in range(30)})
    spec = ImageSpec(height=8, width=8, channels=1, crop=1.0, mean=(0.5,), std=(0.25,))
    samples = [png(1)]
    about = {"temperature": 1.0, "metrics": {}, "validation": {}, "data_fingerprint": None}
    bundles.save(str(tmp_path / "bundle"), build("classic", 2, spec).eval(), ("cat", "dog"), samples=samples, **about)
    raycnn.label(source, str(tmp_path / "labels"), bundle=str(tmp_path / "bundle"))
    raycnn.review(str(tmp_path / "labels"), str(tmp_path / "review"), count=12)
    with (tmp_path / "review" / "review.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    for i, line in enumerate(lines[:9]):
        line["corrected"] = ("cat", "dog", "axolotl")[i % 3]
    with (tmp_path / "corrected.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    packed = str(tmp_path / "packed")
    report = raycnn.pack(source, packed, labels=str(tmp_path / "corrected.csv"))
    assert (report.rows, report.labels, report.classes) == (30, 9, 3)
    names = open_collection(packed).class_names
    assert names == ("axolotl", "cat", "dog")
    said = {r["key"]: None if r["label"] is None else names[r["label"]] for r in rows_of(packed)}
    assert said == dict.fromkeys(said) | {line["key"]: line["corrected"] for line in lines[:9]}


def test_labels_override_those_of_a_packed_source_and_belong_to_what_is_resumed(tmp_path):
    source = fill(str(tmp_path / "raw"), images(30))
    raycnn.pack(source, str(tmp_path / "first"))
    (tmp_path / "labels.csv").write_text("key,label\nclass1/0001.png,class0\nclass2/0002.png,class10\n")
    second, labels = str(tmp_path / "second"), str(tmp_path / "labels.csv")
    report = raycnn.pack(str(tmp_path / "first"), second, labels=labels)
    assert (report.labels, report.classes) == (2, 4)
    names = open_collection(second).class_names
    said = {r["key"]: names[r["label"]] for r in rows_of(second)}
    expected = {key: key.split("/")[0] for key in images(30)}
    assert said == expected | {"class1/0001.png": "class0", "class2/0002.png": "class10"}
    assert raycnn.pack(str(tmp_path / "first"), second, labels=labels).shards_written == 0
    with pytest.raises(ConfigError, match="begun with another fingerprint: labels"):
        raycnn.pack(str(tmp_path / "first"), second)
    (tmp_path / "labels.csv").write_text("key,label\nclass1/9999.png,class0\n")
    with pytest.raises(DataError, match=r"no image with the key 'class1/9999.png', which --labels names"):
        raycnn.pack(str(tmp_path / "first"), str(tmp_path / "third"), labels=labels)
    assert not (tmp_path / "third").exists()
