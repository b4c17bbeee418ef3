"""The dense matrix products a token goes through, as shapes on one device. What they take: `costs.operators.gemm`."""

from __future__ import annotations

from typing import NamedTuple

from simmoe.specs.deployment import Deployment
from simmoe.specs.model import Model


class Matrix(NamedTuple):
    """One kind of product (tokens, k) x (k, n) of a step.

    ``part`` of the breakdown it counts to, ``times`` a step; ``quantised``: in the precision of the dense weights
    rather than in the plain one.
    """

    part: str
    times: int
    n: float
    k: float
    quantised: bool = True


def token_matrices(model: Model, deployment: Deployment, *, replicated: bool, fused: bool) -> list[Matrix]:
    """Products of every token.

    Parameters
    ----------
    replicated : the shared expert is held whole by every rank, as its input is where tokens are exchanged.
    fused : the shared expert runs as one more routed expert, not here.
    """
    m, tp = model, deployment.tp_size
    shapes = _projections(m, deployment)
    if m.dense_layers:
        shapes += _pair("dense_ffn", m.dense_layers, m.hidden, m.dense_inter_size / tp, m.dense_matrices)
    e = m.experts
    if e is not None:
        pool = deployment.total_experts or e.num_experts
        shapes.append(Matrix("router", m.moe_layers, pool, m.hidden, quantised=False))
        if e.shared_inter_size and not fused:
            width = e.shared_inter_size / (1 if replicated else tp)
            shapes += _pair("shared_experts", m.moe_layers, m.hidden, width, e.matrices)
    return shapes


def before_attention(model: Model, deployment: Deployment) -> list[Matrix]:
    """Those of `token_matrices` that make queries and keys."""
    return _projections(model, deployment)[:-1]


def cross_queries(model: Model, tp: int) -> list[Matrix]:
    """Queries and outputs of cross-attention; its keys and values are made with the prompt: `cross_keys`."""
    a, m = model.attention, model
    return [
        Matrix("projections", m.layers, a.heads / tp * a.head_dim, m.hidden),
        Matrix("projections", m.layers, m.hidden, a.heads / tp * a.v_head_dim),
    ]


def cross_keys(model: Model, tp: int) -> Matrix:
    """Keys and values that cross-attention makes of an encoded prompt."""
    a = model.attention
    return Matrix("projections", model.layers, max(1.0, a.kv_heads / tp) * (a.head_dim + a.v_head_dim), model.hidden)


def _projections(m: Model, deployment: Deployment) -> list[Matrix]:
    """Queries and keys, then the output."""
    a, tp = m.attention, deployment.tp_size
    heads = a.heads / tp
    latent = (a.kv_lora_rank or 0) + a.qk_rope_head_dim
    if a.kind != "mla":
        sizes = [(heads * a.head_dim + max(1.0, a.kv_heads / tp) * (a.head_dim + a.v_head_dim), m.hidden)]
    elif not a.q_lora_rank:
        sizes = [(heads * a.head_dim + latent, m.hidden)]
    else:
        sizes = [(a.q_lora_rank + latent, m.hidden), (heads * a.head_dim, a.q_lora_rank)]
    quantised = not deployment.wide_attention
    return [Matrix("projections", m.layers, n, k, quantised) for n, k in [*sizes, (m.hidden, heads * a.v_head_dim)]]


def _pair(part: str, times: int, hidden: int, width: float, matrices: int) -> list[Matrix]:
    """Up (with a gate, if there are three matrices) and down."""
    return [Matrix(part, times, (matrices - 1) * width, hidden), Matrix(part, times, hidden, width)]
