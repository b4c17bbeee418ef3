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
from simmoe.steady.cohorts import Round, round_of_cohorts
from simmoe.steady.front_end import front_end_s
from simmoe.steady.kv_seats import cv2
from simmoe.steady.load_curve import SHOWN, Curve
from simmoe.steady.open_loop import open_loop
from simmoe.steady.swings import Swing, swing

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
    # time outside the engine, and how it grows with who is in a step
    outside_s, each_s = workload.think_time, 0.0
    if front_end is not None:
        outside_s += front_end_s(front_end, 0.0, workload.input.mean)
        each_s = front_end.front_end_time_per_request
    equal = curve.load.in_step
    if equal and not curve.prompts_first:
        # of those who think the first is back soon
        first_s = outside_s - (workload.think_time * (1 - 1 / clients) if workload.think != "fixed" else 0.0)
        found = round_of_cohorts(curve.load, workload, clients, first_s, each_s, curve.steps_ahead)
        return _in_cohorts(found, curve, deployment, workload, kv_tokens, clients, outside_s, each_s)
    if not equal and (workload.think_time == 0 or workload.think == "fixed"):
        alike = _ends_before_first_is_back(curve, workload, clients, outside_s, each_s)
        if alike and not curve.prompts_first:
            found = round_of_cohorts(curve.load, workload, clients, outside_s, each_s, curve.steps_ahead)
            return _in_cohorts(found, curve, deployment, workload, kv_tokens, clients, outside_s, each_s)
        if deployment.dp == 1 or not curve.prompts_first:
            swings = swing(curve.load, workload, clients, outside_s, each_s, prompts_first=curve.prompts_first)
            if swings is not None and (
                shown := _swinging(swings, curve, deployment, workload, kv_tokens, clients, outside_s, each_s)
            ):
                return shown, "concurrency"
    top, output = float(curve.in_flight[-1]), workload.output.mean
    away = outside_s + each_s > 0
    others = min(1.0, max(0.0, clients - 1.0))
    # who sends again at once waits for the step decided ahead, if anybody is left to step; who comes later waits for
    # the end of the step under way too. Equal answers of decodes that wait for prompts end together.
    wait_s = np.zeros_like(curve.step_s)
    if not equal:
        wait_s = others * (curve.steps_ahead * curve.step_s + (_rest_s(curve) if away else 0.0))
    outside = 0.0 if equal else outside_s + each_s * curve.in_flight
    here = curve.in_flight + curve.requests_per_s * (wait_s + outside)
    together = min(clients, top) if equal else float(np.interp(clients, here, curve.in_flight))
    queued = clients > here[-1]
    names = (*SHOWN, "requests_per_s", "chunk")
    at = {name: float(value) for name, value in curve.at(np.array(together), names).items()}
    if queued:  # what is computed again takes the time of prompts
        again_s = curve.load.again * (at["mixed_step_s"] - at["decode_step_s"]) / at["chunk"]
        at["requests_per_s"] /= 1.0 + at["requests_per_s"] * again_s
    steps = max(output - 1, 0.0)
    # Little's law holds on the curve's points, and only nearly between them
    served_s = max(together, float(curve.in_flight[0])) / at["requests_per_s"]
    between = served_s / (at["prefill_s"] + steps * at["tpot_s"])
    at["tpot_s"] *= between
    prefill = at["prefill_s"] * between
    queue = float(np.interp(together, curve.in_flight, wait_s))
    if queued:
        queue = max(queue, clients / at["requests_per_s"] - served_s - outside_s - each_s * together)
    # some of that after their first token
    sent_back_s = min(curve.load.sent_back / at["requests_per_s"], queue) if queued and steps else 0.0
    at["tpot_s"] += sent_back_s / max(steps, 1.0)
    ttft_mean = queue - sent_back_s + prefill
    throughput = _throughput(clients, queue + served_s + outside_s, each_s * served_s)
    # clients are in the engine by themselves, or all together
    idle, independent = max(0.0, 1.0 - throughput * (queue + served_s) / clients), 1.0 if equal else max(1.0, clients)
    ttft = Quantiles(mean=ttft_mean, p50=ttft_mean, p90=ttft_mean, p99=ttft_mean + (0.0 if equal else prefill))
    if equal:  # first tokens come step by step, evenly on both sides of the mean
        half = max(0.0, prefill - at["mixed_step_s"])
        ttft = Quantiles(mean=ttft_mean, p50=ttft_mean, p90=ttft_mean + 0.8 * half, p99=ttft_mean + 0.98 * half)
    tpot_s = at["tpot_s"]
    metrics = _metrics(
        deployment, workload, kv_tokens, throughput, at, ttft, _around(tpot_s), itl=_itl(at),
        e2e=_later(ttft, steps * tpot_s), running=throughput * served_s, waiting=throughput * queue,
        utilisation=1.0 - idle**independent,
    )  # fmt: skip
    return metrics, curve.limit if queued else "concurrency"


def _in_cohorts(
    found: Round,
    curve: Curve,
    deployment: Deployment,
    workload: Workload,
    kv_tokens: float,
    clients: float,
    outside_s: float,
    each_s: float,
) -> tuple[ServingMetrics, str]:
    """What a round of cohorts shows: a client's time is front end, own prompt and decodes, and for the rest waiting."""
    served = found.prefill_s + found.decodes_s
    served_s = float(served.mean())
    throughput = min(found.requests_per_s, _throughput(clients, served_s + outside_s, each_s * served_s))
    running = throughput * served_s
    in_engine_s = clients / throughput - outside_s - each_s * running
    if in_engine_s < served_s * (1 + 1e-12):  # what rounding leaves
        in_engine_s = served_s
    tokens = max(workload.output.mean - 1, 1e-9)
    ttft, tpot = Quantiles.of(in_engine_s - found.decodes_s), Quantiles.of(found.decodes_s / tokens)
    at = _steps(found, found.met)
    metrics = _metrics(
        deployment, workload, kv_tokens, throughput, at, ttft, tpot, itl=_itl(at), e2e=_around(in_engine_s),
        running=running, waiting=throughput * (in_engine_s - served_s), utilisation=found.busy,
    )  # fmt: skip
    limit = "token budget" if found.full else curve.limit
    return metrics, limit if found.full or clients > curve.load.most else "concurrency"


def _ends_before_first_is_back(
    curve: Curve, workload: Workload, clients: float, outside_s: float, each_s: float
) -> bool:
    """Whether answers differ by less than their clients are away for, and than all prompts take.

    Then whoever came together is outside together, and waits for the others' prompts on the way back.
    """
    at = curve.at(np.array(min(clients, float(curve.in_flight[-1]))), ("decode_step_s",))
    # as wide as equally likely lengths of the same spread
    spread_s = math.sqrt(12 * cv2(workload.output)) * curve.load.steps * float(at["decode_step_s"])
    queue_up = curve.token_budget <= clients * workload.input.mean and clients <= curve.load.most
    return queue_up and spread_s <= min(outside_s + each_s * clients, curve.load.prompts_s)


def _swinging(
    found: Swing,
    curve: Curve,
    deployment: Deployment,
    workload: Workload,
    kv_tokens: float,
    clients: float,
    outside_s: float,
    each_s: float,
) -> ServingMetrics | None:
    """What a swing shows; None if it leaves decodes less time than their steps take."""
    throughput, steps = found.requests_per_s, curve.load.steps
    ttft = Quantiles.of(found.waits_s + found.prefill_s)
    # clients = X (TTFT + decodes + outside), of which the front end's part grows with who is in the engine
    rest_s = clients / throughput - outside_s - each_s * throughput * found.prefill_s - ttft.mean
    decodes_s = rest_s / (1.0 + each_s * throughput)
    if decodes_s < steps * found.decode_step_s:
        return None
    running = throughput * (found.prefill_s + decodes_s)
    at = _steps(found, found.mixed_share)
    tpot = decodes_s / max(workload.output.mean - 1, 1e-9)
    return _metrics(
        deployment, workload, kv_tokens, throughput, at, ttft, _around(tpot), itl=_itl(at),
        e2e=_later(ttft, decodes_s), running=running, waiting=throughput * (ttft.mean - found.prefill_s),
        utilisation=1.0,
    )  # fmt: skip


def _steps(found: Round | Swing, long_gap_share: float) -> dict[str, float]:
    """Steps of a round or a swing by the names a curve gives them."""
    return {
        "step_s": found.step_s,
        "decode_step_s": found.decode_step_s,
        "decoding": found.decoding,
        "long_gap_s": found.mixed_step_s,
        "long_gap_share": long_gap_share,
    }


def _throughput(clients: float, cycle_s: float, growing_s: float) -> float:
    """X of clients = X (cycle + X x what the front end's part grows by with each request per second). [1/s]"""
    return 2 * clients / (cycle_s + math.sqrt(cycle_s**2 + 4 * growing_s * clients))


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


def _later(q: Quantiles, by: float) -> Quantiles:
    return Quantiles(mean=q.mean + by, p50=q.p50 + by, p90=q.p90 + by, p99=q.p99 + by)


def _itl(at: dict[str, float]) -> Quantiles:
    """Gaps between tokens: a share of them spans a step that also carried prompt tokens."""
    decode, mixed, share = at["decode_step_s"], at["long_gap_s"], at["long_gap_share"]
    pick = [mixed if share > 1 - q else decode for q in (0.5, 0.9, 0.99)]
    return Quantiles(mean=decode * (1 - share) + mixed * share, p50=pick[0], p90=pick[1], p99=pick[2])
