"""Which part of the model carries a large miss: predicted parts beside the time that the measurement implies.

A miss is large when it lies outside the 90 % interval and is over 20 % off. One part alone would have to take
1 + gap / part times its predicted time to close the gap; the part that is blamed is the one for which this is the
least surprising, measured in its own spread (the residuals of its kernels' fits). That is a suspicion, not a proof:
several parts may be wrong together. Steps: shares of the mean step. Kernels: each fitted parameter's share of the
time, from its elasticity. Left out: misses of the queue model, which show as "waiting" in TTFT alone.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from simmoe.costs.operators.base import Features, Operator
from simmoe.engine.step import UNFITTED_LOG_SIGMA, Batch
from simmoe.predict import compiled_for, predict
from simmoe.specs.hardware import Hardware
from simmoe.validation.serving.rows import Run
from simmoe.validation.summary import KERNEL_QUANTITY, Comparison, Explanation, Outcome

LARGE = 0.2
#: Spread of the part of TTFT that is spent waiting. Assumption: a factor of two either way is one spread.
_WAITING_LOG_SIGMA = math.log(2.0)


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """A part that alone would close the gap if it took ``factor`` times its predicted time."""

    part: str
    predicted_s: float
    share: float
    factor: float
    spreads: float


def is_large(c: Comparison) -> bool:
    """Whether a figure is over 20 % off and the measurement outside the 90 % interval."""
    return abs(c.error) > LARGE and not c.lower <= c.measured <= c.upper


def misses(outcome: Outcome) -> list[Comparison]:
    """Large misses, the worst factor first."""
    found = [c for c in outcome.comparisons if is_large(c)]
    return sorted(found, key=lambda c: -abs(math.log(c.predicted / c.measured)) if c.predicted > 0 else -math.inf)


def implied_s(c: Comparison, explanation: Explanation) -> float:
    """The explained time as the measurement has it: rates go with its inverse. [s]"""
    ratio = c.predicted / c.measured if c.quantity.endswith("_per_s") else c.measured / c.predicted
    return explanation.total_s * ratio


def suspects(c: Comparison, explanation: Explanation) -> list[Suspect]:
    """Parts that could close the gap alone, the least surprising first."""
    gap = implied_s(c, explanation) - explanation.total_s
    found = []
    for part, seconds in explanation.parts_s.items():
        if seconds <= 0 or seconds + gap <= 0:
            continue  # nothing to scale, or even without it the rest would take too long
        factor = 1 + gap / seconds
        sigma = max(explanation.log_sigma.get(part, UNFITTED_LOG_SIGMA), 1e-3)
        found.append(
            Suspect(
                part=part,
                predicted_s=seconds,
                share=seconds / explanation.total_s,
                factor=factor,
                spreads=abs(math.log(factor)) / sigma,
            )
        )
    return sorted(found, key=lambda s: s.spreads)


def explain(outcome: Outcome, c: Comparison) -> Explanation | None:
    """Parts of the time behind a figure; None where no model breakdown is kept for its file."""
    explainer = outcome.explainers.get(c.file)
    return explainer(c.row, c.quantity, c.predicted) if explainer else None


def of_step(run: Run, quantity: str, predicted: float) -> Explanation:
    """Mean step of a run, or for TTFT the steps that compute a prompt and what remains: waiting."""
    first = quantity.startswith("ttft")
    deployment = run.deployment if first or run.decode is None else run.decode
    parts = compiled_for(run.hardware, run.model, deployment, run.workload)
    detail = parts.table.detail
    if first:
        chunk = min(round(run.workload.input.mean), parts.table.max_tokens)
        return _of_first_token(run, predicted, detail.log_sigma_at(chunk) if detail else {})
    found = predict(run.hardware, run.model, deployment, run.workload)
    step, running = found.breakdown, found.metrics.mean_running if found.metrics else parts.table.max_requests
    sigma = detail.log_sigma_at(min(round(running / deployment.replicas), parts.table.max_tokens)) if detail else {}
    return Explanation(what="mean step", total_s=step.total_s, parts_s=step.parts, log_sigma=sigma)


def _of_first_token(run: Run, predicted_ms: float, sigma: dict[str, float]) -> Explanation:
    table = compiled_for(run.hardware, run.model, run.deployment, run.workload).table
    prompt, budget = max(1, round(run.workload.input.mean)), run.deployment.max_num_batched_tokens
    total: dict[str, float] = {}
    done = 0
    while done < prompt:
        chunk = min(prompt - done, budget)
        step = table.breakdown(Batch(0, 0, ((chunk, done),)), int(done + chunk == prompt))
        total = {name: total.get(name, 0.0) + seconds for name, seconds in step.parts.items()}
        done += chunk
    waiting = 1e-3 * predicted_ms - sum(total.values())
    if waiting > 0:
        total["waiting"] = waiting
    return Explanation(
        what="time to first token",
        total_s=sum(total.values()),
        parts_s=total,
        log_sigma={**sigma, "waiting": _WAITING_LOG_SIGMA},
    )


def of_kernel(
    operator: Operator, features: Features, parameters: Mapping[str, float], hardware: Hardware, log_sigma: float
) -> Explanation:
    """Share of a kernel's time that goes with each fitted parameter: the absolute elasticity, for one row."""
    step = 1e-3
    total = float(operator.seconds(features, parameters, hardware, False)[0])  # noqa: FBT003
    shares = {}
    for name, value in parameters.items():
        up, down = ({**parameters, name: value * math.exp(s)} for s in (step, -step))
        high, low = (float(operator.seconds(features, p, hardware, False)[0]) for p in (up, down))  # noqa: FBT003
        shares[name] = abs(math.log(high / low)) / (2 * step) * total
    return Explanation(what="kernel", total_s=total, parts_s=shares, log_sigma=dict.fromkeys(shares, log_sigma))


def blame(outcome: Outcome, c: Comparison) -> Suspect | None:
    """The part that carries a miss with the least surprise; None if none can alone, or none is known."""
    explanation = explain(outcome, c)
    found = suspects(c, explanation) if explanation else []
    return found[0] if found else None


def carried_by(outcome: Outcome, c: Comparison) -> str:
    """The part blamed for a large miss of a run, for a table's cell; empty for others and for kernels."""
    if c.quantity == KERNEL_QUANTITY or not is_large(c):
        return ""
    blamed = blame(outcome, c)
    return blamed.part if blamed else "no single part"


def by_part(outcome: Outcome) -> dict[str, Counter[str]]:
    """Large misses of runs per group, counted by the part that is blamed. Kernels are one part each: left out."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for c in outcome.comparisons:
        part = carried_by(outcome, c)
        if part:
            found[c.group][part] += 1
    return dict(found)


def to_json(outcome: Outcome, count: int) -> list[dict[str, Any]]:
    """The worst misses with their parts, as plain data."""
    found = []
    for c in misses(outcome)[:count]:
        entry: dict[str, Any] = {
            "group": c.group, "file": c.file, "row": c.row, "source_id": c.source_id, "quantity": c.quantity,
            "measured": c.measured, "predicted": c.predicted, "lower": c.lower, "upper": c.upper,
        }  # fmt: skip
        explanation = explain(outcome, c)
        if explanation:
            entry["explained"] = explanation.what
            entry["predicted_s"], entry["implied_s"] = explanation.total_s, implied_s(c, explanation)
            entry["parts_s"] = {name: seconds for name, seconds in explanation.parts_s.items() if seconds > 0}
            entry["suspects"] = [
                {"part": s.part, "share": s.share, "factor": s.factor, "spreads": s.spreads}
                for s in suspects(c, explanation)[:3]
            ]
        found.append(entry)
    return found


def lines(outcome: Outcome, count: int) -> list[str]:
    """The worst misses in words, with the three likeliest parts each."""
    said: list[str] = []
    for c in misses(outcome)[:count]:
        where = f"{c.file}:{c.row}" + (f" {c.source_id}" if c.source_id else "")
        said.append(
            f"{c.group} {c.quantity} ({where}): measured {c.measured:.4g}, predicted {c.predicted:.4g} "
            f"({100 * c.error:+.0f} %), 90 % band {c.lower:.4g} .. {c.upper:.4g}"
        )
        explanation = explain(outcome, c)
        if explanation is None:
            continue
        largest = sorted(explanation.parts_s.items(), key=lambda part: -part[1])[:6]
        shares = ", ".join(
            f"{name} {100 * seconds / explanation.total_s:.0f} %" for name, seconds in largest if seconds
        )
        said.append(
            f"    {explanation.what} {1e3 * explanation.total_s:.4g} ms, measured implies "
            f"{1e3 * implied_s(c, explanation):.4g} ms; predicted parts: {shares}"
        )
        blamed = suspects(c, explanation)[:3]
        closing = ", ".join(f"{s.part} x {s.factor:.2g} ({s.spreads:.1f} spreads)" for s in blamed)
        said.append(f"    would close the gap alone, taking so many times as long: {closing or 'no single part'}")
    return said
