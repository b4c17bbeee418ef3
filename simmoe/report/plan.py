"""A plan as text for people and as plain data for scripts."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from simmoe import units
from simmoe.planning import launch, whatif
from simmoe.planning.option import Option, Side
from simmoe.planning.screen import ENGINE_LOG_SIGMA
from simmoe.planning.search import Plan
from simmoe.provenance import digest, stamp
from simmoe.report.text import metrics_json
from simmoe.specs.load import calibration_of

#: Rejected options shown.
_MOST_REJECTED = 4


def plan_table(plan: Plan) -> RenderableType:
    """The recommendation, its margin, runner-ups, what would change it, and how to start it."""
    if plan.answer is None:
        return Group(_question(plan), Text(no_answer(plan), style="bold red"))
    return Group(
        _question(plan),
        _answer(plan, plan.answer),
        _options(plan),
        _changes(plan),
        _launch(plan.answer),
        _sure(plan),
    )


def no_answer(plan: Plan) -> str:
    """Why there is no answer, in a sentence or two, with what comes nearest clearly marked as not doing."""
    q = plan.question
    promise = " and ".join(map(str, q.limits))
    limits = f"at most {q.most_devices} devices"
    if q.budget_usd_per_hour is not None:
        limits += f" and {q.budget_usd_per_hour:g} USD/h"
    text = f"No candidate carries {q.rate:g} requests/s with {promise} at {q.confidence:.0%} confidence ({limits})."
    if plan.closest is None and plan.layouts:
        least = min(plan.layouts, key=lambda layout: layout.replica.devices_per_replica)
        devices = least.replica.devices_per_replica * (1 + q.spares)
        return (
            f"{text} The smallest replica that holds {least.model.name} is {devices} x {least.offer.name}"
            f"{' with its spares' if q.spares else ''}, more than may be bought "
            f"({', '.join(f'{q.affordable(offer)} x {offer.name}' for offer in q.offers)})."
        )
    if plan.closest is None:
        reasons = "; ".join(f"{what}: {why}" for what, why in plan.refused[:2])
        return f"{text} None could be tried: {reasons or 'not one replica is affordable'}."
    option, binding = plan.closest
    return (
        f"{text} Nearest, which does NOT hold it: {option.name}, {option.usd_per_hour:,.2f} USD/h, chance "
        f"{chance(option.probability)}, limited by {binding}. Loosen the limit, lower the load, or allow more devices."
    )


def plan_json(plan: Plan) -> dict[str, Any]:
    """The same as plain data, SI units, unit in each name."""
    q = plan.question
    data: dict[str, Any] = {
        "question": {
            "models": [model.name for model in q.models],
            "requests_per_s": q.rate,
            "workload": q.workload.model_dump(mode="json"),
            "limits": [dataclasses.asdict(limit) for limit in q.limits],
            "confidence": q.confidence,
            "spare_replicas": q.spares,
            "prefill_and_decode_apart": q.split,
            "offers": [
                {
                    "hardware": offer.name,
                    "usd_per_device_hour": offer.usd_per_device_hour,
                    "price_source": offer.price_source,
                    "available_devices": offer.available,
                }
                for offer in q.offers
            ],
            "most_devices": q.most_devices,
            "budget_usd_per_hour": q.budget_usd_per_hour,
            "seed": q.seed,
        },
        "answer": _option_json(plan, plan.answer) if plan.answer else None,
        "no_answer": None if plan.answer else no_answer(plan),
        "closest": {**_option_json(plan, plan.closest[0]), "holds_objective": False} if plan.closest else None,
        "runner_ups": [_option_json(plan, option) for option in plan.runner_ups],
        "rejected_by_simulation": [_option_json(plan, option) for option in plan.rejected],
        "what_would_change_it": [dataclasses.asdict(change) for change in whatif.changes(plan)],
        "screened_layouts": len(plan.layouts),
        "layouts_that_cannot_serve": [{"layout": what, "reason": why} for what, why in plan.refused],
        "simulated_layouts": plan.trials,
        "provenance": stamp(
            {
                "workload": q.workload,
                "base": q.base,
                **{f"model {model.name}": model for model in q.models},
                **{f"hardware {offer.name}": offer.hardware for offer in q.offers},
            },
            calibration={o.name: digest(file) for o in q.offers if (file := calibration_of(o.hardware))} or None,
            seed=q.seed,
        ).to_dict(),
    }
    return data


def _option_json(plan: Plan, option: Option) -> dict[str, Any]:
    c = option.confirmation
    output = plan.question.workload.output.mean
    return {
        "kind": option.kind,
        "model": option.model.name,
        "hardware": option.offer.name,
        "devices": option.devices,
        "name": option.name,
        "replicas": option.replicas,
        "spare_replicas": option.spares,
        "sides": [_side_json(side) for side in option.sides],
        "usd_per_hour": option.usd_per_hour,
        "usd_per_million_output_tokens": option.usd_per_million_output_tokens(output),
        "probability": option.probability,
        "headroom": (c.slack if c else option.slack) - 1,
        "headroom_means": "share by which every step may be slower before the objective breaks",
        "bottleneck": option.binding,
        "largest_step_parts_s": dict(_largest(option.layout.grid.step_parts_s, 3)),
        "utilisation": option.utilisation,
        "step_log_sigma": option.log_sigma,
        "screened": {
            "slack": option.slack,
            "saturation_requests_per_s": option.rate / option.utilisation,
        },
        "simulated": None
        if c is None
        else {
            "slack": c.slack,
            "probability": c.probability,
            "requests": c.requests,
            "seed": c.seed,
            "metrics": metrics_json(c.metrics),
            "slower_steps_by": c.slow_factor,
            "metrics_with_slower_steps": metrics_json(c.slow_metrics),
        },
        "notes": list(_notes(option)),
    }


def _side_json(side: Side) -> dict[str, Any]:
    layout = side.layout
    return {
        "role": side.role,
        "replicas": side.replicas,
        "replica": layout.replica.model_dump(mode="json"),
        "step_parts_s": layout.grid.step_parts_s,
        "launch": {
            engine: command(layout.model, layout.replica, layout.offer.hardware, side.role)
            for engine, command in _COMMANDS.items()
        },
    }


_COMMANDS = {"vllm": launch.vllm, "sglang": launch.sglang}


def _notes(option: Option) -> dict[str, None]:
    return dict.fromkeys(note for side in option.sides for note in side.layout.grid.notes)


def chance(probability: float) -> str:
    """A probability in words; nothing is certain."""
    return "> 99 %" if probability > 0.99 else "< 1 %" if probability < 0.01 else f"{100 * probability:.0f} %"


def _largest(parts: dict[str, float], count: int) -> list[tuple[str, float]]:
    return sorted(parts.items(), key=lambda part: -part[1])[:count]


def _question(plan: Plan) -> Text:
    q = plan.question
    w = q.workload
    prices = "; ".join(f"{o.name} {o.usd_per_device_hour:g} USD/h ({o.price_source})" for o in q.offers)
    return Text(
        f"{', '.join(m.name for m in q.models)}: {q.rate:g} requests/s, {w.input.mean:g} input and "
        f"{w.output.mean:g} output tokens ({w.input.kind}/{w.output.kind}), {' and '.join(map(str, q.limits))}, "
        f"confidence {q.confidence:.0%}, {q.spares} spare replicas{' of each kind' if q.split and q.spares else ''}; "
        f"prefill and decode {'together or apart' if q.split else 'together'}\nPrices per device-hour: {prices}\n"
        f"Screened {len(plan.layouts)} layouts ({len(plan.refused)} more cannot serve), simulated {plan.trials}.\n"
    )


def _answer(plan: Plan, option: Option) -> Text:
    c = option.confirmation
    assert c is not None
    output = plan.question.workload.output.mean
    parts = ", ".join(
        f"{name.replace('_', ' ')} {units.text(s, 's')}" for name, s in _largest(option.layout.grid.step_parts_s, 3)
    )
    return Text(
        f"Buy {option.name}\n"
        f"  {option.usd_per_hour:,.2f} USD/h, {option.usd_per_million_output_tokens(output):.2f} USD per million "
        f"output tokens\n"
        f"  holds the objective with probability {chance(option.probability)}; headroom {100 * (c.slack - 1):.0f} % "
        f"on every step's time; load is {option.utilisation:.0%} of what it carries at most\n"
        f"  bottleneck: {option.binding}; largest parts of a full step: {parts}\n"
        f"  simulated ({c.requests} requests, seed {c.seed}): TTFT p99 {units.text(c.metrics.ttft.p99, 's')}, "
        f"TPOT p99 {units.text(c.metrics.tpot.p99, 's')}; with steps {100 * (c.slow_factor - 1):.0f} % slower: "
        f"{units.text(c.slow_metrics.ttft.p99, 's')}, {units.text(c.slow_metrics.tpot.p99, 's')}\n",
        style="bold",
    )


def _options(plan: Plan) -> Table:
    table = Table(title="Options", title_justify="left", show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("")
    table.add_column("deployment")
    for column in ("USD/h", "USD per M\noutput tokens", "P(holds)", "headroom", "TTFT p99", "TPOT p99", "load"):
        table.add_column(column, justify="right")
    table.add_column("bottleneck")
    rows = [
        ("answer", plan.answer),
        *(("runner-up", o) for o in plan.runner_ups),
        *(("rejected", o) for o in sorted(plan.rejected, key=lambda o: o.rank)[-_MOST_REJECTED:]),
    ]
    for label, option in rows:
        if option is None or option.confirmation is None:
            continue
        c = option.confirmation
        if label == "runner-up" and not c.confirms(plan.question.confidence):
            label = "not sure enough"  # noqa: PLW2901
        table.add_row(
            label, option.name, f"{option.usd_per_hour:,.2f}",
            f"{option.usd_per_million_output_tokens(plan.question.workload.output.mean):.2f}",
            chance(option.probability), f"{100 * (c.slack - 1):+.0f} %", units.text(c.metrics.ttft.p99, "s"),
            units.text(c.metrics.tpot.p99, "s"), f"{option.utilisation:.0%}", option.binding,
        )  # fmt: skip
    table.caption = "TTFT, TPOT, P and headroom as simulated; rejected: cheaper or equal, liked by screening only"
    if len(plan.rejected) > _MOST_REJECTED:
        table.caption += f" (the dearest {_MOST_REJECTED} of {len(plan.rejected)})"
    return table


def _changes(plan: Plan) -> Table:
    title = "\nWhat would change the answer (screened)"
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("change")
    table.add_column("then")
    table.add_column("USD/h", justify="right")
    for change in whatif.changes(plan):
        table.add_row(
            change.change, change.answer, "" if change.usd_per_hour is None else f"{change.usd_per_hour:,.2f}"
        )
    return table


def _launch(option: Option) -> Text:
    text = ""
    for side in option.sides:
        role = "" if side.role == "serve" else f"{side.role} "
        text += f"\nStart each of {side.replicas + option.spares} {role}replicas with one of\n"
        for command in _COMMANDS.values():
            text += f"  {command(option.model, side.layout.replica, option.offer.hardware, side.role)}\n"
    return Text(text)


def _sure(plan: Plan) -> Text:
    assert plan.answer is not None
    notes = "".join(f"\n  - {note}" for note in _notes(plan.answer))
    return Text(
        f"How sure: step times are taken to be off by a common lognormal factor with spread "
        f"{100 * plan.answer.log_sigma:.0f} %: residuals of the kernel fits on unseen shapes, wider where efficiencies "
        f"are borrowed or a shape lies outside what was measured (`simmoe calibrate --beyond`), and "
        f"{100 * ENGINE_LOG_SIGMA[plan.answer.layout.replica.engine]:.0f} % for the engine around them. Not in it: "
        f"routing unlike the one assumed, failures, an engine unlike the one assumed, prices.{notes}"
    )
