"""What one engine step works on and how long it takes: by parts, and compiled to look-ups.

The seam between the two halves of simmoe: queues know a step's time and never a FLOP, costs never a queue. Overlap
rule of a breakdown: parts run one after another, the host's time is added, and the total is their sum; what an engine
hides under something else is not counted as a part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: Spread assumed for parts nobody fitted (small kernels, host time).
UNFITTED_LOG_SIGMA = 0.5


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step of one replica works on, over all its data-parallel ranks.

    Attributes
    ----------
    decode_requests : requests that make one decode step each. [requests]
    decode_context_tokens : sum over them of tokens already in the KV cache. [tokens]
    prefill_chunks : per prompt chunk (new tokens, tokens of that request already cached). [tokens]
    """

    decode_requests: int = 0
    decode_context_tokens: int = 0
    prefill_chunks: tuple[tuple[int, int], ...] = ()

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens the step computes."""
        return sum(new for new, _ in self.prefill_chunks)

    def rows(self, per_decode: int = 1) -> int:
        """Tokens the step computes, a decoding request bringing ``per_decode``: its own and drafts to verify."""
        return self.decode_requests * per_decode + self.prompt_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBreakdown:
    """Where a step's time goes. All parts in seconds, summed over layers; they add up to the total."""

    attention_s: float = 0.0
    projections_s: float = 0.0
    router_s: float = 0.0
    dispatch_s: float = 0.0
    expert_fetch_s: float = 0.0
    routed_experts_s: float = 0.0
    shared_experts_s: float = 0.0
    combine_s: float = 0.0
    dense_ffn_s: float = 0.0
    all_reduce_s: float = 0.0
    elementwise_s: float = 0.0
    head_s: float = 0.0
    draft_s: float = 0.0
    pipeline_s: float = 0.0
    host_s: float = 0.0
    log_sigma: float = 0.0

    @property
    def parts(self) -> dict[str, float]:
        """Part name (without the suffix) to seconds, in the order of a layer."""
        return {f.name.removesuffix("_s"): getattr(self, f.name) for f in fields(self) if f.name != "log_sigma"}

    @property
    def total_s(self) -> float:
        """Sum of the parts. [s]"""
        return sum(self.parts.values())

    def mixed_with(self, other: StepBreakdown, share: float) -> StepBreakdown:
        """Average of two kinds of step, ``share`` of them being ``other``."""
        mine, theirs = self.parts, other.parts
        parts = {f"{name}_s": mine[name] * (1 - share) + theirs[name] * share for name in mine}
        sigma = self.log_sigma * (1 - share) + other.log_sigma * share
        return StepBreakdown(**parts, log_sigma=sigma)


@dataclass(frozen=True)
class StepDetail:
    """What `StepTable` sums up, kept apart for breakdowns.

    Attributes
    ----------
    grid : token counts at which the parts were timed, shape (n,). [tokens]
    parts_s : part -> time at the grid, shape (n,). [s]
    log_sigma : part -> spread of ln(measured / predicted), one for all steps or at the grid, shape (n,). [-]
    host_per_row_s : host time per row that samples; `StepTable.head_s` holds it. [s]
    rows : tokens of a step -> rows its kernels work on, shape (tokens + 1,): captured graphs round up. [tokens]
    prompt_parts_s : as ``parts_s`` for steps with prompts, by the micro-batches these make in a pipeline.
    draft_s, draft_per_context_s, pipeline_s : what the decode terms of `StepTable` hold beside attention, by decoding
        requests: drafting, and waiting for other pipeline stages; shape (requests + 1,). [s], [s/token], [s]
    draft_prompt_s : what the prefill terms hold of drafting: base, per token, per pair, per cached token. [s]
    """

    grid: Array
    parts_s: Mapping[str, Array]
    log_sigma: Mapping[str, float | Array]
    host_per_row_s: float
    rows: Array
    prompt_parts_s: tuple[Mapping[str, Array], ...]
    draft_s: Array
    draft_per_context_s: Array
    draft_prompt_s: tuple[float, float, float, float]
    pipeline_s: Array

    def log_sigma_at(self, tokens: int) -> dict[str, float]:
        """Spread of every part in a step of so many tokens. [-]"""
        rows = self.rows[max(tokens, 1)]
        return {
            name: float(np.interp(rows, self.grid, value)) if isinstance(value, np.ndarray) else value
            for name, value in self.log_sigma.items()
        }


@dataclass(frozen=True)
class StepTable:
    """Step time as look-ups: exact in the batch, affine in context. All times in seconds.

    time = token_s[rows]                                 (everything that depends on the token count alone)
         + head_s[rows that sample]                      (those of decoding requests + prompts that finish in the step)
         + decode_base_s[b] + decode_per_context_s[b] * context   (if b = decode_requests > 0)
         + prefill_base_s                                   (once, if the step has any prompt chunk)
         + prefill_per_token_s * new + prefill_per_pair_s * pairs + prefill_per_cached_s * cached
    with rows = new + b * rows_per_decode (1 without speculative decoding), and new, pairs, cached = sums over the
    step's prompt chunks of new, of new * cached + new * (new + 1) / 2 and of the tokens cached before them, which MLA
    expands again for every chunk: attention kernels take all chunks of a step in one launch. The prefill terms are at
    least prefill_walk_base_s + prefill_walk_s * keys, keys being the most that a chunk's last token sees: however few
    tokens are new, somebody walks over what is cached before them.
    In a step that has both, mixed_base_s and mixed_per_context_s stand in for the decode terms, if given. In a pipeline
    steps with c prompt chunks, or c times batch_tokens rows, have prompt_token_s[i, rows] for the first term and
    prompt_shares[i] of the prefill terms, i = min(c, stages) - 1.
    With data-parallel ranks, counts are the whole replica's, evenly spread over the ranks.
    ``steps_ahead``: steps decided before the running one ends, 0 or 1 (asynchronous scheduling).
    """

    token_s: Array
    head_s: Array
    decode_base_s: Array
    decode_per_context_s: Array
    prefill_base_s: float
    prefill_per_token_s: float
    prefill_per_pair_s: float
    detail: StepDetail | None = None
    mixed_base_s: Array | None = None
    mixed_per_context_s: Array | None = None
    rows_per_decode: int = 1
    prompt_token_s: Array | None = None
    prompt_shares: Array | None = None
    steps_ahead: int = 0
    prefill_per_cached_s: float = 0.0
    prefill_walk_base_s: float = 0.0
    prefill_walk_s: float = 0.0
    batch_tokens: int = 1 << 40

    def __post_init__(self) -> None:
        if self.prompt_token_s is None:  # no pipeline: a step's prompts make one batch with its decodes
            object.__setattr__(self, "prompt_token_s", self.token_s[None])
            object.__setattr__(self, "prompt_shares", np.ones(1))

    @property
    def prefill_terms(self) -> tuple[float, float, float, float]:
        """What prompts add: a base, and per new token, attended pair and cached token. [s]"""
        return self.prefill_base_s, self.prefill_per_token_s, self.prefill_per_pair_s, self.prefill_per_cached_s

    @property
    def prompts(self) -> tuple[Array, Array]:
        """``prompt_token_s``, shape (stages, tokens + 1), and ``prompt_shares``, shape (stages,)."""
        assert self.prompt_token_s is not None
        assert self.prompt_shares is not None
        return self.prompt_token_s, self.prompt_shares

    def scaled(self, factor: float) -> StepTable:
        """The same table with every time multiplied; without its breakdown."""
        times = {
            f.name: value * factor
            for f in fields(self)
            if f.name.endswith("_s") and (value := getattr(self, f.name)) is not None
        }
        return replace(self, **times, detail=None)

    @property
    def max_tokens(self) -> int:
        """Largest token count the table covers."""
        return len(self.token_s) - 1

    @property
    def max_requests(self) -> int:
        """Largest number of decoding requests the table covers."""
        return len(self.decode_base_s) - 1

    def decode_s(self, requests: int, context_tokens: float) -> float:
        """Time of a pure decode step. [s]"""
        rows = requests * self.rows_per_decode
        return float(
            self.token_s[rows]
            + self.head_s[rows]
            + self.decode_base_s[requests]
            + self.decode_per_context_s[requests] * context_tokens
        )

    def step_s(self, batch: Batch, finishing_prompts: int = 0) -> float:
        """Time of a step; ``finishing_prompts`` of its chunks end their prompt and sample a token. [s]"""
        b = batch.decode_requests
        total = self._tokens_s(batch) + float(self.head_s[b * self.rows_per_decode + finishing_prompts])
        mixed = bool(batch.prefill_chunks)
        if b:
            base = self.mixed_base_s if mixed and self.mixed_base_s is not None else self.decode_base_s
            slope = self.decode_per_context_s
            if mixed and self.mixed_per_context_s is not None:
                slope = self.mixed_per_context_s
            total += float(base[b] + slope[b] * batch.decode_context_tokens)
        if batch.prefill_chunks:
            walk = self.prefill_walk_base_s + self.prefill_walk_s * _longest(batch)
            attention = max(_of_prompts(batch, self.prefill_terms), walk)
            total += attention * float(self.prompts[1][self._micro_batches(batch)])
        return total

    def _micro_batches(self, batch: Batch) -> int:
        found = micro_batches(len(batch.prefill_chunks), batch.rows(self.rows_per_decode), self.batch_tokens)
        return min(found, len(self.prompts[1])) - 1

    def _tokens_s(self, batch: Batch) -> float:
        rows = batch.rows(self.rows_per_decode)
        if batch.prefill_chunks:
            return float(self.prompts[0][self._micro_batches(batch), rows])
        return float(self.token_s[rows])

    def breakdown(self, batch: Batch, finishing_prompts: int = 0) -> StepBreakdown:
        """The same time, part by part; the parts add up to `step_s` within interpolation."""
        detail = self.detail
        assert detail is not None, "compiled without detail"
        b, at = batch.decode_requests, detail.rows[max(batch.rows(self.rows_per_decode), 1)]
        tabulated = detail.prompt_parts_s[self._micro_batches(batch)] if batch.prefill_chunks else detail.parts_s
        # one place in the grid for all parts
        above = min(max(int(np.searchsorted(detail.grid, at, side="right")), 1), len(detail.grid) - 1)
        low, high = float(detail.grid[above - 1]), float(detail.grid[above])
        share = min(max((float(at) - low) / (high - low), 0.0), 1.0)
        parts = {
            name: float(value[above - 1]) * (1.0 - share) + float(value[above]) * share
            for name, value in tabulated.items()
        }
        sequences = b * self.rows_per_decode + finishing_prompts
        host = detail.host_per_row_s * sequences
        parts["head"] = float(self.head_s[sequences]) - host
        parts["host"] += host
        drafting = float(detail.draft_s[b] + detail.draft_per_context_s[b] * batch.decode_context_tokens)
        if batch.prefill_chunks:
            drafting += _of_prompts(batch, detail.draft_prompt_s)
        waiting = 0.0 if batch.prefill_chunks else float(detail.pipeline_s[b])
        beside = self._tokens_s(batch) + float(self.head_s[sequences])
        parts["attention"] = self.step_s(batch, finishing_prompts) - beside - drafting - waiting
        parts["draft"] = parts.get("draft", 0.0) + drafting
        parts["pipeline"] = parts.get("pipeline", 0.0) + waiting
        fields_of = {f"{name}_s": value for name, value in parts.items()}
        sigma = detail.log_sigma_at(batch.rows(self.rows_per_decode))
        return StepBreakdown(**fields_of, log_sigma=spread(parts, sigma))


def _of_prompts(batch: Batch, terms: tuple[float, float, float, float]) -> float:
    """What a step's prompt chunks add by such terms. [s]"""
    pairs = sum(n * cached + n * (n + 1) / 2 for n, cached in batch.prefill_chunks)
    cached_tokens = sum(cached for new, cached in batch.prefill_chunks if new > 1)  # one token attends as a decode does
    return terms[0] + terms[1] * batch.prompt_tokens + terms[2] * pairs + terms[3] * cached_tokens


def micro_batches(chunks: int, rows: int, most: int) -> int:
    """Those of a step with prompts in a pipeline: one for each chunk, or for each full batch of ``most`` rows."""
    return max(chunks, rows // most)


def _longest(batch: Batch) -> int:
    """Most tokens that a prompt chunk's last one sees. [tokens]"""
    return max((new + cached for new, cached in batch.prefill_chunks if new > 1), default=0)


def spread(parts: Mapping[str, float], sigma: Mapping[str, float]) -> float:
    """Log spread of a sum whose parts err independently, each as a whole. [-]"""
    total = sum(parts.values())
    square = sum((seconds * sigma.get(name, UNFITTED_LOG_SIGMA)) ** 2 for name, seconds in parts.items())
    return math.sqrt(square) / total if total else 0.0
