"""Every input layout, the packed format, and the manifest: where samples come from.

open_collection(url) -> Collection     slices(): what to read, pinned     read(slices): samples
"""

from raycnn.shards.collection import (
    SPLITS,
    UNIT_BYTES,
    Collection,
    Sample,
    Slice,
    hash_split,
    key_hash,
    path_order,
    units,
)
from raycnn.shards.labels import GivenLabels, read_labels
from raycnn.shards.layouts import open_collection, parse_class_names
from raycnn.shards.packed import (
    FORMAT,
    MANIFEST,
    UNREADABLE,
    VERSION,
    WORK,
    PackedCollection,
    PackedRow,
    is_manifest,
    summarise,
    write_shard,
)

__all__ = [
    "FORMAT",
    "MANIFEST",
    "SPLITS",
    "UNIT_BYTES",
    "UNREADABLE",
    "VERSION",
    "WORK",
    "Collection",
    "GivenLabels",
    "PackedCollection",
    "PackedRow",
    "Sample",
    "Slice",
    "hash_split",
    "is_manifest",
    "key_hash",
    "open_collection",
    "parse_class_names",
    "path_order",
    "read_labels",
    "summarise",
    "units",
    "write_shard",
]
