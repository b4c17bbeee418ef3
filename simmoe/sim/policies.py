"""Scheduling policies by name: who joins the next engine step.

A policy is a function ``(scheduler, now) -> settled``: it admits and preempts through the scheduler and says whether
the batch may be repeated until something happens (arrival, completion, blocks running out). See `POLICIES`. While
nobody waits, no prompt is unfinished and blocks last, none has anything to decide, and none is asked.
Prompts found in the prefix cache, or in host memory, are not computed again. Left out: priorities.
"""

from __future__ import annotations

from collections.abc import Callable

from simmoe.errors import SpecError
from simmoe.sim.scheduler import Scheduler
from simmoe.specs.cluster import NEW_TOKEN_RATIO

Policy = Callable[[Scheduler, int], bool]


def vllm(s: Scheduler, now: int, *, whole_prompts: bool = False) -> bool:
    """One token budget per step, as vLLM's V1 scheduler (``vllm/v1/core/sched/scheduler.py``).

    Running requests come first: each decoding one takes a token and its drafts (and, where its last block is full, a
    block; while blocks lack, the newest running request is preempted), then the unfinished prompt goes on. What is left
    of the budget admits waiting requests in order of arrival, chunking the last prompt, while seats and blocks for the
    chunk last (with ``whole_prompts`` for the prompt, all taken at once); not in a step that preempted. An unfinished
    prompt that lacks blocks is preempted in name only: with prefix caching its own blocks are found again when there
    is room for the rest, unless decoding requests need them before.
    """
    pool = s.pool
    preempted = False
    while (need := pool.need(s.step)) > pool.free:
        s.preempt_newest(now)
        preempted = True
    room = pool.free - need
    budget = s.max_num_batched_tokens - s.decoding * s.width
    partial = s.partial
    if partial is not None:
        cached = partial.cached
        new = min(partial.target - cached, budget)
        blocks = pool.blocks_of(cached + new) - pool.blocks_of(cached)
        if whole_prompts:
            partial.reserved -= blocks
            blocks = 0
        if blocks <= room:
            pool.take(blocks)
            room -= blocks
            budget -= new
            s.chunks.append((partial, new, cached))
        elif s.decoding and s.prefixes is not None and (s.tier is None or not s.tier.swap):
            return True  # preempted, being the newest, its blocks would be found again: it waits, first in line
        else:
            s.preempt_newest(now)
            preempted = True
    if preempted:
        return False
    waiting = s.waiting
    seats = s.max_num_seqs - len(s.running)
    if waiting and s.prefixes is not None:
        s.prefixes.promised = need
    while waiting and seats and budget:
        cached, hit, idle = s.found(waiting[0])
        new = min(waiting[0].target - cached, budget)
        blocks = pool.blocks_of(cached + new) - hit
        reserved = pool.blocks_of(waiting[0].target) - hit - blocks if whole_prompts else 0
        if blocks + reserved + idle > room:
            break
        s.admit(new, blocks, now, cached, hit, reserved)
        seats -= 1
        room -= blocks + reserved + idle
        budget -= new
    return True


def max_utilization(s: Scheduler, now: int) -> bool:
    """Who is running goes on while blocks last, the newest pauses where they do not; prompts take theirs whole.

    As TensorRT-LLM's ``MAX_UTILIZATION`` capacity scheduler (``capacityScheduler.cpp``): one step's blocks for each
    request that has begun, then waiting ones in order, until one does not fit. Left out: its look two steps ahead.
    """
    return vllm(s, now, whole_prompts=True)


def no_evict(s: Scheduler, now: int) -> bool:
    """Admission only where a request's whole context fits beside everybody else's, so that nobody is preempted.

    As TensorRT-LLM's ``GUARANTEED_NO_EVICT`` capacity scheduler (its documentation), with chunked prompts under one
    token budget as in `vllm`.
    """
    pool = s.pool
    reserved = s.final_blocks
    budget = s.max_num_batched_tokens - s.decoding * s.width
    partial = s.partial
    if partial is not None:
        cached = partial.cached
        new = min(partial.target - cached, budget)
        pool.take(pool.blocks_of(cached + new) - pool.blocks_of(cached))
        budget -= new
        s.chunks.append((partial, new, cached))
    if s.waiting and s.prefixes is not None:
        s.prefixes.promised = pool.need(s.step)
    while s.waiting and budget and len(s.running) < s.max_num_seqs:
        head = s.waiting[0]
        reserved += s.most_blocks(head)
        if reserved > pool.total:
            break
        cached, hit, _ = s.found(head)
        new = min(head.target - cached, budget)
        s.admit(new, pool.blocks_of(cached + new) - hit, now, cached, hit)
        budget -= new
    return True


def _prompts_or_tokens(s: Scheduler, now: int) -> bool:
    """A step of the prompts just admitted, decodes paused; else one of decodes, preempting while blocks lack."""
    if s.chunks:
        s.pause(now)
        return True
    preempted = False
    while s.pool.need(s.step) > s.pool.free:
        s.preempt_newest(now)
        preempted = True
    return not preempted


def prefill_first(s: Scheduler, now: int) -> bool:
    """Prompts before tokens: while somebody can be admitted, a step holds prompt chunks only and decodes pause.

    As SGLang's scheduler (``python/sglang/srt/managers/scheduler.py``, ``schedule_policy.py``), whose prompts are
    chunked at ``chunked_prefill_size``, here the token budget. A request is admitted if, beside its whole prompt,
    blocks remain for `NEW_TOKEN_RATIO` of what it and the running ones may still generate; where they run out all the
    same, the newest is preempted (SGLang retracts those with the fewest tokens generated). Left out: the ratio's rise
    after a retraction and its decay; chunks mixed into decode steps, which SGLang does not do by default.
    """
    pool = s.pool
    partial = s.partial
    room = pool.free
    budget = s.max_num_batched_tokens
    if partial is not None:
        cached = partial.cached
        new = min(partial.target - cached, budget)
        blocks = pool.blocks_of(cached + new) - pool.blocks_of(cached)
        pool.take(blocks)  # they were there for the whole prompt when it was admitted
        room -= blocks
        budget -= new
        s.chunks.append((partial, new, cached))
    seats = s.max_num_seqs - len(s.running)
    if s.waiting and seats and budget:
        total = s.final_tokens - (0 if partial is None else partial.target)
        remaining = total - s.context / pool.grain
    while s.waiting and seats and budget:
        head = s.waiting[0]
        cached, hit, idle = s.found(head)
        remaining += head.input_tokens + head.output_tokens - 1 - head.target
        promised = pool.blocks_of(head.target + int(NEW_TOKEN_RATIO * remaining))
        if promised > room and s.running:
            if s.decoding and (spare := room * pool.block_tokens - head.target) >= 0:
                # as outputs come, fewer are to come: look again when the promise may fit
                fewer = s.decoding * pool.stride / pool.grain
                s.horizon = max(1, int((remaining - (spare + 1) / NEW_TOKEN_RATIO) / fewer - _ROUNDING) + 1)
            break
        new = min(head.target - cached, budget)
        blocks = pool.blocks_of(cached + new) - hit
        if blocks + idle > room:
            break
        s.admit(new, blocks, now, cached, hit)
        seats -= 1
        room -= blocks + idle
        budget -= new
    return _prompts_or_tokens(s, now)


def whole_prompts(s: Scheduler, now: int) -> bool:
    """Whole prompts before tokens: a step is a batch of waiting prompts, as many as the budget holds, or decodes.

    As vLLM before its V1 engine, without chunked prefill (``vllm/core/scheduler.py``, ``_schedule_default``): the
    budget is then at least the longest context, and a request is admitted when its prompt's blocks are free.
    """
    pool = s.pool
    room, budget = pool.free, s.max_num_batched_tokens
    while s.waiting and budget and len(s.running) < s.max_num_seqs:
        head = s.waiting[0]
        cached, hit, idle = s.found(head)
        new = head.target - cached
        blocks = pool.blocks_of(head.target) - hit
        if new > budget or blocks + idle > room:
            break
        s.admit(new, blocks, now, cached, hit)
        room -= blocks + idle
        budget -= new
    return _prompts_or_tokens(s, now)


_ROUNDING = 1e-9  # of steps: looking a step too early costs nothing

#: policies that compute a prompt in one step; longer prompts are refused, as vLLM does
WHOLE_PROMPTS = frozenset({"vllm_v0"})

POLICIES: dict[str, Policy] = {
    "vllm": vllm,
    "trtllm": no_evict,
    "trtllm_max_utilization": max_utilization,
    "sglang": prefill_first,
    "vllm_v0": whole_prompts,
}


def policy_named(name: str) -> Policy:
    """The policy called ``name``.

    Raises
    ------
    SpecError
        If there is none.
    """
    if name not in POLICIES:
        raise SpecError(f"scheduling policy {name!r} is unknown; known: {', '.join(sorted(POLICIES))}")
    return POLICIES[name]
