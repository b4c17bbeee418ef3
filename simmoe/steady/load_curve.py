"""Throughput of one replica against the requests it holds, in closed form.

Model: with r requests passing per step, a step carries B = r (O - 1) decoding requests and p = r I prompt tokens (I, O
mean input and output lengths; the first output token comes from the step that ends the prompt; with speculative
decoding `decode_steps` stands for O - 1, and each decoding request brings the rows it verifies). A share f = p / c of
the steps carries a chunk of c prompt tokens, so the mean step is t = t_decode(B) + f (t_mixed - t_decode), throughput
X = r / t, and Little's law gives the requests in flight N = B + X (time spent in prefill): over r, a table of X(N).

Data-parallel ranks step together and wait for the slowest: for the longest of the prompts that meet in a step, and for
the rank whose requests hold the most context, a maximum of sums that vary.

In a closed loop equal output lengths keep requests in cohorts that start and end together; then a prompt step carries
a cohort. Left out: the transient at start, preemption. `simmoe.sim` has them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from simmoe.engine.step import StepTable
from simmoe.errors import CapacityError
from simmoe.specs.deployment import Deployment
from simmoe.specs.workload import Lengths, Workload

Array = NDArray[np.float64]

_GRID = 160
#: What metrics show of a curve.
SHOWN = ("step_s", "tpot_s", "decode_step_s", "mixed_step_s", "mixed_share", "decoding", "prefill_s")


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
    prefill_s : time from first being scheduled to the first token. [s]
    chunk : prompt tokens in a step that carries any. [tokens]
    beside : decoding requests in such a step. [requests]
    width : rows that a decoding request brings to a step. [tokens]
    limit : what ends the curve: "KV cache", "max_num_seqs" or "token budget".
    token_budget : most tokens in one step. [tokens]
    steps_ahead : steps decided before the running one ends, 0 or 1.
    """

    in_flight: Array
    requests_per_s: Array
    step_s: Array
    decode_step_s: Array
    mixed_step_s: Array
    tpot_s: Array
    mixed_share: Array
    decoding: Array
    prefill_s: Array
    chunk: Array
    beside: Array
    limit: str
    token_budget: float
    width: int = 1
    steps_ahead: int = 0

    @cached_property
    def peak(self) -> int:
        """Index of the highest throughput."""
        return int(np.argmax(self.requests_per_s))

    def at(self, in_flight: Array, names: Sequence[str]) -> dict[str, Array]:
        """Quantities at numbers in flight of any shape, linear between the curve's points."""
        return {name: np.interp(in_flight, self.in_flight, getattr(self, name)) for name in names}


def load_curve(table: StepTable, deployment: Deployment, workload: Workload, kv_tokens: float) -> Curve:
    """Tabulate one replica's steady states for a workload's lengths; its load does not matter.

    Parameters
    ----------
    kv_tokens : tokens the replica's KV cache holds. [tokens]

    Raises
    ------
    CapacityError
        If not even one request's KV fits.
    """
    input_tokens, output_tokens = workload.input.mean, workload.output.mean
    width = deployment.rows_per_decode
    steps = decode_steps(workload.output, deployment.tokens_per_decode)
    # half a block is lost per request; a decoding request holds on average its prompt and half its output
    per_request_kv = input_tokens + output_tokens / 2 + deployment.kv_block_size / 2
    if input_tokens + output_tokens > kv_tokens:
        raise CapacityError(
            f"one request of {input_tokens:.0f} + {output_tokens:.0f} tokens needs more KV cache than the replica has "
            f"({kv_tokens:.0f} tokens); use more GPUs, a smaller kv_precision or shorter requests"
        )
    by_kv = kv_tokens / per_request_kv
    most = min(float(deployment.requests_per_replica), by_kv)
    limit = "KV cache" if by_kv < deployment.requests_per_replica else "max_num_seqs"
    budget = float(min(deployment.tokens_per_replica, table.max_tokens))

    # requests per step: up to all slots decoding, or the token budget, whichever ends first
    by_budget = budget / (input_tokens + width * steps)
    by_slots = most / max(steps, 1.0)
    if by_budget < by_slots:
        limit = "token budget"
    alone = 1.0 / (math.ceil(input_tokens / budget) + steps)  # one request at a time
    r = np.geomspace(alone, max(min(by_budget, by_slots), alone * 1.001), _GRID)
    decoding = r * steps
    prompt = r * input_tokens
    together: float | Array = 1.0
    if workload.concurrency is not None and workload.output.kind == "fixed":
        # equal outputs end together: requests stay in cohorts that are prefilled in one step, up to its token budget
        together = np.maximum(decoding + r, 1.0)
    room = np.maximum(budget - width * decoding, 1.0)
    # prompts meet by chance: each of r (steps + 1) requests is followed by a new prompt in one of its steps
    any_prompt = 1.0 - (1.0 - 1.0 / (steps + 1.0)) ** (r * (steps + 1.0))
    meeting = prompt / any_prompt
    chunk = np.clip(np.maximum(np.minimum(together * input_tokens, room), meeting), 1.0, room)
    share = np.minimum(prompt / chunk, 1.0)
    cohort = np.maximum(chunk / input_tokens, 1.0)
    # a cohort whose prompts are in a step does not decode there, but does in the others: the mean is ``decoding``
    beside = np.maximum(decoding - (cohort - 1.0) * (1.0 - share), 0.0)
    between = decoding + (cohort - 1.0) * share
    mean_context = input_tokens + output_tokens / 2
    varied = _cv2(workload.input)
    dp = deployment.dp
    largest = _largest_normal(dp)
    fullest = 1.0 + largest[-1] * _context_cv(workload) / np.sqrt(np.maximum(between / dp, 1.0))
    longest = 1.0 + math.sqrt(varied) * np.interp(chunk / input_tokens, np.arange(1, dp + 1), largest)
    decode_step = _decode_s(table, between, between * mean_context * fullest)
    pieces = np.maximum(np.ceil(input_tokens / chunk), 1.0)
    # ranks that step together wait for the one that has a prompt: attention and head as if each had one
    slowest = np.maximum(chunk, dp * np.minimum(chunk, input_tokens * longest))
    # a prompt meets itself: pairs grow as the mean of squares
    pairs = slowest * (input_tokens * (longest + varied / longest) + 1) / 2
    sampled = np.minimum(width * beside + slowest / input_tokens, len(table.head_s) - 1)
    tokens_s, share_shown = _with_prompts(table, width * beside + chunk, cohort)
    mixed_step = (
        tokens_s
        + np.interp(sampled, np.arange(len(table.head_s)), table.head_s)
        + _attention_s(table, beside, beside * mean_context * fullest)
        + share_shown * (table.prefill_base_s + table.prefill_per_token_s * slowest + table.prefill_per_pair_s * pairs)
    )
    step = decode_step * (1 - share) + share * mixed_step
    throughput = r / step
    prefill = pieces * mixed_step
    seen = step
    in_flight = throughput * (prefill + steps * seen)
    for _ in range(3):
        seen = decode_step + share * (mixed_step - decode_step) * np.maximum(1 - cohort / in_flight, 0.0)
        in_flight = throughput * (prefill + steps * seen)
    in_flight = np.maximum.accumulate(np.maximum(in_flight, 1.0))
    end = max(1.0 + 1e-9, min(most, float(in_flight[-1])))
    n = np.append(in_flight[in_flight < end], end)
    columns = {
        "requests_per_s": throughput,
        "step_s": step,
        "decode_step_s": decode_step,
        "mixed_step_s": mixed_step,
        "tpot_s": seen * steps / max(output_tokens - 1, 1e-9),
        "mixed_share": share,
        "decoding": decoding,
        "prefill_s": prefill,
        "chunk": chunk,
        "beside": beside,
    }
    at_n = {name: np.interp(n, in_flight, column) for name, column in columns.items()}
    return Curve(
        in_flight=n, **at_n, limit=limit, token_budget=budget, width=width, steps_ahead=table.steps_ahead
    )  # fmt: skip


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


def _with_prompts(table: StepTable, rows: Array, prompts: Array) -> tuple[Array, Array]:
    """Part that depends on the rows alone, of steps with prompts; and the share of prompts' attention. [s], [-]"""
    by_batches, shares = table.prompts
    index = np.arange(table.max_tokens + 1)
    if len(shares) == 1:
        return np.interp(rows, index, by_batches[0]), shares
    chosen = np.minimum(prompts, float(len(shares))).astype(np.int64) - 1
    times = np.stack([np.interp(rows, index, row) for row in by_batches])
    return times[chosen, np.arange(rows.size)], shares[chosen]


def _cv2(lengths: Lengths) -> float:
    """Squared coefficient of variation of a length. [-]"""
    if lengths.kind == "lognormal":
        return lengths.cv**2
    if lengths.kind == "uniform" and lengths.high is not None:
        return (lengths.high - lengths.low) ** 2 / 12 / lengths.mean**2
    if lengths.kind == "empirical" and lengths.values:
        return float(np.var(lengths.values)) / lengths.mean**2
    return 0.0


def _context_cv(workload: Workload) -> float:
    """Coefficient of variation of a decoding request's context: its prompt, and how far its output has come. [-]"""
    i, o = workload.input.mean, workload.output.mean
    in_step = workload.concurrency is not None and workload.output.kind == "fixed"  # cohorts come on together
    progress = 0.0 if in_step else o**2 / 12
    return math.sqrt(_cv2(workload.input) * i**2 + progress) / (i + o / 2)


@lru_cache(maxsize=64)
def _largest_normal(most: int) -> Array:
    """Expected largest of 1 .. ``most`` standard normals, shape (most,) (Blom, 1958; within 2 %). [-]"""
    normal = NormalDist()
    return np.array([normal.inv_cdf((n - 0.375) / (n + 0.25)) for n in range(1, most + 1)])


def _decode_s(table: StepTable, decoding: Array, context: Array) -> Array:
    """Pure decode step for a fractional number of requests; at least one is there while a step runs."""
    at_least = np.maximum(decoding, 1.0)
    scale = np.divide(at_least, decoding, out=np.ones_like(decoding), where=decoding > 0)
    rows = at_least * table.rows_per_decode
    tokens = np.interp(rows, np.arange(table.max_tokens + 1), table.token_s)
    head = np.interp(rows, np.arange(len(table.head_s)), table.head_s)
    return np.asarray(tokens + head + _attention_s(table, at_least, context * scale), dtype=np.float64)


def _attention_s(table: StepTable, decoding: Array, context: Array) -> Array:
    index = np.arange(len(table.decode_base_s))
    base = np.interp(decoding, index, table.decode_base_s)
    slope = np.interp(decoding, index, table.decode_per_context_s)
    return np.where(decoding > 0, base * np.minimum(decoding, 1.0) + slope * context, 0.0)


def saturation_requests_per_s(curve: Curve) -> float:
    """Highest throughput of one replica. [1/s]"""
    return float(curve.requests_per_s[curve.peak])
