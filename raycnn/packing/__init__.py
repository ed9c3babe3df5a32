"""`raycnn pack`: any layout becomes packed shards, as a Ray Data job that streams and resumes by the ledger.

A task writes whole shards and then commits them with a record below `_pack/parts/`; the manifest is made of the
records. Listings are mixed before they are cut into shards, in buckets on disk; sources that can only be read
in sequence are mixed in windows, each of random row groups, spilled to disk and split by the hash of the key.

run         the driver: plan, work, finish
mixing      how a collection becomes mixed tasks
writing     the worker that writes and commits shards
manifest    what the records of all tasks come to
"""

from raycnn.packing.run import PackReport, pack

__all__ = ["PackReport", "pack"]
