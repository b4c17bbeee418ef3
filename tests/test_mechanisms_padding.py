"""Fixed capacity, one-hot dispatch and the loop over experts: drawn drop rates, published waste, and their cost."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simmoe.costs.memory import workspace_bytes
from simmoe.engine.engine import Engine
from simmoe.engine.step import Batch
from simmoe.routing.capacity import dropped_share, slots_per_expert, waste_factor
from simmoe.routing.popularity import inclusion_from_weights, uniform_inclusion, zipf_weights
from simmoe.routing.sampling import sample_choices
from simmoe.specs.deployment import Deployment
from simmoe.specs.load import load_hardware, load_model
from simmoe.specs.mechanisms import Dispatch
from simmoe.specs.routing import Routing
from tests.reference import mechanisms_twin as twin

H100 = load_hardware("h100")
MODEL = load_model("qwen3-30b-a3b")


def engine(**dispatch):
    return Engine(H100, MODEL, Deployment(dispatch=Dispatch(**dispatch), max_num_batched_tokens=4096))


def prefill(tokens=4096, **dispatch):
    return engine(**dispatch).step(Batch(prefill_chunks=((tokens, 0),))).parts


@pytest.mark.parametrize(
    ("tokens", "experts", "factor", "dropped", "empty"),
    [(1024, 64, 1.0, 0.0984, 0.098), (1024, 64, 1.25, 0.0224, 0.219), (4096, 128, 1.25, 0.0072, 0.206),
     (256, 128, 1.25, 0.108, 0.405), (8192, 2048, 1.25, 0.103, 0.282)],
)  # fmt: skip
def test_top1_drops_and_empty_slots_are_those_of_drawn_routings(tokens, experts, factor, dropped, empty):
    """Monte Carlo of uniform top-1 routing, 2 decimals of a percent."""
    slots = float(slots_per_expert(tokens, experts, 1, factor))
    lost = dropped_share(uniform_inclusion(experts, 1), tokens, slots)
    assert lost == pytest.approx(dropped, rel=0.02)
    assert 1 - (1 - lost) * tokens / (experts * slots) == pytest.approx(empty, abs=0.005)


@pytest.mark.parametrize("second", [False, True])
def test_drops_match_a_twin_that_fills_slots_one_by_one(second):
    rng = np.random.default_rng(8)
    drawn = [twin.dropped(rng, 200, 32, 4, 26, second_choice=second) for _ in range(60)]
    found = dropped_share(uniform_inclusion(32, 4), 200, 26.0, second_choice=second)
    assert found == pytest.approx(np.mean(drawn), abs=0.006)


@given(st.floats(0, 1.5), st.integers(8, 4096), st.integers(1, 200))
@settings(max_examples=40, deadline=None)
def test_more_slots_never_drop_more_and_a_second_choice_never_hurts(exponent, tokens, slots):
    p = inclusion_from_weights(zipf_weights(64, exponent), 2)
    one, two = (dropped_share(p, tokens, float(s)) for s in (slots, slots + 1))
    assert -1e-9 <= two <= one + 1e-9 <= 1 + 1e-6
    assert dropped_share(p, tokens, float(slots), second_choice=True) <= one + 1e-9


def test_waste_of_static_gating_is_the_published_one():
    """arXiv 2303.06182, sec. III-B: capacity a share f of all tokens, waste E f / k: 12.8 and 64."""
    for experts, share, waste in ((512, 0.05, 12.8), (128, 1.0, 64.0)):
        assert waste_factor(1e6, experts, 2, share * experts / 2) == pytest.approx(waste, rel=1e-3)


def test_capacity_computes_every_slot():
    """Capacity 2 computes twice the rows; a step of very many tokens takes nearly twice the experts' time."""
    padded, plain = (prefill(65536, **how) for how in ({"kind": "capacity", "capacity_factor": 2.0}, {}))
    assert 1.5 < padded["routed_experts"] / plain["routed_experts"] < 2.1


def test_one_hot_dispatch_costs_the_square_of_the_tokens():
    extra = [
        prefill(n, kind="einsum")["routed_experts"] - prefill(n, kind="capacity")["routed_experts"]
        for n in (2048, 4096)
    ]
    assert extra[1] / extra[0] == pytest.approx(4, rel=0.25)


@given(st.sampled_from(["qwen3-30b-a3b", "mixtral-8x7b", "deepseek-v2-lite"]), st.integers(1, 4096),
       st.sampled_from([1, 4]), st.sampled_from(["bfloat16", "fp8"]))  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_a_loop_over_experts_never_beats_the_fused_block(model, tokens, tp, precision):
    """It reads the same weights, computes the same rows and launches more."""
    looped, fused = (
        Engine(
            H100, load_model(model), Deployment(gpus=tp, tp=tp, weight_precision=precision, dispatch=Dispatch(**how))
        ).token_parts(np.array([float(tokens)]))["routed_experts"][0]
        for how in ({"kind": "loop"}, {})
    )
    assert looped >= fused


def test_a_loop_over_experts_costs_a_launch_or_more_for_each():
    looped, grouped = (engine(**how).step(Batch(16, 16_000)).parts for how in ({"kind": "loop"}, {}))
    assert looped["routed_experts"] > 2 * grouped["routed_experts"]
    assert looped["routed_experts"] > 48 * 82 * 6 * 5e-6


def test_padding_and_masks_take_memory():
    plain, padded, masked = (
        workspace_bytes(MODEL, Deployment(dispatch=Dispatch(**how)))
        for how in ({}, {"kind": "capacity", "capacity_factor": 2.0}, {"kind": "einsum", "capacity_factor": 2.0})
    )
    assert plain < padded < masked
    assert masked - padded == pytest.approx(6 * 8192 * 8192 * 8 * 2.0)


def test_tokens_that_route_alike_overflow_together_as_drawn():
    """256 unlike tokens, each four times: their counts are four times a binomial one, and drops follow."""
    rng, tokens, clones = np.random.default_rng(9), 1024, 4
    how = Dispatch(kind="capacity", capacity_factor=1.25)
    alike = Routing(independence=(tokens / clones - 1) / (tokens - 1))
    experts, top_k = MODEL.experts.num_experts, MODEL.experts.top_k
    slots = np.ceil(1.25 * tokens * top_k / experts)
    lost = [
        np.maximum(clones * np.bincount(sample_choices(rng, tokens // clones, np.ones(experts), top_k).ravel(),
                                        minlength=experts) - slots, 0).sum() / (tokens * top_k)
        for _ in range(200)
    ]  # fmt: skip
    drops = [
        Engine(H100, MODEL, Deployment(dispatch=how, routing=r)).moe.dropped_share(tokens) for r in (alike, Routing())
    ]
    assert drops[0] == pytest.approx(np.mean(lost), rel=0.05)
    assert drops[0] > 1.5 * drops[1]


def test_drops_are_told_by_the_engine():
    told = engine(kind="capacity")
    told.step(Batch(prefill_chunks=((4096, 0),)))
    assert any("capacity factor 1.25 drops" in note for note in told.times.notes)
    assert engine().moe.dropped_share(256) == 0.0
    skewed = Deployment(dispatch=Dispatch(kind="capacity"), routing={"popularity": "zipf"})
    even = engine(kind="capacity").moe.dropped_share(4096)
    assert 0 < even < Engine(H100, MODEL, skewed).moe.dropped_share(4096)
