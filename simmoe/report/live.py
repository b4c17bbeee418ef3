"""What a person reads of a live validation: the grid, errors beside repeatability, gains."""

from __future__ import annotations

import statistics

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from simmoe.live.figures import QUANTITIES, Cell, LiveOutcome
from simmoe.validation.summary import summarise

_TITLES = {"output_tokens_per_s": "tokens/s", "ttft_mean": "TTFT [ms]", "tpot_mean": "TPOT [ms]"}


def table(outcome: LiveOutcome) -> RenderableType:
    """Measured and predicted, cell by cell; then errors per quantity; then what a lower cap gains."""
    return Group(_grid(outcome), Text(), _errors(outcome), Text(), *_gains(outcome), Text("\n".join(_lines(outcome))))


def _grid(outcome: LiveOutcome) -> Table:
    grid = Table(show_edge=False, pad_edge=False, header_style="bold")
    grid.add_column("load")
    grid.add_column("cap", justify="right")
    for title in _TITLES.values():
        for column in (f"{title}\nmeasured", "\npredicted", "\nerror %"):
            grid.add_column(column, justify="right")
    grid.add_column("steps alone\nerror %", justify="right")
    for cell in outcome.cells:
        load = f"{cell.load} clients" if cell.closed_loop else cell.load
        ratio = 100 * (statistics.median(cell.step_ratios) - 1)
        grid.add_row(load, str(cell.cap), *_figures(cell), f"{ratio:+.1f}")
    return grid


def _figures(cell: Cell) -> list[str]:
    shown = []
    for name, unit in QUANTITIES.values():
        measured, predicted = unit * cell.middle(name), unit * getattr(cell.predicted, name)
        shown += [f"{measured:.4g}", f"{predicted:.4g}", f"{100 * (predicted / measured - 1):+.1f}"]
    return shown


def _errors(outcome: LiveOutcome) -> Table:
    errors = Table(show_edge=False, pad_edge=False, header_style="bold")
    for title in ("group", "quantity"):
        errors.add_column(title)
    for title in ("n", "median\nerror %", "mean\nerror %", "bias %", "inside\n90 % band", "repeatability\nmedian %"):
        errors.add_column(title, justify="right")
    for group in summarise(outcome.comparisons().comparisons):
        again = outcome.repeatability_percent(group.quantity)
        errors.add_row(
            group.group, group.quantity, str(group.n), f"{group.median_ape_percent:.1f}", f"{group.mape_percent:.1f}",
            f"{group.bias_percent:+.1f}", f"{group.inside_90_percent:.0f}", f"{again:.1f}",
        )  # fmt: skip
    return errors


def _gains(outcome: LiveOutcome) -> list[RenderableType]:
    gains = outcome.gains()
    if not gains:
        return []
    shown = Table(show_edge=False, pad_edge=False, header_style="bold")
    shown.add_column("gain in throughput of")
    for title in ("measured %", "predicted %", "repeatability (points)"):
        shown.add_column(title, justify="right")
    for gain in gains:
        cells = (f"{100 * value:+.1f}" for value in (gain.measured, gain.predicted))
        shown.add_row(f"cap {gain.cap}, {gain.load} clients", *cells, f"{100 * gain.noise:.1f}")
    right = sum(gain.measured * gain.predicted > 0 for gain in gains)
    off = 100 * statistics.mean(abs(gain.predicted - gain.measured) for gain in gains)
    nothing = 100 * statistics.mean(abs(gain.measured) for gain in gains)
    said = f"sign right in {right} of {len(gains)}; off by {off:.1f} points on average (no effect: {nothing:.1f})\n"
    return [shown, Text(said)]


def _lines(outcome: LiveOutcome) -> list[str]:
    kind = "wall time" if outcome.timer == "wall" else "the thread's own run time"
    slower = 100 * (outcome.pace - 1)
    fits = ", ".join(f"{name} {value:.0f} %" for name, value in outcome.held_out_percent.items())
    host = f"host {1e6 * outcome.host_s_per_step:.0f} us a step"
    than = f"{abs(slower):.1f} % {'more' if slower >= 0 else 'less'}"
    lines = [
        f"{outcome.model} on {outcome.device}, {kind}, threads {outcome.threads}, {host}; profile in {outcome.folder}",
        f"While serving, one fixed product took {than} than around the profile.",
        f"{outcome.rows} kernel rows; error of the fits on unseen shapes: {fits}",
    ]
    return [*lines, *(f"  - {note}" for note in sorted(outcome.comparisons().notes))]
