"""Experts in host memory: hit rates against drawn sequences, fetch times by hand, memory and what follows for speed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simmoe.costs.device_fit import footprint
from simmoe.costs.memory import weights_per_device_bytes
from simmoe.engine.engine import Engine
from simmoe.engine.step import Batch
from simmoe.errors import CapacityError
from simmoe.predict import predict
from simmoe.routing.locality import hit_rate, stickiness_from_repeats
from simmoe.routing.popularity import inclusion_from_weights, zipf_weights
from simmoe.specs.deployment import Deployment
from simmoe.specs.load import load_hardware, load_model
from simmoe.specs.mechanisms import Offload
from simmoe.specs.workload import Lengths, Workload
from tests.reference import mechanisms_twin as twin

H100 = load_hardware("h100")
MIXTRAL = load_model("mixtral-8x7b")
EXPERT_BYTES = 3 * 4096 * 14336 * 2


def step(offload, requests=1, model=MIXTRAL, routing=None):
    deployment = Deployment(offload=offload, **({"routing": routing} if routing else {}))
    return Engine(H100, model, deployment).step(Batch(requests, requests * 500)).parts


def law(experts, exponent):
    weights = zipf_weights(experts, exponent)
    return weights / weights.sum()


@pytest.mark.parametrize(("experts", "cached", "exponent"), [(64, 16, 0.8), (128, 40, 1.0), (32, 8, 0.0)])
@pytest.mark.parametrize("stickiness", [0.0, 0.4])
def test_lru_hits_match_a_drawn_sequence(experts, cached, exponent, stickiness):
    p = law(experts, exponent)
    drawn = twin.lru_hits(np.random.default_rng(9), p, cached, stickiness, 8000)
    assert hit_rate(p, cached, stickiness=stickiness) == pytest.approx(drawn, abs=0.02)


def test_the_most_popular_serve_their_share():
    """64 experts, Zipf 0.8, 16 held: 61 % of single accesses; LRU holds less of a law that stands still."""
    p = law(64, 0.8)
    assert hit_rate(p, 16, policy="pinned") == pytest.approx(p[:16].sum())
    assert hit_rate(p, 16, policy="lfu") > hit_rate(p, 16, policy="lru")


@given(st.floats(0, 1.5), st.floats(0.5, 63), st.sampled_from(["lru", "lfu", "pinned"]), st.integers(1, 64))
@settings(max_examples=60, deadline=None)
def test_hit_rates_are_shares_and_grow_with_the_cache(exponent, cached, policy, tokens):
    p = inclusion_from_weights(zipf_weights(64, exponent), 4)
    small, large = (hit_rate(p, c, policy=policy, tokens=tokens) for c in (cached, cached + 0.5))
    assert 0 <= small <= large + 1e-9 <= 1 + 1e-6
    assert hit_rate(p, 64, policy=policy) == 1.0


def test_stickiness_comes_back_from_measured_repeats():
    """Mixtral, layer 15: the first choice repeats 27 % of the time, by chance 12.5 % (arXiv 2401.04088, table 5)."""
    assert stickiness_from_repeats(0.27, np.full(8, 1 / 8)) == pytest.approx(0.166, abs=0.001)


def test_one_token_fetches_the_experts_it_misses():
    fetched = step(Offload(cached_experts=4))["expert_fetch"]
    link = H100.host_link
    # half of the experts held, popularity even: one of two picks is missed in each of 32 layers
    assert fetched == pytest.approx(32 * (link.latency + EXPERT_BYTES / link.bandwidth), rel=0.02)


def test_streaming_fetches_every_expert_once_whatever_the_batch():
    few, many = (step(Offload(policy="stream"), n)["expert_fetch"] for n in (1, 8))
    whole = 32 * 8 * EXPERT_BYTES / H100.host_link.bandwidth
    assert few == pytest.approx(whole, rel=0.05)
    assert many == pytest.approx(whole, rel=0.05)
    # so throughput per step grows with the batch: the reason to stream at all
    assert 8 / many > 7 / few


def test_foreseen_misses_hide_under_compute_and_no_further():
    late, early = (step(Offload(cached_experts=4, prefetch=p))["expert_fetch"] for p in (0.0, 1.0))
    compute = step(Offload(cached_experts=4))["routed_experts"]
    assert late - early == pytest.approx(compute, rel=0.05)


@pytest.mark.parametrize(
    "better",
    [Offload(cached_experts=6), Offload(cached_experts=4, stickiness=0.3), Offload(cached_experts=4, prefetch=0.5)],
)
def test_no_setting_is_without_effect(better):
    assert step(better)["expert_fetch"] < 0.98 * step(Offload(cached_experts=4))["expert_fetch"]


def test_experts_of_a_session_stay_and_no_more_than_the_cache_holds():
    """One request keeps its two experts; eight sessions need more of Mixtral's eight than a cache of four."""
    sessions = {"tasks": 10**6}
    assert step(Offload(cached_experts=4), 1, routing=sessions)["expert_fetch"] == 0.0
    one_by_one, crowded = (step(Offload(cached_experts=4), 8, routing=r)["expert_fetch"] for r in ({}, sessions))
    woken = 8 * (1 - (1 - 2 / 8) ** 8)
    link = H100.host_link
    by_hand = 32 * (link.latency + (woken - 4) * EXPERT_BYTES / link.bandwidth)
    assert crowded == pytest.approx(by_hand, rel=0.01)
    assert crowded < one_by_one


def test_skewed_popularity_suits_a_pinned_cache():
    even, skewed = (
        step(Offload(cached_experts=32, policy="pinned"), 4, load_model("qwen3-30b-a3b"), routing)["expert_fetch"]
        for routing in ({}, {"popularity": "zipf", "exponent": 1.2})
    )
    assert skewed < 0.6 * even


def test_offload_frees_the_weights_and_lets_a_model_fit():
    resident = weights_per_device_bytes(MIXTRAL, Deployment())
    held = weights_per_device_bytes(MIXTRAL, Deployment(offload=Offload(cached_experts=2)))
    assert resident - held == pytest.approx(32 * EXPERT_BYTES * (6 - 2 / 32), rel=1e-6)
    with pytest.raises(CapacityError, match="short"):
        footprint(MIXTRAL, Deployment(), H100)
    assert footprint(MIXTRAL, Deployment(offload=Offload(cached_experts=2)), H100).kv_tokens > 0


def test_a_prediction_says_what_fetching_costs():
    traffic = Workload(concurrency=1, input=Lengths(mean=128), output=Lengths(mean=128))
    offloaded = predict(H100, MIXTRAL, Deployment(offload=Offload(cached_experts=2)), traffic)
    assert "expert fetch" in offloaded.bound
