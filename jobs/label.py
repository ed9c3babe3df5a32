"""Give every image a label, on a cluster.

    ray job submit --working-dir jobs -- python label.py s3://bucket/images s3://bucket/labels --bundle s3://bucket/run/bundle

The flags are those of `raycnn label`. The same command again resumes, or finds nothing to do.
Paths have to mean the same on every node: s3://, or a folder that all of them share.
"""

import sys

from raycnn import cli

if __name__ == "__main__":
    cli.main(["label", *sys.argv[1:]])
