"""Time of the matrix products around MLA attention: q and kv down, q up, kv up (or its absorbed form), output.

Model: one p-norm of reading all weights once and the FLOPs of all products, plus activation traffic and a
growth with log2(tokens) of the dozen small kernels (norms, rotary embedding, cache write). Shapes follow
DeepSeek-V2 (arXiv 2405.04434, sec. 2.1 and appendix C). Left out: splitting the products' own overheads;
where products are modelled one by one, use the kernel alone. Compared with: the vLLM module measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simmoe.costs.operators.base import Array, Features, Parameter, Parameters, peak_flop_per_s, soft_max
from simmoe.specs.hardware import Hardware

# a 128 x 256 output tile in 16 bit: 2 * 128 * 256 FLOP per (128 + 256) * 2 bytes of operands, each inner index
TILE_FLOP_PER_BYTE = 85.3

PARAMETERS = (
    Parameter(
        name="projection_memory_efficiency",
        unit="-",
        default=0.8,
        lower=0.1,
        upper=1.05,
        meaning="Reached share of the memory bandwidth while reading projection weights.",
    ),
    Parameter(
        name="projection_compute_efficiency",
        unit="-",
        default=0.65,
        lower=0.05,
        upper=1.0,
        meaning="Reached share of the matrix peak in the projections.",
        of_peak=True,
    ),
    Parameter(
        name="projection_io_efficiency",
        unit="-",
        default=0.4,
        lower=0.02,
        upper=3.0,
        meaning="Bandwidth share for activations between the module's kernels.",
    ),
    Parameter(
        name="projection_feed_efficiency",
        unit="-",
        default=3.0,
        lower=0.1,
        upper=20.0,
        meaning="Tile operands fed per second, over memory bandwidth, when the products overflow L2.",
    ),
    Parameter(
        name="projection_growth",
        unit="s",
        default=3e-6,
        lower=1e-9,
        upper=3e-5,
        meaning="Growth of the module's small kernels per doubling of tokens (empirical).",
    ),
)


@dataclass(frozen=True, kw_only=True)
class ProjectionWork:
    """Counts of one rank's projections, one entry a row; all zero where ``hidden`` is 0 (kernel alone).

    Attributes
    ----------
    tokens : new tokens. [tokens]
    weight_bytes : all weights once. [B]
    flop : work at the width of the weights. [FLOP]
    flop_16 : work always done in 16 bit (the absorbed products). [FLOP]
    io_bytes : activations written and read between the kernels. [B]
    bits : width of the weights. [bit]
    """

    tokens: Array
    weight_bytes: Array
    flop: Array
    flop_16: Array
    io_bytes: Array
    bits: Array


def projection_work(f: Features, tokens: Array, expanded_tokens: Array) -> ProjectionWork:
    """Count the projections of ``tokens`` new tokens; without absorption ``expanded_tokens`` get keys and values.

    Parameters
    ----------
    f : mapping
        ``hidden, q_lora_rank`` (0: queries straight from hidden), ``kv_lora_rank, rope_dim, nope_dim,
        v_head_dim, heads, gemm_bits, absorbed``, one entry a row.
    tokens, expanded_tokens : array
        New tokens, and new plus cached ones. [tokens]
    """
    heads, present = f["heads"], f["hidden"] > 0
    query = heads * (f["nope_dim"] + f["rope_dim"])
    down = f["hidden"] * (f["q_lora_rank"] + f["kv_lora_rank"] + f["rope_dim"])
    query_up = np.where(f["q_lora_rank"] > 0, f["q_lora_rank"], f["hidden"]) * query
    kv_up = heads * f["kv_lora_rank"] * (f["nope_dim"] + f["v_head_dim"])
    out = heads * f["v_head_dim"] * f["hidden"]
    plain = down + query_up + out
    absorbed = f["absorbed"] > 0
    latent = np.where(absorbed, 2.0 * f["kv_lora_rank"], f["nope_dim"] + f["v_head_dim"])
    activations = (
        2.0 * f["hidden"]
        + 3.0 * (f["q_lora_rank"] + f["kv_lora_rank"] + f["rope_dim"])
        + 2.0 * query
        + heads * (latent + 2.0 * f["v_head_dim"])
    )
    element = f["gemm_bits"] / 8.0
    scale = np.where(present, 1.0, 0.0)
    return ProjectionWork(
        tokens=np.where(present, tokens, 1.0),
        weight_bytes=scale * (plain * element + kv_up * np.where(absorbed, 2.0, element)),
        flop=scale * 2.0 * (plain * tokens + np.where(absorbed, 0.0, kv_up * expanded_tokens)),
        flop_16=scale * 2.0 * np.where(absorbed, kv_up * tokens, 0.0),
        io_bytes=scale * 2.0 * tokens * activations,
        bits=f["gemm_bits"],
    )


def projection_s(
    work: ProjectionWork, p: Parameters, hardware: Hardware, relief: Array | float, feed_relief: Array
) -> Array:
    """Time of the projections. [s]

    ``relief`` scales weight reads that a replayed benchmark finds in L2; ``feed_relief`` the repeated operand
    reads within one product, which hit L2 in any case if weights and activations fit.
    """
    bandwidth = hardware.device.memory_bandwidth
    wide = peak_flop_per_s(hardware, np.full_like(work.bits, 16.0))
    compute = (work.flop / peak_flop_per_s(hardware, work.bits) + work.flop_16 / wide) / p[
        "projection_compute_efficiency"
    ]
    weights = work.weight_bytes * relief / (p["projection_memory_efficiency"] * bandwidth)
    io = work.io_bytes / (p["projection_io_efficiency"] * bandwidth)
    feed = (work.flop * work.bits / 16.0 + work.flop_16) / TILE_FLOP_PER_BYTE
    feed = feed * feed_relief / (p["projection_feed_efficiency"] * bandwidth)
    growth = p["projection_growth"] * np.log2(np.maximum(work.tokens, 1.0))
    product = soft_max(soft_max(compute, feed, p["overlap_power"]), weights, p["overlap_power"])
    return np.asarray(growth + io + product)


def projection_roofline_s(work: ProjectionWork, hardware: Hardware) -> tuple[Array, Array]:
    """Compute and memory times of the projections at the data sheet's peaks. [s]"""
    wide = peak_flop_per_s(hardware, np.full_like(work.bits, 16.0))
    compute = work.flop / peak_flop_per_s(hardware, work.bits) + work.flop_16 / wide
    return compute, work.weight_bytes / hardware.device.memory_bandwidth
