"""A result as one HTML page that needs nothing else: no network, no script; made for phones and for paper.

Takes what `simmoe plan --json` or `simmoe predict --json` wrote, works the figures out anew from the specs named in it,
and says every assumption and source. Results of `simulate`, `sweep` (its table too), `frontier` and `scaling` are shown
as tables.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from simmoe import units
from simmoe.errors import MeasurementError, SpecError
from simmoe.planning.confirm import Trial, simulated_grid
from simmoe.planning.objective import Limit
from simmoe.planning.screen import LoadGrid, screen
from simmoe.planning.sweep_table import read_rows
from simmoe.report import html_figures
from simmoe.report.html_page import Figures, Page
from simmoe.report.html_sections import deployment_sections, sources, traffic
from simmoe.report.html_tables import MARKS, sweep_page, tables_page
from simmoe.report.plan import chance
from simmoe.specs import load
from simmoe.specs.deployment import Deployment
from simmoe.specs.workload import Workload

_LATENCY_CAPTION = (
    "99th percentiles against the load of all replicas, with the band that the uncertainty of step times makes (90 %); "
    "dotted: limits; dashed: the load asked for. Screened analytically: where it differs from the simulated figures, "
    "believe the simulation, which sees queues and unlike ranks."
)
_SIMULATED_CAPTION = (
    "99th percentiles against the load of both sides together, a short simulated run a point, with the band that the "
    "uncertainty of step times makes (90 %); dotted: limits; dashed: the load asked for."
)
#: Loads of the simulated figure, as shares of the one asked for, and requests of each of its runs.
_SHARES, _FIGURE_REQUESTS = (0.1, 0.4, 0.7, 1.0, 1.2, 1.4, 1.6, 1.8, 2.1, 2.5), 500


def write(result: Path, out: Path, *, pictures: Path | None = None) -> list[Path]:
    """Write the page of a result; with ``pictures`` also its figures as PNG into that folder.

    Returns
    -------
    the files written.

    Raises
    ------
    SpecError
        If the result is not one this reads.
    """
    try:
        page, figures = _page(result)
    except (KeyError, TypeError, AttributeError, IndexError) as problem:
        what = f"{problem} is missing" if isinstance(problem, KeyError) else str(problem)
        raise SpecError(f"{result}: not a whole result ({what}); write it anew with --json") from problem
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    written = [out]
    for name, draw in figures.items() if pictures is not None else ():
        assert pictures is not None
        written.append(pictures / f"{out.stem}_{name}.png")
        draw(written[-1])
    return written


def _page(result: Path) -> tuple[str, Figures]:
    if result.suffix in (".csv", ".parquet"):
        return _sweep_page(result, list(read_rows(result).values()))
    data = _read(result)
    if isinstance(data, list):
        return _sweep_page(result, data)
    if "question" in data:
        return _plan_page(data)
    if "predictions" in data:
        return _prediction_page(data)
    page = tables_page(data)
    return page.render(), page.figures


def _sweep_page(result: Path, rows: Sequence[Mapping[str, Any]]) -> tuple[str, Figures]:
    if not rows:
        raise SpecError(f"{result}: there is no table of a sweep; `simmoe sweep grid.yaml --out {result}` writes one")
    page = sweep_page(result.stem, rows)
    return page.render(), page.figures


def _read(result: Path) -> dict[str, Any] | list[dict[str, Any]]:
    try:
        data = json.loads(result.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SpecError(f"{result}: no such file; write one with `simmoe plan ... --json > {result}`") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as problem:
        raise SpecError(f"{result}: cannot be read as JSON ({problem})") from None
    if isinstance(data, list) and data and all(isinstance(row, dict) and "point" in row for row in data):
        return data  # of a sweep
    if not isinstance(data, dict) or not {"question", "predictions", *MARKS} & set(data):
        commands = "plan, predict, simulate, sweep, frontier or scaling"
        raise SpecError(f"{result}: not a result of simmoe; write one with --json of `simmoe {commands}`")
    return data


def _plan_page(data: Mapping[str, Any]) -> tuple[str, Figures]:
    q = data["question"]
    page = Page(f"{', '.join(q['models'])}: {q['requests_per_s']:g} requests/s")
    limits = tuple(Limit(**limit) for limit in q["limits"])
    promise = " and ".join(map(str, limits))
    answer = data["answer"]
    if answer is None:
        said = html.escape(data["no_answer"])
        page.parts.append(f'<div class="answer none"><p><strong>No answer.</strong> {said}</p></div>')
    else:
        page.parts.append(_recommendation(answer, promise))
        _options(page, data)
    page.heading("What would change the answer")
    changes = [[c["change"], c["answer"], _usd(c["usd_per_hour"])] for c in data["what_would_change_it"]]
    page.table(("change", "then", "USD/h"), changes)
    prices = [
        f"{o['hardware']}: {o['usd_per_device_hour']:g} USD per device-hour ({o['price_source']})" for o in q["offers"]
    ]
    asked = [
        f"objective: {promise}, with {q['confidence']:.0%} confidence and {q['spare_replicas']} spare replicas",
        *traffic(_workload(q["workload"])),
        *prices,
        f"layouts: {data['screened_layouts']} screened, {data['simulated_layouts']} simulated, seed {q['seed']}",
        f"layouts that cannot serve: {len(data['layouts_that_cannot_serve'])}",
    ]
    if answer is not None:
        asked += _answer_sections(page, q, answer, limits)
    page.heading("Assumptions and sources")
    page.items(asked)
    page.code(json.dumps(data["provenance"], indent=1))
    return page.render(), page.figures


def _answer_sections(
    page: Page, q: Mapping[str, Any], answer: Mapping[str, Any], limits: tuple[Limit, ...]
) -> list[str]:
    """Figures of the layout that decodes, how to start every side; returns sources and coverage."""
    workload, hardware, model = (
        _workload(q["workload"]),
        load.load_hardware(answer["hardware"]),
        load.load_model(answer["model"]),
    )
    side = answer["sides"][-1]
    replica = _deployment(side["replica"])
    page.heading("Latency and confidence against load")
    if len(answer["sides"]) == 1:
        grid, how, caption = screen(hardware, model, replica, workload, limits), "screened", _LATENCY_CAPTION
        count = side["replicas"]
    else:
        grid, how, caption, count = _simulated(q, answer, limits), "simulated", _SIMULATED_CAPTION, 1
    page.figure(
        "latency",
        caption,
        lambda path: html_figures.latency(grid, count, q["requests_per_s"], limits, path, how),
    )
    if len(answer["sides"]) > 1:
        page.text(
            "The figures below show one replica of the decode layout serving whole requests, prompts included: its "
            "steps, its memory, what caps gain."
        )
    each = workload.vary(rate=q["requests_per_s"] / side["replicas"])
    deployment_sections(page, hardware, model, replica, each)
    page.heading("Start it")
    for one in answer["sides"]:
        role = "" if one["role"] == "serve" else f"{one['role']} "
        page.text(f"Each of {one['replicas'] + answer['spare_replicas']} {role}replicas, with one of:")
        page.code("\n\n".join(one["launch"].values()))
    return [*(f"coverage: {note}" for note in answer["notes"]), *sources(hardware, model)]


def _simulated(q: Mapping[str, Any], answer: Mapping[str, Any], limits: tuple[Limit, ...]) -> LoadGrid:
    """Latencies of prefill and decode replicas together at a few loads."""
    sides = []
    for side in answer["sides"]:
        replica = _deployment(side["replica"])
        sides.append(replica.vary(gpus=side["replicas"] * replica.devices_per_replica))
    trial = Trial(
        hardware=load.load_hardware(answer["hardware"]),
        model=load.load_model(answer["model"]),
        deployment=sides[0],
        decode=sides[1],
        workload=_workload(q["workload"]),
        limits=limits,
        log_sigma=answer["step_log_sigma"],
        confidence=q["confidence"],
        seed=q["seed"],
        requests=_FIGURE_REQUESTS,
    )
    return simulated_grid(trial, _SHARES)


def _sides(option: Mapping[str, Any]) -> str:
    """Replicas and sizes of every side, in words."""
    spare = f" + {option['spare_replicas']} spare" if option["spare_replicas"] else ""
    said = []
    for side in option["sides"]:
        role = "" if side["role"] == "serve" else f" {side['role']}"
        said.append(f"{side['replicas']}{spare}{role} x ({_sizes(side['replica'])})")
    return ", ".join(said)


def _recommendation(answer: Mapping[str, Any], promise: str) -> str:
    e, c = html.escape, answer["simulated"]
    parts = ", ".join(
        f"{name.replace('_', ' ')} {units.text(s, 's')}" for name, s in answer["largest_step_parts_s"].items()
    )
    bought = f"<strong>{answer['devices']} x {e(answer['hardware'])}</strong>"
    dear = f"{answer['usd_per_million_output_tokens']:.2f} USD per million output tokens"
    sure = f"<strong>{chance(answer['probability'])}</strong>"
    latency = ", ".join(
        f"{name.upper()} p99 {units.text(c['metrics'][f'{name}_s']['p99'], 's')}" for name in ("ttft", "tpot")
    )
    slower = f"every step may be {100 * answer['headroom']:.0f} % slower before it breaks"
    lines = [
        f"{bought}: {e(_sides(answer))}",
        f"<strong>{answer['usd_per_hour']:,.2f} USD/h</strong>, {dear}",
        f"holds {e(promise)} with probability {sure}; {slower}",
        f"bottleneck: {e(answer['bottleneck'])}; load is {answer['utilisation']:.0%} of what it carries",
        f"largest parts of a full step: {e(parts)}",
        f"simulated over {c['requests']} requests: {latency}",
    ]
    return '<div class="answer">' + "".join(f"<p>{line}</p>" for line in lines) + "</div>"


def _options(page: Page, data: Mapping[str, Any]) -> None:
    page.heading("Options, as simulated")
    rows = []
    kinds = [
        ("answer", [data["answer"]]),
        ("runner-up", data["runner_ups"]),
        ("rejected", data["rejected_by_simulation"]),
    ]
    for kind, options in kinds:
        for o in options:
            m = o["simulated"]["metrics"]
            rows.append(
                [
                    kind,
                    f"{o['devices']} x {o['hardware']}: {_sides(o)}",
                    _usd(o["usd_per_hour"]),
                    chance(o["probability"]),
                    f"{100 * o['headroom']:+.0f} %",
                    *(units.text(m[name][q], "s") for name in ("ttft_s", "tpot_s") for q in ("p50", "p99")),
                ]
            )
    page.table(("", "deployment", "USD/h", "chance", "headroom", "TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99"), rows)
    page.text("Rejected: cheaper or equal in price, liked by screening, turned down by simulation.")


def _time(seconds: float | None) -> str:
    """In words; a dash where there is none, as TPOT of answers of one token."""
    return "-" if seconds is None else units.text(seconds, "s")


def _prediction_page(data: Mapping[str, Any]) -> tuple[str, Figures]:
    hardware, model = load.load_hardware(data["hardware"]), load.load_model(data["model"])
    deployment, workload = _deployment(data["deployment"]), _workload(data["workload"])
    page = Page(f"{model.name} on {deployment.gpus} x {hardware.device.name}")
    rows = []
    for p in data["predictions"]:
        low, high = p["output_tokens_per_s_interval_90"]
        m = p["metrics"]
        latency = (
            [_time(m[name][q]) for name in ("ttft_s", "tpot_s", "e2e_s") for q in ("p50", "p99")] if m else ["-"] * 6
        )
        rate = f"{m['output_tokens_per_s']:,.0f}" if m else "saturated"
        rows.append(
            [
                str(p["active_experts"] or "dense"),
                rate,
                f"{low:,.0f} .. {high:,.0f}",
                "-" if p["gain_over_native"] is None else f"{100 * p['gain_over_native']:+.1f} %",
                *latency,
            ]
        )
    page.heading("Throughput and latency per cap on active experts")
    page.table(
        (
            "active experts",
            "output tokens/s",
            "90 % interval",
            "gain",
            "TTFT p50",
            "p99",
            "TPOT p50",
            "p99",
            "E2E p50",
            "p99",
        ),
        rows,
    )
    caps = [p["active_experts"] or 0 for p in data["predictions"]]
    deployment_sections(page, hardware, model, deployment, workload, caps)
    page.heading("Assumptions and sources")
    notes = dict.fromkeys(note for p in data["predictions"] for note in p["notes"])
    page.items([*traffic(workload), *(f"coverage: {note}" for note in notes), *sources(hardware, model)])
    page.code(json.dumps(data["provenance"], indent=1))
    return page.render(), page.figures


def _sizes(replica: Mapping[str, Any]) -> str:
    sizes = [f"{name} {replica[name]}" for name in ("tp", "ep", "dp", "pp") if (replica.get(name) or 1) > 1]
    return ", ".join(sizes) or "tp 1"


def _usd(value: float | None) -> str:
    return "" if value is None else f"{value:,.2f}"


def _deployment(values: Mapping[str, Any]) -> Deployment:
    try:
        return Deployment.model_validate(values)
    except ValidationError as problem:
        raise MeasurementError(f"the result's deployment cannot be read: {problem.errors()[0]['msg']}") from None


def _workload(values: Mapping[str, Any]) -> Workload:
    try:
        return Workload.model_validate(values)
    except ValidationError as problem:
        raise MeasurementError(f"the result's workload cannot be read: {problem.errors()[0]['msg']}") from None
