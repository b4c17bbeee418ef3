"""Hold an option that screening likes against a simulated run: queues, lengths and transfers as they fall.

All step times are scaled by one factor to ask how the layout does if the calibration is off that way; the factor at
which the objective just holds is found by bisection over runs that share arrivals and lengths (common random numbers).
What breaks the objective by far is told by a shorter run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from simmoe.engine.step import StepTable
from simmoe.metrics import ServingMetrics
from simmoe.planning.objective import METRICS, STATISTICS, Limit, held
from simmoe.planning.screen import LoadGrid
from simmoe.predict import Compiled, compiled_for
from simmoe.sim.cluster import simulate
from simmoe.sim.disaggregated import Handover, transfer_of
from simmoe.sim.pool import PoolSetup
from simmoe.specs.cluster import Disaggregation
from simmoe.specs.deployment import Deployment
from simmoe.specs.hardware import Hardware
from simmoe.specs.model import Model
from simmoe.specs.workload import Workload
from simmoe.steady.front_end import delayed

#: Requests measured: 30 beyond a 99th percentile, so that it is known within a few percent.
REQUESTS = 3000
#: A simulated queue that outgrows this many times the requests in flight is not steady.
_WIDEST, _ROUNDS = 4.0, 5
#: How finely is asked what is lacking, where the objective breaks: only to say so.
_ROUNDS_LACKING = 3
#: Of the requests, for a first look; broken there by this factor, the objective does not hold.
_GLANCE, _BY_FAR = 0.2, 1.3


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What is simulated: all replicas, at its load.

    Attributes
    ----------
    deployment, decode : the replicas; with ``decode``, the first compute prompts only and the second decode.
    """

    hardware: Hardware
    model: Model
    deployment: Deployment
    workload: Workload
    limits: tuple[Limit, ...]
    log_sigma: float
    confidence: float
    decode: Deployment | None = None
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
    """Simulate an option at its predicted step times, and at slower and faster ones."""
    slow_factor = math.exp(NormalDist().inv_cdf(trial.confidence) * trial.log_sigma)
    glance = max(100, round(_GLANCE * trial.requests))
    if glance < trial.requests:
        seen = _run(trial, slow_factor, glance)
        if any(limit.of(seen) > _BY_FAR * limit.seconds for limit in trial.limits):
            trial = dataclasses.replace(trial, requests=glance)
    nominal, slow = _run(trial, 1.0, trial.requests), _run(trial, slow_factor, trial.requests)
    holds = held(trial.limits, slow)
    if holds:
        low, high = slow_factor, slow_factor * _WIDEST
    elif held(trial.limits, nominal):
        low, high = min(1.0, slow_factor), slow_factor
    else:
        low, high = slow_factor / _WIDEST**0.5, min(1.0, slow_factor)
    for _ in range(_ROUNDS if holds else _ROUNDS_LACKING):
        middle = math.sqrt(low * high)
        good = held(trial.limits, _run(trial, middle, trial.requests))
        low, high = (middle, high) if good else (low, middle)
    return Confirmation(
        metrics=nominal,
        slow_metrics=slow,
        slow_factor=slow_factor,
        slack=low,
        probability=NormalDist().cdf(math.log(low) / max(trial.log_sigma, 1e-9)),
        requests=trial.requests,
        seed=trial.seed,
    )


def simulated_grid(trial: Trial, shares: Sequence[float]) -> LoadGrid:
    """Simulated latencies against the load, at shares of the trial's, for options that no closed form speaks of.

    The last load stands for saturation.
    """
    assert trial.workload.rate is not None
    loads = trial.workload.rate * np.asarray(shares, dtype=np.float64)
    runs = [
        _run(dataclasses.replace(trial, workload=trial.workload.vary(rate=float(load))), 1.0, trial.requests)
        for load in loads
    ]
    return LoadGrid(
        requests_per_s=loads,
        saturation_requests_per_s=float(loads[-1]),
        latency_s={
            (m, q): np.array([getattr(getattr(run, m), q) for run in runs]) for m in METRICS for q in STATISTICS
        },
        log_sigma=np.full(loads.shape, trial.log_sigma),
        step_parts_s={},
        notes=(),
        kv_tokens=0,
        limit="",
    )


def _run(trial: Trial, factor: float, requests: int) -> ServingMetrics:
    """Metrics as clients see them, with every step ``factor`` times as long as predicted."""
    parts = compiled_for(trial.hardware, trial.model, trial.deployment, trial.workload)
    metrics = simulate(
        scaled(parts.table, factor), trial.workload, trial.deployment, parts.memory.kv_tokens,
        requests=requests, seed=trial.seed, handover=_handover(trial, factor), front_end=parts.engine.parameters,
    ).metrics  # fmt: skip
    return delayed(metrics, parts.engine.parameters, trial.workload.input.mean, trial.deployment.replicas)


def _handover(trial: Trial, factor: float) -> Handover | None:
    if trial.decode is None:
        return None
    theirs: Compiled = compiled_for(trial.hardware, trial.model, trial.decode, trial.workload)
    return Handover(
        decode=PoolSetup(
            table=scaled(theirs.table, factor), deployment=trial.decode, kv_tokens=theirs.memory.kv_tokens
        ),
        transfer=transfer_of(trial.model, trial.deployment, Disaggregation(decode=trial.decode), trial.hardware),
    )


def scaled(table: StepTable, factor: float) -> StepTable:
    """The same table with every time multiplied; without its breakdown."""
    if factor == 1.0:
        return table
    return table.scaled(factor)
