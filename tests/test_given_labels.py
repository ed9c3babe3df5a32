"""Labels that people have given: read from whatever they come in, and applied to the keys that they name."""

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raycnn.errors import DataError
from raycnn.shards import GivenLabels, Sample, open_collection, read_labels


def task(key: str, *chosen: str, cancelled: bool = False, **more: object) -> dict:
    """A task as Label Studio exports it, annotated once for each of the chosen classes."""
    annotations = [
        {
            "id": i,
            "was_cancelled": cancelled,
            "result": [{"from_name": "label", "to_name": "image", "type": "choices", "value": {"choices": [name]}}],
        }
        for i, name in enumerate(chosen)
    ]
    prediction = {"model_version": "raycnn", "result": [{"type": "choices", "value": {"choices": ["model's"]}}]}
    return {"data": {"key": key, "image": "data:"}, "annotations": annotations, "predictions": [prediction], **more}


OLD = [task("a.png", "dog"), task("b.png"), task("c.png", "007")]
OTHER = {
    "annotations": [
        {
            "result": [
                {"type": "relation", "from_id": "x", "to_id": "y"},
                {"from_name": "quality", "type": "choices", "value": {"choices": ["blurred"]}},
            ]
        }
    ]
}
"""A task in which a person has said something, but not what class it is."""

FILES = {
    "review.csv": "key,label,margin,corrected\na.png,cat,0.5,dog\nb.png,cat,0.4,\nc.png,eel,0.3,007\n",
    "saved-by-excel.csv": "\ufeffkey,label,corrected\r\na.png,cat,dog \r\nb.png,cat,\r\nc.png,eel,007\r\n",
    "saved-in-germany.csv": "Key;Label ;Corrected;\r\na.png;cat;dog;\r\nb.png;cat\r\nc.png;eel;007;surely\r\n;;;\r\n",
    "quoted.csv": '"key", corrected\n"a.png","dog"\nb.png,\n"c.png",007\n',
    "plain.csv": "key,label\na.png,dog\nb.png,\nc.png,007\n",
    "plain.tsv": "class\tkey\ndog\ta.png\n\tb.png\n007\tc.png\n",
    "lines.jsonl": '{"key": "a.png", "label": "dog"}\n{"key": "b.png"}\n{"key": "c.png", "label": "007"}\n',
    "exported.csv": "key,label,class_name\na.png,1,dog\nb.png,,\nc.png,0,007\n",
    "studio.json": json.dumps([task("a.png", "dog"), task("b.png"), task("c.png", "007", "007")]),
    "skipped.json": json.dumps([task("a.png", "dog"), task("b.png", "eel", cancelled=True), task("c.png", "007")]),
    "studio-0.9.json": json.dumps([{"completions" if k == "annotations" else k: v for k, v in t.items()} for t in OLD]),
    "studio-more.json": json.dumps([task("a.png", "dog"), {**OTHER, "data": {"key": "b.png"}}, task("c.png", "007")]),
    "STUDIO.JSON": json.dumps([task("a.png", "dog"), task("c.png", "007")]),
    "studio-min.json": json.dumps(
        [{"key": "a.png", "label": "dog"}, {"key": "b.png"}, {"key": "c.png", "label": "007"}]
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_every_form_gives_the_same_labels_and_nothing_that_nobody_said(name, tmp_path):
    (tmp_path / name).write_text(FILES[name], encoding="utf-8", newline="")
    assert read_labels(str(tmp_path / name)).by_key == {"a.png": "dog", "c.png": "007"}


def test_parquet_gives_labels_too(tmp_path):
    pq.write_table(pa.table({"key": ["a", "b"], "label": [3, None]}), tmp_path / "labels.parquet")
    assert read_labels(str(tmp_path / "labels.parquet")).by_key == {"a": "3"}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("twice.csv", "key,label\na,cat\na,dog\n", "'a' is 'cat' and again 'dog'; keep one of them"),
        ("two-people.json", json.dumps([task("a", "cat", "dog")]), "'a' is 'cat' and again 'dog'"),
        (
            "empty.csv",
            "key,label,corrected\na,cat,\n",
            "nobody has given a label in it; fill in its column `corrected`",
        ),
        ("other.csv", "name,label\na,cat\n", r"has the columns \['name', 'label'\]; name one `key` and one `label`"),
        (
            "keyless.json",
            json.dumps([{"data": {"image": "x"}, "annotations": [{"result": []}]}]),
            "import the tasks.json",
        ),
        ("none.json", json.dumps([{"data": {"key": None}, "annotations": []}]), "whose tasks have a `key`"),
        ("both.json", json.dumps([{"key": "a", "label": {"choices": ["cat", "dog"]}}]), "'a' is 'cat' and again 'dog'"),
        ("unread.json", json.dumps([{"data": {"key": "a"}, "predictions": []}]), "fill in the control 'label'"),
        ("unicode.csv", b"\xff\xfek\0e\0y\0", "is not UTF-8 text; save it as CSV in UTF-8"),
        ("table.xlsx", b"PK\x03\x04\xff", "is not UTF-8 text; save it as CSV in UTF-8"),
        ("open.csv", 'key,label\n"a,cat\nb,dog\n', "unexpected end of data; save it as CSV anew"),
        ("columns.csv", "key,label,Label\na,cat,dog\n", "two of its columns are named 'label'"),
        ("broken.json", "[", "not a JSON export of Label Studio"),
        ("object.json", "{}", "nobody has given a label"),
        (None, "", "no such file"),
    ],
)
def test_a_file_that_says_nothing_or_two_things_is_refused(name, content, said, tmp_path):
    if name:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=said):
        read_labels(str(tmp_path / (name or "none.csv")))


def test_new_classes_join_the_order_that_there_is():
    given = GivenLabels({"a": "10", "b": "ant"})
    assert given.class_names(("cat", "dog")) == ("10", "ant", "cat", "dog")
    assert GivenLabels({"a": "10"}).class_names(("2", "3")) == ("2", "3", "10")
    assert given.class_names(("dog", "cat")) == ("dog", "cat", "10", "ant")


def test_samples_keep_their_class_where_nobody_said_anything_else():
    given, known = GivenLabels({"b": "ant", "c": "dog"}), ("cat", "dog")
    names = given.class_names(known)
    samples = [Sample(key, b"", label) for key, label in (("a", 0), ("b", 1), ("c", None), ("d", None), ("e", 1))]
    named = [(s.key, None if s.label is None else names[s.label]) for s in given.applied(samples, known, names)]
    assert named == [("a", "cat"), ("b", "ant"), ("c", "dog"), ("d", None), ("e", "dog")]


def parquet(folder: Path, with_keys: bool) -> str:
    folder.mkdir()
    columns = {"image": [b"x"] * 10, "label": [0] * 10} | ({"key": [f"k{i}" for i in range(10)]} if with_keys else {})
    pq.write_table(pa.table(columns), folder / "a.parquet", row_group_size=4)
    return str(folder)


def objects(folder: Path) -> str:
    for i in range(10):
        (folder / "cat").mkdir(parents=True, exist_ok=True)
        (folder / "cat" / f"{i}.png").touch()
    return str(folder)


@pytest.mark.parametrize(("layout", "key"), [("objects", "cat/7.png"), ("keys", "k7"), ("rows", "a.parquet#7")])
def test_a_key_that_the_source_does_not_have_is_named_whatever_the_layout(layout, key, tmp_path):
    url = objects(tmp_path / "raw") if layout == "objects" else parquet(tmp_path / "raw", layout == "keys")
    collection = open_collection(url)
    slices = list(collection.slices(Counter()))
    assert list(GivenLabels({key: "cat"}).found_in(collection, slices)) == slices
    with pytest.raises(
        DataError, match="no image with the key 'k99' and 1 more, which --labels names; correct the key"
    ):
        list(GivenLabels({key: "cat", "k99": "cat", "x": "cat"}).found_in(collection, slices))
