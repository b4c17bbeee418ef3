"""Continuous batching on one rank: who waits, who runs, and what the next step works on. Has no clock of its own.

Model: iteration-level scheduling (Yu et al., "Orca", OSDI 2022) over a paged KV cache. Who runs is kept in sums
(`running_batch`); only the policies in `policies` decide who joins.
A preempted request loses its blocks and later recomputes prompt and generated tokens, unless host memory keeps them.
Left out: priorities, beam search.
Checked in: tests/test_scheduler.py and, step by step, tests/reference/sim_stepwise.py.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable

from simmoe.costs.kv_offload import HostTier
from simmoe.sim.acceptance import Acceptance
from simmoe.sim.kv_cache import BlockPool
from simmoe.sim.request import Request
from simmoe.sim.running_batch import RunningBatch

NEVER = sys.maxsize


class Scheduler(RunningBatch):
    """State of one rank. A step is `plan`, then `complete`; what was planned stands in ``chunks`` and ``decoding``.

    Parameters
    ----------
    pool : the rank's KV blocks.
    max_num_seqs, max_num_batched_tokens : most requests running, most tokens in a step.
    policy : decides who joins the next step, see `policies.POLICIES`.
    prefix_caching : whether prompts that share a head share its blocks.
    rows_per_decode : tokens of a step that each decoding request takes: its own, and drafts to verify.
    tier : host memory for blocks that leave the device; None: they are lost.
    chunks_prompts : whether prompts may take several steps; longer ones are refused if not.
    acceptance : draws what decode steps emit, and ``pool`` is one for that; None: all emit alike.
    """

    __slots__ = (
        "chunks",
        "chunks_prompts",
        "gaps",
        "horizon",
        "loaded_tokens",
        "loading",
        "max_num_batched_tokens",
        "max_num_seqs",
        "partial",
        "paused",
        "pausing",
        "policy",
        "tier",
        "waiting",
    )

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        policy: Callable[[Scheduler, int], bool],
        prefix_caching: bool = True,
        rows_per_decode: int = 1,
        tier: HostTier | None = None,
        acceptance: Acceptance | None = None,
        chunks_prompts: bool = True,
    ) -> None:
        super().__init__(
            pool,
            prefix_caching=prefix_caching,
            host_tokens=None if tier is None else tier.tokens,
            rows_per_decode=rows_per_decode,
            acceptance=acceptance,
        )
        self.chunks_prompts = chunks_prompts
        self.tier = tier
        self.loading = 0
        """Tokens that the planned step loads from host memory."""
        self.loaded_tokens = 0
        """Tokens loaded from there so far."""
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.policy = policy
        self.waiting: deque[Request] = deque()
        self.partial: Request | None = None
        """The running request whose prompt is not finished; always the newest."""
        self.chunks: list[tuple[Request, int, int]] = []
        """Prompt chunks of the planned step: request, new tokens, tokens cached before."""
        self.gaps: list[tuple[int, int]] = []
        """Inter-token gaps longer than their step (by a preemption, a move or a pause) and how many, since the last
        look. [ticks]"""
        self.horizon = NEVER
        """Steps after which the policy may decide otherwise although nothing has happened."""
        self.pausing = False
        """Whether the planned step leaves the decoding requests out (prefill first)."""
        self.paused: list[tuple[int, int]] = []
        """While decodes pause: how many had their last token when, newest last."""

    @property
    def idle(self) -> bool:
        """Nobody waits and nobody runs."""
        return not self.running and not self.waiting

    @property
    def heeds_arrivals(self) -> bool:
        """Whether a newcomer could join at the next step boundary. Behind a queue or with no seat free, none can."""
        return not self.waiting and len(self.running) < self.max_num_seqs

    def can_ever_hold(self, request: Request) -> bool:
        """Whether the request alone fits the KV cache, and a step if prompts are not chunked."""
        fits = request.input_tokens + request.output_tokens + self._beyond <= self.pool.total * self.pool.block_tokens
        return fits and (self.chunks_prompts or request.input_tokens <= self.max_num_batched_tokens)

    def plan(self, now: int) -> int:
        """Decide the next step, starting now; return for how many steps it holds (0: nothing to do)."""
        self.forget_plan()
        if not (self.waiting or self.partial or self.paused):  # nothing to decide while blocks last
            if not self.decoding:
                return 0
            step = self.step
            if steps := self.pool.steps_until_short(step, self.ends[0] - step):
                return steps
        self.horizon = NEVER
        settled = self.policy(self, now)
        return 1 if self.chunks or self.paused or not settled else self._steps_alike(self.horizon)

    def forget_plan(self) -> None:
        """The step planned is over: the next one is of those who decode, unless it is decided otherwise."""
        if self.chunks:
            self.chunks = []
        self.loading = 0
        self.pausing = False

    def _steps_alike(self, most: int) -> int:
        """Decode steps of the same requests, at most so many, until one ends or blocks are short."""
        if not self.decoding:
            return 0
        to_end = self.ends[0] - self.step
        return self.pool.steps_until_short(self.step, min(to_end, most))

    @property
    def stepping(self) -> int:
        """Requests that get a token in the planned step by decoding."""
        return 0 if self.pausing else self.decoding

    def pause(self, now: int) -> None:
        """Leave the decoding requests out of the step planned now."""
        self.pausing = True
        if not self.paused and self.decoding:
            self.paused.append((self.decoding, now))

    def found(self, request: Request) -> tuple[int, int, int]:
        """Tokens of a waiting request that need not be computed, blocks of them on the device, and idle ones it takes.

        The last are among the blocks on the device, but count as free until it holds them.
        """
        if self.prefixes is None or not request.prompt:
            return request.loaded or request.swapped, 0, 0
        request.path = self.prefixes.path(request.prompt)  # anew: what it met before may have been let go of since
        if request.loaded:
            return request.loaded, 0, 0
        hit, away, idle = self.prefixes.found(request.path, request.target)
        return max(request.swapped, (hit + away) * self.pool.block_tokens), hit, idle

    def admit(self, new: int, blocks: int, now: int, cached: int = 0, hit: int = 0, reserved: int = 0) -> None:
        """Take the head of the queue into the next step with a chunk of ``new`` tokens after ``cached`` ones.

        ``blocks`` are those it takes for them beyond the ``hit`` ones that were `found` on the device, ``reserved``
        those it takes for chunks to come.
        """
        request = self.waiting.popleft()
        if self.prefixes is not None and request.path:
            away = 0 if request.loaded or cached == request.swapped else cached // self.pool.block_tokens - hit
            request.held = self.prefixes.hold(request.path, hit, away)
            self.prefixes.hit_tokens += (hit + away) * self.pool.block_tokens
        if self.host is not None and not request.loaded:
            self.loading += cached - hit * self.pool.block_tokens
            if request.swapped:
                self.host.swap_in(self.pool.blocks_of(request.swapped))
                request.swapped = 0
        self.pool.take(blocks + reserved)
        request.reserved = reserved
        request.cached = cached
        self.enter(request, now)
        self.chunks.append((request, new, cached))

    def preempt_newest(self, now: int) -> None:
        """Take the newest request off the batch and its blocks back; it returns to the head of the queue."""
        request = next(reversed(self.running))
        self.leave(request)
        if request is self.partial:
            self.partial = None
            cached = request.cached
            self.give_back(request, self.pool.blocks_of(cached) + request.reserved)
            request.lose_cache(0, now)
        else:
            if self.paused:  # the newest decoding request is among the last to have paused
                count, now = self.paused.pop()
                if count > 1:
                    self.paused.append((count - 1, now))
            cached, part = divmod(self.stop_decoding(request), self.pool.grain)
            self.overshoot += part
            request.lose_cache(cached, now)
        if self.host is not None and self.tier is not None and self.tier.swap:
            kept, gone = self.host.swap_out(self.pool.blocks_of(cached))
            request.swapped = cached if kept else 0
            if self.prefixes is not None:
                self.prefixes.forget_all(gone)
        self.waiting.appendleft(request)

    def lose_everything(self, now: int) -> list[Request]:
        """The engine fails after a step that ended ``now``: empty the rank; return who was here, running ones first."""
        for request in reversed(self.running):
            if request.finish_step < 0:
                request.lose_cache(0, now)
                continue
            last = now
            if self.paused:
                count, last = self.paused.pop()
                if count > 1:
                    self.paused.append((count - 1, last))
            cached = self.cached(request) // self.pool.grain
            request.drawn += self.step - request.joined
            request.lose_cache(cached, last)
        for request in self.waiting:
            request.loaded = request.swapped = 0
        left = [*self.running, *self.waiting]
        for request in left:
            request.path, request.held = [], []
        self.clear()
        self.waiting.clear()
        self.partial = None
        self.chunks = []
        self.paused.clear()
        self.pausing = False
        return left

    def complete(self, steps: int, now: int) -> list[Request]:
        """Account for ``steps`` steps of the planned batch, the last ending now; return who finished, oldest first."""
        finished: list[Request] = []
        self.loaded_tokens += self.loading
        decoding = 0 if self.pausing else self.decoding
        if decoding:
            if self.paused:  # a step planned alone: the first since the pause
                self.gaps += [(now - last, count) for count, last in self.paused]
                self.paused.clear()
            self.decode(steps)
            if self.prefixes is not None:
                self.prefixes.promised = 0
        else:
            self.blocks_held = self.pool.used
        self.step += 0 if self.pausing else steps
        if self.ends and self.ends[0] == self.step:
            finished = self.end_decoding()
        for request, new, cached in self.chunks:
            request.cached = cached + new
            if self.prefixes is not None and request.path:
                self.prefixes.publish(request.path, min(request.cached, request.input_tokens), request.held)
            if request.cached < request.target:
                self.partial = request
            else:
                if request is self.partial:
                    self.partial = None
                self.prompt_done(request, now, finished)
        return finished

    def prompt_done(self, request: Request, now: int, finished: list[Request]) -> None:
        """A request's prompt is computed: a token is sampled, and it decodes on unless that was the last."""
        if request.first_token < 0:
            request.first_token = now
        else:
            self.gaps.append((now - request.last_token, 1))
        request.generated += 1
        remaining = request.output_tokens - request.generated
        if remaining == 0:
            self.give_back(request, self.pool.blocks_of(request.cached))
            self.leave(request)
            finished.append(request)
            return
        if self.pausing:
            if self.paused and self.paused[-1][1] == now:
                self.paused[-1] = (self.paused[-1][0] + 1, now)
            else:
                self.paused.append((1, now))
        self.begin_decoding(request, remaining)
