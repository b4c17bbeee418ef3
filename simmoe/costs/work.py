"""What a model holds and what its operators do, counted exactly from shapes: parameters, FLOPs, bytes.

One multiply-add is 2 FLOP. Bytes are what an operator must move if each operand crosses the memory bus once.
Matrix elements are counted, and biases and norm scales; softmax, activation functions and rotary embeddings are not
(under 1 % of the FLOPs). Left out of parameter counts: multi-token prediction modules, learned positions, attention
sinks, biases of layer norms. How long the work takes is told elsewhere (`simmoe.costs.operators`).
Checked in tests/test_models.py against published parameter counts, in tests/test_work.py by hand and against torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from simmoe.specs.model import Attention, Experts, Model


@dataclass(frozen=True, slots=True)
class Work:
    """What one kernel does: multiply-adds counted twice [FLOP] and bytes that cross the memory bus [B]."""

    flop: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flop + other.flop, self.bytes + other.bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionParameters:
    """Parameters of one layer's attention, by how tensor parallelism treats them. [parameters]"""

    by_heads: int
    by_kv_heads: int
    replicated: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.by_heads + self.by_kv_heads + self.replicated


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCount:
    """Parameters of a model by part; ``*_layer`` is of one layer that has the part. [parameters]"""

    embedding: int
    head: int
    attention_layer: AttentionParameters
    norms_layer: int
    final_norm: int
    dense_ffn_layer: int
    router_layer: int
    routed_expert: int
    shared_layer: int
    layers: int
    dense_layers: int
    moe_layers: int
    num_experts: int
    top_k: int
    encoder: ParameterCount | None = None

    @property
    def routed_experts(self) -> int:
        """All routed experts of all layers, the encoder's with them."""
        own = self.moe_layers * self.num_experts * self.routed_expert
        return own + (self.encoder.routed_experts if self.encoder else 0)

    @property
    def cross_attention_layer(self) -> int:
        """Attention to the encoder's output and its norm, where there is an encoder."""
        return self.attention_layer.total + self.norms_layer // 2 if self.encoder else 0

    @property
    def besides_experts(self) -> int:
        """Everything tokens pass through, embedding table and head included."""
        per_layer = self.attention_layer.total + self.norms_layer + self.cross_attention_layer
        return (
            (self.encoder.besides_experts if self.encoder else 0)
            + self.embedding
            + self.head
            + self.final_norm
            + self.layers * per_layer
            + self.dense_layers * self.dense_ffn_layer
            + self.moe_layers * (self.router_layer + self.shared_layer)
        )

    @property
    def total(self) -> int:
        """All parameters."""
        return self.besides_experts + self.routed_experts

    @property
    def active(self) -> int:
        """Parameters a token meets: all but the routed experts it is not sent to. The whole embedding is counted.

        With an encoder, what a token of the prompt and one of the answer meet together.
        """
        layers = self.moe_layers + (self.encoder.moe_layers if self.encoder else 0)
        return self.besides_experts + layers * self.top_k * self.routed_expert

    @property
    def active_without_embedding(self) -> int:
        """``active`` less the input table where that is a look-up only (not where the head shares it)."""
        return self.active - (self.embedding if self.head else 0)


def parameters(model: Model, *, active_experts: int | None = None, total_experts: int | None = None) -> ParameterCount:
    """Count a model's parameters from its shapes.

    Parameters
    ----------
    model : the model.
    active_experts : experts per token if capped; None: the model's own top-k. [experts]
    total_experts : experts kept in each layer of a pruned model, with their router rows; None: all. [experts]

    Notes
    -----
    Per layer: GQA ``d H h + 2 d K h + H h d``; MLA (arXiv 2405.04434, section 2.1) ``d r_q + r_q H (n + p) + d (r + p)
    + r H (n + v) + H v d``, the first two terms ``d H (n + p)`` without query compression; FFN ``m d f``.
    """
    d, moe = model.hidden, model.experts
    pool = min(total_experts or moe.num_experts, moe.num_experts) if moe else 0
    table = model.vocab * d
    stack, before = model.encoder_stack, None
    if stack is not None:  # it shares the decoder's embedding and has no head
        before = replace(
            parameters(stack, active_experts=active_experts, total_experts=total_experts), embedding=0, head=0
        )
    return ParameterCount(
        encoder=before,
        embedding=table,
        head=0 if model.tied_embeddings else table,
        attention_layer=attention_parameters(model.attention, d),
        norms_layer=2 * d,
        final_norm=d,
        dense_ffn_layer=model.dense_matrices * d * model.dense_inter_size,
        router_layer=(d + moe.router_bias) * pool if moe else 0,
        routed_expert=expert_parameters(moe, d) if moe else 0,
        shared_layer=moe.matrices * d * moe.shared_inter_size + moe.shared_gate * d if moe else 0,
        layers=model.layers,
        dense_layers=model.dense_layers,
        moe_layers=model.moe_layers,
        num_experts=pool,
        top_k=min(active_experts or moe.top_k, pool) if moe else 0,
    )


def attention_parameters(attention: Attention, hidden: int) -> AttentionParameters:
    """One layer's attention: projections, their biases, norms inside it. [parameters]"""
    a = attention
    output = a.heads * a.v_head_dim * hidden
    output_bias = hidden * a.output_bias
    if a.kind == "mla":
        latent, rank = int(a.kv_lora_rank or 0), a.q_lora_rank
        queries = (rank or hidden) * a.heads * a.head_dim
        keys_values = latent * a.heads * (a.qk_nope_head_dim + a.v_head_dim)
        query_down = (hidden + 1) * rank if rank else 0  # + 1: the norm on the compressed query
        kv_down = hidden * (latent + a.qk_rope_head_dim) + latent
        return AttentionParameters(
            by_heads=queries + keys_values + output, by_kv_heads=0, replicated=query_down + kv_down + output_bias
        )
    bias = int(a.qkv_bias)
    norm_heads = a.heads * a.head_dim if a.qk_norm_whole else 0
    norm_kv_heads = a.kv_heads * a.head_dim if a.qk_norm_whole else 0
    norm_shared = 2 * a.head_dim if a.qk_norm and not a.qk_norm_whole else 0
    return AttentionParameters(
        by_heads=(hidden + bias) * a.heads * a.head_dim + output + norm_heads,
        by_kv_heads=(hidden + bias) * a.kv_heads * (a.head_dim + a.v_head_dim) + norm_kv_heads,
        replicated=output_bias + norm_shared,
    )


def expert_parameters(experts: Experts, hidden: int) -> int:
    """One routed expert: its matrices and, where it has them, their biases. [parameters]"""
    biases = (experts.matrices - 1) * experts.inter_size + hidden if experts.bias else 0
    return experts.matrices * hidden * experts.inter_size + biases


def gemm_work(m: int, n: int, k: int, *, weight_bytes: float, activation_bytes: float) -> Work:
    """Product of an (m, k) activation with a (k, n) weight; bytes per element given. [FLOP, B]"""
    return Work(2 * m * n * k, n * k * weight_bytes + (m * k + m * n) * activation_bytes)


def experts_work(
    experts: Experts,
    hidden: int,
    *,
    routed_pairs: float,
    active_experts: float,
    shards: int = 1,
    weight_bytes: float,
    activation_bytes: float,
) -> Work:
    """Both grouped products of one layer's routed experts on one device.

    Parameters
    ----------
    experts, hidden : shapes of the layer.
    routed_pairs : (token, expert) pairs the device computes. [pairs]
    active_experts : its experts that get at least one token; each one's weights are read once. [experts]
    shards : tensor-parallel slices of each expert.
    weight_bytes, activation_bytes : per element.

    Notes
    -----
    Per pair the first product reads ``hidden`` and writes ``(matrices - 1) inter``, the second reads ``inter`` and
    writes ``hidden``; sorting tokens, quantising them and the weighted sum are not in it.
    """
    inter = -(-experts.inter_size // shards)
    matrix = hidden * inter
    moved = 2 * hidden + experts.matrices * inter
    return Work(
        2 * routed_pairs * experts.matrices * matrix,
        active_experts * experts.matrices * matrix * weight_bytes + routed_pairs * moved * activation_bytes,
    )


def attended_pairs(new_tokens: int, cached_tokens: int = 0, window: int | None = None) -> int:
    """(query, key) pairs that causal attention of one request forms: each token sees itself and all before it.

    With a window, a token sees at most ``window`` tokens, itself included. [pairs]
    """
    last = cached_tokens + new_tokens
    if window is None or last <= window:
        return new_tokens * cached_tokens + new_tokens * (new_tokens + 1) // 2
    growing = max(0, window - cached_tokens)  # queries that do not yet fill the window
    return growing * cached_tokens + growing * (growing + 1) // 2 + (new_tokens - growing) * window


def attention_work(
    attention: Attention,
    *,
    new_tokens: int,
    cached_tokens: int = 0,
    tp: int = 1,
    absorbed: bool = False,
    windowed: bool = False,
    kv_bytes: float,
    activation_bytes: float,
) -> Work:
    """One request's attention in one layer on one of ``tp`` ranks: scores and weighted values, no projections.

    ``new_tokens`` is 1 in decode, a chunk in prefill. Keys and values are read once and the new ones written.

    Parameters
    ----------
    attention : shapes.
    new_tokens, cached_tokens : queries, and tokens of the request already cached. [tokens]
    tp : ranks that share the heads; kv heads are shared until each rank has one, an MLA latent is on every rank.
    absorbed : MLA only: queries meet the latent itself (width ``r + p`` for scores, ``r`` for values) and the
        up-projections are folded into them (arXiv 2405.04434, section 2.1.2). Otherwise keys and values were
        expanded before, and expanded ones are read.
    windowed : the layer attends within ``sliding_window``.
    kv_bytes, activation_bytes : per element.
    """
    a = attention
    heads = -(-a.heads // tp)
    window = a.sliding_window if windowed else None
    pairs = attended_pairs(new_tokens, cached_tokens, window)
    first = 0 if window is None else max(0, cached_tokens - window + 1)  # oldest key any query sees
    keys = cached_tokens + new_tokens - first
    if a.kind == "mla":
        latent = int(a.kv_lora_rank or 0)
        score, value = (latent + a.qk_rope_head_dim, latent) if absorbed else (a.head_dim, a.v_head_dim)
        cache_width = latent + a.qk_rope_head_dim
        read = keys * (cache_width * kv_bytes if absorbed else heads * (score + value) * activation_bytes)
        cache = read + new_tokens * cache_width * kv_bytes
    else:
        score, value = a.head_dim, a.v_head_dim
        cache = (keys + new_tokens) * kv_elements_per_token(a, tp) * kv_bytes
    queries = new_tokens * heads * (score + value) * activation_bytes
    return Work(2 * pairs * heads * (score + value), queries + cache)


def kv_elements_per_token(attention: Attention, tp: int = 1) -> int:
    """Numbers a rank caches per token and layer. Kv heads split down to one a rank, an MLA latent never. [elements]"""
    if attention.kind == "mla":
        return attention.kv_elements_per_token
    return -(-attention.kv_heads // tp) * (attention.head_dim + attention.v_head_dim)
