"""One layout over all its loads: latencies per replica from nearly idle to saturation, and how much slower it may be.

A calibration says the step's time is off by a lognormal factor of spread sigma. Steps slower by a factor f scale all
times by f: latencies at a rate are f times those of the nominal replica at f times the rate. So one grid of loads
answers for every number of replicas and every f. The slack is the largest f at which the objective still holds, and
the chance that it holds is Phi(ln slack / sigma).
Left out: errors that are not a common factor (a layout's attention slower, its experts faster), burstiness that a
router removes or adds (Poisson arrivals at every replica: a router that balances makes them smoother).
Checked by simulation in `simmoe.planning.confirm` and in tests/test_plan.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from simmoe.planning.objective import Limit
from simmoe.predict import compiled_for, mean_step
from simmoe.specs.deployment import Deployment
from simmoe.specs.hardware import Hardware
from simmoe.specs.model import Model
from simmoe.specs.workload import Workload
from simmoe.steady.front_end import delayed
from simmoe.steady.load_curve import load_curve, saturation_requests_per_s
from simmoe.steady.state import steady_states

Array = NDArray[np.float64]

#: Loads of one replica, as shares of what it carries: closer together where queues form.
LOADS = np.concatenate([[0.002, 0.01, 0.03], np.linspace(0.06, 0.78, 13), 1 - np.geomspace(0.18, 0.01, 8)])
#: What an engine's steps differ from their kernels' beyond the fits. [-] vLLM: 90 % of the inter-token latencies of 38
#: runs of known configuration, models left out, lie within 8.3 % (`simmoe validate validate/vllm_showdown`); the others
#: have no such runs: 13 % median error of TPOT, models left out (simmoe/specs/engines.yaml), over 0.67.
ENGINE_LOG_SIGMA = {"vllm": 0.05, "sglang": 0.19, "trtllm": 0.19, "generic": 0.19}
_SLACKS = np.geomspace(0.02, 50.0, 1200)


@dataclass(frozen=True)
class LoadGrid:
    """Latencies of one replica against its load.

    Attributes
    ----------
    requests_per_s : loads, shape (n,), rising. [1/s]
    saturation_requests_per_s : the most a replica carries. [1/s]
    latency_s : (metric, statistic) -> shape (n,), as a client sees it. [s]
    log_sigma : spread of ln(measured / predicted) of the mean step at the loads, from kernel fits, borrowing,
        extrapolation and the engine, shape (n,). [-]
    step_parts_s : part -> seconds of the mean step at saturation. [s]
    correction : simulated over screened slack, where it is known. [-]
    """

    requests_per_s: Array
    saturation_requests_per_s: float
    latency_s: dict[tuple[str, str], Array]
    log_sigma: Array
    step_parts_s: dict[str, float]
    notes: tuple[str, ...]
    kv_tokens: int
    limit: str
    correction: float = 1.0

    def slack(self, rate: float, limits: Sequence[Limit]) -> tuple[float, str]:
        """Largest factor on all step times at which a replica at ``rate`` holds the limits, and what binds there.

        Parameters
        ----------
        rate : load of the replica. [1/s]

        Returns
        -------
        slack : above 1 if the limits hold as predicted. [-]
        binding : the limit reached there, or "saturation".
        """
        capacity = self.saturation_requests_per_s / rate
        factors = _SLACKS[_SLACKS * rate < self.requests_per_s[-1]]
        loads = factors * rate
        worst = np.zeros(factors.shape)
        ratios = []
        for limit in limits:
            latency = np.interp(loads, self.requests_per_s, self.latency_s[limit.metric, limit.statistic])
            ratios.append(np.maximum.accumulate(factors * latency / limit.seconds))
            worst = np.maximum(worst, ratios[-1])
        if not factors.size:
            return capacity, "saturation"
        if worst[-1] <= 1:
            return float(min(capacity, factors[-1] if factors[-1] == _SLACKS[-1] else capacity)), "saturation"
        at = int(np.searchsorted(worst, 1.0, side="right"))
        binding = max(range(len(limits)), key=lambda i: ratios[i][at])
        if at == 0:
            return float(factors[0]), str(limits[binding])
        low, high = math.log(worst[at - 1]), math.log(worst[at])
        share = -low / (high - low) if high > low else 0.0
        return float(factors[at - 1] * (factors[at] / factors[at - 1]) ** share), str(limits[binding])

    def sigma(self, rate: float) -> float:
        """Spread of the step's logarithm at a load. [-]"""
        return float(np.interp(rate, self.requests_per_s, self.log_sigma))

    def probability(self, rate: float, limits: Sequence[Limit]) -> float:
        """Chance that the limits hold at ``rate`` per replica, given how uncertain the step's time is. [-]"""
        slack = self.slack(rate, limits)[0] * self.correction
        return NormalDist().cdf(math.log(slack) / max(self.sigma(rate), 1e-9))

    def replicas(self, rate: float, limits: Sequence[Limit], confidence: float, most: int) -> int | None:
        """Fewest replicas that carry ``rate`` [1/s] in total and hold the limits with ``confidence``.

        None if not even ``most`` do.
        """

        def enough(n: int) -> bool:
            return self.probability(rate / n, limits) >= confidence

        low = max(1, math.ceil(rate / self.saturation_requests_per_s))
        if low > most or not enough(most):
            return None
        high = low
        while not enough(high):
            low, high = high + 1, min(2 * high, most)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(middle) else (middle + 1, high)
        return low


def screen(
    hardware: Hardware, model: Model, replica: Deployment, workload: Workload, limits: Sequence[Limit]
) -> LoadGrid:
    """Tabulate a replica's latencies over its loads, analytically.

    Raises
    ------
    CapacityError, SpecError
        As `simmoe.predict.predict`.
    """
    parts = compiled_for(hardware, model, replica, workload)
    curve = load_curve(parts.table, replica, workload, parts.memory.kv_tokens)
    capacity = saturation_requests_per_s(curve)
    loads = LOADS * capacity
    found = [metrics for metrics, _ in steady_states(curve, replica, workload, parts.memory.kv_tokens, loads)]
    keys = {(limit.metric, limit.statistic) for limit in limits} | {("ttft", "p99"), ("tpot", "p99"), ("tpot", "p50")}
    seen = [delayed(metrics, parts.engine.parameters, workload.input.mean) for metrics in found]
    latency = {(m, s): np.array([getattr(getattr(metrics, m), s) for metrics in seen]) for m, s in keys}
    few = np.array([0, len(loads) // 2, len(loads) - 1])
    steps = [mean_step(parts.table, curve, found[i], replica, workload) for i in few]
    kernels = np.interp(loads, loads[few], [step.log_sigma for step in steps])
    sigma = np.hypot(kernels, ENGINE_LOG_SIGMA[replica.engine])
    return LoadGrid(
        requests_per_s=loads,
        saturation_requests_per_s=capacity,
        latency_s=latency,
        log_sigma=sigma,
        step_parts_s=steps[-1].parts,
        notes=tuple(parts.engine.times.notes),
        kv_tokens=parts.memory.kv_tokens,
        limit=curve.limit,
    )
