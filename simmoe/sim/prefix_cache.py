"""KV blocks kept after use, for prompts that begin like an earlier one: a tree of segments under LRU eviction.

Model: vLLM's automatic prefix caching (``vllm/v1/core/kv_cache_manager.py``; the idea: Kwon et al., SOSP 2023, and
Zheng et al., "SGLang", arXiv 2312.07104, sec. 3). Whole blocks are looked up by everything before and in them; blocks
nobody uses stay until the pool needs them, least recently freed first, a request's last block before its first.
A prompt is segments of (identity, tokens) from its start; a block that spans two belongs to the later one. At least
one token is always computed. A block counts as found once it has been computed; of the same block computed by two
requests at once the first copy is the one that is found.
With host memory behind it (`host_memory`), blocks the pool takes move there, and are found behind those on the device.
Left out: blocks of the answer found again by a next turn; finding the second copy of a block when the first is gone
(vLLM would).
Checked in tests/test_prefix_cache.py and, step by step, tests/test_sim_twin.py against explicit blocks with hashes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from simmoe.sim.host_memory import HostMemory
from simmoe.sim.kv_cache import BlockPool
from simmoe.sim.segments import Node, Run, add, split
from simmoe.specs.trace_formats import Segments

Path = list[tuple[Node, int]]
"""A prompt as segments, and how many blocks of each it has."""
Held = list[tuple[int, Node, int, int]]
"""What a request holds of the tree: at which of its blocks, and which ones of a segment, from start to stop."""


class PrefixCache:
    """What is cached beyond the requests that run.

    The pool's ``free`` counts blocks that nobody uses, cached or not. Evictions are made up for whenever somebody
    looks: blocks only leave ``free`` in between, and leave it in LRU order.

    Parameters
    ----------
    pool : the rank's blocks.
    host : where blocks go that the pool takes; None: nowhere.
    """

    __slots__ = ("_host", "_idle_blocks", "_nodes", "_pool", "hit_tokens", "idle", "promised")

    def __init__(self, pool: BlockPool, host: HostMemory | None = None) -> None:
        self._pool = pool
        self._host = host
        self._nodes: dict[tuple[object, ...], Node] = {}
        self.idle: OrderedDict[Run, None] = OrderedDict()
        """Runs that nobody holds, least recently freed first; free blocks beyond them were free before all of them."""
        self._idle_blocks = 0
        self.promised = 0
        """Free blocks that the step being planned takes before anybody who joins it."""
        self.hit_tokens = 0
        """Prompt tokens not computed again. [tokens]"""

    def path(self, segments: Segments) -> Path:
        """Where a prompt is from its start on, made where it is new; segments without a block go with the next."""
        self._evict()  # first: a node that is let go of after this would not be the one the next prompt finds
        path: Path = []
        tokens = end = 0
        parent: Node | None = None
        key: tuple[object, ...] = (None,)
        for identity, length in segments:
            tokens += length
            blocks = tokens // self._pool.block_tokens - end
            if not blocks:
                key += (identity, length)
                continue
            end += blocks
            key += (identity,)  # without its length: others may share its first blocks and go on, or stop before
            node = self._nodes.get(key)
            if node is None:
                node = self._nodes[key] = Node(key, parent)
                if parent is not None:
                    parent.children += 1
            path.append((node, blocks))
            parent, key = node, (node, length)
        return path

    def found(self, path: Path, target: int) -> tuple[int, int, int]:
        """Blocks of a prompt of ``target`` tokens that need not be computed, and how many of them are idle.

        The former on the device and, after them, in host memory.
        """
        self._evict()
        left = (target - 1) // self._pool.block_tokens
        hit = away = idle = 0
        for node, blocks in path:
            at, most = 0, min(blocks, left)
            for run in node.here if not away else ():
                if run.start != at or at >= most:
                    break
                end = min(run.stop, most)
                hit += end - at
                if not run.users:
                    idle += end - at
                at = end
            for run in node.away:
                if run.start > at or at >= most:
                    break
                if run.start == at:
                    end = min(run.stop, most)
                    away += end - at
                    at = end
            left -= at
            if at < blocks:
                break
        return hit, away, idle

    def hold(self, path: Path, hit: int, loaded: int = 0) -> Held:
        """A request uses a prompt from now on: its first ``hit`` blocks on the device, which are no longer free.

        The ``loaded`` blocks after them come from host memory into blocks that the request takes, and are the prompt's
        from now on.
        """
        self._evict()
        held: Held = []
        start = 0
        for node, blocks in path:
            node.users += 1
            if here := min(hit, blocks):
                self._hold_here(node, here)
                held.append((start, node, 0, here))
                hit -= here
            if loaded and not hit and (back := min(loaded, blocks - here)):
                self._own(node, here, here + back)
                held.append((start + here, node, here, here + back))
                loaded -= back
            start += blocks
        return held

    def _hold_here(self, node: Node, blocks: int) -> None:
        """One more request holds the first blocks of a segment."""
        index = at = 0
        while at < blocks:
            run = node.here[index]
            if part := max(0, run.stop - blocks):
                run = split(node.here, index, run.blocks - part)
            elif not run.users:
                del self.idle[run]
            if not run.users:
                self._idle_blocks -= run.blocks
                self._pool.take(run.blocks)
            run.users += 1
            at = run.stop
            index += 1

    def _own(self, node: Node, start: int, stop: int) -> None:
        """Blocks of a request can be found from now on."""
        if self._host is not None and node.away:
            self._host.give(node, start, stop)
        add(node.here, Run(node, start, stop, 1))

    def publish(self, path: Path, computed_tokens: int, held: Held) -> None:
        """Blocks computed so far can be found; those that were the request's own are added to what it holds."""
        self._evict()
        computed = computed_tokens // self._pool.block_tokens
        at = 0
        for node, blocks in path:
            here = min(blocks, computed - at)
            for start, stop in node.gaps(here):
                self._own(node, start, stop)
                held.append((at + start, node, start, stop))
            if here < blocks:
                break
            at += blocks

    def release(self, path: Path, held: Held, blocks: int) -> None:
        """A request gives back its ``blocks``, last first; what nobody else holds of the tree becomes idle."""
        end = blocks
        self._evict()
        held.sort(reverse=True, key=lambda part: part[0])
        for at, node, start, stop in held:
            self._free(end - at - (stop - start))
            for run in node.here[::-1]:
                if run.start >= start and run.stop <= stop:
                    run.users -= 1
                    if not run.users:
                        self._rest(run)
            end = at
        self._free(end)
        for node, _ in reversed(path):
            node.users -= 1
            self._forget(node)

    def free(self, blocks: int) -> None:
        """A request of which nothing can be found gives back its blocks."""
        self._evict()
        self._free(blocks)

    def _free(self, blocks: int) -> None:
        """Blocks that cannot be found become free, behind those that can; before all of them if there are none."""
        self._pool.give_back(blocks)
        if blocks and self.idle:
            self._idle_blocks += blocks
            newest = next(reversed(self.idle))
            if newest.node is None:
                newest.stop += blocks
            else:
                self.idle[Run(None, 0, blocks)] = None

    def _rest(self, run: Run) -> None:
        """Nobody holds a run any more; with the blocks behind it, if these were freed just before, it is one."""
        self._pool.give_back(run.blocks)
        self._idle_blocks += run.blocks
        newest = next(reversed(self.idle), None)
        if newest is not None and newest.node is run.node and newest.start == run.stop:
            newest.start = run.start
            assert run.node is not None
            run.node.here.remove(run)
        else:
            self.idle[run] = None

    def _evict(self) -> None:
        """Let go of what the pool has handed out since the last look, least recently freed first."""
        gone = self._idle_blocks + self.promised - self._pool.free
        while gone > 0 and self.idle:
            run = next(iter(self.idle))
            lost = min(run.blocks, gone)
            gone -= lost
            self._idle_blocks -= lost
            run.stop -= lost
            node = run.node
            if not run.blocks:
                del self.idle[run]
                if node is not None:
                    node.here.remove(run)
            if node is not None:
                if self._host is not None:
                    self.forget_all(self._host.put(node, run.stop, run.stop + lost))
                self._forget(node)

    def forget_all(self, nodes: Iterable[Node]) -> None:
        """These may have nothing left anywhere."""
        for node in nodes:
            self._forget(node)

    def _forget(self, node: Node | None) -> None:
        while node is not None and not (node.users or node.here or node.away or node.children):
            if self._nodes.get(node.key) is not node:
                return  # forgotten before
            del self._nodes[node.key]
            node = node.parent
            if node is not None:
                node.children -= 1
