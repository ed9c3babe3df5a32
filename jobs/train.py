"""Train a classifier, on a cluster.

    ray job submit --working-dir jobs -- python train.py s3://bucket/packed s3://bucket/run --num-workers 4

The flags are those of `raycnn train`. The same command again resumes, or finds nothing to do.
Paths have to mean the same on every node: s3://, or a folder that all of them share.
"""

import sys

from raycnn import cli

if __name__ == "__main__":
    cli.main(["train", *sys.argv[1:]])
