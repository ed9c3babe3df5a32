"""S3, and what speaks its language, as a store.

obstore moves the data, but does not list it: it reads a level to its end before it returns, trims folder markers
and fails at the first key that it cannot address.
"""

import builtins
import io
import re
import time
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast
from xml.etree.ElementTree import ParseError

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from typing_extensions import Buffer, override

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

from raycnn.errors import ObjectMissing, StorageError
from raycnn.storage.aws import Account, Failure, find_account, pauses
from raycnn.storage.base import Entry, Store
from raycnn.storage.listing import Page, Query, list_ordered, parse_page

MIB = 1024 * 1024
PART = 16 * MIB
"""Objects larger than two of them are written in parts, of at least this size: S3 allows 10,000 parts."""
NEAR = MIB // 4
"""Ranges that are no further apart share a request: as long as it takes to ask again."""
LARGEST_READ = 8 * MIB
"""Read ahead of a reader which goes on sequentially."""
THREADS = 8
"""Ranges in flight."""
FLAT = 10_000
"""Names after which a folder that showed no folders is not read on to its end."""

LOOKS = 200
"""Requests that look for names of another kind in such a folder."""
OPTIONS = ("anonymous", "requester_pays", "single_driver")
"""What a URL may end with."""

_UNADDRESSABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


class S3Store(Store):
    """The objects below `s3://bucket/prefix`. ETags are the server's, with their quotes."""

    def __init__(self, bucket: str, prefix: str, options: Collection[str] = ()) -> None:
        self._bucket, self._prefix = bucket, prefix
        self._options = tuple(option for option in OPTIONS if option in options)
        self._root = prefix + "/" if prefix else ""
        self._address = f"s3://{bucket}/{prefix}".rstrip("/")
        self.url = self._address + ("?" + "&".join(self._options) if self._options else "")

    def __reduce__(self) -> tuple[type["S3Store"], tuple[str, str, tuple[str, ...]]]:
        return S3Store, (self._bucket, self._prefix, self._options)

    @property
    @override
    def is_local(self) -> bool:
        return False

    @override
    def address(self, path: str = "") -> str:
        return f"{self._address}/{path}" if path else self._address

    @override
    def child(self, path: str) -> "S3Store":
        return S3Store(self._bucket, self._key(path.rstrip("/")), self._options)

    @override
    def list(self, prefix: str = "") -> Iterator[Entry]:
        return list_ordered(self._page, prefix)

    def _page(self, query: Query) -> Page:
        fields = [("list-type", "2"), ("encoding-type", "url"), ("prefix", self._root + query.prefix)]
        if query.by_folder:
            fields.append(("delimiter", "/"))
        if query.after:
            fields.append(("start-after", self._root + query.after))
        if query.token:
            fields.append(("continuation-token", query.token))
        address = self.address(query.prefix)
        answer = self._account.request("GET", self._bucket, query=sorted(fields))
        if answer.status != 200:
            code = re.search(rb"<Code>(\w+)</Code>", answer.body)
            said = code[1].decode() if code else "NoSuchBucket" if answer.status == 404 else ""
            region = answer.headers.get("x-amz-bucket-region", "")
            raise self._account.refusal(answer.status, said, address, region=region)
        try:
            return parse_page(answer.body, self._root)
        except (ParseError, ValueError) as error:
            raise StorageError(f"{address}: the answer is no S3 listing ({error}); check AWS_ENDPOINT_URL") from None

    @override
    def children(self, folder: str = "") -> tuple[builtins.list[str], builtins.list[str]]:
        prefix = folder.rstrip("/") + "/" if folder else ""
        folders: list[str] = []
        files: list[str] = []
        query, looks, passed = Query(prefix, by_folder=True), 0, ""
        while looks < LOOKS:
            page = self._page(query)
            folders += [path[len(prefix) : -1] for path in page.folders]
            files += [entry.path[len(prefix) :] for entry in page.entries if entry.path != prefix]
            if page.token is None:
                break
            is_flat = looks > 0 or (not folders and len(files) >= FLAT)
            if is_flat and page.entries and not page.folders:
                looks, last = looks + 1, files[-1]
                query = Query(prefix, by_folder=True, after=prefix + _unlike(last, passed))
                passed = last[0]
            else:
                query = query._replace(token=page.token)
        return sorted(folders), sorted(files)

    @override
    def head(self, path: str) -> Entry | None:
        try:
            return self._head(path, None)
        except ObjectMissing:
            return None

    def _head(self, path: str, if_match: str | None) -> Entry:
        with self._explained(path):
            found = self._fetch(path, if_match, head=True).meta
            return Entry(path, found["size"], found["e_tag"] or "")

    def _fetch(self, path: str, if_match: str | None, **options: Any) -> "obstore.GetResult":
        if if_match is not None:
            options["if_match"] = if_match
        return obstore.get(self._client, self._key(path), options=cast("obstore.GetOptions", options))

    @override
    def get(self, path: str, *, if_match: str | None = None) -> bytes:
        with self._explained(path):
            return bytes(self._fetch(path, if_match).bytes())

    def _get_range(self, path: str, if_match: str | None, start: int, length: int) -> memoryview:
        with self._explained(path):
            data = memoryview(self._fetch(path, if_match, range=(start, start + length)).bytes())
        if len(data) != length:
            raise StorageError(f"{self.address(path)}: ends before byte {start + length:,}; is it whole?")
        return data

    @override
    def get_ranges(
        self, path: str, ranges: Sequence[tuple[int, int]], *, if_match: str | None = None
    ) -> builtins.list[bytes]:
        spans = _spans(ranges)
        fetch = partial(self._get_range, path, if_match)
        if len(spans) <= 1:
            found = [fetch(*span) for span in spans]
        else:
            with ThreadPoolExecutor(min(THREADS, len(spans))) as pool:
                found = list(pool.map(lambda span: fetch(*span), spans))
        starts = [start for start, _ in spans]
        pieces = []
        for start, length in ranges:
            nth = bisect_right(starts, start) - 1
            begin = start - starts[nth] if length else 0
            pieces.append(bytes(found[nth][begin : begin + length]) if length else b"")
        return pieces

    @override
    def open(self, path: str, *, if_match: str | None = None) -> BinaryIO:
        return self._file(path, if_match, NEAR)

    @override
    def stream(self, path: str, *, if_match: str | None = None) -> BinaryIO:
        return self._file(path, if_match, LARGEST_READ)

    def _file(self, path: str, if_match: str | None, first_read: int) -> BinaryIO:
        entry = self._head(path, if_match)
        fetch = partial(self._get_range, path, if_match or entry.etag or None)
        return cast(BinaryIO, io.BufferedReader(_ObjectFile(fetch, entry.size, first_read), 64 * 1024))

    @override
    def put(self, path: str, data: bytes) -> Entry:
        return self._upload(path, data, len(data))

    @override
    def put_file(self, path: str, file: Path) -> Entry:
        return self._upload(path, file, file.stat().st_size)

    def _upload(self, path: str, source: bytes | Path, size: int) -> Entry:
        with self._explained(path):
            done = obstore.put(
                self._client,
                self._key(path),
                source,
                use_multipart=size > 2 * PART,
                chunk_size=max(PART, size // 9_000),
                max_concurrency=4,
            )
        return Entry(path, size, done["e_tag"] or "")

    @override
    def single_driver(self) -> "S3Store":
        return S3Store(self._bucket, self._prefix, (*self._options, "single_driver"))

    @override
    def create(self, path: str, data: bytes) -> bool:
        if "single_driver" in self._options:
            if self.head(path) is not None:
                return False
            self.put(path, data)
            return True
        key, pause = self._key(path), pauses()
        while True:
            try:
                obstore.put(self._account.client(self._bucket, repeats=False), key, data, mode="create")
                return True
            except AlreadyExistsError as error:
                # 412; or 409, where another's write is under way and may yet fail: only then nothing is there.
                if self.head(path) is not None:
                    return False
                problem = self._account.refusal(409, "ConditionalRequestConflict", self.address(path), str(error))
            except (BaseError, FileNotFoundError) as error:
                failure, problem = Failure.of(error), self._account.problem(error, self.address(path))
                if failure.status == 501:
                    raise self._overwrites("does not know") from None
                # Without an answer nobody knows what was done; the condition makes it safe to do it again.
                if not failure.is_transient:
                    raise problem from None
            if (delay := next(pause, None)) is None:
                raise problem from None
            time.sleep(delay)

    def fsspec_filesystem(self) -> "tuple[AbstractFileSystem, str]":
        """The bucket as fsspec sees it, and this store's path there."""
        from s3fs import S3FileSystem

        account = self._account
        system = S3FileSystem(
            anon="anonymous" in self._options,
            requester_pays="requester_pays" in self._options,
            endpoint_url=account.endpoint,
            client_kwargs={"region_name": account.region, "verify": account.authorities},
            config_kwargs={"s3": {"addressing_style": "path"}},
            use_listings_cache=False,
            skip_instance_cache=True,
        )
        return system, self._address.removeprefix("s3://")

    @property
    def _account(self) -> Account:
        return find_account(anonymous="anonymous" in self._options, requester_pays="requester_pays" in self._options)

    @property
    def _client(self) -> "obstore.store.S3Store":
        return self._account.client(self._bucket)

    def _key(self, path: str) -> str:
        if _UNADDRESSABLE.search(path) or any(part in {"", ".", ".."} for part in path.split("/")):
            raise StorageError(
                f"{self.address()}: the key {path!r} has an empty, '.' or '..' part or a control character, and "
                "cannot be read: leave it out with --exclude, or copy the object to another key"
            )
        return self._root + path

    @contextmanager
    def _explained(self, path: str) -> Iterator[None]:
        try:
            yield
        except (BaseError, FileNotFoundError) as error:
            raise self._account.problem(error, self.address(path)) from None


class _ObjectFile(io.RawIOBase):
    """A seekable object that is read in ranges, which grow while the reader goes on sequentially."""

    def __init__(self, fetch: Callable[[int, int], memoryview], size: int, first_read: int) -> None:
        self._fetch, self._size, self._first_read = fetch, size, first_read
        self._position = self._start = 0
        self._ahead = first_read // 2
        self._held = memoryview(b"")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"negative position {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Buffer) -> int:
        wanted = memoryview(buffer).cast("B")
        length = min(len(wanted), self._size - self._position)
        if length <= 0:
            return 0
        offset = self._position - self._start
        if not 0 <= offset < len(self._held):
            self._load(length, sequential=offset == len(self._held))
            offset = 0
        piece = self._held[offset : offset + length]
        wanted[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def _load(self, length: int, *, sequential: bool) -> None:
        self._ahead = min(2 * self._ahead, LARGEST_READ) if sequential else self._first_read
        self._held = memoryview(b"")  # let go of the old before the new arrives
        self._held = self._fetch(self._position, min(max(length, self._ahead), self._size - self._position))
        self._start = self._position

    def readall(self) -> bytes:
        position, self._position = min(self._position, self._size), self._size
        return bytes(self._fetch(position, self._size - position)) if position < self._size else b""


def _unlike(name: str, passed: str) -> str:
    """Where to look for names unlike this one, which may be one of millions.

    Past all that go on with a digit where it does (img_:), then past its first letter (j): `passed` is the first
    letter of the name that the last look has passed.
    """
    digit = re.search("[0-9]", name)
    if digit and name[0] != passed:
        return name[: digit.start()] + chr(ord("9") + 1)
    return chr(ord(name[0]) + 1) if name[0] != "\ud7ff" else "\ue000"


def _spans(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The (start, length) of the requests which together hold all ranges, sorted."""
    spans: list[tuple[int, int]] = []
    for start, length in sorted(r for r in ranges if r[1]):
        if spans:
            first, span = spans[-1]
            reach = max(span, start + length - first)
            if start <= first + span + NEAR and (reach == span or reach <= LARGEST_READ):
                spans[-1] = first, reach
                continue
        spans.append((start, length))
    return spans
