"""The prefix cache against explicit blocks with hashes and an LRU queue, and its accounting in the scheduler."""

from __future__ import annotations

from collections import OrderedDict

from hypothesis import example, given, settings
from hypothesis import strategies as st

from simmoe.sim.kv_cache import BlockPool
from simmoe.sim.policies import vllm
from simmoe.sim.prefix_cache import PrefixCache
from simmoe.sim.request import Request
from simmoe.sim.scheduler import Scheduler

BLOCK = 4


class Blocks:
    """The slow twin: every block has a number, maybe a hash, and users; free ones queue, least recently freed first."""

    def __init__(self, total: int) -> None:
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(total))
        self.hash_of: dict[int, tuple[int, ...]] = {}
        self.block_of: dict[tuple[int, ...], int] = {}
        self.users = dict.fromkeys(range(total), 0)

    def hits(self, tokens: list[int]) -> list[int]:
        found = []
        for end in range(BLOCK, len(tokens), BLOCK):  # the last token is always computed
            block = self.block_of.get(tuple(tokens[:end]))
            if block is None:
                break
            found.append(block)
        return found

    def use(self, block: int) -> None:
        self.free.pop(block, None)
        self.users[block] += 1

    def new(self) -> int:
        block, _ = self.free.popitem(last=False)
        old = self.hash_of.pop(block, None)
        if old is not None:
            del self.block_of[old]
        self.users[block] = 1
        return block

    def release(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self.users[block] -= 1
            if not self.users[block]:
                self.free[block] = None


def tokens_of(segments: tuple[tuple[int, int], ...]) -> list[int]:
    return [identity * 1000 + i for identity, length in segments for i in range(length)]


@settings(max_examples=150, deadline=None)
@given(
    total=st.integers(12, 60),
    plan=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4), st.integers(0, 12), st.booleans()), max_size=40),
)
@example(
    total=12,
    plan=[(1, 0, 0, False), (0, 2, 0, True), *[(0, 0, 0, False)] * 4, (0, 0, 0, True), *[(1, 0, 0, False)] * 2],
)
def test_tree_of_segments_finds_what_explicit_blocks_find(total: int, plan: list[tuple[int, int, int, bool]]) -> None:
    pool, twin = BlockPool(total * BLOCK, BLOCK), Blocks(total)
    cache = PrefixCache(pool)
    live: list[tuple[list, list, int, list[int]]] = []
    for group, question, answer, finish_first in plan:
        if finish_first and live:
            path, held, whole, blocks = live.pop(0)
            cache.release(path, held, whole)
            twin.release(blocks)
        segments = ((-1 - group, 6), (question, 2 + 3 * question))
        tokens = tokens_of(segments)
        path = cache.path(segments)
        hit, _, idle = cache.found(path, len(tokens))
        explicit = twin.hits(tokens)
        assert hit == len(explicit)
        whole = -(-(len(tokens) + answer) // BLOCK)
        if whole - hit + idle > pool.free:
            continue
        held = cache.hold(path, hit)
        pool.take(whole - hit)
        for block in explicit:
            twin.use(block)
        blocks = explicit + [twin.new() for _ in range(whole - hit)]
        cache.publish(path, len(tokens), held)
        for i in range(len(tokens) // BLOCK):
            key = tuple(tokens[: (i + 1) * BLOCK])
            if key not in twin.block_of:
                twin.block_of[key], twin.hash_of[blocks[i]] = blocks[i], key
        live.append((path, held, whole, blocks))
        assert pool.free == len(twin.free)
    for path, held, whole, _ in live:
        cache.release(path, held, whole)
    assert pool.free == pool.total


def served(repeats: int, prefix_caching: bool) -> tuple[int, Scheduler]:
    scheduler = Scheduler(
        BlockPool(4000, 16), max_num_seqs=8, max_num_batched_tokens=256, policy=vllm, prefix_caching=prefix_caching
    )
    computed = 0
    for i in range(repeats):
        scheduler.waiting.append(Request(i, 0, 500, 20, ((7, 500),)))
        while not scheduler.idle:
            steps = scheduler.plan(0)
            computed += sum(new for _, new, _ in scheduler.chunks)
            scheduler.complete(steps, 0)
    return computed, scheduler


def test_repeated_prompt_is_computed_once_but_for_its_last_block() -> None:
    computed, scheduler = served(5, prefix_caching=True)
    assert computed == 500 + 4 * (500 - 31 * 16)
    assert scheduler.prefixes is not None
    assert scheduler.prefixes.hit_tokens == 4 * 31 * 16
    assert served(5, prefix_caching=False)[0] == 2500


@settings(max_examples=60, deadline=None)
@given(
    blocks=st.integers(30, 120),
    prompts=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 160), st.integers(1, 60)), min_size=1, max_size=25),
)
def test_blocks_are_conserved_when_shared_prompts_are_preempted(
    blocks: int, prompts: list[tuple[int, int, int]]
) -> None:
    scheduler = Scheduler(BlockPool(blocks * 16, 16), max_num_seqs=6, max_num_batched_tokens=64, policy=vllm)
    requests = [
        Request(i, 0, tokens, answer, tuple(s for s in ((-1, min(40, tokens)), (which, tokens - 40)) if s[1] > 0))
        for i, (which, tokens, answer) in enumerate(prompts)
    ]
    scheduler.waiting.extend(r for r in requests if scheduler.can_ever_hold(r))
    turn = 0
    while not scheduler.idle:
        steps = scheduler.plan(0)
        assert steps
        scheduler.complete(steps, 0)
        turn += 1
        if turn % 7 == 0 and scheduler.running:
            scheduler.preempt_newest(0)
        assert 0 <= scheduler.pool.free <= scheduler.pool.total
    assert scheduler.pool.free == scheduler.pool.total
