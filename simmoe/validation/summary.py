"""One compared figure, groups of them, and how far off each group is.

Error of a figure: predicted / measured - 1. Per group: mean (MAPE), median and 90th percentile of its absolute
value, bias (its mean, signed), and the share of measurements inside the 90 % interval.
"""

from __future__ import annotations

import csv
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

#: Quantity of kernel rows.
KERNEL_QUANTITY = "latency_us"


@dataclass(frozen=True, slots=True)
class Comparison:
    """A measured figure and its prediction, both in the unit the file states, with a 90 % interval."""

    group: str
    file: str
    row: int
    source_id: str
    quantity: str
    measured: float
    predicted: float
    lower: float
    upper: float

    @property
    def error(self) -> float:
        """Relative error, predicted / measured - 1. [-]"""
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class ListedRow:
    """One listed row: its figure of each kind there is, or why there is none."""

    file: str
    source_id: str
    figures: dict[str, Comparison]
    reason: str | None


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """A predicted time in parts, and how uncertain each is.

    Attributes
    ----------
    what : the time explained, e.g. "mean step".
    parts_s : part -> predicted seconds; they add up to about ``total_s``. [s]
    log_sigma : part -> spread of ln(measured / predicted). [-]
    """

    what: str
    total_s: float
    parts_s: Mapping[str, float]
    log_sigma: Mapping[str, float]


#: From a figure's place in its file, (row, quantity, predicted value), to the parts of the time behind it.
Explainer = Callable[[int, str, float], Explanation | None]


@dataclass
class Outcome:
    """Everything compared, and everything that could not be, with the reason; how to take a file's figures apart."""

    comparisons: list[Comparison] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    notes: dict[str, None] = field(default_factory=dict)
    explainers: dict[str, Explainer] = field(default_factory=dict)
    skipped_rows: dict[str, str] = field(default_factory=dict)
    """Source id of a run that was not predicted to the reason."""
    lists: dict[str, list[ListedRow]] = field(default_factory=dict)
    """Name of a list of rows (`simmoe.validation.serving.listed`) to what became of them."""

    def skip(self, reason: str, count: int = 1, row: str = "") -> None:
        """Count rows that were not predicted; ``row``: the source id of the one meant."""
        if count:
            self.skipped[reason] += count
        if row:
            self.skipped_rows[row] = reason

    def extend(self, other: Outcome) -> None:
        """Take over another outcome's results."""
        self.comparisons += other.comparisons
        self.skipped += other.skipped
        self.notes |= other.notes
        self.explainers |= other.explainers
        self.skipped_rows |= other.skipped_rows
        self.lists |= other.lists


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupError:
    """Errors of one group and quantity, in percent."""

    group: str
    quantity: str
    n: int
    mape_percent: float
    median_ape_percent: float
    p90_ape_percent: float
    bias_percent: float
    inside_90_percent: float


def summarise(comparisons: Iterable[Comparison]) -> list[GroupError]:
    """Errors per (group, quantity), in alphabetical order."""
    grouped: dict[tuple[str, str], list[Comparison]] = defaultdict(list)
    for comparison in comparisons:
        grouped[comparison.group, comparison.quantity].append(comparison)
    return [_errors(group, quantity, members) for (group, quantity), members in sorted(grouped.items())]


def _errors(group: str, quantity: str, members: list[Comparison]) -> GroupError:
    measured = np.array([c.measured for c in members])
    error = 100 * (np.array([c.predicted for c in members]) / measured - 1)
    lower, upper = np.array([c.lower for c in members]), np.array([c.upper for c in members])
    return GroupError(
        group=group,
        quantity=quantity,
        n=len(members),
        mape_percent=float(np.mean(np.abs(error))),
        median_ape_percent=float(np.median(np.abs(error))),
        p90_ape_percent=float(np.quantile(np.abs(error), 0.9)),
        bias_percent=float(np.mean(error)),
        inside_90_percent=float(100 * np.mean((measured >= lower) & (measured <= upper))),
    )


def to_json(outcome: Outcome) -> dict[str, Any]:
    """Groups and skipped rows as plain data."""
    groups = [
        {name: _plain(getattr(group, name)) for name in GroupError.__slots__}
        for group in summarise(outcome.comparisons)
    ]
    return {
        "groups": groups,
        "skipped": [{"reason": reason, "n": n} for reason, n in outcome.skipped.most_common()],
    }


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return None if math.isnan(value) else round(value, 4)
    return value


def write_rows(outcome: Outcome, path: Path) -> None:
    """One CSV line per compared figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "row", "source_id", "quantity", "measured", "predicted", "lower", "upper"])
        for c in outcome.comparisons:
            values = [f"{value:.6g}" for value in (c.measured, c.predicted, c.lower, c.upper)]
            writer.writerow([c.file, c.row, c.source_id, c.quantity, *values])
