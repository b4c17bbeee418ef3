"""Steady state of a deployment in closed form, without simulating.

Model: continuous batching as a load-dependent server whose throughput X(N) with N requests in flight is tabulated in
`simmoe.steady.load_curve`. Closed loop: N is the concurrency less who is in the front end or thinks, and
clients = X (E2E + front end + think time) holds exactly. Open loop: `simmoe.steady.open_loop`.
Left out: the start's transient, preemption.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from simmoe.metrics import Quantiles, ServingMetrics
from simmoe.specs.deployment import Deployment
from simmoe.specs.engines import EngineParameters
from simmoe.specs.workload import Workload
from simmoe.steady.front_end import front_end_s
from simmoe.steady.load_curve import SHOWN, Curve
from simmoe.steady.open_loop import open_loop

Array = NDArray[np.float64]


def steady_state(
    curve: Curve,
    deployment: Deployment,
    workload: Workload,
    kv_tokens: float,
    front_end: EngineParameters | None = None,
) -> tuple[ServingMetrics, str]:
    """Solve the steady state; return the metrics over all replicas and what bounds the throughput.

    Parameters
    ----------
    front_end : whose front end is in the cycle of a closed loop's clients. Metrics are the engine's all the same, see
        `steady.front_end.delayed`.

    Raises
    ------
    SaturationError
        Open loop only: if the offered rate is at or above the saturation throughput.
    """
    if workload.concurrency is not None:
        return _closed(curve, deployment, workload, kv_tokens, workload.concurrency / deployment.replicas, front_end)
    assert workload.rate is not None
    return steady_states(curve, deployment, workload, kv_tokens, np.array([workload.rate]))[0]


def steady_states(
    curve: Curve, deployment: Deployment, workload: Workload, kv_tokens: float, rates: Array
) -> list[tuple[ServingMetrics, str]]:
    """As `steady_state` for many offered rates [1/s] at once, whatever the workload's own load.

    Raises
    ------
    SaturationError
        If a rate is at or above the saturation throughput.
    """
    each = rates / deployment.replicas
    found = []
    for rate, state in zip(each.tolist(), open_loop(curve, workload, each, deployment.replicas), strict=True):
        metrics = _metrics(
            deployment, workload, kv_tokens, rate, state.at, state.ttft, state.tpot, itl=state.itl, e2e=state.e2e,
            running=state.running, waiting=state.waiting, utilisation=state.busy,
        )  # fmt: skip
        found.append((metrics, "offered rate" if state.wait < 0.05 else curve.limit))
    return found


def _closed(
    curve: Curve,
    deployment: Deployment,
    workload: Workload,
    kv_tokens: float,
    clients: float,
    front_end: EngineParameters | None,
) -> tuple[ServingMetrics, str]:
    top, output = float(curve.in_flight[-1]), workload.output.mean
    # time outside the engine, and how it grows with who is in a step
    outside_s, each_s = workload.think_time, 0.0
    if front_end is not None:
        outside_s += front_end_s(front_end, 0.0, workload.input.mean)
        each_s = front_end.front_end_time_per_request
    away = outside_s + each_s > 0
    # equal outputs keep cohorts together, each prefilled in the step after the last one's; where prompts go first, or
    # who ends comes back later, they are one cohort
    equal = workload.output.kind == "fixed" and workload.think_time == 0
    apart = equal and not curve.prompts_first
    cohorts = max(1.0, min(clients, top) * workload.input.mean / curve.token_budget) if apart else 1.0
    one_cohort = equal and (cohorts == 1.0 or away)
    others = min(1.0, max(0.0, clients - 1.0))
    # who sends again at once waits for the step decided ahead, if anybody is left to step; who comes later waits for
    # the end of the step under way too
    ahead = 0.0 if one_cohort else curve.steps_ahead * others
    delay_s = curve.decode_step_s if equal else curve.step_s
    wait_s = ahead * delay_s + (others * _rest_s(curve) if away and not equal else 0.0)
    outside = 0.0 if equal else outside_s + each_s * curve.in_flight
    here = curve.in_flight + curve.requests_per_s * (wait_s + outside)
    together = min(clients, top) if one_cohort else float(np.interp(clients, here, curve.in_flight))
    queued = clients > here[-1]
    at = {name: float(value) for name, value in curve.at(np.array(together), (*SHOWN, "requests_per_s")).items()}
    steps = max(output - 1, 0.0)
    # Little's law holds on the curve's points, and only nearly between them
    served_s = max(together, float(curve.in_flight[0])) / at["requests_per_s"]
    between = served_s / (at["prefill_s"] + steps * at["tpot_s"])
    at["tpot_s"] *= between
    prefill = at["prefill_s"] * between
    queue = float(np.interp(together, curve.in_flight, np.broadcast_to(wait_s, curve.in_flight.shape)))
    if queued:
        queue = max(queue, clients / at["requests_per_s"] - served_s - outside_s - each_s * together)
    # what others' prompts hold a request up before its first token they do not hold it up after it
    prompts_s = at["mixed_step_s"] - at["decode_step_s"]
    if apart and away:
        # of all steps with prompts half are before one's own, if all come back as one
        merged = _merged(cohorts, (outside_s + each_s * together) / at["decode_step_s"], at)
        own = max(1.0, workload.input.mean * deployment.dp / curve.token_budget)
        met_waiting = merged * max(0.0, cohorts - own) / 2 * prompts_s if output > 1 else 0.0
    else:
        # who waits for a slot anyway waits for the last cohort's prompts meanwhile
        for_slot = max(0.0, clients - float(here[-1])) / at["requests_per_s"]
        met_waiting = 0.0 if output <= 1 else max(ahead * (1 - 1 / cohorts) * prompts_s - for_slot, 0.0)
    ttft_mean = queue + prefill + met_waiting
    at["tpot_s"] -= met_waiting / max(output - 1, 1.0)
    # clients = X (E2E + outside), of which the front end's part grows with X times the time in steps
    cycle_s = queue + served_s + outside_s
    throughput = 2 * clients / (cycle_s + math.sqrt(cycle_s**2 + 4 * each_s * served_s * clients))
    # clients are in the engine by themselves, or all together
    idle, independent = max(0.0, 1.0 - throughput * (queue + served_s) / clients), 1.0 if equal else max(1.0, clients)
    ttft = Quantiles(mean=ttft_mean, p50=ttft_mean, p90=ttft_mean, p99=ttft_mean + (0.0 if one_cohort else prefill))
    if equal and (curve.prompts_first or away):  # first tokens come step by step, evenly on both sides of the mean
        half = max(0.0, prefill - at["mixed_step_s"]) if curve.prompts_first else met_waiting
        ttft = Quantiles(mean=ttft_mean, p50=ttft_mean, p90=ttft_mean + 0.8 * half, p99=ttft_mean + 0.98 * half)
    tpot_s = at["tpot_s"]
    e2e = Quantiles(**{name: getattr(ttft, name) + steps * tpot_s for name in ("mean", "p50", "p90", "p99")})
    itl = _itl(at["decode_step_s"], at["long_gap_s"], at["long_gap_share"])
    metrics = _metrics(
        deployment, workload, kv_tokens, throughput, at, ttft, _around(tpot_s), itl=itl, e2e=e2e,
        running=throughput * served_s, waiting=throughput * queue, utilisation=1.0 - idle**independent,
    )  # fmt: skip
    return metrics, curve.limit if queued else "concurrency"


def _merged(cohorts: float, outside_steps: float, at: dict[str, float]) -> float:
    """Prompt steps that cohorts wait for where all are outside for some decode steps, over those if all were one. [-]

    Cohorts end a step apart. Those that end before the first is back come back behind it, and wait for each other's
    prompts. The rest end during these prompts, one a step, and meet what is left of them when they are back.
    """
    if cohorts <= 1.0:
        return 0.0
    group = min(cohorts, 1.0 + outside_steps)
    left = max(0.0, group - 1.0 - outside_steps * at["decode_step_s"] / at["mixed_step_s"])
    return (group * (group - 1.0) / 2 + (cohorts - group) * left) / (cohorts * (cohorts - 1.0) / 2)


def _rest_s(curve: Curve) -> Array:
    """What is left of a step, on average, when somebody comes. [s]"""
    share = curve.mixed_share
    return np.asarray(((1 - share) * curve.decode_step_s**2 + share * curve.mixed_step_s**2) / (2 * curve.step_s))


def _metrics(
    deployment: Deployment,
    workload: Workload,
    kv_tokens: float,
    throughput: float,
    at: dict[str, float],
    ttft: Quantiles,
    tpot: Quantiles,
    *,
    itl: Quantiles,
    e2e: Quantiles,
    running: float,
    waiting: float,
    utilisation: float,
) -> ServingMetrics:
    replicas, output = deployment.replicas, workload.output.mean
    total = throughput * replicas
    return ServingMetrics(
        requests_per_s=total,
        output_tokens_per_s=total * output,
        total_tokens_per_s=total * (output + workload.input.mean),
        ttft=ttft,
        tpot=tpot,
        itl=itl,
        e2e=e2e,
        mean_running=running * replicas,
        mean_waiting=waiting * replicas,
        mean_batch_tokens=deployment.rows_per_decode * at["decoding"] + throughput * workload.input.mean * at["step_s"],
        mean_step_s=at["step_s"],
        kv_utilisation=min(1.0, running * (workload.input.mean + output / 2) / kv_tokens),
        utilisation=utilisation,
    )


def _around(value: float) -> Quantiles:
    return Quantiles(mean=value, p50=value, p90=value, p99=value)


def _itl(decode: float, mixed: float, share: float) -> Quantiles:
    """Gaps between tokens: a share of them spans a step that also carried prompt tokens."""
    pick = [mixed if share > 1 - q else decode for q in (0.5, 0.9, 0.99)]
    return Quantiles(mean=decode * (1 - share) + mixed * share, p50=pick[0], p90=pick[1], p99=pick[2])
