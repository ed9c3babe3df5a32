"""The README's examples, run as they stand there. (Its first two commands are run by .ci/run.)"""

import re
import shlex
from collections import Counter
from pathlib import Path

import pytest

from raycnn import cli
from raycnn.demo import sources

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
IMAGES = 500
"""Of the 1,797 digits that the README's own output was made with."""


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def typed() -> list[tuple[str, list[str]]]:
    """(command, the lines that it prints) of every console example."""
    found: list[tuple[str, list[str]]] = []
    for block in blocks("console"):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            elif found:
                found[-1][1].append(line)
    return found


def first_words(lines: list[str]) -> list[str]:
    return [line.split()[0] for line in lines if line.strip() and line.strip() != "..."]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the README speaks of: it holds the digits in class folders."""
    monkeypatch.chdir(tmp_path)
    for name, png in list(sources.digits(sources.digits_file()))[:IMAGES]:
        (tmp_path / "digits" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "digits" / name).write_bytes(png)
    return tmp_path


@pytest.mark.ray
@pytest.mark.timeout(180)
@pytest.mark.usefixtures("ray_cluster", "here")
def test_the_console_examples_print_what_the_readme_shows(capfd: pytest.CaptureFixture[str]):
    verbs: Counter[str] = Counter()
    for command, shown in typed():
        words = shlex.split(command, comments=True)
        if words[0] != "raycnn" or words[1] == "serve":
            continue
        verbs[words[1]] += 1
        assert cli.run(words[1:]) == 0
        printed = capfd.readouterr().out.splitlines()
        assert first_words(shown) == first_words(printed)[: len(first_words(shown))], command
    assert {"pack", "train", "evaluate", "label", "verify"} <= verbs.keys()
    assert verbs["label"] == 2


@pytest.mark.slow
def test_every_other_command_is_one_that_the_command_line_takes(monkeypatch: pytest.MonkeyPatch):
    seen: list[str] = []
    monkeypatch.setattr(cli, "_call", lambda function, settings: seen.append(settings.verb))
    monkeypatch.setattr(cli.Verb, "load", lambda self: None)
    text = "\n".join(blocks("sh")[1:] + blocks("console"))
    commands = [shlex.split(line.removeprefix("$ "), comments=True) for line in text.replace("\\\n", " ").splitlines()]
    for words in commands:
        if "raycnn" in words[:1]:
            assert cli.run(words[1:]) == 0
        elif "python" in words:
            script = words[words.index("python") + 1]
            assert (ROOT / "jobs" / Path(script).name).exists()
            if Path(script).stem != "bench":
                assert cli.run([Path(script).stem, *words[words.index("python") + 2 :]]) == 0
    assert {"pack", "train", "label", "serve", "import"} <= set(seen)


def test_the_python_example_names_what_there_is():
    import raycnn

    calls = set(re.findall(r"raycnn\.(\w+)\(", "".join(blocks("python"))))
    assert calls
    assert calls <= set(raycnn.__all__)


def test_the_file_tree_names_every_module_and_no_other():
    named = set(re.findall(r"^raycnn/(\w+)(?:\.py|/)", README, re.MULTILINE))
    there = {
        p.name.removesuffix(".py")
        for p in (ROOT / "raycnn").iterdir()
        if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    assert named == there - {"__init__"}


def test_the_first_screen_is_one_sentence_and_two_commands():
    head = README.split("```sh\n", 1)
    sentence = head[0].split("\n", 1)[1].strip()
    assert sentence.count(". ") == 0
    assert sentence.endswith(".")
    assert len(head[1].split("```", 1)[0].strip().splitlines()) == 2
