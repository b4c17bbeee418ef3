"""Scheduling rules, driven by hand without a clock or SimPy."""

import pytest

from simmoe.errors import SpecError
from simmoe.sim.kv_cache import BlockPool
from simmoe.sim.policies import policy_named
from simmoe.sim.request import Request
from simmoe.sim.scheduler import Scheduler


def scheduler(*, kv=1000, block=10, seqs=8, budget=100, policy="vllm"):
    return Scheduler(
        BlockPool(kv, block), max_num_seqs=seqs, max_num_batched_tokens=budget, policy=policy_named(policy)
    )


def queue(s, *shapes):
    requests = [Request(i, 0, prompt, output) for i, (prompt, output) in enumerate(shapes)]
    s.waiting.extend(requests)
    return requests


def run(s, now=0):
    """Plan and do one step; return it as (index, new tokens) of the chunks, and who finished."""
    steps = s.plan(now)
    planned = [(r.index, new) for r, new, _ in s.chunks]
    done = s.complete(min(steps, 1), now + 1)
    return planned, [r.index for r in done]


def test_prompts_share_the_budget_and_the_last_is_chunked():
    s = scheduler()
    queue(s, (40, 5), (40, 5), (40, 5), (40, 5))
    assert run(s)[0] == [(0, 40), (1, 40), (2, 20)]
    # two decode now and come first; the unfinished prompt goes on before the next is admitted
    assert run(s)[0] == [(2, 20), (3, 40)]
    assert s.decoding == 4


def test_no_more_run_together_than_seats():
    s = scheduler(seqs=2)
    queue(s, (10, 3), (10, 3), (10, 3))
    assert run(s)[0] == [(0, 10), (1, 10)]
    assert run(s) == ([], [])
    assert run(s) == ([], [0, 1])
    assert run(s)[0] == [(2, 10)]


def test_admission_waits_for_blocks_in_order_of_arrival():
    s = scheduler(kv=100)
    queue(s, (65, 20), (50, 1), (10, 1))  # the second does not fit beside the first; the third may not overtake it
    assert run(s)[0] == [(0, 65)]
    assert run(s)[0] == []
    assert [r.index for r in s.waiting] == [1, 2]


def test_newest_is_preempted_and_recomputes_what_it_had_generated():
    s = scheduler(kv=60)
    first, second = queue(s, (30, 25), (20, 25))
    run(s)
    assert s.pool.free == 1
    run(s)  # the first takes the last block, at token 31, the second, at 21, has none
    assert second.preemptions == 1
    assert first.preemptions == 0
    assert s.waiting[0] is second
    assert second.target == 21  # prompt and the one token sampled before
    assert second.cached == 0
    assert s.pool.used == s.pool.blocks_of(31)


def test_an_unfinished_prompt_that_lacks_blocks_waits_and_computes_nothing_twice():
    """Preempted, its own blocks would be found in the prefix cache again, so that vLLM goes on where it left off."""
    s = scheduler(kv=160, budget=50)
    first, second = queue(s, (40, 9), (130, 1))
    computed = 0
    for step in range(30):
        steps = s.plan(step)
        computed += sum(new for _, new, _ in s.chunks)
        s.complete(min(steps, 1), step + 1)
        if s.idle:
            break
    assert s.idle
    assert computed == first.input_tokens + second.input_tokens
    assert second.first_token == 10  # the first holds its blocks for nine steps


def test_an_unfinished_prompt_gives_way_where_decodes_need_its_blocks():
    s = scheduler(kv=120, budget=50)
    queue(s, (40, 35), (80, 1))
    computed = 0
    for step in range(60):
        steps = s.plan(step)
        computed += sum(new for _, new, _ in s.chunks)
        s.complete(min(steps, 1), step + 1)
    assert s.idle
    assert computed > 120


def test_single_output_token_needs_no_decode_step():
    s = scheduler()
    queue(s, (10, 1))
    assert run(s) == ([(0, 10)], [0])
    assert s.idle
    assert s.pool.used == 0


def test_decode_window_reaches_to_the_next_completion():
    s = scheduler()
    queue(s, (10, 30), (10, 12))
    run(s)
    assert s.plan(1) == 11
    assert [r.index for r in s.complete(11, 12)] == [1]
    assert s.plan(12) == 18
    assert s.context == 10 + 11


def test_decode_window_ends_where_blocks_run_out():
    s = scheduler(kv=50)
    queue(s, (20, 31), (10, 31))
    run(s)
    # used 3 of 5; both need a block in the first step, the next after ten more
    assert s.plan(1) == 10


def test_no_evict_admits_only_what_fits_to_its_end():
    s = scheduler(kv=100, policy="trtllm")
    queue(s, (30, 21), (30, 31), (10, 1))
    assert run(s)[0] == [(0, 30)]  # 50 + 60 tokens would not fit
    waits, preemptions = [], 0
    while not s.idle:
        chunks, finished = run(s)
        waits += [("starts", i) for i, _ in chunks] + [("ends", i) for i in finished]
        preemptions += sum(r.preemptions for r in s.running)
    assert waits == [("ends", 0), ("starts", 1), ("starts", 2), ("ends", 2), ("ends", 1)]
    assert preemptions == 0
    assert s.pool.used == 0


def test_max_utilization_admits_what_fits_now_and_pauses_the_newest():
    """Two prompts of 40 tokens beside 60 to come in 100: no eviction takes them in turn, max utilization together.

    A chunked prompt has all its blocks from the start, so that the one behind it waits.
    """
    for policy, together in (("trtllm", 1), ("trtllm_max_utilization", 2)):
        s = scheduler(kv=100, block=10, policy=policy)
        queue(s, (40, 21), (40, 21))
        run(s)
        assert len(s.running) == together
    served = []
    while not s.idle:
        served += s.complete(s.plan(0), 0)
        assert 0 <= s.pool.free <= s.pool.total
    assert [r.preemptions for r in served] == [0, 1]
    s = scheduler(kv=100, block=10, budget=20, policy="trtllm_max_utilization")
    queue(s, (80, 2), (15, 2))
    run(s)
    assert (s.pool.used, len(s.running)) == (8, 1)
    s = scheduler(kv=100, block=10, budget=20)
    queue(s, (80, 2), (15, 2))
    run(s)
    assert s.pool.used == 2


def test_unknown_policy_names_the_known_ones():
    with pytest.raises(SpecError, match="'fifo' is unknown; known: sglang, trtllm, trtllm_max_utilization, vllm"):
        policy_named("fifo")
