"""Fits for people and scripts: held-out errors beside the plain roofline's, by operator, device, framework, dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from simmoe.calibrate.beyond import OUTSIDE, STATED, Beyond, added_log_sigma
from simmoe.calibrate.kernels import warnings
from simmoe.costs.calibration import Calibration

#: Mean error on unseen shapes that the project asks of an operator's tables. [%]
GOAL_PERCENT = {"moe_alltoall": 12.0}

#: By device, operator and variant, as `calibrate.repeats` finds it. [%]
Repeats = Mapping[tuple[str, str, tuple[str, ...]], float]


def table(calibrations: Mapping[str, Calibration], left_out: Sequence[str], repeats: Repeats) -> RenderableType:
    """One line per fit, then warnings, which goals hold, and what was left out."""
    parts: list[RenderableType] = []
    for device, calibration in calibrations.items():
        lines = Table(title=f"{device} ({calibration.device})", title_justify="left", show_edge=False, pad_edge=False)
        lines.add_column("operator")
        lines.add_column("variant")
        for name in ("rows", "shape\ngroups", "roofline\nmean %", "fitted rows\nmean %", "unseen shapes\nmean %",
                     "median %", "p90 %", "inside\n90 % band", "scatter\nof rows %"):  # fmt: skip
            lines.add_column(name, justify="right")
        for fit in sorted(calibration.fits, key=lambda fit: (fit.operator, tuple(fit.variant.values()))):
            figures = (
                fit.roofline_mape_percent,
                fit.in_sample_mape_percent,
                fit.held_out_mape_percent,
                fit.held_out_median_ape_percent,
                fit.held_out_p90_ape_percent,
                fit.inside_90_percent or float("nan"),
                *(() if fit.scatter_percent is None else (fit.scatter_percent,)),
            )
            variant = "/".join(fit.variant.values())
            lines.add_row(fit.operator, variant, str(fit.rows), str(fit.groups), *(f"{value:.1f}" for value in figures))
        parts += [lines, Text("")]
        said = warnings(calibration)
        if said:
            parts.append(Text("Warnings:"))
            for label, lines_said in said.items():
                parts.append(Text(f"  {label}"))
                parts += [Padding(Text(f"- {line}"), (0, 0, 0, 4)) for line in lines_said]
            parts.append(Text(""))
    parts += _goals_table(goals(calibrations, repeats))
    if left_out:
        parts.append(Text("Left out:\n" + "\n".join(f"  - {line}" for line in left_out)))
    return Group(*parts)


def goals(calibrations: Mapping[str, Calibration], repeats: Repeats) -> list[dict[str, Any]]:
    """Each table of an operator with a goal: the mean over all its rows, which is judged, and that of each series.

    ``repeat_percent`` is the mean error of one measurement itself, where a like device repeated it (`Repeats`).
    """
    found: list[dict[str, Any]] = []
    for device, calibration in calibrations.items():
        for operator, goal in GOAL_PERCENT.items():
            fits = [fit for fit in calibration.fits if fit.operator == operator]
            for source in sorted({fit.source for fit in fits}):
                of_table = [fit for fit in fits if fit.source == source]
                rows = sum(fit.rows for fit in of_table)
                mean = sum(fit.rows * fit.held_out_mape_percent for fit in of_table) / rows
                series = [
                    {
                        "series": "/".join(fit.variant.values()),
                        "rows": fit.rows,
                        "unseen_mape_percent": fit.held_out_mape_percent,
                        "holds": fit.held_out_mape_percent <= goal,
                        "scatter_percent": fit.scatter_percent,
                        "repeat_percent": repeats.get((device, operator, tuple(fit.variant.values()))),
                    }
                    for fit in of_table
                ]
                found.append(
                    {
                        "table": source,
                        "operator": operator,
                        "goal_percent": goal,
                        "rows": rows,
                        "unseen_mape_percent": mean,
                        "holds": mean <= goal,
                        "series": series,
                    }
                )
    return found


def _goals_table(found: Sequence[Mapping[str, Any]]) -> list[RenderableType]:
    """The whole table first, then its series, the worst first."""
    if not found:
        return []
    lines = Table(title="Goals on unseen shapes", title_justify="left", show_edge=False, pad_edge=False)
    lines.add_column("table, series", no_wrap=True)
    for name in ("rows", "mean %", "goal %", "holds", "a repeat of\nthe row is off %", "neighbours\nscatter %"):
        lines.add_column(name, justify="right")
    for of_table in found:
        goal = f"{of_table['goal_percent']:g}"
        for one in (of_table, *sorted(of_table["series"], key=lambda one: -one["unseen_mape_percent"])):
            noise = [one.get(key) for key in ("repeat_percent", "scatter_percent")]
            lines.add_row(
                f"  {one['series']}" if "table" not in one else of_table["table"], str(one["rows"]),
                f"{one['unseen_mape_percent']:.2f}", goal, "yes" if one["holds"] else "no",
                *("" if value is None else f"{value:.1f}" for value in noise),
            )  # fmt: skip
    return [lines, Text("")]


def to_json(
    calibrations: Mapping[str, Calibration],
    left_out: Sequence[str],
    repeats: Repeats,
) -> dict[str, Any]:
    """The same as plain data."""
    return {
        "goals": goals(calibrations, repeats),
        "calibrations": {
            device: {
                "device": calibration.device,
                "digest": calibration.digest,
                "fits": [
                    {
                        "operator": fit.operator,
                        "variant": fit.variant,
                        "rows": fit.rows,
                        "groups": fit.groups,
                        "roofline_mape_percent": fit.roofline_mape_percent,
                        "in_sample_mape_percent": fit.in_sample_mape_percent,
                        "held_out_mape_percent": fit.held_out_mape_percent,
                        "held_out_median_ape_percent": fit.held_out_median_ape_percent,
                        "held_out_p90_ape_percent": fit.held_out_p90_ape_percent,
                        "inside_90_percent": fit.inside_90_percent,
                        "scatter_percent": fit.scatter_percent,
                        "log_sigma": fit.log_sigma,
                    }
                    for fit in calibration.fits
                ],
                "warnings": warnings(calibration),
            }
            for device, calibration in calibrations.items()
        },
        "left_out": list(left_out),
    }


def beyond_table(found: Sequence[Beyond]) -> RenderableType:
    """What borrowing and extrapolating add to the spread, summed up, by operator, beside the constants in use."""
    parts: list[RenderableType] = [
        Text(
            "Spread of ln(measured / predicted) added to a fit's own where it answers for another device, or per "
            "factor e\noutside the range it was made on: the width with which 90 % intervals contain 90 % of rows.\n"
        )
    ]
    lines = Table(show_edge=False, pad_edge=False)
    lines.add_column("case")
    lines.add_column("operator")
    for name in ("fits", "mean error %\n(median fit)", "added spread\nmeasured", "in use"):
        lines.add_column(name, justify="right")
    for kind, stated in STATED.items():
        of_kind = [one for one in found if one.kind == kind]
        if not of_kind:
            continue
        lines.add_row(kind, "all", *_beyond_cells(of_kind), f"{stated:.2f}")
        for operator in sorted({one.operator for one in of_kind}):
            lines.add_row("", operator, *_beyond_cells([one for one in of_kind if one.operator == operator]), "")
    parts.append(lines)
    return Group(*parts)


def _beyond_cells(found: Sequence[Beyond]) -> tuple[str, str, str]:
    error = float(np.median([one.mean_error_percent for one in found]))
    return str(len(found)), f"{error:.1f}", f"{added_log_sigma(found):.2f}"


def beyond_json(found: Sequence[Beyond]) -> dict[str, Any]:
    """The same as plain data, and every experiment."""
    return {
        "kinds": {
            kind: {
                "fits": len(of_kind),
                "added_log_sigma": added_log_sigma(of_kind),
                "added_log_sigma_in_use": stated,
                "per": "factor e" if kind == OUTSIDE else "device",
            }
            for kind, stated in STATED.items()
            if (of_kind := [one for one in found if one.kind == kind])
        },
        "experiments": [
            {
                "operator": one.operator,
                "variant": one.variant,
                "device": one.device,
                "case": one.case,
                "kind": one.kind,
                "rows": len(one.log_ratio),
                "median_log_ratio": float(np.median(one.log_ratio)),
                "mean_error_percent": one.mean_error_percent,
                "own_log_sigma": one.log_sigma,
                "added_log_sigma": added_log_sigma([one]),
            }
            for one in found
        ],
    }
