"""A local folder as a store."""

import builtins
import contextlib
import errno
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from typing_extensions import override

from raycnn.errors import ObjectChanged, ObjectMissing, StorageError
from raycnn.storage.base import Entry, Store

TEMPORARY = ".raycnn-tmp-"
"""Begins the names of files that are being written; they are not objects."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


class LocalStore(Store):
    """The files below a folder. The ETag of a file is its size, modification time and inode."""

    def __init__(self, root: str) -> None:
        self.url = os.path.abspath(root)

    def __reduce__(self) -> tuple[type["LocalStore"], tuple[str]]:
        return LocalStore, (self.url,)

    @property
    @override
    def is_local(self) -> bool:
        return True

    @override
    def address(self, path: str = "") -> str:
        return os.path.join(self.url, path) if path else self.url

    @override
    def child(self, path: str) -> "LocalStore":
        return LocalStore(self._file(path))

    @override
    def list(self, prefix: str = "") -> Iterator[Entry]:
        folder, slash, start = prefix.rpartition("/")
        return self._walk(folder + slash, start, frozenset())

    def _walk(self, folder: str, start: str, above: frozenset[tuple[int, int]]) -> Iterator[Entry]:
        """The files below a folder ('' or ending with '/') whose name there begins with `start`.

        Sorting names with the folders' slash gives the order of whole paths, in which 'a.b' precedes 'a/b'.
        """
        with _explained(self.address(folder)):
            try:
                here = os.stat(self._file(folder))
                names = self._names(folder, start)
            except (FileNotFoundError, NotADirectoryError):
                self._check_root()
                return
        identity = (here.st_dev, here.st_ino)
        if identity in above:  # a link to a folder that it lies in
            return
        for name in names:
            if name.endswith("/"):
                yield from self._walk(folder + name, "", above | {identity})
            elif entry := self._entry(folder + name):
                yield entry

    def _names(self, folder: str, start: str = "") -> builtins.list[str]:
        """The sorted names directly in a folder; those of folders end with '/'."""
        with os.scandir(self._file(folder)) as children:
            names = [
                child.name + "/" if child.is_dir() else child.name
                for child in children
                if child.name.startswith(start) and not child.name.startswith(TEMPORARY)
            ]
        for name in names:
            if not name.isascii():
                _check_utf8(name, self.address(folder))
        return sorted(names)

    def _check_root(self) -> None:
        if os.path.isfile(self.url):
            raise StorageError(f"{self.url}: is a file; name the folder that it lies in")

    def _entry(self, path: str) -> Entry | None:
        """The file as it is listed; None for devices, pipes and sockets, and for what has just gone."""
        try:
            found = os.stat(self._file(path))
        except OSError as error:
            if error.errno not in _ABSENT:
                raise _problem(error, self.address(path)) from None
            # A link to nothing is an object that cannot be read, rather than a silent gap.
            return Entry(path, 0, "missing") if os.path.islink(self._file(path)) else None
        return Entry(path, found.st_size, _etag(found)) if stat.S_ISREG(found.st_mode) else None

    @override
    def children(self, folder: str = "") -> tuple[builtins.list[str], builtins.list[str]]:
        folder = folder.rstrip("/") + "/" if folder else ""
        with _explained(self.address(folder)):
            try:
                names = self._names(folder)
            except (FileNotFoundError, NotADirectoryError):
                self._check_root()
                return [], []
        folders = sorted(name[:-1] for name in names if name.endswith("/"))
        return folders, [name for name in names if not name.endswith("/")]

    @override
    def head(self, path: str) -> Entry | None:
        with _explained(self.address(path)):
            try:
                found = os.stat(self._file(path))
            except (FileNotFoundError, NotADirectoryError):
                return None
        return Entry(path, found.st_size, _etag(found)) if stat.S_ISREG(found.st_mode) else None

    @override
    def get(self, path: str, *, if_match: str | None = None) -> bytes:
        with self.open(path, if_match=if_match) as file, _explained(self.address(path)):
            data = file.read()
            # A writer that does not replace the file, but changes it while it is read, must not go unseen.
            self._check(path, os.fstat(file.fileno()), if_match)
            return data

    @override
    def get_ranges(
        self, path: str, ranges: Sequence[tuple[int, int]], *, if_match: str | None = None
    ) -> builtins.list[bytes]:
        with self.open(path, if_match=if_match) as file, _explained(self.address(path)):
            found = [os.pread(file.fileno(), length, start) for start, length in ranges]
            self._check(path, os.fstat(file.fileno()), if_match)
        for data, (start, length) in zip(found, ranges, strict=True):
            if len(data) != length:
                raise StorageError(f"{self.address(path)}: ends before byte {start + length:,}; is it whole?")
        return found

    @override
    def open(self, path: str, *, if_match: str | None = None) -> BinaryIO:
        with _explained(self.address(path)):
            file = open(self._file(path), "rb", opener=_without_waiting)  # noqa: SIM115
            try:
                found = os.fstat(file.fileno())
                if not stat.S_ISREG(found.st_mode):
                    raise ObjectMissing(f"{self.address(path)}: not a file")
                self._check(path, found, if_match)
            except BaseException:
                file.close()
                raise
            return file

    @override
    def stream(self, path: str, *, if_match: str | None = None) -> BinaryIO:
        return self.open(path, if_match=if_match)

    def _check(self, path: str, found: os.stat_result, if_match: str | None) -> None:
        if if_match is not None and _etag(found) != if_match:
            raise ObjectChanged(f"{self.address(path)}: was changed or replaced since it was listed")

    @override
    def put(self, path: str, data: bytes) -> Entry:
        with _explained(self.address(path), len(data)), self._temporary(path) as temporary:
            _write(temporary, data)
            return self._publish(temporary, path)

    @override
    def put_file(self, path: str, file: Path) -> Entry:
        size = file.stat().st_size
        with _explained(self.address(path), size), self._temporary(path) as temporary:
            shutil.copyfile(file, temporary)
            _sync(temporary)
            return self._publish(temporary, path)

    @override
    def create(self, path: str, data: bytes) -> bool:
        target = self._file(path)
        with _explained(self.address(path), len(data)):
            if os.path.lexists(target):  # saves the writing; what decides is the link
                return _exists(target)
            with self._temporary(path) as temporary:
                _write(temporary, data)
                try:
                    os.link(temporary, target)
                except FileExistsError:
                    return _exists(target)
                except OSError as error:
                    if error.errno in _NO_LINKS:
                        raise StorageError(
                            f"{self.url}: its file system cannot make hard links, which create-once "
                            "needs: use a folder on a local disk, or S3"
                        ) from None
                    raise
            _sync(os.path.dirname(target))
            return True

    @override
    def single_driver(self) -> "LocalStore":
        return self  # it creates once whoever else writes

    def _publish(self, temporary: str, path: str) -> Entry:
        target = self._file(path)
        found = os.stat(temporary)
        os.replace(temporary, target)
        _sync(os.path.dirname(target))
        return Entry(path, found.st_size, _etag(found))

    @contextlib.contextmanager
    def _temporary(self, path: str) -> Iterator[str]:
        """The name of a file beside the target that is gone afterwards, whatever happens."""
        folder = os.path.dirname(self._file(path))
        os.makedirs(folder, exist_ok=True)
        temporary = os.path.join(folder, TEMPORARY + uuid.uuid4().hex)
        try:
            yield temporary
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)

    def _file(self, path: str) -> str:
        if path.startswith("/") or "\0" in path or ".." in path.split("/"):
            raise StorageError(f"{self.url}: {path!r} is no path below this folder; correct it where it is named")
        return os.path.join(self.url, path)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder on this machine's disk, gone at the end.

    Raises:
        StorageError: the disk is full.
    """
    with tempfile.TemporaryDirectory(prefix="raycnn-") as folder:
        try:
            yield Path(folder)
        except OSError as error:
            if error.errno in _FULL:
                raise StorageError(
                    f"disk full: cannot write to the temporary folder {folder} ({error.strerror}); "
                    "free some space, or set TMPDIR to a larger disk"
                ) from None
            raise


def _etag(found: os.stat_result) -> str:
    return f"{found.st_size}-{found.st_mtime_ns}-{found.st_ino}"


def _without_waiting(name: str, flags: int) -> int:
    """An opener which does not hang on a pipe that nobody writes to."""
    return os.open(name, flags | os.O_NONBLOCK)


def _write(name: str, data: bytes) -> None:
    with open(name, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(name: str) -> None:
    handle = os.open(name, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exists(target: str) -> bool:
    """False, as `create` returns it for an object that is there; a folder in its place is a mistake."""
    if os.path.isdir(target):
        raise StorageError(f"{target}: is a folder, where a file is to be written; move it away")
    return False


def _check_utf8(name: str, where: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise StorageError(
            f"{where}: the file name {os.fsencode(name)!r} is not UTF-8; rename it (convmv does whole folders)"
        ) from None


@contextlib.contextmanager
def _explained(address: str, size: int | None = None) -> Iterator[None]:
    """Raise what the operating system says as one of our errors; `size` where bytes are to be written."""
    try:
        yield
    except OSError as error:
        raise _problem(error, address, size) from None


def _problem(error: OSError, address: str, size: int | None = None) -> StorageError:
    if error.errno in _FULL:
        return StorageError(
            f"disk full: cannot write {size or 0:,} bytes to {address} ({error.strerror}); "
            "free some space, or name another folder"
        )
    if error.errno in _REFUSED:
        return StorageError(f"{address}: {error.strerror}; check its owner and permissions")
    if size is not None and error.errno in {errno.ENOTDIR, errno.EISDIR, errno.EEXIST}:
        return StorageError(f"{address}: cannot be written ({error.strerror}); name a folder that is free")
    if error.errno in _ABSENT:
        return ObjectMissing(f"{address}: does not exist; check the path")
    return StorageError(f"{address}: {error.strerror or error}; check the disk and the path")
