"""How many experts a batch wakes and how many rows each gets: the seam between routing and costs.

Costs never see a popularity distribution, routing never sees a GEMM; `ExpertLoad` is all that crosses.
Model: exact occupancy means per rank (`occupancy`), expected maxima over ranks and experts (`counts`).
Left out: redundant experts, capacity limits, load that persists from step to step.
Checked against enumeration and drawn routings in tests/test_routing_expert_load.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simmoe.errors import SpecError
from simmoe.routing.counts import expected_maximum, expected_tiles_of_maximum
from simmoe.routing.occupancy import block_moments, log_idle
from simmoe.routing.placement import contiguous_placement
from simmoe.routing.popularity import uniform_inclusion
from simmoe.routing.sampling import sample_choices

Array = NDArray[np.float64]

#: Row tiles for which padded row blocks are counted; grouped GEMMs use 16 to 128 rows per tile.
TILES = (16, 64, 128)


@dataclass(frozen=True)
class ExpertLoad:
    """Expected load of the busiest expert-parallel rank, one entry per batch size (arrays of one shape).

    Attributes
    ----------
    tokens : tokens routed together, over the whole expert-parallel group. [tokens]
    routed_pairs : (token, expert) pairs that land on the rank. [pairs]
    active_experts : distinct experts of the rank that get at least one token. [experts]
    busiest_expert_tokens : largest number of tokens any one expert of the rank gets. [tokens]
    row_blocks : tile height -> sum over the rank's experts of ceil(tokens / tile). [blocks]
    local_experts : experts the rank holds. [experts]
    """

    tokens: Array
    routed_pairs: Array
    active_experts: Array
    busiest_expert_tokens: Array
    row_blocks: Mapping[int, Array]
    local_experts: int

    def received_tokens(self, top_k: float) -> Array:
        """Tokens that send the rank at least one of its pairs, each of their k picks as likely to be one. [tokens]"""
        of_pick = np.minimum(self.routed_pairs / np.maximum(self.tokens * top_k, 1e-9), 1.0)
        return np.asarray(self.tokens * (1.0 - (1.0 - of_pick) ** top_k), dtype=np.float64)


def with_shared(load: ExpertLoad) -> ExpertLoad:
    """The load with one more expert on the rank that every token picks."""
    blocks = {tile: count + np.ceil(load.tokens / tile) for tile, count in load.row_blocks.items()}
    return ExpertLoad(
        tokens=load.tokens,
        routed_pairs=load.routed_pairs + load.tokens,
        active_experts=load.active_experts + np.minimum(load.tokens, 1.0),
        busiest_expert_tokens=np.maximum(load.busiest_expert_tokens, load.tokens),
        row_blocks=blocks,
        local_experts=load.local_experts + 1,
    )


#: Experts told apart when popularity differs; beyond it the less popular ones are pooled with their neighbours.
_CLASSES = 48
#: Experts a rank may hold for its row blocks to be counted expert by expert.
_FEW = 16


def expected_load(
    tokens: ArrayLike,
    num_experts: int,
    top_k: float,
    *,
    ep: int = 1,
    inclusion: ArrayLike | None = None,
    placement: ArrayLike | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    independence: ArrayLike = 1.0,
) -> ExpertLoad:
    r"""Expected load of the busiest of ``ep`` ranks, for many batch sizes at once.

    Each field is the expectation of its own maximum over ranks. The rank with most pairs need not have most distinct
    experts, so together the fields describe a slightly worse rank than any real one.

    Parameters
    ----------
    tokens : array_like, shape (B,) or scalar
        Tokens routed together, over the whole expert-parallel group; a mean below one token counts as a batch of one
        that comes with that chance. [tokens]
    num_experts : int
        E routed experts.
    top_k : float
        k picked per token; the mean where tokens pick different numbers.
    ep : int
        Expert-parallel ranks D.
    inclusion : array_like, shape (E,), optional
        Chance of each expert to be in a token's top-k, sum k; default uniform. [-]
    placement : array_like of int, shape (E,), optional
        Rank of each expert; default contiguous.
    num_groups, top_groups : int
        Group-limited routing: a token picks inside ``top_groups`` of ``num_groups`` equal, contiguous groups.
    independence : array_like, scalar or shape (B,)
        phi in (0, 1]: the batch routes like :math:`1 + \phi (T - 1)` independent tokens, each standing for an equal
        share of the real ones. 1: independent. [-]

    Returns
    -------
    ExpertLoad
        Arrays of shape (B,), or () for a scalar.

    Raises
    ------
    SpecError
        If inclusion, placement or independence do not fit the counts given.

    Notes
    -----
    Means per rank are exact for independent tokens. Maxima take counts as independent with the variance of the
    dependent ones (`counts.expected_maximum`): within 2 % of drawn routings for k > 1, or T > 2.
    Group-limited routing keeps the groups with the largest sum of two best scores (DeepSeek-V3); its clustering of
    picks is drawn once per shape, with a fixed seed.
    """
    shape = np.shape(tokens)
    given = np.asarray(tokens, dtype=np.float64).reshape(-1)
    p, ranks = _checked(num_experts, top_k, ep, inclusion, placement)
    _check_groups(num_experts, top_k, num_groups, top_groups)
    phi = np.asarray(independence, dtype=np.float64).reshape(-1)
    if not np.all((phi > 0.0) & (phi <= 1.0)):
        raise SpecError(f"routing: independence must be above 0 and at most 1, got {phi.min():g} to {phi.max():g}")
    t = np.maximum(given, 1.0)
    drawn = 1.0 + phi * (t - 1.0)
    weight = t / drawn

    member = (ranks[:, None] == np.arange(ep)).astype(np.float64)
    slots = member.sum(axis=0)
    pair_mean = t[:, None] * (p @ member)
    token_variance, plain_variance = rank_variance(p, ranks, ep, top_k, num_groups, top_groups)
    pair_variance = (weight * t)[:, None] * token_variance
    # what clustered picks add to the variance of independent experts; the other fields feel it by their slope
    extra = (weight * t)[:, None] * (token_variance - plain_variance)

    pairs = np.clip(_busiest(pair_mean, pair_variance), weight, t * min(top_k, float(slots.max())))

    idle = np.exp(log_idle(p, drawn))
    woken_per_pair = (idle @ member) / slots / weight[:, None]
    distinct = _busiest((1.0 - idle) @ member, (idle * (1.0 - idle)) @ member + extra * woken_per_pair**2)
    distinct = np.clip(distinct, 1.0, np.minimum(pairs, slots.max()))

    value, of_class = _classes(p)
    held = np.zeros((len(value), ep))  # experts of each class on each rank
    np.add.at(held, (of_class, ranks), 1.0)
    kinds_of_rank, alike = np.unique(held, axis=1, return_counts=True)
    # counts of one rank vary together; as if independent, each with its share of the rank's variance
    together = float(token_variance.sum() / plain_variance.sum()) if plain_variance.sum() > 0 else 1.0
    few_variance = drawn[:, None] * value * (1.0 - value) * together
    blocks = {}
    for tile, (mean, variance, covariance) in block_moments(value, drawn, weight, TILES).items():
        slope = np.where(
            plain_variance > 0, covariance @ held / np.maximum((weight * t)[:, None] * plain_variance, 1e-9), 0.0
        )
        # an expert sure of some tiles varies by the rarer further ones: those, not the sure ones, are the count
        certain = np.where(mean >= 1.0, np.clip(mean - variance, 0.0, np.floor(mean)), 0.0)
        spread = variance @ held + extra * slope**2
        # no expert gets more than all tokens, and a rank has at most one partly filled tile for each it wakes
        most = np.minimum(pairs, slots.max() * np.ceil(t / tile))
        most = np.minimum(most, distinct + (pairs - distinct) / tile)
        # two moments do not tell the law of few counts that vary by few tiles
        few = np.full(len(t), ep > 1 and slots.max() <= _FEW)
        if slots.max() > 1:
            few &= (np.sqrt(few_variance) * weight[:, None]).max(axis=1) <= tile
        most_blocks = np.empty(len(t))
        most_blocks[~few] = _busiest((mean @ held)[~few], spread[~few], (certain @ held)[~few])
        most_blocks[few] = expected_tiles_of_maximum(
            (drawn[:, None] * value)[few], few_variance[few], (tile / weight)[few], kinds_of_rank, alike
        )
        blocks[tile] = np.clip(most_blocks, np.maximum(distinct, pairs / tile), most)

    expert_variance = value * (1.0 - value) * num_experts / max(num_experts - 1, 1)
    top = expected_maximum(drawn[:, None] * value, drawn[:, None] * expert_variance, held.sum(axis=1))
    busiest_expert = np.clip(weight * top, weight, t)

    share = np.minimum(given, 1.0)
    return ExpertLoad(
        tokens=given.reshape(shape),
        routed_pairs=(share * pairs).reshape(shape),
        active_experts=(share * distinct).reshape(shape),
        busiest_expert_tokens=(share * busiest_expert).reshape(shape),
        row_blocks={tile: (share * count).reshape(shape) for tile, count in blocks.items()},
        local_experts=int(slots.max()),
    )


def _busiest(mean: Array, variance: Array, certain: Array | None = None) -> Array:
    """Expected maximum over ranks of counts with these moments, shape (B, D) to (B,).

    ``certain``, shape (B, D): part of each count that does not vary; what all ranks have of it is set aside.
    """
    if mean.shape[1] == 1 or not len(mean):
        return mean[:, 0]
    base = np.zeros((len(mean), 1)) if certain is None else certain.min(axis=1, keepdims=True)
    count, spread = np.maximum(mean - base, 0.0), np.maximum(variance, 0.0)
    ranks_alike = all(np.all(np.abs(m - m[:, :1]) <= 1e-9 * m[:, :1]) for m in (count, spread))
    if ranks_alike:
        return base[:, 0] + expected_maximum(count[:, :1], spread[:, :1], np.array([float(mean.shape[1])]))
    return base[:, 0] + expected_maximum(count, spread)


def rank_variance(
    p: Array, ranks: NDArray[np.intp], ep: int, top_k: float, num_groups: int, top_groups: int
) -> tuple[Array, Array]:
    """Per-token variance of a rank's pairs, widened for `expected_maximum`, and that of independent experts; (D,).

    Covariance of two experts' picks is proportional to d_i d_j with d = pi (1 - pi), the leading term of fixed-size
    sampling (J. Hajek, Ann. Math. Statist. 35 (1964) 1491); the factors are those exact for uniform popularity, one
    inside a group and one across groups.
    """
    experts = len(p)
    d = p * (1.0 - p)
    plain: Array = np.bincount(ranks, weights=d, minlength=ep).astype(np.float64)
    if ep == 1 or experts in {1, top_k}:
        return np.zeros(ep), plain
    chance, group = top_k / experts, experts // num_groups
    both_inside, both_across = _picked_together(experts, top_k, num_groups, top_groups)
    scale = (chance * (1.0 - chance)) ** 2
    inside_factor, across_factor = (both_inside - chance**2) / scale, (both_across - chance**2) / scale
    in_group = np.zeros((ep, num_groups))
    np.add.at(in_group, (ranks, np.arange(experts) // group), d)
    own = np.bincount(ranks, weights=d * d, minlength=ep)
    inside = (in_group**2).sum(axis=1)
    variance = plain + inside_factor * (inside - own) + across_factor * (in_group.sum(axis=1) ** 2 - inside)
    return np.maximum(variance, 0.0) * ep / (ep - 1), plain


@lru_cache(maxsize=64)
def _picked_together(experts: int, top_k: float, num_groups: int, top_groups: int) -> tuple[float, float]:
    """Chance that a token picks two given experts of one group, and of two groups, at uniform popularity. [-]"""
    plain = top_k * max(top_k - 1, 0.0) / (experts * (experts - 1))
    group = experts // num_groups
    if top_groups == num_groups or group == 1:
        return plain, plain
    # no closed form for the best-scored groups: 4096 drawn tokens give it to about 0.5 %, the same at every call
    k = max(1, round(top_k))
    choices = sample_choices(
        np.random.default_rng(0), 4096, np.ones(experts), k, num_groups=num_groups, top_groups=top_groups
    )
    picks = np.stack([(choices // group == g).sum(axis=1) for g in range(num_groups)])
    pairs = float((picks * (picks - 1)).sum(axis=0).mean())
    return pairs / (experts * (group - 1)), (k * (k - 1) - pairs) / (experts * (experts - group))


def _classes(p: Array) -> tuple[Array, NDArray[np.intp]]:
    """Distinct inclusions, most popular first, and each expert's index among them; pooled to at most 48.

    The most popular half of the classes stay single, for they set the maximum; the rest are pooled evenly, which
    changes means by the second order in their small differences.
    """
    value, of_class = np.unique(-p, return_inverse=True)
    of_class = of_class.reshape(-1)
    if len(value) > _CLASSES:
        single = _CLASSES // 2
        tail = np.arange(len(value) - single) * (_CLASSES - single) // (len(value) - single)
        of_class = np.concatenate([np.arange(single), single + tail])[of_class]
    size = np.bincount(of_class)
    return np.bincount(of_class, weights=p) / size, of_class


def _checked(
    num_experts: int, top_k: float, ep: int, inclusion: ArrayLike | None, placement: ArrayLike | None
) -> tuple[Array, NDArray[np.intp]]:
    """Inclusion and rank of each expert, given or default, checked to fit."""
    uniform = uniform_inclusion(num_experts, top_k)
    p = uniform if inclusion is None else np.asarray(inclusion, dtype=np.float64)
    if p.shape != (num_experts,) or not np.all((p >= 0) & (p <= 1 + 1e-9)) or abs(p.sum() - top_k) > 1e-6 * top_k:
        raise SpecError(
            f"routing: inclusion must hold {num_experts} chances in [0, 1] that sum to top_k = {top_k}; "
            f"got {p.size} that sum to {p.sum():g}"
        )
    ranks = contiguous_placement(num_experts, ep)
    if placement is not None:
        ranks = np.asarray(placement, dtype=np.intp)
        if ranks.shape != (num_experts,) or set(ranks.tolist()) != set(range(ep)):
            raise SpecError(
                f"routing: placement must give each of {num_experts} experts a rank 0..{ep - 1}, none empty"
            )
    return np.minimum(p, 1.0), ranks


def _check_groups(num_experts: int, top_k: float, num_groups: int, top_groups: int) -> None:
    if num_groups < 1 or num_experts % num_groups:
        raise SpecError(f"routing: {num_groups} groups do not divide {num_experts} experts")
    if not 1 <= top_groups <= num_groups or top_groups * num_experts // num_groups < top_k:
        raise SpecError(
            f"routing: {top_groups} groups of {num_experts // num_groups} experts cannot hold top_k = {top_k}"
        )
