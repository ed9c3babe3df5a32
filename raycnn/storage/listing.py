"""Listing of S3: pages of keys become one stream in byte order, with folders read ahead in parallel.

S3 promises byte order within one listing, but some servers walk a tree and put 'a/b' before 'a.b'. Sorting by
folder makes the order right on both: a whole small subtree is sorted in memory; a large one is listed level by
level, in which order two neighbours can only be swapped if one's name begins the other's.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple
from urllib.parse import unquote_plus
from xml.etree import ElementTree

from raycnn.storage.base import Entry

THREADS = 16
"""Requests in flight."""
PAGES_AHEAD = 4
"""Pages of up to 1,000 keys that are held of each folder which is read ahead."""
ITEMS_AHEAD = 1000
"""Keys looked past, to find the next folders to read ahead."""


class Page(NamedTuple):
    """One answer to ListObjectsV2."""

    entries: list[Entry]
    folders: list[str]
    """Common prefixes, ending with '/'; none where no delimiter was asked for."""
    token: str | None
    """Continues the listing; None at its end."""


class Query(NamedTuple):
    """One ListObjectsV2 request."""

    prefix: str
    by_folder: bool = False
    """Stop at the next '/' and tell folders instead of what is below them."""
    after: str = ""
    token: str | None = None


Fetch = Callable[[Query], Page]


def parse_page(body: bytes, root: str) -> Page:
    """The page in an XML answer; paths relative to `root` ('' or a prefix ending with '/').

    Raises:
        ElementTree.ParseError, ValueError: it is no such answer.
    """
    tree = ElementTree.fromstring(body)
    space = tree.tag[: tree.tag.find("}") + 1]
    if tree.tag != space + "ListBucketResult":
        raise ValueError(f"a listing was expected, not {tree.tag}")
    encoded = tree.findtext(space + "EncodingType") == "url"

    def path(element: ElementTree.Element, field: str) -> str:
        key = element.findtext(space + field) or ""
        return (unquote_plus(key, errors="surrogateescape") if encoded else key)[len(root) :]

    return Page(
        [
            Entry(path(e, "Key"), int(e.findtext(space + "Size") or 0), e.findtext(space + "ETag") or "")
            for e in tree.iterfind(space + "Contents")
        ],
        [path(e, "Prefix") for e in tree.iterfind(space + "CommonPrefixes")],
        tree.findtext(space + "NextContinuationToken") or None,
    )


def list_ordered(fetch: Fetch, prefix: str) -> Iterator[Entry]:
    """Every entry whose path starts with `prefix`, in byte order; memory does not grow with their number."""
    first = fetch(Query(prefix))
    if first.token is None:
        yield from sorted(first.entries)
        return
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="raycnn-list")
    try:
        yield from _expand(_Folder(fetch, pool, prefix, first))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class _Folder:
    """What lies below a prefix, in order; its first pages are being read as soon as it is made."""

    def __init__(self, fetch: Fetch, pool: ThreadPoolExecutor, prefix: str, first: Page | None = None) -> None:
        self._fetch, self._pool = fetch, pool
        self._batches = _batches(fetch, prefix, first)
        self._ahead = pool.submit(self._read)

    def _read(self) -> list[list[Entry | str]]:
        return list(islice(self._batches, PAGES_AHEAD))

    def items(self) -> Iterator["Entry | _Folder"]:
        while batches := self._ahead.result():
            self._ahead = self._pool.submit(self._read)
            for batch in batches:
                for item in batch:
                    yield _Folder(self._fetch, self._pool, item) if isinstance(item, str) else item


def _expand(folder: _Folder) -> Iterator[Entry]:
    items = folder.items()
    window: deque[Entry | _Folder] = deque()
    folders = 0
    while True:
        while folders < THREADS and len(window) < ITEMS_AHEAD and (item := next(items, None)) is not None:
            window.append(item)
            folders += isinstance(item, _Folder)
        if not window:
            return
        item = window.popleft()
        if isinstance(item, Entry):
            yield item
        else:
            folders -= 1
            yield from _expand(item)


def _batches(fetch: Fetch, prefix: str, page: Page | None) -> Iterator[list[Entry | str]]:
    """Entries and folders below a prefix, sorted within and across the batches."""
    page = page or fetch(Query(prefix))
    entries = sorted(page.entries)
    if page.token is None:
        yield [*entries]
        return
    query = Query(prefix, by_folder=True)
    if entries and not any("/" in entry.path[len(prefix) :] for entry in entries):
        yield [*entries]
        query = query._replace(after=entries[-1].path)
    held: list[Entry | str] = []
    while True:
        page = fetch(query)
        held = sorted([*held, *page.entries, *page.folders], key=_path)
        if page.token is None:
            yield held
            return
        # Whether a server sorts 'a/' as 'a/' or as 'a', what it has yet to send lies above this name.
        reached = max((_path(item).rstrip("/") for item in [*page.entries, *page.folders]), default="")
        yield [item for item in held if _path(item) <= reached]
        held = [item for item in held if _path(item) > reached]
        query = query._replace(token=page.token)


def _path(item: Entry | str) -> str:
    """What an item is sorted by. Python orders strings by code point, which is the order of UTF-8 bytes."""
    return item if isinstance(item, str) else item.path
