"""Continuous batching on one rank: who waits, who runs, and what the next step works on. Has no clock of its own.

Model: iteration-level scheduling (Yu et al., "Orca", OSDI 2022) over a paged KV cache. Decoding requests are kept as
sums (their number, their context, the step at which each will finish, the steps at which they need a block), so a step
costs O(1) and a completion O(log requests); only the policies in `policies` decide who joins.
A preempted request loses its blocks and later recomputes prompt and generated tokens, unless host memory keeps them.
With speculative decoding every decode step emits the mean acceptance length: a request of N tokens takes
ceil((N - 1) / length) steps after its prompt, and its context grows by as much in each, counted in grains (`kv_cache`);
or what was drawn for it (`acceptance`), then steps are planned one by one.
Left out: priorities, beam search.
Checked in: tests/test_scheduler.py and, step by step, tests/reference/sim_stepwise.py.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush

from simmoe.costs.kv_offload import HostTier
from simmoe.sim.acceptance import Acceptance, DrawnPool, cut
from simmoe.sim.host_memory import HostMemory
from simmoe.sim.kv_cache import BlockPool
from simmoe.sim.prefix_cache import PrefixCache
from simmoe.sim.request import Request

NEVER = sys.maxsize


class Scheduler:
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
        "_beyond",
        "_ending",
        "acceptance",
        "blocks_held",
        "chunks",
        "chunks_prompts",
        "context",
        "decoding",
        "drawn_pool",
        "ends",
        "final_blocks",
        "final_tokens",
        "gaps",
        "horizon",
        "host",
        "loaded_tokens",
        "loading",
        "max_num_batched_tokens",
        "max_num_seqs",
        "overshoot",
        "partial",
        "paused",
        "pausing",
        "policy",
        "pool",
        "prefixes",
        "running",
        "step",
        "stride",
        "tier",
        "waiting",
        "width",
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
        self.chunks_prompts = chunks_prompts
        self.pool = pool
        self.acceptance = acceptance
        self.drawn_pool = pool if isinstance(pool, DrawnPool) else None
        self.width = rows_per_decode
        self.stride = pool.stride
        self._beyond = -1 - (1 - pool.stride) // pool.grain
        """Tokens cached at a request's end beyond its own: the last is sampled, but the last step may overshoot."""
        self.tier = tier
        self.host = None if tier is None else HostMemory(tier.tokens // pool.block_tokens)
        self.prefixes = PrefixCache(pool, self.host) if prefix_caching else None
        self.loading = 0
        """Tokens that the planned step loads from host memory."""
        self.loaded_tokens = 0
        """Tokens loaded from there so far."""
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.policy = policy
        self.waiting: deque[Request] = deque()
        self.running: dict[Request, None] = {}
        """In order of admission; the newest is preempted first."""
        self.final_tokens = 0
        """Tokens that all running requests will have cached at their ends."""
        self.final_blocks = 0
        """Blocks that they would hold if all were at their ends."""
        self.partial: Request | None = None
        """The running request whose prompt is not finished; always the newest."""
        self.decoding = 0
        self.context = 0
        """Tokens in the KV cache of all decoding requests. [grains]"""
        self.step = 0
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
        self.blocks_held: float = 0
        """KV blocks held during the last steps, mean of their start and end."""
        self.overshoot = 0
        """What the mean acceptance length emitted beyond requests' ends, since the last look. [grains]"""
        self._ending: dict[int, list[Request]] = {}
        self.ends: list[int] = []
        """Step counts at which decoding requests have their last token, a heap."""

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

    def most_blocks(self, request: Request) -> int:
        """Blocks at a request's end."""
        return self.pool.blocks_of(request.input_tokens + request.output_tokens + self._beyond)

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

    def enter(self, request: Request, now: int) -> None:
        """Count a request among those running."""
        if request.admitted < 0:
            request.admitted = now
        self.running[request] = None
        self.final_tokens += request.input_tokens + request.output_tokens - 1
        request.final_blocks = final = self.most_blocks(request)
        self.final_blocks += final

    def preempt_newest(self, now: int) -> None:
        """Take the newest request off the batch and its blocks back; it returns to the head of the queue."""
        request = next(reversed(self.running))
        self._leave(request)
        if request is self.partial:
            self.partial = None
            cached = request.cached
            self._free(request, self.pool.blocks_of(cached) + request.reserved)
            request.lose_cache(0, now)
        else:
            if self.paused:  # the newest decoding request is among the last to have paused
                count, now = self.paused.pop()
                if count > 1:
                    self.paused.append((count - 1, now))
            cached, part = divmod(self._stop_decoding(request), self.pool.grain)
            self.overshoot += part
            request.lose_cache(cached, now)
        if self.host is not None and self.tier is not None and self.tier.swap:
            kept, gone = self.host.swap_out(self.pool.blocks_of(cached))
            request.swapped = cached if kept else 0
            if self.prefixes is not None:
                self.prefixes.forget_all(gone)
        self.waiting.appendleft(request)

    def _leave(self, request: Request) -> None:
        """Take a request out of those running."""
        del self.running[request]
        self.final_tokens -= request.input_tokens + request.output_tokens - 1
        self.final_blocks -= request.final_blocks

    def _free(self, request: Request, blocks: int) -> None:
        """Give back ``blocks``; what others can find of them stays in the cache."""
        if self.prefixes is not None and request.path:
            self.prefixes.release(request.path, request.held, blocks)
            request.path, request.held = [], []
        elif self.prefixes is not None and self.prefixes.idle:
            self.prefixes.free(blocks)
        else:
            self.pool.give_back(blocks)

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
        if self.host is not None:
            self.host = HostMemory(self.host.total)
        if self.prefixes is not None:
            hit_tokens = self.prefixes.hit_tokens
            self.prefixes = PrefixCache(self.pool, self.host)
            self.prefixes.hit_tokens = hit_tokens
        self.running.clear()
        self.final_tokens = self.final_blocks = 0
        self.waiting.clear()
        self.partial = None
        self.decoding = self.context = 0
        self.chunks = []
        self.paused.clear()
        self.pausing = False
        self._ending.clear()
        self.ends.clear()
        self.pool.clear()
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
            pool = self.pool
            grown = pool.grow(self.step, steps)
            if self.prefixes is not None:
                self.prefixes.promised = 0
            self.blocks_held = pool.total - pool.free - grown / 2
            if self.drawn_pool is None:
                self.context += decoding * steps * self.stride
            else:
                self.context += self.drawn_pool.emitted(self.step)
                self.drawn_pool.passed(self.step)
        else:
            self.blocks_held = self.pool.used
        self.step = step = self.step + (0 if self.pausing else steps)
        if self.ends and self.ends[0] == step:
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

    def end_decoding(self) -> list[Request]:
        """Let go of those who have their last token by decoding in the step before the next; return them."""
        step = heappop(self.ends)
        finished = []
        for request in self._ending.pop(step):
            if request.finish_step == step:  # else it was preempted since
                self.overshoot += self._stop_decoding(request)
                self.overshoot -= (request.input_tokens + request.output_tokens - 1) * self.pool.grain
                request.finish_step = -1  # it may stand here twice, if it came back in time
                self._leave(request)
                finished.append(request)
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
            self._free(request, self.pool.blocks_of(request.cached))
            self._leave(request)
            finished.append(request)
            return
        pool = self.pool
        cached = request.cached * pool.grain
        if self.drawn_pool is None:
            pool.join(cached, self.step)
            steps = -(-remaining * pool.grain // pool.stride)
        else:
            steps = self._draw(request, remaining)
            self.drawn_pool.add(cached, self.step, request.tokens)
        self.decoding += 1
        if self.pausing:
            if self.paused and self.paused[-1][1] == now:
                self.paused[-1] = (self.paused[-1][0] + 1, now)
            else:
                self.paused.append((1, now))
        self.context += cached
        request.joined = self.step
        request.finish_step = finish = self.step + steps
        together = self._ending.get(finish)
        if together is None:
            self._ending[finish] = [request]
            heappush(self.ends, finish)
        else:
            together.append(request)

    def _draw(self, request: Request, remaining: int) -> int:
        """Draw what a request's coming decode steps emit; return how many there are."""
        assert self.acceptance is not None
        tokens = self.acceptance.tokens(request.index, request.drawn + remaining)
        request.tokens = cut(tokens[request.drawn :], remaining)
        return len(request.tokens)

    def cached(self, request: Request) -> int:
        """What a decoding request has in the KV cache. [grains]"""
        steps = self.step - request.joined
        grown = sum(request.tokens[:steps]) if self.drawn_pool is not None else steps * self.stride
        return request.cached * self.pool.grain + grown

    def growth(self, request: Request, steps: int) -> int:
        """What a decoding request's next ``steps`` planned steps add to that. [grains]"""
        if self.drawn_pool is not None:
            done = self.step - request.joined
            return sum(request.tokens[done : done + steps])
        return steps * self.stride

    def accepted(self, decoding: int, steps: int) -> int:
        """Drafts accepted by ``decoding`` requests in the planned steps. [grains]"""
        if self.drawn_pool is not None:
            return self.drawn_pool.emitted(self.step) - decoding if decoding else 0
        return decoding * steps * (self.stride - self.pool.grain)

    def _stop_decoding(self, request: Request) -> int:
        """Remove a decoding request from the sums; return what it had cached. [grains]"""
        pool = self.pool
        if self.drawn_pool is None:
            cached = request.cached * pool.grain + (self.step - request.joined) * self.stride
            pool.leave(cached, self.step, give_back=False)
        else:
            cached = self.cached(request)
            steps = self.step - request.joined
            self.drawn_pool.add(cached, self.step, request.tokens[steps:], sign=-1)
            request.drawn += steps
        self._free(request, -(-cached // pool.period))
        self.decoding -= 1
        self.context -= cached
        return cached
