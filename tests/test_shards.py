"""Every layout of images, found by looking, read whole and in order."""

import gzip
import io
import json
import shutil
import struct
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raycnn.config import MIB
from raycnn.errors import Bad, DataError, Status
from raycnn.shards import (
    FORMAT,
    MANIFEST,
    VERSION,
    PackedCollection,
    PackedRow,
    Slice,
    hash_split,
    open_collection,
    summarise,
    units,
    write_shard,
)
from raycnn.shards.collection import FIRST_ROWS, UNIT_ROWS, natural_order
from raycnn.shards.objects import _list_rows
from raycnn.storage import Entry
from raycnn.storage.local import LocalStore


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


@pytest.mark.slow
def test_units_stay_within_their_rows_and_bytes():
    slices = [Slice(str(i), str(i), 1, "", 0, 1, 0, 1, -1) for i in range(100_000)]
    sizes = [len(unit) for unit in units(slices)]
    assert sum(sizes) == 100_000
    assert sizes[0] == FIRST_ROWS
    assert max(sizes) == UNIT_ROWS
    large = [piece._replace(bytes=50 * MIB) for piece in slices[:100]]
    assert [len(unit) for unit in units(large)][:3] == [1, 1, 1]
    assert max(len(unit) for unit in units(large)) == 2


def test_of_a_small_collection_no_worker_has_much_more_than_its_share():
    slices = [Slice(str(i), str(i), 1, "", 0, 1, 0, 75_000, -1) for i in range(4096)]
    sizes = [len(unit) for unit in units(slices)]
    assert max(sizes) <= 4096 / 15
    assert len(sizes) <= 20


def test_adding_images_never_moves_the_ones_that_were_there():
    keys = [f"class/{i}.jpg" for i in range(2000)]
    splits = Counter(hash_split(k, 0.1, 0.2) for k in keys)
    assert 0.07 < splits["val"] / 2000 < 0.13
    assert 0.17 < splits["test"] / 2000 < 0.23
    assert [hash_split(k, 0.1, 0.2) for k in keys] == [hash_split(k, 0.1, 0.2) for k in reversed(keys)][::-1]


def tar_of_fifty() -> bytes:
    return tar_of({f"{i:02d}.png": png(i) for i in range(50)})


def changed_byte(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


HALF = 20 * 1024  # 20 members, each of a header and one block


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("x.tar", lambda tar: changed_byte(tar, HALF + 3)),
        ("x.tar", lambda tar: tar[:HALF]),
        ("x.tar", lambda tar: tar[: HALF + 100]),
        ("x.tar", lambda tar: b""),
        ("x.tar.gz", lambda tar: gzip.compress(tar[:HALF])),
        ("x.tar.gz", lambda tar: gzip.compress(tar)[:-1500]),
        ("x.tar.gz", lambda tar: gzip.compress(tar)[:-4]),
        ("x.tar.gz", lambda tar: changed_byte(gzip.compress(tar), 900)),
    ],
    ids=["header", "cut between members", "cut in a header", "empty", "cut before gzip", "cut gzip", "no end", "gzip"],
)
def test_a_damaged_tar_is_never_a_short_one(tmp_path, name, spoil):
    url = write(tmp_path, {name: spoil(tar_of_fifty()), "classes.txt": b"a\nb\n"})
    with pytest.raises(DataError, match=r"x\.tar(\.gz)?: damaged: .*restore it"):
        list(open_collection(url).slices(Counter()))


@pytest.mark.parametrize(
    ("name", "joined"),
    [
        ("x.tar.gz", lambda tar: gzip.compress(tar[:HALF]) + gzip.compress(tar[HALF:])),
        ("x.tar.gz", lambda tar: gzip.compress(tar_of({"first.png": png(9)})) + gzip.compress(tar)),
        ("x.tar", lambda tar: tar_of({"first.png": png(9)}) + tar),
    ],
    ids=["gzip members", "gzipped tars", "tars"],
)
def test_what_is_joined_with_cat_is_read_to_its_end(tmp_path, name, joined):
    _, found = samples(write(tmp_path, {name: joined(tar_of_fifty())}))
    assert [s.encoded for s in found][-50:] == [png(i) for i in range(50)]


def test_every_tar_member_is_an_image_or_is_counted(tmp_path):
    members = ["./a.jpg", "b.jfif", "c.d.JPE", "e.heic", "_DSC1.jpg", "f", "a.txt", "a.npy", "._a.jpg", ".x/b.jpg"]
    tar = io.BytesIO(tar_of({m: png(1) for m in members} | {"f.cls": b"dog"}))
    with tarfile.open(fileobj=tar, mode="a") as appended:
        link = tarfile.TarInfo("g.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "./a.jpg"
        appended.addfile(link)
    collection = open_collection(write(tmp_path, {"x.tar": tar.getvalue()}))
    skipped: Counter[str] = Counter()
    planned = list(collection.slices(skipped))
    assert [s.key.partition(":")[2] for s in planned] == members[:6]
    assert skipped == {"side files in tars": 2, "hidden": 2, "links in tars": 1}


@pytest.mark.parametrize("layout", ["objects", "tar", "tar.gz"])
def test_what_is_too_large_is_not_even_fetched(tmp_path, monkeypatch, layout):
    monkeypatch.setattr("raycnn.shards.collection._MAX_BYTES", 1000)
    files = {"a.png": png(1), "movie.mp4": b"x" * 5000, "z.png": png(2)}
    if layout != "objects":
        files = {f"x.{layout}": tar_of(files, "w:gz" if layout == "tar.gz" else "w")}
    collection = open_collection(write(tmp_path, files))
    planned = list(collection.slices(Counter()))
    monkeypatch.setattr(LocalStore, "get", lambda self, path, **k: (Path(self.url) / path).read_bytes()[:1000])
    found = list(collection.read(planned))
    assert [s.encoded for s in found] == [png(1), None, png(2)]
    assert found[1].bad == Bad(Status.TOO_LARGE, "5000 bytes, the limit is 1000")


def pack_of(root: Path, rows: list[PackedRow], shards: int = 1) -> str:
    """A packed data set of `shards` equal shards of the train split."""
    entries = []
    for i in range(shards):
        path = f"data/train-{i:05d}-of-{shards:05d}.parquet"
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        mine = [row._replace(key=f"{i}/{row.key}") for row in rows]
        groups = write_shard(root / path, mine, ["cat", "dog"])
        size = (root / path).stat().st_size
        counts = {"status": {"ok": len(rows)}, "classes": {}}
        entries.append(
            {"path": path, "split": "train", "rows": len(rows), "row_groups": groups, "bytes": size} | counts
        )
    about = {"format": FORMAT, "version": VERSION, "class_names": ["cat", "dog"], "shards": entries}
    (root / MANIFEST).write_text(json.dumps(about | {"splits": summarise(entries)}))
    return str(root)


OK_ROW = PackedRow("a", png(1), 0, 8, 8, Status.OK)


def test_what_could_not_be_packed_keeps_its_status(tmp_path):
    rows = [
        OK_ROW,
        PackedRow("b", None, 1, 0, 0, Status.TOO_LARGE),
        PackedRow("c", None, 1, 0, 0, Status.MISSING),
        PackedRow("d", None, 0, 0, 0, Status.CHANGED),
        PackedRow("e", b"<html>", 0, 0, 0, Status.UNSUPPORTED),
        PackedRow("f", b"", 0, 0, 0, Status.EMPTY),
    ]
    _, found = samples(pack_of(tmp_path, rows))
    assert [s.bad and s.bad.status for s in found] == [None, "too_large", "missing", "changed", None, None]
    assert [s.encoded for s in found] == [png(1), None, None, None, b"<html>", b""]


@pytest.mark.parametrize("spoil", [lambda f: f.unlink(), lambda f: f.write_bytes(f.read_bytes()[:-10])])
def test_a_lost_shard_is_refused_unless_its_rows_are_accepted_as_unreadable(tmp_path, spoil):
    collection = open_collection(pack_of(tmp_path, [OK_ROW] * 3, shards=2))
    spoil(tmp_path / "data" / "train-00001-of-00002.parquet")
    with pytest.raises(DataError, match=r"train-00001-of-00002\.parquet (is missing|has \d+ bytes)"):
        list(collection.slices(Counter()))
    assert isinstance(collection, PackedCollection)
    collection.accept_unreadable = True
    planned = list(collection.slices(Counter()))
    assert [(s.path[-22:-8], s.first, s.rows) for s in planned] == [("00000-of-00002", 0, 3), ("00001-of-00002", 0, 3)]
    assert len(list(collection.read(planned[:1]))) == 3
    with pytest.raises(DataError, match="missing, or not as its manifest says"):
        list(collection.read(planned[1:]))


@pytest.mark.parametrize("kind", ["killed at once", "killed", "cut", "without a version"])
def test_a_half_packed_set_is_not_taken_for_a_whole_one(tmp_path, kind):
    url = pack_of(tmp_path, [OK_ROW] * 3)
    manifest = tmp_path / MANIFEST
    if kind == "without a version":
        manifest.write_text(json.dumps({k: v for k, v in json.loads(manifest.read_text()).items() if k != "version"}))
    elif kind == "cut":
        manifest.write_text(manifest.read_text()[:100])
    else:
        manifest.unlink()
        write(tmp_path, {"_pack/plan/g0000.json": b"{}"})
        if kind == "killed at once":
            shutil.rmtree(tmp_path / "data")
    said = {"cut": "damaged", "without a version": "no 'version' in it"}.get(
        kind, "pack was not finished; run the same"
    )
    with pytest.raises(DataError, match=said):
        open_collection(url)


def shard_files(layout: str) -> dict[str, bytes]:
    table = io.BytesIO()
    pq.write_table(pa.table({"image": [png(1), png(2)]}), table)
    images = b"\0\0\x08\x03" + struct.pack(">3I", 2, 2, 2) + bytes(8)
    return {
        "parquet": dict.fromkeys(("train.parquet", "t10k.parquet"), table.getvalue()),
        "tar": dict.fromkeys(("train.tar", "t10k.tar"), tar_of({"1.png": png(1), "2.png": png(2)})),
        "idx": dict.fromkeys(("train-images-idx3-ubyte", "t10k-images-idx3-ubyte"), images),
    }[layout]


@pytest.mark.parametrize("layout", ["parquet", "tar", "idx"])
def test_excludes_leave_out_whole_shards_and_those_meant_for_keys_are_refused(tmp_path, layout):
    collection = open_collection(write(tmp_path, shard_files(layout)))
    skipped: Counter[str] = Counter()
    assert {s.path[:5] for s in collection.slices(skipped, ["t10k*", "deleted-since*"])} == {"train"}
    assert skipped["excluded"] == 1
    with pytest.raises(DataError, match=r"--exclude '\*#0\*' matches no object.*whole objects by their path"):
        list(collection.slices(Counter(), ["t10k*", "*#0*"]))


def test_excludes_leave_out_packed_shards_even_lost_ones(tmp_path):
    collection = open_collection(pack_of(tmp_path, [OK_ROW] * 3, shards=2))
    (tmp_path / "data" / "train-00001-of-00002.parquet").unlink()
    skipped: Counter[str] = Counter()
    assert sum(s.rows for s in collection.slices(skipped, ["*-00001-*"])) == 3
    assert skipped == {"excluded": 1}
    with pytest.raises(DataError, match="is missing"):
        list(collection.slices(Counter(), ["*-00000-*"]))
    with pytest.raises(DataError, match=r"--exclude 'cat/.*' matches no object; in this packed data set"):
        list(collection.slices(Counter(), ["*-00001-*", "cat/*"]))


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_excludes_leave_out_what_a_list_names(tmp_path, kind):
    paths = ["a.png", "b/1.png", "b/gone.png"]
    url = write(tmp_path, {"a.png": png(1), "b/1.png": png(2)})
    if kind == "parquet":
        pq.write_table(pa.table({"path": paths}), tmp_path / "list.parquet")
    else:
        lines = [json.dumps({"path": p}) for p in paths] if kind == "jsonl" else ["path", *paths]
        (tmp_path / f"list.{kind}").write_text("\n".join(lines))
    skipped: Counter[str] = Counter()
    assert [s.key for s in open_collection(url).slices(skipped, ["b/*"])] == ["a.png"]
    assert skipped == {"excluded": 2}


def keyed(files: dict[str, list], root: Path) -> str:
    for name, keys in files.items():
        pq.write_table(pa.table({"key": keys, "image": [png(i) for i in range(len(keys))]}), root / name)
    return str(root)


def test_parquet_keys_are_texts_and_a_row_without_one_is_named_by_its_place(tmp_path):
    _, found = samples(keyed({"a.parquet": [7, 5, None], "b.parquet": [8, None, None]}, tmp_path))
    assert [s.key for s in found] == ["7", "5", "a.parquet#2", "8", "b.parquet#1", "b.parquet#2"]


@pytest.mark.parametrize(
    "files",
    [
        {"a.parquet": ["x", "y"], "b.parquet": ["z", "x"]},
        {"a.parquet": ["y", "x", "x"]},
        {"a.parquet": [0, 1], "b.parquet": [2, 1]},
        {"a.parquet": [0, 1], "b.parquet": ["1"]},
    ],
    ids=["two files", "one file", "numbers", "number and text"],
)
def test_a_parquet_key_that_stands_twice_is_refused_by_name(tmp_path, files):
    collection = open_collection(keyed(files, tmp_path))
    with pytest.raises(DataError, match=r"the key '[x1]' stands in a\.parquet and again in [ab]\.parquet"):
        list(collection.slices(Counter()))
    if len(files) > 1:
        assert sum(s.rows for s in collection.slices(Counter(), ["b*"])) == len(files["a.parquet"])


@pytest.mark.parametrize(
    ("one", "two", "said"),
    [
        ({"image": [png(1)]}, {"image": [png(2)], "label": [1]}, "its labels are in column 'label'.*a.parquet in None"),
        ({"image": [png(1)], "label": [1]}, {"image": [png(2)]}, "its labels are in column None"),
        ({"image": [png(1)], "label": [1]}, {"img": [png(2)], "label": [1]}, "its images are in column 'img'"),
        ({"image": [png(1)]}, {"text": ["x"]}, r"b\.parquet: no column with encoded images"),
        ({"image": [png(1)], "label": [[1]]}, {"image": [png(2)]}, "column 'label' holds list.*one text or number"),
    ],
)
def test_parquet_files_that_are_not_of_one_kind_are_named(tmp_path, one, two, said):
    pq.write_table(pa.table(one), tmp_path / "a.parquet")
    pq.write_table(pa.table(two), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=said):
        samples(str(tmp_path))


def test_parquet_class_names_in_two_orders_are_refused(tmp_path):
    for file, names in (("a", ["cat", "dog"]), ("b", ["dog", "cat"])):
        features = {"info": {"features": {"label": {"names": names}}}}
        table = pa.table({"image": [png(1)], "label": [0]}).replace_schema_metadata(
            {"huggingface": json.dumps(features)}
        )
        pq.write_table(table, tmp_path / f"{file}.parquet")
    with pytest.raises(DataError, match=r"b\.parquet: its class names are not those of a\.parquet"):
        samples(str(tmp_path))


@pytest.mark.parametrize("limit", [2**27, 2**16], ids=["held", "streamed"])
def test_a_large_row_group_is_read_once_and_its_first_rows_without_the_rest(tmp_path, monkeypatch, limit):
    monkeypatch.setattr("raycnn.shards.parquet.UNIT_BYTES", limit)
    monkeypatch.setattr("raycnn.shards.parquet.STREAM_BYTES", 2**16)
    random = np.random.default_rng(0)
    rows = [random.bytes(1000) for _ in range(5000)]
    pq.write_table(pa.table({"image": rows}), tmp_path / "a.parquet", compression="none", use_dictionary=False)
    size = (tmp_path / "a.parquet").stat().st_size
    collection = open_collection(str(tmp_path))
    planned = list(collection.slices(Counter()))
    assert len(planned) >= 3
    assert {collection.run_of(s) for s in planned} == {"a.parquet#0"}
    fetched = count_reads(monkeypatch)
    assert [s.encoded for s in collection.read(planned)] == rows
    assert sum(fetched) < 1.2 * size
    fetched.clear()
    assert [s.encoded for s in collection.read(planned[-1:])] == rows[planned[-1].first :]
    assert [s.key for s in collection.read(planned[:1])][-1] == f"a.parquet#{planned[0].rows - 1}"
    if limit == 2**16:
        fetched.clear()
        list(collection.read(planned[:1]))
        assert sum(fetched) < size / 2


def count_reads(monkeypatch) -> list[int]:
    """The lengths of all reads from files that are opened from now on."""
    fetched: list[int] = []

    class Counted(io.FileIO):
        def read(self, size: int | None = -1, /) -> bytes:
            data = super().read(size)
            fetched.append(len(data))
            return data

    monkeypatch.setattr(LocalStore, "open", lambda self, path, **_: Counted(Path(self.url) / path))
    return fetched


def test_units_of_large_parquet_rows_stay_within_their_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("raycnn.shards.parquet.UNIT_BYTES", 2**18)
    rows = [np.random.default_rng(i).bytes(10_000) for i in range(200)]
    pq.write_table(pa.table({"image": rows}), tmp_path / "a.parquet")
    collection = open_collection(str(tmp_path))
    planned = list(collection.slices(Counter()))
    assert max(s.bytes for s in planned) <= 2**18
    assert sum(s.rows for s in planned) == 200
    assert 2_000_000 <= sum(s.bytes for s in planned) < 2_100_000
    assert [s.encoded for s in collection.read(planned)] == rows


@pytest.mark.parametrize("name", ["LICENSE", "Makefile", "notes"])
def test_a_file_without_a_suffix_discards_no_classes_unless_it_is_an_image(tmp_path, name):
    url = write(tmp_path, {"dog/1.png": png(1), "cat/2.png": png(2), name: b"Permission is granted", "empty": b""})
    assert open_collection(url).class_names == ("cat", "dog")
    write(tmp_path, {name: png(3)})
    assert open_collection(url).layout == "flat prefix"


@pytest.mark.parametrize("shard", ["backup.tar", "table.parquet"])
@pytest.mark.parametrize("image", ["cat/1.png", "cat/1"])
def test_images_beside_a_shard_are_not_hidden_by_it(tmp_path, shard, image):
    content = shard_files(shard.rpartition(".")[2])[f"train.{shard.rpartition('.')[2]}"]
    url = write(tmp_path, {shard: content, image: png(1)})
    with pytest.raises(DataError, match=rf"ambiguous: {shard} and {image} .*; move one"):
        open_collection(url)


def test_tars_beside_parquet_are_not_hidden_by_it(tmp_path):
    files = shard_files("tar") | shard_files("parquet")
    with pytest.raises(DataError, match="ambiguous"):
        open_collection(write(tmp_path, files))


@pytest.mark.parametrize("cut", [4, 7, 8, 16, 20])
def test_an_idx_file_that_was_cut_is_named(tmp_path, cut):
    whole = b"\0\0\x08\x03" + struct.pack(">3I", 2, 2, 2) + bytes(8)
    with pytest.raises(DataError, match=r"images-idx3-ubyte: .*restore it"):
        open_collection(write(tmp_path, {"train-images-idx3-ubyte": whole[:cut]}))


def test_idx_labels_of_another_shape_or_without_a_name_are_refused(tmp_path):
    images = b"\0\0\x08\x03" + struct.pack(">3I", 2, 2, 2) + bytes(8)
    url = write(tmp_path, {"train-images-idx3-ubyte": images, "train-labels-idx1-ubyte": images})
    with pytest.raises(DataError, match=r"labels-idx1-ubyte: not an IDX file of unsigned bytes in 1 dimension"):
        open_collection(url)
    write(tmp_path, {"train-labels-idx1-ubyte": b"\0\0\x08\x01" + struct.pack(">I", 2) + bytes([0, 2])})
    write(tmp_path, {"classes.txt": b"cat\ndog\n"})
    with pytest.raises(DataError, match=r"classes\.txt: 2 names, but there are labels up to 2"):
        open_collection(url)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("list.jsonl", '{"path": "a.png", "label": [1, 2]}', "column 'label' holds list.*write one text or number"),
        ("list.csv", "path,label,label\na.png,x,y\n", "two of its columns are named 'label'"),
        ("list.csv", "path,path\na.png,b.png\n", "two of its columns are named 'path'"),
        ("list.csv", "path,label\n../a.png,x\n", r"'\.\./a\.png' lies outside"),
        ("list.csv", "path,label\n/etc/a.png,x\n", "lies outside"),
        ("list.csv", "path,label\nhttps://a/b.png,x\n", "lies outside"),
        ("list.csv", "path,label\n./,x\n", "a row without a path"),
        ("list.csv", "path,label\nx.png,1\n././x.png,1\n", r"'x\.png' is named twice"),
    ],
)
def test_a_list_that_cannot_be_meant_so_is_refused_in_one_line(tmp_path, name, text, said):
    url = write(tmp_path, {"a.png": png(1), name: text.encode()})
    with pytest.raises(DataError, match=said) as raised:
        open_collection(url)
    assert "\n" not in str(raised.value)


def test_splits_in_a_list_may_be_padded(tmp_path):
    url = write(tmp_path, {"a.png": png(1), "list.csv": b"path,label,split\na.png,x, Validation \n"})
    assert open_collection(url).splits == ("val",)


class Listing(LocalStore):
    """A folder that lists what S3 can hold and a folder cannot."""

    def __init__(self, root: str, address: str = "", more: tuple[str, ...] = ()) -> None:
        super().__init__(root)
        self._address, self._more = address or root, more

    def address(self, path: str = "") -> str:
        return f"{self._address}/{path}" if path else self._address

    def list(self, prefix: str = "") -> Iterator[Entry]:
        yield from sorted([*super().list(prefix), *(Entry(path, 1, "e") for path in self._more)])

    def children(self, folder: str = ""):
        folders, files = super().children(folder)
        return sorted({*folders, *(p.split("/")[0] for p in self._more)}), files


def test_absolute_paths_in_a_list_lie_below_the_address_without_its_options(tmp_path):
    write(tmp_path, {"list.csv": b"path,label\ns3://bucket/pre/a.png,x\n"})
    rows = list(_list_rows(Listing(str(tmp_path), "s3://bucket/pre"), "list.csv"))
    assert rows == [("a.png", "x", "")]


def test_keys_that_are_not_utf8_are_left_out_and_counted(tmp_path, monkeypatch):
    write(tmp_path, {"cat/1.png": png(1), "dog/2.png": png(2)})
    store = Listing(str(tmp_path), more=("caf\udce9/1.png", "cat/\udcff.png"))
    monkeypatch.setattr("raycnn.shards.layouts.open_store", lambda url: store)
    collection, skipped = open_collection("s3://anything"), Counter()
    assert [s.key for s in collection.slices(skipped)] == ["cat/1.png", "dog/2.png"]
    assert collection.class_names == ("cat", "dog")
    assert skipped == {"not UTF-8": 2}


def test_class_names_of_equal_value_have_one_order():
    orders = {natural_order(names) for names in (["1", "01", "2"], ["2", "01", "1"], ["01", "1", "2"])}
    assert orders == {("01", "1", "2")}
