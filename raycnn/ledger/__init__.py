"""The exactly-once protocol: plan, pending, commit, finish, verify. It knows no Ray and no images.

    plan/pages/<sha256>.parquet      which slices each unit holds; content-named, written first
    plan/g0000.json                  generation 0; created once, names its pages, selection and fingerprint
    labels/fp=<12 hex>/part-g0000-000000.parquet     one per unit; created once: the data and the commit
    _SUCCESS-g0000.json              created once when nothing is pending

An object that exists is never written again, renamed or deleted, so there is no state to repair: pending is
the plan less the listing. Whoever loses a race to create an object uses the winner's.

pages            which slices each unit holds
protocol         plan, pending, commit, finish
growth           what a collection has got since it was planned
verification     `raycnn verify`
"""

from raycnn.ledger.growth import Growth, new_slices
from raycnn.ledger.pages import ALTERED
from raycnn.ledger.protocol import (
    EMBEDDING_PARTS,
    LABEL_PARTS,
    Ledger,
    Plan,
    UnitRef,
    fingerprint_id,
    label_ledger,
    plan_path,
    success_path,
)
from raycnn.ledger.verification import VerifyReport, verify

__all__ = [
    "ALTERED",
    "EMBEDDING_PARTS",
    "LABEL_PARTS",
    "Growth",
    "Ledger",
    "Plan",
    "UnitRef",
    "VerifyReport",
    "fingerprint_id",
    "label_ledger",
    "new_slices",
    "plan_path",
    "success_path",
    "verify",
]
