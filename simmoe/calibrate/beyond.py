"""What a fit is worth where it was not made: on another device, and outside the range that was measured.

Two experiments on the measured tables. *Another device*: every fit of one device, its parameters carried over
(`simmoe.costs.borrowing`), predicts the rows of the same kernel on every other. *Outside the range*: every fit is made
again without both ends of one feature's range and predicts the rows left out. What either adds to a fit's own spread is
summed up as the width with which the 90 % interval contains 90 % of such rows, every fit counting the same.
The constants in `simmoe.costs.borrowing` are these figures, rounded. Checked in tests/test_beyond_fit.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simmoe.calibrate.fit import Sample, fit
from simmoe.calibrate.kernels import Plan, plan
from simmoe.costs import borrowing
from simmoe.costs.calibration import Calibration, OperatorFit
from simmoe.costs.calibration import load as load_calibration
from simmoe.costs.operators.base import Operator
from simmoe.errors import CalibrationError
from simmoe.output_analysis import Z_95
from simmoe.specs.load import profile_names

Array = NDArray[np.float64]

_WARM = False  # benchmarks replay one input, see `simmoe.calibrate.fit`
#: Rows looked at per fit, drawn at random: enough for a 90 % quantile.
_ROWS = 300
#: Both ends of a range are cut by this factor, or less where the range is short.
_CUT = 16.0
#: A cut leaves at least this share of the rows to fit.
_KEPT = 0.3


@dataclass(frozen=True, slots=True)
class Beyond:
    """One fit put to rows it does not speak for.

    Attributes
    ----------
    operator, variant : the kernel.
    case : in words: from which device, or which feature's ends were left out.
    kind : how far apart the devices are, or `OUTSIDE`: what is summed up together.
    log_ratio : ln(measured / predicted) of every row, shape (n,). [-]
    distance : factors e outside what was fitted, shape (n,); 1 for another device. [-]
    log_sigma : the fit's own spread. [-]
    """

    operator: str
    variant: str
    device: str
    case: str
    kind: str
    log_ratio: Array
    distance: Array
    log_sigma: float

    @property
    def mean_error_percent(self) -> float:
        """Mean absolute error of the prediction. [%]"""
        return float(100 * np.mean(np.abs(np.exp(-self.log_ratio) - 1)))


OUTSIDE = "outside the range, per factor e"
#: What is summed up together, and the constant that stands for it.
STATED = {**borrowing.BORROWED_LOG_SIGMA, OUTSIDE: borrowing.EXTRAPOLATED_LOG_SIGMA}


def experiments(paths: Sequence[Path], *, done: Callable[[str], None] | None = None) -> list[Beyond]:
    """Both experiments over all tables of shipped devices.

    Raises
    ------
    CalibrationError
        If no table has a fit in a shipped calibration.
    """
    plans, _ = plan(paths)
    shipped = profile_names()
    fits = {entry.device: load_calibration(shipped[entry.device]) for entry in plans if entry.device in shipped}
    found: list[Beyond] = []
    for entry in plans:
        for operator, sample, _ in entry.jobs:
            mine = _same_variant(fits.get(entry.device), operator, sample)
            if mine is None:
                continue
            if done:
                done(f"{entry.device} {operator.name}")
            found += _elsewhere(entry, operator, sample, mine, plans, fits)
            found += _outside(entry, operator, sample, mine)
    if not found:
        raise CalibrationError(f"{' '.join(map(str, paths))}: no table with a fit in a shipped calibration")
    return found


def added_log_sigma(found: Sequence[Beyond]) -> float:
    """Spread per unit of distance that makes 90 % intervals contain 90 % of the rows, fits counting the same. [-]"""

    def inside(added: float) -> float:
        shares = [
            np.mean(np.abs(one.log_ratio) <= Z_95 * np.hypot(one.log_sigma, added * one.distance)) for one in found
        ]
        return float(np.mean(shares))

    low, high = 0.0, 8.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if inside(middle) >= 0.9 else (middle, high)
    return high


def _elsewhere(
    entry: Plan,
    operator: Operator,
    sample: Sample,
    mine: OperatorFit,
    plans: Sequence[Plan],
    fits: dict[str, Calibration],
) -> Iterator[Beyond]:
    rows = sample.take(_drawn(len(sample.seconds)))
    for other in plans:
        theirs = _same_variant(fits.get(other.device), operator, sample) if other is not entry else None
        if theirs is None:
            continue
        values = borrowing.carried_over(operator, theirs, other.hardware, entry.hardware)
        inside = borrowing.beyond(theirs, rows.features) <= 0  # the other experiment is about the rest
        if not inside.any():
            continue
        some = rows.take(np.flatnonzero(inside))
        yield Beyond(
            operator=operator.name,
            variant="/".join(sample.variant.values()),
            device=entry.device,
            case=f"from {other.device}",
            kind=borrowing.kinship(operator.name, other.hardware, entry.hardware),
            log_ratio=np.log(some.seconds / operator.seconds(some.features, values, entry.hardware, _WARM)),
            distance=np.ones(len(some.seconds)),
            log_sigma=mine.log_sigma,
        )


def _outside(entry: Plan, operator: Operator, sample: Sample, mine: OperatorFit) -> Iterator[Beyond]:
    for name in operator.range_features:
        value = sample.features[name]
        low, high = float(value.min()), float(value.max())
        if low <= 0 or high < 4 * low:
            continue
        cut = min(_CUT, (high / low) ** 0.25)
        kept = (value >= low * cut) & (value <= high / cut)
        if kept.mean() < _KEPT or kept.sum() <= 2 * len(operator.parameters) or kept.all():
            continue
        core, ends = np.flatnonzero(kept), np.flatnonzero(~kept)
        values = fit(operator, sample.take(core[_drawn(len(core))]), entry.hardware)
        rows = sample.take(ends[_drawn(len(ends))])
        fitted = (float(value[core].min()), float(value[core].max()))
        distance = np.maximum(np.log(rows.features[name] / fitted[1]), np.log(fitted[0] / rows.features[name]))
        yield Beyond(
            operator=operator.name,
            variant="/".join(sample.variant.values()),
            device=entry.device,
            case=f"{name} below {fitted[0]:.4g} and above {fitted[1]:.4g}",
            kind=OUTSIDE,
            log_ratio=np.log(rows.seconds / operator.seconds(rows.features, values, entry.hardware, _WARM)),
            distance=distance,
            log_sigma=mine.log_sigma,
        )


def _same_variant(calibration: Calibration | None, operator: Operator, sample: Sample) -> OperatorFit | None:
    fits = calibration.of(operator.name) if calibration else ()
    return next((one for one in fits if one.variant == dict(sample.variant)), None)


def _drawn(count: int) -> NDArray[np.intp]:
    """Which of ``count`` rows are looked at: all, or `_ROWS` of them."""
    if count <= _ROWS:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, _ROWS, replace=False))
