"""What goes into a labeling run and what its output holds, by code that shares nothing with raycnn's own.

obstore lists and reads past the proxy, tarfile and pyarrow open what is there.
"""

import io
import tarfile
from collections import Counter
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import obstore
import pyarrow.parquet as pq
from PIL import Image

from raycnn.s3local import S3Server

BUCKET = "raycnn"
CLASSES = ("cat", "dog", "eel")


def images(count: int) -> dict[str, bytes]:
    """Tiny images by key, PNG and JPEG; of each 50 one is empty, one is cut and one is text."""
    rng, made = np.random.default_rng(0), dict[str, bytes]()
    for i in range(count):
        form, sink = ("PNG", "JPEG")[i % 2], io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)).save(sink, form)
        whole = sink.getvalue()
        made[f"{i:05d}.{form.lower()}"] = {0: b"", 1: whole[: len(whole) // 2], 2: b"<html>"}.get(i % 50, whole)
    return made


def in_tar(files: dict[str, bytes]) -> bytes:
    """The images as one tar."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return sink.getvalue()


def make_bundle(folder: str) -> str:
    """A classic CNN of random weights."""
    from raycnn import bundle as bundles
    from raycnn.config import ImageSpec
    from raycnn.models import build

    spec = ImageSpec(height=8, width=8, channels=1, crop=1.0, mean=(0.5,), std=(0.25,))
    samples = [content for content in images(6).values() if len(content) > 60][:3]
    classifier = build("classic", len(CLASSES), spec, seed=0).eval()
    bundles.save(
        folder, classifier, CLASSES, temperature=1.5, metrics={}, validation={}, samples=samples, data_fingerprint=None
    )
    return folder


class Bucket:
    """The server's objects, past the proxy."""

    def __init__(self, server: S3Server) -> None:
        self.server = server

    @property
    def _store(self) -> obstore.store.S3Store:
        return obstore.store.S3Store(
            BUCKET,
            endpoint=self.server.endpoint,
            access_key_id=self.server.access_key,
            secret_access_key=self.server.secret_key,
            region="us-east-1",
            client_options={"allow_http": True},
            virtual_hosted_style_request=False,
        )

    def put(self, files: dict[str, bytes]) -> None:
        store = self._store
        for key, content in files.items():
            obstore.put(store, key, content)

    def get(self, key: str) -> bytes:
        return bytes(obstore.get(self._store, key).bytes())

    def etags(self, prefix: str) -> dict[str, str]:
        """The ETag, which is the content's digest, of each object below the prefix."""
        return {o["path"]: o["e_tag"] or "" for page in obstore.list(self._store, prefix + "/") for o in page}


@dataclass
class Tally:
    """Rows of an output against the images that there are; `altered` counts objects that were there and are not."""

    expected: int = 0
    present: int = 0
    lost: int = 0
    duplicate: int = 0
    foreign: int = 0
    altered: int = 0

    def __iadd__(self, other: "Tally") -> "Tally":
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in vars(self).items())

    @property
    def is_right(self) -> bool:
        return self.present == self.expected and not (self.lost or self.duplicate or self.foreign or self.altered)


class Source(NamedTuple):
    """A collection in the bucket."""

    prefix: str
    layout: Literal["flat", "tar", "packed"]

    def keys(self, bucket: Bucket) -> Counter[str]:
        """What has to have one row each."""
        if self.layout == "flat":
            return Counter(path.removeprefix(self.prefix + "/") for path in bucket.etags(self.prefix))
        found = Counter[str]()
        for path in bucket.etags(self.prefix):
            name = path.removeprefix(self.prefix + "/")
            if name.endswith(".tar"):
                with tarfile.open(fileobj=io.BytesIO(bucket.get(path))) as tar:
                    found.update(f"{name}#{i}:{member.name}" for i, member in enumerate(tar))
            elif name.startswith("data/"):
                found.update(pq.read_table(io.BytesIO(bucket.get(path)), columns=["key"])["key"].to_pylist())
        return found
