"""Ray Data pipelines, the connection to Ray, and the CPU budget that keeps both from starving."""

from raycnn.data.board import Board, Progress, Waiting
from raycnn.data.budget import (
    Node,
    Resources,
    ServePlan,
    StagePlan,
    TrainPlan,
    UnitPlan,
    plan_elastic,
    plan_serving,
    plan_stages,
    plan_training,
    plan_units,
)
from raycnn.data.cluster import call_early, connect, is_connected, resources, session, user_errors
from raycnn.data.decoding import Decoder, groups, read_ahead
from raycnn.data.feed import FeedBatch, LaneBuffers, decode_piece, join, row_ranges
from raycnn.data.pipelines import UnitWorker, map_units, stream

__all__ = [
    "Board",
    "Decoder",
    "FeedBatch",
    "LaneBuffers",
    "Node",
    "Progress",
    "Resources",
    "ServePlan",
    "StagePlan",
    "TrainPlan",
    "UnitPlan",
    "UnitWorker",
    "Waiting",
    "call_early",
    "connect",
    "decode_piece",
    "groups",
    "is_connected",
    "join",
    "map_units",
    "plan_elastic",
    "plan_serving",
    "plan_stages",
    "plan_training",
    "plan_units",
    "read_ahead",
    "resources",
    "row_ranges",
    "session",
    "stream",
    "user_errors",
]
