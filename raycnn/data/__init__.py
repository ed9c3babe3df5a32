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
from raycnn.data.cache import Cache, Geometry, geometry_of, open_cache
from raycnn.data.cluster import call_early, connect, is_connected, resources, session, user_errors
from raycnn.data.decoding import Decoder, groups, read_ahead
from raycnn.data.feed import Block, FeedBatch, LaneBuffers, decode, items_of, join, row_ranges, through_cache
from raycnn.data.pipelines import UnitWorker, map_units, stream

__all__ = [
    "Block",
    "Board",
    "Cache",
    "Decoder",
    "FeedBatch",
    "Geometry",
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
    "decode",
    "geometry_of",
    "groups",
    "is_connected",
    "items_of",
    "join",
    "map_units",
    "open_cache",
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
    "through_cache",
    "user_errors",
]
