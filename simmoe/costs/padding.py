"""What fixed capacity and naive dispatch add around the expert products: one-hot moves, a launch per expert.

Model: moving tokens by one-hot products is two dense products with a (S, E C) mask, which has to be written and read;
a per-expert loop runs each expert's products on their own, never faster than the host launches them.
Times of products: `operators.gemm`. Left out: the cumulative sum that assigns slots (small beside the mask).
Sources: D. Lepikhin et al., "GShard", arXiv 2006.16668, algorithm 2 (one-hot dispatch); H. Huang et al., "Towards MoE
Deployment", arXiv 2303.06182, sec. III (its cost). Checked in tests/test_mechanisms_padding.py.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from simmoe.costs.operators import gemm
from simmoe.costs.precision import Format
from simmoe.costs.timing import KernelTimes
from simmoe.routing.expert_load import ExpertLoad

Array = NDArray[np.float64]

#: Kernels one expert of a naive loop launches: pick its rows, a product per matrix, activation, weighted scatter.
LOOP_KERNELS_BESIDE_PRODUCTS = 3
#: Bytes per mask element: written in fp32 as gate weights and in 16 bits as dispatch mask, each read once.
MASK_BYTES = 2 * (4 + 2)


def einsum_s(times: KernelTimes, tokens: Array, slots_total: Array, hidden: float) -> Array:
    """One-hot dispatch and combine of S ``tokens`` into E C ``slots_total`` rows on one rank. [s]

    Two products of 2 S (E C) hidden FLOP, plus the mask through memory.
    """

    def product(m: Array, k: Array) -> Array:
        features = gemm.features_of(
            m, np.full_like(m, hidden), k, weight_bytes=2.0, activation_bytes=2.0, compute_bits=16.0
        )
        return times.seconds(gemm.OPERATOR, features, dtype="bfloat16")[0]

    # masks and tokens are 16 bits wide whatever the experts are
    mask = tokens * slots_total * MASK_BYTES / times.hardware.device.memory_bandwidth
    return product(slots_total, tokens) + product(tokens, slots_total) + mask


def loop_s(
    times: KernelTimes, load: ExpertLoad, hidden: float, inter: float, matrices: int, form: Format, launch_s: float
) -> Array:
    """Experts one after another, each with its mean rows. [s]"""
    active = np.maximum(load.active_experts, 1e-9)
    rows = np.maximum(np.asarray(load.routed_pairs / active, dtype=np.float64), 1.0)
    total = np.zeros_like(rows)
    for n, k in (((matrices - 1) * inter, hidden), (hidden, inter)):
        features = gemm.features_of(
            rows, np.full_like(rows, n), np.full_like(rows, k), weight_bytes=form.weight_bytes,
            activation_bytes=form.activation_bytes, compute_bits=form.compute_bits, quantise=float(form.quantises),
        )  # fmt: skip
        total = total + times.seconds(gemm.OPERATOR, features, dtype=form.dtype)[0]
    launches = (matrices + LOOP_KERNELS_BESIDE_PRODUCTS) * launch_s
    return load.active_experts * np.maximum(total, launches)
