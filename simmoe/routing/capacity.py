r"""Fixed expert capacity: slots that stay empty, tokens that find none, and second choices.

Model: an expert's count is binomial with its inclusion; beyond C slots tokens are dropped, or try one other expert.
Every slot is computed and sent, full or not.
Left out: third choices, order effects in who is dropped. Table of drawn drop rates in tests/test_mechanisms_padding.py.
Sources: W. Fedus et al., "Switch Transformers", arXiv 2101.03961, sec. 2.2 (capacity factor over the even share).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simmoe.routing.counts import count_cdf
from simmoe.routing.expert_load import TILES, ExpertLoad

Array = NDArray[np.float64]


def slots_per_expert(tokens: ArrayLike, num_experts: int, top_k: float, capacity_factor: float) -> Array:
    """C = ceil(capacity_factor T k / E), shape of ``tokens``. [slots]"""
    even = np.asarray(tokens, dtype=np.float64) * top_k / num_experts
    return np.asarray(np.maximum(np.ceil(capacity_factor * even - 1e-9), 1.0), dtype=np.float64)


def dropped_share(inclusion: ArrayLike, tokens: float, slots: float, *, second_choice: bool = False) -> float:
    r"""Share of (token, expert) pairs that find no slot. [-]

    .. math:: \frac{\sum_e E[(X_e - C)^+]}{T k}, \qquad X_e \sim \mathrm{Bin}(T, \pi_e)

    ``inclusion`` of shape (E,) sums to k. With ``second_choice`` each such pair tries one more expert, drawn by
    popularity and not by what is free; with Y of them arriving at e the loss is E[(X + Y - C)^+] - E[(X - C)^+].
    """
    whole = float(np.floor(slots))
    if slots > whole:  # (X - C)^+ is a straight line in C between whole numbers
        few, many = (dropped_share(inclusion, tokens, n, second_choice=second_choice) for n in (whole, whole + 1.0))
        return few + (slots - whole) * (many - few)
    p = np.asarray(inclusion, dtype=np.float64)
    value, counts = np.unique(p, return_counts=True)
    mean, variance = tokens * value, tokens * value * (1.0 - value)
    first = np.array([_excess(m, v, slots, tokens) for m, v in zip(mean, variance, strict=True)])
    over = float(first @ counts)
    if second_choice and over > 0:
        more = over * value / p.sum()
        both = [_excess(m, v, slots, 2.0 * tokens) for m, v in zip(mean + more, variance + more, strict=True)]
        over = float((np.array(both) - first) @ counts)
    return over / (tokens * float(p.sum()))


def _excess(mean: float, variance: float, slots: float, most: float) -> float:
    """E[(X - C)^+] = sum over m >= C of P(X > m), for a count of this mean and variance."""
    top = min(mean + 9.0 * np.sqrt(variance) + 12.0, most)
    if top <= slots:
        return 0.0
    m = np.arange(slots, top + 1.0)
    return float((1.0 - count_cdf(m, np.full_like(m, mean), np.full_like(m, variance))).clip(0.0, 1.0).sum())


def padded_load(load: ExpertLoad, num_experts: int, top_k: float, capacity_factor: float) -> ExpertLoad:
    """Load with every expert's slots computed, full or empty: all local experts active, C rows each."""
    slots = slots_per_expert(np.maximum(load.tokens, 1.0), num_experts, top_k, capacity_factor)
    local = float(load.local_experts)
    return replace(
        load,
        routed_pairs=slots * local,
        active_experts=np.full_like(slots, local),
        busiest_expert_tokens=slots,
        row_blocks={tile: local * np.ceil(slots / tile) for tile in TILES},
    )


def waste_factor(tokens: ArrayLike, num_experts: int, top_k: float, capacity_factor: float) -> Array:
    """Slots over the pairs they are for, E C / (T k), shape of ``tokens``. [-]

    With capacity a share f of *all* tokens (fairseq), capacity_factor = f E / k and the waste is f E / k.
    """
    t = np.maximum(np.asarray(tokens, dtype=np.float64), 1.0)
    return num_experts * slots_per_expert(t, num_experts, top_k, capacity_factor) / (t * top_k)
