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


def table(calibrations: Mapping[str, Calibration], left_out: Sequence[str]) -> RenderableType:
    """One line per fit, then warnings and what was left out."""
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
    if left_out:
        parts.append(Text("Left out:\n" + "\n".join(f"  - {line}" for line in left_out)))
    return Group(*parts)


def to_json(calibrations: Mapping[str, Calibration], left_out: Sequence[str]) -> dict[str, Any]:
    """The same as plain data."""
    return {
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
