"""Every layout of images, found by looking, read whole and in order."""

import gzip
import io
import json
import struct
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raycnn.errors import DataError, Status
from raycnn.shards import hash_split, open_collection, units
from raycnn.shards.collection import UNIT_ROWS, Slice


def png(value: int, size: int = 8) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.full((size, size), value, np.uint8)).save(sink, "PNG")
    return sink.getvalue()


def write(root: Path, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return str(root)


def samples(url: str, split: str = "all"):
    collection = open_collection(url)
    return collection, list(collection.read(list(collection.select(split, Counter()))))


def test_class_folders_give_sorted_class_names_and_keys_below_the_root(tmp_path):
    url = write(tmp_path, {"dog/1.png": png(1), "cat/deep/2.png": png(2), "cat/.hidden.png": b"x"})
    collection, found = samples(url)
    assert collection.layout == "class folders"
    assert collection.class_names == ("cat", "dog")
    assert [(s.key, s.label) for s in found] == [("cat/deep/2.png", 0), ("dog/1.png", 1)]
    assert found[1].encoded == png(1)


def test_a_readme_beside_class_folders_changes_nothing_but_an_image_does(tmp_path):
    url = write(tmp_path, {"dog/1.png": png(1), "cat/2.png": png(2), "README.md": b"about"})
    collection, found = samples(url)
    assert collection.class_names == ("cat", "dog")
    assert [(s.key, s.label) for s in found] == [("README.md", None), ("cat/2.png", 0), ("dog/1.png", 1)]
    write(tmp_path, {"3.png": png(3)})
    assert open_collection(url).class_names == ()


def test_split_folders_beside_another_folder_are_refused_rather_than_taken_for_classes(tmp_path):
    url = write(tmp_path, {"train/cat/1.png": png(1), "val/cat/2.png": png(2), "annotations/x.xml": b"<x/>"})
    with pytest.raises(DataError, match="annotations beside them is none"):
        open_collection(url)


@pytest.mark.parametrize("word", ["val", "valid", "validation", "dev"])
def test_split_folders_map_their_classes_by_name(tmp_path, word):
    files = {"train/cat/1.png": png(1), "train/dog/2.png": png(2), f"{word}/dog/3.png": png(3)}
    collection, found = samples(write(tmp_path, files), "val")
    assert collection.splits == ("train", "val")
    assert [(s.key, s.label) for s in found] == [(f"{word}/dog/3.png", 1)]


def test_a_flat_prefix_counts_every_object_whatever_its_name(tmp_path):
    url = write(tmp_path, {"a": png(1), "b.txt": b"hello", "_skip.png": png(1), "c.jpg": b""})
    collection = open_collection(url)
    skipped: Counter[str] = Counter()
    assert [s.key for s in collection.slices(skipped)] == ["a", "b.txt", "c.jpg"]
    assert skipped == {"hidden": 1}
    assert [s.key for s in collection.slices(skipped, ["*.txt"])] == ["a", "c.jpg"]
    assert skipped["excluded"] == 1


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_a_list_names_images_labels_and_splits(tmp_path, kind):
    rows = [("b.png", "dog", "train"), ("a.png", "cat", "valid"), ("gone.png", "cat", "train")]
    url = write(tmp_path, {"b.png": png(1), "a.png": png(2), "unlisted.png": png(3)})
    table = pa.table({"path": [r[0] for r in rows], "label": [r[1] for r in rows], "split": [r[2] for r in rows]})
    if kind == "parquet":
        pq.write_table(table, tmp_path / "metadata.parquet")
    elif kind == "jsonl":
        lines = [json.dumps({"path": p, "label": label, "split": s}) for p, label, s in rows]
        (tmp_path / "list.jsonl").write_text("\n".join(lines))
    else:
        mark = {"csv": ",", "tsv": "\t"}[kind]
        lines = [mark.join(("path", "label", "split"))] + [mark.join(r) for r in rows]
        (tmp_path / f"list.{kind}").write_text("\n".join(lines))
    collection, found = samples(url)
    assert collection.class_names == ("cat", "dog")
    assert [(s.key, s.label) for s in found] == [("a.png", 0), ("b.png", 1), ("gone.png", 0)]
    assert found[2].bad is not None
    assert found[2].bad.status is Status.MISSING
    assert collection.splits == ("train", "val")


def test_class_names_in_a_list_stay_as_they_are_spelled(tmp_path):
    url = write(tmp_path, {"1": png(1), "2": png(2), "list.csv": b"path,label\n1,007\n2,NA\n"})
    collection, found = samples(url)
    assert collection.class_names == ("007", "NA")
    assert [(s.key, s.label) for s in found] == [("1", 0), ("2", 1)]


def test_a_parquet_list_of_paths_is_a_list_whatever_its_name(tmp_path):
    url = write(tmp_path, {"x/a.png": png(1), "x/b.png": png(2)})
    pq.write_table(pa.table({"image_path": ["x/b.png", "x/a.png"], "target": [3, 5]}), tmp_path / "train.parquet")
    collection, found = samples(url)
    assert (collection.layout, collection.splits) == ("list of paths", ("train",))
    assert [(s.key, collection.class_names[s.label]) for s in found] == [("x/a.png", "5"), ("x/b.png", "3")]


def test_a_path_that_a_list_names_twice_is_refused(tmp_path):
    url = write(tmp_path, {"a.png": png(1), "list.csv": b"path,label\na.png,x\na.png,y\n"})
    with pytest.raises(DataError, match=r"'a\.png' is named twice"):
        open_collection(url)


def test_hugging_face_parquet_is_read_with_its_class_names(tmp_path):
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {"info": {"features": {"label": {"names": ["zebra", "ant"], "_type": "ClassLabel"}}}}
    schema = pa.schema([("image", image), ("label", pa.int64())], metadata={"huggingface": json.dumps(features)})
    rows = [{"image": {"bytes": png(i), "path": None}, "label": i % 2} for i in range(10)]
    (tmp_path / "data").mkdir()
    table = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(table, tmp_path / "data" / "train-00000-of-00001.parquet", row_group_size=4)
    collection, found = samples(str(tmp_path))
    assert collection.class_names == ("zebra", "ant")
    assert collection.splits == ("train",)
    assert [s.label for s in found] == [0, 1] * 5
    assert found[7].key == "data/train-00000-of-00001.parquet#7"
    assert found[7].encoded == png(7)


def test_parquet_labels_without_names_keep_their_meaning(tmp_path):
    table = pa.table({"image": [png(1), png(2), png(3)], "label": [7, 3, 7]})
    pq.write_table(table, tmp_path / "a.parquet")
    collection, found = samples(str(tmp_path))
    assert collection.class_names == ("3", "7")
    assert [s.label for s in found] == [1, 0, 1]


def tar_of(members: dict[str, bytes], mode: str = "w") -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode=mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return sink.getvalue()


@pytest.mark.parametrize("packed", ["tar", "tar.gz"])
def test_webdataset_tars_pair_images_with_their_labels(tmp_path, packed):
    members = {
        "a.png": png(1),
        "a.cls": b"1\n",
        "b.json": b'{"label": 0}',
        "b.png": png(2),
        "c.png": png(3),
    }
    mode = "w:gz" if packed == "tar.gz" else "w"
    url = write(tmp_path, {f"train-0.{packed}": tar_of(members, mode), "classes.txt": b"cat\ndog\n"})
    collection, found = samples(url)
    assert collection.class_names == ("cat", "dog")
    assert [(s.key, s.label, s.encoded) for s in found] == [
        (f"train-0.{packed}#0:a.png", 1, png(1)),
        (f"train-0.{packed}#1:b.png", 0, png(2)),
        (f"train-0.{packed}#2:c.png", None, png(3)),
    ]


def test_tar_labels_without_a_list_of_classes_are_found(tmp_path):
    url = write(tmp_path, {"x.tar": tar_of({"a.png": png(1), "a.cls": b"dog", "b.png": png(2), "b.cls": b"cat"})})
    collection, found = samples(url)
    assert collection.class_names == ("cat", "dog")
    assert [s.label for s in found] == [1, 0]


def test_two_members_of_one_name_are_two_samples(tmp_path):
    one, two = io.BytesIO(tar_of({"a.png": png(1)})), tar_of({"a.png": png(2)})
    joined = one.getvalue()[:1024] + two
    _, found = samples(write(tmp_path, {"x.tar": joined}))
    assert [s.key for s in found] == ["x.tar#0:a.png", "x.tar#1:a.png"]
    assert [s.encoded for s in found] == [png(1), png(2)]


def test_a_tar_that_ends_early_is_named(tmp_path):
    whole = tar_of({"a.png": png(1) * 50, "b.png": png(2) * 50})
    with pytest.raises(DataError, match=r"x\.tar: damaged"):
        samples(write(tmp_path, {"x.tar": whole[: len(whole) // 8]}))


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_give_png_images_and_labels(tmp_path, zipped):
    images = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4)
    files = {
        "t10k-images-idx3-ubyte": b"\0\0\x08\x03" + struct.pack(">3I", 3, 4, 4) + images.tobytes(),
        "t10k-labels-idx1-ubyte": b"\0\0\x08\x01" + struct.pack(">I", 3) + bytes([2, 0, 1]),
    }
    if zipped:
        files = {f"{name}.gz": gzip.compress(content) for name, content in files.items()}
    collection, found = samples(write(tmp_path, files))
    assert collection.splits == ("test",)
    assert collection.class_names == ("0", "1", "2")
    assert [s.label for s in found] == [2, 0, 1]
    assert found[1].encoded is not None
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(found[1].encoded))), images[1])


def test_an_image_that_was_replaced_or_deleted_becomes_a_row(tmp_path):
    url = write(tmp_path, {"a.png": png(1), "b.png": png(2), "c.png": png(3)})
    collection = open_collection(url)
    planned = list(collection.slices(Counter()))
    (tmp_path / "a.png").write_bytes(png(9, size=9))
    (tmp_path / "b.png").unlink()
    bad = [s.bad and s.bad.status for s in collection.read(planned)]
    assert bad == [Status.CHANGED, Status.MISSING, None]


def test_a_shard_that_was_replaced_stops_the_verb(tmp_path):
    pq.write_table(pa.table({"image": [png(1)], "label": [0]}), tmp_path / "a.parquet")
    collection = open_collection(str(tmp_path))
    planned = list(collection.slices(Counter()))
    pq.write_table(pa.table({"image": [png(1), png(2)], "label": [0, 1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="was replaced since it was listed"):
        list(collection.read(planned))


def test_an_empty_prefix_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(DataError, match="no images there; check the path"):
        open_collection(str(tmp_path))


def test_a_split_that_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match="no split 'test'"):
        samples(write(tmp_path, {"a.png": png(1)}), "test")


def test_units_stay_within_their_rows_and_bytes():
    slices = [Slice(str(i), str(i), 1, "", 0, 1, 0, 1, -1) for i in range(5000)]
    sizes = [len(unit) for unit in units(slices)]
    assert sizes == [UNIT_ROWS, UNIT_ROWS, 5000 - 2 * UNIT_ROWS]


def test_adding_images_never_moves_the_ones_that_were_there():
    keys = [f"class/{i}.jpg" for i in range(2000)]
    splits = Counter(hash_split(k, 0.1, 0.2) for k in keys)
    assert 0.07 < splits["val"] / 2000 < 0.13
    assert 0.17 < splits["test"] / 2000 < 0.23
    assert [hash_split(k, 0.1, 0.2) for k in keys] == [hash_split(k, 0.1, 0.2) for k in reversed(keys)][::-1]
