"""What capping (or pruning) experts gains: measured and predicted, load by load.

The gain of a row is its throughput over that of the native row at the same load and lengths, minus one. Judged in
percentage points, beside the score of saying "no effect". A cap takes fewer of the same experts per token, a pruned
pool keeps fewer experts to choose from; both are compared with the same native row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from simmoe.errors import MeasurementError, SimmoeError
from simmoe.specs.measurement import Table
from simmoe.validation.serving import compare as serving
from simmoe.validation.serving.compare import Run, Unspoken

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """Throughput of one row and what it gains over the native row at the same load. Rates over all GPUs."""

    source_id: str
    setting: str
    model: str
    device: str
    concurrency: int
    input_tokens: float
    output_tokens: float
    active_experts: int
    total_experts: int
    native: bool
    measured_tokens_per_s: float
    predicted_tokens_per_s: float
    measured_gain: float
    predicted_gain: float
    pruned: bool


def gains(table: Table) -> list[Gain]:
    """Measured and predicted gains of every closed-loop row that has a native twin in the table.

    Raises
    ------
    MeasurementError
        If no row has one.
    """
    rows: dict[tuple[object, ...], list[tuple[str, Run, float, float]]] = defaultdict(list)
    for row in serving.rows_of(table):
        try:
            run = serving.describe(row)
            found = serving.figures(row, serving.solve(run)[0], run)
        except (Unspoken, SimmoeError):
            continue
        rate = next(((m, p) for quantity, m, p in found if quantity.endswith("_per_s")), None)
        if rate is None or run.model.experts is None or run.workload.concurrency is None:
            continue
        source_id = str(row["source_id"])
        # tables of one paper repeat the native column: compare within the same table
        series = source_id.split("-c", maxsplit=1)[0]
        key = (series, run.model, run.hardware, run.deployment.engine, run.workload)
        rows[key].append((source_id, run, *rate))
    result: list[Gain] = []
    for group, members in rows.items():
        native = next((member for member in members if member[1].native), None)
        if native is None or len(members) < 2:
            continue
        for source_id, run, measured, predicted in members:
            e, d = run.model.experts, run.deployment
            assert e is not None
            assert run.workload.concurrency is not None
            result.append(
                Gain(
                    source_id=source_id,
                    setting=str(group[0]),
                    model=run.model.name,
                    device=f"{d.gpus} x {run.hardware.device.name}",
                    concurrency=run.workload.concurrency,
                    input_tokens=run.workload.input.mean,
                    output_tokens=run.workload.output.mean,
                    active_experts=d.active_experts or e.top_k,
                    total_experts=d.total_experts or e.num_experts,
                    native=run.native,
                    measured_tokens_per_s=measured,
                    predicted_tokens_per_s=predicted,
                    measured_gain=measured / native[2] - 1,
                    predicted_gain=predicted / native[3] - 1,
                    pruned=d.total_experts is not None,
                )
            )
    if not result:
        raise MeasurementError(f"{table.path}: no capped or pruned row with a native row at the same load")
    return sorted(result, key=lambda g: (g.setting, g.concurrency, -g.total_experts, -g.active_experts))


@dataclass(frozen=True, slots=True, kw_only=True)
class GainError:
    """How well a setting's gains are predicted. Percentage points."""

    setting: str
    model: str
    device: str
    n: int
    mean_abs_error_points: float
    no_effect_points: float
    throughput_mape_percent: float


def judge(found: Sequence[Gain]) -> list[GainError]:
    """Mean absolute error of the gain per setting, beside the score of predicting no effect."""
    grouped: dict[tuple[str, str, str], list[Gain]] = defaultdict(list)
    for gain in found:
        grouped[gain.setting, gain.model, gain.device].append(gain)
    errors = []
    for (setting, model, device), members in sorted(grouped.items()):
        capped = [g for g in members if not g.native]
        measured = np.array([g.measured_gain for g in capped])
        predicted = np.array([g.predicted_gain for g in capped])
        ratio = np.array([g.predicted_tokens_per_s / g.measured_tokens_per_s - 1 for g in members])
        errors.append(
            GainError(
                setting=setting,
                model=model,
                device=device,
                n=len(capped),
                mean_abs_error_points=float(100 * np.mean(np.abs(predicted - measured))),
                no_effect_points=float(100 * np.mean(np.abs(measured))),
                throughput_mape_percent=float(100 * np.mean(np.abs(ratio))),
            )
        )
    return errors


def to_json(found: Sequence[Gain]) -> dict[str, Any]:
    """Gains and their errors as plain data; gains are fractions, errors percentage points or percent."""
    return {"gains": [asdict(gain) for gain in found], "errors": [asdict(error) for error in judge(found)]}


def table(found: Sequence[Gain]) -> Group:
    """Every load and setting measured beside predicted, and below it the errors per setting, for printing."""
    from rich.console import Group  # noqa: PLC0415  (only when somebody reads it)
    from rich.table import Table as Grid  # noqa: PLC0415

    rows = Grid(title="throughput [total tokens/s] and gain over the native row, measured and predicted")
    for name in ("setting", "model", "in/out", "requests", "k", "experts"):
        rows.add_column(name)
    for name in ("measured", "predicted", "error", "gain", "predicted gain"):
        rows.add_column(name, justify="right")
    for g in found:
        rows.add_row(
            g.setting, g.model, f"{g.input_tokens:g}/{g.output_tokens:g}", f"{g.concurrency}", f"{g.active_experts}",
            f"{g.total_experts}", f"{g.measured_tokens_per_s:,.0f}", f"{g.predicted_tokens_per_s:,.0f}",
            f"{100 * (g.predicted_tokens_per_s / g.measured_tokens_per_s - 1):+.1f} %",
            "" if g.native else f"{100 * g.measured_gain:+.1f} %",
            "" if g.native else f"{100 * g.predicted_gain:+.1f} %",
            style="bold" if g.native else None,
        )  # fmt: skip
    errors = Grid(title="error of the gain, mean absolute, percentage points")
    for name in ("setting", "model", "devices"):
        errors.add_column(name)
    for name in ("n", "predicted", '"no effect"', "throughput error"):
        errors.add_column(name, justify="right")
    for e in judge(found):
        errors.add_row(
            e.setting, e.model, e.device, f"{e.n}", f"{e.mean_abs_error_points:.1f}", f"{e.no_effect_points:.1f}",
            f"{e.throughput_mape_percent:.1f} %",
        )  # fmt: skip
    return Group(rows, errors)
