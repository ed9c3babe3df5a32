"""Samples that are read ahead and decoded: what comes, in which order, and what is left when that ends early."""

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from test_labeling import make_bundle

from raycnn import bundle as bundles
from raycnn.config import ImageSpec, LabelConfig, make
from raycnn.data import Decoder, decoding, read_ahead
from raycnn.errors import BundleError, StorageError
from raycnn.labeling.facts import facts_of, fingerprint_of
from raycnn.labeling.rows import label_rows
from raycnn.labeling.staged import UnitDecoder
from raycnn.ledger import label_ledger
from raycnn.predictor import Predictions
from raycnn.shards import Sample, open_collection, units
from raycnn.storage import open_store

SPEC = ImageSpec(height=8, width=8)


def readers() -> int:
    return sum(thread.name == "read ahead" for thread in threading.enumerate())


def numbers_and_then(error: Exception | None = None) -> Iterator[int]:
    yield from range(50)
    if error:
        raise error


def test_what_is_read_ahead_comes_in_order_and_its_error_last():
    assert list(read_ahead(numbers_and_then())) == list(range(50))
    found = []
    with pytest.raises(StorageError, match="gone"):
        found.extend(read_ahead(numbers_and_then(StorageError("gone"))))
    assert readers() == 0


def test_a_reader_ends_with_the_one_who_takes():
    ahead = read_ahead(numbers_and_then())
    assert next(ahead) == 0
    assert readers() == 1
    ahead.close()
    assert readers() == 0


@pytest.mark.slow
def test_decoding_that_fails_leaves_no_deadline_behind(monkeypatch):
    monkeypatch.setattr(decoding, "DECODE_TIMEOUT_S", 0.3)

    class Interrupted(list):
        def __iter__(self) -> Iterator[Sample]:
            yield Sample("a", b"", None)
            raise KeyboardInterrupt

    if not (child := os.fork()):  # which a deadline would end
        try:
            with Decoder(SPEC, is_again=False) as decoder:
                decoder.decode(Interrupted())
        except KeyboardInterrupt:
            time.sleep(0.8)
            os._exit(0)
        os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.slow
def test_a_decode_task_that_is_done_again_gives_the_blocks_that_ray_has_got_of_it_already(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(300):
        (photos / f"{i:03d}.png").touch()
    config = make(
        LabelConfig, {"data": str(photos), "out": str(tmp_path / "out"), "bundle": make_bundle(str(tmp_path))}
    )
    fingerprint = fingerprint_of(facts_of(bundles.load(config.bundle)), config, "float32")
    ledger = label_ledger(open_store(config.out), fingerprint)
    cut = units(open_collection(config.data, ()).select("all", Counter()))
    plan = ledger.plan(0, cut, {}, fingerprint, Counter())
    for photo in photos.iterdir():
        photo.write_bytes(b"another")  # its row has no pixels, for which no child process has to start
    decoder = UnitDecoder(config.model_dump(mode="json"), ledger.parts, fingerprint, "cpu")
    items = [ref._asdict() for ref in plan.refs]
    first = [(block["unit"].tolist(), block["ordinal"].tolist()) for block in decoder(items, is_again=False)]
    assert [sum(len(rows) for unit, rows in first if unit[0] == ref.unit) for ref in plan.refs] == [256, 44]
    ledger.commit(plan.refs[0], b"", 256)
    again = [(block["unit"].tolist(), block["ordinal"].tolist()) for block in decoder(items, is_again=True)]
    assert again == first
    other = [block["unit"].tolist() for block in decoder(items, is_again=False)]
    assert other == [[1] * 44]


@pytest.mark.slow
def test_an_overflow_of_the_model_is_no_label():
    one = Predictions(np.array([[0], [1]]), np.array([[0.5], [np.nan]], np.float32))
    with pytest.raises(BundleError, match=r"b\.jpg: the model's numbers overflow"):
        label_rows(["a.jpg", "b.jpg"], [None, None], one, ["cat", "dog"])
