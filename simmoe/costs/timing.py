"""Which fit answers for an operator, and the seconds it gives: the bridge from shapes to measured kernels.

A hardware file names its calibration, or the nearest device's whose efficiencies stand in (on its own data
sheet, with a wider uncertainty, and said so). Within a calibration the variant asked for is used if there is
one; else the closest: same dtype before same framework, then the better held-out error. What was substituted
and what lies outside the measured range is collected, never silent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simmoe.costs import borrowing
from simmoe.costs.borrowing import DEFAULT_LOG_SIGMA
from simmoe.costs.calibration import Calibration, OperatorFit, load
from simmoe.costs.operators.base import Features, Operator
from simmoe.costs.operators.host import is_host, operator_on
from simmoe.costs.precision import WEIGHT_ONLY
from simmoe.errors import CalibrationError, SpecError
from simmoe.specs.engines import KernelChoice
from simmoe.specs.hardware import Hardware
from simmoe.specs.load import calibration_path

Array = NDArray[np.float64]

#: How much each agreement with the variant asked for counts; keys not listed count 1.
_AGREEMENT = {
    "operation": 32.0,
    "dtype": 8.0,
    "gemm_dtype": 8.0,
    "kv_cache_dtype": 8.0,
    "kernel": 16.0,
    "phase": 16.0,
    "kernel_source": 6.0,
}
#: Less than a format or its stand-in: kernels of two engines for one format are 5 to 20 % apart in the tables, those of
#: one engine for two formats up to a factor of two (TensorRT-LLM's experts in fp8 by tensors and by blocks).
_FRAMEWORK = 3.0
#: Measured formats nearest to ones nobody measured, the nearest first: narrow weights whose products run on 16-bit
#: activations; 8-bit ones with a scale a tensor, row or column; 4-bit ones in blocks that the units scale themselves,
#: where Hopper's kernels of block-scaled fp8 do it in software, so that fp8 with one scale is nearer.
_STANDS_IN: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("fp8", "int8"), ("fp8_block",)),
    **dict.fromkeys(("mxfp4_mxfp8", "nvfp4"), ("fp8", "fp8_block")),
    **dict.fromkeys(("mxfp4", "int4"), ("bfloat16",)),
    **{name + WEIGHT_ONLY: ("bfloat16",) for name in ("fp8", "fp8_block", "int8", "mxfp4_mxfp8", "nvfp4")},
}
#: More than the framework; with it, less than the very format of another's kernel; and what a place in the list costs.
_STAND_IN, _FARTHER = 4.0, 0.2
#: Farther outside than this is told. [-]
_BARELY = 1e-3


@dataclass
class KernelTimes:
    """Times operators on one device for one framework.

    Parameters
    ----------
    hardware : the device predicted for; its peaks enter every formula.
    own, neighbour : calibrations of the device itself and of the one whose efficiencies stand in for operators
        that were not measured on it; with neither, documented defaults.
    framework : whose kernels to prefer (vllm, sglang, trtllm, torch).
    kernels : operator -> the kernel the engine is known to run, measured on this device or, failing that, on another
        whose efficiencies are borrowed. It goes before the framework.

    Attributes
    ----------
    notes : substitutions and extrapolations met so far, in words.
    """

    hardware: Hardware
    own: Calibration | None
    neighbour: Calibration | None
    framework: str
    kernels: Mapping[str, KernelChoice] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)
    _chosen: dict[tuple[str, str, tuple[tuple[str, str], ...]], OperatorFit | None] = field(default_factory=dict)
    _measured_on: dict[OperatorFit, Hardware | None] = field(default_factory=dict)
    _values: dict[OperatorFit, dict[str, float]] = field(default_factory=dict)

    def seconds(
        self, operator: Operator, features: Features, *, cold: bool = True, **variant: str
    ) -> tuple[Array, Array]:
        """Time of every row and the log spread of each such prediction. [s], [-]

        ``cold``: weights come from device memory, as in a layer stack; False only to compare with benchmarks.
        """
        operator = operator_on(operator, self.hardware)
        hardware = self._integer if variant.get("dtype") == "int8" else self.hardware
        if is_host(self.hardware):
            variant.pop("framework", None)  # of a GPU engine's kernels
        fit = self.choose(operator, variant)
        if fit is None:
            seconds = operator.seconds(features, operator.defaults, hardware, cold)
            return seconds, np.full(np.shape(seconds), DEFAULT_LOG_SIGMA)
        seconds = operator.seconds(features, self.values(operator, fit), hardware, cold)
        distance = np.broadcast_to(borrowing.beyond(fit, features), np.shape(seconds))
        if distance.max(initial=0.0) > _BARELY:
            self._note_extrapolation(operator, fit, features)
        return seconds, np.hypot(self.log_sigma(fit), borrowing.extrapolated_log_sigma(distance))

    @cached_property
    def _integer(self) -> Hardware:
        """The hardware as int8 products see it: operators know widths, and 8 bits multiply in the integer units."""
        device, peak = self.hardware.device, self.hardware.device.peak
        return self.hardware.vary(device=device.vary(peak=peak.vary(fp8=peak.int8)))

    def values(self, operator: Operator, fit: OperatorFit) -> dict[str, float]:
        """A fit's parameters on this device, carried over from the one it was measured on."""
        if fit not in self._values:
            of = self._measured_on.get(fit, self.hardware)
            self._values[fit] = borrowing.carried_over(operator, fit, of, self.hardware)
        return self._values[fit]

    def log_sigma(self, fit: OperatorFit) -> float:
        """Spread of a fit's predictions on this device, inside the range measured. [-]"""
        if fit not in self._measured_on:
            return fit.log_sigma
        added = borrowing.borrowed_log_sigma(fit.operator, self._measured_on[fit], self.hardware)
        return float(np.hypot(fit.log_sigma, added))

    def choose(self, operator: Operator, variant: Mapping[str, str]) -> OperatorFit | None:
        """The fit that answers for a variant, None where nothing was measured; notes what was substituted.

        Raises
        ------
        CalibrationError
            If the calibration lacks a parameter that the operator's model has.
        """
        key = (operator.name, self.framework, tuple(sorted(variant.items())))
        if key in self._chosen:
            return self._chosen[key]
        chosen_kernel = self._known_kernel(operator, variant)
        if chosen_kernel is not None:
            self._chosen[key] = chosen_kernel
            return chosen_kernel
        wanted = {"framework": self.framework, **variant}

        def agreement(fit: OperatorFit) -> tuple[float, float]:
            score = 0.0
            for name, value in wanted.items():
                if fit.variant.get(name) == value:
                    score += _FRAMEWORK if name == "framework" else _AGREEMENT.get(name, 1.0)
                elif name == "dtype" and fit.variant.get(name) in _STANDS_IN.get(value, ()):
                    score += _STAND_IN - _FARTHER * _STANDS_IN[value].index(fit.variant[name])
            return score, -fit.held_out_mape_percent

        own = max(self.own.of(operator.name), key=agreement, default=None) if self.own else None
        other = max(self.neighbour.of(operator.name), key=agreement, default=None) if self.neighbour else None
        best = own or other
        if other and self.neighbour:
            self._measured_on[other] = borrowing.measured_hardware(self.neighbour.device)
        if own and other:
            # a kernel of this number format on a neighbour, before another format's on this device
            best = other if _formats_met(own, wanted) < _formats_met(other, wanted) else own
        if best is None:
            self.notes[f"{operator.name}: no measurement; documented default parameters"] = None
            self._chosen[key] = None
            return None
        if best is other and self.neighbour and self.own:
            note = f"{operator.name}: not measured on this device; efficiencies of {self.neighbour.device}"
            self.notes[note] = None
        lacking = [p.name for p in operator.parameters if p.name not in best.parameters]
        if lacking:
            raise CalibrationError(
                f"calibration for {self.hardware.device.name}: {operator.name} {'/'.join(best.variant.values())}: no "
                f"parameter {', '.join(lacking)}; made for another version, run `simmoe calibrate` again"
            )
        different = [
            f"{name} {best.variant[name]} for {value}"
            for name, value in wanted.items()
            if name in best.variant and best.variant[name] != value
        ]
        if different:
            self.notes[f"{operator.name}: {', '.join(different)} (closest measured kernel)"] = None
        self._chosen[key] = best
        return best

    def _known_kernel(self, operator: Operator, variant: Mapping[str, str]) -> OperatorFit | None:
        """The fit of the kernel the engine is known to run: of this device, its neighbour, or the device it names."""
        choice = self.kernels.get(operator.name)
        if choice is None:
            return None
        named = {"framework": choice.framework, "kernel_source": choice.kernel_source}
        wanted = {k: v for k, v in variant.items() if k not in named}
        places = (self.own, self.neighbour, _load(calibration_path(choice.calibration)))
        for place in places:
            fits = [f for f in place.of(operator.name) if named.items() <= f.variant.items()] if place else []
            if fits:
                best = max(fits, key=lambda fit: sum(fit.variant.get(name) == value for name, value in wanted.items()))
                if place is not self.own:
                    where = place.device if place else ""
                    self._measured_on[best] = borrowing.measured_hardware(where)
                    self.notes[f"{operator.name}: {choice.kernel_source} kernel with efficiencies of {where}"] = None
                return best
        return None

    def _note_extrapolation(self, operator: Operator, fit: OperatorFit, features: Features) -> None:
        for name, (low, high) in fit.ranges.items():
            values = features.get(name)
            if values is None or not np.size(values):
                continue
            seen_low, seen_high = float(np.min(values)), float(np.max(values))
            if seen_high > high * (1 + _BARELY) or seen_low < low * (1 - _BARELY):
                worst = seen_high if seen_high > high * (1 + _BARELY) else seen_low
                measured = f"{_figure(low)}..{_figure(high)}"
                self.notes[f"{operator.name}: {name} {_figure(worst)} outside measured {measured}"] = None


def _figure(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def kernel_times(hardware: Hardware, framework: str, kernels: Mapping[str, KernelChoice] | None = None) -> KernelTimes:
    """Kernel times from the hardware's own calibration, else its nearest neighbour's, else defaults. Notes which."""
    if hardware.device.sms < 1:
        raise SpecError(f"{hardware.name}: device.sms: missing; kernels are cut into tiles for so many multiprocessors")
    own = _load(calibration_path(hardware.calibration)) if hardware.calibration else None
    neighbour = _load(calibration_path(hardware.nearest_calibration)) if hardware.nearest_calibration else None
    if is_host(hardware):
        framework = "torch"  # whatever the engine, a CPU's operators are torch's
    times = KernelTimes(hardware, own, neighbour, framework, kernels or {})
    if own is None:
        device = hardware.device.name
        times.notes[
            f"{device} is not calibrated: efficiencies of {neighbour.device} on its own data sheet"
            if neighbour
            else f"{device} is not calibrated: documented default efficiencies throughout"
        ] = None
    return times


def _formats_met(fit: OperatorFit, wanted: Mapping[str, str]) -> int:
    """How many of the number formats asked for a fit was made for."""
    formats = ("dtype", "gemm_dtype", "kv_cache_dtype")
    return sum(fit.variant.get(name) == wanted[name] for name in formats if name in wanted)


@lru_cache(maxsize=32)
def _load(path: Path) -> Calibration:
    return load(path)
