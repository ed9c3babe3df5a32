"""What the benchmarks say about themselves: their results, and the README's table, which is made from one."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "jobs/results/label.json"
START, END = "<!-- label benchmark -->\n", "<!-- end -->"


@pytest.fixture(autouse=True)
def _jobs_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "jobs"))


def samples() -> dict[str, list[dict]]:
    """Three rounds, in each of which raycnn labels 500 images a second, Daft 200 and the others their own."""
    rates = {"images alone": 800, "bare loop": 550, "raycnn label": 500, "daft": 200, "ray data": 50}
    found = {
        f"{name}, {model}": [{"images_per_s": rate + change, "whole_images_per_s": rate / 2} for change in (0, 9, -9)]
        for name, rate in rates.items()
        for model in ("null", "mobilenet_v3_small")
        if name != "images alone" or model == "null"
    }
    for sample, first in zip(found["raycnn label, mobilenet_v3_small"], (11, 14, 9), strict=True):
        sample["first_part_s"] = first
    return found | {"raycnn label again, mobilenet_v3_small": [{"first_part_s": first} for first in (2.2, 1.9, 3.0)]}


def test_raycnn_is_compared_by_medians_of_the_same_kind_of_rate():
    from benchmarks import label

    summary = label.summary(samples())
    assert summary["images_per_s"]["daft, null"] == {"median": 200, "min": 191, "max": 209}
    compared = {(c["contender"], c["model"]): (c["ratio"], c["bar"]) for c in summary["raycnn_to"]}
    assert compared["images alone", "null"] == (0.625, 0.7)
    assert compared["daft", "null"] == compared["daft", "mobilenet_v3_small"] == (2.5, 2.5)
    assert compared["ray data", "mobilenet_v3_small"] == (10, 6)
    assert summary["first_part_s"]["command"] == {"median": 11, "min": 9, "max": 14, "bar": 15}


def test_the_table_has_every_contender_with_its_rate_and_what_raycnn_is_to_it():
    from benchmarks import label

    result = {"rounds": 3, "peer_versions": {"daft": "0.7", "ray": "2.60"}, **label.summary(samples())}
    rows = {line.split("|")[1].strip(): line for line in label.table(result).splitlines() if line.startswith("|")}
    assert len(rows) == 2 + len(label.NAMES)
    daft = next(line for name, line in rows.items() if name.startswith("Daft 0.7"))
    assert daft.count("200 (191 to 209)") == 2
    assert daft.count("2.50") == 2
    assert rows["**`raycnn label`**"].count("500 (491 to 509)") == 2


@pytest.mark.skipif(not RESULT.exists(), reason="the benchmark of labeling has no result file yet")
def test_the_readme_has_the_table_of_the_result_file():
    from benchmarks import label

    table = label.table(json.loads(RESULT.read_text(encoding="utf-8")))
    marked = re.findall(f"{START}(.*?){END}", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert marked == [table], f"README.md needs, between lines {START.strip()} and {END}:\n{table}"


def test_every_result_is_one_of_a_benchmark_that_can_be_run_again():
    import bench

    for file in sorted((ROOT / "jobs/results").glob("*.json")):
        assert json.loads(file.read_text(encoding="utf-8"))["benchmark"] == file.stem
        assert file.stem in bench.BENCHMARKS
    for name in bench.BENCHMARKS:
        assert (ROOT / f"jobs/benchmarks/{name}.py").is_file()


@pytest.mark.slow
def test_the_null_model_is_a_bundle_that_gives_every_image_the_same_labels(tmp_path: Path):
    import numpy as np
    from benchmarks import label
    from benchmarks.measuring import synthetic_photos

    from raycnn import bundle as bundles
    from raycnn.predictor import Predictor

    predictor = Predictor(bundles.load(label._bundle(tmp_path, "null", synthetic_photos(1)[0])))
    assert predictor.backend.startswith("onnxruntime")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3), np.uint8)
    assert predictor.predict(pixels).labels.tolist() == [[9, 8, 7, 6, 5]] * 3
