"""The command that a run leaves: it does the same once more, in another folder."""

import json
import shlex

import pytest
from conftest import Demonstrated

from raycnn import cli
from raycnn.storage import Store, open_store
from raycnn.training import repeat_command

pytestmark = [pytest.mark.ray, pytest.mark.s3]


def of_the_clock(line: dict[str, object]) -> set[str]:
    return {name for name in line if name in ("images_per_s", "seconds", "elapsed_s", "time", "first_step_at")}


def learned(run: Store) -> list[dict[str, object]]:
    """The lines of metrics.jsonl, without what a clock has told."""
    lines = [json.loads(line) for line in run.get("metrics.jsonl").decode().splitlines()]
    return [{name: value for name, value in line.items() if name not in of_the_clock(line)} for line in lines]


def test_the_command_that_a_run_leaves_repeats_it_bit_by_bit(
    demonstrated: Demonstrated, capsys: pytest.CaptureFixture[str]
):
    run = open_store(f"{demonstrated.store}/run")
    program, *words = shlex.split(repeat_command(run))
    assert program == "raycnn"
    assert cli.run([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    again = open_store(report["run"])
    assert again.address() == f"{run.address()}-again"
    assert learned(again) == learned(run)
    for name in (
        "bundle/model.safetensors",
        "bundle/validation.json",
        "pictures/confusion.png",
        "pictures/mistakes.png",
    ):
        assert again.get(name) == run.get(name), name
    assert report["repeat"] == repeat_command(again)
