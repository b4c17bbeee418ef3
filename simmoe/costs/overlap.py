"""What of dispatch and combine still shows when something else runs beside them.

Model: ``shared``: the shared expert runs while tokens are dispatched. ``two_batch``: the batch is cut into two halves
that take turns, so each exchange of one half runs under one stretch of the other's compute. With bulk kernels:
attention under a dispatch, experts under the next, experts under a combine, attention under the next. With low-latency
ones the second half follows two of five stages behind: a dispatch runs under its own shared expert and the other half's
way into attention, a combine under the other's attention, and experts alone. An exchange longer than its stretch shows,
so an even total is not enough. Multiprocessors that exchange kernels hold are lost to compute meanwhile; where bulk
kernels hold some throughout, products are launched on the others from the start, whether one is at work or not.
Left out: copies that contend for memory bandwidth (bulk kernels move a sixth of it, and small kernels beside them
already lose the multiprocessors held); products that slow an exchange down (a dispatch by 18 %, a combine by 1 %,
github.com/deepseek-ai/DeepEP/issues/184; the dispatch is the shorter of its pair).
Sources: DeepSeek-AI, "DeepSeek-V3 Technical Report", arXiv 2412.19437, sec. 3.4; github.com/deepseek-ai/profile-data
(the order of stretches); sgl-project/sglang, batch_overlap/operations_strategy.py (``deep_gemm_num_sms``, stages of
decode, as in deepseek-ai/open-infra-index, day 6).
Checked in tests/test_mechanisms_exchange.py and validate/claims.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

EXCHANGE = ("dispatch", "combine")
#: Parts that are matrix products, launched on as many multiprocessors as the caller says.
_PRODUCTS = ("projections", "shared_experts")
#: Share of a low-latency exchange in which its kernels hold the device (sending, receiving); in flight they hold
#: nothing. Source: the SGLang team's report on 96 H100 (May 2025), dispatch: 0.06 of 0.17 ms a layer.
LOW_LATENCY_HELD = 0.06 / 0.17


def under_shared_expert(parts: Mapping[str, Array]) -> dict[str, Array]:
    """Parts with dispatch shortened by the shared expert that runs beside it. [s]"""
    if "dispatch" not in parts or "shared_experts" not in parts:
        return dict(parts)
    return {**parts, "dispatch": np.maximum(parts["dispatch"] - parts["shared_experts"], 0.0)}


def beside_routed_experts(parts: Mapping[str, Array]) -> Array:
    """What shows of a shared expert that runs on a second stream while the routed ones do. [s]

    Right while both are bound by launches and latency; large batches fill the device and gain nothing.
    """
    return np.maximum(parts["shared_experts"] - parts["routed_experts"], 0.0)


def two_batches(
    parts: Mapping[str, Array],
    attention_s: Array | float,
    held: Array | float,
    moe_share: float,
    kept: NDArray[np.bool_] | bool = False,
    staged: NDArray[np.bool_] | bool = False,
    ahead: Array | float = 0.0,
) -> dict[str, Array]:
    r"""Parts of a step whose halves take turns; dispatch and combine keep what shows, at most themselves. [s]

    .. math:: t = \tfrac12 \sum_{(X, W)} \max(X,\, W + h X), \qquad
        (X, W) \in \{(D, A), (D, M), (C, M), (C, A)\}

    with D, C the exchanges and M, A the experts and all other compute of the MoE layers, both halves together, and h
    the share of an exchange's time in which it holds the device. Where products are kept off its multiprocessors,
    the part P of W that they are takes P / (1 - h), and only the rest loses h while the exchange lasts. Staged, with I
    the shared expert and the way into attention:

    .. math:: t = \max(D,\, I + h D) + M + \max(C,\, A - I + h C)

    Parameters
    ----------
    parts : times of both halves together; host time is not among them. [s]
    attention_s : compute that is not among the parts. [s]
    held : h, scalar or of the parts' shape. [-]
    moe_share : share of the layers that are MoE layers. [-]
    kept : whether products keep off the multiprocessors that exchanges hold, all the time.
    staged : whether the halves follow each other by two of five stages.
    ahead : the part of ``projections`` that makes queries and keys. [s]
    """
    zero = np.zeros_like(np.asarray(next(iter(parts.values())), dtype=np.float64))
    dispatch, combine = (parts.get(name, zero) for name in EXCHANGE)
    experts = parts.get("routed_experts", zero) + parts.get("expert_fetch", zero)
    dense = parts.get("dense_ffn", zero)
    beside = sum((value for name, value in parts.items() if name not in EXCHANGE), zero) + attention_s
    around = moe_share * (beside - experts - dense)
    multiplied = moe_share * sum((parts.get(name, zero) for name in _PRODUCTS), zero)
    share_held = np.asarray(held, dtype=np.float64)
    total = zero
    for sent in (dispatch, combine):
        for compute, products in ((around, multiplied), (experts, experts)):
            rest = np.divide(compute - products, compute, out=np.zeros_like(sent), where=compute > 0)
            widened = products * share_held / (1.0 - share_held) + rest * share_held * sent
            total = total + 0.5 * np.maximum(sent, compute + np.where(kept, widened, share_held * sent))
    # of the norms, one stands before attention and one after
    into = moe_share * (parts.get("shared_experts", zero) + ahead + parts.get("elementwise", zero) / 2)
    stages = np.maximum(dispatch, into + share_held * dispatch) + experts
    stages = stages + np.maximum(combine, around - into + share_held * combine)
    total = np.where(staged, stages, total)
    shown = np.clip(total - around - experts, 0.0, dispatch + combine)
    share = np.divide(shown, dispatch + combine, out=np.zeros_like(shown), where=dispatch + combine > 0)
    return {name: value * share if name in EXCHANGE else value for name, value in parts.items()}
