"""Pixels to calibrated predictions."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from raycnn import bundle as bundles
from raycnn.bundle.graph import _export
from raycnn.config import ImageSpec, precision_on
from raycnn.errors import Bad, Status
from raycnn.models import build
from raycnn.predictor import Predictor

NAMES = ("a", "b", "c", "d")
TEMPERATURE = 1.5


@pytest.fixture(scope="module")
def predictor(tmp_path_factory) -> Predictor:
    model = build("classic", len(NAMES), ImageSpec(height=12, width=16), seed=0).eval()
    url = str(tmp_path_factory.mktemp("bundle"))
    bundle = bundles.save(
        url, model, NAMES, temperature=TEMPERATURE, metrics={}, validation={}, samples=[], data_fingerprint=None
    )
    return Predictor(bundle, top_k=3)


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (count, 12, 16, 3), np.uint8)


def test_probabilities_are_the_softmax_of_the_logits_over_the_temperature(predictor):
    batch = pixels(5)
    found = predictor.predict(batch)
    expected = torch.softmax(predictor.logits(batch) / TEMPERATURE, dim=1)
    assert found.labels.shape == found.probabilities.shape == (5, 3)
    for labels, probabilities, row in zip(found.labels, found.probabilities, expected, strict=True):
        assert labels.tolist() == row.argsort(descending=True)[:3].tolist()
        assert probabilities == pytest.approx(row[labels.tolist()].tolist(), abs=1e-6)


def test_an_images_votes_do_not_depend_on_its_batch(predictor):
    batch = pixels(33)
    alone = torch.cat([predictor.logits(batch[i : i + 1]) for i in range(33)])
    assert torch.allclose(predictor.logits(batch), alone, atol=1e-5)


def test_an_empty_batch_has_no_predictions(predictor):
    found = predictor.predict(pixels(0))
    assert found.labels.shape == (0, 3)


def test_pixels_from_the_object_store_are_read_and_not_written(predictor):
    batch = pixels(2)
    before = batch.copy()
    batch.setflags(write=False)
    predictor.predict(batch)
    assert (batch == before).all()


@pytest.mark.parametrize("wrong", [pixels(1)[:, :, :15], pixels(1).astype(np.float32), pixels(1)[..., :1]])
def test_pixels_that_the_model_cannot_take_are_the_callers_mistake(predictor, wrong):
    with pytest.raises(ValueError, match=r"expected uint8 pixels \(N, 12, 16, 3\)"):
        predictor.predict(wrong)


def test_prepare_gives_pixels_or_why_there_are_none(predictor):
    sink = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(sink, "PNG")
    made = predictor.prepare(sink.getvalue())
    assert not isinstance(made, Bad)
    assert made.shape == (12, 16, 3)
    bad = predictor.prepare(b"")
    assert isinstance(bad, Bad)
    assert bad.status is Status.EMPTY


def test_more_classes_than_there_are_cannot_be_listed(predictor):
    assert Predictor(predictor.bundle, top_k=50).predict(pixels(1)).labels.shape == (1, 4)


def test_embeddings_are_what_the_last_layer_turns_into_votes(predictor):
    batch = pixels(5)
    found = predictor.predict(batch, with_embeddings=True)
    assert found.embeddings.dtype == np.float16
    votes = predictor.bundle.classifier.net.fc
    again = torch.from_numpy(found.embeddings).float() @ votes.weight.T + votes.bias
    assert torch.allclose(again, predictor.logits(batch), atol=1e-2)
    assert predictor.predict(batch).embeddings is None
    assert predictor.predict(pixels(0), with_embeddings=True).embeddings.shape == (0, votes.in_features)


def test_onnx_runtime_and_torch_agree(predictor):
    assert predictor.backend.startswith("onnxruntime ")
    eager = Predictor(replace(predictor.bundle, graph=None), top_k=3)
    assert eager.backend.startswith(f"torch {torch.__version__} cpu")
    batch = pixels(7)
    assert torch.allclose(predictor.logits(batch), eager.logits(batch), atol=1e-5)
    one, other = (p.predict(batch, with_embeddings=True) for p in (predictor, eager))
    assert (one.labels == other.labels).all()
    assert one.embeddings.astype(np.float32) == pytest.approx(other.embeddings.astype(np.float32), rel=1e-2, abs=1e-3)
    assert eager.predict(pixels(0), with_embeddings=True).embeddings.shape == other.embeddings[:0].shape


def test_a_graph_that_is_not_the_bundles_model_is_not_used_and_the_backend_says_why(predictor):
    good = predictor.bundle
    other = build("classic", len(NAMES), good.spec, seed=1).eval()
    for graph, why in (
        (b"no graph", "onnxruntime cannot run model.onnx"),
        (_export(good.classifier, "0" * 64), "made from other weights"),
        (_export(other, good.weights_sha256), "model.onnx differs from torch: image 0: a logit moved"),
    ):
        eager = Predictor(replace(good, graph=graph))
        assert eager.backend.startswith("torch ")
        assert why in eager.backend
        assert torch.allclose(eager.logits(pixels(3)), predictor.logits(pixels(3)), atol=1e-5)


def test_onnx_runtime_takes_as_many_threads_as_torch(predictor):
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        options = Predictor(predictor.bundle)._backend._session.get_session_options()
        assert options.intra_op_num_threads == threads
    torch.set_num_threads(before)


def test_labels_of_a_gpu_are_held_to_half_precision():
    assert [precision_on(device) for device in ("cpu", "cuda", "cuda:1")] == ["float32", "float16", "float16"]
