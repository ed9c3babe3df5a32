"""How a collection has grown since it was planned: what is new, has changed, or is gone."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

from raycnn.errors import DataError
from raycnn.shards import Slice, path_order


@dataclass
class Growth:
    """How a collection differs from what earlier generations planned, in rows."""

    changed: int = 0
    gone: int = 0


def new_slices(listed: Iterable[Slice], planned: Iterable[Slice], growth: Growth) -> Iterator[Slice]:
    """The listed slices of objects that no earlier generation has; what changed or is gone is counted.

    An object is known by its path. One that has changed is never planned again, not even in part: its rows have
    other places now, and a key would be labelled twice. Both sides come in the order of their paths, so that
    memory does not grow with them.
    """
    known, last = _objects(planned), b""
    have = next(known, None)
    for path, pieces in itertools.groupby(listed, key=attrgetter("path")):
        order = path_order(path)
        if order < last:  # it could be taken for a new one, and be labelled twice
            raise DataError(f"{path!r} is listed after a name that follows it, so that nothing was planned")
        last = order
        while have and have.order < order:
            growth.gone += have.rows
            have = next(known, None)
        if have is None or have.order != order:
            yield from pieces
            continue
        for piece in pieces:
            if piece.etag != have.etag:
                growth.changed += piece.rows
        have = next(known, None)
    if have:
        growth.gone += have.rows + sum(left.rows for left in known)


class _Object(NamedTuple):
    order: bytes
    etag: str
    rows: int


def _objects(planned: Iterable[Slice]) -> Iterator[_Object]:
    """What was planned, by object."""
    for path, pieces in itertools.groupby(planned, key=attrgetter("path")):
        etag, rows = "", 0
        for piece in pieces:
            etag, rows = piece.etag, rows + piece.rows
        yield _Object(path_order(path), etag, rows)
