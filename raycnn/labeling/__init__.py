"""`raycnn label`: exactly one row for every image, by the ledger's protocol, through Ray Data.

facts     what decides a row, and what the driver has to know of the bundle
rows      what a row is: schema and tables
counts    what rows count up to
fused     one process per CPU reads, decodes, predicts and commits whole units
staged    tasks decode, actors with a GPU predict batches across units, the driver gathers units and commits
speed     where the time goes, and how near it comes to the floor of the machine
run       the driver: plan, work, finish
"""

from raycnn.labeling.report import LabelReport
from raycnn.labeling.run import label

__all__ = ["LabelReport", "label"]
