"""What the benchmarks say about themselves: their results, and the README's tables, which are made from them."""

import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "jobs/results"
END = "<!-- end -->"


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


def training_samples() -> dict[str, list[dict]]:
    """Two turns, the second on a machine that is half as fast: raycnn has nine tenths of the bare loop's rate."""
    samples = {}
    for name, rate in {"bare loop": 1000, "raycnn train": 900, "raycnn train, 2 workers": 450}.items():
        for case in ("classic", "resnet18"):
            turns = [{"images_per_s": [rate / 2 / slow, rate / slow, rate / slow]} for slow in (1, 2)]
            samples[f"{case}, {name}"] = turns
    for turn, seconds in zip(samples["classic, raycnn train"], (9.0, 11.0), strict=True):
        turn["first_step_s"] = seconds
    return samples


def test_training_is_compared_within_the_turns_of_a_machine_whose_speed_changes():
    from benchmarks import train

    summary = train.summary(training_samples())
    ratios = {(c["case"], c["of"], c["in"]): c["ratio"] for c in summary["compared"]}
    assert ratios["resnet18", "raycnn train", "first epoch"] == {"median": 0.9, "min": 0.9, "max": 0.9}
    assert ratios["classic", "raycnn train, 2 workers", "later epochs"]["median"] == 0.5
    assert summary["images_per_s"]["classic, bare loop"]["first epoch"] == {"median": 375, "min": 250, "max": 500}
    assert summary["first_step_s"] == {"classic, raycnn train": {"median": 10, "min": 9, "max": 11}}


def test_the_table_of_training_has_rates_ratios_and_the_accuracy_of_every_contender():
    from benchmarks import train

    after = {"training_s": 299.0, "cpu_s": 580.0, "parameters": 41132}
    runs = {"fastai": [{"accuracy": a, **after} for a in (0.90, 0.92)]}
    table = train.table(
        {
            "rounds": 2,
            "budget_s": 300,
            "test_images": 10000,
            "peer_versions": {"fastai": "2.8"},
            "accuracy": train.accuracy_summary(runs),
            **train.summary(training_samples()),
        }
    )
    assert "| classic, bare loop | 375 (250 to 500) | 750 (500 to 1000) |" in table
    assert "| classic, raycnn train | bare loop | first epoch | 0.90 (0.90 to 0.90) | 0.75 |" in table
    assert "| classic, raycnn train | 10.0 (9.0 to 11.0) | 15 |" in table
    assert "| fastai 2.8 | 91.00 ± 1.41% | 41,132 | 299 | 580 |" in table


def test_what_training_has_missed_is_told_bar_by_bar_and_peer_by_peer():
    from benchmarks import train

    means = {train.DEFAULTS: 0.91, train.BY_RECIPE: 0.93, "fastai": 0.92, "other": 0.93}
    accuracy = {name: {"accuracy": {"mean": mean}} for name, mean in means.items()}
    result = {**train.summary(training_samples()), "accuracy": accuracy, "peers_not_installed": ["ultralytics"]}
    missed = train.misses(result)
    assert [line for line in missed if "resnet18" in line] == [
        "resnet18, raycnn train, first epoch: 0.90 of bare loop, not 0.95",
        "resnet18, raycnn train, later epochs: 0.90 of bare loop, not 0.95",
    ]
    assert missed[-2:] == ["other: accuracy 0.9300, raycnn 0.9300", "ultralytics is not installed"]
    assert not any("first step" in line or "fastai" in line for line in missed)


def test_a_recipe_is_told_by_mean_and_deviation_of_its_seeds():
    from benchmarks import accuracy

    common = {"test_images": 360, "parameters": 9000, "seconds": 70.0, "training_s": 60.0, "cpu_s": 120.0}
    samples = [common | {"accuracy": a, "accuracy_with_flips": None} for a in (0.99, 0.98, 1.0)]
    result = {"recipe": "digits", **accuracy.summary(samples), "samples": samples}
    assert accuracy.table([result]).splitlines()[2] == "| `digits` | 99.00 ± 1.00% |  | 360 | 3 | 9,000 | 1.0 | 2.0 |"


@pytest.mark.parametrize("benchmark", ["label", "train", "accuracy"])
def test_the_readme_has_the_tables_of_the_result_files(benchmark: str):
    module = importlib.import_module(f"benchmarks.{benchmark}")
    results = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob(f"{benchmark}*.json"))]
    if not results:
        pytest.skip(f"the benchmark {benchmark} has no result file yet")
    table = module.table(results if benchmark == "accuracy" else results[0])
    start = f"<!-- {benchmark} benchmark -->\n"
    marked = re.findall(f"{start}(.*?){END}", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert marked == [table], f"README.md needs, between lines {start.strip()} and {END}:\n{table}"


def test_the_readme_has_what_came_of_the_kills():
    result = json.loads((RESULTS / "resume.json").read_text(encoding="utf-8"))
    assert result["line"] in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def test_every_result_is_one_of_a_benchmark_that_can_be_run_again():
    import bench

    for file in sorted(RESULTS.glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        recipe = f"-{result['recipe']}" if "recipe" in result else ""
        assert result["benchmark"] + recipe == file.stem
        assert result["benchmark"] in bench.BENCHMARKS
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
