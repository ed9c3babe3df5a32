"""Labels that people have given: lists of keys with class names, and what Label Studio exports."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from raycnn.errors import DataError, ObjectMissing
from raycnn.shards.collection import Collection, Sample, Slice, natural_order
from raycnn.shards.objects import LABEL_COLUMNS, parse_list, text_column
from raycnn.storage import open_store

KEY, CORRECTED, CLASS_NAME = "key", "corrected", "class_name"


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
    rows = _of_label_studio(data, url) if name.endswith(".json") else _of_list(parse_list(data, name, url), url)
    labels: dict[str, str] = {}
    for key, label in ((key, label.strip()) for key, label in rows):
        if label and labels.setdefault(key, label) != label:
            raise DataError(f"{url}: {key!r} is {labels[key]!r} and again {label!r}; keep one of them")
    if not labels:
        raise DataError(f"{url}: nobody has given a label in it; fill in its column `corrected`, or `label`")
    return GivenLabels(labels)


def _of_list(table: pa.Table, where: str) -> Iterable[tuple[str, str]]:
    columns = [c for c in (CORRECTED, CLASS_NAME, *LABEL_COLUMNS) if c in table.column_names]
    if KEY not in table.column_names or not columns:
        raise DataError(f"{where}: has the columns {table.column_names}; name one `key` and one `label`")
    return zip(text_column(table, (KEY,), where), text_column(table, columns[:1], where), strict=True)


def _of_label_studio(data: bytes, where: str) -> Iterator[tuple[str, str]]:
    """(key, class name) of each annotation in an export as JSON, or of each line of one as JSON-MIN."""
    try:
        tasks = json.loads(data)
        for task in tasks:
            if "annotations" not in task:
                yield str(task["key"]), str(task.get("label") or "")
                continue
            for annotation in task["annotations"]:
                if not annotation.get("was_cancelled"):
                    yield str(task["data"]["key"]), _choice(annotation)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(
            f"{where}: not a JSON export of Label Studio whose tasks have a `key`; import the tasks.json of "
            "`raycnn review` there, and export as JSON"
        ) from None


def _choice(annotation: dict[str, Any]) -> str:
    """The class that a person has chosen, or nothing where none was."""
    chosen = [name for result in annotation["result"] for name in result["value"].get("choices", [])]
    return str(chosen[0]) if len(set(chosen)) == 1 else ""
