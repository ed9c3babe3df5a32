"""Labeling on a real cluster: one row for every image, whatever it is and whatever happens."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

import raycnn
from raycnn import bundle as bundles
from raycnn.config import ImageSpec
from raycnn.errors import ConfigError, DataError
from raycnn.models import build
from raycnn.storage import open_store

RAYCNN = str(Path(sys.executable).with_name("raycnn"))

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

CLASSES = ("cat", "dog", "eel")


def png(seed: int, size: int = 8) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size), np.uint8)).save(sink, "PNG")
    return sink.getvalue()


def make_bundle(url: str, seed: int = 0) -> str:
    spec = ImageSpec(height=8, width=8, channels=1, crop=1.0, mean=(0.5,), std=(0.25,))
    classifier = build("classic", len(CLASSES), spec, seed=seed).eval()
    samples = [png(i) for i in range(3)]
    bundles.save(
        url, classifier, CLASSES, temperature=1.5, metrics={}, validation={}, samples=samples, data_fingerprint=None
    )
    return url


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> str:
    return make_bundle(str(tmp_path_factory.mktemp("bundle")))


def fill(url: str, files: dict[str, bytes]) -> str:
    store = open_store(url)
    for name, content in files.items():
        store.put(name, content)
    return url


def rows_of(out: str) -> list[dict]:
    store = open_store(out)
    parts = [e.path for e in store.list("labels/")]
    return [row for path in parts for row in pq.read_table(io.BytesIO(store.get(path))).to_pylist()]


def etags(url: str) -> dict[str, str]:
    return {e.path: e.etag for e in open_store(url).list()}


@pytest.mark.s3
def test_every_object_of_an_s3_prefix_has_one_row_and_the_second_run_writes_nothing(s3_url, bundle):
    files = {f"{i % 7}/{i:03d}.png": png(i) for i in range(200)}
    files |= {"empty.jpg": b"", "page.jpg": b"<html>", "half.png": png(1, 64)[:300], "ünï code+%.png": png(3)}
    data = fill(f"{s3_url}/photos", files)
    out = f"{s3_url}/labels"
    report = raycnn.label(data, out, bundle=bundle, top_k=2)
    assert report.rows == len(files)
    assert report.status == {"empty": 1, "ok": 201, "truncated": 1, "unsupported": 1}
    rows = {row["key"]: row for row in rows_of(out)}
    assert rows.keys() == files.keys()
    good, bad = rows["0/000.png"], rows["page.jpg"]
    assert good["class_name"] == CLASSES[good["label"]]
    assert good["top_k"][0]["label"] == good["label"]
    assert len(good["top_k"]) == 2
    assert good["top_k"][0]["probability"] == good["probability"] >= good["top_k"][1]["probability"]
    assert {k: bad[k] for k in ("label", "class_name", "probability", "top_k")} == dict.fromkeys(
        ("label", "class_name", "probability", "top_k")
    )
    assert bad["status"] == "unsupported"
    assert bad["detail"]
    before = etags(out)
    assert raycnn.label(data, out, bundle=bundle, top_k=2).units_written == 0
    assert etags(out) == before
    proof = raycnn.verify(out)
    assert proof.error is None
    assert (proof.expected, proof.present) == (len(files), len(files))


def test_new_images_are_the_next_generation_and_what_changed_is_reported(tmp_path, bundle):
    data = fill(str(tmp_path / "photos"), {f"{i:02d}.png": png(i) for i in range(20)})
    out = str(tmp_path / "labels")
    raycnn.label(data, out, bundle=bundle)
    before = etags(out)
    fill(data, {"05.png": png(99), "new1.png": png(50), "new2.png": png(51)})
    (tmp_path / "photos" / "07.png").unlink()
    report = raycnn.label(data, out, bundle=bundle)
    assert (report.generations, report.rows, report.units_written) == (2, 22, 1)
    assert (report.changed, report.gone) == (1, 1)
    assert before.items() <= etags(out).items()
    assert sorted(r["key"] for r in rows_of(out)) == sorted(
        [f"{i:02d}.png" for i in range(20)] + ["new1.png", "new2.png"]
    )
    proof = raycnn.verify(out, deep=True)
    assert proof.error is None
    assert proof.inputs == {"new": 0, "changed": 1, "gone": 1}


@pytest.mark.timeout(240)
def test_a_run_that_was_killed_is_resumed_and_loses_and_doubles_nothing(tmp_path, bundle):
    data, some = str(tmp_path / "photos"), [png(i) for i in range(50)]
    files = {f"{i:05d}.png": some[i % 50] for i in range(5000)}
    Path(data).mkdir()
    for name, content in files.items():
        Path(data, name).write_bytes(content)
    out = tmp_path / "labels"
    command = [RAYCNN, "label", data, str(out), "--bundle", bundle]
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    process = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(out.glob("labels/*/part-*.parquet")):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    committed = etags(str(out))
    assert not list(out.glob("_SUCCESS*"))
    report = raycnn.label(data, str(out), bundle=bundle)
    parts = [path for path in committed if path.startswith("labels/")]
    assert 1 <= len(parts) < report.units
    assert report.units_written <= report.units - len(parts)
    assert committed.items() <= etags(str(out)).items()
    proof = raycnn.verify(str(out))
    assert proof.error is None
    assert (proof.expected, proof.present) == (5000, 5000)
    assert sorted(r["key"] for r in rows_of(str(out))) == sorted(files)


def test_another_bundle_needs_another_output(tmp_path, bundle):
    data = fill(str(tmp_path / "photos"), {"a.png": png(1)})
    raycnn.label(data, str(tmp_path / "labels"), bundle=bundle)
    other = make_bundle(str(tmp_path / "other"), seed=1)
    with pytest.raises(ConfigError, match=r"begun with another fingerprint: .*weights.*use another output"):
        raycnn.label(data, str(tmp_path / "labels"), bundle=other)


def test_a_replaced_shard_stops_the_run_unless_its_loss_is_accepted(tmp_path, bundle):
    data = fill(str(tmp_path / "raw"), {f"{c}/{i}.png": png(i) for c in CLASSES for i in range(10)})
    raycnn.pack(data, str(tmp_path / "packed"), val=0, test=0)
    shard = tmp_path / "packed" / "data" / "train-00000-of-00001.parquet"
    out = str(tmp_path / "labels")
    with pytest.raises(DataError, match="was replaced since it was listed"):
        _label_after(lambda: os.utime(shard, ns=(1, 1)), str(tmp_path / "packed"), out, bundle)
    report = raycnn.label(str(tmp_path / "packed"), out, bundle=bundle, accept_unreadable=True)
    assert report.status == {"unreadable": 30}
    assert raycnn.verify(out).error is None


def _label_after(happens, data: str, out: str, bundle: str) -> None:
    """Label, with something that happens between planning and work."""
    from raycnn.labeling import run as labeling
    from raycnn.config import LabelConfig, make
    from raycnn.shards import open_collection

    config = make(LabelConfig, {"data": data, "out": out, "bundle": bundle})
    run = labeling._LabelRun(config, bundles.load(bundle), open_collection(data), lambda event: None)
    run.plans()
    happens()
    run.run(0.0)


def test_an_output_inside_its_input_is_refused(tmp_path, bundle):
    data = fill(str(tmp_path / "photos"), {"a.png": png(1)})
    with pytest.raises(ConfigError, match="lie inside each other"):
        raycnn.label(data, f"{data}/labels", bundle=bundle)


def test_an_empty_prefix_writes_nothing(tmp_path, bundle):
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match="no images there"):
        raycnn.label(str(tmp_path / "photos"), str(tmp_path / "labels"), bundle=bundle)
    assert not (tmp_path / "labels").exists()
