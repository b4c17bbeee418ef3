"""A scenario simulated: step table from the engine, runs of the event simulation, what a client sees of them.

Adds to `sim.cluster.simulate` what needs the model and the engine: KV capacity, transfer between pools, the front end's
delay (`front_end`), replications, and whether the load could be carried at all. Gaps between tokens are the engine's.
Left out: an interval for errors of the step times themselves; `simmoe predict` gives that one.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from simmoe.costs.kv_offload import host_tier_of
from simmoe.costs.memory import MemoryFootprint
from simmoe.engine.step import Batch, StepTable
from simmoe.errors import SaturationError, SpecError
from simmoe.metrics import Quantiles, RequestTable, ServingMetrics, meets
from simmoe.output_analysis import batch_means_interval, t_interval
from simmoe.predict import Compiled, compiled_for
from simmoe.provenance import Provenance, stamp
from simmoe.series import Series, StageMetrics, interval_series, stage_metrics
from simmoe.sim.cluster import SimulationResult, simulate
from simmoe.sim.disaggregated import Handover, transfer_of
from simmoe.sim.failures import losses_per_request
from simmoe.sim.offload_books import bookkeeping_of
from simmoe.sim.pool import PoolSetup
from simmoe.specs.engines import EngineParameters, release_note
from simmoe.specs.load import calibration_of
from simmoe.specs.model import Model
from simmoe.specs.routing import Routing
from simmoe.specs.scenario import Scenario
from simmoe.specs.traces import read_trace
from simmoe.specs.workload import Workload
from simmoe.steady.front_end import at_client
from simmoe.steady.load_curve import load_curve, saturation_requests_per_s
from simmoe.units import text

#: Measured requests of an endless workload if nothing is said.
DEFAULT_REQUESTS = 2000
_INTERVALS = 60
#: A request alone that is lost more often than this before it ends makes runs that hardly end. [-]
MOST_LOSSES = 20
#: A rate this many times what can be carried is refused unless it ends. [-]
_HOPELESS = 1000.0


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """What came out of a scenario.

    Attributes
    ----------
    runs : one per replication, with seeds from ``scenario.run.seed`` on.
    metrics : means over the runs, as a client sees them; intervals across runs, or of batch means in a single one.
    memory : KV capacity and weights of a replica (of the prefill pool, if there are two).
    overloads : where in the first run of an open loop the queue kept growing, one line each.
    notes : what the step times rest on, and what is particular about the run.
    """

    scenario: Scenario
    runs: tuple[SimulationResult, ...]
    metrics: ServingMetrics
    memory: MemoryFootprint
    engine_parameters: EngineParameters
    overloads: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def saturated(self) -> bool:
        """Whether the load was more than could be carried, throughout or in a stage."""
        return bool(self.overloads)

    @property
    def ends(self) -> bool:
        """Whether traffic ends (stages, a trace's own arrivals, ``run.drain``), so that a queue is worked off."""
        return self.scenario.run.drain or _ends(self.scenario.workload)

    @property
    def measured(self) -> RequestTable:
        """Requests measured in the first run."""
        return _measured(self.runs[0])

    @cached_property
    def series(self) -> Series:
        """Over the first run, in the intervals asked for or 60 equal ones."""
        run = self.runs[0]
        width = self.scenario.run.interval or run.end_s / _INTERVALS
        edges = width * np.arange(0, max(1, math.ceil(run.end_s / width)) + 1, dtype=np.float64)
        return interval_series(run.requests.accepted(), run.steps, edges, sum(run.kv_blocks), len(run.kv_blocks))

    @cached_property
    def stages(self) -> list[StageMetrics]:
        """Per stage of staged arrivals or of a trace that has stages; else none."""
        edges = self.stage_edges_s
        return stage_metrics(self.measured, self.runs[0].steps, edges) if edges else []

    @property
    def stage_edges_s(self) -> list[float]:
        """Where the stages begin, and the last ends; none if there are no stages. [s]"""
        return _stage_edges(self.scenario.workload)

    @cached_property
    def provenance(self) -> Provenance:
        """Version, digests of what went in, seed."""
        s = self.scenario
        parts = {name: getattr(s, name) for name in ("hardware", "model", "deployment", "workload", "cluster", "run")}
        return stamp(parts, calibration=calibration_of(s.hardware), seed=s.run.seed)


def run_scenario(
    scenario: Scenario, done: Callable[[int, int], None] = lambda _, __: None, *, every_step: bool = False
) -> Simulated:
    """Simulate a scenario.

    Parameters
    ----------
    done : told the number of runs finished and of all runs, after each.
    every_step : whether runs keep every step however many there are, as a trace needs.

    Raises
    ------
    CapacityError
        If weights, or every request, do not fit.
    SpecError
        If the specs contradict each other.
    """
    s, plan = scenario, scenario.run
    parts = compiled_for(s.hardware, s.model, s.deployment, s.workload)
    _check_failures(s, parts.table)
    _check_overload(s, parts)
    handover = _handover(s)
    requests = plan.requests
    if requests is None and plan.duration is None and not _ends(s.workload):
        requests = DEFAULT_REQUESTS
    parameters = parts.engine.parameters
    runs = []
    for i in range(plan.replications):
        runs.append(
            simulate(
                parts.table,
                s.workload,
                s.deployment,
                parts.memory.kv_tokens,
                requests=requests,
                duration_s=plan.duration,
                seed=plan.seed + i,
                warmup=plan.warmup,
                keep_load=not plan.drain,
                cluster=s.cluster,
                handover=handover,
                tier=host_tier_of(s.model, s.deployment, s.hardware),
                bookkeeping=bookkeeping_of(s.model, s.deployment, parameters),
                front_end=parameters,
                every_step=every_step,
            )
        )
        done(i + 1, plan.replications)
    beyond = _beyond_context(runs[0], s.model)
    seen = [_as_seen(run, s, parameters) for run in runs]
    return Simulated(
        scenario=s,
        runs=tuple(runs),
        metrics=seen[0] if len(seen) == 1 else averaged(seen),
        memory=parts.memory,
        engine_parameters=parameters,
        overloads=tuple(_overloads(runs[0], s.workload)),
        notes=(*_notes(s, runs), *beyond, *parts.engine.times.notes),
    )


def _check_failures(s: Scenario, table: StepTable) -> None:
    """SpecError if replicas fail so often that requests are hardly ever served to their end."""
    if s.cluster.failures is None:
        return
    prompt, output = s.workload.input.mean, s.workload.output.mean
    context = round(prompt + output / 2)
    chunk = min(context, table.max_tokens)
    prompt_s = context / chunk * table.step_s(Batch(0, 0, ((chunk, 0),)))
    steps = (output - 1) / float(s.deployment.tokens_per_decode)
    output_s = steps * table.decode_s(1, context)
    lost = losses_per_request(s.cluster.failures, prompt_s, output_s)
    if lost > MOST_LOSSES:
        raise SpecError(
            f"cluster.failures.mean_time_between: {text(s.cluster.failures.mean_time_between, 's')} is too short: a "
            f"request of {prompt:.4g} input and {output:.4g} output tokens takes {text(prompt_s + output_s, 's')} "
            f"alone and would be lost {lost:.3g} times before it ends; give that long at least"
        )


def _beyond_context(run: SimulationResult, model: Model) -> tuple[str, ...]:
    """A note on requests longer than the model's context; SpecError if all are."""
    longest = run.requests.input_tokens + run.requests.output_tokens
    if model.max_context is None or not (beyond := longest > model.max_context).any():
        return ()
    which = "all" if beyond.all() else f"{int(beyond.sum())} of {beyond.size}"
    said = (
        f"{which} requests exceed the {model.max_context} tokens of context {model.name} has, with up to "
        f"{longest.max():.0f} tokens (input and output)"
    )
    if beyond.all():
        raise SpecError(said)
    return (f"{said}; a server would refuse them",)


def _check_overload(s: Scenario, parts: Compiled) -> None:
    """Refuse a rate of which nearly all would only queue: so many arrivals, played to the end, take for ever."""
    rate, d = s.workload.rate, s.deployment
    if rate is None or s.run.drain or _ends(s.workload):
        return
    replicas = max(d.replicas, s.cluster.autoscaling.maximum if s.cluster.autoscaling else 0)
    most = replicas * saturation_requests_per_s(load_curve(parts.table, d, s.workload, parts.memory.kv_tokens))
    if rate > _HOPELESS * most:
        raise SaturationError(
            f"rate {rate:g} request/s is more than {_HOPELESS:g} times what can be carried, about {most:.4g}; lower "
            "it, or give --drain (run: {drain: true}), which stops traffic after the last request measured"
        )


def averaged(metrics: Sequence[ServingMetrics]) -> ServingMetrics:
    """Means over independent runs, with 90 % intervals across them (Student's t)."""
    values: dict[str, object] = {}
    for field in dataclasses.fields(ServingMetrics):
        column = [getattr(m, field.name) for m in metrics]
        if isinstance(column[0], Quantiles):
            values[field.name] = _mean_quantiles([(q.mean, q.p50, q.p90, q.p99) for q in column])
        elif isinstance(column[0], float):
            values[field.name] = float(np.mean(column))
        elif field.name == "requests":
            values[field.name] = sum(column)
    scalars = {
        "ttft": [m.ttft.mean for m in metrics],
        "tpot": [m.tpot.mean for m in metrics],
        "itl": [m.itl.mean for m in metrics],
        "e2e": [m.e2e.mean for m in metrics],
        "ttft_p99": [m.ttft.p99 for m in metrics],
        "tpot_p99": [m.tpot.p99 for m in metrics],
        "e2e_p99": [m.e2e.p99 for m in metrics],
        "output_tokens_per_s": [m.output_tokens_per_s for m in metrics],
        "requests_per_s": [m.requests_per_s for m in metrics],
    }
    values["interval_90"] = {name: t_interval(np.array(column)) for name, column in scalars.items()}
    values["notes"] = tuple(dict.fromkeys(note for m in metrics for note in m.notes))
    return ServingMetrics(**values)  # type: ignore[arg-type]


def _mean_quantiles(points: Sequence[tuple[float, ...]]) -> Quantiles:
    mean, p50, p90, p99 = np.mean(points, axis=0).tolist()
    return Quantiles(mean=mean, p50=p50, p90=p90, p99=p99)


def _as_seen(run: SimulationResult, s: Scenario, parameters: EngineParameters) -> ServingMetrics:
    """Metrics with the front end's delay, a front end per replica; goodput counts it too."""
    engine = run.metrics
    if not engine.requests:
        return engine
    measured = _measured(run)
    kept = measured.part(len(measured) - engine.requests, len(measured))
    decoding = s.cluster.disaggregation.decode if s.cluster.disaggregation else s.deployment
    seen = at_client(kept, run.steps, parameters, decoding.dp)
    tpot_s = seen.tpot_s[seen.output_tokens > 1]
    latencies = {"ttft": seen.ttft_s, "tpot": tpot_s, "e2e": seen.e2e_s}
    intervals = {name: batch_means_interval(values) for name, values in latencies.items()}
    goodput = engine.goodput_requests_per_s
    if s.workload.objective is not None:
        goodput = engine.requests_per_s * float(meets(seen, s.workload.objective).mean())
    return dataclasses.replace(
        engine,
        ttft=Quantiles.of(seen.ttft_s),
        tpot=Quantiles.of(tpot_s),
        e2e=Quantiles.of(seen.e2e_s),
        interval_90=engine.interval_90 | {name: pair for name, pair in intervals.items() if pair is not None},
        goodput_requests_per_s=goodput,
    )


def _measured(run: SimulationResult) -> RequestTable:
    served = run.requests.accepted()
    return served.part(0, int(np.searchsorted(served.request, run.measured)))


def _overloads(run: SimulationResult, workload: Workload) -> list[str]:
    """A line wherever the queue clearly grew, in stretches of constant load.

    Looked at: the second half of the measured arrivals, or of each stage. Clearly: more came than left the queue (had
    their first token) by 5 % and by three standard deviations of a Poisson count; a steady queue gains nothing on
    average. Ends would lag while a server fills.
    """
    measured = _measured(run)
    if not workload.open_loop or len(measured) < 2 or workload.arrivals.kind == "diurnal":
        return []
    edges = _stage_edges(workload) or [0.0, float(measured.arrival_s[-1])]
    served = run.requests.accepted()
    found = []
    for start, end in itertools.pairwise(edges):
        middle = (start + end) / 2
        came = int(((served.arrival_s > middle) & (served.arrival_s <= end)).sum())
        left = int(((served.first_token_s > middle) & (served.first_token_s <= end)).sum())
        if came - left > max(0.05 * came, 3 * math.sqrt(came)):
            offered, carried = came / (end - middle), left / (end - middle)
            found.append(
                f"SATURATED from {text(start, 's')} to {text(end, 's')}: {offered:.4g} requests/s come, {carried:.4g} "
                "are served; the queue grows as long as such load lasts, so latencies depend on the length of the run"
            )
    return found


def _ends(workload: Workload) -> bool:
    return workload.open_loop and (workload.rate is None or bool(workload.arrivals.stages))


def _handover(s: Scenario) -> Handover | None:
    rule = s.cluster.disaggregation
    if rule is None:
        return None
    parts = compiled_for(s.hardware, s.model, rule.decode, s.workload)
    setup = PoolSetup(
        table=parts.table,
        deployment=rule.decode,
        kv_tokens=parts.memory.kv_tokens,
        tier=host_tier_of(s.model, rule.decode, s.hardware),
        bookkeeping=bookkeeping_of(s.model, rule.decode, parts.engine.parameters),
    )
    return Handover(decode=setup, transfer=transfer_of(s.model, s.deployment, rule, s.hardware))


def _stage_edges(workload: Workload) -> list[float]:
    if workload.arrivals.stages:
        ends = np.cumsum([stage.duration for stage in workload.arrivals.stages]).tolist()
        return [0.0, *ends]
    if workload.trace is not None and workload.rate is None and workload.open_loop:
        trace = read_trace(workload.trace)
        if trace.stage is not None and trace.arrival_s is not None and len(set(trace.stage.tolist())) > 1:
            changes = np.flatnonzero(np.diff(trace.stage)) + 1
            starts = trace.arrival_s[np.concatenate([[0], changes])] / workload.trace.speed
            return [*starts.tolist(), float(trace.arrival_s[-1]) / workload.trace.speed + 1e-9]
    return []


def _notes(s: Scenario, runs: Sequence[SimulationResult]) -> list[str]:
    notes = [f"scheduling policy {runs[0].policy}, router {s.cluster.router}"]
    if s.deployment.engine == "generic":
        notes[0] += " (an engine called generic schedules as vLLM does)"
    if s.model.experts is not None and s.deployment.routing != Routing():
        notes.append(f"routing {s.deployment.routing.in_words()}")
    if release := release_note(s.deployment, s.hardware.device.name):
        notes.append(release)
    if refused := sum(run.refused for run in runs):
        notes.append(f"{refused} requests refused: longer than the KV cache")
    if preempted := sum(run.preemptions for run in runs):
        notes.append(
            f"{preempted} preemptions (or losses in a failure); tokens not kept in host memory are computed again"
        )
    if found := sum(run.found_tokens for run in runs):
        notes.append(f"{found:,} prompt tokens found in the prefix cache")
    if loaded := sum(run.loaded_tokens for run in runs):
        notes.append(f"{loaded:,} tokens loaded from host memory, of prompts found there or preempted requests")
    if (rule := s.cluster.autoscaling) is not None:
        most = rule.maximum * s.deployment.devices_per_replica
        notes.append(
            f"autoscaling: {s.deployment.replicas} replica{'s' * (s.deployment.replicas > 1)} at the start, by load "
            f"{rule.minimum} to {rule.maximum}, so up to {most} devices"
        )
    if failed := sum(run.failures for run in runs):
        notes.append(f"{failed} failures of replicas")
    if s.workload.trace is not None:
        trace = read_trace(s.workload.trace)
        if trace.dropped:
            notes.append(f"trace: {trace.dropped} rows without an output left out")
        if trace.filled:
            notes.append(f"trace: {trace.filled} failed requests given the median output length")
    return notes
