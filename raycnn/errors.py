"""The exception tree, the exit codes, and the outcome of one image.

    RaycnnError                 exit
     + ConfigError               2   a flag, key or argument is wrong; raised before any work
     + DataError                 3   the data is missing, unreadable as a whole, or too bad
     + BundleError               4   a bundle is incomplete, altered or does not fit
     + StorageError              5   the store cannot be reached, or refuses
        + ObjectMissing          5   one object does not exist
        + ObjectChanged          5   one object is not the version that was planned

A failure of one image is not an exception but a value: `Bad(status, detail)`. Exit code 1 is a bug or
infrastructure, and keeps its traceback.
"""

from enum import StrEnum
from typing import ClassVar, NamedTuple


class RaycnnError(Exception):
    """Something a user can mend: one line that says what is wrong, where, and what to do.

    Subclasses take the message as their only argument, so that every one of them survives pickling on its
    way out of a Ray worker.
    """

    exit_code: ClassVar[int] = 1


class ConfigError(RaycnnError):
    """A flag, a configuration key or an argument is wrong."""

    exit_code = 2


class DataError(RaycnnError):
    """The data is missing, unreadable as a whole, or has too many bad images."""

    exit_code = 3


class BundleError(RaycnnError):
    """A bundle is incomplete, was altered, or does not fit what it is used for."""

    exit_code = 4


class StorageError(RaycnnError):
    """The store cannot be reached, refuses, or cannot keep the promises that are asked of it."""

    exit_code = 5


class ObjectMissing(StorageError):
    """One object does not exist (any more)."""


class ObjectChanged(StorageError):
    """One object is no longer the version whose ETag was asked for."""


class Status(StrEnum):
    """What became of one image. The words are the same in packed data, label files and HTTP replies."""

    OK = "ok"
    EMPTY = "empty"
    TRUNCATED = "truncated"
    UNDECODABLE = "undecodable"
    UNSUPPORTED = "unsupported"
    TOO_LARGE = "too_large"
    TIMEOUT = "timeout"
    CRASHED = "crashed"
    MISSING = "missing"
    CHANGED = "changed"
    UNREADABLE = "unreadable"


class Bad(NamedTuple):
    """The outcome of an image that has no pixels: why (`status`, never OK) and what the decoder said."""

    status: Status
    detail: str
