"""The pool in host memory against explicit entries, and the time its book-keeping takes from a run."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simmoe.engine.step import StepTable
from simmoe.sim.arrivals import Recorded
from simmoe.sim.cluster import simulate
from simmoe.sim.kv_cache import BlockPool
from simmoe.sim.offload_books import POOL_GROWTH, WARNING_ENTRIES, Bookkeeping, OffloadBooks
from simmoe.sim.policies import vllm
from simmoe.sim.request import Request
from simmoe.sim.scheduler import Scheduler
from simmoe.sim.ticks import to_ticks
from simmoe.specs.deployment import Deployment
from simmoe.specs.workload import Lengths, Workload

BLOCK = 16
SEATS = 32


def scheduler(kv_tokens: int = 60_000) -> Scheduler:
    return Scheduler(BlockPool(kv_tokens, BLOCK), max_num_seqs=SEATS, max_num_batched_tokens=4096, policy=vllm)


class Explicit:
    """vLLM's manager entry by entry: places are taken in order and complete with their request."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.entries: OrderedDict[object, bool] = OrderedDict()
        self.mine: dict[Request, list[object]] = {}
        self.next: dict[Request, int] = {}

    def step(self, s: Scheduler) -> tuple[int, int]:
        """Store what is full after this step; refused requests and entries they walked."""
        for request in [r for r in self.mine if r not in s.running]:
            for entry in self.mine.pop(request):
                self.entries[entry] = True
        refused = walked = 0
        new = [r for r, _, _ in s.chunks]
        for request in (*new, *(r for r in s.running if r not in new)):
            tokens = request.input_tokens
            if request.finish_step >= 0:
                tokens += request.output_tokens - 1 - request.finish_step + s.step + 1
            full = tokens // BLOCK
            missing = [(request, i) for i in range(self.next.get(request, 0), full)]
            lack = len(missing) + len(self.entries) - self.blocks
            complete = [entry for entry, done in self.entries.items() if done]
            if lack > len(complete):
                refused += 1
                walked += len(self.entries) + WARNING_ENTRIES
                continue
            for entry in complete[: max(lack, 0)]:
                del self.entries[entry]
            self.entries.update(dict.fromkeys(missing, False))
            self.mine.setdefault(request, []).extend(missing)
            self.next[request] = full
        return refused, walked


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 120), st.integers(2, 200)), min_size=1, max_size=20),
    blocks=st.integers(1, 120),
)
def test_places_and_refusals_are_those_of_explicit_entries(lengths: list[tuple[int, int]], blocks: int) -> None:
    s, tier, explicit = scheduler(), OffloadBooks(blocks, BLOCK), Explicit(blocks)
    s.waiting.extend(Request(i, 0, n, m) for i, (n, m) in enumerate(lengths))
    while not s.idle:
        assert s.plan(0)
        walked = tier.entries_walked(s, 1)
        refused, known = explicit.step(s)
        assert tier.refused == refused
        assert walked >= known  # walks that end in success are added, spread evenly
        assert tier.blocks - tier.free == len(explicit.entries) <= blocks
        s.complete(1, 0)


def test_prompts_in_the_pool_are_not_stored_again() -> None:
    s, tier = scheduler(), OffloadBooks(200, BLOCK)
    segments = ((0, 64), (1, 96))
    s.waiting.extend(Request(i, 0, 160, 20, segments) for i in range(3))
    s.waiting.append(Request(3, 0, 160, 20, ((0, 64), (2, 96))))
    s.plan(0)
    tier.entries_walked(s, 1)
    assert tier.blocks - tier.free == 4 + 6 + 6


def table() -> StepTable:
    return StepTable(np.full(4097, 0.01), np.full(4129, 0.0), np.zeros(SEATS + 1), np.zeros(SEATS + 1), 0.0, 0.0, 0.0)


def end_of_run(blocks: int, *, entry_s: float = 1e-6, ahead: int = 1, output: int = 640, block: int = BLOCK) -> float:
    result = simulate(
        replace(table(), steps_ahead=ahead),
        Workload(rate=1.0, input=Lengths(mean=64), output=Lengths(mean=output)),
        Deployment(gpus=1, tp=1, max_num_seqs=SEATS, max_num_batched_tokens=4096, kv_block_size=block),
        60_000,
        requests=SEATS,
        warmup=0.0,
        keep_load=False,
        bookkeeping=Bookkeeping(blocks=blocks, entry_s=entry_s) if blocks else None,
        recorded=Recorded([to_ticks(0.001 * i) for i in range(SEATS)], [(64, output, ())] * SEATS),
    )
    return float(result.requests.finished_s.max())


def test_pool_smaller_than_what_runs_makes_steps_as_long_as_its_walks() -> None:
    """At the end 32 requests hold 44 blocks each: a pool of 1,000 refuses late, one of 2,000 never."""
    free = end_of_run(0)
    assert end_of_run(2_000) == pytest.approx(free, rel=1e-3)
    late = end_of_run(1_000)
    refused = SEATS * (1_000 + WARNING_ENTRIES) * 1e-6  # of a step with everybody refused: 40 ms beside 10 ms
    assert free + 0.2 * 640 * (refused - 0.01) < late < free + 0.4 * 640 * refused
    assert end_of_run(1_000, entry_s=1e-7) == pytest.approx(free, rel=1e-3)  # hides behind the device


def test_books_are_added_to_the_device_where_steps_are_not_scheduled_ahead() -> None:
    extra = end_of_run(1_000, entry_s=1e-7, ahead=0) - end_of_run(0, ahead=0)
    assert 0.2 * 640 * 0.004 < extra < 0.4 * 640 * 0.004


def entry_of_refused_steps(blocks: int) -> float:
    """Host time of an entry where every request is refused in every step, from what 160 more of them take. [s]"""
    entry_s = 3e-6
    steps = [end_of_run(blocks, entry_s=entry_s, output=output, block=1) for output in (480, 640)]
    return ((steps[1] - steps[0]) / (160 * SEATS) - WARNING_ENTRIES * entry_s) / blocks


def test_an_entry_of_a_larger_pool_takes_longer_by_its_growth_and_the_run_with_it() -> None:
    """Blocks of one token: 2,048 are full when the prompts are in, 8,192 after 192 tokens of each answer."""
    small, medium, large = (entry_of_refused_steps(blocks) for blocks in (512, 2_048, 8_192))
    assert small == pytest.approx(3e-6, rel=1e-3)
    assert medium / small == pytest.approx(2**POOL_GROWTH, rel=1e-3)
    assert large / medium == pytest.approx(4**POOL_GROWTH, rel=1e-3)
    assert 4**0.16 < large / medium < 4**0.53  # walks left alone, and beside other work
