"""The demo from end to end on S3, and what is left of it when it is cut short."""

import csv
import json
import os
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from conftest import LEAN_RAY, Demonstrated

from raycnn import bundle as bundles
from raycnn import cli, demo
from raycnn.config import VERBS, DemoConfig, Verb, VerbConfig, make
from raycnn.demo import sources
from raycnn.errors import ConfigError, DataError, StorageError
from raycnn.s3local import S3Server
from raycnn.shards import open_collection
from raycnn.storage import open_store

RAYCNN = str(Path(sys.executable).with_name("raycnn"))

pytestmark = pytest.mark.timeout(180)


@pytest.mark.ray
@pytest.mark.s3
def test_every_held_out_image_has_one_label_and_the_accuracy_is_that_of_the_evaluation(demonstrated: Demonstrated):
    import pyarrow.dataset  # and with it pandas

    report, packed = demonstrated.report, open_collection(f"{demonstrated.store}/packed")
    held_out = sum(s.rows for s in packed.select("test", Counter()))
    rows = pyarrow.dataset.dataset(f"{report.labels}/labels").to_table().to_pylist()
    truth = {row["photo"]: row["class"] for row in csv.DictReader(Path(report.truth).read_text().splitlines())}
    assert len(rows) == report.rows == held_out == len(truth)
    assert {row["key"] for row in rows} == set(truth) == {file.name for file in Path(report.photos).iterdir()}
    assert set(truth.values()) == {"bottom", "middle", 'top, "high"'}
    assert sum(row["status"] != "ok" for row in rows) == 1
    right = sum(row["class_name"] == truth[row["key"]] for row in rows)
    assert right == report.correct == report.evaluated_correct
    assert report.accuracy_top1 == right / (held_out - 1) > 0.9
    assert (report.lost, report.duplicate, report.error) == (0, 0, None)


@pytest.mark.ray
@pytest.mark.s3
def test_what_it_made_lies_where_it_says(demonstrated: Demonstrated):
    report = demonstrated.report
    assert bundles.load(report.bundle).class_names == ("bottom", "middle", 'top, "high"')
    for file in (*report.pictures, report.report):
        assert Path(file).stat().st_size > 5000
    page = Path(report.report).read_text()
    assert f"{report.correct} of {report.evaluated_rows} test images" in page
    assert page.count("data:image/png;base64,") == 4  # confused, mistakes, filters; and feature maps
    told = "\n".join(report.readable())
    for place in (report.report, report.bundle, report.labels, report.photos, report.truth, report.packed):
        assert Path(place).exists()
        assert Path(place).relative_to(report.home).as_posix() in told
    assert [told.index(command["type"]) for command in report.next]


@pytest.mark.ray
@pytest.mark.s3
def test_the_same_demo_again_does_nothing_twice(demonstrated: Demonstrated):
    assert demonstrated.objects_again == demonstrated.objects
    done = [note.strip() for note in demonstrated.notes_again if "by an earlier run" in note]
    assert done == [f"{word} by an earlier run" for word in ("packed", "trained", "evaluated", "labelled")]
    assert not [note for note in demonstrated.notes if "by an earlier run" in note]
    assert replace(demonstrated.again, seconds=0.0) == replace(demonstrated.report, seconds=0.0)


@pytest.mark.ray
@pytest.mark.s3
def test_the_event_file_holds_every_epoch_up_to_the_last(demonstrated: Demonstrated):
    from tensorboardX.proto.event_pb2 import Event  # takes long to import

    (file,) = Path(demonstrated.report.home, "run", "tensorboard").iterdir()
    content, at, steps = file.read_bytes(), 0, Counter[int]()
    while at < len(content):
        (size,) = struct.unpack("<Q", content[at : at + 8])
        event = Event.FromString(content[at + 12 : at + 12 + size])
        steps.update([event.step] * any(value.tag == "val/loss" for value in event.summary.value))
        at += size + 16
    assert len(steps) == 10
    assert set(steps.values()) == {1}


def parsed(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> dict[str, Any]:
    """The settings that a command line becomes."""
    seen: list[VerbConfig] = []
    verb = VERBS[words[0]]
    monkeypatch.setitem(VERBS, words[0], Verb(verb.schema, __name__, "note_settings"))
    monkeypatch.setattr(sys.modules[__name__], "note_settings", seen.append, raising=False)
    assert cli.run(words) == 0
    return seen[0].model_dump()


@pytest.mark.ray
@pytest.mark.s3
def test_the_three_commands_that_it_ends_with_are_valid_and_their_inputs_exist(
    demonstrated: Demonstrated, monkeypatch: pytest.MonkeyPatch
):
    commands = [shlex.split(command["type"]) for command in demonstrated.report.next]
    assert [words[:2] for words in commands] == [["raycnn", verb] for verb in ("label", "serve", "train")]
    settings = [parsed(monkeypatch, words[1:]) for words in commands]
    inputs = [settings[0]["data"], settings[0]["bundle"], *settings[1]["bundle"], settings[2]["data"]]
    assert all(Path(path).is_dir() for path in inputs)
    assert not Path(settings[0]["out"]).exists()
    assert not Path(settings[2]["run"]).exists()
    photo = demonstrated.report.next[1]["to"].partition("@")[2].split()[0]
    assert Path(photo).read_bytes().startswith(b"\x89PNG")


@pytest.mark.ray
@pytest.mark.s3
def test_labels_that_differ_from_the_evaluation_are_an_error(demonstrated: Demonstrated):
    for wrong in ({"correct": demonstrated.report.correct - 1}, {"lost": 1}, {"duplicate": 2}):
        error = replace(demonstrated.report, **wrong).error
        assert isinstance(error, DataError)
        assert error.exit_code == 3


def alive(processes: list[psutil.Process]) -> list[str]:
    return [p.name() for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def all_gone(processes: list[psutil.Process], seconds: float) -> bool:
    give_up = time.monotonic() + seconds
    while alive(processes) and time.monotonic() < give_up:
        time.sleep(0.05)
    return not alive(processes)


def started(data: Path, folder: Path, temporary: Path) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "RAY_"))}
    return subprocess.Popen(
        [RAYCNN, "demo", "--data", str(data), "--dir", str(folder)],
        env=environment | LEAN_RAY | {"TMPDIR": str(temporary), "RAY_USAGE_STATS_ENABLED": "0"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def family_at(process: subprocess.Popen[str], note: str, wanted: str) -> list[psutil.Process]:
    """What the program has started, once it has said `note` and a process called `wanted` runs."""
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if note in line:
            break
    else:
        pytest.fail("".join(said))
    while process.poll() is None:
        family = psutil.Process(process.pid).children(recursive=True)
        if any(wanted in name for name in map(_name, family)):
            return family
        time.sleep(0.05)
    pytest.fail("".join([*said, *process.stderr]))


def _name(process: psutil.Process) -> str:
    try:
        return " ".join([process.name(), *process.cmdline()])
    except psutil.Error:
        return ""


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A temporary folder with a name that is short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="rd", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.mark.ray
@pytest.mark.s3
def test_interrupted_it_leaves_no_process_and_no_temporary_folder(stripes: Path, tmp_path: Path, short_tmp: Path):
    interrupted = started(stripes, tmp_path / "demo", short_tmp)
    family = family_at(interrupted, "starting Ray", "ray::")
    assert any("weed" in _name(process) for process in family)
    interrupted.send_signal(signal.SIGINT)
    assert interrupted.stderr is not None
    said = interrupted.stderr.read().splitlines()
    assert interrupted.wait(timeout=60) == cli.INTERRUPTED
    assert said[-1] == "raycnn: interrupted; the same command again resumes"
    assert not [line for line in said if "Traceback" in line]
    assert all_gone(family, 30), alive(family)
    assert [path.name for path in short_tmp.iterdir() if path.name.startswith(("raycnn", "seaweed"))] == []


def found(**settings: str) -> sources.Source:
    return sources.find_source(make(DemoConfig, settings))


def test_data_that_is_not_there_is_told_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match=r"no such data 'digit': choose digits, fashion-mnist, or a folder"):
        found(data="digit")
    monkeypatch.setattr(sources, "FASHION_MNIST", tmp_path)
    with pytest.raises(ConfigError, match="apt-get install dataset-fashion-mnist"):
        found(data="fashion-mnist")
    with pytest.raises(ConfigError, match="add --store FOLDER"):
        found(data="s3://bucket/photos")


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path):
    (tmp_path / "file").write_text("")
    told = r"cannot keep its data in .*/file/s3: Not a directory; name another folder"
    with pytest.raises(StorageError, match=told), S3Server(tmp_path / "file" / "s3"):
        pass


def test_folders_inside_each_other_are_refused(stripes: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="give another folder with --dir"):
        found(data=str(stripes), dir=str(stripes / "demo"))
    for data, folder in (("flowers", "."), ("x/s3", "x"), ("dd/s3/deep", "dd"), ("flowers/flowers", "flowers/..")):
        (tmp_path / "at" / data).mkdir(parents=True, exist_ok=True)
        with pytest.raises(ConfigError, match="lie inside each other: give another folder with --dir"):
            found(data=str(tmp_path / "at" / data), dir=str(tmp_path / "at" / folder))
    assert found(data=str(tmp_path / "at/x/s3"), dir=str(tmp_path / "dd")).name == "images"
    shutil.rmtree(tmp_path / "at")
    config = {"data": str(stripes), "dir": str(tmp_path), "store": str(tmp_path)}
    with pytest.raises(ConfigError, match="lie inside each other"):
        demo.demo(make(DemoConfig, config))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_home_folder_is_the_same_one_for_all_that_is_written(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/ann")
    config = make(DemoConfig, {"dir": "~/x", "store": "~/y"})
    assert (config.dir, config.store) == ("/home/ann/x", "/home/ann/y")


def small_demo(tmp_path: Path) -> demo._Demo:
    source = sources.Source("digits", None, lambda: iter(()), 0, pack={}, train={})
    return demo._Demo(source, open_store(tmp_path / "store"), tmp_path / "home", lambda event: None)


def test_only_what_an_earlier_demo_has_copied_is_removed(tmp_path: Path):
    one, store, home = small_demo(tmp_path), open_store(tmp_path / "store"), open_store(tmp_path / "home")
    home.put("labels/mine.jpg", b"photo")
    store.put("labels/labels/fp=1/part", b"1")
    one._keep({})
    (tmp_path / "store/labels/labels/fp=1/part").unlink()
    store.put("labels/labels/fp=2/part", b"2")
    one._keep({})
    kept = {entry.path for entry in home.list()}
    assert kept == {"labels/mine.jpg", "labels/labels/fp=2/part", "truth.csv", demo.COPIED}


def test_an_evaluation_by_another_version_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made: list[VerbConfig] = []
    values = {field.name: 1.0 for field in fields(demo.EvaluateReport)}

    def evaluate(config: VerbConfig, say: Any) -> demo.EvaluateReport:
        made.append(config)
        return demo.EvaluateReport(**values)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(demo, "evaluate", evaluate)
    one, run = small_demo(tmp_path), open_store(tmp_path / "store/run")
    bundle: Any = SimpleNamespace(digest="b", url="b")
    collection: Any = SimpleNamespace(digest="c", rows=lambda split: 3, store=SimpleNamespace(url="c"))
    one._evaluate(bundle, collection, "test")
    one._evaluate(bundle, collection, "test")
    assert len(made) == 1
    found = json.loads(run.get(demo.EVALUATION))
    run.put(demo.EVALUATION, json.dumps(found | {"report": values | {"new": 1}}).encode())
    one._evaluate(bundle, collection, "test")
    assert len(made) == 2


def test_commands_are_printed_as_the_program_was_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program = tmp_path / "my bin" / "raycnn"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(program), "demo"])
    monkeypatch.setenv("PATH", "/usr/bin")
    assert shlex.split(demo._next_commands(tmp_path, "0.png")[0]["type"])[0] == str(program)
    monkeypatch.setenv("PATH", str(program.parent))
    assert shlex.split(demo._next_commands(tmp_path, "0.png")[0]["type"])[0] == "raycnn"
