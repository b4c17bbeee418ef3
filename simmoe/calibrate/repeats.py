"""How far measurements repeat, where two devices ran the same rows of an operator that cannot tell the devices apart.

Model: ln(one / other) of a row, less the median over rows (clocks, software), is the difference of two independent
errors of one law; so each alone is off by 1 / sqrt(2) of it, on average over both, whatever predicts it. What both
runs did alike (a routing drawn from one seed, buffers laid out alike) does not show, so measurements may repeat worse
than this. Which operators: exchanges over links and multiprocessors that both devices share.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from simmoe.calibrate.fit import Sample
from simmoe.calibrate.kernels import Plan
from simmoe.specs.hardware import Hardware

#: Operators whose time depends on a device by its link and its multiprocessors alone.
OF_LINKS = ("moe_alltoall",)
#: Rows that must have a twin before their differences are told.
_ENOUGH = 20

Key = tuple[str, str, tuple[str, ...]]


def repeat_errors(plans: Sequence[Plan]) -> dict[Key, float]:
    """Mean error of one measurement by (device, operator, variant); those without a twin are absent. [%]"""
    found: dict[Key, float] = {}
    for one in plans:
        for other in plans:
            if other is one or not _alike(one.hardware, other.hardware):
                continue
            for operator, sample, _ in one.jobs:
                twins = [s for o, s, _ in other.jobs if o.name == operator.name and s.variant == sample.variant]
                if operator.name in OF_LINKS and twins:
                    error = repeat_error_percent(sample, twins[0])
                    if error is not None:
                        found[one.device, operator.name, tuple(sample.variant.values())] = error
    return found


def repeat_error_percent(one: Sample, other: Sample) -> float | None:
    """Mean error of one measurement of a row that both samples hold; None where fewer than 20 do. [%]"""
    seconds = dict(zip(_rows(other), other.seconds.tolist(), strict=True))
    pairs = [(mine, seconds[row]) for row, mine in zip(_rows(one), one.seconds.tolist(), strict=True) if row in seconds]
    if len(pairs) < _ENOUGH:
        return None
    ratio = np.diff(np.log(pairs), axis=1)
    return float(100 * np.mean(np.abs(ratio - np.median(ratio))) / np.sqrt(2.0))


def _rows(sample: Sample) -> list[tuple[float, ...]]:
    columns = np.stack([sample.features[name] for name in sorted(sample.features)], axis=1)
    return [tuple(row) for row in columns.tolist()]


def _alike(one: Hardware, other: Hardware) -> bool:
    return (one.scale_up, one.device.sms) == (other.scale_up, other.device.sms)
