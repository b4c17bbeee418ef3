"""Grouped-query attention kernels (MHA and MQA included): prefill and decode, without projections.

Counts per kernel (Dao et al., FlashAttention-2, arXiv 2307.08691, sec. 3; causal pairs counted in whole
tiles): decode reads ``kv_heads (d_k + d_v)`` numbers per cached token, prefill works on
``n p + n (n + 1) / 2`` query-key pairs per head for n new after p cached tokens. Times: `attention_kernel`.
Left out: sliding windows (give the window as context), paged-cache page sizes. Compared with: measured
vLLM FlashAttention 2 and 3, head size 128; other head sizes follow from the counts alone.
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
    prefill_kernel_s,
)
from simmoe.costs.operators.base import Array, Features, Operator, Parameter, Parameters, peak_flop_per_s
from simmoe.specs.hardware import Hardware
from simmoe.specs.measurement import Table

ELEMENT_BYTES = 2.0  # queries and outputs stay in 16 bit
QUERY_TILE = 128  # query rows of one prefill work item; decode packs a KV head's queries in 64
DECODE_TILE = 64
# FlashAttention 3 lays a batch out with one thread block up to here, with many beyond (PREPARE_VARLEN_MAX_BATCHES_1CTA
# in its flash_api.cpp): measured times grow with requests up to 512 and hardly from there to 1,024.
LAYOUT_REQUESTS = 992.0
FILL = Parameter(
    name="fill",
    unit="s",
    default=5e-6,
    lower=1e-8,
    upper=3e-5,
    meaning="Time until device memory delivers at its rate, and to run dry.",
)


def decode_features(
    batch: Array | float,
    context_tokens: Array | float,
    heads: Array | float,
    kv_heads: Array | float,
    head_dim: Array | float,
    *,
    v_head_dim: Array | float | None = None,
    kv_bytes: Array | float = 2.0,
    compute_bits: Array | float = 16.0,
) -> dict[str, Array]:
    """Features of `attention_decode`: one rank's heads, mean context per request, bytes per cached number."""
    return arrays(
        batch=batch,
        context_tokens=context_tokens,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        v_head_dim=head_dim if v_head_dim is None else v_head_dim,
        kv_element_bytes=kv_bytes,
        compute_bits=compute_bits,
    )


def prefill_features(
    batch: Array | float,
    new_tokens: Array | float,
    heads: Array | float,
    kv_heads: Array | float,
    head_dim: Array | float,
    *,
    cached_tokens: Array | float = 0.0,
    v_head_dim: Array | float | None = None,
    kv_bytes: Array | float = 2.0,
    compute_bits: Array | float = 16.0,
) -> dict[str, Array]:
    """Features of `attention_prefill`: ``batch`` chunks of ``new_tokens``, each after ``cached_tokens``."""
    return arrays(
        batch=batch,
        new_tokens=new_tokens,
        cached_tokens=cached_tokens,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        v_head_dim=head_dim if v_head_dim is None else v_head_dim,
        kv_element_bytes=kv_bytes,
        compute_bits=compute_bits,
    )


def decode_work(f: Features) -> DecodeWork:
    """Exact counts of a decode kernel whose query heads are packed per KV head in tiles of 64 rows."""
    batch, context, width = f["batch"], f["context_tokens"], f["head_dim"] + f["v_head_dim"]
    tiles = f["kv_heads"] * np.ceil(f["heads"] / f["kv_heads"] / DECODE_TILE)
    return DecodeWork(
        laid_out=np.minimum(batch, LAYOUT_REQUESTS),
        context=context,
        items=batch * tiles,
        kv_bytes=batch * context * f["kv_heads"] * width * f["kv_element_bytes"],
        io_bytes=batch * f["heads"] * width * ELEMENT_BYTES,
        flop=2.0 * batch * context * tiles * DECODE_TILE * width,
        compute_bits=f["compute_bits"],
        reshaped=_needs_reshape(f),
    )


def prefill_work(f: Features, hardware: Hardware) -> PrefillWork:
    """Counts of a causal prefill kernel with query tiles of 128 rows.

    FlashAttention 3 (Hopper on) packs the heads of a KV group in a tile, FlashAttention 2 gives each its own;
    single tokens run as a decode, packed in either.
    """
    batch, new, cached = f["batch"], f["new_tokens"], f["cached_tokens"]
    width = f["head_dim"] + f["v_head_dim"]
    packs = hardware.device.architecture not in EARLY_ARCHITECTURES
    packed = np.where(packs | (new <= 1), f["heads"] / f["kv_heads"], 1.0)
    tiles = f["heads"] / packed * np.ceil(new * packed / QUERY_TILE)
    # a tile spans 128 / packed tokens and sees on average half of the chunk, in whole key blocks
    rounded = KEY_BLOCK * np.ceil(new / KEY_BLOCK)
    mean_keys = cached + 0.5 * (rounded + np.minimum(rounded, np.maximum(KEY_BLOCK, QUERY_TILE / packed)))
    parts = cached_parts(batch * tiles, new, cached, hardware)
    return PrefillWork(
        keys=(cached + new) / parts,
        items=batch * tiles * parts,
        bytes=batch
        * width
        * (new * f["heads"] * ELEMENT_BYTES + (new + cached) * f["kv_heads"] * f["kv_element_bytes"]),
        flop=2.0 * batch * tiles * QUERY_TILE * mean_keys * width,
        compute_bits=f["compute_bits"],
        reshaped=_needs_reshape(f) * (new <= 1),
        converted_bytes=np.zeros_like(batch),
    )


def _needs_reshape(f: Features) -> Array:
    # FlashAttention 2 swaps heads and queries of single tokens; the output is copied back unless a dimension is 1
    return np.where((f["kv_heads"] > 1) & (f["batch"] > 1), 1.0, 0.0)


def _decode_seconds(f: Features, p: Parameters, hardware: Hardware, cold: bool) -> Array:
    return decode_kernel_s(decode_work(f), p, hardware, cold=cold, fill_s=p[FILL.name])


def _prefill_seconds(f: Features, p: Parameters, hardware: Hardware, cold: bool) -> Array:
    del cold  # see prefill_kernel_s
    return prefill_kernel_s(prefill_work(f, hardware), p, hardware)


def _decode_roofline(f: Features, hardware: Hardware) -> Array:
    work = decode_work(f)
    flop = 2.0 * f["batch"] * f["context_tokens"] * f["heads"] * (f["head_dim"] + f["v_head_dim"])
    memory = (work.kv_bytes + work.io_bytes) / hardware.device.memory_bandwidth
    return np.maximum(memory, flop / peak_flop_per_s(hardware, f["compute_bits"]))


def _prefill_roofline(f: Features, hardware: Hardware) -> Array:
    pairs = f["new_tokens"] * f["cached_tokens"] + 0.5 * f["new_tokens"] * (f["new_tokens"] + 1.0)
    flop = 2.0 * f["batch"] * pairs * f["heads"] * (f["head_dim"] + f["v_head_dim"])
    memory = prefill_work(f, hardware).bytes / hardware.device.memory_bandwidth
    return np.maximum(memory, flop / peak_flop_per_s(hardware, f["compute_bits"]))


def _decode_columns(table: Table) -> Features:
    return decode_features(
        table.number("batch_size"),
        table.number("context_tokens"),
        table.number("num_heads"),
        table.number("num_key_value_heads"),
        table.number("head_dim"),
    )


def _prefill_columns(table: Table) -> Features:
    return prefill_features(
        table.number("batch_size"),
        table.number("prompt_tokens"),
        table.number("num_heads"),
        table.number("num_key_value_heads"),
        table.number("head_dim"),
    )


VARIANT_COLUMNS = ("framework", "kernel_source")
GROUP_COLUMNS = ("num_heads", "num_key_value_heads", "head_dim")

ATTENTION_DECODE = Operator(
    name="attention_decode",
    parameters=(*DECODE_PARAMETERS, FILL),
    seconds=_decode_seconds,
    roofline=_decode_roofline,
    features=_decode_columns,
    variant_columns=VARIANT_COLUMNS,
    group_columns=GROUP_COLUMNS,
    range_features=("batch", "context_tokens", "heads", "kv_heads", "head_dim"),
)
ATTENTION_PREFILL = Operator(
    name="attention_prefill",
    parameters=PREFILL_PARAMETERS,
    seconds=_prefill_seconds,
    roofline=_prefill_roofline,
    features=_prefill_columns,
    variant_columns=VARIANT_COLUMNS,
    group_columns=GROUP_COLUMNS,
    range_features=("batch", "new_tokens", "heads", "kv_heads", "head_dim"),
)
