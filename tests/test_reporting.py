"""What a person sees: report.html, and the line that says how far a verb is."""

import base64
import io
import json
import shlex
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from raycnn import bundle as bundles
from raycnn.config import ImageSpec, TrainConfig, make, to_yaml
from raycnn.errors import DataError
from raycnn.evaluating import EvaluateReport
from raycnn.metrics import Metrics
from raycnn.models import build
from raycnn.reporting import Picture, ProgressLine, write_report
from raycnn.shards.order import Cursor
from raycnn.storage import open_store
from raycnn.training import Checkpoints

SPEC = ImageSpec(height=8, width=8, channels=1, crop=1.0, mean=(0.45,), std=(0.22,))
PNG = base64.b64decode(
    b"iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
HOSTILE = ("<script>alert(1)</script>", '"><img src=http://evil.example/x>', "a & b", "x" * 300)


def counted(classes: int, wrong: dict[tuple[int, int], int], right: int = 40) -> Metrics:
    """`right` images of each class are taken for what they are, and `wrong[truth, said]` for something else."""
    pairs = [(i, i) for i in range(classes) for _ in range(right)]
    pairs += [pair for pair, count in wrong.items() for _ in range(count)]
    metrics = Metrics(classes)
    metrics.update(5.0 * torch.eye(classes)[[said for _, said in pairs]], torch.tensor([truth for truth, _ in pairs]))
    return metrics


def evaluated(metrics: Metrics, names: tuple[str, ...]) -> EvaluateReport:
    return EvaluateReport(
        rows=metrics.rows,
        accuracy_top1=metrics.accuracy_top1,
        accuracy_top5=metrics.accuracy_top5,
        loss=metrics.loss,
        ece=metrics.ece,
        per_class=metrics.per_class(names),
        confusion=metrics.confusion.tolist(),
        split="test",
        status={"ok": metrics.rows},
        unlabelled=0,
    )


def run_folder(root: Path, names: tuple[str, ...], metrics: Metrics, epochs: int = 3) -> str:
    """What `raycnn train` leaves, made without training."""
    store = open_store(str(root))
    store.put("config.yaml", to_yaml(make(TrainConfig, {"data": "/packed", "run": str(root)})).encode())
    line = {"train/loss": 0.5, "val/loss": 0.25, "lr": 1e-3, "images_per_s": 1234.5, "seconds": 2.0, "skipped": {}}
    line |= {"metrics/accuracy_top1": 0.75, "metrics/accuracy_top5": 1.0}
    history = [line | {"epoch": i, "step": 10 * (i + 1)} for i in range(epochs)]
    store.put("metrics.jsonl", "".join(json.dumps(entry) + "\n" for entry in history).encode())
    bundles.save(
        store.child("bundle").url,
        build("classic", len(names), SPEC, seed=0).eval(),
        names,
        temperature=metrics.temperature,
        metrics={"accuracy_top1": metrics.accuracy_top1, "loss": metrics.loss, "epochs": epochs},
        validation=metrics.validation(),
        samples=[],
        data_fingerprint="x",
    )
    return store.url


class Page(HTMLParser):
    """A page as a browser takes it apart: its elements, its text, the tables; and whether all tags are closed."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.tables: list[list[list[str]]] = []
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if {"td", "th"} & set(self._open):
            self.tables[-1][-1][-1] += data

    def table(self, *head: str) -> list[list[str]]:
        """The rows of the table whose head begins so."""
        (found,) = (t for t in self.tables if tuple(t[0][: len(head)]) == head)
        return found[1:]


def page_of(url: str) -> Page:
    return Page(Path(url, "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def animals(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The report of a run on two classes, one image out of 81 wrong."""
    names, metrics = ("ant", "bee"), counted(2, {(1, 0): 1})
    url = run_folder(tmp_path_factory.mktemp("animals") / "run", names, metrics)
    assert write_report(url, [Picture("Filters", PNG)], evaluated(metrics, names)) == f"{url}/report.html"
    return page_of(url)


def test_the_report_says_how_good_the_network_is_and_what_it_confuses(animals: Page):
    assert "98.77%" in animals.text
    assert "80 of 81 test images" in animals.text
    assert animals.table("truth", "ant", "bee") == [["ant", "40", ""], ["bee", "1", "40"]]
    assert animals.table("class") == [
        ["ant", "97.56%", "100.00%", "98.77%", "40"],
        ["bee", "100.00%", "97.56%", "98.77%", "41"],
    ]
    assert animals.table("setting")[0] == ["data", "/packed"]
    assert [row[0] for row in animals.table("epoch")] == ["1", "2", "3"]


def test_the_report_needs_no_network_and_runs_no_code(animals: Page):
    for tag, attributes in animals.elements:
        assert tag not in ("script", "link", "iframe", "object", "base", "form")
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "data", "srcset", "action", "background"):
            assert (attributes.get(name) or "data:").startswith("data:")
    style = "".join(animals.text)
    assert "url(" not in style
    assert "@import" not in style


def test_a_picture_lies_in_the_report_byte_by_byte(animals: Page):
    (source,) = (attributes["src"] for tag, attributes in animals.elements if tag == "img")
    assert source is not None
    assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == PNG


def test_hostile_and_long_class_names_are_text_and_leave_the_matrix_readable(tmp_path: Path):
    metrics = counted(4, {(0, 1): 2})
    url = run_folder(tmp_path / "run", HOSTILE, metrics)
    write_report(url, (), evaluated(metrics, HOSTILE))
    page = page_of(url)
    assert not [tag for tag, _ in page.elements if tag in ("script", "img")]
    assert [row[0] for row in page.table("class")] == list(HOSTILE)
    matrix = page.table("truth")
    assert [len(row[0]) <= 24 for row in matrix] == [True] * 4
    titles = {attributes.get("title") for tag, attributes in page.elements if tag == "abbr"}
    assert HOSTILE[0] in titles
    assert HOSTILE[3] in titles


@pytest.mark.slow
def test_a_thousand_classes_are_shown_as_the_worst_pairs(tmp_path: Path):
    names = tuple(f"class {i}" for i in range(1000))
    metrics = counted(1000, {(7, 9): 3, (500, 2): 5}, right=1)
    url = run_folder(tmp_path / "run", names, metrics, epochs=1)
    write_report(url, (), evaluated(metrics, names))
    page = page_of(url)
    assert page.table("truth", "taken for") == [
        ["class 500", "class 2", "5", "83.33%"],
        ["class 7", "class 9", "3", "75.00%"],
    ]
    classes = page.table("class")
    assert {row[0] for row in classes[:2]} == {"class 500", "class 2"}
    assert len(classes) == 1000


def test_without_an_evaluation_the_report_shows_the_best_checkpoint_on_validation(tmp_path: Path):
    metrics = counted(2, {(0, 1): 20})
    url = run_folder(tmp_path / "run", ("ant", "bee"), metrics, epochs=2)
    checkpoints = Checkpoints(open_store(url))
    checkpoints.save({"validation": counted(2, {(0, 1): 60}).to_vector()}, Cursor(0, 0), 0.5)
    checkpoints.save({"validation": metrics.to_vector()}, Cursor(1, 0), 0.8)
    write_report(url)
    assert "80 of 100 val images" in page_of(url).text


def test_the_report_shows_the_pictures_that_the_run_has_left(tmp_path: Path):
    metrics = counted(2, {(0, 1): 3})
    url = run_folder(tmp_path / "run", ("ant", "bee"), metrics)
    for name in ("curves", "confusion", "confused", "mistakes", "filters"):
        open_store(url).put(f"pictures/{name}.png", PNG + name.encode())
    write_report(url, [Picture("One image", PNG)], evaluated(metrics, ("ant", "bee")))
    sources = [attributes["src"] for tag, attributes in page_of(url).elements if tag == "img"]
    shown = [base64.b64decode((source or "").removeprefix("data:image/png;base64,")) for source in sources]
    # Curves and the matrix of two classes are in the report already, as figures that a person can read.
    assert shown == [PNG + b"confused", PNG + b"mistakes", PNG + b"filters", PNG]


def with_times(url: str, *times: dict[str, float] | None) -> Page:
    """The report of the run whose epochs have spent their time so."""
    store = open_store(url)
    lines = [json.loads(line) for line in store.get("metrics.jsonl").decode().splitlines()]
    lines = [line | ({"time": time} if time is not None else {}) for line, time in zip(lines, times, strict=True)]
    store.put("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    write_report(url, (), evaluated(counted(2, {}), ("ant", "bee")))
    return page_of(url)


def test_the_report_says_where_the_time_goes_and_that_data_hold_the_run_up(tmp_path: Path):
    url = run_folder(tmp_path / "run", ("ant", "bee"), counted(2, {}))
    spent = {"forward": 0.3, "data": 0.2, "validation": 0.1}
    page = with_times(url, None, spent, spent | {"data": 0.4, "new": 0.1})
    assert page.table("part") == [
        [" waiting for data", "30.0%"],
        [" forward", "30.0%"],
        [" validation", "10.0%"],
        [" new", "5.0%"],
        [" other", "25.0%"],
    ]
    told = "".join(page.text)
    assert "30% of the time it has waited for images" in told
    assert "--cache-gib" in told
    widths = [a["style"] for tag, a in page.elements if tag == "i" and "style" in a]
    assert widths[:5] == ["width:30.00%", "width:30.00%", "width:10.00%", "width:5.00%", "width:25.00%"]


def test_the_report_does_not_blame_data_that_came_in_time(tmp_path: Path):
    url = run_folder(tmp_path / "run", ("ant", "bee"), counted(2, {}))
    told = "".join(with_times(url, *[{"data": 0.02, "forward": 0.4, "backward": 0.5}] * 3).text)
    assert "Data came in time: 2% of the time was spent waiting for it, 50% on backward." in told
    assert "held up" not in told


def test_a_run_that_has_not_measured_its_time_has_a_report_all_the_same(animals: Page):
    assert "Where the time goes" not in animals.text


def test_the_report_says_what_repeats_the_run(tmp_path: Path):
    url = run_folder(tmp_path / "a run", ("ant", "bee"), counted(2, {}))
    write_report(url, (), evaluated(counted(2, {}), ("ant", "bee")))
    (command,) = (text for text in page_of(url).text if text.startswith("raycnn train"))
    words = shlex.split(command)
    assert words == ["raycnn", "train", "--config", f"{url}/config.yaml", "--run", f"{url}-again"]


def test_the_report_is_not_written_again_when_nothing_has_changed(tmp_path: Path):
    metrics = counted(2, {})
    url = run_folder(tmp_path / "run", ("ant", "bee"), metrics)
    store = open_store(url)
    write_report(url, (), evaluated(metrics, ("ant", "bee")))
    before = store.head("report.html")
    write_report(url, (), evaluated(metrics, ("ant", "bee")))
    assert store.head("report.html") == before


def test_a_folder_without_a_run_is_told(tmp_path: Path):
    with pytest.raises(DataError, match=r"no metrics.jsonl there; is it the run folder"):
        write_report(str(tmp_path))


# -- the progress line --------------------------------------------------------------------------------------


class Watched:
    """A progress line with a clock of its own, drawn where there is no terminal."""

    def __init__(self) -> None:
        self.now = 0.0
        self.stream = io.StringIO()
        self.line = ProgressLine(self.stream, clock=lambda: self.now)

    def at(self, now: float, **event: Any) -> list[str]:
        """Send a progress event, or only let time pass; the lines that it has led to."""
        self.now, before = now, len(self.stream.getvalue())
        if event:
            self.line({"kind": "progress", "text": ""} | event)
        self.line.tick()
        return self.stream.getvalue()[before:].splitlines()


@pytest.fixture
def watched() -> Watched:
    return Watched()


def test_speed_and_time_left_are_those_of_the_last_minute(watched: Watched):
    assert watched.at(0, done=0, total=10_000) == []
    for second in range(1, 112):  # 10 images/s, then 50
        done = 10 * second if second <= 40 else 400 + 50 * (second - 40)
        printed = watched.at(second, done=done, total=10_000)
        if printed:
            last = printed
    assert last == ["3,500/10,000 images  50 images/s  2:10 left"]


def test_time_left_is_at_most_what_the_run_may_still_take(watched: Watched):
    for second in range(0, 70, 10):
        last = watched.at(float(second), done=50 * second, total=100_000, most_s=120.0 - second)
    assert last == ["3,000/100,000 images  50 images/s  1:00 left"]
    assert watched.at(90.0)[0].endswith("  0:30 left")


def test_workers_that_finish_together_do_not_make_a_speed_of_millions(watched: Watched):
    watched.at(0.000, done=2048, total=20_480)
    assert watched.at(0.001, done=4096, total=20_480) == []
    assert watched.at(2.5) == ["4,096/20,480 images"]
    watched.at(10.000, done=6144, total=20_480)
    assert watched.at(10.001, done=8192, total=20_480) == []
    assert watched.at(12.0) == ["8,192/20,480 images  410 images/s  0:30 left"]


def test_what_is_overdue_is_not_hidden(watched: Watched):
    for second in range(11):
        watched.at(second, done=100 * second, total=10_000)
    assert watched.at(41) == ["1,000/10,000 images  26 images/s  5:51 left"]


def test_a_resumed_run_does_not_count_what_was_there_as_speed(watched: Watched):
    watched.at(0, done=9_000, total=10_000)
    assert watched.at(10, done=9_100, total=10_000) == []
    assert watched.at(31) == ["9,100/10,000 images  9.1 images/s  1:39 left"]


def test_quick_work_prints_few_lines_and_the_end_says_what_it_took(watched: Watched):
    watched.at(5)
    printed = [line for i in range(1, 1001) for line in watched.at(5 + i / 100, done=i, total=1000, unit="files")]
    assert len(printed) <= 6
    assert printed[-1] == "1,000/1,000 files  in 0:15"


def test_slow_work_prints_a_line_every_half_minute(watched: Watched):
    printed = [
        (second, line)
        for second in range(601)
        for line in watched.at(second, done=second, total=1_000_000, text="3 truncated")
    ]
    assert [second for second, _ in printed] == list(range(30, 601, 30))
    assert printed[-1][1] == "600/1,000,000 images  1 images/s  11 d 13 h left  3 truncated"


def test_the_same_count_in_the_next_stage_starts_a_clock_of_its_own(watched: Watched):
    watched.at(0, done=10, total=347)
    assert watched.at(100, done=347, total=347) == ["347/347 images  in 1:40"]
    watched.line({"kind": "note", "text": "label"})
    assert watched.at(103, done=347, total=347) == ["347/347 images  in 0:03"]


def test_a_rate_of_less_than_one_is_not_zero(watched: Watched):
    watched.at(0, done=1, total=100)
    watched.at(40, done=11, total=100)
    assert watched.at(70) == ["11/100 images  0.25 images/s  5:56 left"]


def test_a_silent_stage_gives_signs_of_life_ever_more_rarely(watched: Watched):
    watched.line({"kind": "note", "text": "starting"})
    printed = [line for second in range(101) for line in watched.at(second)]
    assert printed == [f"    still at work, {clock}" for clock in ("0:10", "0:20", "0:40", "1:20")]


def test_a_sign_of_life_says_what_is_done_where_nothing_can_be_counted(watched: Watched):
    watched.line({"kind": "note", "text": "starting"})
    watched.line({"kind": "status", "text": "planning: 3,000 images listed"})
    assert watched.at(10) == ["    still at work, 0:10  planning: 3,000 images listed"]
    watched.line({"kind": "note", "text": "planned"})
    assert [line for second in range(10, 21) for line in watched.at(second)][-1:] == ["    still at work, 0:10"]


def test_an_epoch_that_was_held_up_by_data_says_so(watched: Watched):
    epoch = {"kind": "epoch", "epochs": 9, "train/loss": 1.0, "val/loss": 1.0, "images_per_s": 9.0, "epoch": 0}
    for waiting in (0.04, 0.31):
        watched.line(epoch | {"metrics/accuracy_top1": 0.5, "time": {"data": waiting, "forward": 0.5}})
    before, after = watched.stream.getvalue().splitlines()
    assert "waiting" not in before
    assert after.endswith("9 images/s  31% waiting for data")


def test_after_the_last_epoch_the_line_no_longer_claims_to_train(watched: Watched):
    epoch = {"kind": "epoch", "epochs": 2, "train/loss": 0.5, "val/loss": 0.25, "images_per_s": 1234.5}
    epoch |= {"metrics/accuracy_top1": 0.98765, "skipped": {"truncated": 2}}
    watched.at(0, done=150, total=200)
    watched.line(epoch | {"epoch": 1})
    assert watched.stream.getvalue().splitlines() == [
        "epoch 2/2  train loss 0.5000  val loss 0.2500  accuracy 98.77%  1,234 images/s  skipped 2 truncated"
    ]
    assert watched.at(29) == ["    still at work, 0:29"]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True

    def shows(self, text: str) -> bool:
        """Whether the text is drawn within a second or two."""
        give_up = time.monotonic() + 5
        while time.monotonic() < give_up:
            if text in self.getvalue():
                return True
            time.sleep(0.02)
        return False


def test_on_a_terminal_the_line_moves_in_place_and_notes_stay(monkeypatch: pytest.MonkeyPatch):
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    screen = Terminal()
    with ProgressLine(screen) as line:
        line({"kind": "note", "text": "1/2 pack"})
        line({"kind": "progress", "done": 50, "total": 100, "text": "1 truncated"})
        assert screen.shows("50/100 images  1 truncated")
        line({"kind": "progress", "done": 100, "total": 100, "text": ""})
        line({"kind": "note", "text": "2/2 train"})
    drawn = screen.getvalue()
    assert "1/2 pack\n" in drawn
    assert "100/100 images  in 0:0" in drawn
    assert "2/2 train\n" in drawn
    assert "\x1b[?25h" in drawn.rpartition("2/2 train")[2]  # the cursor is back
    assert drawn.rpartition("\x1b[2K")[2].strip() == ""  # and the line is gone
