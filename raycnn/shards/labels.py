"""Labels that people have given: lists of keys with class names, and what Label Studio exports."""

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from raycnn.errors import DataError, ObjectMissing
from raycnn.shards.collection import Collection, Sample, Slice, natural_order
from raycnn.shards.objects import LABEL_COLUMNS, parse_list, text_column
from raycnn.storage import open_store

KEY, CORRECTED, CLASS_NAME = "key", "corrected", "class_name"
CHOICES = "label"
"""What `raycnn review` calls the control in which a person chooses a class."""


class GivenLabels:
    """Class names of some keys of a collection, which count whatever its own labels say."""

    def __init__(self, by_key: dict[str, str]) -> None:
        self.by_key = by_key

    @classmethod
    def load(cls, data: bytes) -> "GivenLabels":
        """What `dump` gave."""
        return cls(json.loads(data))

    def dump(self) -> bytes:
        """As JSON; equal labels give equal bytes."""
        return json.dumps(self.by_key, sort_keys=True).encode()

    @property
    def digest(self) -> str:
        """What identifies the labels."""
        return hashlib.sha256(self.dump()).hexdigest()

    def class_names(self, known: Sequence[str]) -> tuple[str, ...]:
        """The collection's class names and those that are new: in order where the known ones are, else behind them."""
        if tuple(known) == natural_order(known):
            return natural_order([*known, *self.by_key.values()])
        return (*known, *natural_order(set(self.by_key.values()).difference(known)))

    def found_in(self, collection: Collection, slices: Iterable[Slice]) -> Iterator[Slice]:
        """The slices, all of them.

        Raises:
            DataError: at their end, if a key was in none of them.
        """
        missing = set(self.by_key)
        for piece in slices:
            if missing:
                missing.difference_update(collection.keys(piece))
            yield piece
        if missing:
            more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
            raise DataError(
                f"{collection.store.address()}: no image with the key {min(missing)!r}{more}, which --labels names; "
                "correct the key, or take it out of the labels"
            )

    def applied(self, samples: Iterable[Sample], known: Sequence[str], names: Sequence[str]) -> Iterator[Sample]:
        """The samples with these labels.

        Args:
            samples: Their own labels are indices of `known`.
            known: The collection's class names.
            names: What the labels are indices of from now on.
        """
        if not self.by_key:
            yield from samples
            return
        index = {name: i for i, name in enumerate(names)}
        moved = [index[name] for name in known]
        for sample in samples:
            given = self.by_key.get(sample.key)
            if given is not None:
                yield sample._replace(label=index[given])
            else:
                yield sample if sample.label is None else sample._replace(label=moved[sample.label])


def read_labels(url: str) -> GivenLabels:
    """Labels from a CSV, TSV, JSON Lines or Parquet file, or from a JSON export of Label Studio.

    Of a list with a column `corrected`, which is what `raycnn review` writes, only the lines count in which a
    person has filled it in: what stands in `label` there is the model's own opinion. Elsewhere the label is in
    `class_name` or, where there is none, in `label` or another of the usual names. Rows without one do not count.

    Raises:
        DataError: there is no such file, it is of another form, or it gives a key two labels.
    """
    folder, _, name = url.rpartition("/")
    try:
        data = open_store(folder or "/").get(name)
    except ObjectMissing:
        raise DataError(f"{url}: no such file; --labels takes a list of keys and class names") from None
    kind = name.lower().rpartition(".")[2]
    if kind == "json":
        rows = _of_label_studio(data, url)
    else:
        is_list = kind in {"jsonl", "parquet"}
        rows = _of_list(parse_list(data, f".{kind}", url) if is_list else _spreadsheet(data, url), url)
    labels: dict[str, str] = {}
    for key, label in ((key, label.strip()) for key, label in rows):
        if label and labels.setdefault(key, label) != label:
            raise DataError(f"{url}: {key!r} is {labels[key]!r} and again {label!r}; keep one of them")
    if not labels:
        where = f"the control {CHOICES!r}" if kind == "json" else "its column `corrected`, or `label`"
        raise DataError(f"{url}: nobody has given a label in it; fill in {where}")
    return GivenLabels(labels)


def _of_list(table: pa.Table, where: str) -> Iterable[tuple[str, str]]:
    columns = [c for c in (CORRECTED, CLASS_NAME, *LABEL_COLUMNS) if c in table.column_names]
    if KEY not in table.column_names or not columns:
        raise DataError(f"{where}: has the columns {table.column_names}; name one `key` and one `label`")
    return zip(text_column(table, (KEY,), where), text_column(table, columns[:1], where), strict=True)


def _spreadsheet(data: bytes, where: str) -> pa.Table:
    """A CSV or TSV file as people save it: with semicolons, a byte order mark, capitals and spaces in its header."""
    try:
        text = data.decode("utf-8-sig")
        header = text.partition("\n")[0]
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count), strict=True)
        names = [name.strip().lower() for name in next(lines, [])]
        # Lines may be shorter, where the rest is empty, or longer than the header: what has no name is not asked for.
        cells = [[*line, *[""] * len(names)][: len(names)] for line in lines]
    except UnicodeDecodeError:
        raise DataError(f"{where}: is not UTF-8 text; save it as CSV in UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{where}: cannot be read as a list: {error}; save it as CSV anew") from None
    twice = {name for name in names if name in {KEY, CORRECTED, *LABEL_COLUMNS} and names.count(name) > 1}
    if twice:
        raise DataError(f"{where}: two of its columns are named {min(twice)!r}; rename or remove one")
    return pa.table({name: [line[i] for line in cells] for i, name in enumerate(names)})


def _of_label_studio(data: bytes, where: str) -> Iterator[tuple[str, str]]:
    """(key, class name) of each choice in an export as JSON, or in one as JSON-MIN."""
    try:
        for task in json.loads(data):
            key = task["data"][KEY] if "data" in task else task[KEY]
            if not isinstance(key, str):
                raise TypeError
            for name in _chosen(task):
                yield key, str(name)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(
            f"{where}: not a JSON export of Label Studio whose tasks have a `key`; import the tasks.json of "
            "`raycnn review` there, and export as JSON"
        ) from None


def _chosen(task: dict[str, Any]) -> Iterator[Any]:
    """What people have chosen in a task: what they skipped, and what they said in other controls, does not count."""
    if "data" not in task:
        said = task.get(CHOICES) or []
        said = said["choices"] if isinstance(said, dict) else said
        yield from said if isinstance(said, list) else [said]
        return
    for annotation in task.get("annotations", task.get("completions", ())):  # as it was called before 1.0
        if not (annotation.get("was_cancelled") or annotation.get("skipped")):
            for result in annotation["result"]:
                if result.get("from_name") == CHOICES:
                    yield from result["value"].get("choices", ())
