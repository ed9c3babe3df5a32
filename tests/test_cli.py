"""The command line: what is typed becomes one configuration, and what comes out is a report or one line."""

import ast
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from raycnn import cli
from raycnn.config import VERBS, TrainConfig, Verb, VerbConfig, absolute
from raycnn.errors import BundleError, ConfigError, DataError, RaycnnError, StorageError

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass
class Settings:
    """The report of `echo`."""

    settings: dict[str, Any]


def echo(settings: VerbConfig) -> Settings:
    """A verb that reports what it was called with."""
    print("chatter on standard output")
    return Settings(settings.model_dump())


@pytest.fixture
def echoing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every verb keeps its schema, and does what `echo` does."""
    for name, verb in VERBS.items():
        monkeypatch.setitem(VERBS, name, Verb(verb.schema, __name__, "echo"))


class Outcome(NamedTuple):
    code: int
    out: list[str]
    err: list[str]


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]):
    def run(*argv: str) -> Outcome:
        code = cli.run(argv)
        said = capsys.readouterr()
        return Outcome(code, said.out.splitlines(), said.err.splitlines())

    return run


@pytest.fixture
def settings(echoing: None, typed):
    """The configuration that a command line becomes."""

    def parse(*argv: str) -> dict[str, Any]:
        outcome = typed(*argv, "--json")
        assert outcome.code == 0, outcome.err
        return json.loads(outcome.out[-1])["settings"]

    return parse


SMALLEST = {
    "demo": "",
    "pack": "SRC DST",
    "train": "DATA RUN",
    "evaluate": "BUNDLE DATA",
    "label": "DATA OUT --bundle BUNDLE",
    "verify": "OUT",
    "review": "OUT DST",
    "export": "OUT DST",
    "serve": "--bundle BUNDLE",
    "import": "MODEL DST --weights WEIGHTS",
}


@pytest.mark.parametrize("verb", VERBS)
def test_positionals_go_where_the_help_says(verb: str, settings, typed):
    given = settings(verb, *SMALLEST[verb].split())
    for word in SMALLEST[verb].split():
        if not word.startswith("--"):
            assert given[word.lower()] in (word, [word], absolute(word))
    usage = f"Usage: raycnn {verb} {SMALLEST[verb]} [OPTIONS]"
    assert " ".join(usage.split()) in typed(verb, "--help").out


@pytest.mark.parametrize("verb", VERBS)
def test_every_field_has_a_flag_with_its_documentation(verb: str, typed):
    help_text = " ".join(word for line in typed(verb, "--help").out for word in line.replace("│", " ").split())
    for field, info in VERBS[verb].schema.model_fields.items():
        assert f"--{field.replace('_', '-')}" in help_text
        assert " ".join((info.description or "").split()[:3]) in help_text


def test_a_positional_may_be_written_as_a_flag(settings):
    assert settings("pack", "--dst", "there", "--src", "here")["dst"] == absolute("there")


def test_nothing_typed_is_the_schemas_default(settings):
    assert settings("train", "data", "run") == TrainConfig(data="data", run="run").model_dump()


def test_values_have_the_types_of_the_schema(settings):
    given = settings("train", "data", "run", "--image-size", "64", "--learning-rate", "1e-3", "--epochs=3")
    assert (given["image_size"], given["learning_rate"], given["epochs"]) == (64, 1e-3, 3)
    assert settings("train", "data", "run", "--image-size", "auto")["image_size"] == "auto"
    assert settings("verify", "out", "--deep")["deep"] is True


def test_a_repeated_flag_makes_a_list(settings):
    assert settings("serve", "--bundle", "a=x", "--bundle", "y")["bundle"] == ["a=x", "y"]


def test_default_yields_to_file_to_environment_to_flag(settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: from-file\nrun: from-file\nepochs: 2\nbatch_size: 2\nseed: 2\n")
    monkeypatch.setenv("RAYCNN_TRAIN_BATCH_SIZE", "3")
    monkeypatch.setenv("RAYCNN_TRAIN_SEED", "3")
    given = settings("train", "--config", str(recipe), "--seed", "4", "--run", "from-flag")
    assert [given[k] for k in ("num_workers", "epochs", "batch_size", "seed")] == [1, 2, 3, 4]
    assert (given["data"], given["run"]) == (absolute("from-file"), absolute("from-flag"))
    assert settings("train", "--recipe", str(recipe))["epochs"] == 2


def test_a_flag_that_repeats_the_default_still_wins(settings, tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("deep: true\n")
    assert settings("verify", "out", "--config", str(recipe))["deep"] is True
    assert settings("verify", "out", "--config", str(recipe), "--no-deep")["deep"] is False


MISTAKES = [
    ("trian data run", "train"),
    ("train data run --epoch 3", "--epochs"),
    ("label data out --bundel b", "--bundle"),
    ("train data run --epochs many", "--epochs"),
    ("train data run --epochs 2.6", "--epochs: '2.6' is no whole number"),
    ("train data run --image-size large", "--image-size: 'large' is no whole number, nor auto"),
    ("train data run --seed 18446744073709551616", "seed: Input should be less than 18446744073709551616"),
    ("train data run --epochs 0", "epochs"),
    ("train data run --optimizer adam", "adamw"),
    ("train data run --image-size 0", "image_size: choose auto, or 1 to 4096 px, got 0"),
    ("train data run --image-size 100000", "image_size: choose auto, or 1 to 4096 px, got 100000"),
    ("train data run --learning-rate inf", "learning_rate: Input should be a finite number, got inf"),
    ("serve --bundle b --max-bytes 67108865", "max_bytes: Input should be less than or equal to 67108864"),
    ("demo --dir s3://bucket/x", "dir: a folder on this machine is needed"),
    ("pack here", "dst is missing; see `raycnn pack --help`"),
    ("label data out", "bundle is missing; see `raycnn label --help`"),
    ("label data out --image-size 3", "label: Unknown option: --image-size; see `raycnn label --help`"),
    ("serve", "bundle is missing"),
    ("pack a b c", "unexpected argument 'c'"),
    ("pack a b --val 0.5 --test 0.5", "val + test"),
    ("pack a --src b", "--src"),
    ("pack a b --exclude", "--exclude"),
    ("train data run --config missing.yaml", "no such file: missing.yaml"),
]


@pytest.mark.parametrize(("line", "told"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_told_in_one_line_with_the_remedy(line: str, told: str, echoing: None, typed):
    outcome = typed(*line.split())
    assert outcome.code == ConfigError.exit_code == 2
    assert outcome.out == []
    (said,) = outcome.err
    assert said.startswith("raycnn: ")
    assert told in said


def test_an_unknown_key_in_the_file_is_told_with_the_nearest(echoing: None, typed, tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: d\nrun: r\nlearning-rate: 0.1\n")
    outcome = typed("train", "--config", str(recipe))
    assert (outcome.code, outcome.err) == (
        2,
        ["raycnn: train: unknown key 'learning-rate' (did you mean 'learning_rate'?); see `raycnn train --help`"],
    )


@pytest.mark.parametrize("line", ["1: 2", "on: true", "null: x"])
def test_a_key_in_the_file_that_is_no_text_is_told(line: str, echoing: None, typed, tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data: d\nrun: r\n{line}\n")
    outcome = typed("train", "--config", str(recipe))
    assert outcome.code == 2
    (said,) = outcome.err
    assert f"{recipe}: the key " in said


def test_a_variable_that_names_no_field_is_told_with_the_nearest(echoing: None, typed, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAYCNN_TRAIN_EPOCH", "3")
    outcome = typed("train", "data", "run")
    told = "raycnn: train: unknown environment variable RAYCNN_TRAIN_EPOCH (did you mean 'RAYCNN_TRAIN_EPOCHS'?)"
    assert (outcome.code, outcome.err) == (2, [told])
    assert typed("verify", "out").code == 0


class Pair(NamedTuple):
    name: str
    share: float


HALF = np.float32(0.5)
ANT = Pair("ant", 0.25)


@dataclasses.dataclass
class Report:
    """One of everything that a report may hold."""

    rows: int = 3
    accuracy: float = 0.987654321
    counts: dict[str, int] = dataclasses.field(default_factory=lambda: Counter(ok=2, truncated=1))
    nothing: str | None = None
    undefined: float = float("nan")
    array: Any = dataclasses.field(default_factory=lambda: np.eye(2, dtype=np.int64))
    scalar: Any = HALF
    path: Path = Path("a/b")
    names: tuple[str, ...] = ("ant", "bee")
    pair: Pair = ANT
    per_class: list[dict[str, Any]] = dataclasses.field(
        default_factory=lambda: [{"label": i, "recall": i / 30} for i in range(30)]
    )


def report(_: VerbConfig) -> Report:
    """A verb that has a report."""
    print("chatter on standard output")
    return Report()


@pytest.fixture
def reporting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VERBS, "verify", Verb(VERBS["verify"].schema, __name__, "report"))


@pytest.mark.parametrize("line", ["verify out --json", "--json verify out"])
def test_json_is_the_only_line_on_standard_output(line: str, reporting: None, typed):
    outcome = typed(*line.split())
    (only,) = outcome.out
    assert outcome.err == ["chatter on standard output"]
    said = json.loads(only)
    assert list(said) == [field.name for field in dataclasses.fields(Report)]
    assert said["array"] == [[1, 0], [0, 1]]
    assert (said["scalar"], said["undefined"], said["path"]) == (0.5, None, "a/b")
    assert (said["counts"], said["names"]) == ({"ok": 2, "truncated": 1}, ["ant", "bee"])
    assert said["pair"] == {"name": "ant", "share": 0.25}


def test_without_json_a_person_reads_short_lines_and_a_table(reporting: None, typed):
    out = typed("verify", "out").out
    assert "rows       3" in out
    assert "accuracy   0.9877" in out
    assert "counts     ok 2, truncated 1" in out
    assert "nothing    -" in out
    assert out[-23:-20] == ["per_class:", "  label  recall", "  0      0"]
    assert out[-1] == "  and 10 more, shown by --json"
    assert max(map(len, out)) < 80


def working(_: VerbConfig, progress: Callable[[dict[str, Any]], None]) -> None:
    """A verb that tells how far it is."""
    progress({"kind": "progress", "done": 5, "total": 5, "text": "of them"})


def test_progress_goes_to_standard_error(typed, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(VERBS, "verify", Verb(VERBS["verify"].schema, __name__, "working"))
    outcome = typed("verify", "out", "--json")
    assert (outcome.code, outcome.out) == (0, ["{}"])
    assert "5/5 images" in outcome.err[-1]


@dataclasses.dataclass
class Unproven:
    lost: int = 1

    @property
    def error(self) -> RaycnnError:
        return DataError("1 row is lost")


def unproven(_: VerbConfig) -> Unproven:
    """A verb whose report is bad news."""
    return Unproven()


def test_a_report_of_bad_news_is_printed_and_sets_the_exit_code(typed, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(VERBS, "verify", Verb(VERBS["verify"].schema, __name__, "unproven"))
    assert typed("verify", "out", "--json") == (3, ['{"lost": 1}'], ["raycnn: 1 row is lost"])


class WrappedError(Exception):
    """What Ray raises for a task's error: of the error's class as well, and with a traceback for a text."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__("Traceback ...")
        self.cause = cause


class WrappedDataError(WrappedError, DataError):
    pass


class WorkersError(Exception):
    """What Ray Train raises: it holds what each rank raised."""

    def __init__(self, *failures: BaseException) -> None:
        super().__init__("Traceback ...")
        self.worker_failures = dict(enumerate(failures))


ERRORS: list[tuple[BaseException, int, str]] = [
    (DataError("no images below\n  s3://bucket/x: is the prefix right?"), 3, "no images below s3://bucket/x: is"),
    (BundleError("altered"), 4, "altered"),
    (StorageError("unreachable"), 5, "unreachable"),
    (WrappedError(WrappedError(StorageError("denied"))), 5, "denied"),
    (WrappedDataError(DataError("one class")), 3, "one class"),
    (WorkersError(OSError(), BundleError("no weights")), 4, "no weights"),
]


def failing(settings: VerbConfig) -> None:
    """A verb that raises the error whose number it is given."""
    raise ERRORS[int(Path(settings.model_dump()["out"]).name)][0]


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VERBS, "verify", Verb(VERBS["verify"].schema, __name__, "failing"))


@pytest.mark.parametrize("number", range(len(ERRORS)))
def test_an_error_is_one_line_and_its_exit_code(number: int, broken: None, typed):
    outcome = typed("verify", str(number), "--json")
    _, code, told = ERRORS[number]
    assert (outcome.code, outcome.out, len(outcome.err)) == (code, [], 1)
    assert outcome.err[0].startswith(f"raycnn: {told}")


def test_a_bug_keeps_its_traceback(broken: None, typed):
    with pytest.raises(ValueError, match="invalid literal"):
        typed("verify", "not-a-number")


def python(code: str, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *argv],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("line", ["--help", "train --help", "--version", "trian"])
def test_help_and_mistakes_need_neither_torch_nor_ray(line: str):
    code = (
        "import sys; from raycnn import cli; code = cli.run(sys.argv[1:]); "
        "print({'torch', 'ray', 'pyarrow', 'numpy'} & set(sys.modules), file=sys.stderr); sys.exit(code)"
    )
    done = python(code, *line.split())
    assert done.returncode == (2 if line == "trian" else 0)
    assert done.stderr.splitlines()[-1] == "set()"


@pytest.mark.slow
def test_help_takes_at_most_half_a_second_of_a_cpu():
    def seconds() -> float:
        command = [Path(sys.executable).with_name("raycnn"), "--help"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        return used.ru_utime + used.ru_stime

    assert any(seconds() <= 0.5 for _ in range(8))  # the rest of the tests runs beside it


@pytest.mark.slow
def test_the_installed_command_lists_every_verb():
    done = subprocess.run(
        [Path(sys.executable).with_name("raycnn"), "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    assert all(f" {verb} " in done.stdout for verb in VERBS)
    assert "--install-completion" in done.stdout


SLEEPER = """
import sys, threading
from raycnn import cli, config
config.VERBS["verify"] = config.Verb(config.VerifyConfig, "__main__", "wait")
def wait(settings):
    print("waiting", file=sys.stderr, flush=True)
    threading.Event().wait(30)
if __name__ == "__main__":
    cli.main(["verify", "out"])
"""


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on_and_exits_130():
    process = subprocess.Popen([sys.executable, "-c", SLEEPER], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "raycnn: interrupted; the same command again resumes\n")


CLOSED = """
import dataclasses
from raycnn import cli, config, errors
config.VERBS["verify"] = config.Verb(config.VerifyConfig, "__main__", "report")

@dataclasses.dataclass
class Report:
    lost: int = 1
    error = errors.DataError("1 row is lost")

def report(settings):
    return Report()

if __name__ == "__main__":
    cli.main(["verify", "out"])
"""


@pytest.mark.slow
def test_a_reader_who_has_gone_costs_neither_a_traceback_nor_the_exit_code():
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-c", CLOSED], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (3, "raycnn: 1 row is lost\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_until_ray_is_up(number: signal.Signals):
    from raycnn.data.cluster import _interrupted_later

    heard: list[int] = []
    before = {n: signal.signal(n, lambda n, _: heard.append(n)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        with _interrupted_later():
            signal.raise_signal(number)
            assert heard == []
        assert heard == [number]
        signal.raise_signal(number)
        assert heard == [number, number]
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["pack", "train", "evaluate", "label"])
def test_a_job_script_is_the_verb_in_thirty_lines(verb: str):
    script = ROOT / "jobs" / f"{verb}.py"
    text = script.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 30
    command = submitted(ast.get_docstring(ast.parse(text)) or "")
    assert command[:2] == ["python", script.name]

    job = [sys.executable, str(script)]
    told = subprocess.run([*job, *command[2:], "--sped", "9"], capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 2
    assert "--s" in told.stderr
    assert len(told.stderr.splitlines()) == 1


def submitted(docstring: str) -> Sequence[str]:
    """The words after `--` of the `ray job submit` command in a docstring."""
    command = docstring.partition("ray job submit")[2].partition("\n\n")[0].replace("\\\n", " ")
    return command.partition(" -- ")[2].split()


@pytest.mark.parametrize("verb", ["pack", "train", "evaluate", "label"])
def test_the_command_in_a_job_scripts_docstring_is_valid(verb: str, settings):
    text = (ROOT / "jobs" / f"{verb}.py").read_text(encoding="utf-8")
    assert settings(
        verb, *(word for word in submitted(ast.get_docstring(ast.parse(text)) or "")[2:] if word != "--json")
    )
