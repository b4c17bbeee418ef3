"""Steady state of a deployment in closed form, without simulating.

Model: continuous batching as a load-dependent server whose throughput X(N) with N requests in flight is tabulated in
`simmoe.steady.load_curve`. Closed loop: N is the concurrency. Open loop: the number in the system is the birth-death
chain with birth rate lambda and death rate X(n) (flow-equivalent server; Lazowska et al., Quantitative System
Performance, 1984, ch. 8), and a request's latencies follow from what its arrival meets. With asynchronous scheduling
the step after the one that an arrival meets is decided already, so a newcomer waits for it too, unless the engine is
idle. Left out: the start's transient, preemption.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from simmoe.errors import SaturationError
from simmoe.metrics import Quantiles, ServingMetrics
from simmoe.specs.deployment import Deployment
from simmoe.specs.workload import Workload
from simmoe.steady.load_curve import Curve, saturation_requests_per_s

Array = NDArray[np.float64]

#: Share of the variance of the number running that is left in its average over one request's stay: for
#: M/D/inf the autocovariance falls linearly to 0 over the stay, and 2 * integral of (1 - u)^2 over [0, 1] is 2/3.
_VARIANCE_LEFT = 2.0 / 3.0


def steady_state(
    curve: Curve, deployment: Deployment, workload: Workload, kv_tokens: float
) -> tuple[ServingMetrics, str]:
    """Solve the steady state; return the metrics over all replicas and what bounds the throughput.

    Raises
    ------
    SaturationError
        Open loop only: if the offered rate is at or above the saturation throughput.
    """
    if workload.concurrency is not None:
        return _closed(curve, deployment, workload, kv_tokens, workload.concurrency / deployment.replicas)
    assert workload.rate is not None
    return _open(curve, deployment, workload, kv_tokens, workload.rate / deployment.replicas)


def _closed(
    curve: Curve, deployment: Deployment, workload: Workload, kv_tokens: float, clients: float
) -> tuple[ServingMetrics, str]:
    top = float(curve.in_flight[-1])
    # equal outputs keep cohorts together, each prefilled in the step after the last one's
    equal = workload.output.kind == "fixed"
    cohorts = max(1.0, min(clients, top) * workload.input.mean / curve.token_budget) if equal else 1.0
    one_cohort = equal and cohorts == 1.0
    # who ends sends again at once and waits for the step decided ahead, if anybody is left to step
    ahead = 0.0 if one_cohort else curve.steps_ahead * min(1.0, max(0.0, clients - 1.0))
    delay_s = curve.decode_step_s if equal else curve.step_s
    here = curve.in_flight + ahead * curve.requests_per_s * delay_s
    running = min(clients, top) if not ahead else float(np.interp(clients, here, curve.in_flight))
    at = _at(curve, running)
    waiting = max(0.0, clients - running)
    throughput, prefill = at["requests_per_s"], at["prefill_s"]
    output = workload.output.mean
    queue = waiting / throughput
    # that step is mostly the last cohort's prompts, which a cohort that waits does not meet while it decodes
    queued = clients > here[-1]
    mostly = 0.0 if queued or output <= 1 else ahead * (1 - 1 / cohorts)
    met_waiting = mostly * (at["mixed_step_s"] - at["decode_step_s"])
    ttft_mean = queue + prefill + met_waiting
    at["tpot_s"] -= met_waiting / max(output - 1, 1.0)
    ttft = Quantiles(mean=ttft_mean, p50=ttft_mean, p90=ttft_mean, p99=ttft_mean + (0.0 if one_cohort else prefill))
    tpot = _around(at["tpot_s"])
    itl = _itl(at["decode_step_s"], at["mixed_step_s"], at["mixed_share"])
    bound = curve.limit if queued else "concurrency"
    return (
        _metrics(
            deployment,
            workload,
            kv_tokens,
            throughput,
            at,
            ttft,
            tpot,
            itl,
            waiting=waiting,
            utilisation=1.0,
            output=output,
        ),
        bound,
    )


def _open(
    curve: Curve, deployment: Deployment, workload: Workload, kv_tokens: float, rate: float
) -> tuple[ServingMetrics, str]:
    capacity = saturation_requests_per_s(curve)
    if rate >= capacity:
        raise SaturationError(
            f"{workload.rate:g} requests/s saturate the deployment, which carries {capacity * deployment.replicas:.4g} "
            f"requests/s (limit: {curve.limit}); lower --rate, or add GPUs (--gpus) or lower --active-experts"
        )
    # a peak between whole numbers of requests is reached with the next: what is carried stays at it
    top = max(1, math.ceil(curve.in_flight[curve.peak]))
    n = np.arange(1, top + 1, dtype=np.float64)
    upto = slice(0, curve.peak + 1)
    death = np.interp(n, curve.in_flight[upto], curve.requests_per_s[upto])
    # below the table's first point one request in the system simply proceeds
    death = np.minimum(death, n * curve.requests_per_s[0] / curve.in_flight[0])
    log_weight = np.concatenate([[0.0], np.cumsum(np.log(rate) - np.log(death))])
    ratio = rate / death[-1]
    if ratio >= 1:
        raise SaturationError(
            f"{workload.rate:g} requests/s saturate the deployment, which carries "
            f"{death[-1] * deployment.replicas:.4g} requests/s"
        )
    weight = np.exp(log_weight - log_weight.max())
    tail = weight[-1] * ratio / (1 - ratio)
    total = weight.sum() + tail
    p = weight / total
    p_wait = (weight[-1] + tail) / total  # an arrival finds all slots taken
    mean_waiting = weight[-1] / total * ratio / (1 - ratio) ** 2
    numbers = np.concatenate([[0.0], n])
    running = float((p * numbers).sum() + tail / total * top)
    at = _at(curve, min(max(running, float(curve.in_flight[0])), float(curve.in_flight[-1])))
    at["running"] = running

    # what one request sees: the number running averages out over its stay
    seen = np.maximum(running + math.sqrt(_VARIANCE_LEFT) * (numbers - running), 1.0)
    step_seen = np.interp(seen, curve.in_flight, curve.tpot_s)
    mass = p.copy()
    mass[-1] += tail / total
    weight_seen = mass * np.maximum(numbers, 1e-9) if numbers.size > 1 else mass
    tpot = _weighted_quantiles(step_seen, weight_seen)
    itl = _itl(at["decode_step_s"], at["mixed_step_s"], at["mixed_share"])

    busy = 1.0 - float(p[0])
    ttft = _open_ttft(curve, workload, rate, p, numbers, tail / total, 1.0 / (death[-1] - rate))
    # whoever is not running waits: for a slot, or for the running step to end (Little's law gives both together)
    stay = ttft.mean + max(workload.output.mean - 1, 0.0) * tpot.mean
    waiting = max(float(mean_waiting), rate * stay - running)
    at["requests_per_s"] = rate
    metrics = _metrics(
        deployment,
        workload,
        kv_tokens,
        rate,
        at,
        ttft,
        tpot,
        itl,
        waiting=waiting,
        utilisation=float(busy),
        output=workload.output.mean,
    )
    bound = "offered rate" if p_wait < 0.05 else curve.limit
    return metrics, bound


def _open_ttft(
    curve: Curve,
    workload: Workload,
    rate: float,
    p: Array,
    numbers: Array,
    p_full: float,
    slot_wait_s: float,
) -> Quantiles:
    """Time to first token under Poisson arrivals.

    The rest of the running step (long steps are met more often) and the one decided ahead, if the engine does so, then
    the step that carries the prompt together with the prompts that arrived during the same step, more steps if the
    token budget does not hold them, and, with probability ``p_full``, an exponential wait for a slot before all that.
    """
    # at most 24 representative states: the mass between two quantiles stands at its mean
    edges = np.searchsorted(np.cumsum(p), np.linspace(0, 1, 25)[1:-1] * p.sum())
    label = np.searchsorted(np.unique(edges), np.arange(p.size), side="left")
    mass = np.bincount(label, weights=p)
    states = np.bincount(label, weights=p * numbers) / np.maximum(mass, 1e-300)
    at = {name: np.interp(states, curve.in_flight, getattr(curve, name)) for name in
          ("decode_step_s", "mixed_step_s", "mixed_share", "prefill_s", "decoding", "chunk")}  # fmt: skip
    idle = np.minimum(np.where(states < 1, 1 - states, 0.0), 1.0)
    long = at["mixed_share"] * at["mixed_step_s"]
    into_long = long / (long + (1 - at["mixed_share"]) * at["decode_step_s"])
    room = np.maximum(curve.token_budget - curve.width * at["decoding"], 1.0)
    cohort = np.maximum(at["chunk"] / workload.input.mean, 1.0)  # prompts that the mixed step already holds
    marginal = np.maximum(at["mixed_step_s"] - at["decode_step_s"], 0.0) / cohort  # of one more prompt in the step
    uniform = (np.arange(6) + 0.5) / 6
    others = np.arange(5.0)
    values, weights = [], []
    short_or_long = ((at["decode_step_s"], 1 - at["mixed_share"]), (at["mixed_step_s"], at["mixed_share"]))
    decided = short_or_long if curve.steps_ahead else ((np.zeros_like(states), np.ones_like(states)),)
    met = [
        (landed, next_s, (1 - idle) * chance * next_chance)
        for landed, chance in ((at["decode_step_s"], 1 - into_long), (at["mixed_step_s"], into_long))
        for next_s, next_chance in decided
    ]
    for landed, next_s, chance in met:
        mean_others = (rate * landed)[:, None]
        poisson = np.exp(-mean_others) * mean_others**others / np.array([1.0, 1.0, 2.0, 6.0, 24.0])
        poisson[:, -1] += 1 - poisson.sum(axis=1)
        steps = np.ceil((1 + others) * workload.input.mean / room[:, None])
        more_steps = steps - np.ceil(workload.input.mean / room[:, None])
        company = np.maximum(others - (cohort[:, None] - 1), 0.0) * marginal[:, None] * (more_steps == 0)
        own = at["prefill_s"][:, None] + company + more_steps * at["mixed_step_s"][:, None]
        before = landed[:, None] * uniform + next_s[:, None]
        values.append((before[:, :, None] + own[:, None, :]).ravel())
        joint = (mass * chance)[:, None, None] * poisson[:, None, :] / 6
        weights.append((joint * np.ones((1, 6, 1))).ravel())
    late = float(values[-1].max(initial=0.0)) if p_full > 0 else 0.0
    values.append(at["prefill_s"])
    weights.append(mass * idle)
    values.append(late + slot_wait_s * (-np.log1p(-(np.arange(64) + 0.5) / 64)))
    weights.append(np.full(64, p_full / 64))
    return _weighted_quantiles(np.concatenate(values), np.concatenate(weights))


def _at(curve: Curve, in_flight: float) -> dict[str, float]:
    """The curve's quantities at a number in flight, linear between its points."""
    names = (
        "requests_per_s",
        "step_s",
        "tpot_s",
        "decode_step_s",
        "mixed_step_s",
        "mixed_share",
        "decoding",
        "prefill_s",
        "prompt_rate",
    )
    low = float(curve.in_flight[0])
    at = {name: float(np.interp(in_flight, curve.in_flight, getattr(curve, name))) for name in names}
    if in_flight < low:
        at["requests_per_s"] *= in_flight / low
    at["running"] = in_flight
    return at


def _metrics(
    deployment: Deployment,
    workload: Workload,
    kv_tokens: float,
    throughput: float,
    at: dict[str, float],
    ttft: Quantiles,
    tpot: Quantiles,
    itl: Quantiles,
    *,
    waiting: float,
    utilisation: float,
    output: float,
) -> ServingMetrics:
    replicas = deployment.replicas
    steps = max(output - 1, 0.0)
    e2e = Quantiles(
        mean=ttft.mean + steps * tpot.mean,
        p50=ttft.p50 + steps * tpot.p50,
        p90=ttft.p90 + steps * tpot.p90,
        p99=ttft.p99 + steps * tpot.p99,
    )
    total = throughput * replicas
    return ServingMetrics(
        requests_per_s=total,
        output_tokens_per_s=total * output,
        total_tokens_per_s=total * (output + workload.input.mean),
        ttft=ttft,
        tpot=tpot,
        itl=itl,
        e2e=e2e,
        mean_running=at["running"] * replicas,
        mean_waiting=waiting * replicas,
        mean_batch_tokens=deployment.rows_per_decode * at["decoding"] + throughput * workload.input.mean * at["step_s"],
        mean_step_s=at["step_s"],
        kv_utilisation=min(1.0, at["running"] * (workload.input.mean + output / 2) / kv_tokens),
        utilisation=utilisation,
    )


def _around(value: float) -> Quantiles:
    return Quantiles(mean=value, p50=value, p90=value, p99=value)


def _itl(decode: float, mixed: float, share: float) -> Quantiles:
    """Gaps between tokens: a share of them spans a step that also carried prompt tokens."""
    pick = [mixed if share > 1 - q else decode for q in (0.5, 0.9, 0.99)]
    return Quantiles(mean=decode * (1 - share) + mixed * share, p50=pick[0], p90=pick[1], p99=pick[2])


def _weighted_quantiles(values: Array, weights: Array) -> Quantiles:
    order = np.argsort(values)
    cumulative = np.cumsum(weights[order])
    cumulative /= cumulative[-1]
    picks = np.searchsorted(cumulative, [0.5, 0.9, 0.99])
    chosen = values[order][np.minimum(picks, len(values) - 1)]
    mean = float((values * weights).sum() / weights.sum())  # not np.dot: its threads cost more than the sum
    return Quantiles(mean=mean, p50=float(chosen[0]), p90=float(chosen[1]), p99=float(chosen[2]))
