"""Where data lies: a local folder or an S3 prefix, behind one URL.

/path/to/folder, relative/folder, file:///path/to/folder
s3://bucket/prefix           endpoint and credentials as AWS's own tools find them, AWS_ENDPOINT_URL too
s3://bucket/prefix?anonymous         a public bucket
s3://bucket/prefix?requester_pays    a bucket whose reader pays
s3://bucket/prefix?single_driver     a store without conditional PUT, where nobody else writes: you promise it
"""

import os
import re
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from raycnn.config import absolute, nearest
from raycnn.errors import ConfigError
from raycnn.storage.base import Entry, Store, without_userinfo
from raycnn.storage.local import LocalStore, scratch_folder
from raycnn.storage.s3 import OPTIONS, S3Store

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

__all__ = ["Entry", "Store", "contains", "file_at", "fsspec_filesystem", "open_store", "scratch_folder"]


def open_store(url: str | os.PathLike[str]) -> Store:
    """The store at a URL or path. Nothing is asked of it yet: what does not exist is an empty store.

    Raises:
        ConfigError: the URL is malformed, or of a kind that is not supported.
    """
    url = os.fspath(url)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/", url)
    if not url:
        raise ConfigError("an empty URL: name a folder or s3://bucket/prefix")
    if scheme is None:
        return LocalStore(os.path.expanduser(url))
    if url.startswith("file://"):
        return LocalStore(unquote(urlsplit(url).path))
    if url.startswith("s3://"):
        return _open_s3(url)
    raise ConfigError(
        f"{without_userinfo(url)}: {scheme[1]}: is not supported; use a folder, or s3:// with AWS_ENDPOINT_URL"
    )


def file_at(url: str) -> tuple[Store, str]:
    """The store that holds one file, and the file's path there."""
    path, mark, options = absolute(url).partition("?")
    folder, _, leaf = path.rpartition("/")
    return open_store((folder or "/") + mark + options), leaf


def _open_s3(url: str) -> S3Store:
    bucket = re.split("[/?]", url.removeprefix("s3://"))[0]
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}", bucket):
        if ":" in bucket or "@" in bucket:  # which is not shown: a secret key may go on behind a slash
            raise ConfigError(
                "credentials have no place in an s3:// URL, whose form is s3://bucket/prefix: "
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            )
        raise ConfigError(f"{url}: {bucket!r} is no bucket name; the form is s3://bucket/prefix")
    location, options = _split_options(url)
    prefix = location.removeprefix("s3://").partition("/")[2].strip("/")
    if prefix and any(part in {"", ".", ".."} for part in prefix.split("/")):
        raise ConfigError(f"{url}: the prefix has an empty, '.' or '..' part; write it out")
    return S3Store(bucket, prefix, options)


def _split_options(url: str) -> tuple[str, set[str]]:
    """The URL without its options, and those; any other '?' is part of a key."""
    location, mark, query = url.rpartition("?")
    options = set(query.split("&"))
    if not mark or not re.fullmatch(r"[a-z_]+(&[a-z_]+)*", query):
        return url, set()
    for option in options.difference(OPTIONS):
        raise ConfigError(f"{url}: unknown option {option!r}{nearest(option, OPTIONS)}; there are {OPTIONS}")
    return location, options


def contains(outer: str, inner: str) -> bool:
    """Whether the inner URL is the outer one, or lies below it. Links in local paths are followed."""
    around, within = (_place(open_store(url)) for url in (outer, inner))
    return within == around or within.startswith(around.rstrip("/") + "/")


def _place(store: Store) -> str:
    return os.path.realpath(store.address()) if store.is_local else store.address()


def fsspec_filesystem(url: str) -> "tuple[AbstractFileSystem, str]":
    """An fsspec file system with the same endpoint and credentials, and the URL's path in it.

    For pandas, DuckDB, datasets and whatever else takes one.
    """
    store = open_store(url)
    if isinstance(store, S3Store):
        return store.fsspec_filesystem()
    from fsspec.implementations.local import LocalFileSystem

    return LocalFileSystem(), store.address()
