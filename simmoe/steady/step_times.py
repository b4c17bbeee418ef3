"""Step times for fractional numbers of requests and prompts, whose lengths vary.

Data-parallel ranks step together and wait for the slowest: for the longest of the prompts that meet in a step, and for
the rank whose requests hold the most context, a maximum of sums that vary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from simmoe.engine.step import StepTable
from simmoe.specs.deployment import Deployment
from simmoe.specs.workload import Workload
from simmoe.steady.kv_seats import cv2

Array = NDArray[np.float64]

#: Points of a load curve before it is cut at what the replica holds.
GRID = 160


@dataclass(frozen=True, slots=True)
class Load:
    """What a replica is given to do, and the most it takes.

    Attributes
    ----------
    steps : decode steps of a request. [steps]
    most : requests it can hold. [requests]
    again : prompt tokens computed again per request where the KV cache is full and others wait. [tokens]
    sent_back : requests that wait for blocks there although they have begun. [requests]
    prompts_s : what the prompts of all who may be here take, in steps of nothing else. [s]
    in_step : whether requests stay in the cohorts in which they come.
    budget : most tokens in one step. [tokens]
    width : rows that a decoding request brings to a step. [tokens]
    dp : data-parallel ranks.
    """

    times: StepTimes
    steps: float
    most: float
    budget: float
    width: int
    dp: int
    again: float = 0.0
    sent_back: float = 0.0
    prompts_s: float = 0.0
    in_step: bool = False


class StepTimes:
    """A step table read at mean numbers of requests of one workload."""

    def __init__(self, table: StepTable, deployment: Deployment, workload: Workload) -> None:
        self.table = table
        self.width, self.dp = deployment.rows_per_decode, deployment.dp
        self.input_tokens = workload.input.mean
        # long answers are met more often, see `simmoe.steady.kv_seats`
        self.mean_context = workload.input.mean + workload.output.mean * (1.0 + cv2(workload.output)) / 2
        self.varied = cv2(workload.input)
        self.context_cv = _context_cv(workload)
        self.largest = _largest_normal(self.dp)
        self.most_each = float(deployment.rank_tokens)

    def fullest(self, decoding: Array) -> Array:
        """Context of the fullest rank over the mean rank's. [-]"""
        varying = self.largest[-1] * self.context_cv / np.sqrt(np.maximum(decoding / self.dp, 1.0))
        return np.asarray(1.0 + varying, dtype=np.float64)

    def decode_s(self, decoding: Array) -> Array:
        """Pure decode step; at least one request is there while a step runs. [s]"""
        table = self.table
        context = decoding * self.mean_context * self.fullest(decoding)
        at_least = np.maximum(decoding, 1.0)
        scale = np.divide(at_least, decoding, out=np.ones_like(decoding), where=decoding > 0)
        rows = at_least * table.rows_per_decode
        tokens = np.interp(rows, _counts(table.max_tokens + 1), table.token_s)
        head = np.interp(rows, _counts(len(table.head_s)), table.head_s)
        return np.asarray(tokens + head + _attention_s(table, at_least, context * scale), dtype=np.float64)

    def mixed_s(self, beside: Array, chunk: Array, fullest: Array, waited_for: Array | None = None) -> Array:
        """Step with ``chunk`` prompt tokens and ``beside`` decoding requests. [s]

        A prompt is one rank's; of one longer than what a rank computes in a step, a step carries a piece.
        ``waited_for``: decoding requests of the replica if all its ranks had as many as the fullest; None: ``beside``.
        """
        input_tokens, varied = self.input_tokens, self.varied
        piece = min(input_tokens, self.most_each)
        cohort = np.maximum(chunk / piece, 1.0)
        spread = np.interp(cohort, _counts(self.dp) + 1.0, self.largest)
        longest = 1.0 + math.sqrt(varied) * spread
        # ranks that step together wait for the one that has a prompt: attention and head as if each had one
        whole = input_tokens * longest
        slowest = np.maximum(chunk, self.dp * np.minimum(np.minimum(chunk, whole), self.most_each))
        # a prompt meets itself: pairs grow as the mean of squares
        pairs = slowest * (input_tokens * (longest + varied / longest) + 1) / 2
        # later chunks of a prompt that one step does not hold stand, on average, behind half of the rest
        cached = self.dp * (whole - np.minimum(slowest / self.dp, whole)) / 2
        attending = beside if waited_for is None else waited_for
        sampled = self.width * beside + slowest / input_tokens
        rows = self.width * beside + chunk
        return self._mixed_s(rows, cohort, sampled, attending * fullest, attending, (slowest, pairs, cached))

    def prompt_step_s(self, beside: Array, tokens: Array, room: Array, fullest: Array) -> Array:
        """As `mixed_s`, of a step that is given so many prompt tokens now, not on average. [s]

        Fewer than a typical prompt's are one prompt's. A step without ``room`` left works on prompts that others began.
        """
        typical = self.input_tokens * (1.0 + self.varied)  # a token's own prompt is longer than the mean one
        cohort = np.maximum(tokens / min(self.input_tokens, self.most_each), 1.0)
        spread = math.sqrt(self.varied) * np.interp(cohort, _counts(self.dp) + 1.0, self.largest)
        slowest = np.maximum(tokens, self.dp * np.minimum(np.minimum(tokens, typical * (1.0 + spread)), self.most_each))
        behind = np.where(tokens >= room, np.maximum(typical - room / self.dp, 0.0) / 2, 0.0)
        pairs = slowest * (np.where(tokens >= room, typical, np.minimum(tokens, typical)) + 1.0) / 2
        sampled = self.width * beside + cohort
        rows = self.width * beside + tokens
        attended = beside * fullest
        return self._mixed_s(rows, cohort, sampled, attended, beside, (slowest, pairs, self.dp * behind))

    def own_prompt_s(self, length: Array, full: Array, last: Array, room: Array) -> Array:
        """What a prompt of its own ``length`` attends to beyond what `prompt_step_s` takes for its steps' tokens. [s]

        ``full`` steps that hold no more than ``room``, then one with ``last`` prompt tokens.
        """
        _, _, per_pair_s, per_cached_s = self.table.prefill_terms
        typical, each = self.input_tokens * (1.0 + self.varied), room / self.dp
        end = np.minimum(length, last)
        at_end = last >= room
        taken = np.where(at_end, typical, np.minimum(last, typical))
        pairs = length * length - (length - end) * typical - end * taken
        behind = np.maximum(typical - each, 0.0) / 2
        cached = full * (full + 1.0) / 2 * each - (full + at_end) * behind
        return np.asarray(self.dp * (per_pair_s * pairs / 2 + per_cached_s * np.where(length > end, cached, 0.0)))

    def _mixed_s(
        self, rows: Array, cohort: Array, sampled: Array, attended: Array, attending: Array, prompts: tuple[Array, ...]
    ) -> Array:
        """Step of so many rows and prompts; ``prompts``: their tokens, pairs, and tokens cached before. [s]"""
        table = self.table
        slowest, pairs, cached = prompts
        full = rows / table.batch_tokens
        # of varied lengths, the mean of what is rounded down
        full = np.maximum(full - 0.5, 0.0) if self.varied else np.floor(full + 1e-9)
        tokens_s, share_shown = _with_prompts(table, rows, np.maximum(cohort, full))
        base_s, per_token_s, per_pair_s, per_cached_s = table.prefill_terms
        return np.asarray(
            tokens_s
            + np.interp(np.minimum(sampled, len(table.head_s) - 1), _counts(len(table.head_s)), table.head_s)
            + _attention_s(table, attending, attended * self.mean_context)
            + share_shown * (base_s + per_token_s * slowest + per_pair_s * pairs + per_cached_s * cached),
            dtype=np.float64,
        )


def _with_prompts(table: StepTable, rows: Array, prompts: Array) -> tuple[Array, Array]:
    """Part that depends on the rows alone, of steps with prompts; and the share of prompts' attention. [s], [-]"""
    by_batches, shares = table.prompts
    if len(shares) == 1:
        return np.interp(rows, _counts(table.max_tokens + 1), by_batches[0]), shares
    # a mean of 1.4 prompts is a step with one and, now and then, one with two
    at = np.minimum(prompts, float(len(shares))) - 1.0
    fewer = np.minimum(at.astype(np.int64), len(shares) - 2)
    part = at - fewer
    inside = np.minimum(rows, table.max_tokens)
    below = np.minimum(inside.astype(np.int64), table.max_tokens - 1)
    beyond = inside - below
    of_fewer, of_more = (
        by_batches[stage, below] * (1.0 - beyond) + by_batches[stage, below + 1] * beyond
        for stage in (fewer, fewer + 1)
    )
    return of_fewer * (1.0 - part) + of_more * part, shares[fewer] * (1.0 - part) + shares[fewer + 1] * part


def ends_together(workload: Workload, prompts_s: float = 0.0) -> bool:
    """Whether requests that come together end together, and come together again.

    Also after pauses that differ, if all but a twentieth are over within ``prompts_s``, what all prompts take: then
    they wait for one another once more.
    """
    apart_s = 0.0 if workload.think == "fixed" else workload.think_time * math.log(20)
    return workload.concurrency is not None and workload.output.kind == "fixed" and apart_s <= prompts_s


def _context_cv(workload: Workload) -> float:
    """Coefficient of variation of a decoding request's context: its prompt, and how far its output has come. [-]"""
    i, o = workload.input.mean, workload.output.mean
    progress = 0.0 if ends_together(workload) else o**2 / 12
    return math.sqrt(cv2(workload.input) * i**2 + progress) / (i + o / 2)


@lru_cache(maxsize=64)
def _largest_normal(most: int) -> Array:
    """Expected largest of 1 .. ``most`` standard normals, shape (most,) (Blom, 1958; within 2 %). [-]"""
    normal = NormalDist()
    return np.array([normal.inv_cdf((n - 0.375) / (n + 0.25)) for n in range(1, most + 1)])


@lru_cache(maxsize=64)
def _counts(most: int) -> Array:
    """0, 1, .. as floats: what the entries of a table stand for, shape (most,)."""
    return np.arange(most, dtype=np.float64)


def _attention_s(table: StepTable, decoding: Array, context: Array) -> Array:
    index = _counts(len(table.decode_base_s))
    base = np.interp(decoding, index, table.decode_base_s)
    slope = np.interp(decoding, index, table.decode_per_context_s)
    return np.where(decoding > 0, base * np.minimum(decoding, 1.0) + slope * context, 0.0)
