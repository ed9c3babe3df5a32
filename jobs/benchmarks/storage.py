"""One local S3 server: reading one large object, listing many keys, and creating one key in a race."""

import argparse
import os
import statistics
from typing import Any

from benchmarks.measuring import wall_seconds

OBJECT_BYTES = 64 * 1024 * 1024
KEYS = 4096
RACERS = 16


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """One local S3 server: reading one large object, listing many keys, and creating one key in a race."""
    from concurrent.futures import ThreadPoolExecutor

    import obstore
    import pyarrow.fs

    from raycnn.s3local import S3Server
    from raycnn.storage import fsspec_filesystem, open_store

    with S3Server() as server:
        os.environ.update(server.environment())
        server.create_bucket("bench")
        store = open_store("s3://bench/bench")
        store.put("large", os.urandom(OBJECT_BYTES))
        with ThreadPoolExecutor(RACERS) as pool:
            list(pool.map(lambda i: store.put(f"keys/{i % 7}/{i:06d}.jpg", b"x"), range(KEYS)))
            races = [sum(pool.map(lambda _, r=r: store.create(f"race/{r}", b"x"), range(RACERS))) for r in range(60)]
        bare = obstore.store.S3Store(
            "bench", endpoint=server.endpoint, client_options={"allow_http": True}, virtual_hosted_style_request=False
        )
        arrow = pyarrow.fs.S3FileSystem(
            access_key=server.access_key, secret_key=server.secret_key, endpoint_override=server.endpoint
        )
        s3fs, _ = fsspec_filesystem("s3://bench/bench")
        below = pyarrow.fs.FileSelector("bench/bench/keys", recursive=True)
        reads = wall_seconds(
            {
                "raycnn.storage": lambda: store.get("large"),
                "pyarrow": lambda: arrow.open_input_file("bench/bench/large").read(),
                "s3fs": lambda: s3fs.cat_file("bench/bench/large"),
            }
        )
        lists = wall_seconds(
            {
                "raycnn.storage": lambda: list(store.list("keys/")),
                "obstore": lambda: [e for page in bare.list("bench/keys/") for e in page],
                "pyarrow, without ETags": lambda: arrow.get_file_info(below),
                "s3fs": lambda: s3fs.find("bench/bench/keys", detail=True),
            }
        )
    megabytes = OBJECT_BYTES / 1e6
    return {
        "object_bytes": OBJECT_BYTES,
        "keys": KEYS,
        "read_mb_per_s": {name: round(megabytes / statistics.median(taken), 1) for name, taken in reads.items()},
        "list_keys_per_s": {name: round(KEYS / statistics.median(taken)) for name, taken in lists.items()},
        "races": {"creators": RACERS, "rounds": len(races), "rounds_with_one_winner": races.count(1)},
        "samples_s": {"read": reads, "list": lists},
    }
