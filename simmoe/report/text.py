"""Results as text for people and as JSON for scripts. Numbers get their units here, and only here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from simmoe import quality, units
from simmoe.metrics import Quantiles, ServingMetrics
from simmoe.predict import Prediction
from simmoe.specs.engines import releases

#: Printed wherever the cap varies, above the measured scores.
QUALITY_NOTE = "Fewer active experts is not free: quality falls with k."


def prediction_table(predictions: Sequence[Prediction], newest: Prediction | None = None) -> RenderableType:
    """The answer to `simmoe predict`: assumptions, a row per cap, the mean step, how sure, what extrapolates.

    ``newest`` is the first prediction with the engine's newest version, where another was asked for.
    """
    first = predictions[0]
    parts: list[RenderableType] = [_assumptions(first), _caps(predictions), _breakdown(predictions), _confidence(first)]
    if first.model.experts is not None and len(predictions) > 1:
        parts.append(quality_table(predictions))
    parts.append(Text(f"Engine: {_version_told(first, newest)}\nEngine times: {first.engine_parameters.source}"))
    if first.notes:
        parts.append(Text("Coverage:\n" + "\n".join(f"  - {note}" for note in _merged(predictions))))
    return Group(*parts)


def quality_table(predictions: Sequence[Prediction]) -> RenderableType:
    """Measured scores per cap; for a model nobody measured, the range others spanned, said to be theirs."""
    first = predictions[0]
    assert first.model.experts is not None
    if first.deployment.routing.varies_k:
        return Text(
            f"{QUALITY_NOTE}\n  k that varies from token to token or layer to layer: not measured", style="yellow"
        )
    rows = {p.active_experts: _scores(p) for p in predictions}
    benchmarks = list(dict.fromkeys(score.curve.benchmark for row in rows.values() for score in row))
    if not benchmarks:
        native = first.model.experts.top_k
        lines = [
            f"k={p.active_experts}: {quality.in_words(p.model.name, active_experts=p.active_experts, native=native)}"
            for p in predictions
            if p.active_experts != native
        ]
        return Text(f"{QUALITY_NOTE}\n  " + "\n  ".join(lines), style="yellow")
    table = Table(
        title=f"{QUALITY_NOTE} Scores [% correct]",
        title_justify="left",
        show_edge=False,
        pad_edge=False,
        header_style="bold",
    )
    table.add_column("active experts", justify="right")
    for benchmark in benchmarks:
        table.add_column(benchmark, justify="right")
    for cap, row in rows.items():
        by_name = {score.curve.benchmark: score for score in row}
        cells = [
            f"{by_name[b].score:.1f}{'' if by_name[b].measured else '*'}" if b in by_name else "-" for b in benchmarks
        ]
        table.add_row(f"k={cap}", *cells)
    sources = dict.fromkeys(score.curve.source for row in rows.values() for score in row)
    groups = dict.fromkeys(score.curve.group for row in rows.values() for score in row)
    caption = f"Measured for {first.model.name}: {'; '.join(sources)}. *: between measured points; -: not measured."
    if tuple(groups) == (quality.ZERO_SHOT,):
        caption += " Reasoning and code fall earlier (arXiv 2511.02237)."
    table.caption = caption
    return table


def _scores(p: Prediction) -> tuple[quality.Score, ...]:
    d = p.deployment
    if d.routing.varies_k:
        return ()
    refill = d.routing.refill_to is not None
    return quality.scores(
        p.model.name,
        active_experts=None if refill else p.active_experts,
        refill_from=p.active_experts if refill else None,
        total_experts=d.total_experts,
    )


def _version_told(p: Prediction, newest: Prediction | None) -> str:
    """Which version was predicted, and what it changes."""
    d = p.deployment
    around = f"times around kernels are those of {releases(d, p.hardware.device.name)}"
    if newest is None:
        return f"{d.engine} as its newest known version runs (--engine-version gives another); {around}"
    percent = 100 * (_output_rate(p) / _output_rate(newest) - 1)
    where = "" if p.workload.concurrency is not None else " where both saturate"
    return (
        f"{d.engine} {d.engine_version}: {percent:+.1f} % output tokens/s{where} against the newest known version (the "
        f"default), by its kernels and the times around them; {around}"
    )


def _output_rate(p: Prediction) -> float:
    """Output rate that a setting changes: in an open loop, the most that can be carried. [tokens/s]"""
    if p.metrics and p.workload.concurrency is not None:
        return p.metrics.output_tokens_per_s
    return p.saturation_output_tokens_per_s


def _merged(predictions: Sequence[Prediction]) -> list[str]:
    return list(dict.fromkeys(note for prediction in predictions for note in prediction.notes))


def _assumptions(p: Prediction) -> Text:
    d, w = p.deployment, p.workload
    layout = f"tp {d.tp_size}" + (f", ep {d.ep}" if d.ep > 1 else "") + (f", dp {d.dp}" if d.dp > 1 else "")
    layout += f", pp {d.pp}" if d.pp > 1 else ""
    closed = f"closed loop, {w.concurrency} requests in flight"
    load = f"open loop, {w.rate:g} requests/s (Poisson)" if w.rate else closed
    precision = d.weight_precision or p.model.native_precision
    e = p.engine_parameters
    speculation = "no speculative decoding"
    if d.speculative is not None:
        speculation = f"speculative decoding ({d.speculative.in_words()})"
    routing = f"routing {d.routing.in_words()}, " if p.model.experts is not None else ""
    return Text(
        f"{p.model.name} on {d.gpus} x {p.hardware.device.name} "
        f"({layout}, {d.replicas} replica{'s' * (d.replicas > 1)}), "
        f"weights {precision}, KV {d.kv_precision}, engine {d.engine}"
        f"{f' {d.engine_version}' if d.engine_version else ''}\n"
        f"{load}; {w.input.mean:g} input and {w.output.mean:g} output tokens ({w.input.kind}/{w.output.kind}); "
        f"at most {d.max_num_seqs} requests and {d.max_num_batched_tokens} tokens a step per data-parallel rank\n"
        f"Assumed: {routing}no prefix-cache hits, {speculation}; engine host time "
        f"{units.text(e.host_time_per_step, 's')} a step + {units.text(e.host_time_per_sequence, 's')} a request, "
        f"kernels x {e.kernel_slowdown:g}\n{_busiest(p)}"
    )


def _busiest(p: Prediction) -> str:
    found = p.busiest_rank
    if found is None:
        return ""
    return (
        f"Busiest of {p.deployment.ep} expert-parallel ranks: {found.mean:.2f} times the mean in a decode step, "
        f"{found.tail:.2f} in one of a hundred, {found.systematic:.2f} however many tokens\n"
    )


def _caps(predictions: Sequence[Prediction]) -> Table:
    table = Table(title=None, show_edge=False, pad_edge=False, header_style="bold")
    native = predictions[0].model.experts.top_k if predictions[0].model.experts else 0
    open_loop = predictions[0].workload.rate is not None
    table.add_column("active\nexperts", justify="right")
    table.add_column("output\ntokens/s", justify="right")
    table.add_column("90 % interval\ntokens/s", justify="right")
    table.add_column("gain over\nnative k", justify="right")
    if open_loop:
        table.add_column("saturates at\ntokens/s", justify="right")
    table.add_column("TTFT p50 / p99", justify="right")
    table.add_column("TPOT p50 / p99", justify="right")
    table.add_column("memory\nper GPU", justify="right")
    table.add_column("bound by")
    for p in predictions:
        label = str(p.active_experts or "dense") + (" (native)" if p.active_experts == native and native else "")
        gain = _gain(p, predictions)
        cells = [label, f"{p.metrics.output_tokens_per_s:,.0f}" if p.metrics else "saturated"]
        cells += [f"{p.throughput_90[0]:,.0f} .. {p.throughput_90[1]:,.0f}"]
        cells += ["-" if gain is None else f"{100 * gain:+.1f} %"]
        if open_loop:
            cells.append(f"{p.saturation_output_tokens_per_s:,.0f}")
        if p.metrics:
            cells += [pair(p.metrics.ttft), pair(p.metrics.tpot)]
        else:
            cells += ["grows", "-"]
        cells += [_gb(p.memory_used_bytes), p.bound]
        table.add_row(*cells)
    if open_loop:
        table.caption = "gain: of the saturation throughput"
    return table


def _gain(p: Prediction, predictions: Sequence[Prediction]) -> float | None:
    """Throughput over that with the native top-k, less 1; in an open loop, of the saturation throughput. [-]

    None if no prediction is native.
    """
    native = p.model.experts.top_k if p.model.experts else 0
    base = next((one for one in predictions if one.active_experts == native), None)
    if base is None:
        return None
    return _output_rate(p) / _output_rate(base) - 1


def pair(q: Quantiles) -> str:
    """Median and 99th percentile; a dash where there are none."""
    return "-" if math.isnan(q.p50) else f"{units.text(q.p50, 's')} / {units.text(q.p99, 's')}"


def without_nan(value: Any) -> Any:
    """JSON has no nan: what is not defined becomes null."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _gb(value: float) -> str:
    return f"{value / 1e9:.1f} GB"


def _breakdown(predictions: Sequence[Prediction]) -> Table:
    table = Table(title="\nMean step", title_justify="left", show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("part")
    for p in predictions:
        table.add_column(f"k={p.active_experts}" if p.active_experts else "dense", justify="right")
    for name in predictions[0].breakdown.parts:
        values = [p.breakdown.parts[name] for p in predictions]
        if max(values) > 0:
            table.add_row(name.replace("_", " "), *(units.text(value, "s") for value in values))
    table.add_row("total", *(units.text(p.breakdown.total_s, "s") for p in predictions), style="bold")
    return table


def _confidence(p: Prediction) -> Text:
    percent = 100 * p.log_sigma
    routing = "routing unlike the one assumed, " if p.model.experts is not None else ""
    return Text(
        f"\nHow sure: the mean step is off by {percent:.0f} % (one standard deviation), from the residuals of the "
        "kernel fits on shapes they never saw, part by part, and 50 % on what is only assumed (small kernels, host "
        f"time). Not in it: {routing}an engine unlike the one assumed.\n"
    )


def prediction_json(predictions: Sequence[Prediction], newest: Prediction | None = None) -> dict[str, Any]:
    """The same as plain data, SI units, unit in each name."""
    first = predictions[0]
    rows = [
        {
            "active_experts": p.active_experts or None,
            "saturated": p.metrics is None,
            "gain_over_native": _gain(p, predictions),
            "saturation_output_tokens_per_s": p.saturation_output_tokens_per_s,
            "output_tokens_per_s_interval_90": list(p.throughput_90),
            "step_log_sigma": p.log_sigma,
            "bound": p.bound,
            "busiest_rank_over_mean": dataclasses.asdict(p.busiest_rank) if p.busiest_rank else None,
            "memory_per_gpu_bytes": p.memory_used_bytes,
            "kv_capacity_tokens": p.memory.kv_tokens,
            "mean_step_parts_s": p.breakdown.parts,
            "metrics": metrics_json(p.metrics) if p.metrics else None,
            "quality": [_score_json(score) for score in _scores(p)] if p.active_experts else [],
            "notes": list(p.notes),
        }
        for p in predictions
    ]
    return {
        "hardware": first.hardware.name,
        "model": first.model.name,
        "deployment": first.deployment.model_dump(mode="json"),
        "workload": first.workload.model_dump(mode="json"),
        "engine_version": {
            "asked": first.deployment.engine_version,
            "times_of": releases(first.deployment, first.hardware.device.name),
            "gain_over_newest": None if newest is None else _output_rate(first) / _output_rate(newest) - 1,
        },
        "engine_parameters": first.engine_parameters.model_dump(mode="json"),
        "quality_note": QUALITY_NOTE if first.model.experts else None,
        "predictions": rows,
        "provenance": first.provenance.to_dict(),
    }


def _score_json(score: quality.Score) -> dict[str, Any]:
    return {
        "benchmark": score.curve.benchmark,
        "group": score.curve.group,
        "score_percent": score.score,
        "native_score_percent": score.native_score,
        "measured": score.measured,
        "method": score.curve.method,
        "source": score.curve.source,
    }


def metrics_json(metrics: ServingMetrics) -> dict[str, Any]:
    """ServingMetrics as plain data; latencies in seconds."""
    plain = dataclasses.asdict(metrics)
    for name in ("ttft", "tpot", "itl", "e2e"):
        plain[f"{name}_s"] = plain.pop(name)
    cleaned: dict[str, Any] = without_nan(plain)
    return cleaned


def metrics_table(metrics: ServingMetrics) -> Table:
    """ServingMetrics as a table for people."""
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    for column in ("", "mean", "p50", "p90", "p99"):
        table.add_column(column, justify="left" if not column else "right")
    for name, label in (("ttft", "TTFT"), ("tpot", "TPOT"), ("itl", "ITL"), ("e2e", "E2E")):
        q: Quantiles = getattr(metrics, name)
        table.add_row(label, *("-" if math.isnan(v) else units.text(v, "s") for v in (q.mean, q.p50, q.p90, q.p99)))
    return table
