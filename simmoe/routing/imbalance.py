r"""How much more the busiest rank gets than the mean rank, batch by batch: mean and quantiles of that factor.

Model: a rank's pairs have the mean and variance of `expert_load` and are taken as independent between ranks, with the
variance widened for the fixed total (`counts.expected_maximum`); then P(max <= m) is a product of their distributions.
Left out: load that persists from batch to batch (it is in the mean of a placement). Checked against drawn batches in
tests/test_mechanisms_imbalance.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simmoe.routing.counts import count_cdf
from simmoe.routing.expert_load import expected_load, rank_variance
from simmoe.routing.layers import LayerKind
from simmoe.routing.placement import contiguous_placement

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class BusiestRank:
    """Factor of the busiest rank over the mean rank. [-]

    Attributes
    ----------
    systematic : as popularity and placement alone make it, however large the batch.
    mean : over batches.
    tail : at the quantile asked for.
    """

    systematic: float
    mean: float
    tail: float


def busiest_of(kinds: Sequence[LayerKind], tokens: float, quantile: float = 0.99) -> BusiestRank:
    """Mean over layers of `busiest_rank`: every layer waits for its own."""
    layers = sum(kind.layers for kind in kinds)
    each = [(kind.layers / layers, busiest_rank(kind, tokens, quantile)) for kind in kinds]
    return BusiestRank(
        systematic=sum(share * one.systematic for share, one in each),
        mean=sum(share * one.mean for share, one in each),
        tail=sum(share * one.tail for share, one in each),
    )


def busiest_rank(kind: LayerKind, tokens: float, quantile: float = 0.99) -> BusiestRank:
    """Busiest-rank factor of one layer for batches of ``tokens`` over the whole group.

    Parameters
    ----------
    kind : the layer's popularity, copies and placement.
    tokens : of the whole expert-parallel group. [tokens]
    quantile : of the tail. [-]
    """
    p = kind.inclusion if kind.inclusion is not None else np.full(kind.slots, kind.woken_by / kind.slots)
    ranks = contiguous_placement(kind.slots, kind.ep) if kind.placement is None else kind.placement
    share = np.bincount(ranks, weights=p, minlength=kind.ep)
    even = float(share.mean())
    if kind.balanced or kind.ep == 1:
        return BusiestRank(1.0, 1.0, 1.0)
    load = expected_load(
        np.array(tokens), kind.slots, kind.woken_by, ep=kind.ep, inclusion=p, placement=ranks,
        num_groups=kind.num_groups, top_groups=kind.top_groups, independence=kind.unlikeness(np.array(tokens)),
    )  # fmt: skip
    variance, _ = rank_variance(p, ranks, kind.ep, kind.woken_by, kind.num_groups, kind.top_groups)
    like = tokens / float(kind.unlike_tokens(np.array(tokens)))
    spread = like * tokens * variance
    mean = np.asarray(tokens * share, dtype=np.float64)
    low, high = 0.0, float(tokens * share.max() + 12.0 * np.sqrt(spread.max()) + 12.0)
    for _ in range(50):
        middle = 0.5 * (low + high)
        below = float(count_cdf(np.full(kind.ep, middle), mean, spread).prod())
        low, high = (middle, high) if below < quantile else (low, middle)
    return BusiestRank(float(share.max()) / even, float(load.routed_pairs) / (tokens * even), high / (tokens * even))
