"""`raycnn demo`: the whole chain on real images, with no network and no account.

Everything runs against an S3 server of its own (or a folder given as the store), below `s3://raycnn-demo/NAME/`:

    raw/      the images as somebody may have them       packed/   shards and manifest
    run/      checkpoints, metrics, bundle, report       photos/   the held-out images, without labels
    labels/   one row for each photo

What is worth keeping is copied to DIR/NAME, where the commands that the demo ends with find it. The server's data
stay in DIR/s3, so that the same command again resumes, or finds everything done.
"""

import dataclasses
import io
import json
import os
import shlex
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from raycnn import bundle as bundles
from raycnn import data, explaining, images
from raycnn.config import DemoConfig, EvaluateConfig, LabelConfig, PackConfig, TrainConfig, VerifyConfig, make
from raycnn.demo.sources import Source, find_source, places
from raycnn.errors import Bad, ConfigError, DataError, RaycnnError, Status
from raycnn.evaluating import EvaluateReport, evaluate
from raycnn.labeling import LabelReport, label
from raycnn.ledger import VerifyReport, verify
from raycnn.packing import pack
from raycnn.reporting import Picture, write_report
from raycnn.s3local import S3Server
from raycnn.shards import PackedCollection, open_collection
from raycnn.storage import Store, contains, open_store
from raycnn.training import TrainReport, train

BUCKET = "raycnn-demo"
TRANSFERS = 16
"""Small objects that are written or copied at a time."""
EVALUATION = "evaluation.json"
FILTERS = "filters.png"
COPIED = ".copied.json"
"""In the demo's folder: what of it was copied from the store, by this run or an earlier one."""

Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class DemoReport:
    """What the demo made, and where."""

    accuracy_top1: float
    rows: int
    """Held-out images that were labelled."""
    correct: int
    """Labels that agree with the truth."""
    evaluated_rows: int
    evaluated_correct: int
    """What evaluation counted on the same images; it equals `correct`."""
    lost: int
    duplicate: int
    seconds: float
    home: str
    report: str
    bundle: str
    labels: str
    photos: str
    truth: str
    packed: str
    pictures: list[str]
    next: list[dict[str, str]]

    @property
    def error(self) -> RaycnnError | None:
        """What must not be."""
        if self.lost or self.duplicate:
            return DataError(f"demo: {self.lost} rows are lost and {self.duplicate} doubled; this is a bug in raycnn")
        if self.correct != self.evaluated_correct:
            counts = f"{self.correct:,} labels agree with the truth, and evaluation counted {self.evaluated_correct:,}"
            return DataError(f"demo: {counts}; this is a bug in raycnn")
        return None

    def readable(self) -> Iterator[str]:
        """The report for a person: the outcome, what lies where, and what to type next."""
        right = f"{self.correct:,} of {self.evaluated_rows:,} held-out images got the right label"
        yield f"{right}: {self.accuracy_top1:.2%}, as evaluation said"
        yield f"{self.rows:,} rows, {self.lost} lost, {self.duplicate} doubled"
        yield ""
        yield f"Done in {self.seconds:.0f} s. The folder {self.home} holds:"
        for place, what in (
            (self.report, "learning curves, confusion matrix, pictures: open it in a browser"),
            *zip(self.pictures, ("what the first layer has learned", "one image on its way through"), strict=True),
            (self.bundle, "the network, with all that it needs to predict"),
            (self.labels, "one row for each image (Parquet)"),
            (self.photos, "the held-out images"),
            (self.truth, "and what they are"),
            (self.packed, "the data set that it was trained on (Parquet)"),
        ):
            yield f"  {Path(place).relative_to(self.home).as_posix():<18}  {what}"
        yield ""
        yield "Next:"
        for command in self.next:
            yield f"  # {command['to']}"
            yield f"  {command['type']}"


def demo(config: DemoConfig, progress: Progress | None = None) -> DemoReport:
    """Pack, train, evaluate, label, compare, explain.

    Raises:
        ConfigError: the images are not installed, folders lie inside each other, or Ray already runs in this
            process without the S3 server.
        DataError: a folder given does not hold labelled images.
        StorageError: the S3 server does not start, or a folder cannot be written to.
    """
    start = time.perf_counter()
    source = find_source(config)
    home = Path(config.dir) / source.name
    with _store(config, source) as url:
        made = _Demo(source, open_store(url), home, progress or (lambda event: None)).run()
    evaluated, labelled, found = made
    return DemoReport(
        accuracy_top1=evaluated.accuracy_top1,
        rows=labelled.rows,
        correct=found.correct,
        evaluated_rows=evaluated.rows,
        evaluated_correct=sum(row[i] for i, row in enumerate(evaluated.confusion)),
        lost=found.verified.lost,
        duplicate=found.verified.duplicate,
        seconds=time.perf_counter() - start,
        home=str(home),
        report=str(home / "run" / "report.html"),
        bundle=str(home / "run" / "bundle"),
        labels=str(home / "labels"),
        photos=str(home / "photos"),
        truth=str(home / "truth.csv"),
        packed=str(home / "packed"),
        pictures=[str(home / name) for name in found.pictures],
        next=_next_commands(home, found.photo),
    )


class _Found(NamedTuple):
    correct: int
    verified: VerifyReport
    pictures: list[str]
    photo: str


class _Demo:
    """One run through the chain; every step resumes what an earlier run has left."""

    def __init__(self, source: Source, store: Store, home: Path, say: Progress) -> None:
        self._source, self._store, self._say = source, store, say
        self._home, self._kept = home, open_store(str(home))

    def run(self) -> tuple[EvaluateReport, LabelReport, _Found]:
        collection = self._pack(self._stage())
        trained = self._train(collection)
        bundle = bundles.load(trained.bundle)
        split = "test" if "test" in collection.splits else "val"
        evaluated = self._evaluate(bundle, collection, split)
        truth, labelled, verified, correct = self._label(bundle, collection, split)
        self._note("6/7 draw what the network has learned, and write the report")
        pictures, photo = self._pictures(bundle, truth)
        # The filters are among the run's own pictures.
        write_report(
            self._url("run"), [Picture(title, png) for name, title, png in pictures if name != FILTERS], evaluated
        )
        self._note(f"7/7 copy the results to {self._home}")
        self._keep(truth)
        for name, _, png in pictures:
            self._kept.put(name, png)
        return evaluated, labelled, _Found(correct, verified, [name for name, _, _ in pictures], photo)

    def _url(self, name: str) -> str:
        return self._store.child(name).url

    def _note(self, text: str) -> None:
        self._say({"kind": "note", "text": text})

    def _stage(self) -> str:
        """Put the images into the store as they are, unless they lie somewhere already; return where."""
        if self._source.url is not None:
            self._note(f"1/7 take the images from {open_store(self._source.url).address()}")
            return self._source.url
        raw = self._store.child("raw")
        self._note(f"1/7 put {self._source.size:,} files into {raw.address()}")
        self._put([raw], self._source.files(), self._source.size)
        return raw.url

    def _pack(self, raw: str) -> PackedCollection:
        packed = self._url("packed")
        self._note(f"2/7 pack them into {self._store.address('packed')}")
        report = pack(make(PackConfig, {"src": raw, "dst": packed} | self._source.pack), self._say)
        self._note_done(not report.shards_written, "packed")
        collection = open_collection(packed)
        assert isinstance(collection, PackedCollection)
        return collection

    def _train(self, collection: PackedCollection) -> TrainReport:
        classes = len(collection.class_names)
        self._note(f"3/7 train classic on {collection.rows('train'):,} images of {classes} classes")
        settings = {"data": collection.store.url, "run": self._url("run")} | self._source.train
        trained = train(make(TrainConfig, settings), self._say)
        self._note_done(trained.resumed_at_epoch == trained.epochs, "trained")
        return trained

    def _evaluate(self, bundle: bundles.Bundle, collection: PackedCollection, split: str) -> EvaluateReport:
        """What the bundle does on the split, counted once: the same bundle on the same data does the same."""
        self._note(f"4/7 evaluate on {collection.rows(split):,} images that training has not seen")
        run, counted = self._store.child("run"), {"bundle": bundle.digest, "data": collection.digest, "split": split}
        found = json.loads(run.get(EVALUATION)) if run.head(EVALUATION) is not None else {}
        # A report of another version of raycnn has other fields.
        fields = {field.name for field in dataclasses.fields(EvaluateReport)}
        is_done = found.get("of") == counted and found["report"].keys() == fields
        self._note_done(is_done, "evaluated")
        if is_done:
            report = EvaluateReport(**found["report"])
        else:
            settings = {"bundle": bundle.url, "data": collection.store.url, "split": split}
            report = evaluate(make(EvaluateConfig, settings), self._say)
            run.put(EVALUATION, json.dumps({"of": counted, "report": dataclasses.asdict(report)}).encode())
        self._note(f"    {report.accuracy_top1:.2%} right, calibration error {report.ece:.1%}")
        return report

    def _label(
        self, bundle: bundles.Bundle, collection: PackedCollection, split: str
    ) -> tuple[dict[str, str | None], LabelReport, VerifyReport, int]:
        """(class of each photo, what labeling says, what verifying says, how many labels are right)."""
        self._note("5/7 label the same images without their labels, each exactly once")
        truth = self._photos(collection, split)
        photos, labels = self._url("photos"), self._url("labels")
        labelled = label(make(LabelConfig, {"data": photos, "out": labels, "bundle": bundle.url}), self._say)
        self._note_done(not labelled.units_written, "labelled")
        verified = verify(make(VerifyConfig, {"out": labels}))
        correct = _agreeing(open_store(labels), truth)
        self._note(
            f"    {labelled.rows:,} rows, {verified.lost} lost, {verified.duplicate} doubled; "
            f"{correct:,} of {sum(1 for c in truth.values() if c):,} labels agree with the truth"
        )
        return truth, labelled, verified, correct

    def _note_done(self, is_done: bool, word: str) -> None:
        if is_done:
            self._note(f"    {word} by an earlier run")

    def _put(self, stores: Sequence[Store], files: Iterable[tuple[str, bytes]], count: int) -> None:
        """Write many objects to each store; those that an earlier run has written stay untouched."""
        there = [{e.path: e.size for e in store.list()} for store in stores]

        def put(file: tuple[str, bytes]) -> None:
            for store, sizes in zip(stores, there, strict=True):
                if sizes.get(file[0]) != len(file[1]):
                    store.put(*file)

        for done, _ in enumerate(_parallel(put, files), 1):
            self._say({"kind": "progress", "done": done, "total": count, "unit": "files", "text": ""})

    def _photos(self, collection: PackedCollection, split: str) -> dict[str, str | None]:
        """Write the images of a split side by side under names that tell nothing; return each one's class.

        They go into the demo's folder at the same time, for the commands that the demo ends with.
        """
        truth: dict[str, str | None] = {}

        def files() -> Iterator[tuple[str, bytes]]:
            for number, sample in enumerate(collection.read(list(collection.select(split, Counter())))):
                encoded = sample.encoded or b""
                header = images.read_header(encoded)
                name = f"{number:06d}.{'bin' if isinstance(header, Bad) else header.format.lower()}"
                truth[name] = None if sample.label is None else collection.class_names[sample.label]
                yield name, encoded

        self._put([self._store.child("photos"), self._kept.child("photos")], files(), collection.rows(split))
        return truth

    def _pictures(
        self, bundle: bundles.Bundle, truth: dict[str, str | None]
    ) -> tuple[list[tuple[str, str, bytes]], str]:
        """(file name, title, PNG) of the learned filters and of one photo's feature maps; and that photo's name."""
        photos = self._store.child("photos")
        for photo, name in truth.items():
            encoded = photos.get(photo)
            if not isinstance(images.pixels(encoded, bundle.spec), Bad):
                maps = explaining.feature_maps_picture(bundle, encoded, name)
                filters = explaining.filters_picture(bundle)
                return [
                    (FILTERS, "What the first layer has learned", filters),
                    ("feature-maps.png", f"One held-out image, {photo}, layer by layer", maps),
                ], photo
        raise DataError(f"{photos.address()}: none of the held-out images can be read")

    def _keep(self, truth: dict[str, str | None]) -> None:
        """Copy what the store holds, but for the images, to the demo's folder.

        What an earlier demo has copied and the store has no more goes, such as another network's labels; what else
        lies in the folder stays.
        """
        wanted = [e.path for e in self._store.list() if not e.path.startswith(("raw/", "photos/"))]
        copied: set[str] = set(json.loads(self._kept.get(COPIED))) if self._kept.head(COPIED) is not None else set()
        self._kept.put(COPIED, json.dumps(sorted(copied.union(wanted))).encode())
        for path in copied.difference(wanted):
            (self._home / path).unlink(missing_ok=True)
        deque(_parallel(self._copy, wanted), maxlen=0)
        lines = "".join(f"{photo},{'' if name is None else _csv(name)}\n" for photo, name in truth.items())
        self._kept.put("truth.csv", f"photo,class\n{lines}".encode())

    def _copy(self, path: str) -> None:
        """Copy an object, unless it is there: an equal file keeps its time, which is part of its version."""
        content = self._store.get(path)
        if self._kept.head(path) is None or self._kept.get(path) != content:
            self._kept.put(path, content)


def _csv(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if set(text) & set('",\r\n') else text


def _parallel(work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """The results of `work` on each item, in order, a few at a time, so that memory does not grow."""
    items = iter(items)
    with ThreadPoolExecutor(TRANSFERS) as pool:
        running: deque[Future[Any]] = deque(pool.submit(work, item) for item in islice(items, 2 * TRANSFERS))
        while running:
            result = running.popleft().result()
            running.extend(pool.submit(work, item) for item in islice(items, 1))
            yield result


def _agreeing(labels: Store, truth: dict[str, str | None]) -> int:
    """How many label rows name the class that the image has."""
    agreeing = 0
    for entry in labels.list("labels/"):
        table = pq.read_table(io.BytesIO(labels.get(entry.path)), columns=["key", "status", "class_name"])
        rows = zip(*(column.to_pylist() for column in table.columns), strict=True)
        agreeing += sum(status == Status.OK and truth[key] == name for key, status, name in rows)
    return agreeing


def _next_commands(home: Path, photo: str) -> list[dict[str, str]]:
    """What to type next; each works as it stands, in the folder where the demo was started."""
    raycnn, at = _typed(), shlex.quote(str(home))
    ask = f"curl --data-binary @{at}/photos/{photo} http://127.0.0.1:8000/v1/classify"
    return [
        {
            "to": "label a folder of images: put your own in place of the demo's",
            "type": f"{raycnn} label {at}/photos {at}/my-labels --bundle {at}/run/bundle",
        },
        {
            "to": f"serve the network; ask it from another terminal: {ask}",
            "type": f"{raycnn} serve --bundle {at}/run/bundle",
        },
        {
            "to": "train another network on the same images",
            "type": f"{raycnn} train {at}/packed {at}/my-run --model resnet18 --epochs 2",
        },
    ]


def _typed() -> str:
    """How this program was called: it need not be on the path."""
    typed, found = sys.argv[0], shutil.which("raycnn")
    if Path(typed).name != "raycnn" or (found and os.path.exists(typed) and os.path.samefile(found, typed)):
        return "raycnn"
    return shlex.quote(typed)


@contextmanager
def _store(config: DemoConfig, source: Source) -> Iterator[str]:
    """The URL of the demo's place: in the folder given, or on an S3 server that lives as long as the context.

    Ray's workers learn the server's address from the environment that they inherit, so Ray is started here too.
    """
    (_, home), (_, place) = places(config, source)
    if config.store is not None:
        if contains(place, home) or contains(home, place):
            raise ConfigError(
                f"demo: the store {place} and the results {home} lie inside each other: give another --dir"
            )
        with data.session():
            yield place
        return
    if data.is_connected():
        raise ConfigError(
            "demo: Ray already runs in this process and would not find the demo's S3 server: "
            "call ray.shutdown() first, or give a folder as the store"
        )
    server = S3Server(Path(place).resolve())
    # Ray ends before the server that its workers use.
    with server, _environment(server), data.session():
        server.create_bucket(BUCKET)
        yield f"s3://{BUCKET}/{source.name}"


@contextmanager
def _environment(server: S3Server) -> Iterator[None]:
    """The server's variables and no other AWS_* ones, and a Ray of our own that inherits them, for a while."""
    variables = server.environment() | {"RAY_ADDRESS": "local"}
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)
        os.environ.update({k: v for k, v in before.items() if k.startswith("AWS_") or k in variables})
