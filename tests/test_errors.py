"""The way of an error from a worker of Ray to its user."""

from pathlib import Path
from typing import Any

import pytest

from raycnn import cli
from raycnn.config import VERBS, Verb, VerbConfig
from raycnn.errors import BundleError, DataError, StorageError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def failing(settings: VerbConfig) -> None:
    """A verb that fails in a worker: in a task, in the constructor of an actor, in a pipeline, or there by a bug."""
    import ray

    class Actor:
        def __init__(self) -> None:
            raise BundleError("bundle b was altered")

        def work(self) -> None:
            pass

    def task() -> None:
        raise StorageError("access denied to s3://b")

    def fail(row: dict[str, Any]) -> dict[str, Any]:
        raise DataError("row 7 has no pixels")

    def bug(row: dict[str, Any]) -> dict[str, Any]:
        try:
            return fail(row)
        except DataError:
            return row["no such column"]

    where = Path(settings.model_dump()["out"]).name
    if where == "task":
        ray.get(ray.remote(task).remote())
    elif where == "constructor":
        ray.get(ray.remote(Actor).remote().work.remote())
    else:
        ray.data.range(2).map(bug if where == "bug" else fail).materialize()


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VERBS, "verify", Verb(VERBS["verify"].schema, __name__, "failing"))


@pytest.mark.parametrize(
    ("where", "code", "told"),
    [
        ("task", 5, "access denied to s3://b"),
        ("constructor", 4, "bundle b was altered"),
        ("pipeline", 3, "row 7 has no pixels"),
    ],
)
@pytest.mark.usefixtures("broken")
def test_an_error_in_a_worker_is_told_like_one_here(
    where: str, code: int, told: str, capfd: pytest.CaptureFixture[str]
):
    assert cli.run(["verify", where]) == code
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("raycnn: ")]
    assert said == [f"raycnn: {told}"]


@pytest.mark.usefixtures("broken")
def test_a_bug_in_a_worker_keeps_its_traceback():
    import ray

    with pytest.raises(ray.exceptions.RayTaskError, match="no such column"):
        cli.run(["verify", "bug"])
