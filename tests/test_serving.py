"""One bundle everywhere: a plain call, evaluation, labels and the endpoint agree on the same awkward files."""

import io
import itertools
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import free_ports
from PIL import Image

import raycnn
from raycnn import bundle as bundles
from raycnn.config import ImageSpec, absolute
from raycnn.errors import Bad, BundleError, ConfigError
from raycnn.models import build
from raycnn.predictor import Predictor

CLASSES = ("cat", "dog", "eel")
RAYCNN = Path(sys.executable).with_name("raycnn")


def encode(image: Image.Image, form: str, **options) -> bytes:
    sink = io.BytesIO()
    image.save(sink, form, **options)
    return sink.getvalue()


def awkward() -> dict[str, bytes]:
    """A dozen files such as real collections hold."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 255, (6, 8, 3), np.uint8)).resize((80, 60), Image.Resampling.BICUBIC)
    deep = Image.fromarray(rng.integers(0, 65535, (40, 40), np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    jpeg = encode(colour, "JPEG")
    huge = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + huge + struct.pack(">I", zlib.crc32(b"IHDR" + huge))
    return {
        "plain.jpg": jpeg,
        "cmyk.jpg": encode(colour.convert("CMYK"), "JPEG"),
        "gray.jpg": encode(colour.convert("L"), "JPEG"),
        "progressive.jpg": encode(colour, "JPEG", progressive=True),
        "turned.jpg": encode(colour, "JPEG", exif=exif),
        "deep.png": encode(deep, "PNG"),
        "clear.png": encode(colour.convert("RGBA"), "PNG"),
        "palette.gif": encode(colour.convert("P"), "GIF"),
        "one.png": encode(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG"),
        "photo.webp": encode(colour, "WEBP", lossless=True),
        "half.jpg": jpeg[: len(jpeg) // 2],
        "page.jpg": b"<html>not an image</html>",
        "empty.png": b"",
        "bomb.png": bomb,
    }


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> str:
    url = str(tmp_path_factory.mktemp("bundle"))
    classifier = build("classic", len(CLASSES), ImageSpec(height=32, width=32), seed=3).eval()
    files = awkward()
    samples = [files["plain.jpg"], files["clear.png"]]
    bundles.save(
        url, classifier, CLASSES, temperature=0.7, metrics={}, validation={}, samples=samples, data_fingerprint=None
    )
    return url


@pytest.fixture(scope="module")
def plain(bundle) -> dict[str, tuple[str, list[float] | None]]:
    """Status and calibrated probabilities of each file, by a plain call."""
    predictor, found = Predictor(bundles.load(bundle)), {}
    for name, encoded in awkward().items():
        made = predictor.prepare(encoded)
        if isinstance(made, Bad):
            found[name] = (str(made.status), None)
        else:
            logits = predictor.logits(made[None])
            found[name] = ("ok", torch.softmax(logits / 0.7, dim=1)[0].tolist())
    return found


def test_the_awkward_files_have_the_statuses_that_they_should(plain):
    bad = {name: status for name, (status, _) in plain.items() if status != "ok"}
    assert bad == {
        "half.jpg": "truncated",
        "page.jpg": "unsupported",
        "empty.png": "empty",
        "bomb.png": "too_large",
    }


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_labels_agree_with_a_plain_call(bundle, plain, tmp_path):
    for name, encoded in awkward().items():
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(encoded)
    raycnn.label(str(tmp_path / "photos"), str(tmp_path / "labels"), bundle=bundle, top_k=3)
    rows = {r["key"]: r for f in tmp_path.glob("labels/labels/*/*.parquet") for r in pq.read_table(f).to_pylist()}
    assert {k: r["status"] for k, r in rows.items()} == {k: status for k, (status, _) in plain.items()}
    for name, (_, probabilities) in plain.items():
        if probabilities is not None:
            found = {t["label"]: t["probability"] for t in rows[name]["top_k"]}
            assert [found[i] for i in range(3)] == pytest.approx(probabilities, abs=1e-6)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_evaluation_agrees_with_a_plain_call_and_counts_every_row_once(bundle, plain, tmp_path):
    confusion = np.zeros((3, 3), int)
    for i, (name, encoded) in enumerate(awkward().items()):
        truth = i % 3
        (tmp_path / CLASSES[truth]).mkdir(exist_ok=True)
        (tmp_path / CLASSES[truth] / name).write_bytes(encoded)
        if (probabilities := plain[name][1]) is not None:
            confusion[truth, int(np.argmax(probabilities))] += 1
    report = raycnn.evaluate(bundle, str(tmp_path))
    assert report.confusion == confusion.tolist()
    assert report.status == dict(Counter(status for status, _ in plain.values()))
    assert report.rows == confusion.sum()
    assert report.accuracy_top1 == pytest.approx(np.trace(confusion) / confusion.sum())


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_bundle_for_other_classes_than_the_data_is_refused(bundle, tmp_path):
    for name in ("cat", "dog", "fox"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(awkward()["one.png"])
    with pytest.raises(BundleError, match="fox"):
        raycnn.evaluate(bundle, str(tmp_path))


@pytest.fixture(scope="module")
def process(bundle, ray_cluster) -> Iterator[subprocess.Popen[str]]:
    """`raycnn serve`, which has said that it is ready."""
    (port,) = free_ports(1)
    command = [RAYCNN, "serve", "--bundle", f"photos={bundle}", "--port", str(port), "--max-bytes", "100000", "--json"]
    environment = os.environ | {"RAY_ADDRESS": ray_cluster}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    try:
        said = list(itertools.takewhile(lambda line: not line.startswith("ready "), process.stderr))
        assert process.poll() is None, said
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def endpoint(process) -> Iterator[httpx.Client]:
    (port,) = (after for before, after in itertools.pairwise(process.args) if before == "--port")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        yield client


@pytest.mark.ray
def test_the_endpoint_agrees_with_a_plain_call(endpoint, plain):
    for name, encoded in awkward().items():
        reply = endpoint.post("/v1/classify?top_k=3", content=encoded)
        status, probabilities = plain[name]
        if probabilities is None:
            assert reply.status_code == (413 if status == "too_large" else 422)
            assert reply.headers["content-type"] == "application/problem+json"
            assert reply.json()["image_status"] == status
        else:
            assert reply.status_code == 200
            found = {t["label"]: t["probability"] for t in reply.json()["top_k"]}
            assert [found[i] for i in range(3)] == pytest.approx(probabilities, abs=1e-6)
            assert reply.json()["class_name"] == CLASSES[int(np.argmax(probabilities))]


@pytest.mark.ray
def test_requests_that_come_together_each_get_their_own_answer(endpoint, plain):
    files = {k: v for k, v in awkward().items() if plain[k][0] == "ok"}
    names = list(files) * 8
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda n: endpoint.post("/v1/classify?top_k=3", content=files[n]), names))
    for name, reply in zip(names, replies, strict=True):
        assert reply.status_code == 200
        assert reply.json()["probability"] == pytest.approx(max(plain[name][1]), abs=1e-5)


@pytest.mark.ray
def test_the_endpoint_says_how_it_is_and_refuses_what_it_cannot_take(endpoint):
    assert endpoint.get("/livez").status_code == 200
    assert endpoint.get("/readyz").status_code == 200
    assert endpoint.get("/v1/model").json()["class_names"] == list(CLASSES)
    assert endpoint.post("/v1/classify", content=b"x" * 100_001).status_code == 413
    assert endpoint.post("/v1/classify", content=(b"x" * 1000 for _ in range(200))).status_code == 413
    for top_k in ("0", "101", "abc"):
        reply = endpoint.post(f"/v1/classify?top_k={top_k}", content=b"x")
        assert (reply.status_code, reply.headers["content-type"]) == (400, "application/problem+json")
        assert reply.json()["detail"].startswith("top_k: ")
    assert endpoint.post("/v1/classify", files={"image": b"x"}).status_code == 415
    assert endpoint.get("/v1/classify").status_code == 405


@pytest.mark.ray
def test_a_cluster_that_serves_already_is_left_alone(endpoint, bundle):
    (port,) = free_ports(1)
    with pytest.raises(ConfigError, match="runs Ray Serve already, with photos: "):
        raycnn.serve(bundle, port=port)
    assert endpoint.get("/livez").status_code == 200


@pytest.mark.ray
def test_ctrl_c_ends_the_endpoint_without_another_word(process, endpoint):
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert json.loads(out)["address"] == str(endpoint.base_url)
    with pytest.raises(httpx.ConnectError):
        endpoint.get("/livez")


@pytest.mark.slow  # for the import of Ray Serve, as below
def test_sigterm_is_as_good_as_ctrl_c():
    from raycnn import serving

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, lambda *_: pytest.fail("the endpoint does not hear it"))
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    handlers = {number: signal.getsignal(number) for number in before}
    try:
        serving._wait()
        assert {number: signal.getsignal(number) for number in before} == handlers
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.slow
def test_a_thread_that_hears_no_signal_is_told_before_anything_is_deployed():
    with ThreadPoolExecutor() as pool, pytest.raises(ConfigError, match="call it from the main thread"):
        pool.submit(raycnn.serve, "no/such/bundle").result()


@pytest.mark.slow
def test_bundles_are_named_by_their_argument_or_their_folder():
    from raycnn.serving import named_bundles

    assert named_bundles(("a/b/", "x=c/d")) == {"b": absolute("a/b"), "x": absolute("c/d")}
    dated = "s3://bucket/date=2026-01-01/bundle"
    assert named_bundles((dated, f"x={dated}")) == {"bundle": dated, "x": dated}
    assert named_bundles(("s3://b/run/bundle?anonymous",)) == {"bundle": "s3://b/run/bundle?anonymous"}
    with pytest.raises(ConfigError, match="two bundles are named 'b'"):
        named_bundles(("a/b", "c/b"))


@pytest.mark.slow
def test_a_bundle_with_a_changed_byte_is_not_served(bundle, tmp_path):
    for file in Path(bundle).rglob("*"):
        if file.is_file():
            target = tmp_path / file.relative_to(bundle)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(BundleError, match=r"model\.safetensors"):
        raycnn.serve(str(tmp_path))
