"""Time of the all-reduce kernels that inference engines bring along (vLLM, SGLang, TensorRT-LLM).

Model: three algorithms. One-shot: every rank reads all peers, alpha + (p-1) n beta. Two-shot: reduce-scatter then
all-gather, one more synchronisation and 2 n (p-1)/p bytes. The engine takes the better of the two, and NCCL beyond
a hand-over size. Latencies and efficiencies follow power laws in the ranks, pinned by the 2 and 8 ranks measured; 4
is interpolated. Without a CUDA graph the host's launch is a floor and the copies around the kernel cost a share.
Between nodes a ring over the network follows, and on a torus all there is, from the data sheet alone. Left out:
contention with compute.
Compared with: profiles/*/allreduce_*.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from simmoe.costs import collectives
from simmoe.costs.operators.base import Array, Features, Operator, Parameter, Parameters, soft_max
from simmoe.specs.hardware import Hardware
from simmoe.specs.measurement import Table

HANDOVER_SHARPNESS = 12.0
FLOOR_SHARPNESS = 8.0

PARAMETERS = (
    Parameter(name="alpha_s", unit="s", default=4e-6, lower=1e-6, upper=2e-4, meaning="one-shot latency, 2 ranks"),
    Parameter(name="alpha_growth", unit="-", default=1.2, lower=0.5, upper=20.0, meaning="its ratio, 8 ranks over 2"),
    Parameter(
        name="one_shot_efficiency", unit="-", default=0.6, lower=0.01, upper=1.0, meaning="of link bandwidth, 2 ranks"
    ),
    Parameter(name="two_shot_s", unit="s", default=5e-6, lower=1e-7, upper=1e-3, meaning="second synchronisation"),
    Parameter(
        name="two_shot_efficiency", unit="-", default=0.7, lower=0.01, upper=1.5, meaning="of link bandwidth, 2 ranks"
    ),
    Parameter(
        name="own_growth", unit="-", default=1.0, lower=0.02, upper=3.0, meaning="both efficiencies, 8 ranks over 2"
    ),
    Parameter(
        name="handover_bytes",
        unit="B",
        default=1.2e7,
        lower=2e5,
        upper=1e8,
        meaning="message size where NCCL takes over",
    ),
    Parameter(name="nccl_s", unit="s", default=2e-5, lower=2e-6, upper=2e-3, meaning="NCCL latency, 2 ranks"),
    Parameter(name="nccl_growth", unit="-", default=1.2, lower=0.3, upper=30.0, meaning="its ratio, 8 ranks over 2"),
    Parameter(
        name="nccl_efficiency", unit="-", default=0.7, lower=0.02, upper=1.5, meaning="of link bandwidth, 2 ranks"
    ),
    Parameter(name="nccl_gain", unit="-", default=1.2, lower=0.02, upper=3.0, meaning="its ratio, 8 ranks over 2"),
    Parameter(
        name="eager_s", unit="s", default=2e-5, lower=1e-6, upper=2e-4, meaning="host launch without a CUDA graph"
    ),
    Parameter(
        name="eager_slowdown", unit="-", default=1.15, lower=1.0, upper=2.0, meaning="of a long kernel without a graph"
    ),
)


def rank_law(ratio: float, ranks: Array) -> Array:
    """Power law in the ranks: 1 at 2 ranks, ``ratio`` at 8. [-]"""
    return np.asarray(ratio ** (np.log2(np.maximum(ranks, 2.0) / 2.0) / 2.0), dtype=np.float64)


def seconds(features: Features, parameters: Parameters, hardware: Hardware, cold: bool) -> Array:  # noqa: ARG001
    """Predicted time; one rank: 0. [s]"""
    n, ranks = features["message_bytes"], features["ranks"]
    if hardware.fabric is not None and hardware.fabric.torus:
        return collectives.torus_all_reduce_s(n, ranks, hardware)
    p = np.minimum(ranks, hardware.devices_per_node)
    bandwidth = hardware.scale_up.bandwidth
    own = bandwidth * rank_law(parameters["own_growth"], p)
    alpha = parameters["alpha_s"] * rank_law(parameters["alpha_growth"], p)
    moved = 2.0 * (p - 1.0) / p * n
    one_shot = alpha + (p - 1.0) * n / (own * parameters["one_shot_efficiency"])
    two_shot = alpha + parameters["two_shot_s"] + moved / (own * parameters["two_shot_efficiency"])
    nccl_rate = bandwidth * parameters["nccl_efficiency"] * rank_law(parameters["nccl_gain"], p)
    nccl = parameters["nccl_s"] * rank_law(parameters["nccl_growth"], p) + moved / nccl_rate
    handed = 1.0 / (1.0 + (parameters["handover_bytes"] / np.maximum(n, 1.0)) ** HANDOVER_SHARPNESS)
    time = (1.0 - handed) * np.minimum(one_shot, two_shot) + handed * nccl
    floor = np.full(np.shape(n), parameters["eager_s"])
    eager = soft_max(floor, time * parameters["eager_slowdown"], FLOOR_SHARPNESS)
    time = np.where(features["cuda_graph"] > 0, time, eager)
    time = time + collectives.between_nodes_all_reduce_s(n, ranks, hardware)
    return np.where(ranks > 1, time, 0.0)


def roofline(features: Features, hardware: Hardware) -> Array:
    """2 n (p-1)/p bytes over the data sheet's bandwidth, and the ring between nodes; no latency inside. [s]"""
    n, ranks = features["message_bytes"], features["ranks"]
    p = np.minimum(ranks, hardware.devices_per_node)
    inside = 2.0 * (p - 1.0) / p * n / hardware.scale_up.bandwidth
    return inside + collectives.between_nodes_all_reduce_s(n, ranks, hardware)


def features_of(message_bytes: ArrayLike, ranks: ArrayLike, cuda_graph: ArrayLike = 1.0) -> Features:
    """Features of all-reduces of ``message_bytes`` per rank over ``ranks`` devices; everything broadcasts."""
    n, p, graph = np.broadcast_arrays(message_bytes, ranks, cuda_graph)
    return {
        "message_bytes": np.array(n, dtype=np.float64),
        "ranks": np.array(p, dtype=np.float64),
        "cuda_graph": np.array(graph, dtype=np.float64),
    }


def features(table: Table) -> Features:
    """Features of measured rows."""
    return features_of(table.number("message_bytes"), table.number("num_gpus"), table.number("cuda_graph"))


OPERATOR = Operator(
    name="allreduce",
    parameters=PARAMETERS,
    seconds=seconds,
    roofline=roofline,
    features=features,
    variant_columns=("framework",),
    # two rank counts only: leaving one out leaves nothing to place the other by, so message sizes are left out
    group_columns=("message_bytes",),
    range_features=("message_bytes", "ranks"),
)
