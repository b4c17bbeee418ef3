"""One result shape from both solvers: requests' times to TTFT, TPOT, ITL, throughput and goodput.

Definitions, as `vllm bench serve` states them:
TTFT = first token - arrival. TPOT = (last token - first token) / (output tokens - 1), per request, defined for
two or more output tokens. ITL = gap between consecutive chunks of a request's stream: a chunk a step, with one token
or, with speculative decoding, all that the step emits (ITL is a step then, TPOT less). E2E = last token - arrival.
Percentiles of TTFT, TPOT, E2E interpolate linearly between requests, those of ITL between single gaps, all
requests' gaps pooled. Goodput (Zhong et al., "DistServe", OSDI 2024): requests per second that meet every limit of
the objective. Rates are over the window after the warm-up; request_throughput and output_throughput of `vllm bench
serve` are those of a run that drains, without warm-up: requests, or output tokens, over the time to the last token.
Intervals: 90 %, batch means (Law, "Simulation Modeling and Analysis", 5th ed., sec. 9.5.3) with 20 batches.
Left out: correlation between replicas' runs; use replications where batch means are too few.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from simmoe.output_analysis import BATCHES, batch_means_interval, mean_interval, mser5, pooled_quantiles
from simmoe.specs.workload import Objective

Array = NDArray[np.float64]
Counts = NDArray[Any]
"""Whole numbers, of whatever type holds them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """One served (or refused) request. Times on the simulation clock. [s]"""

    request: int
    replica: int
    arrival_s: float
    first_scheduled_s: float
    first_token_s: float
    finished_s: float
    input_tokens: int
    output_tokens: int
    preemptions: int = 0
    refused: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantiles:
    """Mean and percentiles of one latency. [s]"""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Array) -> Self:
        """Quantiles of a sample; all nan if it is empty."""
        most = len(values) - 1
        if most < 0 or math.isnan(mean := float(values.mean())):
            return cls(mean=np.nan, p50=np.nan, p90=np.nan, p99=np.nan)
        # as np.percentile, whose checks take longer than a closed form
        at = [share * most for share in (0.5, 0.9, 0.99)]
        beside = [(int(place), min(int(place) + 1, most)) for place in at]
        ordered = np.partition(values, sorted({place for pair in beside for place in pair}))
        p50, p90, p99 = (
            float(ordered[low] + (ordered[high] - ordered[low]) * (place - low))
            for place, (low, high) in zip(at, beside, strict=True)
        )
        return cls(mean=mean, p50=p50, p90=p90, p99=p99)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingMetrics:
    """What a deployment delivers under a workload; totals are over all replicas."""

    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    ttft: Quantiles
    tpot: Quantiles
    itl: Quantiles
    e2e: Quantiles
    mean_running: float
    mean_waiting: float
    mean_batch_tokens: float
    mean_step_s: float
    kv_utilisation: float
    utilisation: float
    goodput_requests_per_s: float | None = None
    requests: int | None = None
    interval_90: dict[str, tuple[float, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTable:
    """Requests as columns, in order of arrival; nan where a time never came.

    A refused request has rank -1 and no times. In a run that keeps its load up to the end, requests behind the measured
    ones may be unfinished.
    """

    request: Counts
    rank: Counts
    arrival_s: Array
    first_scheduled_s: Array
    first_token_s: Array
    finished_s: Array
    input_tokens: Counts
    output_tokens: Counts
    preemptions: Counts

    def __len__(self) -> int:
        return len(self.request)

    def where(self, mask: NDArray[np.bool_]) -> RequestTable:
        """The requests selected by a mask."""
        return RequestTable(**{f.name: getattr(self, f.name)[mask] for f in fields(self)})

    def part(self, start: int, stop: int) -> RequestTable:
        """Consecutive requests, not copied."""
        return RequestTable(**{f.name: getattr(self, f.name)[start:stop] for f in fields(self)})

    def accepted(self) -> RequestTable:
        """Those not refused."""
        taken = self.rank >= 0
        return self if taken.all() else self.where(taken)

    def records(self) -> Iterator[RequestRecord]:
        """One object per request, for readers; computations use the columns."""
        for i in range(len(self)):
            yield RequestRecord(
                request=int(self.request[i]),
                replica=int(self.rank[i]),
                arrival_s=float(self.arrival_s[i]),
                first_scheduled_s=float(self.first_scheduled_s[i]),
                first_token_s=float(self.first_token_s[i]),
                finished_s=float(self.finished_s[i]),
                input_tokens=int(self.input_tokens[i]),
                output_tokens=int(self.output_tokens[i]),
                preemptions=int(self.preemptions[i]),
                refused=bool(self.rank[i] < 0),
            )

    @property
    def ttft_s(self) -> Array:
        """Time to first token per request. [s]"""
        return self.first_token_s - self.arrival_s

    @property
    def e2e_s(self) -> Array:
        """Arrival to last token per request. [s]"""
        return self.finished_s - self.arrival_s

    @property
    def tpot_s(self) -> Array:
        """Time per output token after the first, per request; nan for a single token. [s]"""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray((self.finished_s - self.first_token_s) / (self.output_tokens - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLog:
    """What ranks did: a row is ``steps`` like steps, step i taking ``first_s + i * growth_s``.

    Each step gives a token to each of ``decodes`` requests and computes one of theirs; beside these the row emits
    ``sampled`` tokens, first ones of finished prompts and accepted drafts, and computes ``prompt_tokens`` of prompts
    and drafts. ``running``: requests in the batch; ``blocks``: KV blocks held, mean of the row's start
    and end. Ranks of one engine log the same steps. ``gap_s``: times between two tokens of
    ``gap_count`` requests that hold more than a step (a preemption, a pause, a move), ending at ``gap_end_s``; these
    tokens are among the row's ``sampled``.
    """

    rank: Array
    start_s: Array
    steps: Array
    first_s: Array
    growth_s: Array
    decodes: Array
    prompt_tokens: Array
    sampled: Array
    running: Array
    blocks: Array
    gap_end_s: Array
    gap_s: Array
    gap_count: Array
    merged_until_s: float = 0.0
    """Up to then a row stands for many unlike steps, and the time between two tokens of any request is among the gaps;
    see `simmoe.sim.merging`."""

    @property
    def duration_s(self) -> Array:
        """Time of all the row's steps. [s]"""
        return self.steps * self.first_s + self.growth_s * (self.steps * (self.steps - 1) / 2)


def from_records(
    requests: RequestTable,
    steps: StepLog,
    *,
    end_s: float,
    measured: int | None = None,
    warmup: float | Literal["mser"] = 0.1,
    ranks: int = 1,
    kv_blocks_per_rank: float = 1,
    objective: Objective | None = None,
    notes: Sequence[str] = (),
) -> ServingMetrics:
    """Metrics over the window from the first arrival kept to ``end_s``.

    Parameters
    ----------
    requests : requests not refused, in order of arrival; unfinished ones count as present until ``end_s``.
    end_s : end of the run. [s]
    measured : latencies are of this many first requests, all finished; None: of all.
    warmup : share of measured requests dropped at the start; "mser": chosen by MSER-5 on end-to-end times.
    ranks, kv_blocks_per_rank : how many ranks, and the mean of the blocks of each.

    Notes
    -----
    Tokens count when they are made, so long requests cut by the window's edges do not bias throughput; a row of steps
    cut by an edge counts by its share of time. A prompt counts when its first token comes, so what is recomputed after
    a preemption is not throughput.
    """
    measured = len(requests) if measured is None else min(measured, len(requests))
    drop = mser5(requests.e2e_s[:measured]) if warmup == "mser" else int(warmup * measured)
    kept = requests.part(drop, measured)
    begin_s = float(kept.arrival_s[0]) if drop else 0.0
    span_s = end_s - begin_s
    row_end_s = steps.start_s + steps.duration_s
    busy_s = np.maximum(np.minimum(row_end_s, end_s) - np.maximum(steps.start_s, begin_s), 0.0)
    share = busy_s / steps.duration_s
    num_steps = float((steps.steps * share).sum())
    tokens = (steps.decodes * steps.steps + steps.sampled) * share
    batch_tokens = float(((steps.decodes * steps.steps + steps.prompt_tokens) * share).sum())
    in_window = requests.finished_s > begin_s
    requests_per_s = float(in_window.sum()) / span_s
    output_tokens_per_s = float(tokens.sum()) / span_s
    prompt_tokens = float(requests.input_tokens[requests.first_token_s > begin_s].sum())
    left_s = np.where(np.isnan(requests.finished_s), end_s, requests.finished_s)
    in_system = float(np.maximum(left_s - np.maximum(requests.arrival_s, begin_s), 0.0).sum()) / span_s
    mean_running = float((steps.running * busy_s).sum()) / span_s
    itl = _pooled_itl(steps, begin_s, share)
    tpot_s = kept.tpot_s[kept.output_tokens > 1]
    intervals = {
        "ttft": batch_means_interval(kept.ttft_s),
        "tpot": batch_means_interval(tpot_s),
        "e2e": batch_means_interval(kept.e2e_s),
        "output_tokens_per_s": _throughput_interval(row_end_s, tokens, begin_s, end_s)
        if len(kept) >= 2 * BATCHES
        else None,
    }
    goodput = None if objective is None else requests_per_s * float(meets(kept, objective).mean())
    return ServingMetrics(
        requests_per_s=requests_per_s,
        output_tokens_per_s=output_tokens_per_s,
        total_tokens_per_s=output_tokens_per_s + prompt_tokens / span_s,
        ttft=Quantiles.of(kept.ttft_s),
        tpot=Quantiles.of(tpot_s),
        itl=itl,
        e2e=Quantiles.of(kept.e2e_s),
        mean_running=mean_running,
        mean_waiting=max(0.0, in_system - mean_running),
        mean_batch_tokens=batch_tokens / num_steps,
        mean_step_s=float(busy_s.sum()) / num_steps,
        kv_utilisation=float((steps.blocks * busy_s).sum()) / (span_s * ranks * kv_blocks_per_rank),
        utilisation=float(busy_s.sum()) / (span_s * ranks),
        goodput_requests_per_s=goodput,
        requests=len(kept),
        interval_90={name: interval for name, interval in intervals.items() if interval is not None},
        notes=tuple(notes),
    )


def meets(requests: RequestTable, objective: Objective) -> NDArray[np.bool_]:
    """Which requests meet every limit of the objective; a single token has no TPOT and meets that limit."""
    good = np.ones(len(requests), dtype=bool)
    if objective.ttft is not None:
        good &= requests.ttft_s <= objective.ttft
    if objective.tpot is not None:
        good &= ~(requests.tpot_s > objective.tpot)
    if objective.e2e is not None:
        good &= requests.e2e_s <= objective.e2e
    return good


def _pooled_itl(steps: StepLog, begin_s: float, share: Array) -> Quantiles:
    """Gaps between tokens, over the rows that reach into the window."""
    rows, inside = share > 0, steps.gap_end_s > begin_s
    gaps, count = steps.gap_s[inside], steps.gap_count[inside]
    ones = np.ones(len(gaps))
    mean, p50, p90, p99 = pooled_quantiles(
        np.concatenate([steps.first_s[rows], gaps]),
        np.concatenate([steps.growth_s[rows], 0.0 * ones]),
        np.concatenate([steps.steps[rows], ones]),
        np.concatenate([steps.decodes[rows], count]),
        (0.5, 0.9, 0.99),
    )
    return Quantiles(mean=mean, p50=p50, p90=p90, p99=p99)


def _throughput_interval(row_end_s: Array, tokens: Array, begin_s: float, end_s: float) -> tuple[float, float]:
    """90 % interval of tokens per second from equal slices of the window."""
    edges = np.linspace(begin_s, end_s, BATCHES + 1)
    order = np.argsort(row_end_s, kind="stable")
    made = np.concatenate([[0.0], np.cumsum(tokens[order])])
    upto = made[np.searchsorted(row_end_s[order], edges, side="right")]
    return mean_interval(np.diff(upto) / np.diff(edges))
