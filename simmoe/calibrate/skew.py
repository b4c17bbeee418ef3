"""Uneven routing in the measured expert kernels: as well predicted as even routing, and what a cap gains under it.

Every row is predicted by a fit that never saw its shape group (grouped folds, as `simmoe calibrate --report`). A cell
of the gains is one shape, layout, routing and token count that was measured with eight and with six experts a token.
One token wakes its top-k whatever the law of popularity: a series that takes over 1.5 times its twin's time there was
measured in another state of the machine, and is also shown apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.table import Table as Lines
from rich.text import Text

from simmoe.calibrate.fit import held_out, pseudo_residuals, samples
from simmoe.costs.operators.experts import MOE
from simmoe.costs.operators.registry import measured_device, operator_of
from simmoe.errors import MeasurementError
from simmoe.specs.measurement import Table, read_table, table_paths

#: What must agree for two rows to differ in their cap alone.
_CELL = ("framework", "kernel_source", "dtype", "hidden_size", "expert_inter_size", "num_experts", "moe_tp_size",
         "moe_ep_size", "routing_distribution", "num_tokens")  # fmt: skip
_NATIVE, _CAP = 8.0, 6.0
#: What must agree for two series to differ in their routing alone.
_TWINS = ("framework", "version", "kernel_source", "dtype", "hidden_size", "expert_inter_size", "num_experts", "top_k",
          "gated", "moe_tp_size", "moe_ep_size")  # fmt: skip
_ODD = 1.5


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Mean absolute error of unseen shapes by how tokens were routed; None where no row was. [%]"""

    device: str
    variant: str
    balanced_rows: int
    balanced_percent: float | None
    power_law_rows: int
    power_law_percent: float | None
    power_law_expert_parallel_percent: float | None
    odd_rows: int
    balanced_without_odd_percent: float | None
    power_law_without_odd_percent: float | None


@dataclass(frozen=True, kw_only=True)
class CapGain:
    """Speed gained by six experts a token over eight [%]; mean absolute error of its cells [points].

    ``scatter_points``: what cells of neighbouring token counts leave to any gain smooth in tokens; None without any.
    """

    device: str
    where: str
    cells: int
    measured_percent: float
    predicted_percent: float
    error_points: float
    no_effect_points: float
    scatter_points: float | None


def compare(paths: Sequence[Path], folds: int = 3) -> tuple[list[Errors], list[CapGain]]:
    """Errors by routing and gains of a cap, for every table of expert kernels.

    Raises
    ------
    MeasurementError
        If no table of expert kernels is among ``paths``.
    """
    errors: list[Errors] = []
    gains: list[CapGain] = []
    for path in table_paths(paths):
        table = read_table(path)
        device = measured_device(path, None)
        if operator_of(table) is not MOE or device is None or "routing_distribution" not in table.columns:
            continue
        law = np.asarray(table.text("routing_distribution"), dtype=str)
        parallel = table.number("moe_ep_size") > 1
        odd = odd_series(table)
        predicted = np.full(table.rows, np.nan)
        measured = table.number("latency_us") * 1e-6
        for sample in samples(MOE, table):
            if len(sample.seconds) <= len(MOE.parameters) + 2:
                continue
            predicted[sample.rows] = held_out(MOE, sample, device.hardware, MOE.defaults, folds)
            error = 100 * np.abs(predicted[sample.rows] / sample.seconds - 1)
            usual = ~odd[sample.rows]
            even, skewed = (np.char.startswith(law[sample.rows], prefix) for prefix in ("balanced", "power_law"))
            errors.append(
                Errors(
                    device=device.label,
                    variant="/".join(sample.variant.values()),
                    balanced_rows=int(even.sum()),
                    balanced_percent=_mean(error[even]),
                    power_law_rows=int(skewed.sum()),
                    power_law_percent=_mean(error[skewed]),
                    power_law_expert_parallel_percent=_mean(error[skewed & parallel[sample.rows]]),
                    odd_rows=int((~usual).sum()),
                    balanced_without_odd_percent=_mean(error[even & usual]),
                    power_law_without_odd_percent=_mean(error[skewed & usual]),
                )
            )
        gains += _gains(device.label, table, measured, predicted, np.char.startswith(law, "power_law"), parallel)
    if not errors:
        raise MeasurementError(f"validate skew {' '.join(map(str, paths))}: no table of expert kernels")
    return errors, gains


def odd_series(table: Table) -> NDArray[np.bool_]:
    """Rows of series that take over 1.5 times the time of their fastest twin at one token, where routing is the same.

    A twin is the same shape and layout under another law of routing. Expert-parallel series have none: which experts
    of the rank measured one token wakes differs by law.
    """
    names = [table.text(name).tolist() for name in _TWINS if name in table.columns]
    twins = list(zip(*names, strict=True))
    series = list(zip(twins, table.text("routing_distribution").tolist(), strict=True))
    tokens, latency = table.number("num_tokens"), table.number("latency_us")
    alone = (tokens == 1) & (table.number("moe_ep_size") == 1)
    first = {series[row]: float(latency[row]) for row in np.flatnonzero(alone)}
    fastest: dict[tuple[str, ...], float] = {}
    for (twin, _), time in first.items():
        fastest[twin] = min(fastest.get(twin, time), time)
    return np.array([first.get(key, 0.0) > _ODD * fastest.get(key[0], np.inf) for key in series], dtype=np.bool_)


def _gains(
    device: str,
    table: Table,
    measured: NDArray[np.float64],
    predicted: NDArray[np.float64],
    skewed: NDArray[np.bool_],
    parallel: NDArray[np.bool_],
) -> Iterator[CapGain]:
    top_k = table.number("top_k")
    keys = zip(*(table.text(name).tolist() for name in _CELL), strict=True)
    cells: dict[tuple[str, ...], dict[float, int]] = {}
    for row, key in enumerate(keys):
        if np.isfinite(predicted[row]):
            cells.setdefault(key, {})[float(top_k[row])] = row
    pairs = np.array([(c[_NATIVE], c[_CAP]) for c in cells.values() if _NATIVE in c and _CAP in c], dtype=np.intp)
    if not len(pairs):
        return
    seen, ours = (100 * (time[pairs[:, 0]] / time[pairs[:, 1]] - 1) for time in (measured, predicted))
    first = pairs[:, 0]
    scatter = _scatter(table, first, seen)
    for where, kept in (
        ("all rows", np.ones(len(pairs), dtype=bool)),
        ("power law", skewed[first]),
        ("expert parallel", parallel[first]),
        ("power law, expert parallel", skewed[first] & parallel[first]),
    ):
        if kept.any():
            yield CapGain(
                device=device,
                where=where,
                cells=int(kept.sum()),
                measured_percent=float(seen[kept].mean()),
                predicted_percent=float(ours[kept].mean()),
                error_points=float(np.abs(ours - seen)[kept].mean()),
                no_effect_points=float(np.abs(seen[kept]).mean()),
                scatter_points=_mean(scatter[kept & np.isfinite(scatter)]),
            )


def _scatter(table: Table, first: NDArray[np.intp], seen: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scatter of each cell's gain against those of the next fewer and more tokens; NaN at a series' ends. [points]"""
    series: dict[tuple[str, ...], list[int]] = {}
    for cell, key in enumerate(zip(*(table.text(name)[first].tolist() for name in _CELL[:-1]), strict=True)):
        series.setdefault(key, []).append(cell)
    place = np.log(table.number("num_tokens")[first])
    found = np.full(len(first), np.nan)
    for cells in series.values():
        order = np.array(cells)[np.argsort(place[cells], kind="stable")]
        if len(order) > 2:
            found[order[1:-1]] = pseudo_residuals(place[order], seen[order])
    return found


def _mean(values: NDArray[np.float64]) -> float | None:
    return float(values.mean()) if values.size else None


def to_json(errors: Sequence[Errors], gains: Sequence[CapGain]) -> dict[str, Any]:
    """Both tables as plain data."""
    return {"errors": [asdict(one) for one in errors], "gains_8_to_6": [asdict(one) for one in gains]}


def show_table(errors: Sequence[Errors], gains: Sequence[CapGain]) -> RenderableType:
    """Both tables as text."""
    first = Lines(title="Expert kernels, unseen shapes: mean error by routing", title_justify="left", show_edge=False)
    for name in ("device", "variant"):
        first.add_column(name)
    for name in (
        "rows\nbalanced", "error\n%", "rows\npower law", "error\n%", "of these,\nEP, %",
        "odd\nrows", "without:\nbalanced", "power\nlaw, %",
    ):  # fmt: skip
        first.add_column(name, justify="right")
    for one in errors:
        first.add_row(
            one.device, one.variant, str(one.balanced_rows), _text(one.balanced_percent), str(one.power_law_rows),
            _text(one.power_law_percent), _text(one.power_law_expert_parallel_percent), str(one.odd_rows),
            _text(one.balanced_without_odd_percent), _text(one.power_law_without_odd_percent),
        )  # fmt: skip
    second = Lines(title="Gain of six experts a token over eight", title_justify="left", show_edge=False)
    for name in ("device", "where"):
        second.add_column(name)
    for name in ("cells", "measured\n%", "predicted\n%", "error\npoints", '"no effect"\npoints', "scatter\npoints"):
        second.add_column(name, justify="right")
    for gain in gains:
        figures = (gain.measured_percent, gain.predicted_percent, gain.error_points, gain.no_effect_points)
        shown = (*(f"{value:.1f}" for value in figures), _text(gain.scatter_points))
        second.add_row(gain.device, gain.where, str(gain.cells), *shown)
    return Group(first, Text(""), second)


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
