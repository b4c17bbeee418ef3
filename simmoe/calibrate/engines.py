"""Estimate what a serving engine adds around kernels, from measured runs: host time per step, slowdown of kernels.

At most two named parameters per (engine, version, device), fitted to the logarithm of measured throughput over the
rows with the model's native top-k and full expert pool. Rows with a cap or a pruned pool are never looked at, so what
is said of them afterwards is a prediction. The same two numbers hold for every load and every model of the group.

`python -m simmoe.calibrate.engines validate/serving` prints the times of each engine and era with the error of models
left out of the fit; `--releases FILE` those of old releases; `--slow-experts` what becomes of the gains of a cap if no
expert kernel is exempt from a release's slowdown.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray

from simmoe.calibrate.fit import solver
from simmoe.errors import CalibrationError, SimmoeError
from simmoe.predict import compiled, engine_of
from simmoe.specs.engines import OVERRIDES, EngineParameters, engine_parameters
from simmoe.specs.measurement import Table, read_table, table_paths
from simmoe.steady.front_end import front_end_s
from simmoe.validation import gains
from simmoe.validation.cells import number
from simmoe.validation.serving import compare as serving
from simmoe.validation.serving.compare import Run, Unspoken

Array = NDArray[np.float64]

#: What `estimate_defaults` estimates of an entry, in this order. [s]
_TIMES = ("host_time_per_step", "front_end_time", "front_end_time_per_request", "front_end_time_per_token")
#: Entry of engines.yaml -> times of it that stand on something better than this fit; see its source.
_HELD = {"sglang": ("host_time_per_step",)}
#: Bounds of the search: a step's host time [s], and the factor on kernel time [-].
_BOUNDS = ((1e-5, 0.1), (0.8, 4.0))


@dataclass(frozen=True)
class EngineFit:
    """Estimated parameters of one (engine, version, device) and how well they describe the rows used."""

    parameters: EngineParameters
    rows: tuple[str, ...]
    mape_percent: float
    mape_before_percent: float


def estimate(table: Table, *, exclude: Iterable[str] = ()) -> list[EngineFit]:
    """Fit each (engine, version, device) in a serving table to its native-k rows.

    Parameters
    ----------
    exclude : row ids (source_id) to leave out, e.g. known anomalies.

    Raises
    ------
    CalibrationError
        If no row can be used.
    """
    left_out = set(exclude)
    groups: dict[tuple[str, str, str], list[tuple[str, Run, str, float]]] = defaultdict(list)
    for source_id, run, quantity, measured in _native_runs(table):
        if source_id not in left_out:
            key = (run.deployment.engine, run.deployment.engine_version or "", run.hardware.device.name)
            groups[key].append((source_id, run, quantity, measured))
    if not groups:
        raise CalibrationError(f"{table.path}: no row with native top-k, a known model and a throughput")
    return [_fit(key, rows, table.path.name) for key, rows in sorted(groups.items())]


def _native_runs(table: Table) -> Iterator[tuple[str, Run, str, float]]:
    for row in serving.rows_of(table):
        try:
            run = serving.describe(row)
            figures = serving.figures(row, serving.solve(run)[0], run)
        except (Unspoken, SimmoeError):
            continue
        rates = [(quantity, measured) for quantity, measured, _ in figures if quantity.endswith("_per_s")]
        if run.native and rates:
            yield str(row["source_id"]), run, *rates[0]


def _fit(key: tuple[str, str, str], rows: list[tuple[str, Run, str, float]], file: str) -> EngineFit:
    least_squares = solver()
    engine, version, device = key

    def residuals(theta: Array) -> Array:
        host, slowdown = np.exp(theta).tolist()
        logs = []
        for _, run, quantity, measured in rows:
            deployment = run.deployment.vary(host_time_per_step=host, kernel_slowdown=slowdown)
            metrics, _, _ = serving.solve(replace(run, deployment=deployment))
            logs.append(math.log(getattr(metrics, quantity) / measured))
        return np.array(logs)

    low, high = (np.log([bound[i] for bound in _BOUNDS]) for i in (0, 1))
    result = least_squares(
        residuals, np.log([2e-3, 1.2]), bounds=(low, high), loss="soft_l1", f_scale=0.1, diff_step=[0.02, 0.02]
    )
    host, slowdown = np.exp(result.x).tolist()
    error = 100 * float(np.mean(np.abs(np.expm1(residuals(result.x)))))
    before = 100 * float(np.mean(np.abs(np.expm1(residuals(np.log([1e-5, 1.0]))))))
    # what is known of the engine otherwise stays: which expert kernels it shipped tuned, time in front of the scheduler
    known = engine_parameters(rows[0][1].deployment, device)
    return EngineFit(
        known.vary(
            engine=engine,
            version=version.split()[0] if version else None,
            before=None,
            device=device,
            host_time_per_step=host,
            kernel_slowdown=slowdown,
            source=f"fitted to {len(rows)} native-k rows of {file} ({error:.1f} % mean error)",
        ),
        tuple(source_id for source_id, *_ in rows),
        error,
        before,
    )


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
    host_time_per_step: float
    front_end_time: float
    front_end_time_per_request: float
    front_end_time_per_token: float
    models: int
    tpot_rows: int
    ttft_rows: int
    tpot_percent: float
    ttft_percent: float
    without: dict[str, dict[str, float]]
    """Model left out -> the times that the others give. [s]"""


def estimate_defaults(tables: Iterable[Table]) -> list[DefaultsFit]:
    """Host time per step from mean TPOT, front-end times from mean TTFT, per engine and era.

    By least absolute error of logarithms. Taken are closed loops of at least two rounds of releases without a slowdown
    of their own, on devices with kernel measurements of their own: bursts say more of the queue than of the engine, and
    an error of borrowed kernels would be taken for its time. A latency of unnamed statistic counts as a mean.

    The front end is in a client's cycle, so what requests meet in the engine depends on the times asked for: runs are
    solved with those of engines.yaml, which are right when the estimates repeat them.
    """
    tpot: dict[str, list[tuple[str, float, Array]]] = defaultdict(list)
    ttft: dict[str, list[tuple[str, float, Array]]] = defaultdict(list)
    for run, measured in _recent_runs(tables):
        bare = run.deployment.vary(host_time_per_step=0.0)
        own = engine_parameters(bare, run.hardware.device.name)
        entry = own.title
        try:
            metrics, _, _ = serving.solve(replace(run, deployment=bare))
        except SimmoeError:
            continue
        prompt, running = run.workload.input.mean, metrics.mean_running / run.deployment.replicas
        in_front = front_end_s(own, running, prompt)
        if "tpot" in measured:
            tpot[entry].append((run.model.name, measured["tpot"], np.array([metrics.tpot.mean, 1.0])))
        if "ttft" in measured:
            columns = np.array([metrics.ttft.mean - in_front, 1.0, running, prompt])
            ttft[entry].append((run.model.name, measured["ttft"], columns))
    fits = []
    for entry in sorted(tpot):
        (host,), unseen_tpot, hosts = _least_absolute(tpot[entry], (1e-3,))
        (constant, per_request, per_token), unseen_ttft, fronts = _least_absolute(ttft[entry], (0.03, 5e-4, 1e-5))
        told = hosts.keys() & fronts
        without = {name: dict(zip(_TIMES, (*hosts[name], *fronts[name]), strict=True)) for name in told}
        fits.append(
            DefaultsFit(
                entry=entry,
                host_time_per_step=host,
                front_end_time=constant,
                front_end_time_per_request=per_request,
                front_end_time_per_token=per_token,
                models=len({model for model, _, _ in tpot[entry]}),
                tpot_rows=len(tpot[entry]),
                ttft_rows=len(ttft[entry]),
                tpot_percent=unseen_tpot,
                ttft_percent=unseen_ttft,
                without=without,
            )
        )
    return fits


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
    rows: list[tuple[str, float, Array]], start: tuple[float, ...]
) -> tuple[list[float], float, dict[str, list[float]]]:
    """Non-negative x with least mean |ln((first column + other columns . x) / measured)|, and the error it leaves.

    The error is the median over models left out of the fit in turn [%]; the last are the x without each model.
    """
    from scipy.optimize import minimize  # noqa: PLC0415  (an extra; only fitting needs it)

    models = np.array([model for model, _, _ in rows])
    measured = np.array([value for _, value, _ in rows])
    columns = np.array([column for _, _, column in rows])

    def logs(theta: Array, chosen: Array) -> Array:
        predicted = columns[chosen, 0] + columns[chosen, 1:] @ np.exp(theta)
        return np.asarray(np.log(predicted / measured[chosen]))

    def fit(chosen: Array) -> Array:
        def cost(theta: Array) -> float:
            return float(np.mean(np.abs(logs(theta, chosen))))

        tries = [minimize(cost, np.log(np.array(start) * scale), method="Nelder-Mead") for scale in (0.3, 1.0, 3.0)]
        return np.asarray(min(tries, key=lambda found: float(found.fun)).x)

    without = {str(name): fit(models != name) for name in sorted(set(models)) if (models != name).any()}
    unseen = [np.expm1(logs(theta, models == name)) for name, theta in without.items()]
    error = float(100 * np.median(np.abs(np.concatenate(unseen)))) if unseen else math.nan
    left_out = {name: np.exp(theta).tolist() for name, theta in without.items()}
    return np.exp(fit(np.ones(len(rows), dtype=bool))).tolist(), error, left_out


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
        lines = [line for table in tables for line in _release_lines(table, given.exclude, given.slow_experts)]
    elif given.without:
        lines = [yaml.safe_dump({"without": without_each(estimate_defaults(tables))}, sort_keys=False)]
    else:
        lines = [_line(fit) for fit in estimate_defaults(tables)]
    sys.stdout.write("".join(f"{line}\n" for line in lines))


def without_each(fits: Iterable[DefaultsFit]) -> dict[str, dict[str, dict[str, float]]]:
    """Entry -> model left out -> the times fitted to the others, but for those that are not taken from fits. [s]"""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for fit in fits:
        names = [name for name in _TIMES if name not in _HELD.get(fit.entry, ())]
        found[fit.entry] = {
            model: {name: _written(times[name]) for name in names} for model, times in sorted(fit.without.items())
        }
    return found


def _written(seconds: float) -> float:
    """Three digits; a search in logarithms never ends at zero, so less than a nanosecond is none."""
    return float(f"{seconds:.3g}") if seconds > 1e-9 else 0.0


def _line(fit: DefaultsFit) -> str:
    return (
        f"{fit.entry}: host {1e3 * fit.host_time_per_step:.2f} ms a step ({fit.tpot_rows} TPOT); front end "
        f"{1e3 * fit.front_end_time:.1f} ms + {1e3 * fit.front_end_time_per_request:.2f} ms a request + "
        f"{1e6 * fit.front_end_time_per_token:.1f} us a token ({fit.ttft_rows} TTFT); {fit.models} models; "
        f"median error with the model left out: TPOT {fit.tpot_percent:.1f} %, TTFT {fit.ttft_percent:.1f} %"
    )


def _release_lines(table: Table, exclude: Iterable[str], slow_experts: bool) -> Iterator[str]:
    with overridden(tuned_expert_shapes=()) if slow_experts else nullcontext():
        fits = estimate(table, exclude=exclude)
    for found in fits:
        p = found.parameters
        yield (
            f"{table.path.name}: {p.engine} {p.version or ''} on {p.device}: host {1e3 * p.host_time_per_step:.2f} ms "
            f"a step, kernels x {p.kernel_slowdown:.2f}; {len(found.rows)} rows, {found.mape_percent:.1f} % mean error "
            f"(without: {found.mape_before_percent:.1f} %)"
        )
        if slow_experts:
            yield from _gain_lines(table, p)


def _gain_lines(table: Table, fitted: EngineParameters) -> Iterator[str]:
    with overridden(
        tuned_expert_shapes=(),
        host_time_per_step=fitted.host_time_per_step,
        kernel_slowdown=fitted.kernel_slowdown,
    ):
        found = [gain for gain in gains.gains(table) if gain.device.endswith(f"x {fitted.device}")]
    for error in gains.judge(found):
        yield (
            f"  gain of {error.setting}, {error.model}: off by {error.mean_abs_error_points:.1f} points over {error.n} "
            f'rows ("no effect": {error.no_effect_points:.1f}), throughput by {error.throughput_mape_percent:.1f} %'
        )


@contextmanager
def overridden(**changes: object) -> Iterator[None]:
    """Every engine's parameters with these values instead of its entry's, while the context lasts."""
    mark = OVERRIDES.set(changes)
    compiled.cache_clear()
    engine_of.cache_clear()
    try:
        yield
    finally:
        OVERRIDES.reset(mark)
        compiled.cache_clear()
        engine_of.cache_clear()


if __name__ == "__main__":
    _main()
