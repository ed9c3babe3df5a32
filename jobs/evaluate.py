"""Count how a bundle does on labelled images, on a cluster.

    ray job submit --working-dir jobs -- python evaluate.py s3://bucket/run/bundle s3://bucket/packed --json

The flags are those of `raycnn evaluate`. It writes nothing.
Paths have to mean the same on every node: s3://, or a folder that all of them share.
"""

import sys

from raycnn import cli

if __name__ == "__main__":
    cli.main(["evaluate", *sys.argv[1:]])
