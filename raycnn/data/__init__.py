"""Ray Data pipelines, the connection to Ray, and the CPU budget that keeps both from starving."""

from raycnn.data.board import Board, Progress, Waiting
from raycnn.data.budget import Node, Resources, TrainPlan, UnitPlan, plan_training, plan_units
from raycnn.data.cluster import connect, resources, user_errors
from raycnn.data.feed import FeedBatch, LaneBuffers, decode_piece, join, row_ranges
from raycnn.data.pipelines import map_units, stream

__all__ = [
    "Board",
    "FeedBatch",
    "LaneBuffers",
    "Node",
    "Progress",
    "Resources",
    "TrainPlan",
    "UnitPlan",
    "Waiting",
    "connect",
    "decode_piece",
    "join",
    "map_units",
    "plan_training",
    "plan_units",
    "resources",
    "row_ranges",
    "stream",
    "user_errors",
]
