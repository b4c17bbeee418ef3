"""Time of one attention kernel on one device: what decode and prefill, GQA and MLA have in common.

Model: the kernel is a set of work items (one per request, KV head and tile of query rows) on the device's
SMs. It is bounded by reading the KV cache, by matrix FLOPs on padded tiles, by the items' fixed cost in
waves over the SMs, and by the serial walk of one item over its keys; the bounds are joined by a p-norm on
top of a launch floor. Decode splits long contexts over idle SMs; ``serial_blocks`` says up to how far.
Left out: clocks that drop under load, requests of unequal context in a batch. Compared with: measured kernels,
``simmoe calibrate --report``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simmoe.costs.operators.base import Array, Parameter, Parameters, peak_flop_per_s, soft_max
from simmoe.specs.hardware import Hardware

# These run FlashAttention 2 and TensorRT-LLM's tiles of 64 rows; later ones pack the heads of a KV group in 128 rows.
EARLY_ARCHITECTURES = ("Volta", "Turing", "Ampere", "Ada")
# Within an item loads and matrix work overlap almost wholly (asynchronous copies), so their norm is a sharp one; it
# must be fixed, since both grow as batch x context and a fit could not tell it from the two efficiencies.
PIPELINED = 6.0
KEY_BLOCK = 64  # keys a work item takes at a time [tokens]; 64 or 128 in FlashAttention 2/3 and FlashMLA


@dataclass(frozen=True, kw_only=True)
class DecodeWork:
    """Counts of one decode kernel, one entry a row.

    Attributes
    ----------
    laid_out : requests whose work items a kernel before this one lays out one after the other. [requests]
    context : mean tokens in the cache per request. [tokens]
    items : work items before any split over keys. [-]
    kv_bytes : KV cache read. [B]
    io_bytes : queries read and outputs written. [B]
    flop : matrix work on padded query tiles. [FLOP]
    compute_bits : operand width of the matrix unit. [bit]
    reshaped : 1 where the framework copies the output after the kernel, else 0. [-]
    """

    laid_out: Array
    context: Array
    items: Array
    kv_bytes: Array
    io_bytes: Array
    flop: Array
    compute_bits: Array
    reshaped: Array


@dataclass(frozen=True, kw_only=True)
class PrefillWork:
    """Counts of one prefill kernel, one entry a row.

    Attributes
    ----------
    keys : tokens the last query of an item sees, new and cached. [tokens]
    items : work items: request x head x tile of query rows x part of the cached tokens. [-]
    bytes : queries, keys, values and outputs, each once. [B]
    flop : matrix work on the causal triangle in whole tiles. [FLOP]
    compute_bits : operand width of the matrix unit. [bit]
    reshaped : 1 where the framework copies the output after the kernel, else 0. [-]
    converted_bytes : cache read and written once more to widen it before the kernel. [B]
    """

    keys: Array
    items: Array
    bytes: Array
    flop: Array
    compute_bits: Array
    reshaped: Array
    converted_bytes: Array


def _p(
    name: str, unit: str, default: float, lower: float, upper: float, meaning: str, *, of_peak: bool = False
) -> Parameter:
    return Parameter(name=name, unit=unit, default=default, lower=lower, upper=upper, meaning=meaning, of_peak=of_peak)


# Defaults are round figures between the H100 fits of the three frameworks: the uncalibrated prediction.
_SHARED = (
    _p("launch", "s", 8e-6, 1e-6, 3e-4, "Floor of a launched kernel, or of a block's chain of kernels."),
    _p("item", "s", 3e-6, 1e-8, 1e-4, "Fixed cost of one wave of work items over the SMs."),
    _p("memory_efficiency", "-", 0.85, 0.05, 1.05, "Reached share of the memory bandwidth."),
    _p("compute_efficiency", "-", 0.6, 0.01, 1.0, "Reached share of the matrix peak, on padded tiles.", of_peak=True),
    _p("combine", "s", 3e-6, 1e-9, 3e-5, "Cost of merging partial outputs once the context spans several blocks."),
    _p("combine_tokens", "tokens", 200.0, 8.0, 4000.0, "Context at which half of the merging cost is reached."),
    _p("reshape", "s", 1e-7, 1e-10, 2e-5, "Copy of the output where the framework needs one."),
    _p("l2_share", "-", 0.7, 0.2, 3.0, "Working set over L2 size at which half of the bytes are still found there."),
    _p("l2_gain", "-", 3.0, 1.0, 8.0, "L2 bandwidth over memory bandwidth."),
    _p("l2_sharpness", "-", 4.0, 1.0, 16.0, "How sudden the L2 overflows."),
    _p("overlap_power", "-", 2.0, 1.0, 16.0, "p of the norm that joins the bounds: large is perfect overlap."),
)
DECODE_PARAMETERS = (
    *_SHARED,
    _p("serial_block", "s", 2e-7, 1e-9, 3e-5, "One work item's step over 64 keys, loads in flight."),
    _p(
        "io_efficiency",
        "-",
        0.5,
        0.005,
        3.0,
        "Bandwidth share for queries and outputs, with partial outputs of splits.",
    ),
    _p("serial_blocks", "-", 64.0, 1.0, 1e5, "Blocks beyond which splitting keeps one item's walk constant."),
    _p("request", "s", 1e-9, 1e-12, 2e-7, "Per-request cost of laying out the batch."),
)
PREFILL_PARAMETERS = (
    *_SHARED,
    _p("serial_block", "s", 1e-6, 1e-9, 3e-5, "One work item's step over 64 keys, matrix work of its tile."),
    _p(
        "convert_efficiency", "-", 0.25, 0.05, 1.0, "Bandwidth share while an 8-bit cache is widened before the kernel."
    ),
)


def decode_kernel_s(
    work: DecodeWork,
    p: Parameters,
    hardware: Hardware,
    *,
    cold: bool,
    other_bytes: Array | float = 0.0,
    fill_s: float = 0.0,
) -> Array:
    r"""Time of a decode attention kernel; ``other_bytes`` compete with the KV cache for L2. [s]

    Non-decreasing in batch and context; for long contexts linear in batch x context.

    Notes
    -----
    ``fill_s`` is what device memory takes to reach its rate and to run dry, so that the share of its bandwidth rises
    with the bytes read: :math:`b / (b + b_{1/2})`, half of it at :math:`b_{1/2} =` ``fill_s`` x rate (Hockney and
    Jesshope, Parallel Computers 2, 1988, of vector pipelines). What L2 holds does not wait for it.
    """
    device = hardware.device
    bandwidth = device.memory_bandwidth
    found = 0.0 if cold else l2_share_found(work.kv_bytes + other_bytes, p, hardware)
    memory = work.kv_bytes * _relief(found, p) / (p["memory_efficiency"] * bandwidth) + fill_s * (1.0 - found)
    compute = work.flop / (p["compute_efficiency"] * peak_flop_per_s(hardware, work.compute_bits))
    io = work.io_bytes / (p["io_efficiency"] * bandwidth)
    power = p["overlap_power"]
    serial = p["serial_block"] * np.minimum(np.maximum(work.context / KEY_BLOCK, 1.0), p["serial_blocks"])
    stream = soft_max(soft_max(memory, compute, PIPELINED), serial, power)
    scheduled = p["item"] * waves(work.items, device.sms)
    overhead = p["launch"] + p["request"] * work.laid_out + p["reshape"] * work.reshaped
    return np.asarray(overhead + io + _combine(work.context, p) + soft_max(stream, scheduled, power))


def prefill_kernel_s(work: PrefillWork, p: Parameters, hardware: Hardware) -> Array:
    """Time of a causal prefill attention kernel, all chunks of the batch in one launch. [s]

    A work item costs a fixed part and its FLOPs at one SM's share of the peak; items run in waves. The
    last query tile of a causal chunk walks over all keys, about twice the mean: ``serial_block``.
    """
    device = hardware.device
    power = p["overlap_power"]
    per_item = (
        work.flop / work.items * device.sms / (p["compute_efficiency"] * peak_flop_per_s(hardware, work.compute_bits))
    )
    compute = waves(work.items, device.sms) * (p["item"] + per_item)
    # no cold case: the queries, keys and values of a prefill were written by the kernel before
    memory = work.bytes * l2_relief(work.bytes, p, hardware) / (p["memory_efficiency"] * device.memory_bandwidth)
    serial = p["serial_block"] * work.keys / KEY_BLOCK
    convert = work.converted_bytes / (p["convert_efficiency"] * device.memory_bandwidth)
    overhead = p["launch"] + p["reshape"] * work.reshaped + _combine(work.keys, p) + convert
    return np.asarray(overhead + soft_max(soft_max(compute, memory, power), serial, power))


def arrays(**values: Array | float) -> dict[str, Array]:
    """Features by name, broadcast to one shape."""
    shaped = np.broadcast_arrays(*(np.asarray(value, dtype=np.float64) for value in values.values()))
    return dict(zip(values, shaped, strict=True))


def waves(items: Array, sms: int) -> Array:
    """Rounds of work items over the SMs, at least one: the mean of the smooth and the whole count. [-]

    Kernels with one item per SM finish in whole rounds, persistent ones balance; measured ones lie between.
    """
    rounds = items / max(1, sms)
    return np.asarray(np.where(rounds > 1.0, 0.5 * (rounds + np.ceil(rounds)), 1.0))


def l2_relief(working_set_bytes: Array, p: Parameters, hardware: Hardware) -> Array:
    """Factor (0, 1] on memory time when a benchmark replays the same bytes and L2 still holds a part. [-]"""
    return np.asarray(_relief(l2_share_found(working_set_bytes, p, hardware), p))


def l2_share_found(working_set_bytes: Array, p: Parameters, hardware: Hardware) -> Array:
    """Share of the bytes that a replay finds in L2. [-]"""
    room = p["l2_share"] * hardware.device.l2_cache / np.maximum(working_set_bytes, 1.0)
    return np.asarray(1.0 / (1.0 + np.maximum(room, 1e-12) ** -p["l2_sharpness"]))


def _relief(found: Array | float, p: Parameters) -> Array | float:
    return 1.0 - found * (1.0 - 1.0 / p["l2_gain"])


def cached_parts(items: Array, new: Array, cached: Array, hardware: Hardware) -> Array:
    """Parts that a prefill kernel cuts the keys of its items into, where these leave SMs idle. [-]

    FlashAttention 3 does (``num_splits_heuristic`` of hopper/heuristics.h), FlashAttention 2 for single tokens only. Of
    the keys only cached ones count: fits to prompts without any hold what splitting does there.
    """
    if hardware.device.architecture in EARLY_ARCHITECTURES:
        return np.ones_like(items)
    most = np.maximum(hardware.device.sms / items, 1.0)
    own = KEY_BLOCK * np.ceil(new / KEY_BLOCK)
    return np.asarray((own + cached) / (own + cached / most))


def _combine(tokens: Array, p: Parameters) -> Array:
    ratio = (tokens / p["combine_tokens"]) ** 2
    return np.asarray(p["combine"] * ratio / (1.0 + ratio))
