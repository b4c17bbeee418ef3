"""Estimate what serving engines add around kernels, per engine and era, from the latencies of measured runs.

`python -m simmoe.calibrate.engines validate/serving` prints the times of each with the error of models left out of the
fit; `--without` the times that the others give; `--releases FILE` those of old releases (`calibrate.releases`), and
with `--slow-experts` what becomes of the gains of a cap if no expert kernel is exempt from a release's slowdown.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray

from simmoe.calibrate.releases import release_lines
from simmoe.errors import SimmoeError
from simmoe.specs.deployment import EngineOverrides
from simmoe.specs.engines import engine_parameters
from simmoe.specs.measurement import Table, read_table, table_paths
from simmoe.steady.front_end import front_end_s
from simmoe.units import text
from simmoe.validation.cells import number
from simmoe.validation.serving import compare as serving
from simmoe.validation.serving.compare import Run, Unspoken

Array = NDArray[np.float64]

#: What `estimate_defaults` estimates of an entry: names, and where the search for each begins. [s]
_TPOT = {"host_time_per_step": 1e-3, "host_time_per_sequence": 1e-5}
_TTFT = {
    "front_end_time": 0.03,
    "launch_time_per_layer": 5e-4,
    "front_end_time_per_request": 5e-4,
    "front_end_time_per_token": 1e-5,
}
#: Entry of engines.yaml -> times that are taken as none. Chosen by models left out: a constant before the first token
#: and launches by layer are one too many (TTFT of vLLM's left out 21 % with the first, 17 with the second, 18 with
#: both; before 0.14 22, 24, 23; SGLang 21, 21, 21; TensorRT-LLM 30, 23, 27), and vLLM's steps do not grow with the
#: requests in them (TPOT 11 % with and without; SGLang 23 without, 16 with; TensorRT-LLM 10, 9).
_NONE: dict[str, frozenset[str]] = {
    "vllm": frozenset({"host_time_per_sequence", "front_end_time"}),
    "vllm before 0.14": frozenset({"host_time_per_sequence", "launch_time_per_layer"}),
    "sglang": frozenset({"launch_time_per_layer"}),
    "trtllm": frozenset({"front_end_time"}),
}


@dataclass(frozen=True)
class DefaultsFit:
    """Times around kernels of one entry of engines.yaml, estimated over many models, and how models left out are told.

    Attributes
    ----------
    entry : engine, and the releases it holds for.
    models : models among the rows.
    tpot_percent, ttft_percent : median absolute error of rows of models the fit did not see; NaN with one model.
    """

    entry: str
    times: dict[str, float]
    """Named as in engines.yaml. [s]"""
    models: int
    tpot_rows: int
    ttft_rows: int
    tpot_percent: float
    ttft_percent: float
    without: dict[str, dict[str, float]]
    """Model left out -> the times that the others give. [s]"""


def estimate_defaults(tables: Iterable[Table]) -> list[DefaultsFit]:
    """Host times from mean TPOT, what comes before the first token from mean TTFT, per engine and era.

    By least absolute error of logarithms. Taken are closed loops of at least two rounds of releases without a slowdown
    of their own, on devices with kernel measurements of their own: bursts say more of the queue than of the engine, and
    an error of borrowed kernels would be taken for its time. A latency of unnamed statistic counts as a mean.

    The front end is in a client's cycle, so what requests meet in the engine depends on the times asked for: runs are
    solved with those of engines.yaml, which are right when the estimates repeat them.
    """
    tpot: dict[str, list[tuple[str, float, Array]]] = defaultdict(list)
    ttft: dict[str, list[tuple[str, float, Array]]] = defaultdict(list)
    for run, measured in _recent_runs(tables):
        hostless = EngineOverrides(host_time_per_sequence=0.0)
        bare = run.deployment.vary(host_time_per_step=0.0, engine_overrides=hostless)
        own = engine_parameters(bare, run.hardware.device.name, run.model.layers)
        entry = own.title
        try:
            metrics, _, _ = serving.solve(replace(run, deployment=bare))
        except SimmoeError:
            continue
        prompt, running = run.workload.input.mean, metrics.mean_running / run.deployment.replicas
        if "tpot" in measured:
            parts = {"host_time_per_step": 1.0, "host_time_per_sequence": running / run.deployment.dp}
            tpot[entry].append((run.model.name, measured["tpot"], _columns(entry, metrics.tpot.mean, parts)))
        if "ttft" in measured:
            in_engine = metrics.ttft.mean - front_end_s(own, running, prompt)
            parts = dict(zip(_TTFT, (1.0, float(run.model.layers), running, prompt), strict=True))
            ttft[entry].append((run.model.name, measured["ttft"], _columns(entry, in_engine, parts)))
    fits = []
    for entry in sorted(tpot):
        hosts, unseen_tpot, hosts_without = _least_absolute(tpot[entry], _sought(entry, _TPOT))
        fronts, unseen_ttft, fronts_without = _least_absolute(ttft[entry], _sought(entry, _TTFT))
        told = sorted(hosts_without.keys() & fronts_without)
        fits.append(
            DefaultsFit(
                entry=entry,
                times=hosts | fronts,
                models=len({model for model, _, _ in tpot[entry]}),
                tpot_rows=len(tpot[entry]),
                ttft_rows=len(ttft[entry]),
                tpot_percent=unseen_tpot,
                ttft_percent=unseen_ttft,
                without={name: hosts_without[name] | fronts_without[name] for name in told},
            )
        )
    return fits


def _sought(entry: str, times: Mapping[str, float]) -> dict[str, float]:
    """The times that an entry has, of those named."""
    return {name: start for name, start in times.items() if name not in _NONE.get(entry, ())}


def _columns(entry: str, in_engine: float, parts: Mapping[str, float]) -> Array:
    """What a latency is made of: without the times sought [s], and how often each of them is in it."""
    return np.array([in_engine, *(parts[name] for name in _sought(entry, parts))])


def _recent_runs(tables: Iterable[Table]) -> Iterator[tuple[Run, dict[str, float]]]:
    """Closed loops of several rounds of releases that run kernels as measured, with measured means. [s]"""
    for table in tables:
        for row in serving.rows_of(table):
            try:
                run = serving.describe(row)
            except (Unspoken, SimmoeError):
                continue
            if run.hardware.calibration is None:
                continue
            clients, own = run.workload.concurrency, engine_parameters(run.deployment, run.hardware.device.name)
            if clients is None or (run.requests or 0) < 2 * clients or own.version or own.kernel_slowdown != 1.0:
                continue
            measured = {
                name: value / 1e3
                for name in ("tpot", "ttft")
                if (value := number(row, f"{name}_ms_mean") or number(row, f"{name}_ms_unspecified"))
            }
            if measured:
                yield run, measured


def _least_absolute(
    rows: list[tuple[str, float, Array]], sought: Mapping[str, float]
) -> tuple[dict[str, float], float, dict[str, dict[str, float]]]:
    """Non-negative x with least mean |ln((first column + other columns . x) / measured)|, and the error it leaves.

    ``sought``: names of the x, and where to begin. The error is the median over models left out of the fit in turn [%];
    the last are the x without each model.
    """
    from scipy.optimize import minimize  # noqa: PLC0415  (an extra; only fitting needs it)

    models = np.array([model for model, _, _ in rows])
    measured = np.array([value for _, value, _ in rows])
    columns = np.array([column for _, _, column in rows])
    start = np.log(list(sought.values()))

    def logs(theta: Array, chosen: Array) -> Array:
        predicted = columns[chosen, 0] + columns[chosen, 1:] @ np.exp(theta)
        return np.asarray(np.log(predicted / measured[chosen]))

    def fit(chosen: Array) -> Array:
        def cost(theta: Array) -> float:
            return float(np.mean(np.abs(logs(theta, chosen))))

        tries = [minimize(cost, start + math.log(scale), method="Nelder-Mead") for scale in (0.3, 1.0, 3.0)]
        return np.asarray(min(tries, key=lambda found: float(found.fun)).x)

    without = {str(name): fit(models != name) for name in sorted(set(models)) if (models != name).any()}
    unseen = [np.expm1(logs(theta, models == name)) for name, theta in without.items()]
    error = float(100 * np.median(np.abs(np.concatenate(unseen)))) if unseen else math.nan

    def named(theta: Array) -> dict[str, float]:
        return dict(zip(sought, np.exp(theta).tolist(), strict=True))

    return named(fit(np.ones(len(rows), dtype=bool))), error, {name: named(theta) for name, theta in without.items()}


def _main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m simmoe.calibrate.engines",
        description="What engines add around kernels, estimated from served runs; errors with each model left out.",
    )
    parser.add_argument("paths", nargs="+", type=Path, help="serving tables or folders of them")
    parser.add_argument(
        "--releases", action="store_true", help="host time and slowdown per release and device, from throughput"
    )
    parser.add_argument(
        "--without", action="store_true", help="the times without each model in turn, as unseen_engines.yaml has them"
    )
    parser.add_argument("--exclude", nargs="*", default=(), help="with --releases: source ids to leave out")
    parser.add_argument(
        "--slow-experts", action="store_true",
        help="with --releases: the slowdown on every kernel, tuned expert kernels too; and the gains of a cap so told",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    tables = [table for table in map(read_table, table_paths(given.paths)) if serving.is_serving_table(table)]
    if given.releases:
        lines = [line for table in tables for line in release_lines(table, given.exclude, given.slow_experts)]
    elif given.without:
        lines = [yaml.safe_dump({"without": without_each(estimate_defaults(tables))}, sort_keys=False)]
    else:
        lines = [_line(fit) for fit in estimate_defaults(tables)]
    sys.stdout.write("".join(f"{line}\n" for line in lines))


def without_each(fits: Iterable[DefaultsFit]) -> dict[str, dict[str, dict[str, float]]]:
    """Entry -> model left out -> the times fitted to the others. [s]"""
    return {
        fit.entry: {
            model: {name: _written(value) for name, value in times.items()}
            for model, times in sorted(fit.without.items())
        }
        for fit in fits
    }


def _written(seconds: float) -> float:
    """Three digits; a search in logarithms never ends at zero, so less than a nanosecond is none."""
    return float(f"{seconds:.3g}") if seconds > 1e-9 else 0.0


def _line(fit: DefaultsFit) -> str:
    found = ", ".join(f"{name} {text(_written(value), 's')}" for name, value in fit.times.items())
    return (
        f"{fit.entry}: {found}; {fit.tpot_rows} TPOT, {fit.ttft_rows} TTFT, {fit.models} models; "
        f"median error with the model left out: TPOT {fit.tpot_percent:.1f} %, TTFT {fit.ttft_percent:.1f} %"
    )


if __name__ == "__main__":
    _main()
