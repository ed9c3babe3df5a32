"""Turn images into packed shards, on a cluster.

    ray job submit --working-dir jobs -- python pack.py s3://bucket/images s3://bucket/packed --val 0.1 --test 0.1

The flags are those of `raycnn pack`. The same command again resumes, or finds nothing to do.
Paths have to mean the same on every node: s3://, or a folder that all of them share.
"""

import sys

from raycnn import cli

if __name__ == "__main__":
    cli.main(["pack", *sys.argv[1:]])
