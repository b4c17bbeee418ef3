"""Time of matrix products on one device: the model shared by dense GEMM and the batched products of MLA.

Model: the library picks, among a few output tiles and ways to split k, the fastest. Each candidate is bound by
the tensor units, by what one multiprocessor can pull through the cache, and by the latency of its steps along k,
in waves of tiles over the multiprocessors; device memory works beside them (p-norm). On top come the launch and,
for 8-bit kernels fed with bf16, the pass that quantises the input. Tiling and wave quantisation as in NVIDIA's
"Matrix Multiplication Background User's Guide"; the combination and its parameters are our own.
Left out: clocks that fall under power limits, stream-k schedules, sparsity. Compared with: profiles/*/gemm_*,
profiles/*/mla_bmm_*.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from simmoe.costs.operators.base import Array, Features, Parameter, Parameters, peak_flop_per_s, soft_max
from simmoe.specs.hardware import Hardware

# Output tiles (rows, columns) of current GEMM libraries, and in how many parts they cut k on small grids.
TILES = ((16, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 128))
SPLITS = (1, 2, 4, 8, 16)
REFERENCE_TILE = 128.0 * 128.0
SCALE_BLOCK = 128.0
OUTPUT_BYTES = 2.0  # bf16 results
_WIDE = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
PARTIAL_BYTES = 4.0  # float32 partial sums of a split product

PARAMETERS = (
    Parameter(
        name="launch_s", unit="s", default=2.5e-6, lower=2e-7, upper=6e-5, meaning="fixed time of the kernel or kernels"
    ),
    Parameter(
        name="memory_efficiency", unit="-", default=0.85, lower=0.2, upper=1.0, meaning="of peak memory bandwidth"
    ),
    Parameter(
        name="cache_gain", unit="-", default=2.0, lower=1.0, upper=8.0, meaning="L2 bandwidth over memory bandwidth"
    ),
    Parameter(
        name="reread",
        unit="-",
        default=0.3,
        lower=1e-3,
        upper=4.0,
        meaning="share of the re-reads of operands beyond L2",
    ),
    Parameter(
        name="compute_efficiency",
        unit="-",
        default=0.75,
        lower=0.02,
        upper=1.0,
        meaning="of peak, inside a tile",
        of_peak=True,
    ),
    Parameter(
        name="sm_feed",
        unit="-",
        default=5.0,
        lower=0.3,
        upper=30.0,
        meaning="bytes/s one SM can pull, over bandwidth/SMs",
    ),
    Parameter(
        name="tile_s",
        unit="s",
        default=1.5e-6,
        lower=1e-8,
        upper=2e-5,
        meaning="prologue and epilogue of a 128 x 128 tile",
    ),
    Parameter(
        name="step_s", unit="s", default=1.3e-7, lower=2e-9, upper=2e-6, meaning="least time of 128 of k in one tile"
    ),
    Parameter(
        name="split_s", unit="s", default=2e-6, lower=1e-8, upper=2e-4, meaning="joining a product split along k"
    ),
    Parameter(
        name="quantise_efficiency",
        unit="-",
        default=0.5,
        lower=0.02,
        upper=4.0,
        meaning="of bandwidth, quantising pass",
    ),
    Parameter(
        name="wave", unit="-", default=0.3, lower=0.02, upper=1.0, meaning="1: whole waves of tiles only, 0: no tail"
    ),
    Parameter(
        name="power", unit="-", default=3.5, lower=1.0, upper=12.0, meaning="overlap of memory and SM time (p-norm)"
    ),
)

FEATURES = (
    "batch", "m", "n", "k", "weight_bytes", "activation_bytes", "compute_bits", "quantise", "copies", "fills_cache",
)  # fmt: skip


def build(**columns: object) -> Features:
    """Broadcast the columns named in ``FEATURES`` to float arrays of one shape.

    ``batch`` products of (m, k) by (k, n); bytes per element as the kernel reads them; ``compute_bits`` 32, 16, 8
    or 4; ``quantise`` 1 where the input arrives in bf16 and is first quantised; ``copies`` of the weights a
    benchmark goes round, or with ``fills_cache`` 1 only as many as exceed L2.
    """
    values = [np.asarray(columns[name], dtype=np.float64) for name in FEATURES]
    shape = np.broadcast(*values).shape
    return {name: np.full(shape, value) for name, value in zip(FEATURES, values, strict=True)}


def element_bytes(dtypes: NDArray[np.str_]) -> Array:
    """Bytes of a number in the formats measured rows name; those not listed are 8-bit. [B]"""
    return np.array([_WIDE.get(dtype, 1.0) for dtype in dtypes.tolist()])


def seconds(features: Features, parameters: Parameters, hardware: Hardware, cold: bool) -> Array:
    """Predicted time, one entry a row. [s]"""
    device = hardware.device
    batch, m, n, k = (features[name] for name in ("batch", "m", "n", "k"))
    weights, inputs, outputs = _bytes(features)
    bandwidth = device.memory_bandwidth
    rate = bandwidth * parameters["memory_efficiency"]
    traffic = weights + inputs + outputs
    if not cold:
        resident = _resident(features, weights, traffic, device.l2_cache)
        traffic = traffic * (1.0 - resident * (1.0 - 1.0 / parameters["cache_gain"]))
    # operands beyond L2 are read again for every patch of output that the whole device works on at once
    spilled = 1.0 / (1.0 + (device.l2_cache / (weights + inputs)) ** 2)
    patch = 128.0 * np.sqrt(device.sms)
    again = batch * m * n * k * (features["weight_bytes"] + features["activation_bytes"]) / patch
    memory = (traffic + parameters["reread"] * spilled * again) / rate
    quantise_rate = bandwidth * parameters["quantise_efficiency"]
    passed = features["quantise"] * batch * m * k * (2.0 + features["activation_bytes"])
    quantise = passed * ((1.0 - spilled) / quantise_rate + spilled / np.minimum(quantise_rate, rate))
    return np.asarray(parameters["launch_s"] + _kernel_s(features, parameters, hardware, memory) + quantise)


def _kernel_s(features: Features, parameters: Parameters, hardware: Hardware, memory: Array) -> Array:
    """Time of the best tiling beside ``memory``, the time device memory takes. [s]"""
    sms = hardware.device.sms
    batch, m, n, k = (features[name] for name in ("batch", "m", "n", "k"))
    sm_flop_per_s = peak_flop_per_s(hardware, features["compute_bits"]) * parameters["compute_efficiency"] / sms
    feed = parameters["sm_feed"] * hardware.device.memory_bandwidth / sms
    rows, columns = (np.reshape(side, (-1, *(1,) * np.ndim(m))) for side in np.array(TILES, dtype=np.float64).T)
    tiles = batch * np.ceil(m / rows) * np.ceil(n / columns) / sms
    multiply = 2.0 * rows * columns * k / sm_flop_per_s
    pull = k * (rows * features["activation_bytes"] + columns * features["weight_bytes"]) / feed
    whole = np.maximum(np.maximum(multiply, pull), k / SCALE_BLOCK * parameters["step_s"])
    end = parameters["tile_s"] * rows * columns / REFERENCE_TILE
    best = np.full(np.shape(m), np.inf)
    for split in SPLITS:
        # assumption: block-scaled 8-bit kernels do not cut k; their times grow with k where bf16 ones stay flat
        allowed = (features["compute_bits"] > 8) | (split == 1)
        if not allowed.any():
            continue
        rounds = tiles * split
        waves = np.maximum(1.0, rounds + parameters["wave"] * (np.ceil(rounds) - rounds))
        # the overlap with memory keeps the order of tiles
        time = soft_max(memory, np.min(waves * (whole / split + end), axis=0), parameters["power"])
        if split > 1:
            time = time + parameters["split_s"] + split * batch * m * n * PARTIAL_BYTES / (feed * sms)
        best = np.minimum(best, np.where(allowed, time, np.inf))
    return best


def roofline(features: Features, hardware: Hardware) -> Array:
    """max(FLOPs / peak, bytes / bandwidth), nothing else. [s]"""
    flop = 2.0 * features["batch"] * features["m"] * features["n"] * features["k"]
    compute = flop / peak_flop_per_s(hardware, features["compute_bits"])
    return np.asarray(np.maximum(compute, sum(_bytes(features)) / hardware.device.memory_bandwidth), dtype=np.float64)


def _bytes(features: Features) -> tuple[Array, Array, Array]:
    """Bytes of weights, inputs and outputs, each counted once. [B]"""
    batch, m, n, k = (features[name] for name in ("batch", "m", "n", "k"))
    return (
        batch * n * k * features["weight_bytes"],
        batch * m * k * features["activation_bytes"],
        batch * m * n * OUTPUT_BYTES,
    )


def _resident(features: Features, weights: Array, traffic: Array, l2_bytes: float) -> Array:
    """Share of the traffic that a benchmark going round its weight copies finds in L2. [-]"""
    if l2_bytes <= 0:
        return np.zeros_like(weights)
    copies = features["copies"]
    enough = np.ceil(l2_bytes / weights)
    copies = np.where(features["fills_cache"] > 0, np.minimum(copies, enough), copies)
    cycle = (copies - 1.0) * weights + traffic
    # assumption: a working set just above the cache misses nearly everything, as the L40S times suggest
    return np.asarray(1.0 / (1.0 + (cycle / (1.02 * l2_bytes)) ** 24), dtype=np.float64)
