"""The shape every operator model has, so that one fitter, one validator and one engine serve them all.

An operator maps features (numpy arrays, one entry a row) and a few physical parameters to seconds.
Parameters are efficiencies relative to the data sheet where possible, so that a device nobody has
measured can borrow them and put in its own peaks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simmoe.specs.hardware import Hardware
from simmoe.specs.measurement import Table

Array = NDArray[np.float64]
Features = Mapping[str, Array]
Parameters = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One fitted number: its unit, its documented default (the uncalibrated prediction) and its bounds.

    ``of_peak``: a share of the matrix units' peak, which does not carry over to a device with another (see
    `simmoe.costs.borrowing`).
    """

    name: str
    unit: str
    default: float
    lower: float
    upper: float
    meaning: str
    of_peak: bool = False


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One operator's time model.

    Parameters
    ----------
    name : str
        As in the measured files' names: ``moe``, ``gemm``, ``mla_decode`` ...
    parameters : tuple of Parameter
        All positive; fitted in log space.
    seconds : callable
        ``(features, parameters, hardware, cold) -> seconds``, vectorised, pure. ``cold`` True: weights and
        inputs come from device memory, as in a layer stack. False: a benchmark that replays one input, so
        that what fits in L2 is read from L2.
    roofline : callable
        ``(features, hardware) -> seconds``: the plain max(FLOPs / peak, bytes / bandwidth), for comparison.
    features : callable
        ``(table) -> features``: measured columns to features, rows in the same order. Rows the model does
        not speak to are NaN in at least one feature.
    variant_columns : tuple of str
        Columns whose combination is fitted on its own (framework, dtype ...).
    group_columns : tuple of str
        Columns that make a shape group; held out together when the fit is judged.
    range_features : tuple of str
        Features whose measured minimum and maximum are recorded, to tell extrapolation.
    measured : callable, optional
        ``(table) -> seconds`` where the measured time is not the column ``latency_us`` alone.
    sweep : str, optional
        Feature that a benchmark raises step by step with all others fixed: neighbouring rows tell the scatter of
        the measurement itself.
    """

    name: str
    parameters: tuple[Parameter, ...]
    seconds: Callable[[Features, Parameters, Hardware, bool], Array]
    roofline: Callable[[Features, Hardware], Array]
    features: Callable[[Table], Features]
    variant_columns: tuple[str, ...]
    group_columns: tuple[str, ...]
    range_features: tuple[str, ...]
    measured: Callable[[Table], Array] | None = None
    sweep: str | None = None

    @property
    def defaults(self) -> dict[str, float]:
        """Documented default parameters."""
        return {parameter.name: parameter.default for parameter in self.parameters}


def soft_max(a: Array, b: Array, power: float) -> Array:
    """p-norm of two times: max(a, b) for a large power, a + b for 1. Shapes broadcast. [s]"""
    high = np.maximum(a, b)
    low = np.minimum(a, b)
    ratio = np.divide(low, high, out=np.zeros_like(high), where=high > 0)
    return np.asarray(high * (1.0 + ratio**power) ** (1.0 / power), dtype=np.float64)


def peak_flop_per_s(hardware: Hardware, compute_bits: Array) -> Array:
    """Dense matrix peak by operand width: 32, 16, 8 or 4 bits, one entry a row. [FLOP/s]"""
    names = {32: "float32", 16: "bfloat16", 8: "fp8", 4: "fp4"}
    bits = np.asarray(compute_bits, dtype=np.float64)
    peak = np.full(bits.shape, np.nan)
    for width, name in names.items():
        peak[bits == width] = hardware.device.flop_per_s(name)
    return peak
