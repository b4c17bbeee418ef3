"""Multi-head latent attention: prefill and decode, kernel alone or the whole block with its projections.

Counts (DeepSeek-V2, arXiv 2405.04434, sec. 2.1): one latent of ``kv_lora_rank + rope_dim`` numbers per
token is cached for all heads. Absorbed, every head works on the latent: ``2 (2 kv_lora + rope)`` FLOPs per
query-key pair; expanded (prefill of most engines) ``2 (nope + rope + v)``. Query heads are padded to the
kernel's tile: 1 to 64 heads cost the same matrix work in FlashMLA and FlashAttention 3. Times:
`attention_kernel`, `mla_projections`. Left out: sparse attention (DSA). Compared with: measured SGLang,
TensorRT-LLM (kernel) and vLLM (block) times; no measured row has a cached prefix in prefill.
"""

from __future__ import annotations

import numpy as np

from simmoe.costs.operators.attention_kernel import (
    DECODE_PARAMETERS,
    EARLY_ARCHITECTURES,
    KEY_BLOCK,
    PREFILL_PARAMETERS,
    DecodeWork,
    PrefillWork,
    arrays,
    cached_parts,
    decode_kernel_s,
    l2_relief,
    prefill_kernel_s,
)
from simmoe.costs.operators.base import Array, Features, Operator, Parameters, peak_flop_per_s
from simmoe.costs.operators.mla_projections import (
    PARAMETERS as PROJECTION_PARAMETERS,
)
from simmoe.costs.operators.mla_projections import (
    ProjectionWork,
    projection_roofline_s,
    projection_s,
    projection_work,
)
from simmoe.specs.hardware import Hardware
from simmoe.specs.measurement import Table

ELEMENT_BYTES = 2.0  # queries, expanded keys and values, outputs
HEAD_TILE = 64  # query rows of one decode work item in FlashMLA and FlashAttention 3; 16 in the Triton kernels
# query rows of one expanded prefill work item; before Hopper shared memory holds no more at a key width of 192
# (128 rows leave 12 % instead of 6 % mean error on the L40S)
EXPANDED_TILE, EARLY_EXPANDED_TILE = 128.0, 64.0

# DeepSeek-V3's block, which all measured rows have but for the number of heads
V3_HIDDEN, V3_Q_LORA, KV_LORA, ROPE, NOPE, V_HEAD = 7168.0, 1536.0, 512.0, 64.0, 128.0, 128.0


def decode_features(
    batch: Array | float,
    context_tokens: Array | float,
    heads: Array | float,
    *,
    kv_lora_rank: Array | float = KV_LORA,
    rope_dim: Array | float = ROPE,
    kv_bytes: Array | float = 2.0,
    compute_bits: Array | float | None = None,
    head_tile: Array | float = HEAD_TILE,
    splits: Array | float = 1.0,
    hidden: Array | float = 0.0,
    q_lora_rank: Array | float = V3_Q_LORA,
    nope_dim: Array | float = NOPE,
    v_head_dim: Array | float = V_HEAD,
    gemm_bits: Array | float = 16.0,
) -> dict[str, Array]:
    """Features of `mla_decode` on one rank; ``hidden`` 0 asks for the attention kernel alone.

    Parameters
    ----------
    batch, context_tokens : requests, and mean cached tokens of one. [requests], [tokens]
    heads : query heads of the rank; the latent is not split by tensor parallelism.
    kv_lora_rank, rope_dim, nope_dim, v_head_dim, q_lora_rank, hidden : widths; q_lora_rank 0 if there is none.
    kv_bytes : bytes per cached number. [B]
    compute_bits : operand width of the kernel, by default that of the cache, as in the fits. [bit]
    gemm_bits : operand width of the projections. [bit]
    head_tile : query heads of one work item.
    splits : 1 if the kernel splits a context only over idle SMs; else the fixed number of parts.
    """
    return arrays(
        batch=batch,
        context_tokens=context_tokens,
        heads=heads,
        kv_lora_rank=kv_lora_rank,
        rope_dim=rope_dim,
        kv_element_bytes=kv_bytes,
        compute_bits=8.0 * np.asarray(kv_bytes) if compute_bits is None else compute_bits,
        head_tile=head_tile,
        splits=splits,
        hidden=hidden,
        q_lora_rank=q_lora_rank,
        nope_dim=nope_dim,
        v_head_dim=v_head_dim,
        gemm_bits=gemm_bits,
        absorbed=1.0,
    )


def prefill_features(
    batch: Array | float,
    new_tokens: Array | float,
    heads: Array | float,
    *,
    cached_tokens: Array | float = 0.0,
    absorbed: Array | float = 0.0,
    packs_heads: Array | float = 1.0,
    kv_lora_rank: Array | float = KV_LORA,
    rope_dim: Array | float = ROPE,
    kv_bytes: Array | float = 2.0,
    compute_bits: Array | float = 16.0,
    head_tile: Array | float = HEAD_TILE,
    hidden: Array | float = 0.0,
    q_lora_rank: Array | float = V3_Q_LORA,
    nope_dim: Array | float = NOPE,
    v_head_dim: Array | float = V_HEAD,
    gemm_bits: Array | float = 16.0,
) -> dict[str, Array]:
    """Features of `mla_prefill`: ``batch`` chunks of ``new_tokens``, each after ``cached_tokens``.

    ``absorbed`` 1: heads work on the latent (SGLang, vLLM below 1024 new tokens on Hopper); 0: on expanded
    keys and values. ``packs_heads`` 1: an absorbed tile holds rows of several heads (FlashAttention 3); 0: of
    one (SGLang's Triton extend kernel). The rest as in `decode_features`.
    """
    return arrays(
        batch=batch,
        new_tokens=new_tokens,
        cached_tokens=cached_tokens,
        heads=heads,
        absorbed=absorbed,
        packs_heads=packs_heads,
        kv_lora_rank=kv_lora_rank,
        rope_dim=rope_dim,
        kv_element_bytes=kv_bytes,
        compute_bits=compute_bits,
        head_tile=head_tile,
        hidden=hidden,
        q_lora_rank=q_lora_rank,
        nope_dim=nope_dim,
        v_head_dim=v_head_dim,
        gemm_bits=gemm_bits,
    )


def decode_work(f: Features) -> DecodeWork:
    """Counts of an absorbed decode kernel; heads padded to whole tiles."""
    batch, context = f["batch"], f["context_tokens"]
    latent = f["kv_lora_rank"] + f["rope_dim"]
    width = latent + f["kv_lora_rank"]
    tiles = np.ceil(f["heads"] / f["head_tile"])
    return DecodeWork(
        laid_out=batch,
        context=context,
        items=batch * tiles * f["splits"],
        kv_bytes=batch * context * latent * f["kv_element_bytes"],
        io_bytes=batch * f["heads"] * width * ELEMENT_BYTES,
        flop=2.0 * batch * context * tiles * f["head_tile"] * width,
        compute_bits=f["compute_bits"],
        reshaped=np.zeros_like(batch),
    )


def prefill_work(f: Features, hardware: Hardware) -> PrefillWork:
    """Counts of a causal prefill kernel, absorbed (rows of all heads share tiles) or expanded (tiles per head)."""
    batch, new, cached, heads = f["batch"], f["new_tokens"], f["cached_tokens"], f["heads"]
    absorbed = f["absorbed"] > 0
    latent = f["kv_lora_rank"] + f["rope_dim"]
    expanded = f["nope_dim"] + f["rope_dim"] + f["v_head_dim"]
    width = np.where(absorbed, latent + f["kv_lora_rank"], expanded)
    early = hardware.device.architecture in EARLY_ARCHITECTURES
    rows_per_tile = np.where(absorbed, f["head_tile"], EARLY_EXPANDED_TILE if early else EXPANDED_TILE)
    packed = absorbed & (f["packs_heads"] > 0)
    tiles = np.where(packed, np.ceil(new * heads / rows_per_tile), heads * np.ceil(new / rows_per_tile))
    tokens_per_tile = np.where(packed, rows_per_tile / heads, rows_per_tile)
    # a tile sees on average half of the chunk, in whole blocks of keys
    rounded = KEY_BLOCK * np.ceil(new / KEY_BLOCK)
    mean_keys = cached + 0.5 * (rounded + np.minimum(rounded, np.maximum(KEY_BLOCK, tokens_per_tile)))
    parts = cached_parts(batch * tiles, new, cached, hardware)
    cache = latent * f["kv_element_bytes"]
    # the latent is read in 16 bit and written to the cache; expanded keys and values come on top
    keys_bytes = np.where(absorbed, cache, latent * ELEMENT_BYTES + cache + heads * expanded * ELEMENT_BYTES)
    # the absorbed prefill of SGLang widens an 8-bit cache first
    widened = np.where(
        absorbed & (f["kv_element_bytes"] < ELEMENT_BYTES), latent * (f["kv_element_bytes"] + ELEMENT_BYTES), 0.0
    )
    return PrefillWork(
        keys=(cached + new) / parts,
        items=batch * tiles * parts,
        bytes=batch * (new * heads * width * ELEMENT_BYTES + (new + cached) * keys_bytes),
        flop=2.0 * batch * tiles * rows_per_tile * mean_keys * width,
        compute_bits=f["compute_bits"],
        reshaped=np.zeros_like(batch),
        converted_bytes=batch * (new + cached) * widened,
    )


def _decode_projections(f: Features) -> ProjectionWork:
    return projection_work(f, f["batch"], f["batch"])


def _prefill_projections(f: Features) -> ProjectionWork:
    new = f["batch"] * f["new_tokens"]
    return projection_work(f, new, new + f["batch"] * f["cached_tokens"])


def _projection_seconds(work: ProjectionWork, p: Parameters, hardware: Hardware, relief: Array | float) -> Array:
    feed_relief = l2_relief(work.weight_bytes + work.io_bytes, p, hardware)
    return projection_s(work, p, hardware, relief, feed_relief)


def _decode_seconds(f: Features, p: Parameters, hardware: Hardware, cold: bool) -> Array:
    work, projections = decode_work(f), _decode_projections(f)
    relief = 1.0 if cold else l2_relief(work.kv_bytes + projections.weight_bytes, p, hardware)
    kernel = decode_kernel_s(work, p, hardware, cold=cold, other_bytes=projections.weight_bytes)
    return np.asarray(kernel + _projection_seconds(projections, p, hardware, relief))


def _prefill_seconds(f: Features, p: Parameters, hardware: Hardware, cold: bool) -> Array:
    work, projections = prefill_work(f, hardware), _prefill_projections(f)
    relief = 1.0 if cold else l2_relief(work.bytes + projections.weight_bytes, p, hardware)
    return np.asarray(prefill_kernel_s(work, p, hardware) + _projection_seconds(projections, p, hardware, relief))


def _decode_roofline(f: Features, hardware: Hardware) -> Array:
    work = decode_work(f)
    flop = 2.0 * f["batch"] * f["context_tokens"] * f["heads"] * (2.0 * f["kv_lora_rank"] + f["rope_dim"])
    compute, weights = projection_roofline_s(_decode_projections(f), hardware)
    compute = compute + flop / peak_flop_per_s(hardware, f["compute_bits"])
    return np.maximum(compute, weights + (work.kv_bytes + work.io_bytes) / hardware.device.memory_bandwidth)


def _prefill_roofline(f: Features, hardware: Hardware) -> Array:
    work = prefill_work(f, hardware)
    pairs = f["new_tokens"] * f["cached_tokens"] + 0.5 * f["new_tokens"] * (f["new_tokens"] + 1.0)
    absorbed = 2.0 * f["kv_lora_rank"] + f["rope_dim"]
    width = np.where(f["absorbed"] > 0, absorbed, f["nope_dim"] + f["rope_dim"] + f["v_head_dim"])
    compute, weights = projection_roofline_s(_prefill_projections(f), hardware)
    compute = compute + 2.0 * f["batch"] * pairs * f["heads"] * width / peak_flop_per_s(hardware, f["compute_bits"])
    return np.maximum(compute, weights + work.bytes / hardware.device.memory_bandwidth)


def _decode_columns(table: Table) -> Features:
    return decode_features(
        table.number("batch_size"),
        table.number("context_tokens"),
        table.number("num_heads"),
        kv_bytes=_cache_bytes(table),
        head_tile=_head_tile(table),
        # SGLang's Triton decode: 16 parts, inferred from times that grow with every 142 SMs / 16 requests on the L40S
        splits=np.where(_text(table, "kernel_source", "") == "triton", 16.0, 1.0),
        **_block(table),
    )


def _prefill_columns(table: Table) -> Features:
    source = np.char.upper(_text(table, "kernel_source", ""))
    absorbed = (_text(table, "framework", "") == "sglang") | np.char.endswith(source, "_MLA")
    return prefill_features(
        table.number("batch_size"),
        table.number("prompt_tokens"),
        table.number("num_heads"),
        absorbed=absorbed.astype(np.float64),
        packs_heads=np.where(source == "TRITON", 0.0, 1.0),
        kv_bytes=_cache_bytes(table),
        compute_bits=np.maximum(8.0 * _cache_bytes(table), 16.0),
        head_tile=_head_tile(table),
        **_block(table),
    )


def _block(table: Table) -> dict[str, Array]:
    """Whether the row times the whole DeepSeek-V3 block, and its weights' width."""
    module = _text(table, "operation", "attention_kernel") == "attention_module"
    bits = np.where(np.char.startswith(_text(table, "gemm_dtype", "none"), "fp8"), 8.0, 16.0)
    return {"hidden": np.where(module, V3_HIDDEN, 0.0), "gemm_bits": bits}


def _cache_bytes(table: Table) -> Array:
    """Bytes of a cached number; formats not listed have 16 bits. [B]"""
    formats = _text(table, "kv_cache_dtype", "bfloat16").tolist()
    return np.array([{"fp8": 1.0, "float32": 4.0}.get(name, 2.0) for name in formats])


def _head_tile(table: Table) -> Array:
    triton = np.char.startswith(np.char.upper(_text(table, "kernel_source", "")), "TRITON")
    return np.where(triton, 16.0, float(HEAD_TILE))


def _text(table: Table, name: str, default: str) -> np.ndarray[tuple[int, ...], np.dtype[np.str_]]:
    """A column that small tables leave out."""
    return table.text(name) if name in table.columns else np.full(table.rows, default)


VARIANT_COLUMNS = ("framework", "operation", "kernel_source", "gemm_dtype", "kv_cache_dtype")

MLA_DECODE = Operator(
    name="mla_decode",
    parameters=(*DECODE_PARAMETERS, *PROJECTION_PARAMETERS),
    seconds=_decode_seconds,
    roofline=_decode_roofline,
    features=_decode_columns,
    variant_columns=VARIANT_COLUMNS,
    group_columns=("num_heads",),
    range_features=("batch", "context_tokens", "heads"),
)
MLA_PREFILL = Operator(
    name="mla_prefill",
    parameters=(*PREFILL_PARAMETERS, *PROJECTION_PARAMETERS),
    seconds=_prefill_seconds,
    roofline=_prefill_roofline,
    features=_prefill_columns,
    variant_columns=VARIANT_COLUMNS,
    group_columns=("num_heads",),
    range_features=("batch", "new_tokens", "heads"),
)
