"""Figures of a served run and of a simulated one over the same window, and how far apart they are.

Throughput counts tokens when they are made inside the window, so requests cut by its edges do not bias it. TTFT is of
requests that arrive and get their first token inside, TPOT of those that get their first and last token inside; both
sides are cut alike. The error of a figure is predicted / measured - 1, measured being the median over repeats;
repeatability is the largest minus the smallest of the repeats over their mean.
Left out: intervals of the figures. Checked in tests/test_live_validation.py.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from simmoe.engine.step import StepTable
from simmoe.metrics import RequestTable, StepLog
from simmoe.output_analysis import log_normal_interval
from simmoe.specs.workload import Workload
from simmoe.validation import summary
from simmoe.validation.summary import Comparison, Outcome

#: Quantities as `simmoe validate` names them, and the factor from SI to the unit it states them in.
QUANTITIES = {
    "output_tokens_per_s": ("output_tokens_per_s", 1.0),
    "ttft_mean": ("ttft_mean_s", 1e3),
    "tpot_mean": ("tpot_mean_s", 1e3),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One run's figures; nan where no request falls inside the window. [tokens/s], [s]"""

    output_tokens_per_s: float
    ttft_mean_s: float
    tpot_mean_s: float


@dataclass(kw_only=True)
class Cell:
    """One cap under one load: predicted once, measured as often as it was served.

    Attributes
    ----------
    load : as in the table: clients ("8"), or requests per second ("2.5/s").
    closed_form : of the steady state; None where it saturates.
    log_sigma : spread of ln(measured / predicted) of the mean step. [-]
    step_ratios : per repeat, predicted over measured time of the steps that were really served. [-]
    """

    cap: int
    load: str
    closed_loop: bool
    workload: Workload
    table: StepTable
    predicted: Figures
    closed_form: Figures | None
    log_sigma: float
    notes: tuple[str, ...] = ()
    measured: list[Figures] = field(default_factory=list)
    step_ratios: list[float] = field(default_factory=list)

    def middle(self, name: str) -> float:
        """Median of a figure over the repeats: one that the machine stalled in does not decide, given three."""
        return statistics.median(self._each(name))

    def repeatability(self, name: str) -> float:
        """Largest minus smallest of the repeats, over their mean. [-]"""
        values = self._each(name)
        return (max(values) - min(values)) / statistics.mean(values)

    def _each(self, name: str) -> list[float]:
        return [float(getattr(figures, name)) for figures in self.measured]


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveGain:
    """What a cap does to throughput in a closed loop, against the largest cap; ``noise``: repeatability of it. [-]"""

    cap: int
    load: str
    measured: float
    predicted: float
    noise: float


@dataclass(kw_only=True)
class LiveOutcome:
    """A whole grid, predicted and measured.

    Attributes
    ----------
    pace : time of one fixed product while serving over that while profiling: above 1, the machine had become slower.
    held_out_percent : operator -> mean error of its fit on shapes it never saw.
    rows : kernel rows fitted.
    """

    model: str
    device: str
    timer: str
    threads: int
    cells: list[Cell]
    host_s_per_step: float
    pace: float
    held_out_percent: dict[str, float]
    rows: int
    folder: Path
    settings: dict[str, Any]

    @property
    def group(self) -> str:
        """Group of the comparisons."""
        return f"live/{self.model}/{self.device}/torch"

    def repeatability_percent(self, quantity: str) -> float:
        """Median over the cells of the repeatability of a quantity; nan if no cell has it. [%]"""
        each = [cell.repeatability(QUANTITIES[quantity][0]) for cell in self.cells]
        finite = [value for value in each if math.isfinite(value)]
        return 100 * statistics.median(finite) if finite else math.nan

    def comparisons(self) -> Outcome:
        """As `simmoe validate` sums them up: the simulation, and the closed form as a group of its own."""
        outcome = Outcome()
        for row, cell in enumerate(self.cells, start=1):
            source = f"cap{cell.cap}-load{cell.load}"
            for group, figures in ((self.group, cell.predicted), (f"{self.group}/closed form", cell.closed_form)):
                if figures is None:
                    outcome.skip("closed form: the offered rate saturates the prediction")
                    continue
                for quantity, (name, unit) in QUANTITIES.items():
                    measured, predicted = unit * cell.middle(name), unit * getattr(figures, name)
                    if not math.isfinite(measured + predicted):
                        outcome.skip(f"{quantity}: no request inside the window")
                        continue
                    band = log_normal_interval(predicted, cell.log_sigma)
                    outcome.comparisons.append(
                        Comparison(group, "live", row, source, quantity, measured, predicted, *band)
                    )
            outcome.notes |= dict.fromkeys(cell.notes)
        return outcome

    def gains(self) -> list[LiveGain]:
        """Gain in throughput of every lower cap at every closed loop."""
        return list(self._gains())

    def _gains(self) -> Iterator[LiveGain]:
        name = "output_tokens_per_s"
        for load in dict.fromkeys(cell.load for cell in self.cells if cell.closed_loop):
            native, *lower = sorted((c for c in self.cells if c.load == load), key=lambda c: -c.cap)
            for cell in lower:
                each = [
                    getattr(one, name) / getattr(base, name) - 1
                    for one, base in zip(cell.measured, native.measured, strict=True)
                ]
                yield LiveGain(
                    cap=cell.cap,
                    load=load,
                    measured=cell.middle(name) / native.middle(name) - 1,
                    predicted=getattr(cell.predicted, name) / getattr(native.predicted, name) - 1,
                    noise=max(each) - min(each),
                )


def figures_of(requests: RequestTable, steps: StepLog, begin_s: float, end_s: float) -> Figures:
    """Figures of a run between two moments on its clock. [s]"""
    duration = steps.duration_s
    inside = np.minimum(steps.start_s + duration, end_s) - np.maximum(steps.start_s, begin_s)
    share = np.clip(inside / duration, 0.0, 1.0)
    tokens = float(((steps.decodes * steps.steps + steps.sampled) * share).sum())
    answered = (requests.arrival_s >= begin_s) & (requests.first_token_s <= end_s)
    finished = (requests.first_token_s >= begin_s) & (requests.finished_s <= end_s) & (requests.output_tokens > 1)
    return Figures(
        output_tokens_per_s=tokens / (end_s - begin_s),
        ttft_mean_s=_mean(requests.ttft_s[answered]),
        tpot_mean_s=_mean(requests.tpot_s[finished]),
    )


def _mean(values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    return float(values.mean()) if len(values) else math.nan


def to_json(outcome: LiveOutcome) -> dict[str, Any]:
    """Groups as `simmoe validate` gives them, and what is particular to a live run under ``live``."""
    gains = outcome.gains()
    live = {
        "model": outcome.model,
        "device": outcome.device,
        "timer": outcome.timer,
        "threads": outcome.threads,
        "settings": outcome.settings,
        "host_us_per_step": _round(1e6 * outcome.host_s_per_step),
        "pace": _round(outcome.pace),
        "kernel_rows": outcome.rows,
        "held_out_mape_percent": {name: _round(value) for name, value in outcome.held_out_percent.items()},
        "cells": [_cell(cell) for cell in outcome.cells],
        "repeatability_percent": {quantity: _round(outcome.repeatability_percent(quantity)) for quantity in QUANTITIES},
        "gains": [{f.name: _round(getattr(gain, f.name)) for f in fields(LiveGain)} for gain in gains],
        "gain_signs_right": sum(gain.measured * gain.predicted > 0 for gain in gains),
        "gain_mean_abs_error_points": _round(100 * _average([abs(g.predicted - g.measured) for g in gains])),
        "gain_no_effect_points": _round(100 * _average([abs(g.measured) for g in gains])),
    }
    return summary.to_json(outcome.comparisons()) | {"live": live}


def _cell(cell: Cell) -> dict[str, Any]:
    found: dict[str, Any] = {"cap": cell.cap, "load": cell.load, "step_time_ratio": _each(cell.step_ratios)}
    for quantity, (name, unit) in QUANTITIES.items():
        found[quantity] = {
            "measured": _each([unit * getattr(figures, name) for figures in cell.measured]),
            "predicted": _round(unit * getattr(cell.predicted, name)),
            "closed_form": _round(unit * getattr(cell.closed_form, name)) if cell.closed_form else None,
        }
    return found


def _each(values: Sequence[float]) -> list[Any]:
    return [_round(value) for value in values]


def _average(values: Sequence[float]) -> float:
    return statistics.mean(values) if values else math.nan


def _round(value: Any) -> Any:
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.5g}")
    return value
