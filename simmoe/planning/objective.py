"""What a service promises: limits on percentiles of TTFT, TPOT, ITL and end-to-end time.

Left out: goodput (a share of requests meeting all limits at once); `simmoe.metrics` has it for simulated runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from simmoe import units
from simmoe.errors import SpecError
from simmoe.metrics import ServingMetrics

METRICS = ("ttft", "tpot", "itl", "e2e")
STATISTICS = ("mean", "p50", "p90", "p99")


@dataclass(frozen=True, slots=True)
class Limit:
    """One promise: a statistic of a latency stays at or below so many seconds.

    Raises
    ------
    SpecError
        If the latency or the statistic is not known, or the limit is not positive.
    """

    metric: str
    statistic: str
    seconds: float

    def __post_init__(self) -> None:
        if self.metric not in METRICS or self.statistic not in STATISTICS:
            raise SpecError(
                f"limit {self.metric} {self.statistic}: give one of {', '.join(METRICS)} and one of "
                f"{', '.join(STATISTICS)}"
            )
        if not 0 < self.seconds < math.inf:
            raise SpecError(f"limit {self.metric} {self.statistic}: {self.seconds:g} s must be above 0 and finite")

    def of(self, metrics: ServingMetrics) -> float:
        """The latency it limits. [s]"""
        return float(getattr(getattr(metrics, self.metric), self.statistic))

    def __str__(self) -> str:
        return f"{self.metric.upper()} {self.statistic} {units.text(self.seconds, 's')}"


def limits_from(texts: Mapping[str, str | float | None]) -> tuple[Limit, ...]:
    """Limits from names and times, as texts with units or in seconds: ``{"ttft-p99": "2s", "tpot-p99": 0.05}``.

    None is no promise.

    Raises
    ------
    SpecError
        Naming the flag whose text is not a time.
    """
    found = []
    for name, text in texts.items():
        if text is None:
            continue
        metric, _, statistic = name.partition("-")
        try:
            found.append(Limit(metric, statistic, units.quantity(text, "second", bare_numbers=True)))
        except SpecError as problem:
            raise SpecError(f"--{name}: {problem}") from None
    return tuple(found)


def held(limits: Sequence[Limit], metrics: ServingMetrics) -> bool:
    """Whether every limit holds."""
    return all(limit.of(metrics) <= limit.seconds for limit in limits)
