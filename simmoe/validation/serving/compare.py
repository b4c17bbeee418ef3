"""Measured serving runs beside predicted ones, row by row, from tables in the schema of validate/serving/README.md.

A run with a finite number of requests is simulated as it was measured: all clients start at once, and rates are over
its whole length, ramp and drain included. Open loops are solved in closed form. Rows the model cannot speak to are
counted with the reason. How a row is read is in `rows`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial

from simmoe.errors import SimmoeError
from simmoe.metrics import ServingMetrics
from simmoe.output_analysis import log_normal_interval
from simmoe.predict import Compiled, compiled_for, mean_step
from simmoe.sim.cluster import simulate
from simmoe.sim.disaggregated import Handover, transfer_of
from simmoe.sim.pool import PoolSetup
from simmoe.specs.cluster import Disaggregation
from simmoe.specs.deployment import Deployment
from simmoe.specs.measurement import Table, stem
from simmoe.steady.front_end import delayed
from simmoe.steady.load_curve import load_curve
from simmoe.steady.state import steady_state
from simmoe.validation.cells import BESIDE, Row, Unspoken, number, reason, text
from simmoe.validation.misses import of_step
from simmoe.validation.serving import chat_flood
from simmoe.validation.serving.phase_rows import compare_row, is_phase_row
from simmoe.validation.serving.rows import Run, describe, group_of, model_named
from simmoe.validation.serving.unseen import SUFFIX, left_out
from simmoe.validation.summary import Comparison, Outcome

__all__ = ["Run", "Unspoken", "compare", "compare_runs", "describe", "figures", "is_serving_table", "rows_of", "solve"]

_NEEDED = frozenset({"source_id", "model", "gpu", "num_gpus", "engine", "tp", "input_tokens", "output_tokens"})

#: Spread of ln(measured / predicted) that engines add to that of kernels, per metric and for rates. [-]
#: From models left out of the fits of engine times (simmoe/specs/engines.yaml): median error / 0.67, as of a normal
#: distribution, for TPOT (15 %) and TTFT (33 %); end to end between the two; gaps between tokens as TTFT, assumed.
_UNSEEN_LOG_SIGMA = {"tpot": 0.22, "ttft": 0.5, "itl": 0.5, "e2e": 0.35}
_UNSEEN_RATE = 0.22
#: Gaps below this are between tokens of one network packet, not between steps. [ms]
_LEAST_GAP_MS = 0.1
#: column -> (quantity, latency's metric and statistic). A statistic that the source does not name is taken as the mean:
#: TTFT of InferenceX's closed loops grows with the burst of first prompts, which a median of ten rounds does not see.
_STATISTICS = {"mean": "mean", "median": "p50", "p99": "p99", "unspecified": "mean"}
_LATENCIES = {
    f"{metric}_ms_{statistic}": (f"{metric}_{statistic}", metric, _STATISTICS[statistic])
    for metric in ("ttft", "tpot", "itl", "e2e")
    for statistic in _STATISTICS
}


def is_serving_table(table: Table) -> bool:
    """Whether a table is in the serving schema."""
    return set(table.columns) >= _NEEDED


def compare(table: Table, only: frozenset[str] | None = None) -> Outcome:
    """Predict every row of a serving table that can be predicted; ``only``: those of these source ids."""
    return _compare(table, _numbered(table, only))


def compare_unseen(table: Table, only: frozenset[str] | None = None) -> Outcome:
    """As `compare`, each row with its own model left out of the engine times; nothing is counted as skipped."""
    by_model: dict[str, list[tuple[int, Row]]] = defaultdict(list)
    for line, row in _numbered(table, only):
        by_model[text(row, "model")].append((line, row))
    outcome = Outcome()
    for name, rows in by_model.items():
        try:
            model = model_named(name)
        except Unspoken:
            continue
        with left_out(model.name):
            found = _compare(table, rows)
        outcome.skipped_rows |= found.skipped_rows
        outcome.comparisons += [replace(c, group=c.group + SUFFIX, file=c.file + SUFFIX) for c in found.comparisons]
    return outcome


def _numbered(table: Table, only: frozenset[str] | None) -> Iterator[tuple[int, Row]]:
    for line, row in enumerate(rows_of(table), start=2):
        if only is None or text(row, "source_id") in only:
            yield line, row


def _compare(table: Table, rows: Iterable[tuple[int, Row]]) -> Outcome:
    source, file = stem(table.path), table.path.name
    lines = []
    phases = Outcome()
    for line, row in rows:
        group = "/".join((source, *(text(row, name) for name in ("model", "gpu", "engine")))) + group_of(row)
        if is_phase_row(row):
            compare_row(row, file, line, group, phases)
        else:
            lines.append((line, row, group, partial(describe, row)))
    outcome = compare_runs(file, lines)
    outcome.extend(phases)
    return outcome


def compare_runs(file: str, lines: Iterable[tuple[int, Row, str, Callable[[], Run]]]) -> Outcome:
    """Predict runs.

    Parameters
    ----------
    file : name the figures are filed under.
    lines : line in the file, measured figures under the columns of the serving schema, group, and what tells the run
        (which may raise `Unspoken` or a `SimmoeError`: then the line is counted with the reason).
    """
    outcome = Outcome()
    runs: dict[int, Run] = {}
    for line, row, group, told in lines:
        try:
            run = told()
            metrics, sigma, notes = solve(run)
        except (Unspoken, SimmoeError) as problem:
            outcome.skip(reason(problem), row=text(row, "source_id"))
            continue
        runs[line] = run
        outcome.notes |= dict.fromkeys(notes)
        found = figures(row, metrics, run)
        if not found:
            outcome.skip("no measured throughput or latency in the row", row=text(row, "source_id"))
        for quantity, measured, predicted in found:
            unseen = _UNSEEN_LOG_SIGMA.get(quantity.split("_")[0], _UNSEEN_RATE)
            band = log_normal_interval(predicted, math.hypot(sigma, unseen))
            source = text(row, "source_id")
            outcome.comparisons.append(Comparison(group, file, line, source, quantity, measured, predicted, *band))
    outcome.explainers[file] = lambda line, quantity, predicted: (
        of_step(runs[line], quantity, predicted) if line in runs else None
    )
    return outcome


def rows_of(table: Table) -> Iterator[dict[str, object]]:
    """Rows as mappings from column to cell, and under `BESIDE` the table's folder."""
    columns = {name: table.text(name) if column.dtype.kind != "f" else column for name, column in table.columns.items()}
    for index in range(table.rows):
        yield {name: column[index] for name, column in columns.items()} | {BESIDE: str(table.path.parent)}


def solve(run: Run, *, seed: int = 0) -> tuple[ServingMetrics, float, tuple[str, ...]]:
    """Metrics of a run, the log spread of its mean step, and the notes of its kernel times."""
    if run.decode is not None:
        return _solve_pools(run, run.decode, seed)
    parts = compiled_for(run.hardware, run.model, run.deployment, run.workload)
    tokens = parts.memory.kv_tokens
    curve = load_curve(parts.table, run.deployment, run.workload, tokens, run.policy)
    if run.requests is not None:
        metrics = simulate(
            parts.table,
            run.workload,
            run.deployment,
            tokens,
            requests=run.requests,
            seed=seed,
            warmup=0.0,
            keep_load=False,
            policy=run.policy,
            front_end=parts.engine.parameters,
        ).metrics
    else:
        metrics, _ = steady_state(curve, run.deployment, run.workload, tokens, parts.engine.parameters)
    sigma = mean_step(parts.table, curve, metrics, run.deployment, run.workload).log_sigma
    metrics = chat_flood.later(_seen(metrics, parts, run), chat_flood.before_flood_s(run))
    return metrics, sigma, tuple(parts.engine.times.notes)


def _seen(metrics: ServingMetrics, parts: Compiled, run: Run) -> ServingMetrics:
    """Metrics at the client; each replica that takes requests in has a front end."""
    return delayed(metrics, parts.engine.parameters, run.workload.input.mean, run.deployment.replicas)


def _solve_pools(run: Run, decode: Deployment, seed: int) -> tuple[ServingMetrics, float, tuple[str, ...]]:
    """As `solve`, prompts in one pool and outputs in another."""
    prefill, decoding = (compiled_for(run.hardware, run.model, d, run.workload) for d in (run.deployment, decode))
    rule = Disaggregation(decode=decode)
    setup = PoolSetup(table=decoding.table, deployment=decode, kv_tokens=decoding.memory.kv_tokens)
    metrics = simulate(
        prefill.table,
        run.workload,
        run.deployment,
        prefill.memory.kv_tokens,
        requests=run.requests,
        seed=seed,
        warmup=0.0,
        keep_load=False,
        front_end=prefill.engine.parameters,
        handover=Handover(decode=setup, transfer=transfer_of(run.model, run.deployment, rule, run.hardware)),
    ).metrics
    tokens = decoding.memory.kv_tokens
    curve = load_curve(decoding.table, decode, run.workload, tokens)
    sigma = mean_step(decoding.table, curve, metrics, decode, run.workload).log_sigma
    notes = (*prefill.engine.times.notes, *decoding.engine.times.notes)
    return _seen(metrics, prefill, run), sigma, notes


def figures(row: Mapping[str, object], metrics: ServingMetrics, run: Run) -> list[tuple[str, float, float]]:
    """(quantity, measured, predicted) of a row: rates per second, latencies in milliseconds."""
    found = []
    gpus = run.gpus
    rates = {
        "output_tokens_per_s": metrics.output_tokens_per_s,
        "total_tokens_per_s": metrics.total_tokens_per_s,
        "requests_per_s": metrics.requests_per_s,
    }
    for name, predicted in rates.items():
        measured = number(row, name) or (number(row, f"{name}_per_gpu") or 0.0) * gpus
        # one throughput a row: output if it is there, else total, else requests
        if measured > 0:
            found.append((name, measured, predicted))
            break
    for column, (quantity, metric, statistic) in _LATENCIES.items():
        measured = number(row, column) or 0.0
        if measured > (_LEAST_GAP_MS if metric == "itl" else 0.0):
            chunk = run.tokens_per_chunk if metric == "itl" else 1.0
            found.append((quantity, measured, 1e3 * chunk * float(getattr(getattr(metrics, metric), statistic))))
    return found
