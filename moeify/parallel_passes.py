"""The passes that a world of several ranks adds to the pipeline, in the order they are listed."""

from __future__ import annotations

from moeify.passes.base import Pass
from moeify.passes.coordinate_all_to_all import CoordinateAllToAll
from moeify.passes.hierarchical_all_to_all import HierarchicalAllToAll
from moeify.passes.insert_all_to_all import InsertAllToAll
from moeify.passes.join_routers import JoinRouters
from moeify.passes.overlap_chunks import OverlapChunks
from moeify.passes.partition_zero import PartitionZero
from moeify.passes.shard_experts import ShardExperts, share_of
from moeify.passes.slice_experts import SliceExperts

__all__ = ["parallel_passes", "share_of"]


def parallel_passes() -> list[Pass]:
    """Return them; each finds for itself what the plan asks of it."""
    return [
        ShardExperts(),
        InsertAllToAll(),
        CoordinateAllToAll(),
        SliceExperts(),
        OverlapChunks(),
        HierarchicalAllToAll(),
        JoinRouters(),
        PartitionZero(),
    ]
