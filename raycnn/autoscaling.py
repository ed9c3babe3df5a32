"""Which node type the autoscaler of `cluster.yaml` starts next.

Ray's autoscaler calls `spot_first` on the head node, which names it in `RAY_AUTOSCALER_UTILIZATION_SCORER`.
Without it, Ray 2.60 knows that the cloud has just refused a spot node, and asks for the same one for ever:
its first autoscaler leaves that knowledge out of the score, its second one does not gather it on AWS.
"""

from typing import Any

from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer
from ray.autoscaler._private.util import ResourceDict

ON_DEMAND = "-on-demand"


def spot_first(
    node_resources: ResourceDict,
    resources: list[ResourceDict],
    node_type: str,
    *,
    node_availability_summary: NodeAvailabilitySummary,
) -> tuple[Any, ...] | None:
    """Ray's own score, and behind it what decides between node types that fit equally well.

    A type that the cloud has refused comes last for 30 minutes (`AUTOSCALER_NODE_AVAILABILITY_MAX_STALENESS_S`);
    otherwise a type whose name ends in `-on-demand` does.

    Returns:
        A tuple, the highest is started; None where the type has no room for any of the resources.
    """
    score = _default_utilization_scorer(
        node_resources, resources, node_type, node_availability_summary=node_availability_summary
    )
    if score is None:
        return None
    record = node_availability_summary.node_availabilities.get(node_type)
    return *score, record is None or record.is_available, not node_type.endswith(ON_DEMAND)
