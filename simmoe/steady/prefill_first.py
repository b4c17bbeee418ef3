"""Throughput of a replica whose decodes wait while prompts are computed (SGLang; vLLM before its V1 engine).

Model: a step holds prompts or decodes. D requests decode in a decode step, so D / S of them end in it (S decode steps
each), and their successors' prompts are computed before the next decode step, c at a time: g = D / (S c) prompt steps
stand between two decode steps. A prompt step is due if anybody came during the step before, so with q_d and q_p for
that chance during a decode and a prompt step, steps alternate as a Markov chain with g = q_d / (1 - q_p). In a closed
loop a newcomer follows a request that ends, and none ends while decodes wait: q_p = 0. Under Poisson arrivals of rate X
both are 1 - exp(-X t). The chunk c is at most the token budget's. A token then takes t_decode + g t_prompt, without
the request's own prompt step.

Equal outputs in a closed loop end together: all prompts are computed, then all requests decode; whose prompt comes
early waits for the others'.

Data-parallel ranks choose for themselves and step together: only those with a prompt, a share w of them, let decodes
wait, and the others' go on beside. Left out: what `simmoe.steady.load_curve` leaves out; how prompts of different
lengths fill the budget.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from simmoe.specs.workload import Workload
from simmoe.steady.step_times import GRID, Load

Array = NDArray[np.float64]

_ROUNDS = 12  # to solve for prompts per step: their time sets how many come, which sets their time


def prompts_first(policy: str) -> bool:
    """Whether decodes wait while prompts are computed under a scheduling policy."""
    return policy in ("sglang", "vllm_v0")


def prefill_first(load: Load, workload: Workload) -> dict[str, Array]:
    """Columns of the load curve over requests that decode, see `simmoe.steady.load_curve.Curve`."""
    times, steps, dp = load.times, load.steps, load.dp
    input_tokens = workload.input.mean
    decoding = np.geomspace(1.0, max(load.most, 1.001), GRID)
    closed = workload.concurrency is not None
    in_step = load.in_step
    pieces = float(max(1, math.ceil(input_tokens / (load.budget / dp))))
    most_prompts = load.budget / input_tokens
    fewest, fullest = 1.0 / pieces, times.fullest(decoding)
    decode_step = times.decode_s(decoding)
    prompts = np.minimum(decoding / pieces, most_prompts) if in_step else np.full_like(decoding, fewest)
    for _ in range(1 if in_step else _ROUNDS):
        waiting = np.ones_like(decoding) if in_step else 1.0 - (1.0 - 1.0 / dp) ** np.maximum(prompts * pieces, 1.0)
        beside = decoding * (1.0 - waiting)
        # a rank without a prompt decodes as many as ever, unless every rank has one
        slowest = decoding * (1.0 - waiting**dp)
        prompt_step = times.mixed_s(beside, prompts * input_tokens, fullest, slowest)
        share = _share(decoding / steps, prompts, waiting)
        rate = share * prompts / (decode_step * (1.0 - share) + prompt_step * share)
        if closed:
            going_on = 1.0 - 1.0 / max(steps, 1.0)
            come, come_again = 1.0 - going_on**decoding, 1.0 - going_on**beside
        else:
            come, come_again = -np.expm1(-rate * decode_step), -np.expm1(-rate * prompt_step)
        if not in_step:
            due = come / (come + 1.0 - come_again)
            wanted = decoding * (1.0 - due * waiting) / steps / due
            prompts = np.sqrt(prompts * np.clip(wanted, fewest, most_prompts))
    step = decode_step * (1.0 - share) + prompt_step * share
    throughput = share * prompts / step
    if in_step:
        # n steps of prompts, then all decode: the j-th has its token after j of them and waits for the n - j others
        runs = np.maximum(decoding / prompts, pieces)
        own = prompt_step * (runs + pieces) / 2
        seen = decode_step + prompt_step * (runs - pieces) / 2 / steps
        in_flight = decoding
        long_share = np.minimum((1.0 - 1.0 / runs) / steps, 1.0)
        long_gap = decode_step + prompt_step * runs / 2
    else:
        own, gap = prompt_step * pieces, step / (1.0 - share * waiting)
        in_flight = throughput * (own + steps * gap)
        for _ in range(_ROUNDS):
            mine = np.minimum(np.maximum(prompts, 1.0) / in_flight, 1.0)
            met = share * (1.0 - mine) / np.maximum(1.0 - share * mine, 1e-12)
            seen = (decode_step * (1.0 - met) + prompt_step * met) / (1.0 - met * waiting)
            in_flight = throughput * (own + steps * seen)
        long_share = np.minimum(share / (1.0 - share * waiting), 1.0)
        long_gap = decode_step + np.maximum(gap - decode_step, 0.0) / long_share
    alone = float(times.decode_s(np.ones(1))[0])
    columns = {
        "in_flight": in_flight,
        "requests_per_s": throughput,
        "step_s": step,
        "decode_step_s": decode_step,
        "mixed_step_s": prompt_step,
        "seen_s": seen,
        "mixed_share": share,
        "long_gap_s": long_gap,
        "long_gap_share": long_share,
        "decoding": decoding,
        "prefill_s": own,
        "room": np.full_like(decoding, load.budget),
        "chunk": prompts * input_tokens,
        "beside": beside,
    }
    if in_step or in_flight[0] <= 1.0:
        return columns
    # one request at a time meets nobody's prompt
    one = np.ones(1)
    own_step = float(times.mixed_s(0.0 * one, fewest * input_tokens * one, one)[0])
    own_s = pieces * own_step
    total_s = own_s + steps * alone
    first = {
        "in_flight": 1.0,
        "requests_per_s": 1.0 / total_s,
        "step_s": total_s / (pieces + steps),
        "decode_step_s": alone,
        "mixed_step_s": own_step,
        "seen_s": alone,
        "mixed_share": pieces / (pieces + steps),
        "long_gap_s": alone,
        "long_gap_share": 0.0,
        "decoding": steps * alone / total_s,
        "prefill_s": own_s,
        "beside": 0.0,
    }
    return {name: np.append(first.get(name, column[0]), column) for name, column in columns.items()}


def _share(ending: Array, prompts: Array, waiting: Array) -> Array:
    """Share of steps that hold prompts, if ``ending`` requests end in a decode step and as many follow. [-]"""
    return np.minimum(ending / (prompts + waiting * ending), 1.0)
