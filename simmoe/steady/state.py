"""Steady state of a deployment in closed form, without simulating.

Model: continuous batching as a load-dependent server whose throughput X(N) with N requests in flight is tabulated in
`simmoe.steady.load_curve`. Closed loop: N is the concurrency. Open loop: `simmoe.steady.open_loop`.
Left out: the start's transient, preemption.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from simmoe.metrics import Quantiles, ServingMetrics
from simmoe.specs.deployment import Deployment
from simmoe.specs.workload import Workload
from simmoe.steady.load_curve import SHOWN, Curve
from simmoe.steady.open_loop import open_loop

Array = NDArray[np.float64]


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
            deployment, workload, kv_tokens, rate, state.at, state.ttft, state.tpot, running=state.running,
            waiting=state.waiting, utilisation=state.busy,
        )  # fmt: skip
        found.append((metrics, "offered rate" if state.wait < 0.05 else curve.limit))
    return found


def _closed(
    curve: Curve, deployment: Deployment, workload: Workload, kv_tokens: float, clients: float
) -> tuple[ServingMetrics, str]:
    top = float(curve.in_flight[-1])
    # equal outputs keep cohorts together, each prefilled in the step after the last one's; where prompts go first, they
    # are one cohort
    equal = workload.output.kind == "fixed"
    apart = equal and not curve.prompts_first
    cohorts = max(1.0, min(clients, top) * workload.input.mean / curve.token_budget) if apart else 1.0
    one_cohort = equal and cohorts == 1.0
    # who ends sends again at once and waits for the step decided ahead, if anybody is left to step
    ahead = 0.0 if one_cohort else curve.steps_ahead * min(1.0, max(0.0, clients - 1.0))
    delay_s = curve.decode_step_s if equal else curve.step_s
    here = curve.in_flight + ahead * curve.requests_per_s * delay_s
    running = min(clients, top) if not ahead else float(np.interp(clients, here, curve.in_flight))
    at = {name: float(value) for name, value in curve.at(np.array(running), (*SHOWN, "requests_per_s")).items()}
    throughput, prefill = at["requests_per_s"] * min(1.0, running / float(curve.in_flight[0])), at["prefill_s"]
    waiting = max(0.0, clients - running)
    output = workload.output.mean
    queue = waiting / throughput
    # that step is mostly the last cohort's prompts; who waits for a slot anyway waits for it meanwhile
    queued = clients > here[-1]
    mostly = 0.0 if output <= 1 else ahead * (1 - 1 / cohorts)
    for_slot = max(0.0, clients - float(here[-1])) / throughput
    met_waiting = max(mostly * (at["mixed_step_s"] - at["decode_step_s"]) - for_slot, 0.0)
    ttft_mean = queue + prefill + met_waiting
    at["tpot_s"] -= met_waiting / max(output - 1, 1.0)
    ttft = Quantiles(mean=ttft_mean, p50=ttft_mean, p90=ttft_mean, p99=ttft_mean + (0.0 if one_cohort else prefill))
    if equal and curve.prompts_first:  # first tokens come step by step, evenly on both sides of the mean
        half = max(0.0, prefill - at["mixed_step_s"])
        ttft = Quantiles(mean=ttft_mean, p50=ttft_mean, p90=ttft_mean + 0.8 * half, p99=ttft_mean + 0.98 * half)
    metrics = _metrics(
        deployment, workload, kv_tokens, throughput, at, ttft, _around(at["tpot_s"]), running=running, waiting=waiting,
        utilisation=1.0,
    )  # fmt: skip
    return metrics, curve.limit if queued else "concurrency"


def _metrics(
    deployment: Deployment,
    workload: Workload,
    kv_tokens: float,
    throughput: float,
    at: dict[str, float],
    ttft: Quantiles,
    tpot: Quantiles,
    *,
    running: float,
    waiting: float,
    utilisation: float,
) -> ServingMetrics:
    replicas, output = deployment.replicas, workload.output.mean
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
        itl=_itl(at["decode_step_s"], at["long_gap_s"], at["long_gap_share"]),
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
