"""Closed loops whose clients come back so late that prompts and decodes take turns.

Model: who ends is back d later (front end, pause). While few prompts come, D requests decode in short steps and end at
the rate D / (S t_decode), S decode steps each; d later as many prompts come, and where these are more than the engine
computes, mu, a queue grows for a time d. Its steps are full of prompts, decodes go on at t_mixed or not at all, few
end, and few prompts come when the queue is done: a delayed feedback that overshoots for ever. With R and r the rates of
ends in short and in full steps, a swing has short steps for d and full ones for A = d + (R - mu) d / (mu - r), passes
R d + r A requests, and who comes waits for up to (R - mu) d / mu. With a delay below a full step, or with R < mu,
prompts and decodes stay mixed as `simmoe.steady.load_curve` has them.

Left out: chance, which swings too where R is just below mu; pauses that differ, which damp; data-parallel ranks whose
decodes go on beside the prompts of other ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simmoe.specs.workload import Workload
from simmoe.steady.step_times import Load

Array = NDArray[np.float64]

_ROUNDS = 40  # to solve for who decodes in short and in full steps
_CLOSE = 1e-4  # of the clients
_PARTS = 256  # of the requests, by how long they wait


@dataclass(frozen=True)
class Swing:
    """One replica that swings.

    Attributes
    ----------
    requests_per_s : throughput. [1/s]
    waits_s : time in the queue of prompts, equally likely values. [s]
    prefill_s : from there to the first token. [s]
    decode_step_s, mixed_step_s : steps in the two halves of a swing. [s]
    mixed_share : share of steps that are full of prompts. [-]
    decoding : decoding requests in a mean step. [requests]
    step_s : mean step. [s]
    """

    requests_per_s: float
    waits_s: Array
    prefill_s: float
    decode_step_s: float
    mixed_step_s: float
    mixed_share: float
    decoding: float
    step_s: float


def swing(
    load: Load, workload: Workload, clients: float, outside_s: float, each_s: float, *, prompts_first: bool
) -> Swing | None:
    """Solve for the swing of a replica's ``clients``; None if prompts and decodes stay mixed.

    Parameters
    ----------
    outside_s, each_s : front end and pause between an answer and its client's next prompt, and what a request in the
        engine adds to it. [s]
    """
    times, steps, prompt = load.times, load.steps, workload.input.mean
    if clients > load.most or clients * prompt < load.budget or steps <= 0:
        return None
    in_short = in_full = running = 0.8 * clients
    for _ in range(_ROUNDS):
        away_s = outside_s + each_s * running
        if away_s <= 0:
            return None
        beside = 0.0 if prompts_first else in_full
        prompts = max(load.budget - load.width * beside, 1.0) / prompt
        decode_s = _one(times.decode_s(_arr(max(in_short, 1.0))))
        full_s = _one(times.mixed_s(_arr(beside), _arr(prompts * prompt), times.fullest(_arr(in_short))))
        computed = prompts / full_s
        ending_in_full = 0.0 if prompts_first else in_full / steps / full_s
        # the prompts of those who ended in full steps come during the short ones
        met = ending_in_full * (full_s - (0.0 if prompts_first else decode_s)) / prompts
        short_s = decode_s / max(1.0 - met, 0.05)
        ending = min(in_short / steps / short_s, clients / away_s)
        if ending <= computed or ending_in_full >= computed or away_s < full_s:
            return None
        full_for_s = away_s + (ending - computed) * away_s / (computed - ending_in_full)
        passed = ending * away_s + ending_in_full * full_for_s
        throughput = passed / (away_s + full_for_s)
        queue = (ending - computed) * away_s
        # who is neither away nor waits decodes: at the start of full steps, when the queue is longest, and at its end
        at_start, at_most, at_end = (
            clients - ending * away_s,
            clients - ending_in_full * away_s - queue,
            clients - ending_in_full * away_s,
        )
        mean = ((at_start + at_most) * away_s + (at_most + at_end) * (full_for_s - away_s)) / 2 / full_for_s
        more_in_short = max((at_start + at_end) / 2, 1.0) - in_short
        more_in_full = max(mean, 0.0) - in_full
        was_running = running
        running = max(clients - throughput * away_s - queue * full_for_s / 2 / (away_s + full_for_s), 1.0)
        if max(abs(more_in_short), abs(more_in_full), abs(running - was_running)) < _CLOSE * clients:
            break
        in_short += 0.3 * more_in_short
        in_full += 0.3 * more_in_full
    if queue < 2:  # chance decides
        return None
    # the queue grows for those who ended in short steps, and then shrinks; who ended in the last full ones meets none
    waiting = 1.0 - ending_in_full * away_s / passed
    waits_s = queue / computed * np.maximum(1.0 - (np.arange(_PARTS) + 0.5) / _PARTS / waiting, 0.0)
    short_steps, full_steps = away_s / short_s, full_for_s / full_s
    return Swing(
        requests_per_s=throughput,
        waits_s=waits_s,
        prefill_s=full_s * (0.5 + max(1, math.ceil(1.0 / prompts))),  # also what is left of the step under way
        decode_step_s=short_s,
        mixed_step_s=full_s,
        mixed_share=full_steps / (short_steps + full_steps),
        decoding=(in_short * short_steps + in_full * full_steps) / (short_steps + full_steps),
        step_s=(away_s + full_for_s) / (short_steps + full_steps),
    )


def _one(values: Array) -> float:
    return float(values[0])


def _arr(value: float) -> Array:
    return np.array([value], dtype=np.float64)
