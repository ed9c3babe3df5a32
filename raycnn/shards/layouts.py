"""Which layout a URL holds: found by looking, and said aloud with the reason."""

import json
from collections.abc import Iterable
from itertools import islice

from raycnn import images
from raycnn.errors import Bad, DataError, Status
from raycnn.shards.collection import SPLIT_NAMES, Collection, is_hidden, is_image_name, is_text, natural_order
from raycnn.shards.containers import TAR_SUFFIXES, TarCollection
from raycnn.shards.idx import IdxCollection
from raycnn.shards.objects import ListCollection, ObjectCollection, parquet_file, path_column, read_table
from raycnn.shards.packed import FORMAT, MANIFEST, WORK, PackedCollection, is_manifest
from raycnn.shards.parquet import ParquetCollection
from raycnn.storage import Store, open_store

LIST_SUFFIXES = (".csv", ".tsv", ".jsonl")
PEEK = 1000
"""Objects looked at below the top level before deciding."""
PEEK_INSIDE = 10
"""Objects without a suffix of which the first bytes are looked at before deciding."""
HEADER_BYTES = 65536
PACK_PLAN = f"{WORK}/plan/g0000.json"
"""What `raycnn pack` writes before anything else, as it writes the manifest after all else."""


def open_collection(url: str, class_names: tuple[str, ...] | None = None) -> Collection:
    """The collection under a URL.

    Args:
        url: A folder or s3:// prefix.
        class_names: What an earlier look at the same collection has found, which spares a look through all labels;
            nobody's names, `()`, where only the images matter.

    Raises:
        DataError: nothing is there, or what is there is ambiguous.
        StorageError: the store cannot be read.
    """
    store = open_store(url)
    folders, files = store.children()
    if (packed := _packed(store, folders, files)) is not None:
        return packed
    folders = [f for f in folders if _counts(f)]
    files = [f for f in files if _counts(f)]
    if not folders and not files:
        raise DataError(f"{store.address()}: no images there; check the path (an s3:// prefix is case-sensitive)")
    for look in (_idx, _lists):
        if (found := look(store, folders, files)) is not None:
            return found
    return _shards(store, files, class_names) or _folders(store, folders, files)


def _counts(name: str) -> bool:
    return is_text(name) and not is_hidden(name)


def _packed(store: Store, folders: list[str], files: list[str]) -> Collection | None:
    data = store.get(MANIFEST) if MANIFEST in files else b""
    if is_manifest(data):
        return PackedCollection(store, json.loads(data))
    if FORMAT.encode() in data:
        raise DataError(f"{store.address(MANIFEST)}: damaged; restore it, or pack the data set to another place")
    if WORK in folders and store.head(PACK_PLAN):
        raise DataError(f"{store.address()}: pack was not finished; run the same `raycnn pack` command again")
    return None


def _idx(store: Store, folders: list[str], files: list[str]) -> Collection | None:
    if not any("-images-idx3-ubyte" in name for name in files):
        return None
    entries = [e for e in store.list() if e.path in files]
    return IdxCollection(store, "it has *-images-idx3-ubyte files", entries, _class_names(store, files))


def _lists(store: Store, folders: list[str], files: list[str]) -> Collection | None:
    lists = [f for f in files if f.endswith(LIST_SUFFIXES)]
    tables = [f for f in files if f.endswith(".parquet")]
    lists += tables if tables and _has_paths(store, tables[0]) else []
    for folder in folders:
        if folder in SPLIT_NAMES:
            _, inside = store.children(folder)
            lists += [f"{folder}/{f}" for f in inside if f.rpartition(".")[0] == "metadata"]
    lists = [f for f in lists if _has_paths(store, f)]
    if not lists:
        return None
    by_split = {f: _split_word(f) for f in lists}
    if len(lists) > 1 and len(set(by_split.values())) < len(lists):
        raise DataError(f"{store.address()}: several lists ({', '.join(lists)}); keep one, or name one for each split")
    return ListCollection(store, by_split, f"{', '.join(lists)} names the images")


def _shards(store: Store, files: list[str], class_names: tuple[str, ...] | None) -> Collection | None:
    paths = [e.path for e in islice(store.list(), PEEK) if _counts(e.path)]
    tables = [p for p in paths if p.endswith(".parquet")]
    tars = [p for p in paths if p.endswith(TAR_SUFFIXES)]
    if not tables and not tars:
        return None
    kinds = [found[0] for found in (tables, tars, _some_image(store, paths)) if found]
    if len(kinds) > 1:
        raise DataError(
            f"{store.address()}: ambiguous: {kinds[0]} and {kinds[1]} are of different layouts, and only one is read; "
            "move one of them elsewhere, or name a folder in which all is of one kind"
        )
    if tables:
        return ParquetCollection(store, "it has Parquet files with an image column", class_names)
    return TarCollection(store, "it has tar files", _class_names(store, files), class_names)


def _some_image(store: Store, paths: Iterable[str]) -> list[str]:
    """One of the objects that is an image by its name or, where that has no suffix, by its first bytes; or none."""
    if named := [p for p in paths if is_image_name(p)]:
        return named[:1]
    bare = [p for p in paths if "." not in p.rpartition("/")[2]][:PEEK_INSIDE]
    return [p for p in bare if _starts_like_an_image(store, p)][:1]


def _starts_like_an_image(store: Store, path: str) -> bool:
    entry = store.head(path)
    if entry is None or not entry.size:
        return False
    start = store.get_ranges(path, [(0, min(entry.size, HEADER_BYTES))], if_match=entry.etag)[0]
    header = images.read_header(start)
    return not isinstance(header, Bad) or header.status is not Status.UNSUPPORTED


def _folders(store: Store, folders: list[str], files: list[str]) -> Collection:
    splits = {f: SPLIT_NAMES[f.lower()] for f in folders if f.lower() in SPLIT_NAMES}
    if "train" in splits.values() and len(splits) < len(folders):
        other = next(f for f in folders if f not in splits)
        raise DataError(
            f"{store.address()}: {', '.join(splits)} are splits, but {other} beside them is none; move it elsewhere"
        )
    if splits and len(splits) == len(folders):
        if len(set(splits.values())) < len(splits):
            where = store.address()
            raise DataError(f"{where}: {', '.join(splits)} name one split twice; keep one folder for each split")
        names = natural_order(c for f in splits for c in store.children(f)[0] if _counts(c))
        reason = f"its folders are named {', '.join(splits)}"
        return ObjectCollection(store, "split/class folders" if names else "split folders", reason, names, splits)
    # A readme or a licence beside class folders does not make the folders mean nothing.
    if folders and not _some_image(store, files):
        reason = f"no image lies beside its {len(folders)} folder{'s' if len(folders) > 1 else ''}"
        return ObjectCollection(store, "class folders", reason, natural_order(folders))
    return ObjectCollection(store, "flat prefix", "images lie at its top level")


def _class_names(store: Store, files: Iterable[str]) -> tuple[str, ...]:
    """The lines of `classes.txt`, or nothing where there is none."""
    if "classes.txt" not in files:
        return ()
    return parse_class_names(store.get("classes.txt"), store.address("classes.txt"))


def parse_class_names(data: bytes, where: str) -> tuple[str, ...]:
    """One class name a line, in the order of the classes; empty lines do not count.

    Raises:
        DataError: the text is not UTF-8, or a name stands twice.
    """
    try:
        names = tuple(line.strip() for line in data.decode("utf-8-sig").splitlines() if line.strip())
    except UnicodeDecodeError:
        raise DataError(f"{where}: not UTF-8 text; save it as UTF-8, one class name a line") from None
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{where}: {twice[0]!r} stands twice; give every class its own name")
    return names


def _has_paths(store: Store, name: str) -> bool:
    """Whether a table names images, rather than holding them or being about something else."""
    if name.endswith(".parquet"):
        return path_column(parquet_file(store, name).schema_arrow) is not None
    return path_column(read_table(store, name).schema) is not None


def _split_word(path: str) -> str:
    stem = path.rpartition("/")[2].rpartition(".")[0].lower()
    folder = path.rpartition("/")[0].lower()
    return SPLIT_NAMES.get(stem) or SPLIT_NAMES.get(folder, "")
