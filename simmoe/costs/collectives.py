"""Closed-form times of collectives on any described hardware: what a link's data sheet alone says.

Model: alpha-beta (Hockney, Parallel Computing 20, 1994): a latency per message plus bytes over bandwidth per
direction; step counts as in Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in
MPICH", IJHPCA 19(1), 2005, sections 3-5. Ranks fill nodes in order; a group larger than a node runs inside the nodes
and between them in turn (hierarchical). On a torus every ring of the block that the ranks take carries its share both
ways (J. Austin et al., "How to Scale Your Model", chapter on sharding). Left out: contention between collectives,
stragglers, in-switch reduction.
Used as they are where nothing was measured; `simmoe.costs.operators.allreduce` and its neighbours fit what was.
One rank sends nothing: 0.0.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simmoe.errors import CoverageError
from simmoe.specs.hardware import Hardware, Link

Array = NDArray[np.float64]


def ring_all_reduce_s(message_bytes: ArrayLike, ranks: ArrayLike, link: Link) -> Array:
    """2(p-1) steps of n/p bytes: best for large messages. [s]"""
    n, p = _columns(message_bytes, ranks)
    return _none_alone(p, 2.0 * (p - 1.0) * (link.latency + n / p / link.bandwidth))


def one_shot_all_reduce_s(message_bytes: ArrayLike, ranks: ArrayLike, link: Link) -> Array:
    """Every rank reads all peers at once and sums: one latency, (p-1) n bytes. [s]"""
    n, p = _columns(message_bytes, ranks)
    return _none_alone(p, link.latency + (p - 1.0) * n / link.bandwidth)


def two_shot_all_reduce_s(message_bytes: ArrayLike, ranks: ArrayLike, link: Link) -> Array:
    """Direct reduce-scatter, then direct all-gather: two latencies, 2 n (p-1)/p bytes. [s]"""
    n, p = _columns(message_bytes, ranks)
    return _none_alone(p, 2.0 * link.latency + 2.0 * (p - 1.0) / p * n / link.bandwidth)


def ring_all_gather_s(message_bytes: ArrayLike, ranks: ArrayLike, link: Link) -> Array:
    """(p-1) steps of n/p bytes; ``message_bytes`` is the gathered size n. Backwards: a ring reduce-scatter. [s]"""
    n, p = _columns(message_bytes, ranks)
    return _none_alone(p, (p - 1.0) * (link.latency + n / p / link.bandwidth))


def all_reduce_s(message_bytes: ArrayLike, ranks: ArrayLike, hardware: Hardware) -> Array:
    """The best of one-shot, two-shot and ring inside a node; between nodes a ring over 1/G of the data each. [s]

    Between nodes: reduce-scatter inside, ring all-reduce of n/G between nodes, all-gather inside.

    Raises
    ------
    CoverageError
        If the ranks do not fit one node and the hardware describes no network between nodes.
    """
    n, p = _columns(message_bytes, ranks)
    local, _ = _split(p, hardware)
    link = hardware.scale_up
    inside = np.minimum(
        np.minimum(one_shot_all_reduce_s(n, local, link), two_shot_all_reduce_s(n, local, link)),
        ring_all_reduce_s(n, local, link),
    )
    return inside + between_nodes_all_reduce_s(n, p, hardware)


def torus_all_reduce_s(message_bytes: ArrayLike, ranks: ArrayLike, hardware: Hardware) -> Array:
    """2 n (p-1)/p bytes over all links of a block of the torus, two an axis whose ring closes, one where not. [s]

    Ranks beyond the torus go on between tori as between nodes.
    """
    n, p = _columns(message_bytes, ranks)
    assert hardware.fabric is not None
    whole, link = hardware.fabric.torus, hardware.scale_up
    held = np.minimum(p, math.prod(whole))
    blocks = {int(size): sub_torus(whole, int(size)) for size in np.unique(held)}
    links = {
        size: sum(2 if side == full else 1 for side, full in zip(block, whole, strict=True) if side > 1)
        for size, block in blocks.items()
    }
    rate = np.vectorize(lambda size: max(links[int(size)], 1) * link.bandwidth, otypes=[float])(held)
    hops = np.vectorize(lambda size: sum(side // 2 for side in blocks[int(size)]), otypes=[float])(held)
    inside = 2.0 * (hops * link.latency + (held - 1.0) / held * n / rate)
    return _none_alone(p, inside) + between_nodes_all_reduce_s(n, p, hardware)


def sub_torus(whole: tuple[int, ...], ranks: int) -> tuple[int, ...]:
    """Sides of the most cubic block of about ``ranks`` nodes inside the torus: sides halved, longest first."""
    sides = list(whole)
    while math.prod(sides) > ranks:
        longest = max(range(len(sides)), key=lambda axis: sides[axis])
        if sides[longest] == 1:
            break
        sides[longest] = -(-sides[longest] // 2)
    return tuple(sides)


def between_nodes_all_reduce_s(message_bytes: ArrayLike, ranks: ArrayLike, hardware: Hardware) -> Array:
    """The part of a hierarchical all-reduce that crosses nodes: a ring over 1/G of the data; one node: 0. [s]"""
    n, p = _columns(message_bytes, ranks)
    local, nodes = _split(p, hardware)
    if not (nodes > 1).any():
        return np.zeros_like(n)
    return ring_all_reduce_s(n / local, nodes, _network(hardware))


def between_nodes_gather_s(message_bytes: ArrayLike, nodes: ArrayLike, hardware: Hardware) -> Array:
    """A ring all-gather of one device's share over its network link, or backwards a reduce-scatter; one node: 0. [s]"""
    return ring_all_gather_s(message_bytes, nodes, _network(hardware))


def nodes_of(ranks: ArrayLike, hardware: Hardware) -> Array:
    """Nodes a group of consecutive ranks spans. [-]"""
    return np.asarray(np.ceil(np.asarray(ranks, dtype=np.float64) / hardware.devices_per_node), dtype=np.float64)


def _split(ranks: Array, hardware: Hardware) -> tuple[Array, Array]:
    nodes = nodes_of(ranks, hardware)
    return ranks / nodes, nodes


def _network(hardware: Hardware) -> Link:
    if hardware.scale_out is None:
        raise CoverageError(
            f"{hardware.name}: the group spans nodes but the hardware has no scale_out link; "
            f"keep it to {hardware.devices_per_node} devices or describe scale_out"
        )
    return hardware.scale_out


def _columns(message_bytes: ArrayLike, ranks: ArrayLike) -> tuple[Array, Array]:
    n, p = np.broadcast_arrays(np.asarray(message_bytes, dtype=np.float64), np.asarray(ranks, dtype=np.float64))
    return np.array(n), np.array(p)


def _none_alone(ranks: Array, time_s: Array) -> Array:
    return np.where(ranks > 1, time_s, 0.0)
