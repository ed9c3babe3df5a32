"""What a labeling run says of its speed."""

import pytest

from raycnn.labeling.speed import Speed


def taken(worker: str, began: float, ended: float, rows: int) -> dict[str, object]:
    spent = {"rows": rows, "measured": rows, "decode": ended - began, "decode_cpu": (ended - began) / 2, "model_cpu": 0}
    return {"worker": worker, "began": began, "ended": ended, **spent}


def test_a_worker_that_comes_later_counts_from_when_it_is_ready():
    speed = Speed(cpus=2)
    for part in (taken("a", 0, 5, 500), taken("a", 5, 10, 500), taken("b", 8, 10, 200)):
        speed.add(part)
    assert speed.images_per_s == pytest.approx(1000 / 10 + 200 / 2)
    assert speed.floor == pytest.approx(2 / (6 / 1200))
    assert speed.busy["decode"] == 1.0
