"""KV-cache block pool of one rank: a count of free blocks, and who will need the next one when.

Model: paged KV cache (Kwon et al., "Efficient Memory Management for LLM Serving with PagedAttention", SOSP 2023):
a request of s cached tokens holds ceil(s / block) blocks. Every decoding request writes one token a step, so it needs a
block each ``block`` steps, at steps of one residue class; keeping only how many requests stand in each class,
the blocks taken by K decode steps of the whole batch cost O(block), not O(requests * K).
Where a step writes several tokens on average (speculative decoding), positions are counted in grains, fractions of a
token, so that a step advances by a whole number of them (``stride``) and the classes are as many as a block has grains.
Left out: block identity (fragmentation inside a last block is counted, placement is not); see `prefix_cache`.
Law kept by every method: used + free = total. Checked in: tests/test_kv_cache.py, against explicit per-request blocks.
"""

from __future__ import annotations

from fractions import Fraction

_ONE = Fraction(1)


class BlockPool:
    """Free blocks, and the decoding requests by the step (modulo block size) at which they need one more.

    Parameters
    ----------
    capacity_tokens : room for KV entries; the last partial block is lost. [tokens]
    block_tokens : tokens per block. [tokens]
    per_step : tokens that a decoding request writes a step. [tokens]
    """

    __slots__ = ("block_tokens", "decoding", "due", "free", "grain", "period", "stride", "total")

    def __init__(self, capacity_tokens: int, block_tokens: int, per_step: Fraction = _ONE) -> None:
        self.stride, self.grain = per_step.numerator, per_step.denominator
        self.period = block_tokens * self.grain
        self.block_tokens = block_tokens
        self.total = capacity_tokens // block_tokens
        self.free = self.total
        self.due = [0] * (2 * self.period)
        """Decoding requests by class, all classes twice in a row: a stretch that wraps around is a slice too."""
        self.decoding = 0

    @property
    def used(self) -> int:
        """Blocks held by requests."""
        return self.total - self.free

    def blocks_of(self, tokens: int) -> int:
        """Blocks that hold ``tokens`` tokens."""
        return -(-tokens // self.block_tokens)

    def take(self, blocks: int) -> None:
        """Hand out blocks; the caller has looked at `free`."""
        assert 0 <= blocks <= self.free, (blocks, self.free)
        self.free -= blocks

    def give_back(self, blocks: int) -> None:
        """Return blocks."""
        self.free += blocks
        assert self.free <= self.total, (self.free, self.total)

    def clear(self) -> None:
        """Drop everything: all blocks are free."""
        self.free = self.total
        self.due = [0] * (2 * self.period)
        self.decoding = 0

    def join(self, cached: int, step: int) -> None:
        """A request with ``cached`` grains (without speculation: tokens) in the cache decodes from ``step`` on."""
        self._count((step * self.stride - cached) % self.period, 1)

    def leave(self, cached: int, step: int, *, give_back: bool = True) -> None:
        """A decoding request that holds ``cached`` grains before ``step`` stops; its blocks come back, now or later."""
        self._count((step * self.stride - cached) % self.period, -1)
        if give_back:
            self.give_back(-(-cached // self.period))

    def _count(self, due: int, requests: int) -> None:
        self.due[due] += requests
        self.due[due + self.period] += requests
        self.decoding += requests

    def need(self, step: int, steps: int = 1) -> int:
        """Blocks the decoding requests take in ``steps`` steps from ``step`` on."""
        if steps == self.stride == 1:
            return self.due[step % self.period]
        cycles, rest = divmod(steps * self.stride, self.period)
        start = step * self.stride % self.period
        return cycles * self.decoding + sum(self.due[start : start + rest])

    def grow(self, step: int, steps: int) -> int:
        """Hand out what `need` says, and say it."""
        need = self.need(step, steps)
        assert need <= self.free, (need, self.free)
        self.free -= need
        return need

    def steps_until_short(self, step: int, limit: int) -> int:
        """Largest number of decode steps, at most ``limit``, whose blocks are free now."""
        if self.free >= self.decoding * -(-limit * self.stride // self.period) or self.need(step, limit) <= self.free:
            return limit
        cycles, left = divmod(self.free, self.decoding)
        start, grains = step * self.stride, cycles * self.period
        while (more := self.due[(start + grains) % self.period]) <= left:
            left -= more
            grains += 1
        return grains // self.stride
