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
from simmoe.specs.workload import Lengths, Workload

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


class StepTimes:
    """A step table read at mean numbers of requests of one workload."""

    def __init__(self, table: StepTable, deployment: Deployment, workload: Workload) -> None:
        self.table = table
        self.width, self.dp = deployment.rows_per_decode, deployment.dp
        self.input_tokens = workload.input.mean
        self.mean_context = workload.input.mean + workload.output.mean / 2
        self.varied = _cv2(workload.input)
        self.context_cv = _context_cv(workload)
        self.largest = _largest_normal(self.dp)
        self.most_each = float(deployment.max_num_batched_tokens)

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
        tokens = np.interp(rows, np.arange(table.max_tokens + 1), table.token_s)
        head = np.interp(rows, np.arange(len(table.head_s)), table.head_s)
        return np.asarray(tokens + head + _attention_s(table, at_least, context * scale), dtype=np.float64)

    def mixed_s(self, beside: Array, chunk: Array, fullest: Array, waited_for: Array | None = None) -> Array:
        """Step with ``chunk`` prompt tokens and ``beside`` decoding requests. [s]

        A prompt is one rank's; of one longer than what a rank computes in a step, a step carries a piece.
        ``waited_for``: decoding requests of the replica if all its ranks had as many as the fullest; None: ``beside``.
        """
        table, input_tokens, varied = self.table, self.input_tokens, self.varied
        piece = min(input_tokens, self.most_each)
        cohort = np.maximum(chunk / piece, 1.0)
        spread = np.interp(cohort, np.arange(1, self.dp + 1), self.largest)
        longest = 1.0 + math.sqrt(varied) * spread
        # ranks that step together wait for the one that has a prompt: attention and head as if each had one
        whole = input_tokens * longest
        slowest = np.maximum(chunk, self.dp * np.minimum(np.minimum(chunk, whole), self.most_each))
        # a prompt meets itself: pairs grow as the mean of squares
        pairs = slowest * (input_tokens * (longest + varied / longest) + 1) / 2
        # later chunks of a prompt that one step does not hold stand, on average, behind half of the rest
        cached = self.dp * (whole - np.minimum(slowest / self.dp, whole)) / 2
        attending = beside if waited_for is None else waited_for
        sampled = np.minimum(self.width * beside + slowest / input_tokens, len(table.head_s) - 1)
        tokens_s, share_shown = _with_prompts(table, self.width * beside + chunk, cohort)
        base_s, per_token_s, per_pair_s, per_cached_s = table.prefill_terms
        return np.asarray(
            tokens_s
            + np.interp(sampled, np.arange(len(table.head_s)), table.head_s)
            + _attention_s(table, attending, attending * self.mean_context * fullest)
            + share_shown * (base_s + per_token_s * slowest + per_pair_s * pairs + per_cached_s * cached),
            dtype=np.float64,
        )


def _with_prompts(table: StepTable, rows: Array, prompts: Array) -> tuple[Array, Array]:
    """Part that depends on the rows alone, of steps with prompts; and the share of prompts' attention. [s], [-]"""
    by_batches, shares = table.prompts
    index = np.arange(table.max_tokens + 1)
    if len(shares) == 1:
        return np.interp(rows, index, by_batches[0]), shares
    # a mean of 1.4 prompts is a step with one and, now and then, one with two
    at = np.minimum(prompts, float(len(shares))) - 1.0
    fewer = np.minimum(at.astype(np.int64), len(shares) - 2)
    part = at - fewer
    times, each = np.stack([np.interp(rows, index, row) for row in by_batches]), np.arange(rows.size)
    return (
        times[fewer, each] * (1.0 - part) + times[fewer + 1, each] * part,
        shares[fewer] * (1.0 - part) + shares[fewer + 1] * part,
    )


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


def _attention_s(table: StepTable, decoding: Array, context: Array) -> Array:
    index = np.arange(len(table.decode_base_s))
    base = np.interp(decoding, index, table.decode_base_s)
    slope = np.interp(decoding, index, table.decode_per_context_s)
    return np.where(decoding > 0, base * np.minimum(decoding, 1.0) + slope * context, 0.0)
