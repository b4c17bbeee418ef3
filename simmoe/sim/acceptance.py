"""Accepted drafts drawn step by step: what a decode step emits, and the blocks it needs, known once a request decodes.

Model: in each decode step a request keeps the first drafts up to the first that is rejected, independently of other
steps and requests (`specs.speculative.Speculative.accepted`). Every request draws from a stream of its own, so that
what it emits does not depend on who runs beside it, or where. The last step emits what is left.
Steps then differ one from the next, so each is an event; what they emit together is summed when a request joins, so a
step still costs no loop over requests. Slots of rejected drafts are not counted, as with the mean.
Checked in: tests/test_speculation.py, step by step in tests/test_sim_twin.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from simmoe.sim.kv_cache import BlockPool
from simmoe.specs.speculative import Speculative


class Acceptance:
    """Draws of all requests.

    Parameters
    ----------
    key : of the run's streams, below 2**64.
    """

    def __init__(self, speculative: Speculative, key: int) -> None:
        self._rejected = 1.0 - np.array(speculative.accepted)
        self._key = key

    def tokens(self, request: int, steps: int) -> list[int]:
        """Tokens that the first ``steps`` decode steps of a request emit, if they are not its last. [tokens]"""
        rng = np.random.Generator(np.random.Philox(key=self._key, counter=[0, 0, 0, request]))
        accepted = np.searchsorted(self._rejected, rng.random(steps), side="right")
        return [1 + n for n in accepted.tolist()]


def cut(tokens: Sequence[int], wanted: int) -> list[int]:
    """The first steps, until ``wanted`` tokens are emitted, the last of which emits what is left."""
    found = []
    for each in tokens:
        found.append(min(each, wanted))
        wanted -= found[-1]
        if not wanted:
            break
    return found


class DrawnPool(BlockPool):
    """A pool whose decoding requests write as many tokens a step as were drawn. Steps are counted one by one.

    ``need`` is of a step, and known for every step to come of those who decode.
    """

    __slots__ = ("_blocks", "_tokens")

    def __init__(self, capacity_tokens: int, block_tokens: int) -> None:
        super().__init__(capacity_tokens, block_tokens)
        self._blocks: defaultdict[int, int] = defaultdict(int)
        self._tokens: defaultdict[int, int] = defaultdict(int)

    def clear(self) -> None:
        """Drop everything: all blocks are free."""
        super().clear()
        self._blocks.clear()
        self._tokens.clear()

    def need(self, step: int, steps: int = 1) -> int:
        """Blocks the decoding requests take in a step."""
        assert steps == 1
        return self._blocks.get(step, 0)

    def emitted(self, step: int) -> int:
        """Tokens the decoding requests emit in a step. [tokens]"""
        return self._tokens.get(step, 0)

    def passed(self, step: int) -> None:
        """A step is over."""
        self._tokens.pop(step, None)
        self._blocks.pop(step, None)

    def steps_until_short(self, step: int, limit: int) -> int:  # noqa: ARG002 - as for a pool of equal steps
        """At most one, for the next may differ."""
        return int(self.need(step) <= self.free)

    def add(self, cached: int, step: int, tokens: Sequence[int], sign: int = 1) -> None:
        """A request with ``cached`` tokens emits ``tokens`` in the steps from ``step`` on; sign -1 takes it back."""
        self.decoding += sign
        for each in tokens:
            self._tokens[step] += sign * each
            grown = self.blocks_of(cached + each) - self.blocks_of(cached)
            if grown:
                self._blocks[step] += sign * grown
            cached += each
            step += 1
