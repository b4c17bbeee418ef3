"""Who runs on one rank, and who of them decodes, kept in sums, so that a step costs O(1) and an end O(log requests).

The sums: how many decode, their context, the step at which each will finish, the steps at which they need a block
(`kv_cache`), and what all would hold at their ends. A request's own state is brought up to date when it leaves them.
With speculative decoding every decode step emits the mean acceptance length: a request of N tokens takes
ceil((N - 1) / length) steps after its prompt, and its context grows by as much in each, counted in grains (`kv_cache`);
or what was drawn for it (`acceptance`), then steps are planned one by one.
Checked in: tests/test_scheduler.py and, step by step, tests/reference/sim_stepwise.py.
"""

from __future__ import annotations

from heapq import heappop, heappush

from simmoe.sim.acceptance import Acceptance, DrawnPool, cut
from simmoe.sim.host_memory import HostMemory
from simmoe.sim.kv_cache import BlockPool
from simmoe.sim.prefix_cache import PrefixCache
from simmoe.sim.request import Request


class RunningBatch:
    """The requests that have been admitted, and the blocks they hold.

    Parameters
    ----------
    pool : the rank's KV blocks.
    prefix_caching : whether prompts that share a head share its blocks.
    host_tokens : room in host memory for blocks that leave the device; None: they are lost. [tokens]
    rows_per_decode : tokens of a step that each decoding request takes: its own, and drafts to verify.
    acceptance : draws what decode steps emit, and ``pool`` is one for that; None: all emit alike.
    """

    __slots__ = (
        "_beyond",
        "_ending",
        "acceptance",
        "blocks_held",
        "context",
        "decoding",
        "drawn_pool",
        "ends",
        "final_blocks",
        "final_tokens",
        "host",
        "overshoot",
        "pool",
        "prefixes",
        "running",
        "step",
        "stride",
        "width",
    )

    def __init__(
        self,
        pool: BlockPool,
        *,
        prefix_caching: bool,
        host_tokens: int | None,
        rows_per_decode: int,
        acceptance: Acceptance | None,
    ) -> None:
        self.pool = pool
        self.acceptance = acceptance
        self.drawn_pool = pool if isinstance(pool, DrawnPool) else None
        self.width = rows_per_decode
        self.stride = pool.stride
        self._beyond = -1 - (1 - pool.stride) // pool.grain
        """Tokens cached at a request's end beyond its own: the last is sampled, but the last step may overshoot."""
        self.host = None if host_tokens is None else HostMemory(host_tokens // pool.block_tokens)
        self.prefixes = PrefixCache(pool, self.host) if prefix_caching else None
        self.running: dict[Request, None] = {}
        """In order of admission; the newest is preempted first."""
        self.final_tokens = 0
        """Tokens that all running requests will have cached at their ends."""
        self.final_blocks = 0
        """Blocks that they would hold if all were at their ends."""
        self.decoding = 0
        self.context = 0
        """Tokens in the KV cache of all decoding requests. [grains]"""
        self.step = 0
        self.blocks_held: float = 0
        """KV blocks held during the last steps, mean of their start and end."""
        self.overshoot = 0
        """What the mean acceptance length emitted beyond requests' ends, since the last look. [grains]"""
        self._ending: dict[int, list[Request]] = {}
        self.ends: list[int] = []
        """Step counts at which decoding requests have their last token, a heap."""

    def most_blocks(self, request: Request) -> int:
        """Blocks at a request's end."""
        return self.pool.blocks_of(request.input_tokens + request.output_tokens + self._beyond)

    def enter(self, request: Request, now: int) -> None:
        """Count a request among those running."""
        if request.admitted < 0:
            request.admitted = now
        self.running[request] = None
        self.final_tokens += request.input_tokens + request.output_tokens - 1
        request.final_blocks = final = self.most_blocks(request)
        self.final_blocks += final

    def leave(self, request: Request) -> None:
        """Take a request out of those running."""
        del self.running[request]
        self.final_tokens -= request.input_tokens + request.output_tokens - 1
        self.final_blocks -= request.final_blocks

    def give_back(self, request: Request, blocks: int) -> None:
        """Give back ``blocks``; what others can find of them stays in the cache."""
        if self.prefixes is not None and request.path:
            self.prefixes.release(request.path, request.held, blocks)
            request.path, request.held = [], []
        elif self.prefixes is not None and self.prefixes.idle:
            self.prefixes.free(blocks)
        else:
            self.pool.give_back(blocks)

    def begin_decoding(self, request: Request, remaining: int) -> None:
        """Add a request whose prompt is computed and which has so many tokens to come to the sums."""
        pool = self.pool
        cached = request.cached * pool.grain
        if self.drawn_pool is None:
            pool.join(cached, self.step)
            steps = -(-remaining * pool.grain // pool.stride)
        else:
            steps = self._draw(request, remaining)
            self.drawn_pool.add(cached, self.step, request.tokens)
        self.decoding += 1
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

    def decode(self, steps: int) -> None:
        """Let all who decode do so many steps: their blocks and what they have cached."""
        pool = self.pool
        grown = pool.grow(self.step, steps)
        self.blocks_held = pool.total - pool.free - grown / 2
        if self.drawn_pool is None:
            self.context += self.decoding * steps * self.stride
        else:
            self.context += self.drawn_pool.emitted(self.step)
            self.drawn_pool.passed(self.step)

    def end_decoding(self) -> list[Request]:
        """Let go of those who have their last token by decoding in the step before the next; return them."""
        step = heappop(self.ends)
        finished = []
        for request in self._ending.pop(step):
            if request.finish_step == step:  # else it was preempted since
                self.overshoot += self.stop_decoding(request)
                self.overshoot -= (request.input_tokens + request.output_tokens - 1) * self.pool.grain
                request.finish_step = -1  # it may stand here twice, if it came back in time
                self.leave(request)
                finished.append(request)
        return finished

    def stop_decoding(self, request: Request) -> int:
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
        self.give_back(request, -(-cached // pool.period))
        self.decoding -= 1
        self.context -= cached
        return cached

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

    def clear(self) -> None:
        """Nobody runs any more: all blocks are free, and nothing is known of any."""
        if self.host is not None:
            self.host = HostMemory(self.host.total)
        if self.prefixes is not None:
            hit_tokens = self.prefixes.hit_tokens
            self.prefixes = PrefixCache(self.pool, self.host)
            self.prefixes.hit_tokens = hit_tokens
        self.running.clear()
        self.final_tokens = self.final_blocks = 0
        self.decoding = self.context = 0
        self._ending.clear()
        self.ends.clear()
        self.pool.clear()
