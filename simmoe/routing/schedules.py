"""Numbers of experts that vary from token to token: gates that keep what scores near the best, or as many as matter.

Model: router logits are independent Gaussians of one spread. A threshold gate keeps an expert of the top-k while its
score is above a share of the best one's; an entropy gate keeps a share of exp(H), the effective number of experts that
the token's weights are spread over; both keep at least ``keep_min``. The distribution is drawn once with a fixed seed.
Left out: logits that depend on the token's difficulty (give the shares as measured: ``top_k_shares``).
Sources: the threshold of 2402.14800 sec. 3.3 (second expert skipped below a share of the first) for any k; exp(H) as a
number of alternatives: M. O. Hill, Ecology 54 (1973) 427-432, order 1.
Checked in tests/test_mechanisms_routing.py.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_TOKENS = 20_000
_ROUNDING = 1e-9


def kept_shares(
    num_experts: int, top_k: int, threshold: float, *, keep_min: int = 1, spread: float = 1.0, sigmoid: bool = False
) -> tuple[float, ...]:
    """Share of tokens that keep 1, 2 ... ``top_k`` experts under a threshold gate, shape (top_k,), sum 1. [-]

    Parameters
    ----------
    threshold : experts are kept whose score is at least this share of the best. [-]
    keep_min : kept in any case. [experts]
    spread : standard deviation of the logits; an assumption about the router. [-]
    sigmoid : scores are sigmoids of the logits (DeepSeek-V3); else softmax, whose ratios are exponentials.
    """
    scores = _best_scores(num_experts, top_k, spread, sigmoid)
    return _shares((scores >= threshold * scores[:, :1]).sum(axis=1), keep_min, top_k)


def entropy_shares(
    num_experts: int, top_k: int, share: float, *, keep_min: int = 1, spread: float = 1.0, sigmoid: bool = False
) -> tuple[float, ...]:
    r"""Share of tokens that keep 1, 2 ... ``top_k`` experts under an entropy gate, shape (top_k,), sum 1. [-]

    .. math:: k = \lceil s \, e^{H} \rceil, \qquad H = -\sum_{i=1}^{top\,k} g_i \ln g_i

    with the top-k weights g summing to one: exp(H) is top-k where they are alike and 1 where one takes all.

    Parameters
    ----------
    share : s, of the effective number of experts, that is kept. [-]
    keep_min, spread, sigmoid : as in `kept_shares`.
    """
    scores = _best_scores(num_experts, top_k, spread, sigmoid)
    weights = scores / scores.sum(axis=1, keepdims=True)
    effective = np.exp(-(weights * np.log(np.maximum(weights, 1e-300))).sum(axis=1))
    return _shares(np.ceil(share * effective - _ROUNDING).astype(np.intp), keep_min, top_k)


@lru_cache(maxsize=64)
def _best_scores(num_experts: int, top_k: int, spread: float, sigmoid: bool) -> NDArray[np.float64]:
    """Scores of the top-k of drawn tokens, best first, shape (tokens, top_k); softmax ones lack their common factor."""
    logits = spread * np.sort(np.random.default_rng(0).standard_normal((_TOKENS, num_experts)), axis=1)[:, ::-1]
    best = logits[:, :top_k]
    return 1.0 / (1.0 + np.exp(-best)) if sigmoid else np.exp(best - best[:, :1])


def _shares(kept: NDArray[np.intp], keep_min: int, top_k: int) -> tuple[float, ...]:
    kept = np.clip(kept, min(keep_min, top_k), top_k)
    return tuple((np.bincount(kept, minlength=top_k + 1)[1:] / _TOKENS).tolist())
