"""Steady states of one replica under Poisson arrivals, for many rates at once.

Model: the number in the system is the birth-death chain with birth rate lambda and death rate X(n) of
`simmoe.steady.load_curve` (flow-equivalent server; Lazowska et al., Quantitative System Performance, 1984, ch. 8), and
a request's latencies follow from what its arrival meets. With asynchronous scheduling the step after the one that an
arrival meets is decided already, so a newcomer waits for it too, unless the engine is idle.
Rates are the first axis of every array: numpy's cost per call, most of what one rate takes, is paid once for all.
Left out: the start's transient, preemption.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simmoe.errors import SaturationError
from simmoe.metrics import Quantiles
from simmoe.specs.workload import Workload
from simmoe.steady.load_curve import SHOWN, Curve

Array = NDArray[np.float64]

#: Share of the variance of the number running that is left in its average over one request's stay: for
#: M/D/inf the autocovariance falls linearly to 0 over the stay, and 2 * integral of (1 - u)^2 over [0, 1] is 2/3.
_VARIANCE_LEFT = 2.0 / 3.0
#: Representative numbers in the system that a request may meet, moments of its arrival within a step, and prompts that
#: may come in the same step.
_MET = 24
_MOMENTS = ((np.arange(6) + 0.5) / 6)[:, None]
_OTHERS = np.arange(5.0)[:, None]
_FACTORIALS = np.array([1.0, 1.0, 2.0, 6.0, 24.0])[:, None]
_SHARES = np.array([0.5, 0.9, 0.99])
#: Quantiles of an exponential distribution of mean 1, equally likely.
_EXPONENTIAL = -np.log1p(-(np.arange(64) + 0.5) / 64)


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """One replica at one offered rate.

    Attributes
    ----------
    at : the curve's quantities at the mean number running, see `Curve.at`.
    running, waiting : mean numbers. [requests]
    busy : share of time with at least one request. [-]
    wait : chance that an arrival finds all slots taken. [-]
    """

    at: dict[str, float]
    running: float
    waiting: float
    busy: float
    wait: float
    ttft: Quantiles
    tpot: Quantiles


def open_loop(curve: Curve, workload: Workload, rates: Array, replicas: int = 1) -> list[OpenLoop]:
    """Solve for every one of ``rates`` offered to one replica, shape (m,). [1/s]

    Raises
    ------
    SaturationError
        If a rate is at or above the saturation throughput; it speaks of all ``replicas``.
    """
    # a peak between whole numbers of requests is reached with the next: what is carried stays at it
    top = max(1, math.ceil(curve.in_flight[curve.peak]))
    n = np.arange(1, top + 1, dtype=np.float64)
    upto = slice(0, curve.peak + 1)
    death = np.interp(n, curve.in_flight[upto], curve.requests_per_s[upto])
    # below the table's first point one request in the system simply proceeds
    death = np.minimum(death, n * curve.requests_per_s[0] / curve.in_flight[0])
    highest = float(rates.max())
    if highest >= death[-1]:
        raise SaturationError(
            f"{highest * replicas:g} requests/s saturate the deployment, which carries {death[-1] * replicas:.4g} "
            f"requests/s (limit: {curve.limit}); lower --rate, or add GPUs (--gpus) or lower --active-experts"
        )
    ratio = rates / death[-1]
    log_weight = np.zeros((rates.size, top + 1))
    np.cumsum(np.log(rates)[:, None] - np.log(death), axis=1, out=log_weight[:, 1:])
    weight = np.exp(log_weight - log_weight.max(axis=1, keepdims=True))
    tail = weight[:, -1] * ratio / (1 - ratio)
    total = weight.sum(axis=1) + tail
    p = weight / total[:, None]
    full = tail / total
    numbers = np.arange(top + 1, dtype=np.float64)
    running = (p * numbers).sum(axis=1) + full * top
    at = curve.at(np.clip(running, curve.in_flight[0], curve.in_flight[-1]), SHOWN)

    # what one request sees: the number running averages out over its stay
    seen = np.maximum(running[:, None] + math.sqrt(_VARIANCE_LEFT) * (numbers - running[:, None]), 1.0)
    mass = p.copy()
    mass[:, -1] += full
    tpot = weighted_quantiles(np.interp(seen, curve.in_flight, curve.tpot_s), mass * np.maximum(numbers, 1e-9))
    ttft = _ttft(curve, workload, rates, p, full, 1.0 / (death[-1] - rates))

    # whoever is not running waits: for a slot, or for the running step to end (Little's law gives both together)
    for_slot = weight[:, -1] / total * ratio / (1 - ratio) ** 2
    steps = max(workload.output.mean - 1, 0.0)
    found = []
    for i, (rate, first, each) in enumerate(zip(rates.tolist(), ttft, tpot, strict=True)):
        runs = float(running[i])
        found.append(
            OpenLoop(
                at={name: float(column[i]) for name, column in at.items()},
                running=runs,
                waiting=max(float(for_slot[i]), rate * (first.mean + steps * each.mean) - runs),
                busy=1.0 - float(p[i, 0]),
                wait=float((weight[i, -1] + tail[i]) / total[i]),
                ttft=first,
                tpot=each,
            )
        )
    return found


def _ttft(curve: Curve, workload: Workload, rates: Array, p: Array, full: Array, slot_wait_s: Array) -> list[Quantiles]:
    """Time to first token under Poisson arrivals, per rate.

    The rest of the running step (long steps are met more often) and the one decided ahead, if the engine does so, then
    the step that carries the prompt together with the prompts that arrived during the same step, more steps if the
    token budget does not hold them, and, with probability ``full``, an exponential wait for a slot before all that.
    Axes: rate, step met, step decided ahead, moment, other prompts, number in the system.
    """
    mass, states, there = _representatives(p)
    at = curve.at(states, ("decode_step_s", "mixed_step_s", "mixed_share", "prefill_s", "prompt_s", "room", "chunk"))
    idle = np.minimum(np.where(states < 1, 1 - states, 0.0), 1.0)
    long = at["mixed_share"] * at["mixed_step_s"]
    into_long = long / (long + (1 - at["mixed_share"]) * at["decode_step_s"])
    room = at["room"][:, None]
    cohort = np.maximum(at["chunk"] / workload.input.mean, 1.0)  # prompts that the mixed step already holds
    more_steps = np.ceil((1 + _OTHERS) * workload.input.mean / room) - np.ceil(workload.input.mean / room)
    company = np.maximum(_OTHERS - (cohort[:, None] - 1), 0.0) * at["prompt_s"][:, None] * (more_steps == 0)
    own = at["prefill_s"][:, None] + company + more_steps * at["mixed_step_s"][:, None]

    step_s = np.stack([at["decode_step_s"], at["mixed_step_s"]], axis=1)
    met = np.stack([1 - into_long, into_long], axis=1)
    ahead_s, ahead = np.zeros_like(states)[:, None], np.ones_like(states)[:, None]
    if curve.steps_ahead:
        ahead_s, ahead = step_s, np.stack([1 - at["mixed_share"], at["mixed_share"]], axis=1)
    mean_others = (rates[:, None, None] * step_s)[:, :, None]
    poisson = np.exp(-mean_others) * mean_others**_OTHERS / _FACTORIALS
    poisson[:, :, -1] += 1 - poisson.sum(axis=2)
    before = step_s[:, :, None, None] * _MOMENTS + ahead_s[:, None, :, None]
    chance = (1 - idle)[:, None, None] * met[:, :, None] * ahead[:, None]
    joint = (mass[:, None, None] * chance)[:, :, :, None] * poisson[:, :, None] / _MOMENTS.size
    values = before[:, :, :, :, None] + own[:, None, None, None]
    weights = np.broadcast_to(joint[:, :, :, None], values.shape)
    latest = np.where(there, values[:, -1, -1].max(axis=(1, 2)), 0.0).max(axis=1)
    late = np.where(full > 0, latest, 0.0)[:, None] + slot_wait_s[:, None] * _EXPONENTIAL
    lines = (rates.size, -1)
    return weighted_quantiles(
        np.concatenate([values.reshape(lines), at["prefill_s"], late], axis=1),
        np.concatenate(
            [weights.reshape(lines), mass * idle, np.broadcast_to(full[:, None] / _EXPONENTIAL.size, late.shape)],
            axis=1,
        ),
    )


def _representatives(p: Array) -> tuple[Array, Array, NDArray[np.bool_]]:
    """At most `_MET` numbers in the system that stand for all: the mass between two quantiles stands at its mean.

    Returns mass, number, and whether a place is taken, each of shape (rates, `_MET`).
    """
    rates, states = p.shape
    upto = np.cumsum(p, axis=1)
    quantiles = np.linspace(0, 1, _MET + 1)[1:-1] * p.sum(axis=1, keepdims=True)
    after_edge = np.zeros((rates, states), dtype=np.int64)
    for row in range(rates):
        after_edge[row, np.searchsorted(upto[row], quantiles[row])] = 1
    label = np.cumsum(after_edge, axis=1) - after_edge
    place = (label + _MET * np.arange(rates)[:, None]).ravel()
    size = rates * _MET

    def summed(each: Array) -> Array:
        return np.bincount(place, weights=each.ravel(), minlength=size).astype(np.float64).reshape(rates, _MET)

    mass = summed(p)
    return mass, summed(p * np.arange(states)) / np.maximum(mass, 1e-300), np.arange(_MET) <= label[:, -1:]


def weighted_quantiles(values: Array, weights: Array) -> list[Quantiles]:
    """Mean and percentiles of weighted values, a distribution a row. Both of shape (rows, n)."""
    means = (values * weights).sum(axis=1) / weights.sum(axis=1)
    rising = np.arange(values.shape[1]) if (values[:, 1:] >= values[:, :-1]).all() else None
    found = []
    for row, weight, mean in zip(values, weights, means.tolist(), strict=True):
        order = np.argsort(row) if rising is None else rising
        upto = np.cumsum(weight[order])
        at = np.minimum(np.searchsorted(upto, _SHARES * upto[-1]), row.size - 1)
        p50, p90, p99 = row[order[at]].tolist()
        found.append(Quantiles(mean=mean, p50=p50, p90=p90, p99=p99))
    return found
