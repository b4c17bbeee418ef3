"""Closed loops of equal answers, where prompts ride with decodes: cohorts that come round together.

Model: answers of S decode steps each end in the order in which their prompts were computed, so requests pass the engine
as a train that keeps its order for ever. n prompts fill C steps in a row, as many a step as the token budget holds;
then all decode. The first ends S steps after its prompt, and a round later, P steps after the last, its seat's next
prompt begins: P = (first prompt) + S + those that its client, or whoever takes the seat, is away for. The others follow
without a gap, for they end at most a step apart. A request whose prompt ends with step j meets the prompts of others in
those of the steps j + 1 .. j + S that are among 1 .. C or P + 1 .. P + C. A round lasts T = C t_mixed +
(P - C) t_decode, throughput is n / T, and what is left of T beside front end, own prompt and decodes is spent waiting.
If the first is back before the last prompt is computed (P <= C), no step is without prompts: the token budget is the
limit, everybody decodes at t_mixed, and who is left over waits for the prompts before his own.

Left out: preemption. Where decodes wait for prompts see `simmoe.steady.prefill_first`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simmoe.specs.workload import Workload
from simmoe.steady.step_times import Load

Array = NDArray[np.float64]

_ROUNDS = 16  # to solve for who decodes beside prompts, which leaves them the room that sets how many steps they fill
_CLOSE = 1e-4  # of the requests, and of a round
_EXACT = 1e-9


@dataclass(frozen=True)
class Round:
    """One replica's round of cohorts; arrays are over the requests of the fullest rank, first in, first out.

    Attributes
    ----------
    requests_per_s : throughput. [1/s]
    prefill_s : from first being scheduled to the first token, shape (n,). [s]
    decodes_s : from there to the last token, shape (n,). [s]
    met : share of its decode steps that carry prompts of others. [-]
    step_s, decode_step_s, mixed_step_s : mean step, a step without and with prompts. [s]
    mixed_share : share of steps that carry prompts. [-]
    decoding : decoding requests in a mean step. [requests]
    busy : share of time in which anybody is in a step. [-]
    full : whether all steps carry as many prompts as the token budget holds.
    """

    requests_per_s: float
    prefill_s: Array
    decodes_s: Array
    met: float
    step_s: float
    decode_step_s: float
    mixed_step_s: float
    mixed_share: float
    decoding: float
    busy: float
    full: bool


def round_of_cohorts(
    load: Load, workload: Workload, clients: float, outside_s: float, each_s: float, steps_ahead: int
) -> Round:
    """Solve for the round of a replica's ``clients``.

    Parameters
    ----------
    outside_s, each_s : front end between an answer and its client's next prompt, and what a request in the step adds
        to it. [s]
    steps_ahead : steps decided before the running one ends, 0 or 1.
    """
    times, steps, dp = load.times, load.steps, load.dp
    requests, prompt = min(clients, load.most), workload.input.mean
    of_fullest = max(1, math.ceil(requests / dp - _EXACT))  # requests of the fullest rank, whose prompts take longest
    order = np.arange(1.0, of_fullest + 1.0)
    beside, between, hidden_s, moved = 0.0, requests, 0.0, math.inf
    ahead = steps_ahead if clients > 1 and clients - requests < 1 else 0
    for _ in range(_ROUNDS):
        room = max((load.budget - load.width * beside) / dp, 1.0)
        full_steps = of_fullest * prompt / room
        count = math.ceil(full_steps - _EXACT)
        last = np.ceil(order * (full_steps / of_fullest) - _EXACT)
        first = float(last[0])
        # all steps with prompts but the last are full of them
        tokens = requests * prompt / full_steps
        rest = full_steps - (count - 1)
        full_s, rest_s = times.mixed_s(
            np.full(2, beside), tokens * np.array([min(1.0, full_steps), rest]), times.fullest(np.full(2, between))
        ).tolist()
        decode_s = float(times.decode_s(np.array([max(between, 1.0)]))[0])
        away_s = max(0.0, outside_s + each_s * requests - hidden_s)
        full = first + steps + _steps_met(away_s, full_s, ahead) <= full_steps
        idle, idle_s, again = False, 0.0, np.zeros(1)
        if full:
            mixed_steps, pure, rest_s = full_steps, 0.0, full_s
            in_mixed, round_s = steps, full_steps * full_s
        else:
            prompts_s = full_s * (count - 1) + rest_s
            covered = max(0.0, count - first - steps)  # steps with prompts of others while the first is away
            left_s = max(0.0, away_s - (prompts_s - full_s * int(first + steps) if covered else 0.0))
            after = count - first - covered  # steps until the last ends
            # who ends later finds fewer in the step, and may pass the front end before
            left_s = max(0.0, left_s + min(0.0, after * (decode_s - each_s * requests / count)))
            idle = left_s > after * decode_s
            outside = 0.0 if idle else _steps_met(left_s, decode_s, ahead)
            period = first + steps + covered + outside
            pure, mixed_steps = max(0.0, period - count), float(count)
            if idle:
                idle_s = left_s
                if count > first and ahead:  # the first decode on before who came during their prompts
                    pure += 1
            else:
                again = np.minimum(np.maximum(last + (steps - period), 0.0), count)
            in_mixed = float((np.minimum(last + steps, count) - last + again).sum()) / of_fullest
            round_s = prompts_s + pure * decode_s + idle_s
        with_decodes = pure + (count - first - max(0.0, count - first - steps) if idle else 0.0)
        new_beside = requests * in_mixed / mixed_steps
        new_between = min(requests * (steps - in_mixed) / with_decodes if with_decodes > 0.5 else requests, requests)
        was_hidden_s, hidden_s = hidden_s, max(0.0, (clients - requests) * round_s / requests)
        move = max(abs(new_beside - beside), abs(new_between - between)) / requests
        if max(move, abs(hidden_s - was_hidden_s) / round_s) < _CLOSE:
            break
        # whole steps make it jump to and fro
        weight = 1.0 if move < moved / 2 else 0.5
        moved = move
        beside += weight * (new_beside - beside)
        between += weight * (new_between - between)
    stepped = mixed_steps + with_decodes
    ends_s = full_s * np.arange(count + 1.0)  # of steps with prompts
    ends_s[-1] += rest_s - full_s
    mixed_s = float(ends_s[-1]) / count
    ended_s = ends_s[last.astype(int)]
    starts = np.floor((order - 1.0) * (full_steps / of_fullest) + _EXACT).astype(int)
    if full:
        decodes_s = np.full(of_fullest, steps * full_s)
    else:
        until, at = np.minimum(last + steps, count), np.arange(count + 1.0)
        met = until - last + again
        met_s = np.interp(until, at, ends_s) - ended_s + np.interp(again, at, ends_s)
        decodes_s = met_s + (steps - met) * decode_s
    return Round(
        requests_per_s=requests / round_s,
        prefill_s=ended_s - ends_s[starts],
        decodes_s=decodes_s,
        met=in_mixed / steps if steps else 0.0,
        step_s=(mixed_steps * mixed_s + with_decodes * decode_s) / stepped,
        decode_step_s=decode_s,
        mixed_step_s=mixed_s,
        mixed_share=mixed_steps / stepped,
        decoding=requests * steps / stepped,
        busy=1.0 - idle_s / round_s,
        full=full,
    )


def _steps_met(away_s: float, step_s: float, ahead: int) -> float:
    """Steps that begin while somebody is away, the ones decided ahead among them. [steps]"""
    return math.ceil(away_s / step_s - _EXACT) + ahead
