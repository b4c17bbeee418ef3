"""Measurements to a Calibration: robust fits of operator models, judged on shape groups the fit never saw.

Model: ln(measured) = ln(model(parameters)) + residual; the loss is soft-L1 on the log residual, so a few
broken rows do not move the fit, and 10 % too high costs as much as 10 % too low. Standard errors are
cluster-robust by shape group (rows of one shape share their error). Held-out figures come from grouped
K-fold: the groups are split in folds and each fold is predicted by a fit on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmoe.costs.calibration import FittedParameter, OperatorFit
from simmoe.costs.operators.base import Array, Features, Operator
from simmoe.errors import CalibrationError
from simmoe.specs.hardware import Hardware
from simmoe.specs.measurement import Table

# Pull of a documented default on ln(parameter): a decade away costs as much as a handful of rows 10 % off.
_ANCHOR = 0.1
#: Log residual beyond which a row counts linearly, not squared. [-]
_SCALE = 0.1
#: Benchmarks replay one input, so what fits in L2 is warm: the operators' ``cold`` is false while fitting.
_WARM = False


@dataclass(frozen=True)
class Sample:
    """The rows of one variant, ready to fit: features, seconds, group numbers."""

    variant: Mapping[str, str]
    features: Features
    seconds: Array
    groups: NDArray[np.intp]
    rows: NDArray[np.intp]

    def take(self, index: NDArray[np.intp]) -> Sample:
        """A subset of the rows."""
        features = {name: value[index] for name, value in self.features.items()}
        return Sample(self.variant, features, self.seconds[index], self.groups[index], self.rows[index])


def samples(operator: Operator, table: Table) -> Iterator[Sample]:
    """Split a measured table into variants; rows without a finite feature or time are left out."""
    features = operator.features(table)
    seconds = operator.measured(table) if operator.measured else table.number("latency_us") * 1e-6
    usable = np.isfinite(seconds) & (seconds > 0)
    for value in features.values():
        usable &= np.isfinite(value)
    if "anomalous" in table.columns:
        usable &= table.number("anomalous") == 0
    keys = [table.text(name) for name in operator.variant_columns if name in table.columns]
    names = [name for name in operator.variant_columns if name in table.columns]
    labels = np.array(["\x1f".join(parts) for parts in zip(*keys, strict=True)]) if keys else np.full(table.rows, "")
    shape = [table.text(name) for name in operator.group_columns if name in table.columns]
    group_text = np.array(["\x1f".join(parts) for parts in zip(*shape, strict=True)])
    for label in np.unique(labels[usable]):
        rows = np.flatnonzero(usable & (labels == label))
        _, groups = np.unique(group_text[rows], return_inverse=True)
        yield Sample(
            dict(zip(names, str(label).split("\x1f"), strict=True)) if keys else {},
            {name: value[rows] for name, value in features.items()},
            seconds[rows],
            groups,
            rows,
        )


def fit(
    operator: Operator, sample: Sample, hardware: Hardware, start: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Fit one variant and return parameter values.

    Raises
    ------
    CalibrationError
        If there are fewer rows than parameters.
    """
    values, _ = _solve(operator, sample, hardware, start)
    return values


def calibrate_operator(
    operator: Operator, sample: Sample, hardware: Hardware, source: str, folds: int = 10
) -> OperatorFit:
    """Fit a variant on all its rows and judge it on groups left out, fold by fold."""
    values, errors = _solve(operator, sample, hardware, None)
    count = int(sample.groups.max()) + 1
    predicted = held_out(operator, sample, hardware, values, folds)
    log_ratio = np.log(sample.seconds / predicted)
    ape = 100 * np.abs(predicted / sample.seconds - 1)
    fitted = operator.seconds(sample.features, values, hardware, _WARM)
    roofline = operator.roofline(sample.features, hardware)
    centre, sigma = _spread(log_ratio)
    return OperatorFit(
        operator=operator.name,
        variant=dict(sample.variant),
        parameters={name: FittedParameter(value=values[name], standard_error=errors[name]) for name in values},
        log_sigma=sigma,
        log_bias=centre,
        in_sample_mape_percent=float(100 * np.mean(np.abs(fitted / sample.seconds - 1))),
        held_out_mape_percent=float(np.mean(ape)),
        held_out_median_ape_percent=float(np.median(ape)),
        held_out_p90_ape_percent=float(np.quantile(ape, 0.9)),
        roofline_mape_percent=float(100 * np.mean(np.abs(roofline / sample.seconds - 1))),
        inside_90_percent=_inside_90(log_ratio, _folds(sample, folds)),
        scatter_percent=scatter_percent(sample, np.log(sample.seconds / fitted), operator.sweep),
        rows=len(sample.seconds),
        groups=count,
        ranges={
            name: (float(sample.features[name].min()), float(sample.features[name].max()))
            for name in operator.range_features
        },
        source=source,
    )


def held_out(
    operator: Operator, sample: Sample, hardware: Hardware, start: Mapping[str, float], folds: int = 10
) -> Array:
    """Predict every row from a fit that never saw its shape group. [s]"""
    fold = _folds(sample, folds)
    if fold.max() < 1:
        return operator.seconds(sample.features, start, hardware, _WARM)
    predicted = np.empty_like(sample.seconds)
    for number in range(int(fold.max()) + 1):
        unseen = np.flatnonzero(fold == number)
        # from the defaults, not from the fit on all rows: a parameter a fold cannot see must not carry it over
        values, _ = _solve(operator, sample.take(np.flatnonzero(fold != number)), hardware, None, errors=False)
        predicted[unseen] = operator.seconds(sample.take(unseen).features, values, hardware, _WARM)
    return predicted


def _folds(sample: Sample, folds: int) -> NDArray[np.intp]:
    """Fold of every row; a shape group lies in one fold."""
    count = int(sample.groups.max()) + 1
    order = np.random.default_rng(0).permutation(count)
    fold_of_group = np.empty(count, dtype=np.intp)
    fold_of_group[order] = np.arange(count) % min(folds, count)
    return fold_of_group[sample.groups]


def _spread(log_ratio: Array) -> tuple[float, float]:
    """Median and spread of log residuals: 90 % half-width over 1.645, honest about tails, deaf to a few wild rows."""
    centre = float(np.median(log_ratio))
    return centre, max(float(np.quantile(np.abs(log_ratio - centre), 0.90)) / 1.645, 1e-3)


def scatter_percent(sample: Sample, residual: Array, sweep: str | None) -> float | None:
    """Mean error that neighbouring rows leave to any model smooth in the swept size; None without neighbours. [%]

    What the fit knows of the curve's bend is taken out first. Scatter shared by neighbours (a slow series) is not seen.
    """
    if sweep is None:
        return None
    fixed = np.stack([sample.groups, *(v for name, v in sample.features.items() if name != sweep)], axis=1)
    _, series = np.unique(fixed, axis=0, return_inverse=True)
    found = []
    for number in range(int(series.max()) + 1):
        rows = np.flatnonzero(series.ravel() == number)
        rows = rows[np.argsort(sample.features[sweep][rows], kind="stable")]
        found.append(pseudo_residuals(np.log(sample.features[sweep][rows]), residual[rows]))
    each = np.concatenate(found)
    return float(100 * each.mean()) if each.size else None


def pseudo_residuals(place: Array, value: Array) -> Array:
    r"""Size of the scatter of each value that has neighbours on both sides; places ascend.

    A value less the line through its two neighbours, weights a and b, over :math:`\sqrt{1 + a^2 + b^2}` (Gasser, Sroka
    and Jennen-Steinmetz, Biometrika 73, 1986).
    """
    span = place[2:] - place[:-2]
    right = np.divide(place[1:-1] - place[:-2], span, out=np.full_like(span, 0.5), where=span > 0)
    bend = value[1:-1] - (1 - right) * value[:-2] - right * value[2:]
    return np.asarray(np.abs(bend) / np.sqrt(1 + (1 - right) ** 2 + right**2), dtype=np.float64)


def _inside_90(log_ratio: Array, fold: NDArray[np.intp]) -> float | None:
    """Share of unseen rows inside the 90 % interval, whose width comes from the other folds. None: one fold. [%]

    Intervals are centred on the prediction, as users see them.
    """
    if fold.max() < 1:
        return None
    inside = np.empty(log_ratio.shape, dtype=bool)
    for number in range(int(fold.max()) + 1):
        unseen = fold == number
        _, sigma = _spread(log_ratio[~unseen])
        inside[unseen] = np.abs(log_ratio[unseen]) <= 1.645 * sigma
    return float(100 * np.mean(inside))


def solver() -> Callable[..., Any]:
    """Scipy's least squares.

    Raises
    ------
    CalibrationError
        If scipy, an extra that only fitting needs, is not installed.
    """
    try:
        from scipy.optimize import least_squares  # noqa: PLC0415  (an extra; only fitting needs it)
    except ModuleNotFoundError as problem:
        if (problem.name or "").split(".")[0] != "scipy":
            raise
        raise CalibrationError("fitting needs scipy, which is not installed: pip install 'simmoe[fit]'") from None
    found: Callable[..., Any] = least_squares
    return found


def _solve(
    operator: Operator, sample: Sample, hardware: Hardware, start: Mapping[str, float] | None, *, errors: bool = True
) -> tuple[dict[str, float], dict[str, float | None]]:
    least_squares = solver()
    names = [parameter.name for parameter in operator.parameters]
    if errors and len(sample.seconds) <= len(names):  # without a fold there may be fewer: the defaults hold the fit
        raise CalibrationError(
            f"{operator.name} {dict(sample.variant)}: {len(sample.seconds)} rows for {len(names)} parameters"
        )
    lower = np.log([parameter.lower for parameter in operator.parameters])
    upper = np.log([parameter.upper for parameter in operator.parameters])
    first = {**operator.defaults, **(start or {})}
    theta0 = np.clip(np.log([first[name] for name in names]), lower + 1e-6, upper - 1e-6)
    target = np.log(sample.seconds)
    documented = np.log([parameter.default for parameter in operator.parameters])

    def residual(theta: Array) -> Array:
        values = dict(zip(names, np.exp(theta).tolist(), strict=True))
        return np.log(operator.seconds(sample.features, values, hardware, _WARM)) - target

    def anchored(theta: Array) -> Array:
        # a parameter the data say nothing about stays at its documented default instead of drifting to a bound
        return np.concatenate([residual(theta), _ANCHOR * (theta - documented)])

    result = least_squares(
        anchored, theta0, bounds=(lower, upper), loss="soft_l1", f_scale=_SCALE, x_scale=1.0, max_nfev=60
    )
    values = dict(zip(names, np.exp(result.x).tolist(), strict=True))
    if not errors:
        return values, {}
    return values, _standard_errors(names, result.x, residual, sample.groups, lower, upper)


def _standard_errors(
    names: Sequence[str],
    theta: Array,
    residual: Callable[[Array], Array],
    groups: NDArray[np.intp],
    lower: Array,
    upper: Array,
) -> dict[str, float | None]:
    """Cluster-robust standard errors; None where a parameter sits on a bound or has no effect.

    Sandwich of an M-estimator (Huber and Ronchetti, Robust Statistics, 2nd ed., 2009, sec. 6.3; scores summed by
    group: Liang and Zeger, Biometrika 73, 1986): its bread holds the derivative of the soft-L1 score, which falls
    faster with the residual than the score's own weight.
    """
    r = residual(theta)
    spread = 1.0 + (r / _SCALE) ** 2
    weight, curvature = spread**-0.5, spread**-1.5
    step = 1e-4
    jacobian = np.stack(
        [(residual(theta + step * e) - residual(theta - step * e)) / (2 * step) for e in np.eye(len(theta))], axis=1
    )
    bread = (jacobian * curvature[:, None]).T @ jacobian
    scores = np.zeros((int(groups.max()) + 1, len(theta)))
    np.add.at(scores, groups, jacobian * (weight * r)[:, None])
    free = (theta - lower > 1e-4) & (upper - theta > 1e-4) & (np.diag(bread) > 1e-9)
    errors: dict[str, float | None] = dict.fromkeys(names)
    if not free.any():
        return errors
    inverse = np.linalg.pinv(bread[np.ix_(free, free)])
    clusters = len(scores)
    covariance = inverse @ (scores[:, free].T @ scores[:, free]) @ inverse * clusters / max(1, clusters - 1)
    for i, variance in zip(np.flatnonzero(free).tolist(), np.diag(covariance).tolist(), strict=True):
        errors[names[i]] = float(np.exp(theta[i]) * np.sqrt(max(variance, 0.0)))
    return errors
