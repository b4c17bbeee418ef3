"""Time of NCCL collectives: all-reduce, all-gather, reduce-scatter, all-to-all.

Model: the better of two protocols, each alpha + bytes / (efficiency x link bandwidth): a low-latency one that sends
data with flags, and a simple one that needs more synchronisation but fills the link. Bytes per rank: all-reduce
2 n (p-1)/p, the others n (p-1)/p with n the size given to nccl-tests. Latencies and efficiencies follow power laws
in the ranks, pinned by the 2 and 8 measured (large all-reduces of 8 ranks on Hopper beat the ring's bound,
probably by adding inside the NVLink switch, hence ratios above 1). Between nodes a ring of each device's share over
its own network link comes on top, from the data sheet alone. Left out: an all-to-all's way between nodes (see
`simmoe.costs.exchange`), tuning by environment variables. Compared with: profiles/*/nccl_*.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from simmoe.costs import collectives
from simmoe.costs.operators.allreduce import rank_law
from simmoe.costs.operators.base import Array, Features, Operator, Parameter, Parameters
from simmoe.specs.hardware import Hardware
from simmoe.specs.measurement import Table

PASSES = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "alltoall": 1.0}
# the switch between protocols is not at the exact crossing
SHARPNESS = 6.0

PARAMETERS = (
    Parameter(name="alpha_s", unit="s", default=6e-6, lower=1e-6, upper=2e-4, meaning="low-latency protocol, 2 ranks"),
    Parameter(name="alpha_growth", unit="-", default=2.0, lower=0.5, upper=20.0, meaning="its ratio, 8 ranks over 2"),
    Parameter(name="low_latency_efficiency", unit="-", default=0.3, lower=0.005, upper=1.0, meaning="of link, 2 ranks"),
    Parameter(
        name="low_latency_gain", unit="-", default=1.0, lower=0.01, upper=5.0, meaning="its ratio, 8 ranks over 2"
    ),
    Parameter(
        name="simple_s", unit="s", default=2e-5, lower=2e-6, upper=2e-3, meaning="simple protocol latency, 2 ranks"
    ),
    Parameter(name="simple_growth", unit="-", default=1.3, lower=0.3, upper=30.0, meaning="its ratio, 8 ranks over 2"),
    Parameter(
        name="simple_efficiency", unit="-", default=0.7, lower=0.02, upper=1.5, meaning="of link bandwidth, 2 ranks"
    ),
    Parameter(name="simple_gain", unit="-", default=1.2, lower=0.02, upper=5.0, meaning="its ratio, 8 ranks over 2"),
)


def seconds(features: Features, parameters: Parameters, hardware: Hardware, cold: bool) -> Array:  # noqa: ARG001
    """Predicted time; one rank: 0. [s]"""
    p = np.minimum(features["ranks"], hardware.devices_per_node)
    sent = _sent_bytes(features, p)
    bandwidth = hardware.scale_up.bandwidth

    def protocol(name: str, latency: str, growth: str) -> Array:
        rate = bandwidth * parameters[f"{name}_efficiency"] * rank_law(parameters[f"{name}_gain"], p)
        return parameters[latency] * rank_law(parameters[growth], p) + sent / rate

    quick = protocol("low_latency", "alpha_s", "alpha_growth")
    simple = protocol("simple", "simple_s", "simple_growth")
    best = (quick**-SHARPNESS + simple**-SHARPNESS) ** (-1.0 / SHARPNESS)
    n, passes = features["message_bytes"], features["passes"]
    if hardware.fabric is not None and hardware.fabric.torus:
        return passes * collectives.torus_all_reduce_s(n, features["ranks"], hardware) / PASSES["all_reduce"]
    outside = passes * collectives.between_nodes_all_reduce_s(n, features["ranks"], hardware) / PASSES["all_reduce"]
    return np.where(p > 1, best, 0.0) + outside


def roofline(features: Features, hardware: Hardware) -> Array:
    """Bytes sent over the data sheet's bandwidth, no latency. [s]"""
    p = np.minimum(features["ranks"], hardware.devices_per_node)
    return _sent_bytes(features, p) / hardware.scale_up.bandwidth


def _sent_bytes(features: Features, p: Array) -> Array:
    """Bytes each of ``p`` ranks of a node sends inside it. [B]"""
    return np.asarray(features["passes"] * features["message_bytes"] * (p - 1.0) / p, dtype=np.float64)


def features_of(operation: str, message_bytes: ArrayLike, ranks: ArrayLike) -> Features:
    """Features of ``operation`` (a key of ``PASSES``) on ``message_bytes`` as nccl-tests counts them."""
    n, p = np.broadcast_arrays(message_bytes, ranks)
    return {
        "message_bytes": np.array(n, dtype=np.float64),
        "ranks": np.array(p, dtype=np.float64),
        "passes": np.full(np.shape(n), PASSES[operation]),
    }


def features(table: Table) -> Features:
    """Features of measured rows."""
    passes = np.array([PASSES.get(str(name), np.nan) for name in table.text("operation")], dtype=np.float64)
    return {
        "message_bytes": table.number("message_bytes"),
        "ranks": table.number("num_gpus"),
        "passes": passes,
    }


OPERATOR = Operator(
    name="nccl",
    parameters=PARAMETERS,
    seconds=seconds,
    roofline=roofline,
    features=features,
    variant_columns=("framework", "operation", "version"),
    # two rank counts only: leaving one out leaves nothing to place the other by, so message sizes are left out
    group_columns=("message_bytes",),
    range_features=("message_bytes", "ranks"),
)
