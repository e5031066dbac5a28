"""A model of how long a step takes: compute, transfers, and how much of these is waited for."""

from collections.abc import Mapping
from dataclasses import dataclass

from dtcp.distributed.mesh import Degrees
from dtcp.planner.axis_bytes import AxisBytes
from dtcp.planner.cluster import Cluster
from dtcp.planner.forecast import Forecast, RankForecast
from dtcp.planner.sharded_weights import sharding_ranks
from dtcp.softmax import HybridAttention, RingAttention


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the busiest rank.

    Args:
        matmuls, mixers: compute.
        exposed: transfers that compute does not hide, by axis; fsdp's are of all weights.
    """

    matmuls: float
    mixers: float
    exposed: dict[str, float]

    @property
    def total(self) -> float:
        return self.matmuls + self.mixers + sum(self.exposed.values())

    @property
    def bound(self) -> str:
        """What takes most of the time."""
        parts = {"matmuls": self.matmuls, "attention": self.mixers}
        parts |= {f"{axis} transfers": seconds for axis, seconds in self.exposed.items()}
        return max(parts, key=lambda name: parts[name])


def step_time(forecast: Forecast, cluster: Cluster) -> StepTime:
    """The model: rates of the cluster over the numbers of the forecast."""
    setup = forecast.setup
    times = setup.micro_batches
    matmuls = sum(forecast.matmul_flops.values()) * times / (cluster.flops * cluster.matmul)
    rate = cluster.flops * cluster.mixer
    ranks = [
        (rank.flops * times / rate, _cp_seconds(forecast, rank, cluster)) for rank in forecast.ranks
    ]
    # All wait for the slowest; its compute and its transfers are one rank's.
    ring = isinstance(setup.attention, RingAttention) or (
        isinstance(setup.attention, HybridAttention)
        and isinstance(setup.attention.outer, RingAttention)
    )
    mixers, cp = max(ranks, key=lambda pair: max(pair) if ring else sum(pair))
    degrees = setup.degrees
    tp = _seconds(forecast.by_axis.get("tp", AxisBytes()), degrees.tp, 1, cluster)
    fsdp = weight_seconds(forecast.by_axis, degrees, cluster)
    exposed = {
        "cp": max(0.0, cp - mixers) if ring else cp,
        "tp": tp,
        "ep": _ep_seconds(forecast, cluster),
        "fsdp": max(0.0, fsdp - matmuls - mixers),
    }
    return StepTime(matmuls, mixers, exposed)


def weight_seconds(by_axis: Mapping[str, AxisBytes], degrees: Degrees, cluster: Cluster) -> float:
    """Transfers of weights and of their gradients, one after the other."""
    return sum(
        _seconds(by_axis.get(axis, AxisBytes()), holders, stride, cluster)
        for axis, (holders, stride) in _axes_of_weights(degrees).items()
    )


def _cp_seconds(forecast: Forecast, rank: RankForecast, cluster: Cluster) -> float:
    """Transfers of the axis cp."""
    setup = forecast.setup
    crossing = rank.crossing(setup.degrees.tp, cluster.ranks_per_node).total
    return cluster.seconds(rank.received.total, crossing) * setup.micro_batches


def _axes_of_weights(degrees: Degrees) -> dict[str, tuple[int, int]]:
    """(ranks, how far apart they are) of each axis that weights and their gradients travel on."""
    return {
        "fsdp": (sharding_ranks(degrees, spread=False), degrees.tp),
        "edp": (sharding_ranks(degrees, spread=True), degrees.ep * degrees.etp),
        "dp_replicate": (degrees.dp_replicate, degrees.sparse),
    }


def _ep_seconds(forecast: Forecast, cluster: Cluster) -> float:
    """Tokens to experts and back."""
    received = forecast.by_axis.get("ep", AxisBytes()).total
    return cluster.seconds(received, forecast.crossing_ep(cluster.ranks_per_node).total)


def _seconds(moved: AxisBytes, ranks: int, stride: int, cluster: Cluster) -> float:
    """A collective among `ranks` neighbours, `stride` apart: a ring enters each node once."""
    if ranks == 1:
        return 0.0
    in_node = max(1, cluster.ranks_per_node // stride)
    if ranks <= in_node:
        return moved.total / cluster.inside
    # What comes into a node is shared by the ports of its GPUs.
    return max(moved.total / cluster.inside, moved.total / in_node / cluster.between)
