"""Host time and slowdown of kernels of one release on one device, estimated from measured throughput.

At most two named parameters per (engine, version, device), fitted to the logarithm of measured throughput over the
rows with the model's native top-k and full expert pool. Rows with a cap or a pruned pool are never looked at, so what
is said of them afterwards is a prediction. The same two numbers hold for every load and every model of the group.
Printed by `python -m simmoe.calibrate.engines --releases`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from simmoe.calibrate.fit import solver
from simmoe.errors import CalibrationError, SimmoeError
from simmoe.predict import compiled, engine_of
from simmoe.specs.engines import OVERRIDES, EngineParameters, engine_parameters
from simmoe.specs.measurement import Table
from simmoe.validation import gains
from simmoe.validation.serving import compare as serving
from simmoe.validation.serving.compare import Run, Unspoken

Array = NDArray[np.float64]

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


def release_lines(table: Table, exclude: Iterable[str], slow_experts: bool) -> Iterator[str]:
    """What `estimate` finds, in words; ``slow_experts``: with the slowdown on tuned experts too, and gains so told."""
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
