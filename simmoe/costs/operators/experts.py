"""Time of the routed-expert block: top-k, sorting, activation quantisation, both grouped GEMMs, weighted sum.

Model: fixed and per-expert launch costs + p-norm(weight streaming, tiled FLOPs) + activation passes.
Weights are read once per *active* expert; rows are padded to the tile, and of the tiles 16, 64 and 128 the
quickest counts, each with its own efficiency, unless the engine ships no tuned tiles for the shape and the kernel
is bound to its default ones (`tuned_tiles`); short inner dimensions fill the matrix pipeline badly. Every
number fitted is relative to a data-sheet peak or a fixed time, so that an unmeasured device can borrow it.
Not in it: router matmul, shared experts, all-to-all. Not modelled: which tile configuration a tuner happened to
pick (the largest residuals, chiefly TensorRT-LLM bf16 under tensor parallelism) and exact wave counts.
Checked against: profiles/*/moe_*.csv.gz by `simmoe calibrate --report`, laws in tests/test_experts.py.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from simmoe.costs.operators import tuned_tiles
from simmoe.costs.operators.base import Array, Features, Operator, Parameter, Parameters, peak_flop_per_s, soft_max
from simmoe.errors import MeasurementError
from simmoe.routing.benchmark import benchmark_load
from simmoe.routing.expert_load import TILES, ExpertLoad
from simmoe.specs.hardware import Hardware
from simmoe.specs.measurement import Table

#: dtype -> bytes per weight, bytes per activation fed to a GEMM, bits the matrix units compute in.
#: Block scales included: MXFP4 4.25 bit, NVFP4 4.5 bit.
DTYPES: dict[str, tuple[float, float, int]] = {
    "bfloat16": (2.0, 2.0, 16),
    "float16": (2.0, 2.0, 16),
    "float32": (4.0, 4.0, 32),
    "fp8": (1.0, 1.0, 8),
    "fp8_block": (1.0, 1.0, 8),
    "int8": (1.0, 1.0, 8),
    "int4": (0.5, 2.0, 16),
    "mxfp4": (4.25 / 8, 2.0, 16),
    "nvfp4": (4.5 / 8, 4.5 / 8, 4),
}

#: Formats of Blackwell's block-scaled units. Their kernels (TensorRT-LLM's, FlashInfer's in vLLM and SGLang) put the
#: weights on the wide side of a tile and 8 to 64 tokens on the other (``calculate_tile_tokens_dim`` in both), so that
#: few tokens leave no units idle, where Hopper's wait for rows to fill.
NARROW_TILES = frozenset({"mxfp4_mxfp8", "nvfp4"})

#: What the model takes, one array each.
FEATURES = (
    "tokens",
    "pairs",
    "group_pairs",
    "active_experts",
    *(f"row_blocks_{tile}" for tile in TILES),
    "local_experts",
    "sharded",
    "hidden",
    "inter",
    "matrices",
    "weight_bytes",
    "activation_bytes",
    "compute_bits",
    "tile_list",
    "narrow_tiles",
)

#: (framework, dtype) -> kernel source an engine uses by default without expert parallelism: the newest measured.
PREFERRED_KERNEL: dict[tuple[str, str], str] = {
    ("vllm", "bfloat16"): "vllm_unquantizedfusedmoe_triton_tritonexperts",
    ("vllm", "fp8_block"): "vllm_fp8moe_triton_tritonexperts",
    ("sglang", "bfloat16"): "sglang_fused_moe_triton",
    ("sglang", "fp8_block"): "sglang_fused_moe_triton",
    ("trtllm", "bfloat16"): "moe_torch_flow_cutlass",
    ("trtllm", "fp8"): "moe_torch_flow_cutlass",
    ("trtllm", "fp8_block"): "moe_torch_flow_cutlass",
}

#: The same with expert parallelism, where it differs.
PREFERRED_KERNEL_EP: dict[tuple[str, str], str] = {
    ("vllm", "fp8_block"): "vllm_fp8moe_flashinfer_cutlass_flashinferexperts",
}


def preferred_kernel(framework: str, dtype: str, *, expert_parallel: bool) -> str | None:
    """The measured kernel source an engine would use, or None where none was measured.

    Nobody measured nvfp4, nor mxfp4 with mxfp8 inputs: they are timed as the engine's kernel of fp8 with one scale, if
    that was measured, else of block-scaled fp8 (why: `costs.timing`).
    """
    if dtype == "mxfp4_mxfp8":
        framework = "trtllm"  # vLLM has it from FlashInfer, whose kernels are TensorRT-LLM's
    if dtype in NARROW_TILES:
        dtype = "fp8" if (framework, "fp8") in PREFERRED_KERNEL else "fp8_block"
    default = PREFERRED_KERNEL.get((framework, dtype))
    return PREFERRED_KERNEL_EP.get((framework, dtype), default) if expert_parallel else default


#: Older collections (A100's). Their expert-parallel rows are left out: SGLang's take no less time with 8 ranks than
#: with one, vLLM's put a single token's experts on one rank: both contradict the layouts of `routing.benchmark`.
#: Their two-matrix shapes were timed with three: they take 1.3 to 1.5 times what two matrices would at every token
#: count, weight-bound and FLOP-bound alike, and as long as gated shapes of the same size; newer collections' do not.
OLD_COLLECTIONS = ("sglang 0.5.10", "vllm 0.14.0")

# L2 is taken to serve this many times the memory bandwidth. Assumption: published microbenchmarks of Hopper give
# 1.7 to 2.5; replays also hide launch latency in it. It matters for benchmark replays alone (cold=False).
_L2_SPEEDUP = 4.0
# How sharply a replay stops hitting L2 once the weights outgrow it. Assumption.
_L2_SHARPNESS = 4.0
_WAVE_WIDTH = 128.0  # columns of a tile; only sets the scale of the fitted `tail`
_OUTPUT_BYTES = 2.0  # GEMM outputs are bf16 in every variant but float32's


def features_of(
    load: ExpertLoad,
    *,
    hidden: float,
    inter: float,
    top_k: float,
    num_experts: int,
    matrices: int,
    weight_bytes: float,
    activation_bytes: float,
    compute_bits: float,
    tile_list: float = 0.0,
    narrow_tiles: bool = False,
    dispatched: bool = False,
) -> Features:
    """Features of one rank's expert block.

    Parameters
    ----------
    load : ExpertLoad
        What the rank's experts get; arrays of any shape.
    hidden, inter : float
        Model width and the expert width *of this rank* (after tensor parallelism). [elements]
    top_k, num_experts, matrices : int
        Experts per token, routed experts of the whole model, weight matrices per expert (3 gated, 2 not).
    weight_bytes, activation_bytes : float
        Bytes per weight and per activation fed to a GEMM. [B]
    compute_bits : int
        Operand width of the matrix units: 32, 16, 8 or 4. [bit]
    tile_list : float
        Which list of tuned shapes the kernel goes by, see `tuned_tiles.list_number`.
    narrow_tiles : bool
        Whether tiles of few tokens fill the matrix units as wide ones do, see `NARROW_TILES`.
    dispatched : bool
        True where an all-to-all brought the rank only the tokens it serves (DeepEP). False, as measured: the rank
        holds all tokens of the expert-parallel group and skips what is not its own.
    """
    tokens = np.asarray(load.tokens, dtype=np.float64)
    one = np.ones_like(tokens)
    if dispatched:
        tokens = load.received_tokens(top_k)
    return {
        "tokens": tokens,
        "pairs": np.asarray(load.routed_pairs, dtype=np.float64),
        "group_pairs": np.asarray(load.routed_pairs if dispatched else tokens * top_k, dtype=np.float64),
        "active_experts": np.asarray(load.active_experts, dtype=np.float64),
        **{f"row_blocks_{tile}": np.asarray(load.row_blocks[tile], dtype=np.float64) for tile in TILES},
        "local_experts": one * load.local_experts,
        "sharded": one * (load.local_experts < num_experts),
        "hidden": one * hidden,
        "inter": one * inter,
        "matrices": one * matrices,
        "weight_bytes": one * weight_bytes,
        "activation_bytes": one * activation_bytes,
        "compute_bits": one * compute_bits,
        "tile_list": one * tile_list,
        "narrow_tiles": one * narrow_tiles,
    }


def _features(table: Table) -> Features:
    """Columns of a ``moe_<device>`` table to features."""
    shape_names = ("hidden_size", "expert_inter_size", "num_experts", "top_k", "gated", "moe_tp_size", "moe_ep_size")
    shapes = np.stack([table.number(name) for name in shape_names], axis=1)
    _, shape_of = np.unique(shapes, axis=0, return_inverse=True)
    kernels = table.text("kernel_source") if "kernel_source" in table.columns else np.full(table.rows, "")
    old = _old(table)
    words = (table.text("dtype"), table.text("routing_distribution"), kernels, old.astype(np.str_))
    labels, label_of = np.unique(["\x1f".join(row) for row in zip(*words, strict=True)], return_inverse=True)
    cell = shape_of.reshape(-1) * len(labels) + label_of
    tokens = np.where(old & (table.number("moe_ep_size") > 1), np.nan, table.number("num_tokens"))
    columns = {name: np.full(table.rows, np.nan) for name in FEATURES}
    for number in np.unique(cell[np.isfinite(tokens)]):
        rows = np.flatnonzero((cell == number) & np.isfinite(tokens))
        hidden, width, experts, top_k, gated, tp, ep = shapes[rows[0]].tolist()
        dtype, distribution, kernel, _ = str(labels[number % len(labels)]).split("\x1f")
        if dtype not in DTYPES:
            raise MeasurementError(f"{table.path}: dtype {dtype!r} is not known; known are {', '.join(DTYPES)}")
        weight_bytes, activation_bytes, compute_bits = DTYPES[dtype]
        part = features_of(
            benchmark_load(distribution, tokens[rows], int(experts), int(top_k), int(ep)),
            hidden=hidden,
            inter=width / tp,
            top_k=top_k,
            num_experts=int(experts),
            matrices=3 if old[rows[0]] else 2 + int(gated),
            weight_bytes=weight_bytes,
            activation_bytes=activation_bytes,
            compute_bits=compute_bits,
            tile_list=tuned_tiles.list_number(kernel, dtype),
        )
        for name, values in part.items():
            columns[name][rows] = values
    if "active_experts" in table.columns:  # counted in the very inputs that were timed
        counted = table.number("active_experts")
        columns["active_experts"] = np.where(np.isfinite(tokens * counted), counted, columns["active_experts"])
    return columns


def _old(table: Table) -> NDArray[np.bool_]:
    """Rows of an older collection."""
    if "version" not in table.columns:
        return np.zeros(table.rows, dtype=np.bool_)
    label = np.char.add(np.char.add(table.text("framework"), " "), table.text("version"))
    return np.isin(label, OLD_COLLECTIONS)


def breakdown(features: Features, parameters: Parameters, hardware: Hardware, cold: bool) -> dict[str, Array]:
    """Seconds per cause: ``overhead``, ``weights`` and ``flops`` (which overlap), ``activations``. [s]"""
    f, q = features, parameters
    bandwidth = hardware.device.memory_bandwidth
    hidden, inter = f["hidden"], f["inter"]
    up_width = (f["matrices"] - 1) * inter
    overhead = (
        q["launch"]
        + q["expert_map"] * f["sharded"]
        + q["local_expert"] * f["local_experts"]
        + q["active_expert"] * f["active_experts"]
        + q["tail"] * _wave_seconds(f, hardware)
        # loads of rows that are no multiple of 16 elements long cannot be vectorised
        + q["ragged_row"] * (inter % 16 != 0) * f["row_blocks_64"] * hidden
    )
    streamed = f["active_experts"] * (up_width + inter) * hidden * f["weight_bytes"]
    weights = streamed / (q["bandwidth"] * bandwidth)
    if not cold and hardware.device.l2_cache > 0:
        in_l2 = 1.0 / (1.0 + (streamed / (q["l2_share"] * hardware.device.l2_cache)) ** _L2_SHARPNESS)
        weights = weights * (1.0 - in_l2 * (1.0 - 1.0 / _L2_SPEEDUP))
    # each tile also pays a fill and drain of the pipeline, worth short_k steps of the inner dimension
    flop_per_row = 2.0 * (up_width * (hidden + q["short_k"]) + hidden * (inter + q["short_k"]))
    tiled = np.minimum.reduce([f[f"row_blocks_{tile}"] * (tile / q[f"flops_{tile}"]) for tile in TILES])
    bound = tuned_tiles.fixed_rows(f["tile_list"], hardware.device.name, f["tokens"], f["local_experts"], inter)
    for rows in (16, 64):
        tiled = np.where(bound == rows, f[f"row_blocks_{rows}"] * (rows / q[f"default_{rows}"]), tiled)
    full = np.minimum(tiled, f["row_blocks_16"] * (16 / q["flops_128"]))
    tiled = np.where(f["narrow_tiles"] > 0, full, tiled)
    flops = tiled * flop_per_row / peak_flop_per_s(hardware, f["compute_bits"])
    width = np.maximum(f["activation_bytes"], _OUTPUT_BYTES)
    inner = up_width * width + inter * f["activation_bytes"]
    moved = (
        f["pairs"] * (q["pair_hidden"] * width * hidden + q["pair_inner"] * inner)
        + f["group_pairs"] * (q["group_hidden"] * width * hidden + q["group_inner"] * inner)
        + f["tokens"] * q["token_hidden"] * width * hidden
    )
    return {"overhead": overhead, "weights": weights, "flops": flops, "activations": moved / bandwidth}


def _wave_seconds(features: Features, hardware: Hardware) -> Array:
    """Time to stream the weights of one wave of 128-wide tiles, a tile per SM, through both GEMMs. [s]"""
    depth = features["hidden"] + features["inter"]
    return _WAVE_WIDTH * hardware.device.sms * depth * features["weight_bytes"] / hardware.device.memory_bandwidth


def seconds(features: Features, parameters: Parameters, hardware: Hardware, cold: bool = True) -> Array:
    """Time of the block: overhead + p-norm(weights, flops) + activations. [s]"""
    part = breakdown(features, parameters, hardware, cold)
    core = soft_max(part["weights"], part["flops"], parameters["overlap"])
    return part["overhead"] + core + part["activations"]


def roofline(features: Features, hardware: Hardware) -> Array:
    """Plain max(FLOPs / peak, bytes / bandwidth) with the true active experts and no padding. [s]"""
    f = features
    per_expert = f["matrices"] * f["hidden"] * f["inter"]
    flop = 2.0 * f["pairs"] * per_expert
    width = np.maximum(f["activation_bytes"], _OUTPUT_BYTES)
    moved = f["active_experts"] * per_expert * f["weight_bytes"] + 2.0 * width * f["pairs"] * f["hidden"]
    return np.maximum(flop / peak_flop_per_s(hardware, f["compute_bits"]), moved / hardware.device.memory_bandwidth)


def _parameter(name: str, unit: str, default: float, lower: float, upper: float, meaning: str) -> Parameter:
    of_peak = name.startswith(("flops_", "default_"))
    return Parameter(name=name, unit=unit, default=default, lower=lower, upper=upper, meaning=meaning, of_peak=of_peak)


# Defaults are rounded H100 fits of the vLLM kernels: what an uncalibrated prediction uses.
MOE = Operator(
    name="moe",
    parameters=(
        _parameter("launch", "s", 2.5e-5, 1e-6, 2e-4, "kernel launches, top-k and sorting of a replayed graph"),
        _parameter("expert_map", "s", 5e-6, 1e-8, 1e-4, "mapping global to local expert ids under EP"),
        _parameter("local_expert", "s", 1e-8, 1e-11, 2e-6, "visiting one local expert, busy or idle"),
        _parameter("active_expert", "s", 5e-8, 1e-11, 5e-6, "starting one active expert's tiles"),
        _parameter("tail", "1", 0.2, 1e-4, 10.0, "of a wave of tiles, lost filling and draining the device"),
        _parameter("ragged_row", "s", 3e-10, 1e-13, 1e-8, "per row block and output row, widths not divisible by 16"),
        _parameter("bandwidth", "1", 0.9, 0.1, 1.0, "of memory bandwidth, streaming weights"),
        _parameter("l2_share", "1", 0.6, 0.05, 2.0, "share of L2 up to which replayed weights stay in it"),
        _parameter("flops_16", "1", 0.17, 0.02, 1.0, "of the matrix peak with 16-row tiles"),
        _parameter("flops_64", "1", 0.45, 0.05, 1.0, "of the matrix peak with 64-row tiles"),
        _parameter("flops_128", "1", 0.65, 0.05, 1.0, "of the matrix peak with 128-row tiles"),
        _parameter("default_16", "1", 0.1, 0.01, 1.0, "of the matrix peak with an engine's default tiles of 16 x 32"),
        _parameter("default_64", "1", 0.3, 0.03, 1.0, "of the matrix peak with an engine's default tiles of 64 x 64"),
        _parameter("short_k", "elements", 300.0, 1.0, 2000.0, "pipeline fill and epilogue, as inner-dimension length"),
        _parameter("overlap", "1", 2.3, 2.0, 12.0, "p of the p-norm of weight streaming and FLOPs"),
        _parameter("pair_hidden", "passes", 1.0, 1e-3, 50.0, "passes over the local pairs' hidden vectors"),
        _parameter("pair_inner", "passes", 0.5, 1e-3, 50.0, "passes over the local pairs' inner vectors"),
        _parameter("group_hidden", "passes", 0.4, 1e-3, 50.0, "passes over all the EP group's pairs, hidden vectors"),
        _parameter("group_inner", "passes", 0.5, 1e-3, 50.0, "passes over all the EP group's pairs, inner vectors"),
        _parameter("token_hidden", "passes", 3.0, 1e-3, 50.0, "passes over the tokens' hidden vectors"),
    ),
    seconds=seconds,
    roofline=roofline,
    features=_features,
    variant_columns=("framework", "dtype", "kernel_source"),
    group_columns=(
        "hidden_size",
        "expert_inter_size",
        "num_experts",
        "top_k",
        "gated",
        "moe_tp_size",
        "moe_ep_size",
    ),
    range_features=("tokens", "pairs", "active_experts", "local_experts", "hidden", "inter"),
)
