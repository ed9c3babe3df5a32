"""What every store can do, whatever lies behind it."""

import abc
import builtins
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from raycnn.errors import StorageError


class Entry(NamedTuple):
    """One object: its path relative to the store's root ('/'-separated), its size in bytes, its version."""

    path: str
    size: int
    etag: str


class Store(abc.ABC):
    """Objects below one URL. Thread-safe; pickles as its URL and connects again where it is unpickled.

    Every method raises StorageError with one line (where, cause, remedy) if the store cannot be reached or
    refuses. Reading methods raise ObjectMissing, and ObjectChanged where `if_match` is not the object's ETag.
    """

    url: str
    """What `open_store` takes to open this store again: canonical, options included, no trailing slash."""

    @property
    @abc.abstractmethod
    def is_local(self) -> bool:
        """Whether the objects are files on this machine."""

    @abc.abstractmethod
    def address(self, path: str = "") -> str:
        """What a person calls the object (or the root): the URL without options."""

    @abc.abstractmethod
    def child(self, path: str) -> "Store":
        """The store whose root is `path` below this one's."""

    @abc.abstractmethod
    def list(self, prefix: str = "") -> Iterator[Entry]:
        """The objects whose path starts with the string `prefix`, in byte order of the path, streamed.

        A prefix with nothing below it lists nothing. Folder markers are listed; their path ends with '/'.
        """

    @abc.abstractmethod
    def children(self, folder: str = "") -> tuple[builtins.list[str], builtins.list[str]]:
        """The names of the folders and of the objects directly below a folder, sorted.

        On S3, where the first 10,000 names are all objects, more of their like are passed over: what is looked at
        are the first names that do not go on with a digit where they do, and the first with each other letter.
        """

    @abc.abstractmethod
    def head(self, path: str) -> Entry | None:
        """The object's size and ETag, or None where it does not exist."""

    @abc.abstractmethod
    def get(self, path: str, *, if_match: str | None = None) -> bytes:
        """The whole object."""

    @abc.abstractmethod
    def get_ranges(
        self, path: str, ranges: Sequence[tuple[int, int]], *, if_match: str | None = None
    ) -> builtins.list[bytes]:
        """The bytes of each (start, length), in the order asked for; ranges near each other share a request."""

    @abc.abstractmethod
    def open(self, path: str, *, if_match: str | None = None) -> BinaryIO:
        """The object as a seekable file; only what is read is fetched, buffered. It is one version throughout."""

    @abc.abstractmethod
    def stream(self, path: str, *, if_match: str | None = None) -> BinaryIO:
        """The object as a file for reading from begin to end; memory does not grow with the object."""

    @abc.abstractmethod
    def put(self, path: str, data: bytes) -> Entry:
        """Write the object, over what is there: it is visible as a whole or not at all."""

    @abc.abstractmethod
    def put_file(self, path: str, file: Path) -> Entry:
        """Write the contents of a local file, over what is there, in parts where it is large."""

    @abc.abstractmethod
    def create(self, path: str, data: bytes) -> bool:
        """Write the object unless it exists. Among all who ever try, on all machines, one gets True.

        A request whose answer was lost is repeated; where it had succeeded, the repetition finds the object
        and the result is False, as if somebody else had written it.
        """

    @abc.abstractmethod
    def single_driver(self) -> "Store":
        """This store, on the user's promise that no other run writes there.

        Where it has no conditional PUT, `create` then looks first and writes after. The promise is part of `url`.
        """

    def probe_create_once(self, path: str, data: bytes) -> None:
        """Prove on an object which exists, and holds `data`, that a second create is refused.

        Raises:
            StorageError: the store overwrites what it should keep.
        """
        # Two tries, because the first one legitimately succeeds where the object was not there after all.
        if self.create(path, data) and self.create(path, data):
            raise self._overwrites("ignores")

    def _overwrites(self, how: str) -> StorageError:
        return StorageError(
            f"{self.address()}: this store {how} If-None-Match, so that two runs could overwrite each other's "
            "results: use a store with conditional PUT (AWS S3, SeaweedFS from 4.17) or a local folder, or promise "
            "that nobody else writes there: append ?single_driver to its URL, or label with --single-driver"
        )


def without_userinfo(text: str) -> str:
    """The text without the user and password in its URLs."""
    return re.sub(r"(^|//)[^/\s]*@", r"\1", text)
