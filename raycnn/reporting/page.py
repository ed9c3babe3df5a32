"""report.html: one file with everything in it, readable without a network and without JavaScript."""

import base64
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

import raycnn
from raycnn.config import TrainConfig
from raycnn.drawing.axes import MATRIX_CLASSES, strength
from raycnn.errors import DataError
from raycnn.reporting.charts import Curve, chart
from raycnn.reporting.progress import WAITING
from raycnn.storage import Store, open_store

if TYPE_CHECKING:
    from raycnn.evaluating import EvaluateReport
    from raycnn.training import RateReport, TrainReport

REPORT = "report.html"
PAIRS = 30
NAME_LENGTH = 24
"""Longer class names are cut off in the matrix."""
PARTS = {
    "data": "waiting for data",
    "augment": "augmentation",
    "forward": "forward",
    "backward": "backward",
    "optimizer": "optimizer",
    "all_reduce": "all-reduce",
    "checkpoint": "checkpoint",
    "validation": "validation",
}
"""What the time of an epoch goes into, by its name in metrics.jsonl."""
OTHER = "other"
RUN_PICTURES = {
    "confusion.png": "What is confused, class by class",
    "confused.png": "What the confused images look like",
    "mistakes.png": "The most confident mistakes",
    "filters.png": "What the first layer has learned",
}
"""Of the pictures in a run folder those that the report has nothing else for."""
THRESHOLDS = (0.5, 0.8, 0.9, 0.96, 0.99)


class Picture(NamedTuple):
    """A PNG to be shown in the report."""

    title: str
    png: bytes


class _Counts(NamedTuple):
    """What the tables are made of: the evaluation of a split."""

    split: str
    rows: int
    accuracy_top1: float
    accuracy_top5: float
    loss: float
    ece: float
    per_class: list[dict[str, Any]]
    confusion: list[list[int]]


def write_report(run_url: str, pictures: Sequence[Picture] = (), evaluation: "EvaluateReport | None" = None) -> str:
    """Write RUN/report.html from what lies in a run folder, and return its URL.

    Args:
        run_url: a folder that `raycnn train` has filled, local or s3://.
        pictures: shown in this order, after those of the run.
        evaluation: the counts to show; without one, those of the best checkpoint on the validation split.

    Raises:
        DataError: the folder holds no finished epoch.
    """
    store = open_store(run_url)
    history = _history(store)
    bundle = json.loads(store.get("bundle/config.json"))
    config = yaml.safe_load(store.get("config.yaml"))
    counts = _counts(store, bundle, evaluation)
    sections = [
        _tiles(counts, history, bundle),
        _section("Learning curves", _curves(history)),
        _time(history),
        _confusion(counts, bundle["label_names"]) if counts else "",
        _classes(counts) if counts else "",
        _trust(json.loads(store.get("bundle/validation.json"))),
        *(_section(p.title, _picture(p)) for p in (*_run_pictures(store, len(bundle["label_names"])), *pictures)),
        _section("Configuration", _config_table(config) + _repeat(store)),
    ]
    title = f"{bundle['model']} on {config['data']}"
    page = _page(title, store.address(), "\n".join(sections)).encode()
    if store.head(REPORT) is None or store.get(REPORT) != page:
        store.put(REPORT, page)
    return store.address(REPORT)


def train(config: TrainConfig, progress: Callable[[dict[str, Any]], None] | None = None) -> "TrainReport | RateReport":
    """`raycnn.training.train`, and the report beside what it has made; or a range test of learning rates."""
    from raycnn.training import find_rate, train

    if config.find_lr:
        return find_rate(config, progress)
    made = train(config, progress)
    write_report(made.run)
    return made


def _history(store: Store) -> list[dict[str, Any]]:
    if store.head("metrics.jsonl") is None:
        raise DataError(f"{store.address()}: no metrics.jsonl there; is it the run folder of `raycnn train`?")
    return [json.loads(line) for line in store.get("metrics.jsonl").decode().splitlines()]


def _counts(store: Store, bundle: Mapping[str, Any], evaluation: "EvaluateReport | None") -> _Counts | None:
    if evaluation is not None:
        return _Counts(*(getattr(evaluation, name) for name in _Counts._fields))
    from raycnn.metrics import Metrics
    from raycnn.training import Checkpoints

    checkpoints = Checkpoints(store)
    if (best := checkpoints.best()) is None:
        return None
    names = bundle["label_names"]
    metrics = Metrics.from_vector(checkpoints.load(best)["validation"], len(names))
    ece = metrics.calibration(bundle["temperature"]).ece
    rates = (metrics.accuracy_top1, metrics.accuracy_top5, metrics.loss, ece)
    return _Counts("val", metrics.rows, *rates, metrics.per_class(names), metrics.confusion.tolist())


# -- the page -----------------------------------------------------------------------------------------------


def _page(title: str, url: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>raycnn: {escape(title)}</title><style>{_STYLE}</style></head><body>\n"
        f'<header><p class="quiet">raycnn report</p><h1>{escape(title)}</h1>'
        f'<p class="quiet">{escape(url)}</p></header>\n<main>\n{body}\n</main>\n'
        f'<footer class="quiet">Made by raycnn {escape(raycnn.__version__)}</footer></body></html>\n'
    )


def _section(title: str, content: str, note: str = "") -> str:
    said = f'<p class="quiet">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{said}{content}</section>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], style: str = "") -> str:
    """A table of ready HTML cells; the first column is the row's name, the others are right-aligned numbers."""
    heads = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = (
        f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<div class="wide"><table class="{style}"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _tiles(counts: _Counts | None, history: list[dict[str, Any]], bundle: Mapping[str, Any]) -> str:
    tiles: list[tuple[str, str, str]] = []
    if counts:
        right = round(counts.accuracy_top1 * counts.rows)
        tiles.append(
            ("accuracy", _percent(counts.accuracy_top1), f"{right:,} of {counts.rows:,} {counts.split} images")
        )
        if len(bundle["label_names"]) > 5:
            tiles.append(("top-5 accuracy", _percent(counts.accuracy_top5), f"{counts.split} split"))
        tiles.append(("loss", f"{counts.loss:.4f}", f"calibration error {counts.ece:.2%}"))
    seconds = sum(line["seconds"] for line in history)
    epochs = f"{len(history)} epoch" + ("s" if len(history) != 1 else "")
    tiles.append(("training", _duration(seconds), f"{epochs}, {history[-1]['step']:,} steps"))
    tiles.append(("speed", f"{history[-1]['images_per_s']:,.0f}", "training images/s, last epoch"))
    spec = bundle["image_spec"]
    size = f"{spec['height']} x {spec['width']} x {spec['channels']}"
    classes = f"{len(bundle['label_names']):,} classes"
    tiles.append(("parameters", _many(bundle["parameters"]), f"input {size}, {classes}"))
    shown = (
        f'<div class="tile"><p class="quiet">{escape(name)}</p><p class="figure">{escape(value)}</p>'
        f'<p class="quiet">{escape(note)}</p></div>'
        for name, value, note in tiles
    )
    return f'<div class="tiles">{"".join(shown)}</div>'


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    return f'<img alt="{escape(picture.title)}" src="data:image/png;base64,{data}">'


def _run_pictures(store: Store, classes: int) -> Iterator[Picture]:
    """Those in the run folder. Where the whole matrix is a table, a picture of it would say nothing new."""
    from raycnn.training import PICTURES

    for name, title in RUN_PICTURES.items():
        path = f"{PICTURES}/{name}"
        if (name != "confusion.png" or classes > MATRIX_CLASSES) and store.head(path) is not None:
            yield Picture(title, store.get(path))


def _repeat(store: Store) -> str:
    from raycnn.training import repeat_command

    return f'<p class="quiet">The same run again: <code>{escape(repeat_command(store))}</code></p>'


def _config_table(config: Mapping[str, Any]) -> str:
    return _table(("setting", "value"), ((escape(str(k)), escape(_plain(v))) for k, v in config.items()), "text")


# -- curves -------------------------------------------------------------------------------------------------


def _curves(history: list[dict[str, Any]]) -> str:
    def curve(name: str, key: str, factor: float = 1) -> Curve:
        return Curve(name, name, [line[key] * factor for line in history])

    loss = chart("Loss", [curve("train", "train/loss"), curve("val", "val/loss")], "{:.3g}", low=0)
    accuracy = chart("Accuracy in %", [curve("val", "metrics/accuracy_top1", 100)], "{:.4g} %", high=100)
    lines = (
        (
            str(line["epoch"] + 1),
            f"{line['train/loss']:.4f}",
            f"{line['val/loss']:.4f}",
            _percent(line["metrics/accuracy_top1"]),
            f"{line['lr']:.3g}",
            f"{line['images_per_s']:,.0f}",
            f"{line['seconds']:.1f}",
        )
        for line in history
    )
    head = ("epoch", "train loss", "val loss", "val accuracy", "last learning rate", "images/s", "seconds")
    details = f"<details><summary>Every epoch as numbers</summary>{_table(head, lines)}</details>"
    return f'<div class="charts">{loss}{accuracy}</div>{details}'


# -- time ---------------------------------------------------------------------------------------------------


def _time(history: list[dict[str, Any]]) -> str:
    """What the time went into as one bar; nothing for a run that has not measured it."""
    shares = time_shares(history)
    if not shares:
        return ""
    places = {name: place for place, name in enumerate((*PARTS, OTHER))}
    bar = "".join(
        f'<i class="part{places.get(name, places[OTHER])}" style="width:{share:.2%}" '
        f'title="{escape(_named(name))}: {share:.1%}"></i>'
        for name, share in shares.items()
    )
    rows = (
        (f'<i class="key part{places.get(name, places[OTHER])}"></i> {escape(_named(name))}', f"{share:.1%}")
        for name, share in shares.items()
    )
    table = _table(("part", "share"), rows)
    return _section("Where the time goes", f'<div class="shares">{bar}</div>{table}', _bottleneck(shares))


def time_shares(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Shares of the time of all epochs that have measured it, summing up to 1, as a step goes through them."""
    timed = [line for line in history if line.get("time")]
    seconds = sum(line["seconds"] for line in timed)
    if not seconds:
        return {}
    found = {name for line in timed for name in line["time"]}
    order = [*(name for name in PARTS if name in found), *sorted(found.difference(PARTS))]
    shares = {n: sum(line["seconds"] * line["time"].get(n, 0.0) for line in timed) / seconds for n in order}
    left = 1 - sum(shares.values())
    return shares | ({OTHER: left} if left > 0.001 else {})


def _bottleneck(shares: Mapping[str, float]) -> str:
    waiting, most = shares.get("data", 0.0), max(shares, key=lambda name: shares[name])
    if waiting > WAITING:
        return (
            f"The run is held up by its data: {waiting:.0%} of the time it has waited for images to be read and "
            "decoded. More CPUs, --cache-gib, or smaller images when packing make up for that."
        )
    return (
        f"Data came in time: {waiting:.0%} of the time was spent waiting for it, {shares[most]:.0%} on {_named(most)}."
    )


def _named(name: str) -> str:
    return PARTS.get(name, name)


# -- tables -------------------------------------------------------------------------------------------------


def _confusion(counts: _Counts, class_names: Sequence[str]) -> str:
    from raycnn.metrics import confused_pairs

    pairs = confused_pairs(counts.confusion)
    wrong = sum(n for n, _, _ in pairs)
    if len(class_names) > MATRIX_CLASSES:
        note = f"{wrong:,} of {counts.rows:,} {counts.split} images are taken for another class."
        return _section("Most confused", _pair_table(pairs, counts.confusion, class_names), note)
    note = (
        f"Rows are the truth, columns what the network said, on {counts.rows:,} {counts.split} images, "
        f"{wrong:,} of them wrong. The stronger a cell's colour, the larger its share of the row."
    )
    return _section("Confusion matrix", _matrix(counts.confusion, class_names), note)


def _matrix(confusion: list[list[int]], class_names: Sequence[str]) -> str:
    heads = "".join(f'<th scope="col"><span>{_short(name)}</span></th>' for name in class_names)
    lines = []
    for i, row in enumerate(confusion):
        total = sum(row) or 1
        cells = "".join(_cell(n, n / total, i == j, class_names[i], class_names[j]) for j, n in enumerate(row))
        lines.append(f'<tr><th scope="row">{_short(class_names[i])}</th>{cells}</tr>')
    small = " small" if len(class_names) > 15 else ""
    long = " long" if max(map(len, class_names)) > 4 else ""
    head = f'<thead><tr><th class="corner">truth</th>{heads}</tr></thead>'
    return f'<div class="wide"><table class="matrix{small}{long}">{head}<tbody>{"".join(lines)}</tbody></table></div>'


def _short(name: str) -> str:
    """A class name that leaves room for the matrix; the whole name is its tooltip."""
    if len(name) <= NAME_LENGTH:
        return escape(name)
    return f'<abbr title="{escape(name)}">{escape(name[: NAME_LENGTH - 1].rstrip())}&hellip;</abbr>'


def _cell(count: int, share: float, is_right: bool, truth: str, said: str) -> str:
    if not count:
        return "<td></td>"
    strong = strength(share, is_right)
    kind = "right" if is_right else "wrong"
    dark = " dark" if strong > 0.6 else ""
    title = escape(f"{truth}, taken for {said}: {count:,} ({share:.1%})" if not is_right else f"{truth}: {share:.1%}")
    return f'<td class="{kind}{dark}" style="--s:{strong * 100:.0f}%" title="{title}">{count:,}</td>'


def _pair_table(pairs: list[tuple[int, int, int]], confusion: list[list[int]], class_names: Sequence[str]) -> str:
    rows = (
        (escape(class_names[i]), escape(class_names[j]), f"{n:,}", _percent(n / sum(confusion[i])))
        for n, i, j in pairs[:PAIRS]
    )
    more = f'<p class="quiet">and {len(pairs) - PAIRS:,} more pairs</p>' if len(pairs) > PAIRS else ""
    return _table(("truth", "taken for", "images", "of the class"), rows, "pairs") + more


def _classes(counts: _Counts) -> str:
    many = len(counts.per_class) > MATRIX_CLASSES
    lines = sorted(counts.per_class, key=lambda c: (c["f1"] is None, c["f1"] or 0)) if many else counts.per_class
    rows = (
        (
            escape(line["class_name"]),
            _percent(line["precision"]),
            _percent(line["recall"]),
            _bar(line["f1"]),
            f"{line['support']:,}",
        )
        for line in lines
    )
    table = _table(("class", "precision", "recall", "F1", "images"), rows)
    note = "Precision: how often the network is right when it says the class. Recall: how much of the class it finds."
    if many:
        table = f"<details><summary>All {len(lines):,} classes, the worst first</summary>{table}</details>"
    return _section("By class", table, note)


def _bar(share: float | None) -> str:
    if share is None:
        return "-"
    return f'<span class="bar"><i style="width:{share * 100:.1f}%"></i></span><span>{_percent(share)}</span>'


def _trust(validation: Mapping[str, Any]) -> str:
    """How many predictions are left, and how right they are, above a confidence."""
    by_threshold = {round(line["threshold"], 4): line for line in validation.get("coverage", [])}
    rows = [
        (f"{t:g}", _percent(line["coverage"]), _percent(line["accuracy"]))
        for t in THRESHOLDS
        if (line := by_threshold.get(t)) is not None
    ]
    if not rows:
        return ""
    note = (
        f"On {validation['rows']:,} validation images, with probabilities calibrated by the temperature "
        f"{validation['temperature']:.3g}: what accepting only confident predictions keeps, and how right that is."
    )
    return _section("When to trust it", _table(("probability at least", "kept", "right"), rows), note)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"


def _many(count: int) -> str:
    return f"{count / 1e6:,.2f} M" if count >= 1_000_000 else f"{count:,}"


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.1f} s"
        if seconds < 120
        else f"{seconds / 60:.1f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)


_STYLE = """
:root{color-scheme:light dark;--page:#fff;--ink:#1a2130;--quiet:#5d6778;--line:#dfe3ea;--card:#f5f7fa;
--train:#2563c9;--val:#c2570c;--right:#2f855a;--wrong:#c53030}
@media (prefers-color-scheme:dark){:root{--page:#14181f;--ink:#e6e9ef;--quiet:#98a2b3;--line:#333b49;
--card:#1d232d;--train:#78a9ff;--val:#ff9f5a;--right:#3d9a6b;--wrong:#e0524f}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1040px;padding:32px 24px 64px;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
h1{font-size:28px;line-height:1.2;margin:2px 0 4px;overflow-wrap:anywhere}
h2{font-size:20px;margin:0 0 6px}
p{margin:0}
.quiet{color:var(--quiet);font-size:14px;overflow-wrap:anywhere}
section{margin-top:44px}
section>.quiet{max-width:75ch;margin-bottom:12px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin-top:28px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px}
.figure{font-size:24px;font-weight:650;font-variant-numeric:tabular-nums;white-space:nowrap}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(340px,1fr));gap:24px}
svg{width:100%;height:auto}
svg text{font-size:12px;fill:var(--quiet)}
svg text.title{font-size:14px;font-weight:600;fill:var(--ink)}
svg text.train{fill:var(--train);font-weight:600}
svg text.val{fill:var(--val);font-weight:600}
svg .grid{stroke:var(--line)}
polyline{fill:none;stroke-width:2;stroke-linejoin:round}
polyline.train{stroke:var(--train)}
polyline.val{stroke:var(--val)}
circle.train{fill:var(--train)}
circle.val{fill:var(--val)}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:14px}
th,td{padding:5px 12px;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th{font-weight:600}
thead th{color:var(--quiet);font-weight:500;vertical-align:bottom}
tbody th,thead th:first-child{text-align:left}
tbody th{white-space:normal;overflow-wrap:anywhere;min-width:8ch;max-width:48ch}
.text td,.pairs td:nth-child(2){text-align:left;white-space:normal;overflow-wrap:anywhere}
.pairs thead th:nth-child(2){text-align:left}
abbr{text-decoration:none}
.text thead th{text-align:left}
.bar{display:inline-block;width:90px;height:9px;background:var(--line);border-radius:3px}
.bar+span{display:inline-block;min-width:8ch}
.bar i{display:block;height:100%;background:var(--train);border-radius:3px}
.shares{display:flex;height:26px;border-radius:6px;overflow:hidden;background:var(--line);margin-bottom:10px}
.key{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:4px}
.part0{background:#c2570c}.part1{background:#c99a2e}.part2{background:#2563c9}.part3{background:#6d9be8}
.part4{background:#2f855a}.part5{background:#805ad5}.part6{background:#b83280}.part7{background:#5d7f93}
.part8{background:#98a2b3}
code{overflow-wrap:anywhere;font-size:13px}
.matrix{border-collapse:separate;border-spacing:2px}
.matrix th,.matrix td{border:0;padding:4px 6px;text-align:center}
.matrix td{min-width:46px;height:32px;background:var(--card);border-radius:4px}
.matrix tbody th{text-align:right;padding-right:10px;white-space:nowrap}
.matrix .corner{text-align:right;padding-right:10px}
.matrix.small{font-size:11px;border-spacing:1px}
.matrix.small td{min-width:23px;height:23px;padding:1px;border-radius:3px}
.matrix.small thead th{padding:4px 0}
.matrix.long thead span{writing-mode:vertical-rl;transform:rotate(180deg)}
.matrix td.right{background:color-mix(in srgb,var(--right) var(--s),var(--card))}
.matrix td.wrong{background:color-mix(in srgb,var(--wrong) var(--s),var(--card))}
.matrix td.dark{color:#fff}
img{width:100%;height:auto;border:1px solid var(--line);border-radius:10px;background:#fff}
summary{cursor:pointer;margin-top:12px;color:var(--quiet);font-size:14px}
footer{margin-top:56px;border-top:1px solid var(--line);padding-top:12px}
@media print{:root{--page:#fff;--ink:#000;--quiet:#444;--line:#ccc;--card:#f5f7fa;--train:#2563c9;--val:#c2570c;
--right:#2f855a;--wrong:#c53030}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
body{max-width:none;padding:0;font-size:12px}
section{break-inside:avoid;margin-top:28px}
.charts{grid-template-columns:1fr 1fr}
img{max-height:230mm;width:auto;max-width:100%}}
"""
