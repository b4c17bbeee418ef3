"""Steady states of one replica under Poisson arrivals, for many rates at once.

Model: the number in the system is the birth-death chain with birth rate lambda and death rate X(n) of
`simmoe.steady.load_curve` (flow-equivalent server; Lazowska et al., Quantitative System Performance, 1984, ch. 8).
Steps and the prompts that wait for them are a Markov chain at the mean number, `simmoe.steady.prompt_queue`. A
request's latencies follow from what its arrival meets: added up over fixed points (`simmoe.steady.points`), each a
request with lengths of its own, that meets a number in the system, a step under way, and others' prompts. With
asynchronous scheduling the step after the one that an arrival meets is decided already, so a newcomer waits for it
too, unless the engine is idle.
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
from simmoe.steady.load_curve import SHOWN, Curve
from simmoe.steady.points import drawn, normals, outputs_at, prompts_at, quantiles, read_rows, shares
from simmoe.steady.prompt_queue import PromptQueue, prompt_queue

Array = NDArray[np.float64]

#: Coordinates of `points.shares`.
_PROMPT, _NUMBER, _STEP, _MOMENT, _CAME, _AHEAD, _OUTPUT, _MET, _TOKEN, _GAP = range(10)


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

    queue = prompt_queue(curve, workload, rates, np.clip(running / (1.0 - p[:, 0]), 1.0, top), p[:, 0])
    chances = np.concatenate([p, full[:, None]], axis=1)
    ttft_s = _ttft(curve, workload, rates, chances, queue, 1.0 / (death[-1] - rates))
    tpot_s, tpot_mean = _tpot(curve, workload, running, chances, queue)
    later = np.maximum(outputs_at(workload, _OUTPUT) - 1.0, 0.0)
    ttft = quantiles(ttft_s)
    tpot = quantiles(tpot_s, tpot_mean)
    steps = max(workload.output.mean - 1, 0.0)
    e2e = quantiles(ttft_s + later * tpot_s, np.array([each.mean for each in ttft]) + steps * tpot_mean)
    itl = quantiles(_itl(curve, chances, queue))

    # whoever is not running waits: for a slot, or for the running step to end (Little's law gives both together)
    for_slot = weight[:, -1] / total * ratio / (1 - ratio) ** 2
    found = []
    for i, rate in enumerate(rates.tolist()):
        runs = float(running[i])
        found.append(
            OpenLoop(
                at={name: float(column[i]) for name, column in at.items()},
                running=runs,
                waiting=max(float(for_slot[i]), rate * e2e[i].mean - runs),
                busy=1.0 - float(p[i, 0]),
                wait=float((weight[i, -1] + tail[i]) / total[i]),
                ttft=ttft[i],
                tpot=tpot[i],
                itl=itl[i],
                e2e=e2e[i],
            )
        )
    return found


def _ttft(
    curve: Curve, workload: Workload, rates: Array, chances: Array, queue: PromptQueue, slot_wait_s: Array
) -> Array:
    """Time to first token at every point, shape (loads, points). [s]

    The rest of the running step (long steps are met more often) and the one decided ahead, if the engine does so, then
    steps that the prompts before fill, and the one that ends the prompt, with those that came in the same step as far
    as it has room. Who finds all slots taken waits for one, exponentially, before all that.
    """
    times, dp, share = curve.times, curve.times.dp, shares()
    length, room = prompts_at(workload, _PROMPT), queue.room[:, None]
    number = drawn(np.cumsum(chances, axis=1), share[_NUMBER])
    no_slot = number == chances.shape[1] - 1
    number = np.minimum(number, chances.shape[1] - 2)
    rows = np.arange(len(rates))[:, None]

    met = drawn(np.cumsum(queue.share * queue.step_s, axis=1), share[_STEP])
    met_s = queue.step_s[rows, met]
    rest_s = met_s * (1.0 - share[_MOMENT])
    left = queue.waiting[rows, met] - queue.served[rows, met]
    came = _came(queue, met_s, share[_CAME])
    slower_s = np.interp(np.maximum(number, 1.0), curve.in_flight, curve.decode_step_s) - queue.decode_s[:, None]
    steps = np.where(met == 0, 1.0, 0.0) if curve.prompts_first else np.ones_like(rest_s)
    if curve.steps_ahead:
        arrived = np.matmul((queue.share[:, None]), _per_step(queue))[:, 0]
        left = left + queue.waiting[rows, drawn(np.cumsum(arrived, axis=1), share[_AHEAD])]
        computed = read_rows(left, queue.waiting, queue.served)
        rest_s = rest_s + np.where(left > 0, read_rows(computed, queue.sizes, queue.sizes_s), queue.decode_s[:, None])
        steps = steps + (np.where(left > 0, 0.0, 1.0) if curve.prompts_first else 1.0)
        left = left - computed
    idle = number == 0
    before = np.where(idle, 0.0, left + came * share[_MOMENT])
    behind = np.where(idle, 0.0, came * (1.0 - share[_MOMENT]))
    each = room / dp  # of one rank
    full = np.ceil((before / dp + length) / each - 1e-9) - 1.0
    full_s = read_rows(np.minimum(each + before * (1.0 - 1.0 / dp), room), queue.sizes, queue.sizes_s)
    last = before / dp + length - full * each + before * (1.0 - 1.0 / dp)
    last = np.minimum(last + behind + full * rates[:, None] * full_s * workload.input.mean, room)
    alone_s = np.where(full > 0, queue.alone_s[:, -1:], 0.0) * full + read_rows(last, queue.sizes, queue.alone_s)
    beside_s = full * full_s + read_rows(last, queue.sizes, queue.sizes_s)
    if not curve.prompts_first:
        beside_s = beside_s + slower_s * (full + 1.0)
    own_s = times.own_prompt_s(length, full, last, room)
    slot_s = np.where(no_slot, -np.log1p(-share[_TOKEN]) * slot_wait_s[:, None], 0.0)
    return np.where(idle, alone_s, rest_s + slower_s * steps + beside_s) + own_s + slot_s


def _per_step(queue: PromptQueue) -> Array:
    """Distribution of the tokens that come during a step, by the tokens that waited before it, (loads, n, n). [-]"""
    rows = np.arange(len(queue.step_s))[:, None]
    return queue.came[rows, _duration(queue, queue.step_s)]


def _duration(queue: PromptQueue, step_s: Array) -> NDArray[np.int64]:
    """Nearest of the tabulated lengths of a step."""
    low, high = queue.durations_s[:, :1], queue.durations_s[:, -1:]
    last = queue.durations_s.shape[1] - 1
    return np.rint((step_s - low) / np.maximum(high - low, 1e-300) * last).astype(np.int64)


def _came(queue: PromptQueue, step_s: Array, share: Array) -> Array:
    """Prompt tokens that come beside a newcomer during the step that it meets, shape (loads, points). [tokens]"""
    durations, cells = queue.came.shape[1:]
    upto = np.cumsum(queue.came, axis=2)
    upto = (upto / upto[:, :, -1:] + np.arange(durations)[:, None]).reshape(len(upto), -1)
    wanted = _duration(queue, step_s)
    cell = [np.searchsorted(row, share * (1 - 1e-9) + at) for row, at in zip(upto, wanted, strict=True)]
    return queue.waiting[np.arange(len(upto))[:, None], np.clip(np.array(cell) - wanted * cells, 0, cells - 1)]


def _tpot(curve: Curve, workload: Workload, running: Array, chances: Array, queue: PromptQueue) -> tuple[Array, Array]:
    """Time per output token at every point and its mean, shapes (loads, points), (loads,). [s]

    The number running averages out over a request's stay: where all take S, its autocovariance falls linearly to 0
    over S (M/D/inf), and of its variance 1 - s / 3 S is left in the average over s. Prompts that others bring in its
    steps come and go within a few steps; over n gaps their time is taken as gamma distributed.
    """
    numbers = np.arange(chances.shape[1], dtype=np.float64)
    numbers[-1] = numbers[-2]
    lived = np.cumsum(chances * np.maximum(numbers, 1e-9), axis=1)
    number = numbers[drawn(lived, shares()[_MET])]
    output = np.maximum(outputs_at(workload, _OUTPUT), 2.0)
    stay = output / workload.output.mean
    kept = np.where(stay < 1.0, 1.0 - stay / 3.0, (1.0 - 1.0 / (3.0 * stay)) / stay)
    seen = np.maximum(running[:, None] + np.sqrt(kept) * (number - running[:, None]), 1.0)
    state_s = np.interp(seen, curve.in_flight, curve.tpot_s)
    lasting = np.maximum(running[:, None] + math.sqrt(2.0 / 3.0) * (numbers - running[:, None]), 1.0)
    weight = chances * np.maximum(numbers, 1e-9)
    mean = (np.interp(lasting, curve.in_flight, curve.tpot_s) * weight).sum(axis=1) / weight.sum(axis=1)

    first_s = queue.decode_s[:, None]
    longer = (queue.after_token * (queue.gap_s - first_s)).sum(axis=1)
    square = (queue.after_token * (queue.gap_square - 2 * queue.gap_s * first_s + first_s**2)).sum(axis=1)
    variance = np.maximum(square - longer**2, 0.0)
    if not curve.prompts_first:  # a long step brings another
        variance = variance * (1.0 + queue.echo) / (1.0 - queue.echo)
    per_token = curve.decode_steps / max(workload.output.mean - 1.0, 1e-9)
    gaps = np.maximum((output - 1.0) * per_token, 1.0)
    shape = np.maximum(gaps * (longer**2 / np.maximum(variance, 1e-300))[:, None], 1e-9)
    # Wilson and Hilferty, "The distribution of chi-square", PNAS 17 (1931)
    gamma = np.maximum(1.0 - 1.0 / (9.0 * shape) + normals(_GAP) / (3.0 * np.sqrt(shape)), 0.0) ** 3
    return state_s + longer[:, None] * (gamma - 1.0) * per_token, mean


def _itl(curve: Curve, chances: Array, queue: PromptQueue) -> Array:
    """Time between two tokens at every point, shape (loads, points). [s]"""
    numbers = np.arange(chances.shape[1], dtype=np.float64)
    numbers[-1] = numbers[-2]
    step_s = np.interp(np.maximum(numbers, 1.0), curve.in_flight, curve.step_s)
    number = numbers[drawn(np.cumsum(chances * np.maximum(numbers, 1e-9) / step_s, axis=1), shares()[_MET])]
    rows = np.arange(len(chances))[:, None]
    start = drawn(np.cumsum(queue.after_token, axis=1), shares()[_TOKEN])
    mean, square = queue.gap_s[rows, start], queue.gap_square[rows, start]
    spread = np.sqrt(np.log(np.maximum(square / mean**2, 1.0)))
    gap_s = mean * np.exp(spread * normals(_GAP) - spread**2 / 2)
    slower_s = np.interp(np.maximum(number, 1.0), curve.in_flight, curve.decode_step_s) - queue.decode_s[:, None]
    return np.maximum(gap_s + slower_s, slower_s + queue.decode_s[:, None])
