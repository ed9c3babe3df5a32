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

import re
import sys
from collections.abc import Iterator, Mapping
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


def unwrap(error: BaseException) -> RaycnnError | None:
    """The RaycnnError that a worker raised and Ray wrapped on its way here; None if it was something else."""
    pending, seen = [error], set()
    while pending:
        error = pending.pop(0)
        if id(error) in seen:
            continue
        seen.add(id(error))
        # What Ray raises for a task inherits from the error's class as well, but its text is a traceback.
        if isinstance(error, RaycnnError) and not hasattr(error, "cause"):
            return error
        if type(error).__module__.startswith("ray.") and (quoted := _quoted(str(error))):
            return quoted
        pending += _wrapped(error)
    return None


def one_line(said: object) -> str:
    """What an error says, without its line breaks."""
    return " ".join(str(said).split())


def in_words(statuses: Mapping[str, int]) -> str:
    """How many images have which status."""
    return ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))


def _wrapped(error: BaseException) -> Iterator[BaseException]:
    failures = getattr(error, "worker_failures", None) or {}
    names = ("cause", "controller_failure", "__cause__")
    for inner in (*(getattr(error, name, None) for name in names), *failures.values()):
        if isinstance(inner, BaseException):
            yield inner


def _quoted(text: str) -> RaycnnError | None:
    """What a traceback's text ends with: all that Ray Data and actor constructors leave of one."""
    last = text.rpartition("During handling of the above exception, another exception occurred")[2]
    found = re.findall(r"^raycnn\.errors\.(\w+): (.+)$", last, re.MULTILINE)
    if not found:
        return None
    name, message = found[-1]
    return getattr(sys.modules[__name__], name)(message)
