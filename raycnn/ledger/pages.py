"""The pages of a plan: which slices each unit holds, in small files that are named by their content."""

import functools
import hashlib
import io
from collections.abc import Iterable, Iterator
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raycnn.errors import DataError, ObjectMissing
from raycnn.shards import Slice
from raycnn.storage import Store, open_store

PAGE_UNITS = 16

ALTERED = "was altered or deleted; the output cannot be trusted: use a new one"

_PAGE = pa.schema(
    [
        ("unit", pa.int32()),
        ("key", pa.string()),
        ("path", pa.string()),
        ("size", pa.int64()),
        ("etag", pa.string()),
        ("first", pa.int64()),
        ("rows", pa.int64()),
        ("offset", pa.int64()),
        ("bytes", pa.int64()),
        ("label", pa.int64()),
    ]
)
_UNIT = _PAGE.remove(0)
_ENCODINGS = {f.name: "DELTA_BYTE_ARRAY" if f.type == pa.string() else "DELTA_BINARY_PACKED" for f in _PAGE}
"""Neighbours are alike: keys begin alike, and numbers go up by little. So a page is small, and quickly made."""


def write_pages(store: Store, units: Iterable[list[Slice]]) -> list[dict[str, Any]]:
    """Write the units' slices; for each page its path, its sha256, and the rows of its units, as JSON."""
    return [_write_page(store, page) for page in _batches(map(_table_of, units), PAGE_UNITS)]


def slices_of(store: Store, path: str, unit: int) -> Iterator[Slice]:
    """The slices of a unit, which is known by its number in the whole plan.

    Raises:
        DataError: the page is not the one that was planned.
    """
    table, place = _read_page(store.url, path), unit % PAGE_UNITS
    first, end = np.searchsorted(table["unit"].to_numpy(), (place, place + 1))
    return _slices(table.slice(first, end - first))


def all_slices(store: Store, path: str) -> Iterator[Slice]:
    """The slices of all units of a page, in order; DataError as above."""
    return _slices(_read_page(store.url, path))


def forget_pages() -> None:
    """Read pages again: what this process has read before proves nothing of what is there now."""
    _read_page.cache_clear()


def _write_page(store: Store, page: list[pa.Table]) -> dict[str, Any]:
    units = np.repeat(np.arange(len(page), dtype=np.int32), [len(unit) for unit in page])
    table = pa.concat_tables(page).add_column(0, _PAGE.field(0), [units])
    sink = io.BytesIO()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        use_dictionary=False,
        column_encoding=_ENCODINGS,
        write_statistics=False,
    )
    data = sink.getvalue()
    digest = hashlib.sha256(data).hexdigest()
    path = f"plan/pages/{digest[:32]}.parquet"
    store.create(path, data)
    return {"path": path, "sha256": digest, "unit_rows": [int(unit["rows"].to_numpy().sum()) for unit in page]}


def _table_of(unit: list[Slice]) -> pa.Table:
    """A unit's slices by column: a page of them as tuples would keep the garbage collector busy."""
    columns = (pa.array(list(map(itemgetter(i), unit)), f.type) for i, f in enumerate(_UNIT))
    return pa.Table.from_arrays(list(columns), schema=_UNIT)


def _slices(table: pa.Table) -> Iterator[Slice]:
    columns = (column.to_numpy().tolist() for column in table.columns[1:])
    return map(Slice._make, zip(*columns, strict=True))


@functools.lru_cache(maxsize=8)
def _read_page(url: str, path: str) -> pa.Table:
    """One page, checked against the digest in its name; kept as columns, a third of what slices take."""
    store = open_store(url)
    try:
        data = store.get(path)
    except ObjectMissing:
        data = b""
    if not path.endswith(f"/{hashlib.sha256(data).hexdigest()[:32]}.parquet"):
        raise DataError(f"{store.address(path)} {ALTERED}")
    return pq.read_table(io.BytesIO(data))


def _batches(units: Iterable[pa.Table], count: int) -> Iterator[list[pa.Table]]:
    batch: list[pa.Table] = []
    for unit in units:
        batch.append(unit)
        if len(batch) == count:
            yield batch
            batch = []
    if batch:
        yield batch
