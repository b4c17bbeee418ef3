"""Time of a model's attention layers: decode, prefill, and decode in a step that also computes prompts.

MLA decodes absorbed (two small batched products around the latent kernel) and prefills expanded (the up-projection is a
matrix product); grouped-query attention is its kernel alone. Sliding windows cut the context of the layers that have
one. Requests that verify drafts bring several query rows to one read of their cache, which stand beside the heads in a
tile (FlashMLA and FlashAttention 3 pack them so). Left out: what several chunks in one launch share, the causal mask
among such rows. Checked against: validate/, profiles/*/{mla,attention}_*.csv.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from simmoe.costs.borrowing import DEFAULT_LOG_SIGMA
from simmoe.costs.operators import bmm, gemm, gqa, mla
from simmoe.costs.operators.attention_kernel import EARLY_ARCHITECTURES
from simmoe.costs.precision import Precision
from simmoe.costs.timing import KernelTimes
from simmoe.specs.deployment import BYTES_PER_ELEMENT, Deployment
from simmoe.specs.hardware import Hardware
from simmoe.specs.model import Model

Array = NDArray[np.float64]

#: Whose measured MLA kernels stand for an engine's: TensorRT-LLM's are the only expanded prefill kernels measured
#: alone, SGLang's FlashAttention 3 latent decode is the one vLLM runs on Hopper as well.
_EXPANDED_PREFILL = {"vllm": {"framework": "trtllm"}, "sglang": {"framework": "trtllm"}}
_LATENT_DECODE = {"vllm": {"framework": "sglang"}}


@dataclass
class AttentionLayers:
    """All attention layers of a model on one rank's share of a batch.

    Parameters
    ----------
    queries : rows a decoding request brings: its token, and drafts to verify. [tokens]

    Attributes
    ----------
    spreads : log spread of the decode and the prefill kernels timed last. [-]
    """

    hardware: Hardware
    model: Model
    deployment: Deployment
    times: KernelTimes
    precision: Precision
    queries: int = 1
    spreads: dict[str, float] = field(default_factory=dict)

    @property
    def sigma(self) -> float:
        """Log spread of attention: that of the less sure kernel. [-]"""
        return max(self.spreads.values(), default=DEFAULT_LOG_SIGMA)

    def decode(self, requests: Array, context: Array) -> Array:
        """Attention of ``requests`` decoding requests with a mean ``context`` each, all layers. [s]"""
        d, m, a = self.deployment, self.model, self.model.attention
        batch = np.maximum(np.ceil(np.asarray(requests, dtype=np.float64) / (d.dp * d.pp)), 1.0)
        context = np.maximum(np.asarray(context, dtype=np.float64), 1.0)
        kv_bytes = BYTES_PER_ELEMENT[d.kv_precision]
        bits = self.precision.plain.compute_bits
        kv_dtype = {1.0: "fp8", 4.0: "float32"}.get(kv_bytes, "bfloat16")
        heads = max(1.0, a.heads / d.tp_size)
        if a.kind == "mla":
            latent, rope = float(a.kv_lora_rank or 0), float(a.qk_rope_head_dim)
            choice = self.times.kernels.get(mla.MLA_DECODE.name)
            tile, splits = (choice.head_tile, choice.splits) if choice else (float(mla.HEAD_TILE), 1.0)
            features = mla.decode_features(
                batch, context, heads * self.queries, kv_lora_rank=latent, rope_dim=rope, kv_bytes=kv_bytes,
                compute_bits=bits if bits > 16 else None, head_tile=tile, splits=splits,
            )  # fmt: skip
            # SGLang widens an fp8 cache before it multiplies, which later kernels do not
            stand_in = {"framework": "trtllm"} if kv_dtype == "fp8" else _LATENT_DECODE.get(d.engine, {})
            seconds, sigma = self.times.seconds(
                mla.MLA_DECODE, features, cold=True, operation="attention_kernel", kv_cache_dtype=kv_dtype,
                **stand_in,
            )  # fmt: skip
            p = self.precision.plain
            for operation, n, k in (
                ("mla_gen_pre", latent, float(a.qk_nope_head_dim)),
                ("mla_gen_post", float(a.v_head_dim), latent),
            ):
                absorb = bmm.features_of(
                    batch * self.queries, heads, n, k, weight_bytes=p.weight_bytes, activation_bytes=p.activation_bytes,
                    compute_bits=p.compute_bits,
                )  # fmt: skip
                extra, _ = self.times.seconds(bmm.OPERATOR, absorb, operation=operation, dtype=p.dtype)
                seconds = seconds + extra
            total = m.layers * seconds
        else:
            kv_heads = max(1.0, a.kv_heads / d.tp_size)
            windowed = a.windowed_layers if a.sliding_window else 0
            total = np.zeros(np.broadcast_shapes(batch.shape, context.shape))
            sigma = np.full(total.shape, DEFAULT_LOG_SIGMA)
            inside = np.minimum(context, a.sliding_window or 1)
            for layers, seen in ((m.layers - windowed, context), (windowed, inside)):
                if layers:
                    features = gqa.decode_features(
                        batch, seen, heads * self.queries, kv_heads, a.head_dim, v_head_dim=a.v_head_dim,
                        kv_bytes=kv_bytes, compute_bits=bits,
                    )  # fmt: skip
                    seconds, sigma = self.times.seconds(gqa.ATTENTION_DECODE, features)
                    total = total + layers * seconds
        self.spreads["decode"] = _mean(sigma, total)
        return np.asarray(total, dtype=np.float64)

    def prefill(self, new: Array, cached: Array) -> Array:
        """Attention of one prompt chunk of ``new`` tokens after ``cached`` ones, all layers. [s]"""
        d, m, a = self.deployment, self.model, self.model.attention
        new = np.maximum(np.asarray(new, dtype=np.float64), 1.0)
        cached = np.asarray(cached, dtype=np.float64)
        heads = max(1.0, a.heads / d.tp_size)
        bits = self.precision.plain.compute_bits
        one = np.ones_like(new)
        if a.kind == "mla":
            features = mla.prefill_features(
                one, new, heads, cached_tokens=cached, kv_lora_rank=float(a.kv_lora_rank or 0),
                rope_dim=float(a.qk_rope_head_dim), nope_dim=float(a.qk_nope_head_dim),
                v_head_dim=float(a.v_head_dim), compute_bits=bits,
            )  # fmt: skip
            seconds, sigma = self.times.seconds(
                mla.MLA_PREFILL, features, cold=True, operation="attention_kernel",
                kv_cache_dtype="float32" if bits == 32 else "bfloat16", **_EXPANDED_PREFILL.get(d.engine, {}),
            )  # fmt: skip
            p = self.precision.dense
            width = heads * (a.qk_nope_head_dim + a.v_head_dim)
            up = gemm.features_of(
                new + cached, width, a.kv_lora_rank or 1, weight_bytes=p.weight_bytes,
                activation_bytes=p.activation_bytes, compute_bits=p.compute_bits, quantise=float(p.quantises),
            )  # fmt: skip
            extra, _ = self.times.seconds(gemm.OPERATOR, up, dtype=p.dtype)
            total = m.layers * (seconds + extra)
        else:
            kv_heads = max(1.0, a.kv_heads / d.tp_size)
            windowed = a.windowed_layers if a.sliding_window else 0
            total = np.zeros(np.broadcast_shapes(new.shape, cached.shape))
            sigma = np.full(total.shape, DEFAULT_LOG_SIGMA)
            window = float(a.sliding_window or 0)
            inside, share = _in_window(new, cached, window)
            for layers, seen, part in ((m.layers - windowed, cached, one), (windowed, inside, share)):
                if layers:
                    features = gqa.prefill_features(
                        one, new, heads, kv_heads, a.head_dim, cached_tokens=seen, v_head_dim=a.v_head_dim,
                        compute_bits=bits,
                    )  # fmt: skip
                    seconds, sigma = self.times.seconds(gqa.ATTENTION_PREFILL, features)
                    total = total + layers * seconds * part
        self.spreads["prefill"] = _mean(sigma, total)
        return np.asarray(total, dtype=np.float64)

    def mixed(self, requests: Array, context: Array) -> Array:
        """As `decode` in a step that also computes prompts, all layers. [s]

        One kernel then takes prompts and single tokens alike. FlashAttention 2 packs the query heads of a KV head only
        when every request has one token, so each head walks over the cache by itself; FlashAttention 3 always packs.
        Taken as the prefill kernel with tiles of 64 query rows (it was measured, and is counted, with 128), and never
        below the decode kernel.
        """
        alone = self.decode(requests, context)
        a, d = self.model.attention, self.deployment
        if a.kind == "mla" or self.hardware.device.architecture not in EARLY_ARCHITECTURES:
            return alone
        batch = np.maximum(np.ceil(np.asarray(requests, dtype=np.float64) / (d.dp * d.pp)), 1.0)
        heads, kv_heads = max(1.0, a.heads / d.tp_size), max(1.0, a.kv_heads / d.tp_size)
        windowed = a.windowed_layers if a.sliding_window else 0
        total = np.zeros_like(alone)
        for layers, seen in (
            (self.model.layers - windowed, context),
            (windowed, np.minimum(context, a.sliding_window or 1)),
        ):
            if layers:
                # two tokens each: the operator takes one token for a decode
                features = gqa.prefill_features(
                    batch, 2.0, heads, kv_heads, a.head_dim, cached_tokens=seen, v_head_dim=a.v_head_dim,
                    compute_bits=self.precision.plain.compute_bits,
                )  # fmt: skip
                seconds, _ = self.times.seconds(gqa.ATTENTION_PREFILL, features)
                total = total + layers * seconds / 2
        return np.maximum(alone, total)


def _mean(sigma: Array, seconds: Array) -> float:
    """Spread of several kernels, those that take longer counting for more. [-]"""
    return float(np.average(np.broadcast_to(sigma, seconds.shape), weights=seconds))


def _in_window(new: Array, cached: Array, window: float) -> tuple[Array, Array]:
    """Cached tokens before a chunk that make as many (query, key) pairs as a sliding window leaves; share of these. [-]

    The share is 1 unless the chunk alone has more pairs: a window cuts pairs, and no launch.
    """
    if not window:
        return cached, np.ones_like(new)
    own = new * (new + 1) / 2
    growing = np.clip(window - cached, 0.0, new)
    inside = growing * cached + growing * (growing + 1) / 2 + (new - growing) * window
    return np.maximum(inside - own, 0.0) / new, np.asarray(np.minimum(inside / own, 1.0), dtype=np.float64)
