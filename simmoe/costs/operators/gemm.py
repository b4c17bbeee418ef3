"""Time of a dense matrix product y[m, n] = x[m, k] w[k, n] on one device: projections, dense and shared FFN, head.

Model: `simmoe.costs.operators.matmul`, batch 1. Measured rows differ in what they hold: vLLM and SGLang bf16 is the
linear layer over six weight sets in turn; TensorRT-LLM block fp8 takes a bf16 input, so its quantisation is
inside; DeepGEMM rows are the kernel alone. Left out: bias and activation. Compared with: profiles/*/gemm_*.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from simmoe.costs.operators import matmul
from simmoe.costs.operators.base import Features, Operator
from simmoe.specs.measurement import Table


def features_of(
    m: ArrayLike,
    n: ArrayLike,
    k: ArrayLike,
    *,
    weight_bytes: ArrayLike = 2.0,
    activation_bytes: ArrayLike = 2.0,
    compute_bits: ArrayLike = 16.0,
    quantise: ArrayLike = 0.0,
) -> Features:
    """Features of products of shape (m, n, k); everything broadcasts.

    Parameters
    ----------
    m, n, k : array_like
        Tokens, output width and input width on this device. [-]
    weight_bytes, activation_bytes : array_like
        Per element as the kernel reads them. [B]
    compute_bits : array_like
        Operand width of the tensor units: 32, 16, 8 or 4. [bit]
    quantise : array_like
        1 where the input arrives in bf16 and is first quantised to ``activation_bytes``, as measured for
        ``fp8_block``. [-]
    """
    return matmul.build(
        batch=1.0,
        m=m,
        n=n,
        k=k,
        weight_bytes=weight_bytes,
        activation_bytes=activation_bytes,
        compute_bits=compute_bits,
        quantise=quantise,
        copies=1.0,
        fills_cache=0.0,
    )


def features(table: Table) -> Features:
    """Features of measured rows; grouped DeepGEMM rows become NaN (they are no dense products)."""
    kernel_alone = "kernel" in table.columns  # DeepGEMM, timed without the pass that quantises its input
    if "m_per_group" in table.columns:  # DeepGEMM's own tables
        m = np.where(table.text("variant") == "dense", table.number("m_per_group"), np.nan)
    else:
        m = table.number("m")
    width = matmul.element_bytes(table.text("dtype"))
    eight_bit = width == 1.0
    inside = np.where(eight_bit & (not kernel_alone), 1.0, 0.0)
    return matmul.build(
        batch=1.0,
        m=m,
        n=table.number("n"),
        k=table.number("k"),
        weight_bytes=width,
        activation_bytes=width,
        compute_bits=8.0 * width,
        quantise=inside,
        copies=1.0 if kernel_alone else np.where(eight_bit, 5.0, 6.0),
        fills_cache=inside,  # inferred from which L40S shapes run from L2: no more copies than fill it
    )


OPERATOR = Operator(
    name="gemm",
    parameters=matmul.PARAMETERS,
    seconds=matmul.seconds,
    roofline=matmul.roofline,
    features=features,
    variant_columns=("framework", "dtype", "kernel", "variant"),
    group_columns=("n", "k"),
    range_features=("m", "n", "k"),
)
