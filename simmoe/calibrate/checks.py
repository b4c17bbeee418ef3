"""What a fit's reader should know: parameters the data do not pin down, rows out of line, ranges not covered.

Every check looks at the rows that were fitted, with the operator's own model. Left out: whether the model is right;
that is what held-out shapes tell (`simmoe.calibrate.fit`). Checked in tests/test_kernel_calibration.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from simmoe.calibrate.fit import Sample
from simmoe.costs.calibration import OperatorFit
from simmoe.costs.operators.base import Array, Operator
from simmoe.specs.hardware import Hardware

#: A row this many robust spreads from the fit is out of line. [-]
OUTLIER_SIGMAS = 3.5
#: ... and off by at least this share: on very tight data a few spreads are nothing. [-]
OUTLIER_SHARE = 0.2
#: Estimates correlated more closely than this are known only together. [-]
CORRELATED = 0.98
_NAMED_ROWS = 3
#: Feature -> what it counts, and what the smallest and largest measured value should reach at least. Assumption:
#: decode of a few requests to a full prefill chunk, one block of cache to a long context, latency to bandwidth bound.
_RANGES = {
    "tokens": ("tokens", 8.0, 1024.0),
    "m": ("rows", 8.0, 1024.0),
    "batch": ("batch", 4.0, 64.0),
    "context_tokens": ("context tokens", 512.0, 8192.0),
    "message_bytes": ("message bytes", 65536.0, 16e6),
}
_FEW_GROUPS = 5


def check(operator: Operator, sample: Sample, hardware: Hardware, fit: OperatorFit) -> list[str]:
    """All findings on one fit, a line each."""
    return [
        *unidentified(operator, sample, hardware, fit),
        *outliers(operator, sample, hardware, fit),
        *gaps(operator, sample),
    ]


def unidentified(operator: Operator, sample: Sample, hardware: Hardware, fit: OperatorFit) -> list[str]:
    """Parameters at a bound, without effect, less certain than large, or known only together."""
    at_bound, idle, vague, free = [], [], [], []
    jacobian = _jacobian(operator, sample, hardware, fit.values())
    effect = np.sqrt((jacobian**2).mean(axis=0))
    for i, parameter in enumerate(operator.parameters):
        fitted = fit.parameters[parameter.name]
        position = np.log(fitted.value)
        if effect[i] < 1e-4:  # moving it by a factor e moves no time by 0.01 %
            idle.append(parameter.name)
        elif min(position - np.log(parameter.lower), np.log(parameter.upper) - position) < 1e-3:
            at_bound.append(f"{parameter.name} = {fitted.value:.3g}")
        elif fitted.standard_error is None or fitted.standard_error > abs(fitted.value):
            vague.append(parameter.name)
        else:
            free.append(i)
    lines = []
    if idle:
        lines.append(f"without effect on these rows, left near the documented default: {', '.join(idle)}")
    if at_bound:
        lines.append(f"at the bound of what is physical: {', '.join(at_bound)}")
    if vague:
        lines.append(f"not identified, standard error above the value: {', '.join(vague)}")
    pairs = _correlated(jacobian[:, free])
    if pairs:
        names = [operator.parameters[i].name for i in free]
        said = ", ".join(f"{names[i]} with {names[j]} ({value:+.2f})" for i, j, value in pairs)
        lines.append(f"known only together (correlation of the estimates): {said}")
    return lines


def outliers(operator: Operator, sample: Sample, hardware: Hardware, fit: OperatorFit) -> list[str]:
    """Rows far from the fit, counted, with the worst named by their line in the file."""
    ratio = np.log(sample.seconds / operator.seconds(sample.features, fit.values(), hardware, False))  # noqa: FBT003
    off = ratio - np.median(ratio)
    spread = 1.4826 * float(np.median(np.abs(off)))  # of a normal distribution with this median deviation
    far = np.flatnonzero((np.abs(off) > OUTLIER_SIGMAS * spread) & (np.abs(np.expm1(np.abs(off))) > OUTLIER_SHARE))
    if not len(far):
        return []
    worst = far[np.argsort(-np.abs(off[far]))][:_NAMED_ROWS]
    named = ", ".join(f"line {sample.rows[i] + 2} takes {np.exp(ratio[i]):.2f} x the fit" for i in worst)
    share = 100 * len(far) / len(off)
    return [f"{len(far)} of {len(off)} rows ({share:.1f} %) beyond {OUTLIER_SIGMAS} robust spreads: {named}"]


def gaps(operator: Operator, sample: Sample) -> list[str]:
    """Small or large sizes that were not measured, and too few shapes to judge new ones by."""
    lines = []
    for name in operator.range_features:
        if name not in _RANGES:
            continue
        label, small, large = _RANGES[name]
        values = sample.features[name]
        low, high = float(np.min(values)), float(np.max(values))
        missing = [word for word, absent in (("small", low > small), ("large", high < large)) if absent]
        if missing:
            decades = np.log10(high / low) if low > 0 else np.inf
            lines.append(f"no {' or '.join(missing)} {label}: measured {low:g} to {high:g} ({decades:.1f} decades)")
    groups = int(sample.groups.max()) + 1
    if groups == 1:
        lines.append("only 1 shape: the errors shown for unseen shapes are those of the fitted rows")
    elif groups < _FEW_GROUPS:
        lines.append(f"only {groups} shapes: errors on unseen shapes are poorly known")
    return lines


def _jacobian(operator: Operator, sample: Sample, hardware: Hardware, values: Mapping[str, float]) -> Array:
    """Change of ln(seconds) with ln(parameter), shape (rows, parameters)."""
    step = 1e-3
    columns = []
    for parameter in operator.parameters:
        up, down = ({**values, parameter.name: values[parameter.name] * np.exp(s)} for s in (step, -step))
        high, low = (operator.seconds(sample.features, v, hardware, False) for v in (up, down))  # noqa: FBT003
        columns.append(np.log(high / low) / (2 * step))
    return np.stack(columns, axis=1)


def _correlated(jacobian: Array) -> list[tuple[int, int, float]]:
    """Pairs of columns whose estimates are correlated beyond CORRELATED."""
    if jacobian.shape[1] < 2:
        return []
    covariance = np.linalg.pinv(jacobian.T @ jacobian, hermitian=True)
    spread = np.sqrt(np.clip(np.diag(covariance), 1e-300, None))
    correlation = covariance / np.outer(spread, spread)
    upper = np.argwhere(np.triu(np.abs(correlation) > CORRELATED, k=1))
    return [(int(i), int(j), float(correlation[i, j])) for i, j in upper]
