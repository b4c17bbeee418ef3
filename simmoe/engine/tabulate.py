"""A deployment's step compiled to look-ups: timed at chosen token and request counts, interpolated between.

Attention is affine in context: two contexts on either side of the workload's mean give base and slope. Prompts are
timed at one usual chunk and its half, and both again behind cached tokens, which gives their cost per token, per pair
and per cached token; and at a few tokens behind many, which gives that of walking over a prefix. Checked against
`Engine.step` in tests/test_engine.py, tests/test_pipeline.py and tests/test_speculation.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from simmoe.costs import pipeline
from simmoe.costs.speculation import Drafts
from simmoe.engine.engine import Engine
from simmoe.engine.step import StepDetail, StepTable

Array = NDArray[np.float64]
Kernel = Callable[[Array, Array], Array]
#: What steps with prompts add: a base, per new token, per attended pair, per cached token. [s]
Terms = tuple[float, float, float, float]
#: New tokens of a prompt whose head is cached: a block or less. [tokens]
_FEW = 16.0


def step_table(engine: Engine, *, mean_context: float, prompt_tokens: float) -> StepTable:
    """Tabulate the step time.

    Parameters
    ----------
    engine : times the steps.
    mean_context : context a decoding request has on average; attention is linearised around it. [tokens]
    prompt_tokens : typical prompt; prefill attention is linearised around one chunk of it. [tokens]
    """
    d, width, drafts = engine.deployment, engine.width, engine.drafts
    running = d.requests_per_replica
    budget = max(d.tokens_per_replica, running * width)
    grid = _grid(budget)
    rows = engine.rows(np.arange(budget + 1, dtype=np.float64))

    def tabulated(parts: Mapping[str, Array]) -> Array:
        seconds = np.interp(rows, grid, sum(parts.values(), np.zeros(grid.shape)))
        seconds[0] = 0.0
        return np.asarray(seconds)

    usual = engine.usual_attention(grid, mean_context, prompt_tokens)
    parts = engine.token_parts(grid, usual)
    by_batches = [parts]
    if d.pp > 1:
        by_batches = [engine.token_parts(grid, usual, chunks) for chunks in range(1, d.pp + 1)]
        for chunks, timed in enumerate(by_batches, start=1):
            timed["pipeline"] = engine.waiting(timed, grid, None, chunks)
    if drafts is not None:
        parts["draft"] = drafts.tokens_s(grid)
        engine.sigma["draft"] = drafts.sigma

    index = np.arange(running + 1)
    around = _Around(_grid(running), index, mean_context)
    base_s, slope_s = around.affine(engine.decode_attention)
    mixed_base_s, mixed_slope_s = around.affine(engine.mixed_attention)
    draft_s, draft_slope_s = around.drafting(drafts)
    sequences = _grid(running * width + budget)
    head = np.interp(np.arange(running * width + budget + 1), sequences, engine.head(sequences))
    waiting = np.zeros(index.shape)
    if d.pp > 1:
        of_requests = {name: np.interp(rows[1 : running + 1], grid, value) for name, value in parts.items()}
        of_requests |= {"head": head[1 : running + 1], "attention": (base_s + slope_s * index * mean_context)[1:]}
        waiting[1:] = engine.waiting(of_requests, rows[1 : running + 1], index[1:].astype(np.float64))
    head += engine.host_per_row * np.arange(head.size)
    head[0] = 0.0

    token_s = tabulated(parts)
    chunk = max(min(prompt_tokens, float(d.max_num_batched_tokens)), 2.0)
    before = max(prompt_tokens - chunk, chunk)
    prefill = _of_chunks(engine.prefill_attention, chunk, before, d.dp)
    walk_base, walk = _walk(engine.prefill_attention, min(chunk, _FEW), before, d.dp)
    draft_prefill = (0.0, 0.0, 0.0, 0.0)
    if drafts is not None:
        draft_prefill = _of_chunks(drafts.prompt_attention_s, chunk, before, d.dp)
    floor, linear, quadratic, cached = (a + b for a, b in zip(prefill, draft_prefill, strict=True))
    if engine.encoder is not None:
        (floor, linear, quadratic, cached), beside = _encoded(engine, token_s, max(round(chunk), 2), index)
        mixed_base_s, walk_base, walk = mixed_base_s + beside, 0.0, 0.0
    detail = StepDetail(
        grid, parts, dict(engine.sigma), engine.host_per_row, rows, tuple(by_batches), draft_s, draft_slope_s,
        draft_prefill, waiting,
    )  # fmt: skip
    return StepTable(
        token_s, head, base_s + draft_s + waiting, slope_s + draft_slope_s, floor, linear, quadratic, detail,
        mixed_base_s + draft_s, mixed_slope_s + draft_slope_s, width,
        np.stack([tabulated(timed) for timed in by_batches]),
        pipeline.prompt_share(np.arange(1.0, d.pp + 1), d.pp, drained=engine.drained),
        steps_ahead=engine.parameters.steps_ahead,
        prefill_per_cached_s=cached,
        prefill_walk_base_s=walk_base,
        prefill_walk_s=walk,
        batch_tokens=d.max_num_batched_tokens * d.dp,
    )  # fmt: skip


class _Around:
    """Kernels of decoding requests, linearised around a mean context.

    ``requests`` are the counts timed, ``index`` those wanted, from 0. [requests]
    """

    def __init__(self, requests: Array, index: NDArray[np.int_], mean_context: float) -> None:
        self.requests, self.index = requests, index
        self.near, self.far = max(mean_context / 2, 1.0), max(mean_context * 1.5, 2.0)

    def affine(self, kernel: Kernel) -> tuple[Array, Array]:
        """Base and slope by request count, shape (index,). [s], [s/token]"""
        requests = self.requests
        low = kernel(requests, np.full(requests.shape, self.near))
        high = kernel(requests, np.full(requests.shape, self.far))
        slope = np.maximum(high - low, 0.0) / (requests * (self.far - self.near))
        base = np.interp(self.index, requests, np.maximum(low - slope * requests * self.near, 0.0))
        base[0] = 0.0
        return base, np.interp(self.index, requests, slope)

    def drafting(self, drafts: Drafts | None) -> tuple[Array, Array]:
        """What drafting adds, likewise."""
        if drafts is None:
            return np.zeros(self.index.shape), np.zeros(self.index.shape)
        base, slope = self.affine(drafts.attention_s)
        base += np.interp(self.index, self.requests, drafts.requests_s(self.requests))
        base[0] = 0.0
        return base, slope


def _encoded(engine: Engine, token_s: Array, prompt: int, index: NDArray[np.int_]) -> tuple[Terms, Array]:
    """Prompt terms of an encoder-decoder, and what `StepTable.mixed_base_s` needs beside attention.

    The table counts all tokens of a step in the decoder: set right for prompts of the usual length.
    """
    half = prompt // 2
    one, short, alone = sum(engine.encode([prompt]).values()), sum(engine.encode([half]).values()), float(token_s[1])
    linear = (one - float(token_s[prompt]) - short + float(token_s[half])) / (prompt - half)
    floor = one + alone - float(token_s[prompt]) - linear * prompt
    begun, with_prompt = (token_s[np.minimum(index + more, token_s.size - 1)] for more in (1, prompt))
    beside = begun - alone + token_s[prompt] - with_prompt
    beside[0] = 0.0
    return (floor, linear, 0.0, 0.0), beside


def _of_chunks(kernel: Kernel, chunk: float, before: float, ranks: int) -> Terms:
    """Attention of prompt chunks about ``chunk`` long, of later ones after ``before`` tokens, over ``ranks``. [s]

    What the pairs with cached tokens take is what pairs take: among the new ones, launches and tiles that are not
    filled weigh in. First chunks keep their times at ``chunk`` and its half, so that leaves little room to choose.
    """
    chunks = np.array([chunk, max(chunk / 2, 1.0)])
    none = np.zeros(2)
    whole, half = kernel(chunks, none).tolist()
    more, more_of_half = (kernel(chunks, none + before) - kernel(chunks, none)).tolist()
    pairs = chunks * (chunks + 1) / 2
    # chunks spread over the data-parallel ranks, which work at the same time
    least = max(whole - 2 * half, 0.0) / (pairs[0] - 2 * pairs[1]) if whole > 2 * half else 0.0
    most = max(whole - half, 0.0) / (pairs[0] - pairs[1])
    behind = (more - more_of_half) / (before * (chunks[0] - chunks[1]))
    quadratic = min(max(behind, least), max(most, least))
    linear = max(whole - half - quadratic * (pairs[0] - pairs[1]), 0.0) / (chunks[0] - chunks[1])
    floor = max(whole - linear * chunks[0] - quadratic * pairs[0], 0.0)
    cached = max(more_of_half / before - quadratic * chunks[1], 0.0)
    return float(floor), float(linear / ranks), float(quadratic / ranks), float(cached / ranks)


def _walk(kernel: Kernel, few: float, before: float, ranks: int) -> tuple[float, float]:
    """Attention of ``few`` tokens behind about ``before`` cached ones: its base, and per token the last sees. [s]"""
    near, far = kernel(np.full(2, few), np.array([before, 2 * before])).tolist()
    walk = max(far - near, 0.0) / before
    return max(near - walk * (before + few), 0.0) / ranks, walk / ranks  # spread as `_of_chunks` spreads its terms


def _grid(top: int) -> Array:
    """Counts at which a step is timed exactly: every one up to 8, then about six an octave.

    Powers of two and what follows each are among them: tiles and kernels change there, and just there users ask.
    """
    if top <= 8:
        return np.arange(1, top + 1, dtype=np.float64)
    spaced = np.round(np.geomspace(8, top, max(2, round(6 * math.log2(top / 8)))))
    powers = 2.0 ** np.arange(3, math.floor(math.log2(top)) + 1)
    steps = np.concatenate([powers, powers + 1.0])
    return np.concatenate([np.arange(1, 8, dtype=np.float64), np.union1d(spaced, steps[steps <= top])])
