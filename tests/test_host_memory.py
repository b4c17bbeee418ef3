"""KV blocks in host memory: laws of both tiers, and that prompts found there, and swapped requests, come sooner."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sim import SMALL, TABLE, fixed
from test_simulation import as_json, write

from simmoe.costs.kv_offload import HostTier, host_tier_of
from simmoe.errors import SpecError
from simmoe.sim.cluster import simulate
from simmoe.sim.kv_cache import BlockPool
from simmoe.sim.policies import vllm
from simmoe.sim.request import Request
from simmoe.sim.scheduler import Scheduler
from simmoe.specs.deployment import Deployment
from simmoe.specs.load import load_hardware, load_model
from simmoe.specs.workload import Lengths, Prompts, Workload

FAST = HostTier(tokens=4000, seconds_per_token=1e-6)
AGAIN = Workload(rate=5.0, input=fixed(50), output=fixed(4), prompts=Prompts(distinct=20, order="random"))


def test_a_device_reads_its_part_of_the_cache_over_its_own_link():
    """Llama-3.1-8B: 32 layers x 2 x 8 heads x 128 x 2 B = 131 kB a token, a quarter of it on each of four devices."""
    model, hardware = load_model("llama-3.1-8b"), load_hardware("h100")
    rule = {"host_memory": "200 GB"}
    one = host_tier_of(model, Deployment(kv_offload=rule), hardware)
    assert one.seconds_per_token == pytest.approx(131072 / 64e9)
    assert one.tokens == int(200e9 / 131072)
    four = host_tier_of(model, Deployment(gpus=4, kv_offload=rule), hardware)
    assert four.seconds_per_token == pytest.approx(one.seconds_per_token / 4)
    assert four.tokens == one.tokens
    shared = host_tier_of(model, Deployment(gpus=4, kv_offload={**rule, "devices_per_link": 2}), hardware)
    assert shared.seconds_per_token == pytest.approx(2 * four.seconds_per_token)
    two_ranks = host_tier_of(model, Deployment(gpus=2, tp=1, dp=2, kv_offload=rule), hardware)
    assert two_ranks.tokens == one.tokens // 2
    assert host_tier_of(model, Deployment(), hardware) is None
    with pytest.raises(SpecError, match="kv_offload needs host_link in the hardware"):
        host_tier_of(model, Deployment(kv_offload=rule), hardware.vary(host_link=None))


def test_prompts_that_left_the_device_are_loaded_and_answered_sooner():
    """Twenty prompts of four blocks; the device holds about five of them."""
    runs = [
        simulate(TABLE, AGAIN, SMALL, 320, requests=400, keep_load=False, tier=tier)
        for tier in (None, FAST, dataclasses.replace(FAST, seconds_per_token=1e-3), FAST)
    ]
    without, fast, slow, again = runs
    assert without.loaded_tokens == 0
    assert fast.loaded_tokens > 0.5 * 400 * 48
    assert fast.found_tokens > 2 * without.found_tokens
    assert fast.metrics.ttft.mean < 0.7 * without.metrics.ttft.mean
    assert slow.metrics.ttft.mean > without.metrics.ttft.mean  # loading takes longer than computing, and is done
    assert again.requests.finished_s.tolist() == fast.requests.finished_s.tolist()


def test_without_overlap_a_step_loads_before_it_computes():
    tier = dataclasses.replace(FAST, seconds_per_token=5e-5)
    overlapped, after = (
        simulate(TABLE, AGAIN, SMALL, 320, requests=200, keep_load=False, tier=one).metrics.ttft.mean
        for one in (tier, dataclasses.replace(tier, layerwise=False))
    )
    assert overlapped < after


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(5, 60).filter(lambda n: n % 16),
    st.integers(1, 8),
    st.integers(80, 300),  # blocks of 16 for 67 tokens, the most a request has
    st.integers(0, 600),
    st.sampled_from([0.0, 5e-5, 1e-4]),
    st.integers(0, 2**20),
)
def test_one_at_a_time_nobody_is_later_where_loading_a_token_takes_no_longer_than_computing_it(
    distinct, prompt, output, device_tokens, host_tokens, each, seed
):
    """The device's blocks evolve alike with and without host memory, so that what is found only grows; a token of
    `TABLE` takes 0.1 ms. With others in the batch, who comes sooner may make a later one wait: no law then.
    """
    workload = Workload(
        rate=20.0, input=fixed(prompt), output=fixed(output), prompts=Prompts(distinct=distinct, order="random")
    )
    deployment = SMALL.vary(max_num_seqs=1)
    without, beside = (
        simulate(TABLE, workload, deployment, device_tokens, requests=40, seed=seed, keep_load=False, tier=tier)
        for tier in (None, HostTier(tokens=host_tokens, seconds_per_token=each))
    )
    assert (beside.requests.finished_s <= without.requests.finished_s).all()
    assert beside.found_tokens >= without.found_tokens
    assert beside.found_tokens - beside.loaded_tokens == without.found_tokens  # on the device, as before


@settings(max_examples=60, deadline=None)
@given(
    blocks=st.integers(30, 120),
    host=st.integers(0, 150),
    swap=st.booleans(),
    prompts=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 160), st.integers(1, 60)), min_size=1, max_size=25),
)
def test_blocks_are_conserved_in_both_tiers(blocks, host, swap, prompts):
    scheduler = Scheduler(
        BlockPool(blocks * 16, 16), max_num_seqs=6, max_num_batched_tokens=64, policy=vllm,
        tier=HostTier(tokens=host * 16, seconds_per_token=0.0, swap=swap),
    )  # fmt: skip
    requests = [
        Request(i, 0, tokens, answer, tuple(s for s in ((-1, min(40, tokens)), (which, tokens - 40)) if s[1] > 0))
        for i, (which, tokens, answer) in enumerate(prompts)
    ]
    scheduler.waiting.extend(r for r in requests if scheduler.can_ever_hold(r))
    while not scheduler.idle:
        steps = scheduler.plan(0)
        assert steps
        scheduler.complete(steps, 0)
        tier = scheduler.host
        assert 0 <= scheduler.pool.free <= scheduler.pool.total
        assert tier.used == sum(run.blocks for node in scheduler.prefixes._nodes.values() for run in node.away)
        assert tier.swapped == sum(-(-r.swapped // 16) for r in scheduler.waiting)
        assert 0 <= tier.used + tier.swapped <= tier.total
    assert scheduler.pool.free == scheduler.pool.total
    assert scheduler.host.swapped == 0


def test_preempted_requests_come_back_instead_of_being_computed_again():
    workload = Workload(rate=14.0, input=Lengths(kind="uniform", low=20, high=60), output=fixed(40))
    runs = [
        simulate(TABLE, workload, SMALL, 400, requests=400, keep_load=False, tier=tier)
        for tier in (None, FAST, dataclasses.replace(FAST, swap=True))
    ]
    lost, kept_nothing, swapped = runs
    assert lost.preemptions > 100
    assert kept_nothing.requests.finished_s.tolist() == lost.requests.finished_s.tolist()
    assert swapped.loaded_tokens > 50 * 100
    assert swapped.steps.prompt_tokens.sum() < 0.9 * lost.steps.prompt_tokens.sum()
    assert swapped.metrics.e2e.mean < 0.95 * lost.metrics.e2e.mean


def test_conversations_of_a_trace_are_answered_sooner_from_host_memory(tmp_path):
    """Forty conversations of five turns, each turn's prompt the last one's and 512 tokens more (Mooncake's format)."""
    rows, at, blocks = [], 0, 0
    histories: list[list[int]] = [[] for _ in range(40)]
    for turn in range(5):
        for who in range(40):
            new = 4 if turn == 0 else 1
            histories[who] += range(blocks, blocks + new)
            blocks += new
            entry = {"timestamp": at, "input_length": 512 * len(histories[who]) + 7, "output_length": 32}
            rows.append(json.dumps(entry | {"hash_ids": [*histories[who], 10**6 + len(rows)]}))
            at += 400
    write(tmp_path, "\n".join(rows), "chats.jsonl")
    text = """
hardware: h100
model: qwen3-30b-a3b
deployment: {{memory_fraction: 0.81{}}}
workload: {{trace: chats.jsonl}}
run: {{warmup: 0.0, drain: true}}
"""
    offload = ", kv_offload: {host_memory: 200 GB}"
    without, beside = (as_json(write(tmp_path, text.format(extra))) for extra in ("", offload))
    assert beside["loaded_tokens"] > without["loaded_tokens"] == 0
    assert beside["found_tokens"] > 1.5 * without["found_tokens"]
    assert beside["metrics"]["ttft_s"]["mean"] < 0.8 * without["metrics"]["ttft_s"]["mean"]
    assert any("loaded from host memory" in note for note in beside["notes"])
