"""What a fit says of a device it was not made on, and of shapes it never saw: parameters carried over, spread added.

Shares of bandwidth and fixed times carry over as they stand. A share of the matrix peak does not, within one
architecture: feeding a tile's operands, issuing instructions and the epilogue take a multiprocessor their own time per
FLOP whatever its peak, so that time is kept and the share follows: 1/e' - 1 = (1/e - 1) p'/p, with p the peak of one
multiprocessor. An H20 (3.8 TFLOP/s in 8 bits each) is nearly always at its peak where an H800 (15) is at half.
Across architectures multiprocessors are unlike in more than their peak: there the share is carried over as it stands,
which errs less between A100, L40S and H100.
Measured by `simmoe calibrate --beyond profiles` (`simmoe.calibrate.beyond`), which prints the constants below beside
what it finds; laws in tests/test_borrowing.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np

from simmoe.costs.calibration import OperatorFit
from simmoe.costs.operators.base import Array, Features, Operator
from simmoe.specs.hardware import Hardware
from simmoe.specs.load import hardware_names, load_hardware

#: How far apart two devices are; for kernels that work their matrix units through, and for the rest (decode attention,
#: exchanges), which were written anew from one architecture to the next or hang on links.
ALIKE, UNLIKE = "same architecture, like SMs", "same architecture, other SMs"
ACROSS, ACROSS_REST = "other architecture, products and prefill", "other architecture, decode and exchange"
#: Spread of ln(measured / predicted) that borrowing adds: the width with which the 90 % interval contains 90 % of the
#: rows of the other device, over all fits that two devices have in common.
BORROWED_LOG_SIGMA = {ALIKE: 0.08, UNLIKE: 0.24, ACROSS: 0.37, ACROSS_REST: 1.5}
#: Multiprocessors whose peaks differ by less are taken for alike: a PCIe card's clock. [-]
_LIKE = 1.2
_PRODUCTS = frozenset(
    {"gemm", "mla_bmm", "moe", "moe_wideep", "moe_grouped_gemm", "mlp", "mla_prefill", "attention_prefill"}
)
#: The same for an operator nobody measured here: documented default parameters.
DEFAULT_LOG_SIGMA = 0.5
#: Spread that extrapolation adds per factor e beyond the nearest end of what was measured, for the feature farthest
#: out: as above, over fits without the ends of their ranges.
EXTRAPOLATED_LOG_SIGMA = 0.07


def carried_over(operator: Operator, fit: OperatorFit, of: Hardware | None, to: Hardware) -> dict[str, float]:
    """A fit's parameters for another device.

    Parameters
    ----------
    of, to : the device measured (None: not known) and the one predicted for.
    """
    values = fit.values()
    if of is None or of.device.architecture != to.device.architecture:
        return values
    ratio = _multiprocessor_peak(to) / _multiprocessor_peak(of)
    for parameter in operator.parameters:
        if parameter.of_peak and parameter.name in values:
            share = min(values[parameter.name], 1.0)
            values[parameter.name] = 1.0 / (1.0 + ratio * (1.0 / share - 1.0))
    return values


def kinship(operator: str, of: Hardware | None, to: Hardware) -> str:
    """How far apart the device measured (None: not known) and the one predicted for are, for an operator."""
    if of is None or of.device.architecture != to.device.architecture:
        return ACROSS if operator in _PRODUCTS else ACROSS_REST
    peaks = [_multiprocessor_peak(one) for one in (of, to)]
    return ALIKE if max(peaks) < _LIKE * min(peaks) else UNLIKE


def borrowed_log_sigma(operator: str, of: Hardware | None, to: Hardware) -> float:
    """Spread that borrowing adds. [-]"""
    return BORROWED_LOG_SIGMA[kinship(operator, of, to)]


def beyond(fit: OperatorFit, features: Features) -> Array:
    """Factors e that each row lies outside what was measured, in the feature farthest out; 0 inside. [-]"""
    shape = np.broadcast_shapes(*(np.shape(value) for value in features.values()))
    farthest = np.zeros(shape)
    for name, (low, high) in fit.ranges.items():
        values = features.get(name)
        if values is not None and np.size(values):
            value = np.maximum(np.asarray(values, dtype=np.float64), 1e-12)
            outside = np.maximum(np.log(value / max(high, 1e-12)), np.log(max(low, 1e-12) / value))
            farthest = np.maximum(farthest, outside)
    return farthest


def extrapolated_log_sigma(distance: Array) -> Array:
    """Spread that extrapolation by ``distance`` factors e adds, same shape. [-]"""
    return np.asarray(EXTRAPOLATED_LOG_SIGMA * np.maximum(distance, 0.0))


@cache
def measured_hardware(device: str) -> Hardware | None:
    """The shipped hardware whose device a calibration names; None: it is not shipped."""
    shipped: Mapping[str, object] = hardware_names()
    return next((found for name in shipped if (found := load_hardware(name)).device.name == device), None)


def _multiprocessor_peak(hardware: Hardware) -> float:
    """Dense bfloat16 peak of one multiprocessor. [FLOP/s]"""
    return hardware.device.flop_per_s("bfloat16") / max(hardware.device.sms, 1)
