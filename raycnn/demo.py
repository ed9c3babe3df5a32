"""`raycnn demo`: the whole chain on real images, with no network and no account.

Everything runs against an S3 server of its own (or a folder given as the store), below `s3://raycnn-demo/NAME/`:

    raw/      the images as somebody may have them       packed/   shards and manifest
    run/      checkpoints, metrics, bundle, report       photos/   the held-out images, without labels
    labels/   one row for each photo

What is worth keeping is copied to DIR/NAME, where the commands that the demo ends with find it. The server's data
stay in DIR/s3, so that the same command again resumes, or finds everything done.
"""

import gzip
import importlib.util
import io
import os
import shlex
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from raycnn import bundle as bundles
from raycnn import explaining, images
from raycnn.config import DemoConfig, EvaluateConfig, LabelConfig, PackConfig, TrainConfig, VerifyConfig, make
from raycnn.errors import Bad, ConfigError, DataError, Status
from raycnn.evaluating import EvaluateReport, evaluate
from raycnn.labeling import LabelReport, label
from raycnn.ledger import VerifyReport, verify
from raycnn.packing import pack
from raycnn.reporting import Picture, write_report
from raycnn.s3local import S3Server
from raycnn.shards import PackedCollection, open_collection
from raycnn.storage import Store, open_store
from raycnn.training import train

BUCKET = "raycnn-demo"
TRANSFERS = 16
"""Small objects that are written or copied at a time."""
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package puts it."""
FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class DemoReport:
    """What the demo made, and where."""

    accuracy_top1: float
    rows: int
    """Held-out images that were labelled."""
    correct: int
    """Labels that agree with the truth."""
    evaluated_correct: int
    """What evaluation counted on the same images; the two are equal."""
    lost: int
    duplicate: int
    seconds: float
    report: str
    bundle: str
    labels: str
    photos: str
    packed: str
    pictures: list[str]
    next: list[dict[str, str]]


class _Source(NamedTuple):
    """The images that the demo starts from, and how it treats them."""

    name: str
    url: str | None
    """Where they lie already; None if `files` are to be put into the store."""
    files: Callable[[], Iterator[tuple[str, bytes]]]
    size: int
    """How many files there are."""
    pack: dict[str, Any]
    train: dict[str, Any]


def demo(config: DemoConfig, progress: Progress | None = None) -> DemoReport:
    """Pack, train, evaluate, label, compare, explain.

    Raises:
        ConfigError: the images are not installed, or Ray already runs in this process without the S3 server.
        DataError: a folder given does not hold labelled images.
        StorageError: the S3 server does not start.
    """
    start = time.perf_counter()
    source = _source(config)
    home = Path(config.dir) / source.name
    home.mkdir(parents=True, exist_ok=True)
    with _store(config, source) as url:
        made = _Demo(source, open_store(url), home, progress or (lambda event: None)).run()
    evaluated, labelled, found = made
    return DemoReport(
        accuracy_top1=evaluated.accuracy_top1,
        rows=labelled.rows,
        correct=found.correct,
        evaluated_correct=sum(row[i] for i, row in enumerate(evaluated.confusion)),
        lost=found.verified.lost,
        duplicate=found.verified.duplicate,
        seconds=time.perf_counter() - start,
        report=str(home / "run" / "report.html"),
        bundle=str(home / "run" / "bundle"),
        labels=str(home / "labels"),
        photos=str(home / "photos"),
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

    def __init__(self, source: _Source, store: Store, home: Path, say: Progress) -> None:
        self._source, self._store, self._home, self._say = source, store, home, say

    def run(self) -> tuple[EvaluateReport, LabelReport, _Found]:
        raw = self._stage()
        self._note(f"1/6 pack {raw}")
        packed, run = self._url("packed"), self._url("run")
        pack(make(PackConfig, {"src": raw, "dst": packed} | self._source.pack), self._say)
        collection = open_collection(packed)
        assert isinstance(collection, PackedCollection)
        self._note(f"2/6 train classic on {collection.rows('train'):,} images of {len(collection.class_names)} classes")
        trained = train(make(TrainConfig, {"data": packed, "run": run} | self._source.train), self._say)
        split = "test" if "test" in collection.splits else "val"
        self._note(f"3/6 evaluate on {collection.rows(split):,} images that training has not seen")
        evaluated = evaluate(
            make(EvaluateConfig, {"bundle": trained.bundle, "data": packed, "split": split}), self._say
        )
        self._note("4/6 label the same images without their labels, each exactly once")
        truth = self._photos(collection, split)
        labels = self._url("labels")
        labelled = label(
            make(LabelConfig, {"data": self._url("photos"), "out": labels, "bundle": trained.bundle}), self._say
        )
        verified = verify(make(VerifyConfig, {"out": labels}))
        correct = _agreeing(open_store(labels), truth)
        self._note(
            f"    {labelled.rows:,} rows, {verified.lost} lost, {verified.duplicate} doubled; "
            f"{correct:,} of {sum(1 for c in truth.values() if c):,} labels agree with the truth"
        )
        self._note("5/6 draw what the network has learned, and write the report")
        pictures, photo = self._pictures(bundles.load(trained.bundle), truth)
        write_report(run, [Picture(title, png) for _, title, png in pictures], evaluated)
        self._note(f"6/6 copy the results to {self._home}")
        self._keep(truth)
        for name, _, png in pictures:
            (self._home / name).write_bytes(png)
        return evaluated, labelled, _Found(correct, verified, [name for name, _, _ in pictures], photo)

    def _url(self, name: str) -> str:
        return self._store.child(name).url

    def _note(self, text: str) -> None:
        self._say({"kind": "note", "text": text})

    def _stage(self) -> str:
        """Put the images into the store as they are, unless they lie somewhere already; return where."""
        if self._source.url is not None:
            return self._source.url
        raw = self._store.child("raw")
        self._note(f"0/6 put {self._source.size:,} files into {raw.url}")
        self._put(raw, self._source.files(), self._source.size)
        return raw.url

    def _put(self, store: Store, files: Iterable[tuple[str, bytes]], count: int) -> None:
        """Write many objects; those that an earlier run has written stay untouched."""
        there = {e.path: e.size for e in store.list()}
        missing = ((path, data) for path, data in files if there.get(path) != len(data))
        for done, _ in enumerate(_parallel(lambda file: store.put(*file), missing), 1):
            self._say({"kind": "progress", "done": done, "total": count, "unit": "files", "text": "uploading"})

    def _photos(self, collection: PackedCollection, split: str) -> dict[str, str | None]:
        """Write the images of a split side by side under names that tell nothing; return each one's class.

        They go into the demo's folder at the same time, for the commands that the demo ends with.
        """
        truth: dict[str, str | None] = {}
        folder = self._home / "photos"
        folder.mkdir(exist_ok=True)

        def files() -> Iterator[tuple[str, bytes]]:
            for number, sample in enumerate(collection.read(list(collection.select(split, Counter())))):
                encoded = sample.encoded or b""
                header = images.read_header(encoded)
                name = f"{number:06d}.{'bin' if isinstance(header, Bad) else header.format.lower()}"
                truth[name] = None if sample.label is None else collection.class_names[sample.label]
                _write(folder / name, encoded)
                yield name, encoded

        self._put(self._store.child("photos"), files(), collection.rows(split))
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
                    ("filters.png", "What the first layer has learned", filters),
                    ("feature-maps.png", f"One held-out image, {photo}, layer by layer", maps),
                ], photo
        raise DataError(f"{photos.url}: none of the held-out images can be read")

    def _keep(self, truth: dict[str, str | None]) -> None:
        """Copy what the store holds, but for the images, to the demo's folder."""
        shutil.rmtree(self._home / "labels", ignore_errors=True)
        wanted = [e.path for e in self._store.list() if not e.path.startswith(("raw/", "photos/"))]
        deque(_parallel(lambda path: _write(self._home / path, self._store.get(path)), wanted), maxlen=0)
        lines = "".join(f"{photo},{'' if name is None else name}\n" for photo, name in truth.items())
        (self._home / "truth.csv").write_text("photo,class\n" + lines, encoding="utf-8")


def _write(file: Path, data: bytes) -> None:
    """Write a file, unless it holds these bytes: an equal one keeps its time, which is part of its version."""
    if not (file.exists() and file.read_bytes() == data):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)


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
    """What to type next; each works as it stands."""
    at, bundle = shlex.quote(str(home)), shlex.quote(str(home / "run" / "bundle"))
    label = f"raycnn label {at}/photos {at}/my-labels --bundle {bundle}"
    ask = f"curl --data-binary @{at}/photos/{photo} http://127.0.0.1:8000/v1/classify"
    other = f"raycnn train {at}/packed {at}/my-run --model resnet18 --epochs 2"
    return [
        {"to": "label a folder of images (put your own in place of the demo's)", "type": label},
        {"to": f"serve the network, and ask it with {ask}", "type": f"raycnn serve --bundle {bundle}"},
        {"to": "train another network on the same images", "type": other},
    ]


# -- where it runs ------------------------------------------------------------------------------------------


@contextmanager
def _store(config: DemoConfig, source: _Source) -> Iterator[str]:
    """The URL of the demo's place: in the folder given, or on an S3 server that lives as long as the context.

    Ray's workers learn the server's address from the environment that they inherit, so Ray is started here too.
    """
    import ray

    if config.store is not None:
        with _ray():
            yield open_store(f"{config.store.rstrip('/')}/{source.name}").url
        return
    if ray.is_initialized():
        raise ConfigError(
            "demo: Ray already runs in this process and would not find the demo's S3 server: "
            "call ray.shutdown() first, or give a folder as the store"
        )
    server = S3Server(Path(config.dir).resolve() / "s3")
    with server, _environment(server), _ray():
        server.create_bucket(BUCKET)
        yield f"s3://{BUCKET}/{source.name}"


@contextmanager
def _ray() -> Iterator[None]:
    """Stop Ray at the end, if it did not run before: before the server that its workers use."""
    import ray

    was_running = ray.is_initialized()
    try:
        yield
    finally:
        if not was_running:
            ray.shutdown()


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


# -- the images ---------------------------------------------------------------------------------------------


def _source(config: DemoConfig) -> _Source:
    """The images that `data` names.

    Raises:
        ConfigError: they are not installed, or there is no such folder.
    """
    if config.data == "digits":
        file = _digits_file()
        return _Source(
            "digits",
            None,
            lambda: _digits(file),
            1797,
            pack={"test": 0.2},
            train={"epochs": 12, "batch_size": 32, "learning_rate": 4e-3},
        )
    if config.data == "fashion-mnist":
        return _fashion_mnist()
    if config.data.startswith("s3://") and config.store is None:
        raise ConfigError(f"demo: {config.data} lies on another S3 than the demo's own; add --store FOLDER")
    if "://" not in config.data and not Path(config.data).expanduser().is_dir():
        raise ConfigError(f"demo: no such data {config.data!r}: choose digits, fashion-mnist, or a folder of images")
    name = Path(config.data.rstrip("/")).name or "images"
    return _Source(name, open_store(config.data).url, lambda: iter(()), 0, pack={}, train={})


def _digits_file() -> Path:
    found = importlib.util.find_spec("sklearn")
    for folder in (found.submodule_search_locations if found else None) or ():
        if (file := Path(folder) / "datasets" / "data" / "digits.csv.gz").exists():
            return file
    raise ConfigError("demo: the digits come with scikit-learn: pip install 'raycnn[demo]'")


def _digits(file: Path) -> Iterator[tuple[str, bytes]]:
    """1,797 handwritten digits of 8 x 8 px as PNG in class folders (UCI's optical recognition set, its test half)."""
    with gzip.open(file, "rt") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
    # 64 values from 0 to 16, and the digit.
    pixels = np.round(table[:, :64] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    for number, (image, digit) in enumerate(zip(pixels, table[:, 64], strict=True)):
        png = io.BytesIO()
        Image.fromarray(image).save(png, "PNG")
        yield f"{digit}/{number:04d}.png", png.getvalue()


def _fashion_mnist() -> _Source:
    """70,000 articles of clothing of 28 x 28 px (Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747) as IDX files."""
    files = sorted(FASHION_MNIST.glob("*-ubyte*"))
    if len(files) < 4:
        raise ConfigError(
            "demo: Fashion-MNIST is not installed: apt-get install dataset-fashion-mnist "
            "(or give a folder with its four IDX files as --data)"
        )

    def read() -> Iterator[tuple[str, bytes]]:
        yield "classes.txt", "".join(f"{name}\n" for name in FASHION_CLASSES).encode()
        for file in files:
            yield file.name, file.read_bytes()

    return _Source(
        "fashion-mnist", None, read, len(files) + 1, pack={}, train={"epochs": 4, "batch_size": 128, "crop_scale": 1.0}
    )
