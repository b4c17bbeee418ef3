"""KV blocks kept after use, for prompts that begin like an earlier one: a tree of segments under LRU eviction.

Model: vLLM's automatic prefix caching (``vllm/v1/core/kv_cache_manager.py``; the idea: Kwon et al., SOSP 2023, and
Zheng et al., "SGLang", arXiv 2312.07104, sec. 3). Whole blocks are looked up by everything before and in them; blocks
nobody uses stay until the pool needs them, least recently freed first, a request's last block before its first. So what
is left of a prompt is always a head of it, and a tree of segments with the blocks left of each says everything.
A prompt is segments of (identity, tokens) from its start; a block that spans two belongs to the later one. At least
one token is always computed. A block counts as found once it has been computed.
With host memory behind it (`host_memory`), blocks the pool takes move there, from the end of a segment on, so that it
holds what follows the blocks left on the device.
Left out: blocks of the answer found again by a next turn. Held longer than in the engine: the end of a segment that
one request computed, while another uses its beginning and computes the rest itself.
Checked in tests/test_prefix_cache.py and, with host memory, tests/test_sim_twin.py against explicit blocks with hashes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from simmoe.sim.host_memory import HostMemory, Kept
from simmoe.sim.kv_cache import BlockPool
from simmoe.specs.traces import Segments


class Node:
    """One segment behind one head: blocks it has, how many are in the cache and next in host memory, who uses it."""

    __slots__ = ("blocks", "host", "key", "present", "users")

    def __init__(self, key: tuple[object, ...], blocks: int) -> None:
        self.key = key
        self.blocks = blocks
        self.present = 0
        self.host = 0
        self.users = 0


class PrefixCache:
    """What is cached beyond the requests that run.

    The pool's ``free`` counts blocks that nobody uses, cached or not. Evictions are made up for whenever somebody
    looks: blocks only leave ``free`` in between, and leave it in LRU order.

    Parameters
    ----------
    pool : the rank's blocks.
    host : where blocks go that the pool takes; None: nowhere.
    """

    __slots__ = ("_host", "_idle", "_idle_blocks", "_nodes", "_pool", "hit_tokens")

    def __init__(self, pool: BlockPool, host: HostMemory | None = None) -> None:
        self._pool = pool
        self._host = host
        self._nodes: dict[tuple[object, ...], Node] = {}
        self._idle: OrderedDict[object, int] = OrderedDict()
        """Node, or anything else for blocks that cannot be found again -> free blocks, least recently freed first."""
        self._idle_blocks = 0
        self.hit_tokens = 0
        """Prompt tokens not computed again. [tokens]"""

    def path(self, segments: Segments) -> list[Node]:
        """Nodes of a prompt from its start on, made where they are new; segments without a block go with the next."""
        self._evict()  # first: a node that is let go of after this would not be the one the next prompt finds
        nodes: list[Node] = []
        tokens = end = 0
        key: tuple[object, ...] = (None,)
        for identity, length in segments:
            key += (identity, length)
            tokens += length
            blocks = tokens // self._pool.block_tokens - end
            if not blocks:
                continue
            end += blocks
            node = self._nodes.get(key)
            if node is None:
                node = self._nodes[key] = Node(key, blocks)
            nodes.append(node)
            key = (node,)
        return nodes

    def found(self, path: list[Node], target: int) -> tuple[int, int, int]:
        """Blocks of a prompt of ``target`` tokens that need not be computed, and idle ones that `hold` would take.

        The former on the device and, after them, in host memory.
        """
        self._evict()
        left = (target - 1) // self._pool.block_tokens
        hit = away = 0
        for node in path:
            here = min(node.present, left)
            there = min(node.host, left - here)
            hit += here
            away += there
            left -= here + there
            if here + there < node.blocks:
                break
        return hit, away, sum(node.present for node in path if not node.users)

    def hold(self, path: list[Node], loaded: int = 0) -> None:
        """A request uses a prompt from now on; blocks it found idle are no longer free.

        ``loaded`` blocks come from host memory into blocks that the request takes, and are the prompt's from now on.
        """
        self._evict()
        for node in path:
            node.users += 1
            if node.users == 1 and node.present:
                idle = self._idle.pop(node)
                self._idle_blocks -= idle
                self._pool.take(idle)
        for node in path if loaded else ():
            if there := min(node.host, loaded):
                loaded -= there
                self._back(node, there)
                node.present += there

    def _back(self, node: Node, blocks: int) -> None:
        assert self._host is not None
        self._host.give(node, blocks)

    def publish(self, path: list[Node], computed_tokens: int) -> int:
        """Blocks computed so far can be found; return how many the tree now owns that were the request's own."""
        computed = computed_tokens // self._pool.block_tokens
        owned = 0
        for node in path:
            here = min(node.blocks, computed)
            computed -= here
            if here > node.present:
                owned += here - node.present
                if again := min(node.host, here - node.present):
                    self._back(node, again)
                node.present = here
            if here < node.blocks:
                break
        return owned

    def release(self, path: list[Node], own_blocks: int) -> None:
        """Let ``own_blocks`` that nobody can find and the prompt's, unless others use them, become idle."""
        self._evict()
        pool, idle = self._pool, self._idle
        if own_blocks:
            pool.give_back(own_blocks)
            idle[object()] = own_blocks
            self._idle_blocks += own_blocks
        for node in reversed(path):
            node.users -= 1
            if not node.users and node.present:
                pool.give_back(node.present)
                idle[node] = node.present
                self._idle_blocks += node.present
            else:
                self._forget(node)

    def _evict(self) -> None:
        """Let go of what the pool has handed out since the last look, least recently freed first."""
        gone = self._idle_blocks - self._pool.free
        while gone > 0:
            entry, blocks = next(iter(self._idle.items()))
            lost = min(blocks, gone)
            gone -= lost
            self._idle_blocks -= lost
            if lost == blocks:
                del self._idle[entry]
            else:
                self._idle[entry] = blocks - lost
            if isinstance(entry, Node):
                entry.present -= lost
                if self._host is not None:
                    self.forget_all(self._host.put(entry, lost))
                self._forget(entry)

    def forget_all(self, owners: Iterable[Kept]) -> None:
        """These have nothing left in host memory."""
        for owner in owners:
            assert isinstance(owner, Node)
            self._forget(owner)

    def _forget(self, node: Node) -> None:
        if not (node.users or node.present or node.host):
            self._nodes.pop(node.key, None)
