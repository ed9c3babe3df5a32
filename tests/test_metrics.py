import math

import numpy as np
import pytest
import torch

from raycnn.errors import DataError
from raycnn.metrics import TEMPERATURES, Metrics, top_classes


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors lose more to waiting for a second thread than they win."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def draw(rows=2000, classes=6, sharpness=1.0, seed=0):
    """Calibrated logits with labels drawn from them, then multiplied by `sharpness`."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((rows, classes), generator=generator) * 2
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    return logits * sharpness, labels


def counted(logits, labels) -> Metrics:
    metrics = Metrics(logits.shape[1])
    metrics.update(logits, labels)
    return metrics


def test_counts_and_scores_of_a_hand_made_case():
    predictions, labels = [0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0]
    metrics = counted(torch.eye(4)[predictions] * 5, torch.tensor(labels))
    assert metrics.confusion.tolist() == [[2, 1, 0, 0], [1, 2, 0, 0], [0] * 4, [0] * 4]
    assert (metrics.rows, metrics.accuracy_top1, metrics.accuracy_top5) == (6, 4 / 6, 1.0)
    first, second, third, _ = metrics.per_class(["cat", "dog", "emu", "fox"])
    assert first == {"label": 0, "class_name": "cat", "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "support": 3}
    assert second["support"] == 3
    assert third == {"label": 2, "class_name": "emu", "precision": None, "recall": None, "f1": None, "support": 0}


def test_loss_is_the_mean_cross_entropy():
    logits, labels = draw()
    expected = torch.nn.functional.cross_entropy(logits.double(), labels).item()
    assert counted(logits, labels).loss == pytest.approx(expected, rel=1e-12)


def test_top5_counts_labels_among_the_five_highest():
    logits, labels = draw(classes=30)
    expected = sum(int(y) in row.argsort(descending=True)[:5].tolist() for row, y in zip(logits, labels, strict=True))
    assert counted(logits, labels).accuracy_top5 == expected / len(labels)


@pytest.mark.slow
def test_parts_counted_apart_add_up_to_the_whole():
    logits, labels = draw()
    whole = counted(logits, labels)
    parts = [counted(logits[i::3], labels[i::3]) for i in (2, 0, 1)]
    merged = Metrics(6)
    for part in parts:
        merged.merge(part)
    summed = Metrics.from_vector(sum(part.to_vector() for part in parts), 6)
    for metrics in (merged, summed):
        assert torch.equal(metrics.confusion, whole.confusion)
        assert metrics.accuracy_top5 == whole.accuracy_top5
        torch.testing.assert_close(metrics.to_vector(), whole.to_vector(), rtol=1e-12, atol=1e-12)
        assert metrics.validation()["confidence_histogram"] == whole.validation()["confidence_histogram"]
    assert summed.temperature == whole.temperature


def test_a_vector_holds_everything():
    metrics = counted(*draw())
    again = Metrics.from_vector(metrics.to_vector(), 6)
    assert again.validation() == metrics.validation()
    assert again.confusion.dtype == torch.int64


def test_updating_does_not_depend_on_the_batch_size():
    logits, labels = draw(rows=500)
    batched = Metrics(6)
    for start in range(0, 500, 7):
        batched.update(logits[start : start + 7], labels[start : start + 7])
    batched.update(logits[:0], labels[:0])
    torch.testing.assert_close(batched.to_vector(), counted(logits, labels).to_vector(), rtol=1e-12, atol=1e-12)


def test_many_classes_are_counted_in_bounded_memory_with_the_same_result():
    logits, labels = draw(rows=300, classes=1000)
    expected = torch.nn.functional.cross_entropy(logits.double(), labels).item()
    assert counted(logits, labels).loss == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_temperature_undoes_over_and_underconfidence(sharpness):
    logits, labels = draw(rows=5000, sharpness=sharpness)
    metrics = counted(logits, labels)
    assert metrics.temperature == pytest.approx(sharpness, rel=0.12)
    assert metrics.calibration(metrics.temperature).ece < 0.03
    if sharpness != 1:
        assert metrics.ece > 3 * metrics.calibration(metrics.temperature).ece
        assert metrics.loss > metrics.calibration(metrics.temperature).loss


def test_a_few_images_that_are_all_right_do_not_make_the_model_certain():
    metrics = counted(torch.eye(3) * 4, torch.arange(3))
    assert metrics.temperature > 0.5


def test_one_is_on_the_grid_so_an_uncalibrated_bundle_is_read_exactly():
    assert 1.0 in TEMPERATURES


def test_calibration_error_is_that_of_fifteen_equal_bins():
    logits, labels = draw(rows=3000, sharpness=2)
    confidence, best = logits.double().softmax(dim=1).max(dim=1)
    bins = (confidence * 15).long().clamp(max=14)
    gaps = [(confidence[bins == b] - (best == labels)[bins == b].double()).sum().abs().item() for b in range(15)]
    assert counted(logits, labels).ece == pytest.approx(sum(gaps) / 3000, abs=1e-9)


def test_coverage_says_what_a_threshold_keeps_and_how_right_that_is():
    logits, labels = draw(rows=3000)
    confidence, best = (logits.double() / 2).softmax(dim=1).max(dim=1)
    table = {line.threshold: line for line in counted(logits, labels).calibration(2.0).coverage}
    assert table[0].coverage == 1
    for threshold in (0.5, 0.6, 0.7):
        kept = confidence >= threshold
        assert table[threshold].coverage == pytest.approx(kept.double().mean().item())
        assert table[threshold].accuracy == pytest.approx((best == labels)[kept].double().mean().item())
    nothing = counted(torch.zeros((4, 5)), torch.zeros(4, dtype=torch.int64)).calibration(1.0).coverage[-1]
    assert (nothing.coverage, nothing.accuracy) == (0, None)


def test_of_equal_logits_the_lower_class_wins():
    logits = torch.zeros((3, 200))
    logits[:, 100:] = 1
    assert top_classes(logits, 3).tolist() == [[100, 101, 102]] * 3
    assert counted(logits, torch.full((3,), 100)).accuracy_top1 == 1


@pytest.mark.parametrize("classes", [3, 5, 300])
def test_the_best_classes_are_those_of_a_stable_sort_with_ties_or_without(classes):
    generator = torch.Generator().manual_seed(classes)
    for scale in (2, 1e6):
        logits = (torch.randn((50, classes), generator=generator) * scale).round()
        expected = torch.sort(logits, dim=1, descending=True, stable=True).indices[:, :5]
        assert torch.equal(top_classes(logits, 5), expected)


def test_validation_is_plain_json_with_exact_counts():
    import json

    logits, labels = draw()
    validation = json.loads(json.dumps(counted(logits, labels).validation(), allow_nan=False))
    assert validation["class_counts"] == np.bincount(labels, minlength=6).tolist()
    assert validation["predicted_counts"] == np.bincount(logits.argmax(dim=1), minlength=6).tolist()
    assert sum(validation["confidence_histogram"]) == validation["rows"] == 2000
    assert len(validation["confidence_histogram"]) == 100


def test_what_cannot_be_counted_is_refused():
    metrics = Metrics(3)
    with pytest.raises(ValueError, match="not finite"):
        metrics.update(torch.full((1, 3), math.nan), torch.tensor([0]))
    for label in (-1, 3):
        with pytest.raises(ValueError, match=r"outside 0\.\.2"):
            metrics.update(torch.zeros((1, 3)), torch.tensor([label]))
    with pytest.raises(ValueError, match="3 classes"):
        metrics.update(torch.zeros((1, 4)), torch.tensor([0]))
    with pytest.raises(DataError, match="nothing to measure"):
        _ = metrics.accuracy_top1
