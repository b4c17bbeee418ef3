"""What happens before a request reaches the engine's scheduler: tokenising, HTTP, hand-over between processes.

Model: a constant, a share per request being served, for the front end's event loop also streams their tokens, and a
share per token of the prompt.
Delays the first token and the end; gaps between tokens at the engine stay. A closed loop's client sends its next
request when it has the last token of the one before, so this time is in its cycle: clients = requests/s x (end-to-end
time + think time). In closed form one delay holds for all requests; a simulation counts who runs when a request's
first and last token come. Where lengths differ a constant delay changes little in the engine; where all outputs are
equal, requests that end within a delay of one another come back together, and wait for each other's prompts from then
on.
Left out: saturation of the front end, chance in its delay, start-up costs of the first requests; in an open loop
prompts of different lengths overtaking each other in it. Estimated by `simmoe.calibrate.engines`, see
simmoe/specs/engines.yaml.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from simmoe.metrics import Quantiles, RequestTable, ServingMetrics, StepLog
from simmoe.specs.engines import EngineParameters

Array = NDArray[np.float64]


def front_end_s(parameters: EngineParameters, running: float, input_tokens: float) -> float:
    """Delay of a request's first token while ``running`` requests are served. [s]"""
    return (
        parameters.front_end_time
        + parameters.front_end_time_per_request * running
        + parameters.front_end_time_per_token * input_tokens
    )


def delayed(
    metrics: ServingMetrics, parameters: EngineParameters, input_tokens: float, replicas: int = 1
) -> ServingMetrics:
    """The metrics as a client sees them: TTFT and end-to-end time include the front end, of which a replica has one."""
    delay = front_end_s(parameters, metrics.mean_running / replicas, input_tokens)

    def later(q: Quantiles) -> Quantiles:
        return replace(q, mean=q.mean + delay, p50=q.p50 + delay, p90=q.p90 + delay, p99=q.p99 + delay)

    return replace(metrics, ttft=later(metrics.ttft), e2e=later(metrics.e2e))


def at_client(
    requests: RequestTable, steps: StepLog, parameters: EngineParameters, ranks_per_replica: int
) -> RequestTable:
    """Simulated requests with first and last token when the client has them; a replica's ranks share a front end."""
    delay_s = parameters.front_end_time + parameters.front_end_time_per_token * requests.input_tokens
    each = parameters.front_end_time_per_request
    return replace(
        requests,
        first_token_s=requests.first_token_s
        + delay_s
        + each * _running(requests.first_token_s, requests.rank, steps, ranks_per_replica),
        finished_s=requests.finished_s
        + delay_s
        + each * _running(requests.finished_s, requests.rank, steps, ranks_per_replica),
    )


def _running(times_s: Array, rank: NDArray[np.int64], steps: StepLog, ranks_per_replica: int) -> Array:
    """Requests in the step that ends at each time, over the ranks of the replica that ``rank`` belongs to."""
    replica = rank // ranks_per_replica
    end_s = steps.start_s + steps.duration_s
    total = np.zeros(len(times_s))
    for one in np.unique(steps.rank).astype(np.int64).tolist():
        rows = np.flatnonzero(steps.rank == one)
        rows = rows[np.argsort(steps.start_s[rows], kind="stable")]
        here = np.flatnonzero(replica == one // ranks_per_replica)
        at = rows[np.maximum(np.searchsorted(steps.start_s[rows], times_s[here]) - 1, 0)]
        working = (steps.start_s[at] < times_s[here]) & (end_s[at] >= times_s[here] * (1 - 1e-12))
        working |= times_s[here] <= steps.merged_until_s
        total[here] += np.where(working, steps.running[at], 0.0)
    return total
