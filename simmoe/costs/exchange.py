r"""All-to-all of expert parallelism in closed form: flat, hierarchical, 2D-hierarchical, coordinated; and fabrics.

Model: alpha-beta per link. n bytes leave each of p ranks, G ranks a node, p/G nodes. Flat: one message per peer.
Hierarchical: first among the ranks of a node, then among nodes with messages G times as large; twice the volume, few
hops. 2DH: the same with the gathering copies done in memory. Coordinated: ranks that hold the same tokens (tensor
parallelism L) send each its share and gather it again on arrival.
Fabrics: rail-optimised (full rate), fat tree (rate over its oversubscription, flat traffic also over path collisions),
torus (an all-to-all is bound by its bisection).
Left out: contention with other collectives, retransmission. Kernels that were measured: `operators.alltoall`.
Checked against message-by-message twins in tests/test_mechanisms_exchange.py.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simmoe.costs import collectives
from simmoe.errors import CoverageError
from simmoe.specs.hardware import Hardware

Array = NDArray[np.float64]
Algorithm = Literal["flat", "hierarchical", "two_dh", "coordinated"]

#: Gap between two messages a rank starts on one link [s]; assumption: writing one work request after another.
MESSAGE_GAP_S = 1e-6
#: Message size at which a link between nodes reaches half its rate [B]; assumption after the shape of RDMA write
#: curves, which stand near half at 16 KiB and near full rate at 1 MiB.
HALF_RATE_BYTES = 16384.0


def exchange_s(
    algorithm: Algorithm, bytes_per_rank: ArrayLike, ranks: int, hardware: Hardware, *, tensor_parallel: int = 1
) -> Array:
    """Time of one all-to-all in which every rank sends ``bytes_per_rank`` in equal shares to all. [s]

    Parameters
    ----------
    algorithm : which one.
    bytes_per_rank : array_like
        n, the rank's own share included. [B]
    ranks : int
        p, filling nodes in order; 1 sends nothing.
    hardware : links, devices per node, fabric.
    tensor_parallel : int
        L ranks that hold the same tokens; only ``coordinated`` makes use of it.

    References
    ----------
    .. [1] S. Rajbhandari et al., "DeepSpeed-MoE", arXiv 2201.05596, sec. 5.3 (hierarchical, coordinated).
    .. [2] C. Hwang et al., "Tutel", arXiv 2206.03382, sec. 3.4 (2DH).
    """
    n = np.asarray(bytes_per_rank, dtype=np.float64)
    if ranks <= 1:
        return np.zeros_like(n)
    if hardware.fabric is not None and hardware.fabric.torus:
        return _over_tori(n, ranks, hardware)
    match algorithm:
        case "flat":
            return _flat(n, ranks, hardware)
        case "hierarchical":
            return _staged(n, ranks, hardware)
        case "two_dh":
            # gathering and spreading equal-sized pieces: two passes over the data in device memory
            return _staged(n, ranks, hardware) + 4.0 * n / hardware.device.memory_bandwidth
        case "coordinated":
            return _coordinated(n, ranks, hardware, tensor_parallel)


def messages(algorithm: Algorithm, ranks: int, devices_per_node: int, tensor_parallel: int = 1) -> int:
    """Messages a rank sends one after another: (p-1); (G-1) + (p/G-1); p/L-1 and L-1 to gather. [-]"""
    local, nodes = _split(ranks, devices_per_node)
    if algorithm == "flat":
        return ranks - 1
    if algorithm == "coordinated":
        return max(ranks // tensor_parallel - 1, 0) + tensor_parallel - 1
    return local - 1 + nodes - 1


def _flat(n: Array, ranks: int, hardware: Hardware) -> Array:
    local, nodes = _split(ranks, hardware.devices_per_node)
    inside = _inside(n * local / ranks, local, hardware)
    if nodes == 1:
        return inside
    peers = ranks - local
    outside = _network(n / ranks, hardware, spread=True) * peers + peers * MESSAGE_GAP_S + _latency(hardware)
    return np.maximum(inside, outside)


def _over_tori(n: Array, ranks: int, hardware: Hardware) -> Array:
    """A torus for as many ranks as it holds; what goes to other tori takes the network beside it, flat. [s]"""
    assert hardware.fabric is not None
    tori = math.ceil(ranks / math.prod(hardware.fabric.torus))
    if tori == 1:
        return torus_all_to_all_s(n, ranks, hardware)
    local = math.ceil(ranks / tori)
    peers = ranks - local
    outside = _network(n / ranks, hardware, spread=True) * peers + peers * MESSAGE_GAP_S + _latency(hardware)
    return np.maximum(torus_all_to_all_s(n * local / ranks, local, hardware), outside)


def _staged(n: Array, ranks: int, hardware: Hardware) -> Array:
    local, nodes = _split(ranks, hardware.devices_per_node)
    if nodes == 1:
        return _inside(n, local, hardware)
    outside = (nodes - 1) * (_network(n / nodes, hardware, spread=False) + MESSAGE_GAP_S) + _latency(hardware)
    return _inside(n, local, hardware) + outside


def _coordinated(n: Array, ranks: int, hardware: Hardware, tensor_parallel: int) -> Array:
    """Each of L ranks sends 1/L of the tokens to the ranks of its own index, then all-gathers what arrived."""
    gather = _inside(n, tensor_parallel, hardware)
    group = max(ranks // tensor_parallel, 1)
    if group == 1:
        return gather
    share = n / tensor_parallel
    local, nodes = _split(ranks, hardware.devices_per_node)
    beside = max(local // tensor_parallel, 1)  # ranks of the same index in one node
    near = _inside(share * beside / group, beside, hardware)
    if nodes == 1:
        return near + gather
    far = group - beside
    outside = far * (_network(share / group, hardware, spread=True) + MESSAGE_GAP_S) + _latency(hardware)
    return np.maximum(near, outside) + gather


def _inside(n: Array, ranks: int, hardware: Hardware) -> Array:
    """Direct exchange of n bytes a rank among ranks of one node. [s]"""
    if ranks <= 1:
        return np.zeros_like(n)
    link = hardware.scale_up
    return link.latency + (ranks - 1) * MESSAGE_GAP_S + n * (ranks - 1) / ranks / link.bandwidth


def _network(message: Array, hardware: Hardware, *, spread: bool) -> Array:
    """Time on the wire of one message between nodes, small ones below the link's rate. [s]"""
    link = hardware.scale_out
    if link is None:
        raise CoverageError(f"{hardware.name}: the exchange spans nodes but the hardware describes no scale_out link")
    fabric = hardware.fabric
    slow = 1.0 if fabric is None else fabric.oversubscription * (fabric.path_collisions if spread else 1.0)
    return np.asarray((message + HALF_RATE_BYTES) * slow / link.bandwidth, dtype=np.float64)


def _latency(hardware: Hardware) -> float:
    return hardware.scale_out.latency if hardware.scale_out else 0.0


def torus_all_to_all_s(bytes_per_rank: ArrayLike, ranks: int, hardware: Hardware) -> Array:
    r"""All-to-all on a torus with wrap-around links: bound by its longest ring, plus half its diameter in hops. [s]

    .. math:: t = \frac{n_{max}\, m}{8 b}

    for m bytes sent by each node over links of b each way; a ring without wrap-around takes twice as long.
    Equality under dimension-order routing, by counting link loads (tests). ``ranks`` below the torus' size take a
    sub-torus of the same shape, whose rings do not wrap.
    """
    fabric = hardware.fabric
    if fabric is None or not fabric.torus:
        raise CoverageError(f"{hardware.name}: no torus is described under fabric")
    n = np.asarray(bytes_per_rank, dtype=np.float64)
    shape = collectives.sub_torus(fabric.torus, ranks)
    longest = max(
        size * (1.0 if size == whole else 2.0) for size, whole in zip(shape, fabric.torus, strict=True) if size > 1
    )
    hops = sum(size // 2 for size in shape)
    link = hardware.scale_up
    return hops * link.latency + longest * n / (8.0 * link.bandwidth)


def _split(ranks: int, devices_per_node: int) -> tuple[int, int]:
    nodes = math.ceil(ranks / devices_per_node)
    return math.ceil(ranks / nodes), nodes
