"""Steady states of one replica under Poisson arrivals, for many rates at once.

Model: the number in the system is a birth-death chain. With n there, decodes proceed at the time for n, held up by
prompts that come at the rate offered whatever n is; each leaves after its prompt's time and its decodes'. Steps and the
prompts that wait for them are a Markov chain of their own at about the mean number, `simmoe.steady.prompt_queue`. A
request's latencies follow from what its arrival meets of both, `simmoe.steady.latencies`, and their distributions from
adding these up over fixed points, `simmoe.steady.points`.
Rates are the first axis of every array: numpy's cost per call, most of what one rate takes, is paid once for all.
Left out: the start's transient, preemption, that numbers in the system and prompts waiting rise and fall together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simmoe.errors import SaturationError
from simmoe.metrics import Quantiles
from simmoe.specs.workload import Workload
from simmoe.steady.latencies import (
    NUMBER,
    OUTPUT,
    TOKEN,
    between,
    time_between_tokens,
    time_per_output_token,
    time_to_first_token,
)
from simmoe.steady.load_curve import Curve
from simmoe.steady.points import drawn, outputs_at, quantiles, shares
from simmoe.steady.prompt_queue import PromptQueue, prompt_queue

Array = NDArray[np.float64]

#: What metrics show of the curve.
_SHOWN = ("step_s", "decoding")
#: Share of the variance of the number running that is left in its average over one stay, where all stay alike.
_VARIANCE_LEFT = 2.0 / 3.0


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
    itl: Quantiles
    e2e: Quantiles


def open_loop(curve: Curve, workload: Workload, rates: Array, replicas: int = 1) -> list[OpenLoop]:
    """Solve for every one of ``rates`` offered to one replica, shape (m,). [1/s]

    Raises
    ------
    SaturationError
        If a rate is at or above the saturation throughput; it speaks of all ``replicas``.
    """
    # a peak between whole numbers of requests is reached with the next: what is carried stays at it
    top = max(1, math.ceil(curve.in_flight[curve.peak]))
    most, highest = float(curve.requests_per_s[curve.peak]), float(rates.max())
    if highest >= most:
        raise SaturationError(
            f"{highest * replicas:g} requests/s saturate the deployment, which carries {most * replicas:.4g} "
            f"requests/s (limit: {curve.limit}); lower --rate, or add GPUs (--gpus) or lower --active-experts"
        )
    # the number in the system if it did not vary; below the curve's first point one proceeds alone
    rising = slice(0, curve.peak + 1)
    about = np.interp(rates, curve.requests_per_s[rising], curve.in_flight[rising])
    about = about * np.minimum(rates / curve.requests_per_s[0], 1.0)
    queue = prompt_queue(curve, workload, rates, np.clip(about / -np.expm1(-about), 1.0, top), np.exp(-about))
    number = np.arange(top + 1, dtype=np.float64)
    own_s, decode_s = (np.interp(number, curve.in_flight, column) for column in (curve.prefill_s, curve.decode_step_s))
    # the last column is all who find no slot
    weight = np.zeros((rates.size, top + 2))
    death = _departures(curve, number[1:], own_s[1:], decode_s[1:], queue)
    np.cumsum(np.log(rates[:, None] / death), axis=1, out=weight[:, 1:-1])
    weight[:, :-1] -= weight.max(axis=1, keepdims=True)
    np.exp(weight, out=weight)
    ratio = rates / most
    weight[:, -1] = weight[:, -2] * ratio / (1 - ratio)
    p = weight / weight.sum(axis=1, keepdims=True)
    crowd = p * np.minimum(np.arange(top + 2), top)
    running = crowd.sum(axis=1)
    at = curve.at(np.clip(running, curve.in_flight[0], curve.in_flight[-1]), _SHOWN)

    # arrivals see time averages; whom a token meets is met by all who are there
    met, beside = drawn(p, NUMBER), np.minimum(drawn(crowd, NUMBER), top)
    ttft_s = time_to_first_token(curve, workload, rates, np.minimum(met, top), decode_s, queue)
    none_free = met > top
    if none_free.any():
        ttft_s += np.where(none_free, -np.log1p(-shares()[TOKEN]) / (most - rates)[:, None], 0.0)
    tpot_s = time_per_output_token(curve, workload, running, beside, decode_s, queue)
    lasting = np.maximum(running[:, None] + math.sqrt(_VARIANCE_LEFT) * (beside - running[:, None]), 1.0)
    tpot_mean = between(decode_s, lasting).mean(axis=1) * queue.stretch
    later = np.maximum(outputs_at(workload, OUTPUT) - 1.0, 0.0)
    gaps = np.maximum(later * curve.steps_per_token(workload), 1.0)
    tpot_mean = (tpot_mean + queue.first_s * (1.0 / gaps).mean()) * curve.steps_per_token(workload)
    itl_s, itl_mean = time_between_tokens(curve, beside, decode_s, queue)
    ttft_mean = ttft_s.mean(axis=1)
    e2e_mean = ttft_mean + max(workload.output.mean - 1, 0.0) * tpot_mean
    told = quantiles(
        np.concatenate([ttft_s, tpot_s, ttft_s + later * tpot_s, itl_s]),
        np.concatenate([ttft_mean, tpot_mean, e2e_mean, itl_mean]),
    )
    ttft, tpot, e2e, itl = (told[i * rates.size : (i + 1) * rates.size] for i in range(4))

    # whoever is not running waits: for a slot, or for the running step to end (Little's law gives both together)
    for_slot = p[:, -1] / (1 - ratio)
    found = []
    for i, rate in enumerate(rates.tolist()):
        runs = float(running[i])
        found.append(
            OpenLoop(
                at={name: float(column[i]) for name, column in at.items()},
                running=runs,
                waiting=max(float(for_slot[i]), rate * e2e[i].mean - runs),
                busy=1.0 - float(p[i, 0]),
                wait=float(p[i, -2] + p[i, -1]),
                ttft=ttft[i],
                tpot=tpot[i],
                itl=itl[i],
                e2e=e2e[i],
            )
        )
    return found


def _departures(curve: Curve, number: Array, own_s: Array, decode_s: Array, queue: PromptQueue) -> Array:
    """Requests that end with so many in the system, shape (loads, numbers). [1/s]

    Prompts come at the rate offered whatever the number is, and hold all decodes up by it. With all slots taken none
    comes that none makes room for: then the curve's throughput holds.
    """
    stay_s = own_s + queue.first_s[:, None] + decode_s * (curve.decode_steps * queue.stretch[:, None])
    ends = number / stay_s
    ends[:, -1] = curve.requests_per_s[curve.peak]
    return np.asarray(ends)
