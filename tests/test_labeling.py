"""Labeling on a real cluster: one row for every image, whatever it is and whatever happens."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from hazards import hazards
from PIL import Image

import raycnn
from raycnn import bundle as bundles
from raycnn import images
from raycnn.config import ImageSpec
from raycnn.errors import ConfigError, DataError
from raycnn.models import build
from raycnn.predictor import Predictor
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


def test_a_resumed_run_also_labels_what_has_come_since_it_was_planned(tmp_path, bundle):
    data, out = fill(str(tmp_path / "photos"), {f"{i:02d}.png": png(i) for i in range(20)}), str(tmp_path / "labels")
    _label_after(lambda: fill(data, {"new.png": png(50)}), data, out, bundle)
    report = raycnn.label(data, out, bundle=bundle)
    assert (report.generations, report.rows) == (2, 21)
    assert raycnn.verify(out, deep=True).inputs == {"new": 0, "changed": 0, "gone": 0}


def test_a_renamed_file_of_keyed_rows_does_not_double_them(tmp_path, bundle):
    photos = tmp_path / "photos"
    photos.mkdir()
    pq.write_table(pa.table({"key": ["a", "b"], "image": [png(1), png(2)]}), photos / "one.parquet")
    out = str(tmp_path / "labels")
    raycnn.label(str(photos), out, bundle=bundle)
    (photos / "one.parquet").rename(photos / "two.parquet")
    with pytest.raises(DataError, match="may hold the same keys"):
        raycnn.label(str(photos), out, bundle=bundle)
    assert raycnn.verify(out).error is None


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


def test_every_hazard_has_a_row_with_the_status_that_is_expected_of_it(tmp_path, bundle):
    expected = {name.replace("/", "-"): hazard for name, hazard in hazards().items()}
    data = fill(str(tmp_path / "photos"), {name: hazard.encoded for name, hazard in expected.items()})
    report = raycnn.label(data, str(tmp_path / "labels"), bundle=bundle)
    rows = {row["key"]: row["status"] for row in rows_of(str(tmp_path / "labels"))}
    assert rows == {name: str(hazard.status) for name, hazard in expected.items()}
    assert report.status == Counter(rows.values())
    assert raycnn.verify(str(tmp_path / "labels")).error is None


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
    from raycnn.config import LabelConfig, make
    from raycnn.labeling import run as labeling
    from raycnn.labeling.facts import read_facts
    from raycnn.shards import open_collection

    config = make(LabelConfig, {"data": data, "out": out, "bundle": bundle})
    run = labeling._LabelRun(config, read_facts(bundle), open_collection(data), lambda event: None)
    run.plans()
    happens()
    config, facts, collection = run._config, run._facts, open_collection(data)
    labeling._LabelRun(config, facts, collection, lambda event: None).run(0.0)


def test_an_output_inside_its_input_is_refused(tmp_path, bundle):
    data = fill(str(tmp_path / "photos"), {"a.png": png(1)})
    with pytest.raises(ConfigError, match="lie inside each other"):
        raycnn.label(data, f"{data}/labels", bundle=bundle)


def test_an_empty_prefix_writes_nothing(tmp_path, bundle):
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match="no images there"):
        raycnn.label(str(tmp_path / "photos"), str(tmp_path / "labels"), bundle=bundle)
    assert not (tmp_path / "labels").exists()


PLANT = """
import os, signal, time
import simplejpeg
import raycnn.images.isolated as isolated

whole = simplejpeg.decode_jpeg

def decode_jpeg(data, *arguments, **options):
    if b"plant: crash" in bytes(data):
        os.kill(os.getpid(), signal.SIGSEGV)
    if b"plant: hang" in bytes(data):
        time.sleep(3600)
    return whole(data, *arguments, **options)

simplejpeg.decode_jpeg = decode_jpeg
isolated.DECODE_TIMEOUT_S = 2.0
isolated.Isolated.__init__.__defaults__ = (2.0,)
"""
"""A sitecustomize: two JPEGs, found by their comments, behave as those that find a hole in a decoder."""


def test_an_image_that_crashes_or_hangs_its_process_costs_its_own_label_only(tmp_path, bundle):
    (tmp_path / "plant").mkdir()
    (tmp_path / "plant" / "sitecustomize.py").write_text(PLANT)
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(40):
        sink = io.BytesIO()
        comment = {3: b"plant: hang", 20: b"plant: crash"}.get(i, b"")
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(sink, "JPEG", comment=comment)
        (photos / f"{i:02d}.jpg").write_bytes(sink.getvalue())
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "plant"), "RAY_ADDRESS": "local"}
    command = [RAYCNN, "label", str(photos), str(tmp_path / "labels"), "--bundle", bundle, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == {"crashed": 1, "ok": 38, "timeout": 1}
    bad = {row["key"]: row["status"] for row in rows_of(str(tmp_path / "labels")) if row["status"] != "ok"}
    assert bad == {"03.jpg": "timeout", "20.jpg": "crashed"}
    assert raycnn.verify(str(tmp_path / "labels")).error is None


def test_too_many_bad_images_stop_the_run_and_what_is_labelled_stays(tmp_path, bundle):
    files = {f"{i:04d}.png": png(i % 9) for i in range(600)} | {f"{i:04d}.png": b"no image" for i in range(0, 100, 5)}
    data, out = fill(str(tmp_path / "photos"), files), str(tmp_path / "labels")
    with pytest.raises(DataError, match=r"20 of 600 images are bad \(20 unsupported\), more than --max-bad 1.00%"):
        raycnn.label(data, out, bundle=bundle, max_bad="1%")
    assert rows_of(out)
    with pytest.raises(DataError, match="20 of 600 images are bad"):
        raycnn.label(data, out, bundle=bundle, max_bad="1%")
    report = raycnn.label(data, out, bundle=bundle, max_bad="5%")
    assert report.status == {"ok": 580, "unsupported": 20}


@pytest.mark.parametrize("layout", ["fused", "staged"])
def test_embeddings_lie_beside_and_what_is_not_sure_has_no_label(tmp_path, bundle, layout):
    files = {f"{i:03d}.png": png(i % 90) for i in range(700)} | {"bad.png": b"no image"}
    data, out = fill(str(tmp_path / "photos"), files), str(tmp_path / "labels")
    report = raycnn.label(data, out, bundle=bundle, layout=layout, abstain=0.6, embeddings=True)
    rows = {row["key"]: row for row in rows_of(out)}
    assert rows.keys() == files.keys()
    unsure = [row for row in rows.values() if row["status"] == "ok" and row["label"] is None]
    assert 0 < len(unsure) == report.abstained < 700
    for row in unsure:
        assert row["probability"] == row["top_k"][0]["probability"] < 0.6
        assert row["class_name"] is None
        assert "is below 0.6" in row["detail"]
    assert sum(report.classes.values()) == 700 - len(unsure)
    assert sum(report.confidence) == 700
    store = open_store(out)
    paths = [e.path for e in store.list("embeddings/")]
    made = [row for path in paths for row in pq.read_table(io.BytesIO(store.get(path))).to_pylist()]
    assert {row["key"] for row in made} == files.keys()
    assert {row["key"]: row["embedding"] for row in made}["bad.png"] is None
    same = Predictor(bundles.load(bundle)).predict(_pixels(files["007.png"], bundle), with_embeddings=True)
    found = next(row["embedding"] for row in made if row["key"] == "007.png")
    np.testing.assert_allclose(np.array(found, np.float32), same.embeddings[0].astype(np.float32), rtol=2e-3, atol=1e-3)
    assert raycnn.verify(out).error is None
    lost = Path(out, paths[0])
    lost.chmod(0o644)
    lost.unlink()
    assert raycnn.verify(out).altered == 1


def _pixels(encoded: bytes, bundle: str) -> np.ndarray:
    return images.pixels(encoded, bundles.load(bundle).spec)[None]
