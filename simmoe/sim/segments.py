"""Segments of prompts and which of their blocks are where: what `prefix_cache` and `host_memory` hold in common.

A segment's blocks are numbered from its start. Those in one place are kept as runs: neighbours that the same requests
hold, so that a prompt is a run or two, however long.
"""

from __future__ import annotations

from bisect import insort


class Run:
    """Blocks ``start`` to ``stop`` of a segment (None: of no prompt), and how many requests hold them."""

    __slots__ = ("node", "start", "stop", "users")

    def __init__(self, node: Node | None, start: int, stop: int, users: int = 0) -> None:
        self.node = node
        self.start = start
        self.stop = stop
        self.users = users

    def __lt__(self, other: Run) -> bool:
        return self.start < other.start

    @property
    def blocks(self) -> int:
        """How many they are."""
        return self.stop - self.start


class Node:
    """One segment behind one head: the runs of its blocks on the device and in host memory, in order, none twice."""

    __slots__ = ("away", "children", "here", "key", "parent", "users")

    def __init__(self, key: tuple[object, ...], parent: Node | None) -> None:
        self.key = key
        self.parent = parent
        self.children = 0
        """Segments known behind it."""
        self.here: list[Run] = []
        self.away: list[Run] = []
        self.users = 0
        """Requests whose prompt it is part of."""

    def gaps(self, stop: int) -> list[tuple[int, int]]:
        """What is not on the device of its blocks before ``stop``."""
        found: list[tuple[int, int]] = []
        at = 0
        for run in self.here:
            if at >= stop:
                return found
            if run.start > at:
                found.append((at, min(run.start, stop)))
            at = run.stop
        if at < stop:
            found.append((at, stop))
        return found


def add(runs: list[Run], run: Run) -> None:
    """Put a run in its place."""
    if runs and runs[-1].start > run.start:
        insort(runs, run)
    else:
        runs.append(run)


def split(runs: list[Run], index: int, blocks: int) -> Run:
    """The first ``blocks`` of a run, fewer than all, as a run of their own before it."""
    rest = runs[index]
    head = Run(rest.node, rest.start, rest.start + blocks, rest.users)
    rest.start = head.stop
    runs.insert(index, head)
    return head
