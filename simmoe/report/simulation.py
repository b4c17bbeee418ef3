"""A simulated scenario as text for people and as JSON for scripts."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from simmoe import units
from simmoe.report.text import metrics_json, metrics_table, pair, without_nan
from simmoe.simulation import Simulated
from simmoe.specs.deployment import Deployment
from simmoe.specs.traces import offered_per_s
from simmoe.specs.workload import Workload


def layout_text(d: Deployment) -> str:
    """Devices' part in the work, in words."""
    return (
        f"(tp {d.tp_size}, ep {d.ep}, dp {d.dp}, pp {d.pp}, {d.replicas} replica{'s' * (d.replicas > 1)}), "
        f"engine {d.engine}{f' {d.engine_version}' if d.engine_version else ''}"
        f"{f', speculative decoding ({d.speculative.in_words()})' if d.speculative else ''}"
    )


def title(result: Simulated) -> str:
    """The run in two lines: model, devices and layout; the load."""
    s = result.scenario
    return (
        f"{s.model.name} on {s.deployment.gpus} x {s.hardware.device.name} {layout_text(s.deployment)}\n"
        f"{load_text(s.workload)}; {s.workload.input.mean:.4g} input and {s.workload.output.mean:.4g} output tokens "
        f"({s.workload.input.kind}/{s.workload.output.kind})"
    )


def table(result: Simulated) -> RenderableType:
    """The answer to `simmoe simulate`: what was assumed, rates, latencies, stages, notes."""
    s, m = result.scenario, result.metrics
    apart = s.cluster.disaggregation
    decoding = f"decoding apart on {apart.decode.gpus} devices {layout_text(apart.decode)}\n" if apart else ""
    head = Text(
        f"{title(result)}\n"
        f"{decoding}"
        f"{m.requests} requests measured in {len(result.runs)} run{'s' * (len(result.runs) > 1)} of "
        f"{units.text(result.runs[0].end_s, 's')}, seed {s.run.seed}\n"
    )
    rates = Table(show_edge=False, pad_edge=False, show_header=False)
    rates.add_column()
    rates.add_column(justify="right")
    rates.add_column()
    for label, value, key in (
        ("requests/s", f"{m.requests_per_s:,.4g}", "requests_per_s"),
        ("output tokens/s", f"{m.output_tokens_per_s:,.0f}", "output_tokens_per_s"),
        ("input + output tokens/s", f"{m.total_tokens_per_s:,.0f}", ""),
        ("requests running / waiting", f"{m.mean_running:,.1f} / {m.mean_waiting:,.1f}", ""),
        ("mean step", units.text(m.mean_step_s, "s"), ""),
        ("KV blocks used", f"{100 * m.kv_utilisation:.2g} %", ""),
        ("time in steps", f"{100 * m.utilisation:.3g} %", ""),
    ):
        interval = m.interval_90.get(key)
        rates.add_row(label, value, f"90 %: {_rate(interval[0])} .. {_rate(interval[1])}" if interval else "")
    if s.cluster.autoscaling is not None or s.cluster.failures is not None:
        run = result.runs[0]
        most = max(count for _, count in run.scaling)
        rates.add_row("replicas on, mean / most", f"{run.replica_s / run.end_s:.3g} / {most}", "")
    if m.goodput_requests_per_s is not None:
        rates.add_row("goodput, requests/s", f"{m.goodput_requests_per_s:,.4g}", "")
    parts: list[RenderableType] = [head, rates, Text(""), metrics_table(m)]
    named = [(name, m.interval_90[name]) for name in ("ttft", "tpot", "e2e") if name in m.interval_90]
    if named:
        # of few batches an interval reaches below 0, where no latency is
        shown = ", ".join(
            f"{n.upper()} {units.text(max(0.0, lo), 's')} .. {units.text(hi, 's')}" for n, (lo, hi) in named
        )
        source = "across runs" if len(result.runs) > 1 else "batch means"
        parts.append(Text(f"means within (90 %, {source}, of queueing only): {shown}"))
    if result.stages:
        parts += [Text(""), _stages(result)]
    parts[1:1] = [Text(note + "\n", style="bold red") for note in result.overloads]
    lines = [Text(f"  - {note}") for note in result.notes]
    return Group(*parts, Text("\nNotes:"), *lines)


def load_text(workload: Workload) -> str:
    """The load in words."""
    if workload.concurrency is not None:
        pause = f", think time {units.text(workload.think_time, 's')}" if workload.think_time else ""
        return f"closed loop, {workload.concurrency} clients{pause}"
    rate = offered_per_s(workload)
    said = f"{rate:.4g} requests/s" if rate else "one request"
    if workload.trace is not None and workload.rate is None:
        return f"open loop, {said} as in {workload.trace.path}"
    return f"open loop, {said} ({workload.arrivals.kind.replace('_', '-')})"


def _stages(result: Simulated) -> Table:
    found = Table(title="stages (engine times)", title_justify="left", show_edge=False, pad_edge=False)
    for column in ("from", "to", "requests", "offered/s", "output tokens/s", "TTFT p50 / p99", "TPOT p50 / p99"):
        found.add_column(column, justify="right")
    for stage in result.stages:
        found.add_row(
            units.text(stage.start_s, "s"),
            units.text(stage.end_s, "s"),
            str(stage.requests),
            f"{stage.arrivals_per_s:.4g}",
            f"{stage.output_tokens_per_s:,.0f}",
            *(pair(q) for q in (stage.ttft, stage.tpot)),
        )
    return found


def _rate(value: float) -> str:
    """A bound on a rate; of few batches an interval reaches below 0, where no rate is."""
    value = max(0.0, value)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def to_json(result: Simulated) -> dict[str, Any]:
    """The same as plain data, SI units, unit in each name; deterministic for a scenario."""
    s = result.scenario
    run = result.runs[0]
    series = {name: _plain(column) for name, column in dataclasses.asdict(result.series).items()}
    plain: dict[str, Any] = {
        "scenario": s.name,
        "hardware": s.hardware.name,
        "model": s.model.name,
        "deployment": s.deployment.model_dump(mode="json"),
        "workload": s.workload.model_dump(mode="json"),
        "cluster": s.cluster.model_dump(mode="json"),
        "run": s.run.model_dump(mode="json"),
        "engine_parameters": result.engine_parameters.model_dump(mode="json"),
        "saturated": result.saturated,
        "offered_requests_per_s": offered_per_s(s.workload),
        "metrics": metrics_json(result.metrics),
        "stages": [_stage_json(stage) for stage in result.stages],
        "series": series,
        "refused": sum(r.refused for r in result.runs),
        "preemptions": sum(r.preemptions for r in result.runs),
        "found_tokens": sum(r.found_tokens for r in result.runs),
        "loaded_tokens": sum(r.loaded_tokens for r in result.runs),
        "failures": sum(r.failures for r in result.runs),
        "replica_time_s": run.replica_s,
        "replicas_on": [list(change) for change in run.scaling],
        "kv_capacity_tokens": result.memory.kv_tokens,
        "duration_s": run.end_s,
        "notes": [*result.overloads, *result.notes],
        "provenance": result.provenance.to_dict(),
    }
    cleaned: dict[str, Any] = without_nan(plain)
    return cleaned


def _stage_json(stage: Any) -> dict[str, Any]:
    plain = dataclasses.asdict(stage)
    for name in ("ttft", "tpot", "e2e"):
        plain[f"{name}_s"] = plain.pop(name)
    return plain


def _plain(column: Any) -> list[float]:
    return [float(x) for x in column]
