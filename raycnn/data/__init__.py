"""Ray Data pipelines, the connection to Ray, and the CPU budget that keeps both from starving."""

from raycnn.data.board import Board, Progress, Waiting
from raycnn.data.budget import Node, Resources, ServePlan, TrainPlan, UnitPlan, plan_serving, plan_training, plan_units
from raycnn.data.cluster import connect, is_connected, resources, session, user_errors
from raycnn.data.feed import FeedBatch, LaneBuffers, decode_piece, join, row_ranges
from raycnn.data.pipelines import map_units, stream

__all__ = [
    "Board",
    "FeedBatch",
    "LaneBuffers",
    "Node",
    "Progress",
    "Resources",
    "ServePlan",
    "TrainPlan",
    "UnitPlan",
    "Waiting",
    "connect",
    "decode_piece",
    "is_connected",
    "join",
    "map_units",
    "plan_serving",
    "plan_training",
    "plan_units",
    "resources",
    "row_ranges",
    "session",
    "stream",
    "user_errors",
]
