"""Hold a layout that screening likes against a simulated run: queues, lengths and routing as they fall, not on average.

All step times are scaled by one factor to ask how the layout does if the calibration is off that way; the factor at
which the objective just holds is found by bisection over runs that share arrivals and lengths (common random numbers).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from statistics import NormalDist

from simmoe.front_end import delayed
from simmoe.metrics import ServingMetrics
from simmoe.planning.objective import Limit, held
from simmoe.predict import compiled_for
from simmoe.sim.cluster import simulate
from simmoe.specs.deployment import Deployment
from simmoe.specs.hardware import Hardware
from simmoe.specs.model import Model
from simmoe.specs.workload import Workload
from simmoe.step import StepTable

#: Requests measured: 30 beyond a 99th percentile, so that it is known within a few percent.
REQUESTS = 3000
#: A simulated queue that outgrows this many times the requests in flight is not steady.
_WIDEST, _ROUNDS = 4.0, 5
#: How finely is asked what is lacking, where the objective breaks: only to say so.
_ROUNDS_LACKING = 3


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A layout to be simulated: all replicas, at its load."""

    hardware: Hardware
    model: Model
    deployment: Deployment
    workload: Workload
    limits: tuple[Limit, ...]
    log_sigma: float
    confidence: float
    seed: int = 0
    requests: int = REQUESTS


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """What the simulation says.

    Attributes
    ----------
    metrics : at the step times predicted.
    slow_metrics : with steps slower by ``slow_factor``, what the asked-for confidence has to withstand.
    slack : largest factor on step times at which the objective holds. [-]
    probability : chance that it holds, from the slack and the calibration's spread. [-]
    """

    metrics: ServingMetrics
    slow_metrics: ServingMetrics
    slow_factor: float
    slack: float
    probability: float
    requests: int
    seed: int

    def confirms(self, confidence: float) -> bool:
        """Whether the objective holds with this confidence."""
        return self.probability >= confidence - 1e-9


def confirm(trial: Trial) -> Confirmation:
    """Simulate a layout at its predicted step times, and at slower and faster ones."""
    parts = compiled_for(trial.hardware, trial.model, trial.deployment, trial.workload)

    def at(factor: float) -> ServingMetrics:
        metrics = simulate(
            scaled(parts.table, factor), trial.workload, trial.deployment, parts.memory.kv_tokens,
            requests=trial.requests, seed=trial.seed,
        ).metrics  # fmt: skip
        # every replica has a front end of its own
        each = dataclasses.replace(metrics, mean_running=metrics.mean_running / trial.deployment.replicas)
        seen = delayed(each, parts.engine.parameters, trial.workload.input.mean)
        return dataclasses.replace(seen, mean_running=metrics.mean_running)

    slow_factor = math.exp(NormalDist().inv_cdf(trial.confidence) * trial.log_sigma)
    nominal, slow = at(1.0), at(slow_factor)
    holds = held(trial.limits, slow)
    low, high = (slow_factor, slow_factor * _WIDEST) if holds else (slow_factor / _WIDEST**0.5, slow_factor)
    for _ in range(_ROUNDS if holds else _ROUNDS_LACKING):
        middle = math.sqrt(low * high)
        good = held(trial.limits, at(middle))
        low, high = (middle, high) if good else (low, middle)
    slack = low
    return Confirmation(
        metrics=nominal,
        slow_metrics=slow,
        slow_factor=slow_factor,
        slack=slack,
        probability=NormalDist().cdf(math.log(slack) / max(trial.log_sigma, 1e-9)),
        requests=trial.requests,
        seed=trial.seed,
    )


def scaled(table: StepTable, factor: float) -> StepTable:
    """The same table with every time multiplied; without its breakdown."""
    if factor == 1.0:
        return table
    return table.scaled(factor)
