"""Statistics of runs and predictions: warm-up, intervals, quantiles of values never listed one by one.

Models: batch means (Law, "Simulation Modeling and Analysis", 5th ed., 2015, sec. 9.5.3); MSER-5 (White, Cobb and
Spratt, "A comparison of five steady-state truncation heuristics for simulation", Winter Simulation Conference 2000).
Left out: sequential stopping rules. Checked in: tests/test_metrics.py against numpy on expanded values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

BATCHES = 20
T_95_19 = 1.7291328
"""95th percentile of Student's t with 19 degrees of freedom, for a two-sided 90 % interval over 20 batches."""
Z_95 = 1.6449
"""95th percentile of the normal distribution, for a two-sided 90 % interval."""

_SORT_AT_ONCE = 1 << 14


def batch_means_interval(values: Array) -> tuple[float, float] | None:
    """90 % interval of a stationary series' mean from 20 consecutive batches; None below two values per batch."""
    size = len(values) // BATCHES
    if size < 2:
        return None
    return mean_interval(values[-size * BATCHES :].reshape(BATCHES, size).mean(axis=1))


def log_normal_interval(value: float, log_sigma: float) -> tuple[float, float]:
    """90 % interval of what ``value`` predicts, the logarithm of their ratio being normal with this spread."""
    factor = math.exp(Z_95 * log_sigma)
    return value / factor, value * factor


def mean_interval(means: Array) -> tuple[float, float]:
    """90 % interval from 20 batches' means, taken as independent and normal."""
    half = T_95_19 * float(means.std(ddof=1)) / BATCHES**0.5
    centre = float(means.mean())
    return centre - half, centre + half


def t_interval(values: Array) -> tuple[float, float]:
    """90 % interval of a mean from independent runs, normal around it; infinite for a single run."""
    n = len(values)
    centre = float(values.mean())
    half = t_95(n - 1) * float(values.std(ddof=1)) / n**0.5 if n > 1 else float("inf")
    return centre - half, centre + half


def t_95(freedom: int) -> float:
    """95th percentile of Student's t: exact for 1 and 2, else an expansion good to 0.1 %.

    Abramowitz and Stegun, "Handbook of Mathematical Functions", 1964, eq. 26.7.5.
    """
    if freedom <= 2:
        return (6.3137515, 2.9199856)[freedom - 1]
    x = 1.6448536
    terms = (
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return x + math.fsum(term / float(freedom) ** (i + 1) for i, term in enumerate(terms))


def mser5(values: Array) -> int:
    """How many leading values (at most half) to drop so that the standard error of the rest, in fives, is least."""
    means = values[: len(values) // 5 * 5].reshape(-1, 5).mean(axis=1)
    n = len(means)
    if n < 4:
        return 0
    left = n - np.arange(n // 2)
    tail_sum = np.cumsum(means[::-1])[::-1][: n // 2]
    tail_squares = np.cumsum(means[::-1] ** 2)[::-1][: n // 2]
    return 5 * int(np.argmin((tail_squares - tail_sum**2 / left) / left**2))


def pooled_quantiles(
    first: Array, growth: Array, steps: Array, weight: Array, probabilities: Sequence[float]
) -> list[float]:
    """Mean, then quantiles, of the values ``first + i * growth``, i < ``steps``, each standing ``weight`` times.

    Exact as if all values were listed and given to `numpy.percentile` (linear), without listing them: the ones around
    an order statistic are closed in on by bisection, and only they are expanded. ``growth`` >= 0.
    All nan if nothing has weight.
    """
    used = (weight > 0) & (steps > 0)
    first, growth, steps, weight = first[used], growth[used], steps[used], weight[used]
    total = float((steps * weight).sum())
    if total == 0:
        return [float("nan")] * (1 + len(probabilities))
    mean = float((weight * (steps * first + growth * (steps * (steps - 1) / 2))).sum()) / total
    answers = [mean]
    for p in probabilities:
        position = p * (total - 1)
        low = _order_statistics(first, growth, steps, weight, float(np.floor(position)))
        answers.append(low[0] + (low[1] - low[0]) * float(position - np.floor(position)))
    return answers


def _order_statistics(first: Array, growth: Array, steps: Array, weight: Array, rank: float) -> tuple[float, float]:
    """The values at positions ``rank`` and ``rank + 1`` (or the last) of the sorted pool, counted from 0."""
    below = 0.0
    low, high = float(first.min()), float((first + growth * (steps - 1)).max())
    above = np.inf  # smallest value known to lie above what is kept
    while steps.sum() > _SORT_AT_ONCE and low < (middle := (low + high) / 2) < high:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            reach = np.where(growth > 0, np.floor((middle - first) / growth) + 1, np.where(first <= middle, steps, 0.0))
        head = np.clip(reach, 0.0, steps)
        count = below + float((head * weight).sum())
        if count > rank:  # drop the values above the middle
            beyond = head < steps
            if beyond.any():
                above = min(above, float((first + growth * head)[beyond].min()))
            steps, high = head, middle
        else:
            first, steps, below, low = first + growth * head, steps - head, count, middle
        kept = steps > 0
        first, growth, steps, weight = first[kept], growth[kept], steps[kept], weight[kept]
    repeats = steps.astype(np.int64)
    start = np.repeat(np.cumsum(repeats) - repeats, repeats)
    values = np.repeat(first, repeats) + np.repeat(growth, repeats) * (np.arange(repeats.sum()) - start)
    weights = np.repeat(weight, repeats)
    order = np.argsort(values)
    values, upto = values[order], below + np.cumsum(weights[order])
    at = int(np.searchsorted(upto, rank, side="right"))
    value = float(values[at])
    if rank + 1 < upto[at]:
        return value, value
    if at + 1 < len(values):
        return value, float(values[at + 1])
    return value, float(above) if np.isfinite(above) else value
