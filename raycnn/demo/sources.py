"""The images that the demo starts from: a data set that a package ships, or a folder of the user's own."""

import gzip
import importlib.util
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from raycnn.config import DemoConfig
from raycnn.errors import ConfigError
from raycnn.storage import contains, open_store

SERVER = "s3"
"""Where in the demo's folder the S3 server keeps its data."""
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


class Source(NamedTuple):
    """The images that the demo starts from, and how it treats them."""

    name: str
    url: str | None
    """Where they lie already; None if `files` are to be put into the store."""
    files: Callable[[], Iterator[tuple[str, bytes]]]
    size: int
    """How many files there are."""
    pack: dict[str, Any]
    train: dict[str, Any]


def find_source(config: DemoConfig) -> Source:
    """The images that `data` names.

    Raises:
        ConfigError: they are not installed, there is no such folder, or the demo would write to it.
    """
    if config.data == "digits":
        file = digits_file()
        settings = {"epochs": 12, "batch_size": 32, "learning_rate": 4e-3}
        return Source("digits", None, lambda: digits(file), 1797, pack={"test": 0.2}, train=settings)
    if config.data == "fashion-mnist":
        return _fashion_mnist()
    return _folder(config)


def _folder(config: DemoConfig) -> Source:
    if config.data.startswith("s3://") and config.store is None:
        raise ConfigError(f"demo: {config.data} lies on another S3 than the demo's own; add --store FOLDER")
    if "://" not in config.data and not Path(config.data).expanduser().is_dir():
        raise ConfigError(f"demo: no such data {config.data!r}: choose digits, fashion-mnist, or a folder of images")
    images = open_store(config.data)
    name = images.address().rpartition("/")[2]
    name = "images" if name in ("", SERVER) else name
    source = Source(name, images.url, lambda: iter(()), 0, pack={}, train={})
    for what, place in places(config, source):
        if contains(images.url, place) or contains(place, images.url):
            raise ConfigError(
                f"demo: {place} and the images {images.address()} lie inside each other: "
                f"give another folder with --{what}"
            )
    return source


def places(config: DemoConfig, source: Source) -> list[tuple[str, str]]:
    """Where the demo writes, each with the name of the setting that decides it: its results, and its store."""
    home = ("dir", str(Path(config.dir) / source.name))
    if config.store is not None:
        return [home, ("store", open_store(config.store).child(source.name).url)]
    return [home, ("dir", str(Path(config.dir) / SERVER))]


def digits_file() -> Path:
    """Where scikit-learn keeps them.

    Raises:
        ConfigError: it is not installed.
    """
    found = importlib.util.find_spec("sklearn")
    for folder in (found.submodule_search_locations if found else None) or ():
        if (file := Path(folder) / "datasets" / "data" / "digits.csv.gz").exists():
            return file
    raise ConfigError("demo: the digits come with scikit-learn: pip install 'raycnn[demo]'")


def digits(file: Path) -> Iterator[tuple[str, bytes]]:
    """1,797 handwritten digits of 8 x 8 px as PNG in class folders (UCI's optical recognition set, its test half)."""
    with gzip.open(file, "rt") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
    # 64 values from 0 to 16, and the digit.
    pixels = np.round(table[:, :64] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    for number, (image, digit) in enumerate(zip(pixels, table[:, 64], strict=True)):
        png = io.BytesIO()
        Image.fromarray(image).save(png, "PNG")
        yield f"{digit}/{number:04d}.png", png.getvalue()


def _fashion_mnist() -> Source:
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

    settings = {"epochs": 4, "batch_size": 128, "crop_scale": 1.0}
    return Source("fashion-mnist", None, read, len(files) + 1, pack={}, train=settings)
