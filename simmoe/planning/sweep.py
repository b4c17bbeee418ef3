"""The points of a grid, predicted or simulated one by one into a table that can be resumed.

Points that cannot be, or do not fit, stay in the table with the reason. A row starts with the digest of its point, so
that a second run does what is missing. Left out: adaptive grids. Checked in: tests/test_sweep.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from simmoe.errors import CapacityError, SaturationError, SimmoeError, SpecError
from simmoe.metrics import ServingMetrics
from simmoe.planning.grid import Grid, Point, points, specs_of
from simmoe.planning.runner import run
from simmoe.planning.sweep_table import Journal, Row, check_same, read_rows, write_parquet
from simmoe.predict import compiled_for, predict
from simmoe.sim.cluster import simulate
from simmoe.specs.hardware import Hardware
from simmoe.steady.front_end import delayed

#: Columns of results, in the order they are written; empty where a point has none.
RESULTS = (
    "status", "reason", "requests_per_s", "output_tokens_per_s", "output_tokens_per_s_low", "output_tokens_per_s_high",
    "saturation_output_tokens_per_s", "ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s", "e2e_p50_s", "e2e_p99_s",
    "mean_running", "mean_step_s", "kv_utilisation", "memory_per_gpu_bytes", "step_log_sigma", "usd_per_hour",
    "usd_per_million_output_tokens", "bound", "seed",
)  # fmt: skip


def sweep(
    grid: Grid,
    *,
    out: Path | None = None,
    processes: int | None = 1,
    ray: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Predict or simulate every point.

    Parameters
    ----------
    out : table written row by row (.csv), or at the end (.parquet, with the .csv it grew in beside it); points found
        in the .csv are not done again. None: nothing is written.
    processes, ray : as in `simmoe.planning.runner.run`.
    progress : told (points done, points in all).

    Returns
    -------
    rows, in the order of the points; `pandas.DataFrame(rows)` makes a frame of them.

    Raises
    ------
    SpecError
        If a value of the grid is wrong by itself, see `simmoe.planning.grid.points`.
    MeasurementError
        If the table holds other points, or the same made from other inputs.
    """
    asked = points(grid)
    done = read_rows(out) if out is not None else {}
    names = ["point", *(name for name, _ in asked[0].fields), *RESULTS]
    if out is not None:
        check_same(done, {point.key: point.cells for point in asked}, names, out)
    missing = [point for point in asked if point.key not in done]
    total = len(asked)
    with Journal(out, names) as write:
        for index, row in enumerate(run(evaluate, missing, processes=processes, ray=ray)):
            done[row["point"]] = row
            write(row)
            if progress:
                progress(total - len(missing) + index + 1, total)
    rows = [done[point.key] for point in asked]
    if out is not None and out.suffix == ".parquet":
        write_parquet(rows, names, out)
    return rows


def evaluate(point: Point) -> Row:
    """One row: the point's fields and its results, or why there are none."""
    row: Row = {"point": point.key, **point.cells}
    row |= dict.fromkeys(RESULTS)
    try:
        hardware, model, deployment, workload = specs_of(point)
        prediction = predict(hardware, model, deployment, workload)
        row |= {
            "saturation_output_tokens_per_s": prediction.saturation_output_tokens_per_s,
            "memory_per_gpu_bytes": prediction.memory_used_bytes,
            "step_log_sigma": prediction.log_sigma,
            "bound": prediction.bound,
        }
        if prediction.metrics is None:
            row |= {"status": "saturated", "reason": "the offered rate exceeds what the deployment carries"}
            return row
        metrics = prediction.metrics
        low, high = prediction.throughput_90
        if point.method == "simulated":
            parts = compiled_for(hardware, model, deployment, workload)
            parameters = parts.engine.parameters
            metrics = simulate(
                parts.table, workload, deployment, parts.memory.kv_tokens, requests=point.requests, seed=point.seed,
                front_end=parameters,
            ).metrics  # fmt: skip
            metrics = delayed(metrics, parameters, workload.input.mean, deployment.replicas)
            row["seed"] = point.seed
        row |= {"status": "ok", "output_tokens_per_s_low": low, "output_tokens_per_s_high": high, **_figures(metrics)}
        usd = _price(point, hardware)
        if usd is not None:
            row["usd_per_hour"] = usd * deployment.gpus
            row["usd_per_million_output_tokens"] = row["usd_per_hour"] / 3600 / metrics.output_tokens_per_s * 1e6
    except SaturationError as problem:
        row |= {"status": "saturated", "reason": str(problem)}
    except (CapacityError, SpecError) as problem:
        row |= {"status": "infeasible", "reason": str(problem)}
    except SimmoeError as problem:
        row |= {"status": "failed", "reason": str(problem)}
    return row


def _figures(metrics: ServingMetrics) -> Row:
    return {
        "requests_per_s": metrics.requests_per_s,
        "output_tokens_per_s": metrics.output_tokens_per_s,
        **{
            f"{name}_{statistic}_s": getattr(getattr(metrics, name), statistic)
            for name in ("ttft", "tpot", "e2e")
            for statistic in ("p50", "p99")
        },
        "mean_running": metrics.mean_running,
        "mean_step_s": metrics.mean_step_s,
        "kv_utilisation": metrics.kv_utilisation,
    }


def _price(point: Point, hardware: Hardware) -> float | None:
    named = dict(point.price).get(dict(point.fields)["hardware"])
    known = hardware.price_per_device_hour
    return named if named is not None else (known.low + known.high) / 2 if known else None


def counts(rows: Sequence[Row]) -> Iterator[tuple[str, int]]:
    """How many rows have each status."""
    for status in dict.fromkeys(row["status"] for row in rows):
        yield status, sum(row["status"] == status for row in rows)
