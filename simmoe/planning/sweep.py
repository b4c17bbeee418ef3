"""A grid of specs, predicted or simulated point by point into a table that can be resumed.

A grid file names models and hardware and gives fields of deployment and workload, each a value, a list, or a range
``{from: 1, to: 16, steps: 5, scale: log}``; every combination is a point. Points that cannot be, or do not fit, stay
in the table with the reason. A row starts with the digest of its point, so that a second run does what is missing.
Left out: adaptive grids. Checked in: tests/test_sweep.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import Field, ValidationError

from simmoe.errors import CapacityError, SaturationError, SimmoeError, SpecError
from simmoe.metrics import ServingMetrics
from simmoe.planning.runner import run
from simmoe.planning.sweep_table import Journal, Row, read_rows, write_parquet
from simmoe.predict import compiled_for, predict
from simmoe.provenance import digest
from simmoe.sim.cluster import simulate
from simmoe.specs import load, problems
from simmoe.specs.base import Spec
from simmoe.specs.deployment import Deployment
from simmoe.specs.hardware import Hardware
from simmoe.specs.model import Model
from simmoe.specs.workload import Workload
from simmoe.steady.front_end import delayed

AnySpec = TypeVar("AnySpec", bound=Spec)

#: Columns of results, in the order they are written; empty where a point has none.
RESULTS = (
    "status", "reason", "requests_per_s", "output_tokens_per_s", "output_tokens_per_s_low", "output_tokens_per_s_high",
    "saturation_output_tokens_per_s", "ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s", "e2e_p50_s", "e2e_p99_s",
    "mean_running", "mean_step_s", "kv_utilisation", "memory_per_gpu_bytes", "step_log_sigma", "usd_per_hour",
    "usd_per_million_output_tokens", "bound", "seed",
)  # fmt: skip


class Grid(Spec):
    """What a grid file holds. Lists and ranges stand wherever a value may."""

    name: str = "sweep"
    model: Any = Field(description="Preset, file, or a list of them.")
    hardware: Any = Field(description="Shipped name, file, or a list of them.")
    deployment: dict[str, Any] = Field(default={}, description="Fields of a deployment; gpus defaults to one replica.")
    workload: dict[str, Any] = Field(description="Fields of a workload; input and output may be mean tokens.")
    method: Literal["analytic", "simulated"] = "analytic"
    requests: int = Field(default=2000, ge=10, description="Simulated: requests measured at each point.")
    seed: int = Field(default=0, ge=0, description="Simulated: root seed, the same traffic for every deployment.")
    price: dict[str, float] = Field(default={}, description="USD per device-hour by hardware; else its file's middle.")


@dataclass(frozen=True, slots=True)
class Point:
    """One combination: plain values, so that it travels to any process."""

    fields: tuple[tuple[str, Any], ...]
    method: str
    requests: int
    seed: int
    price: tuple[tuple[str, float], ...]

    @property
    def key(self) -> str:
        """Digest of everything the result depends on."""
        return digest([list(map(list, self.fields)), self.method, self.requests, self.seed, sorted(self.price)])


def load_grid(path: Path) -> Grid:
    """Read a grid file; SpecError says what is wrong with it."""
    try:
        return Grid.model_validate(load.read_mapping(path))
    except ValidationError as problem:
        raise SpecError(f"{path}: {problems.describe(problem, Grid)}") from None


def points(grid: Grid) -> list[Point]:
    """Every combination, the last field varying fastest.

    Raises
    ------
    SpecError
        If a list is empty or a range is not one.
    """
    axes = [(name, _values(name, getattr(grid, name))) for name in ("model", "hardware")]
    for section in ("deployment", "workload"):
        axes += [(f"{section}.{name}", _values(name, value)) for name, value in getattr(grid, section).items()]
    price = tuple(sorted(grid.price.items()))
    names = [name for name, _ in axes]
    return [
        Point(tuple(zip(names, combination, strict=True)), grid.method, grid.requests, grid.seed, price)
        for combination in itertools.product(*(values for _, values in axes))
    ]


def _values(name: str, value: Any) -> list[Any]:
    if isinstance(value, Mapping) and "from" in value:
        try:
            low, high, steps = float(value["from"]), float(value["to"]), int(value["steps"])
            scale = value.get("scale", "linear")
            spaced = {"linear": _linear, "log": _geometric}[scale](low, high, steps)
        except (KeyError, TypeError, ValueError):
            example = "{from: 1, to: 16, steps: 5, scale: log}"
            raise SpecError(f"{name}: {dict(value)} is not a range; write {example}") from None
        if not spaced:
            raise SpecError(f"{name}.steps: {value['steps']} values are none; give 1 or more")
        numbers = [float(f"{number:.6g}") for number in spaced]
        return [int(number) if number == int(number) else number for number in numbers]
    if isinstance(value, (list, tuple)):
        if not value:
            raise SpecError(f"{name}: the list is empty; give at least one value")
        return list(value)
    return [value]


def _linear(low: float, high: float, steps: int) -> list[float]:
    return [float(number) for number in np.linspace(low, high, steps)]


def _geometric(low: float, high: float, steps: int) -> list[float]:
    return [float(number) for number in np.geomspace(low, high, steps)]


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
    """
    asked = points(grid)
    done = read_rows(out) if out is not None else {}
    missing = [point for point in asked if point.key not in done]
    names = ["point", *(name for name, _ in asked[0].fields), *RESULTS]
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
    row: Row = {"point": point.key, **{name: _cell(value) for name, value in point.fields}}
    row |= dict.fromkeys(RESULTS)
    try:
        hardware, model, deployment, workload = _specs(point)
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


@lru_cache(maxsize=64)
def _hardware(name: str) -> Hardware:
    return load.load_hardware(name)


@lru_cache(maxsize=64)
def _model(name: str) -> Model:
    return load.load_model(name)


def _specs(point: Point) -> tuple[Hardware, Model, Deployment, Workload]:
    fields = dict(point.fields)
    layout = {name.partition(".")[2]: value for name, value in fields.items() if name.startswith("deployment.")}
    layout.setdefault("gpus", (layout.get("tp") or 1) * layout.get("dp", 1) * layout.get("pp", 1))
    traffic = {name.partition(".")[2]: value for name, value in fields.items() if name.startswith("workload.")}
    for name in ("input", "output"):
        if isinstance(traffic.get(name), (int, float)):
            traffic[name] = {"mean": traffic[name]}
    return (
        _hardware(fields["hardware"]),
        _model(fields["model"]),
        _valid(Deployment, layout, "deployment"),
        _valid(Workload, traffic, "workload"),
    )


def _valid(kind: type[AnySpec], values: Row, section: str) -> AnySpec:
    try:
        return kind.model_validate(values)
    except ValidationError as problem:
        raise SpecError(f"{section}: {problems.describe(problem, kind)}") from None


def _cell(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, type(None))) else str(value)


def counts(rows: Sequence[Row]) -> Iterator[tuple[str, int]]:
    """How many rows have each status."""
    for status in dict.fromkeys(row["status"] for row in rows):
        yield status, sum(row["status"] == status for row in rows)
