"""Latencies of an open loop's requests at fixed points, each a request with what it brings and what it meets.

A point has lengths of its own, meets a number in the system, a step under way, and others' prompts
(`simmoe.steady.prompt_queue`). Rows are loads.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from simmoe.specs.workload import Lengths, TraceReplay, Workload
from simmoe.steady.load_curve import Curve
from simmoe.steady.points import drawn, lengths_at, normals, outputs_at, prompts_at, shares
from simmoe.steady.prompt_queue import PromptQueue

Array = NDArray[np.float64]
Numbers = NDArray[np.int64]

#: Coordinates of `points.shares`.
_PROMPT, NUMBER, _STEP, _MOMENT, _CAME, _AHEAD, OUTPUT, TOKEN, _GAP = range(9)


def between(by_number: Array, at: Array) -> Array:
    """A table by whole numbers from 0 on, read between them, too."""
    lower = np.minimum(at.astype(np.int64), len(by_number) - 2)
    return by_number.take(lower) + np.diff(by_number).take(lower) * (at - lower)


def time_to_first_token(
    curve: Curve, workload: Workload, rates: Array, number: Numbers, decode_s: Array, queue: PromptQueue
) -> Array:
    """Time to first token at every point, shape (loads, points). [s]

    ``number`` is what a point meets in the system, ``decode_s`` a decode step by it, shape (numbers,); so below.

    The rest of the running step (long steps are met more often) and the one decided ahead, if the engine does so, then
    steps that the prompts before fill, and the one that ends the prompt, with those that came in the same step as far
    as it has room. With asynchronous scheduling the step after the one that an arrival meets is decided already, so a
    newcomer waits for it too, unless the engine is idle.
    """
    times, dp, share = curve.times, curve.times.dp, shares()
    idle = number == 0
    length, room = prompts_at(workload, _PROMPT), np.where(idle, curve.token_budget, queue.room[:, None])
    slower_s = _slower(decode_s, queue, number)

    met = drawn(queue.met, _STEP)
    met_s = queue.of_step(queue.step_s, met)
    rest_s = met_s * (1.0 - share[_MOMENT])
    left = queue.of_step(queue.waiting - queue.served, met)
    came = queue.came_during(met_s, _CAME)
    steps = np.where(met == 0, 1.0, 0.0) if curve.prompts_first else np.ones_like(rest_s)
    if curve.steps_ahead:
        left = left + queue.of_step(queue.waiting, drawn(queue.come, _AHEAD))
        computed = queue.computed(left)
        rest_s = rest_s + np.where(left > 0, queue.prompt_step_s(computed), queue.decode_s[:, None])
        steps = steps + (np.where(left > 0, 0.0, 1.0) if curve.prompts_first else 1.0)
        left = left - computed
    before = np.where(idle, 0.0, left + came * share[_MOMENT])
    behind = np.where(idle, 0.0, came * (1.0 - share[_MOMENT]))
    each, others = room / dp, before * (1.0 - 1.0 / dp)  # room of one rank, prompts of others
    full = np.ceil((before / dp + length) / each - 1e-9) - 1.0
    full_s = queue.prompt_step_s(np.minimum(each + others, room), idle)
    last = before / dp + length - full * each + others
    last = np.minimum(last + behind + full * rates[:, None] * full_s * workload.input.mean, room)
    prompts_s = full * full_s + queue.prompt_step_s(last, idle)
    if not curve.prompts_first:
        steps = steps + full + 1.0
    own_s = times.own_prompt_s(length, full, last, room)
    return prompts_s + own_s + np.where(idle, 0.0, rest_s + slower_s * steps)


def _slower(decode_s: Array, queue: PromptQueue, number: Numbers) -> Array:
    """How much longer a decode step takes with a number in the system than at the queue's mean, (loads, points). [s]"""
    return np.asarray(decode_s.take(number) - queue.decode_s[:, None])


def time_per_output_token(
    curve: Curve, workload: Workload, running: Array, number: Numbers, decode_s: Array, queue: PromptQueue
) -> Array:
    """Time per output token at every point, shape (loads, points). [s]

    The number running averages out over a request's stay: where all take S, its autocovariance falls linearly to 0
    over S (M/D/inf), and of its variance 1 - s / 3 S is left in the average over s. Prompts that others bring in its
    steps come and go within a few steps; over n gaps their time is taken as gamma distributed.
    """
    output = np.maximum(outputs_at(workload, OUTPUT), 2.0)
    seen = np.maximum(running[:, None] + _kept(workload.output, workload.trace) * (number - running[:, None]), 1.0)
    per_token = curve.steps_per_token(workload)
    state_s = between(decode_s, seen) * queue.stretch[:, None] * per_token

    longer = ((queue.stretch - 1.0) * queue.decode_s)[:, None]
    gaps = np.maximum((output - 1.0) * per_token, 1.0)
    # long gaps follow each other; the first after the prompt, with prompts that came meanwhile, is one more
    variance = np.minimum(gaps * queue.lasting_variance[:, None], gaps**2 * queue.gap_variance[:, None])
    variance = np.maximum(variance, 0.0) + queue.first_variance[:, None]
    total_s = np.maximum(gaps * longer + queue.first_s[:, None], 1e-300)
    shape = np.maximum(total_s**2 / np.maximum(variance, 1e-300), 1e-9)
    # Wilson and Hilferty, "The distribution of chi-square", PNAS 17 (1931)
    root = np.maximum(1.0 - 1.0 / (9.0 * shape) + normals(_GAP) / (3.0 * np.sqrt(shape)), 0.0)
    gamma = root * root * root  # much faster than a power
    least_s = float(curve.decode_step_s[0]) * per_token
    varying_s = total_s * gamma / gaps - longer
    return np.asarray(np.maximum(state_s + varying_s * per_token, least_s))


@lru_cache(maxsize=64)
def _kept(lengths: Lengths, trace: TraceReplay | None) -> Array:
    """Share of the spread of the number running that is left in its average over a stay, shape (points,). [-]"""
    stay = np.maximum(lengths_at(lengths, trace, "output_tokens", OUTPUT), 2.0) / lengths.mean
    return np.asarray(np.sqrt(np.where(stay < 1.0, 1.0 - stay / 3.0, (1.0 - 1.0 / (3.0 * stay)) / stay)))


def time_between_tokens(curve: Curve, number: Numbers, decode_s: Array, queue: PromptQueue) -> tuple[Array, Array]:
    """Time between two tokens at every point and its mean, shapes (loads, points), (loads,). [s]"""
    begin = np.maximum(queue.after_token + queue.at_first / max(curve.decode_steps, 1.0), 0.0)
    begin = begin / begin.sum(axis=1, keepdims=True)
    slower_s = _slower(decode_s, queue, number)
    gaps_s = queue.gaps_s(drawn(begin, TOKEN), shares()[_GAP], normals(_PROMPT))
    return gaps_s + slower_s, (begin * queue.gap_s).sum(axis=1) + slower_s.mean(axis=1) * queue.stretch
