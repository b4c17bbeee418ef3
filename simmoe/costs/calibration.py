"""What a calibration carries: fitted parameters with standard errors, the range measured, the residual spread.

Written by `simmoe calibrate` as ``profiles/<device>/calibration.yaml``, read by everything that predicts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from simmoe.errors import CalibrationError
from simmoe.specs.base import Spec, from_yaml

SCHEMA = 1


class FittedParameter(Spec):
    """A parameter's estimate and its (cluster-robust, by shape group) standard error."""

    value: float
    standard_error: float | None = Field(default=None, description="None: not identified by the data.")


class OperatorFit(Spec):
    """One operator model fitted to one variant (framework, dtype ...) on one device."""

    operator: str
    variant: dict[str, str]
    parameters: dict[str, FittedParameter]
    log_sigma: float = Field(description="Spread of ln(measured / predicted) on shape groups not fitted.")
    log_bias: float = Field(default=0.0, description="Mean of ln(measured / predicted) on shape groups not fitted.")
    in_sample_mape_percent: float
    held_out_mape_percent: float
    held_out_median_ape_percent: float
    held_out_p90_ape_percent: float
    roofline_mape_percent: float
    inside_90_percent: float | None = None
    scatter_percent: float | None = Field(
        default=None, description="Mean error neighbouring rows leave to any smooth model of the swept size."
    )
    rows: int
    groups: int
    ranges: dict[str, tuple[float, float]]
    source: str
    notes: tuple[str, ...] = Field(default=(), description="Warnings on what the rows do not tell.")

    def values(self) -> dict[str, float]:
        """Parameter name to value."""
        return {name: parameter.value for name, parameter in self.parameters.items()}

    def __hash__(self) -> int:
        return hash((self.operator, tuple(sorted(self.variant.items())), self.log_sigma, self.rows))


class Calibration(Spec):
    """All fits of one device."""

    schema_version: int = SCHEMA
    device: str
    created_by: str
    digest: str = Field(description="SHA-256 (first 12 hex digits) of the measured files, in name order.")
    sources: tuple[str, ...]
    fits: tuple[OperatorFit, ...]

    def find(self, operator: str, **variant: str) -> OperatorFit | None:
        """The fit of exactly this operator and variant, if there is one."""
        for fit in self.fits:
            if fit.operator == operator and all(fit.variant.get(key) == value for key, value in variant.items()):
                return fit
        return None

    def of(self, operator: str) -> tuple[OperatorFit, ...]:
        """Every variant fitted for an operator."""
        return tuple(fit for fit in self.fits if fit.operator == operator)


def load(path: Path) -> Calibration:
    """Read a calibration file.

    Raises
    ------
    CalibrationError
        If the file is missing, malformed, or of another schema version.
    """
    try:
        raw = from_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as problem:
        raise CalibrationError(f"{path}: no such calibration; make one with `simmoe calibrate`") from problem
    except yaml.YAMLError as problem:
        raise CalibrationError(f"{path}: not YAML ({problem})".replace("\n", " ")) from problem
    if not isinstance(raw, Mapping):
        raise CalibrationError(f"{path}: expected a mapping")
    try:
        calibration = Calibration.model_validate(raw)
    except ValidationError as problem:
        first = problem.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CalibrationError(f"{path}: {where}: {first['msg']}") from problem
    if calibration.schema_version != SCHEMA:
        raise CalibrationError(
            f"{path}: schema_version {calibration.schema_version}; this simmoe reads {SCHEMA}, "
            "run `simmoe calibrate` again"
        )
    return calibration


def dump(calibration: Calibration, path: Path) -> None:
    """Write a calibration file; numbers keep six significant digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = _rounded(calibration.model_dump(mode="json"))
    path.write_text(yaml.safe_dump(plain, sort_keys=False, width=120), encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return value
