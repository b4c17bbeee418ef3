"""A frontier as text, plain data and a picture; measured throughput of published runs beside it where given."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from simmoe import quality
from simmoe.errors import MeasurementError
from simmoe.planning.frontier import Frontier, Point
from simmoe.report import plots
from simmoe.report.text import QUALITY_NOTE

#: (concurrency, active experts, pool) -> measured total tokens/s
Measured = Mapping[tuple[int, int, int], float]


def read_measured(path: Path, frontier: Frontier) -> Measured:
    """Measured throughput of the frontier's model by load, cap and pool, from a serving table. [tokens/s]

    Rows of other lengths or another number of devices are left out.

    Raises
    ------
    MeasurementError
        If the file is not such a table.
    """
    w, found = frontier.workload, {}
    asked = (frontier.model.name.lower(), f"{w.input.mean:g}", f"{w.output.mean:g}", str(frontier.deployment.gpus))
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                run = (row["model"].lower(), row["input_tokens"], row["output_tokens"], row["num_gpus"])
                if run == asked and row["concurrency"] and row["total_tokens_per_s"]:
                    key = (int(row["concurrency"]), int(row["active_experts"]), int(row["total_experts"]))
                    found[key] = float(row["total_tokens_per_s"])
    except (OSError, KeyError, ValueError) as problem:
        raise MeasurementError(f"{path}: not a table of serving runs ({problem})") from None
    return found


def frontier_table(frontier: Frontier, measured: Measured | None = None) -> RenderableType:
    """A table per load: speed, gain, cost, scores; a star where a policy is on a benchmark's front."""
    first = frontier.points[0].prediction
    d = frontier.deployment
    parts: list[RenderableType] = [
        Text(
            f"{frontier.model.name} on {d.gpus} x {frontier.hardware.device.name}, tp {d.tp_size}, ep {d.ep}; "
            f"{frontier.workload.input.mean:g} input and {frontier.workload.output.mean:g} output tokens; mean step "
            f"known within {100 * first.log_sigma:.0f} %. {QUALITY_NOTE}\n"
        )
    ]
    parts += [
        _load_table(frontier, [p for p in frontier.points if p.load == load], measured)
        for load in dict.fromkeys(point.load for point in frontier.points)
    ]
    parts.append(Text(_sources(frontier)))
    if frontier.notes:
        parts.append(Text("\nCoverage:\n" + "\n".join(f"  - {note}" for note in frontier.notes)))
    return Group(*parts)


def _load_table(frontier: Frontier, points: Sequence[Point], measured: Measured | None) -> Table:
    loop = (
        "requests in flight"
        if frontier.workload.concurrency is not None
        else "requests/s offered (speed: at saturation)"
    )
    table = Table(title=f"{points[0].load:g} {loop}", title_justify="left", show_edge=False, pad_edge=False,
                  header_style="bold")  # fmt: skip
    table.add_column("policy")
    table.add_column("output\ntokens/s", justify="right")
    table.add_column("gain", justify="right")
    if measured:
        table.add_column("measured\ntokens/s", justify="right")
        table.add_column("measured\ngain", justify="right")
    if frontier.usd_per_device_hour is not None:
        table.add_column("USD per M\noutput tokens", justify="right")
    for benchmark in frontier.benchmarks:
        table.add_column(benchmark, justify="right")
    for point in points:
        cells = [point.policy.name, f"{point.tokens_per_s:,.0f}", f"{100 * point.gain:+.1f} %"]
        if measured:
            speed, gain = measured_output(frontier, point, measured), measured_gain(frontier, point, measured)
            cells.append("" if speed is None else f"{speed:,.0f}")
            cells.append("" if gain is None else f"{100 * gain:+.1f} %")
        if point.usd_per_million_output_tokens is not None:
            cells.append(f"{point.usd_per_million_output_tokens:.2f}")
        cells += [_score(point, benchmark) for benchmark in frontier.benchmarks]
        table.add_row(*cells)
    return table


def measured_output(frontier: Frontier, point: Point, measured: Measured) -> float | None:
    """Measured output rate of a policy at the point's load: its share of all tokens; None: not run. [tokens/s]"""
    e, w = frontier.model.experts, frontier.workload
    assert e is not None
    if point.policy.refill_to is not None:
        return None
    pool = point.policy.total_experts or e.num_experts
    total = measured.get((round(point.load), point.policy.active_experts, pool))
    return None if total is None else total * w.output.mean / (w.input.mean + w.output.mean)


def measured_gain(frontier: Frontier, point: Point, measured: Measured) -> float | None:
    """Measured throughput of a policy over that of the model as trained, at the same load, less 1. [-]"""
    e = frontier.model.experts
    assert e is not None
    if point.policy.refill_to is not None:
        return None
    here = measured.get((round(point.load), point.policy.active_experts, point.policy.total_experts or e.num_experts))
    native = measured.get((round(point.load), e.top_k, e.num_experts))
    return None if here is None or native is None else here / native - 1


def _score(point: Point, benchmark: str) -> str:
    score = point.score(benchmark)
    if score is None:
        return "-"
    return f"{score.score:.1f}{'' if score.measured else '~'}{'*' if benchmark in point.on_front else ' '}"


def _sources(frontier: Frontier) -> str:
    if not frontier.benchmarks:
        native = frontier.model.experts.top_k if frontier.model.experts else 1
        lines = {
            p.policy.name: quality.in_words(frontier.model.name, active_experts=p.policy.active_experts, native=native)
            for p in frontier.points
            if p.policy.active_experts < native
        }
        said = "; ".join(f"{name}: {words}" for name, words in lines.items())
        return f"\nNo quality was measured for {frontier.model.name}, so there is no front. {said}"
    curves = dict.fromkeys(
        f"{s.curve.benchmark}: {s.curve.group}, {s.curve.source}" for p in frontier.points for s in p.scores
    )
    text = "\n*: on the front of that benchmark; ~: between measured points; -: not measured. Scores: % correct.\n"
    if {s.curve.group for p in frontier.points for s in p.scores} == {quality.ZERO_SHOT}:
        text += "Reasoning and code fall much earlier than zero-shot classification (arXiv 2511.02237, Qwen3).\n"
    return text + "\n".join(curves)


def frontier_json(frontier: Frontier, measured: Measured | None = None) -> dict[str, Any]:
    """The same as plain data."""
    return {
        "hardware": frontier.hardware.name,
        "model": frontier.model.name,
        "deployment": frontier.deployment.model_dump(mode="json"),
        "workload": frontier.workload.model_dump(mode="json"),
        "usd_per_device_hour": frontier.usd_per_device_hour,
        "points": [
            {
                "policy": p.policy.name,
                "active_experts": p.policy.active_experts,
                "refill_to": p.policy.refill_to,
                "total_experts": p.policy.total_experts,
                "load": p.load,
                "output_tokens_per_s": p.tokens_per_s,
                "output_tokens_per_s_interval_90": list(p.prediction.throughput_90),
                "gain_over_native": p.gain,
                "measured_output_tokens_per_s": measured_output(frontier, p, measured) if measured else None,
                "measured_gain_over_native": measured_gain(frontier, p, measured) if measured else None,
                "usd_per_million_output_tokens": p.usd_per_million_output_tokens,
                "on_front": list(p.on_front),
                "scores": [
                    {
                        "benchmark": s.curve.benchmark,
                        "group": s.curve.group,
                        "score_percent": s.score,
                        "native_score_percent": s.native_score,
                        "measured": s.measured,
                        "method": s.curve.method,
                        "source": s.curve.source,
                    }
                    for s in p.scores
                ],
            }
            for p in frontier.points
        ],
        "notes": list(frontier.notes),
        "provenance": frontier.provenance.to_dict(),
    }


def plot(frontier: Frontier, path: Path, benchmark: str | None = None, measured: Measured | None = None) -> None:
    """Speed against one benchmark's score, a line per load through its front; crosses: measured speed, where given.

    Raises
    ------
    MeasurementError
        If nothing is known of the benchmark for this model.
    """
    chosen = benchmark or (frontier.benchmarks[0] if frontier.benchmarks else None)
    if chosen not in frontier.benchmarks:
        known = ", ".join(frontier.benchmarks) or "none"
        raise MeasurementError(f"--plot: no scores of {frontier.model.name} on {chosen!r}; known: {known}")
    with plots.figure(path) as axes:
        for index, load in enumerate(dict.fromkeys(p.load for p in frontier.points)):
            known_points = [(p, s) for p in frontier.points if p.load == load and (s := p.score(chosen)) is not None]
            look = plots.style(index)
            front = sorted((s.score, p.tokens_per_s) for p, s in known_points if chosen in p.on_front)
            axes.plot(*zip(*front, strict=True), label=f"{load:g}", **look)
            for p, s in known_points:
                axes.plot([s.score], [p.tokens_per_s], color=look["color"], marker=look["marker"], markersize=4,
                          fillstyle="full" if chosen in p.on_front else "none")  # fmt: skip
                seen = measured_output(frontier, p, measured) if measured else None
                if seen is not None:
                    axes.plot([s.score], [seen], color=look["color"], marker="x", markersize=6, linestyle="none")
                axes.annotate(
                    p.policy.name, (s.score, p.tokens_per_s), xytext=(4, 4), textcoords="offset points", fontsize=7
                )
        axes.set_xlabel(f"{chosen} [% correct], measured")
        axes.set_ylabel("output tokens/s, predicted (x: measured)" if measured else "output tokens/s, predicted")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_minor_formatter("{x:,.0f}")
        axes.grid(alpha=0.25)
        axes.set_title(f"{frontier.model.name} on {frontier.deployment.gpus} x {frontier.hardware.device.name}")
        axes.legend(title="in flight" if frontier.workload.concurrency is not None else "requests/s", frameon=False)
