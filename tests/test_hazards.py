"""The hazard matrix: whatever a file is, it has the one status that is expected of it."""

import gzip
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hazards import hazards, sparse_tar, tar_of_hazards

from raycnn.config import ImageSpec
from raycnn.errors import Bad, Status
from raycnn.images import decode, pixels, read_header
from raycnn.shards import open_collection

HAZARDS = hazards()
SPEC = ImageSpec(height=16, width=20)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # it warns before it fails
@pytest.mark.parametrize("name", HAZARDS)
def test_a_hazard_has_the_status_that_is_expected_of_it(name):
    hazard, start = HAZARDS[name], time.process_time()
    image = decode(hazard.encoded, 3)
    assert time.process_time() - start < 1
    if hazard.status != Status.OK:
        assert isinstance(image, Bad)
        assert image.status == hazard.status
        assert image.detail
        assert "\n" not in image.detail
        assert pixels(hazard.encoded, SPEC) == image
        return
    assert read_header(hazard.encoded)[1:3] == image.shape[:2] == hazard.size
    height, width = hazard.size
    seen = image[height * 5 // 8, width * 5 // 8], image[0, 0]
    assert np.abs(np.subtract(seen, (hazard.centre, hazard.corner))).max() <= hazard.tolerance
    assert pixels(hazard.encoded, SPEC).shape == (16, 20, 3)


@pytest.mark.slow
def test_damaged_files_become_pixels_or_a_bad_and_nothing_else(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "jobs"))
    from benchmarks import fuzz

    tally = fuzz.Tally()
    with warnings.catch_warnings(action="ignore"):
        fuzz.attack(range(1500), tally)
    met = {name: count for name, count in zip(fuzz.COUNTED, tally.counts, strict=True) if count}
    assert sum(met.values()) == 1500
    assert set(met) == {"ok", "truncated", "undecodable", "unsupported", "too_large"}


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
def test_hostile_members_of_a_tar_are_images_under_their_names_or_are_counted(tmp_path, name):
    hazard = tar_of_hazards()
    (tmp_path / name).write_bytes(gzip.compress(hazard.tar) if name.endswith("gz") else hazard.tar)
    collection = open_collection(str(tmp_path))
    skipped: Counter[str] = Counter()
    found = list(collection.read(list(collection.slices(skipped))))
    expected = [(f"{name}#{i}:{member}", encoded) for i, (member, encoded) in enumerate(hazard.images)]
    assert [(sample.key, sample.encoded) for sample in found] == expected
    assert skipped == hazard.skipped
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_sparse_file_in_a_tar_is_left_out_and_counted(tmp_path):
    (tmp_path / "a.tar").write_bytes(sparse_tar() + bytes(1024))
    skipped = Counter()
    assert list(open_collection(str(tmp_path), ()).slices(skipped)) == []
    assert skipped == {"sparse files in tars": 1}
