"""KV blocks of one rank in host memory: what the device's prefix cache let go of, and preempted requests.

Model: an exclusive second tier under LRU, as SGLang's HiCache with write-back (``--hicache-write-policy write_back``):
a block moves there when the device evicts it and back when a prompt finds it. Copies out run beside the steps and take
no time here (the link's other direction is free); loads are in the step that admits the prompt.
A swapped request's blocks stay until it comes back or ends.
Left out: write-through copies (vLLM's offloading connector, which holds blocks twice), disk and remote tiers, a choice
to compute what would load more slowly.
Law kept by every method: blocks of prompts + blocks swapped out <= total. Checked in tests/test_sim_twin.py against
explicit blocks, tests/test_host_memory.py.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol


class Kept(Protocol):
    """A part of a prompt whose last ``host`` blocks are in host memory."""

    host: int


class HostMemory:
    """Blocks by who owns them, least recently moved here first.

    Parameters
    ----------
    total : blocks it holds.
    """

    __slots__ = ("_owners", "swapped", "total", "used")

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = 0
        """Blocks of prompts."""
        self.swapped = 0
        """Blocks of preempted requests."""
        self._owners: OrderedDict[Kept, None] = OrderedDict()

    def put(self, owner: Kept, blocks: int) -> list[Kept]:
        """Take ``blocks`` the device let go of; return owners that have none left to make room."""
        owner.host += blocks
        self.used += blocks
        self._owners[owner] = None
        self._owners.move_to_end(owner)
        return self._shrink()

    def give(self, owner: Kept, blocks: int) -> None:
        """Blocks go back to the device, or are there again."""
        owner.host -= blocks
        self.used -= blocks
        if not owner.host:
            del self._owners[owner]

    def swap_out(self, blocks: int) -> tuple[bool, list[Kept]]:
        """Whether ``blocks`` of a preempted request fit beside the others'; prompts make way and are returned."""
        if self.swapped + blocks > self.total:
            return False, []
        self.swapped += blocks
        return True, self._shrink()

    def swap_in(self, blocks: int) -> None:
        """A preempted request is back, or gone."""
        self.swapped -= blocks

    def _shrink(self) -> list[Kept]:
        gone = []
        while (over := self.used + self.swapped - self.total) > 0:
            owner = next(iter(self._owners))
            lost = min(over, owner.host)
            self.give(owner, lost)
            if not owner.host:
                gone.append(owner)
        return gone
