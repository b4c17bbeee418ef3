"""Throughput of one replica against the requests it holds, in closed form.

Model: with r requests passing per step, a step carries B = r (O - 1) decoding requests and p = r I prompt tokens (I, O
mean input and output lengths; the first output token comes from the step that ends the prompt; with speculative
decoding `decode_steps` stands for O - 1, and each decoding request brings the rows it verifies). A share f = p / c of
the steps carries a chunk of c prompt tokens, so the mean step is t = t_decode(B) + f (t_mixed - t_decode), throughput
X = r / t, and Little's law gives the requests in flight N = B + X (time spent in prefill): over r, a table of X(N).

Engines that let decodes wait while prompts are computed have steps of two kinds, see `simmoe.steady.prefill_first`.

In a closed loop equal output lengths keep requests in cohorts that start and end together, see
`simmoe.steady.cohorts`. Left out: the transient at start, preemption. `simmoe.sim` has them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from simmoe.engine.step import StepTable
from simmoe.errors import CapacityError
from simmoe.specs.cluster import POLICY_OF_ENGINE
from simmoe.specs.deployment import Deployment
from simmoe.specs.workload import Lengths, Workload
from simmoe.steady.kv_seats import kv_seats
from simmoe.steady.prefill_first import prefill_first, prompts_first
from simmoe.steady.step_times import GRID, Load, StepTimes, ends_together

Array = NDArray[np.float64]

#: What metrics show of a curve.
SHOWN = ("step_s", "tpot_s", "decode_step_s", "mixed_step_s", "long_gap_s", "long_gap_share", "decoding", "prefill_s")


@dataclass(frozen=True)
class Curve:
    """One replica's steady states, one entry per load, from nearly idle to the most it can hold.

    Attributes
    ----------
    in_flight : requests being prefilled or decoded. [requests]
    requests_per_s : throughput. [1/s]
    step_s, decode_step_s, mixed_step_s : mean step, a step without and with prompt tokens. [s]
    tpot_s : time per token of a decoding request, whose own prefill is not part of it: the mean step as it sees it, or
        less where a step emits several. [s]
    mixed_share : share of steps that carry prompt tokens. [-]
    decoding : mean decoding requests. [requests]
    long_gap_s, long_gap_share : gap between two tokens of a request that spans a step with prompt tokens, and the share
        of gaps that do. [s], [-]
    prefill_s : time from first being scheduled to the first token. [s]
    room : tokens that a step has for prompts. [tokens]
    chunk : prompt tokens in a step that carries any. [tokens]
    beside : decoding requests in such a step. [requests]
    width : rows that a decoding request brings to a step. [tokens]
    limit : what ends the curve: "KV cache", "max_num_seqs" or "token budget".
    token_budget : most tokens in one step. [tokens]
    steps_ahead : steps decided before the running one ends, 0 or 1.
    prompts_first : whether decodes wait while prompts are computed.
    load : what the curve was tabulated from.
    """

    in_flight: Array
    requests_per_s: Array
    step_s: Array
    decode_step_s: Array
    mixed_step_s: Array
    tpot_s: Array
    mixed_share: Array
    long_gap_s: Array
    long_gap_share: Array
    decoding: Array
    prefill_s: Array
    room: Array
    chunk: Array
    beside: Array
    limit: str
    token_budget: float
    load: Load
    width: int = 1
    steps_ahead: int = 0
    prompts_first: bool = False

    @property
    def times(self) -> StepTimes:
        """Times of steps."""
        return self.load.times

    @property
    def decode_steps(self) -> float:
        """Decode steps of a request."""
        return self.load.steps

    @cached_property
    def peak(self) -> int:
        """Index of the highest throughput."""
        return int(np.argmax(self.requests_per_s))

    def steps_per_token(self, workload: Workload) -> float:
        """Decode steps of a request over its tokens after the first. [-]"""
        return self.decode_steps / max(workload.output.mean - 1.0, 1e-9)

    def at(self, in_flight: Array, names: Sequence[str]) -> dict[str, Array]:
        """Quantities at numbers in flight of any shape, linear between the curve's points."""
        return {name: np.interp(in_flight, self.in_flight, getattr(self, name)) for name in names}


def load_curve(
    table: StepTable, deployment: Deployment, workload: Workload, kv_tokens: float, policy: str | None = None
) -> Curve:
    """Tabulate one replica's steady states for a workload's lengths; its load does not matter.

    Parameters
    ----------
    kv_tokens : tokens the replica's KV cache holds. [tokens]
    policy : scheduling policy, None: the engine's own.

    Raises
    ------
    CapacityError
        If not even one request's KV fits.
    """
    input_tokens, output_tokens = workload.input.mean, workload.output.mean
    width = deployment.rows_per_decode
    steps = decode_steps(workload.output, deployment.tokens_per_decode)
    if input_tokens + output_tokens > kv_tokens:
        raise CapacityError(
            f"one request of {input_tokens:.0f} + {output_tokens:.0f} tokens needs more KV cache than the replica has "
            f"({kv_tokens:.0f} tokens); use more GPUs, a smaller kv_precision or shorter requests"
        )
    named, slots = policy or POLICY_OF_ENGINE[deployment.engine], float(deployment.requests_per_replica)
    seats = kv_seats(named, workload, deployment, kv_tokens)
    most = min(slots, seats.most)
    limit = "KV cache" if seats.most < slots else "max_num_seqs"
    budget = float(min(deployment.tokens_per_replica, table.max_tokens))

    times = StepTimes(table, deployment, workload)
    clients = (workload.concurrency or 0) / deployment.replicas
    # who is sent back for lack of blocks leaves his cohort, unless few are, near their ends
    seated = min(clients, most)
    a_step = np.array([min(budget, max(seated, 1.0) * input_tokens)])
    prompts_s = float(times.mixed_s(np.zeros(1), a_step, np.ones(1))[0]) * seated * input_tokens / float(a_step[0])
    in_step = ends_together(workload, prompts_s) and seated <= 1.1 * seats.at_ends
    if in_step:
        most = min(most, seats.at_ends)
    short = seats.most < slots and not in_step
    load = Load(
        times=times, steps=steps, most=most, budget=budget, width=width, dp=deployment.dp, in_step=in_step,
        prompts_s=prompts_s,
        again=seats.again if short else 0.0, sent_back=seats.sent_back if short else 0.0,
    )  # fmt: skip
    first = prompts_first(named) and steps > 0
    if first:
        columns = prefill_first(load, workload)
        if workload.output.kind == "fixed" and most <= seats.at_ends:
            # where others wait, who ends together is followed together, whatever the loop
            cohorts = prefill_first(replace(load, in_step=True), workload)
            columns["requests_per_s"][-1] = max(columns["requests_per_s"][-1], cohorts["requests_per_s"][-1])
    else:
        columns = _together(load, workload)
        if budget / (input_tokens + width * steps) < most / max(steps, 1.0):
            limit = "token budget"
    seen_s = columns.pop("seen_s")
    columns["tpot_s"] = seen_s * steps / max(output_tokens - 1, 1e-9)
    in_flight = np.maximum.accumulate(np.maximum(columns.pop("in_flight"), 1.0))
    end = max(1.0 + 1e-9, min(most, float(in_flight[-1])))
    n = np.append(in_flight[in_flight < end], end)
    at_n = {name: np.interp(n, in_flight, column) for name, column in columns.items()}
    return Curve(
        in_flight=n, **at_n, limit=limit, token_budget=budget, load=load, width=width, steps_ahead=table.steps_ahead,
        prompts_first=first,
    )  # fmt: skip


def _together(load: Load, workload: Workload) -> dict[str, Array]:
    """One budget for the tokens of decodes and prompts: columns of the curve over requests per step."""
    times, steps, budget, width = load.times, load.steps, load.budget, load.width
    input_tokens = workload.input.mean
    # requests per step: up to all slots decoding, or the token budget, whichever ends first
    most_each = budget / load.dp
    pieces = math.ceil(input_tokens / most_each)  # steps of its rank that a prompt takes
    piece = input_tokens / pieces
    alone = 1.0 / (pieces + steps)  # one request at a time
    most = min(budget / (input_tokens + width * steps), load.most / max(steps, 1.0))
    r = np.geomspace(alone, max(most, alone * 1.001), GRID)
    decoding = r * steps
    prompt = r * input_tokens
    # who is alone does not decode beside its own prompt
    room = np.maximum(budget - width * np.where(decoding < 1.0, 0.0, decoding), 1.0)
    # prompts meet by chance: each of r (steps + pieces) requests has a prompt in that many of its steps
    any_prompt = 1.0 - (1.0 - pieces / (steps + pieces)) ** (r * (steps + pieces))
    meeting = prompt / any_prompt
    chunk = np.clip(np.maximum(np.minimum(piece, room), meeting), 1.0, room)
    share = np.minimum(prompt / chunk, 1.0)
    cohort = np.maximum(chunk / piece, 1.0)
    # a cohort whose prompts are in a step does not decode there, but does in the others: the mean is ``decoding``
    beside = np.maximum(decoding - (cohort - 1.0) * (1.0 - share), 0.0)
    between = decoding + (cohort - 1.0) * share
    decode_step = times.decode_s(between)
    mixed_step = times.mixed_s(beside, chunk, times.fullest(between))
    step = decode_step * (1 - share) + share * mixed_step
    throughput = r / step
    prefill = np.maximum(np.ceil(input_tokens / chunk), pieces) * mixed_step
    # a request's decodes meet the prompts of others: seen = decode + met (1 - cohort / in flight), and Little's law
    met = share * (mixed_step - decode_step)
    everyone = throughput * (prefill + steps * (decode_step + met))
    in_flight = (everyone + np.sqrt(np.maximum(everyone**2 - 4 * throughput * steps * met * cohort, 0.0))) / 2
    seen = decode_step + met * np.maximum(1 - cohort / in_flight, 0.0)
    in_flight = throughput * (prefill + steps * seen)
    return {
        "in_flight": in_flight,
        "requests_per_s": throughput,
        "step_s": step,
        "decode_step_s": decode_step,
        "mixed_step_s": mixed_step,
        "seen_s": seen,
        "mixed_share": share,
        "long_gap_s": mixed_step,
        "long_gap_share": share,
        "decoding": decoding,
        "prefill_s": prefill,
        "room": np.maximum(budget - width * decoding, 1.0),
        "chunk": chunk,
        "beside": beside,
    }


def decode_steps(output: Lengths, tokens_per_step: Fraction) -> float:
    """Mean decode steps of a request: its tokens after the first over those a step emits, rounded up. [steps]

    A remainder is taken to be any number of parts of a step, equally likely, unless all outputs are equal.
    """
    after_first = output.mean - 1
    if tokens_per_step == 1 or after_first <= 0:
        return after_first
    if output.kind == "fixed":
        return math.ceil(Fraction(after_first).limit_denominator(1000) / tokens_per_step)
    p = tokens_per_step.numerator
    return after_first / float(tokens_per_step) + (p - 1) / (2 * p)


def saturation_requests_per_s(curve: Curve) -> float:
    """Highest throughput of one replica. [1/s]"""
    return float(curve.requests_per_s[curve.peak])
