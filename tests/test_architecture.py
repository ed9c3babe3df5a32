"""The layer rule, kept by the syntax tree and by a fresh interpreter."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "raycnn"

LAYERS: list[set[str]] = [
    {"errors", "config"},
    {"storage", "s3local", "images", "shards", "ledger", "drawing"},
    {"models", "metrics", "augment", "loop", "bundle", "predictor"},
    {"data", "packing", "training", "evaluating", "labeling", "serving", "autoscaling"},
    {"reporting", "explaining", "exchange", "reviewing", "demo", "cli"},
]
LAYER_OF = {module: layer for layer, modules in enumerate(LAYERS) for module in modules}
WITHIN = {
    ("config", "errors"),
    ("shards", "storage"),
    ("shards", "images"),
    ("ledger", "storage"),
    ("ledger", "shards"),
    ("loop", "metrics"),
    ("loop", "augment"),
    ("loop", "models"),
    ("bundle", "models"),
    ("predictor", "bundle"),
    ("predictor", "metrics"),
    ("s3local", "storage"),
    ("packing", "data"),
    ("training", "data"),
    ("training", "packing"),
    ("evaluating", "data"),
    ("labeling", "data"),
    ("serving", "data"),
    ("reviewing", "exchange"),
    ("demo", "reporting"),
    ("demo", "explaining"),
    ("cli", "reporting"),
}
"""Imports inside a layer that are part of the design."""


def modules() -> dict[str, list[Path]]:
    """Module name -> its files."""
    found: dict[str, list[Path]] = {}
    for file in PACKAGE.rglob("*.py"):
        name = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name != "__init__":
            found.setdefault(name, []).append(file)
    return found


def imported(file: Path) -> set[str]:
    """Dotted names that a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own(name: str) -> str | None:
    """The raycnn module that a dotted name belongs to."""
    parts = name.split(".")
    return parts[1] if parts[0] == "raycnn" and len(parts) > 1 and parts[1] in LAYER_OF else None


def violations(name: str, imports: set[str]) -> list[str]:
    wrong = []
    for target in imports:
        other = own(target)
        if other is None or other == name:
            continue
        if LAYER_OF[other] > LAYER_OF[name] or (LAYER_OF[other] == LAYER_OF[name] and (name, other) not in WITHIN):
            wrong.append(f"{name} imports {target}")
    top = {i.split(".")[0] for i in imports}
    if LAYER_OF[name] != 3 and "ray" in top:
        wrong.append(f"{name} imports ray")
    if LAYER_OF[name] < 1 and top & {"torch", "torchvision", "numpy", "pyarrow"}:
        wrong.append(f"{name} imports more than pydantic and yaml")
    return wrong


def test_every_module_has_its_layer():
    assert set(modules()) == set(LAYER_OF)


@pytest.mark.parametrize("name", sorted(LAYER_OF))
def test_a_module_imports_only_from_layers_below(name):
    assert not [w for file in modules()[name] for w in violations(name, imported(file))]


@pytest.mark.slow
def test_every_allowed_import_inside_a_layer_is_made():
    made = {(name, own(target)) for name, files in modules().items() for file in files for target in imported(file)}
    assert {pair for pair in WITHIN if pair not in made} == set()


def test_the_layer_test_can_fail():
    assert violations("images", {"raycnn.training.train"})
    assert violations("storage", {"ray.data"})
    assert violations("demo", {"ray"})
    assert violations("errors", {"numpy.array"})


IMPORT = """
import os, sys, logging, importlib, pkgutil
before = dict(os.environ), list(logging.getLogger().handlers)
import raycnn
for layer in sys.argv[1:]:
    for name in layer.split():
        importlib.import_module("raycnn." + name)
    print(sorted({"torch", "ray"} & sys.modules.keys()))
for module in pkgutil.iter_modules(raycnn.__path__):
    if module.name != "autoscaling":
        importlib.import_module("raycnn." + module.name)
changed = {name for name in os.environ if os.environ[name] != before[0].get(name)}
print(sorted(name for name in changed if not name.startswith(("KMP_", "TORCHINDUCTOR", "RAY_CLIENT"))))
print(list(logging.getLogger().handlers) == before[1])
print(all(callable(getattr(raycnn, verb)) for verb in raycnn.__all__ if verb != "__version__"))
print("torchvision" in sys.modules)
"""
"""Layer after layer, and then all that is left: importing torch takes seconds, so one process shows everything."""


@pytest.fixture(scope="module")
def imported_afresh(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What a fresh interpreter says while it imports the three lowest layers, and then everything."""
    folder = tmp_path_factory.mktemp("afresh")
    done = subprocess.run(
        [sys.executable, "-c", IMPORT, *(" ".join(sorted(layer)) for layer in LAYERS[:3])],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=folder,
        check=False,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert list(folder.iterdir()) == []
    return done.stdout.splitlines()


@pytest.mark.slow
def test_layers_below_torch_import_without_torch_and_those_below_ray_without_ray(imported_afresh):
    assert imported_afresh[:3] == ["[]", "[]", "['torch']"]


@pytest.mark.slow
def test_importing_everything_changes_nothing(imported_afresh):
    assert imported_afresh[3:6] == ["[]", "True", "True"]


@pytest.mark.slow
def test_torchvision_which_takes_a_second_waits_until_it_is_needed(imported_afresh):
    assert imported_afresh[6:] == ["False"]


def test_no_module_hides_behind_an_empty_name():
    banned = {"utils", "util", "helpers", "common", "manager", "factory", "processor", "handler", "misc"}
    assert not {file.stem for files in modules().values() for file in files} & banned
