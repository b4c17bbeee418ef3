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

from simmoe.sim.segments import Node, Run, add


class HostMemory:
    """Blocks of prompts, least recently moved here first, and a count of others.

    Parameters
    ----------
    total : blocks it holds.
    """

    __slots__ = ("_runs", "swapped", "total", "used")

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = 0
        """Blocks of prompts."""
        self.swapped = 0
        """Blocks of preempted requests."""
        self._runs: OrderedDict[Run, None] = OrderedDict()

    def put(self, node: Node, start: int, stop: int) -> list[Node]:
        """Take blocks the device let go of, the last first; return segments that lost some to make room."""
        newest = next(reversed(self._runs), None)
        if newest is not None and newest.node is node and newest.start == stop:
            newest.start = start
        else:
            run = Run(node, start, stop)
            self._runs[run] = None
            add(node.away, run)
        self.used += stop - start
        return self._shrink()

    def give(self, node: Node, start: int, stop: int) -> None:
        """Blocks ``start`` to ``stop`` of a segment are on the device again; those that are here go.

        No run here begins before ``start`` and reaches it: what is before is on the device, or was looked up as well.
        """
        kept = []
        for run in node.away:
            if run.stop <= start or run.start >= stop:
                kept.append(run)
                continue
            self.used -= min(run.stop, stop) - run.start
            if run.stop > stop:
                run.start = stop
                kept.append(run)
            else:
                del self._runs[run]
        node.away = kept

    def swap_out(self, blocks: int) -> tuple[bool, list[Node]]:
        """Whether ``blocks`` of a preempted request fit beside the others'; segments that made way are returned."""
        if self.swapped + blocks > self.total:
            return False, []
        self.swapped += blocks
        return True, self._shrink()

    def swap_in(self, blocks: int) -> None:
        """A preempted request is back, or gone."""
        self.swapped -= blocks

    def _shrink(self) -> list[Node]:
        lessened = []
        while (over := self.used + self.swapped - self.total) > 0:
            run = next(iter(self._runs))
            assert run.node is not None
            lost = min(over, run.blocks)
            run.stop -= lost
            self.used -= lost
            if not run.blocks:
                del self._runs[run]
                run.node.away.remove(run)
            lessened.append(run.node)
        return lessened
