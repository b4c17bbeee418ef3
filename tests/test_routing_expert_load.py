"""The expected load of the busiest rank against enumeration, drawn routings and laws that must hold."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference.routing_enumeration import mean_over_routings

from simmoe.errors import SpecError
from simmoe.routing.expert_load import TILES, expected_load
from simmoe.routing.occupancy import distinct_experts, row_blocks
from simmoe.routing.placement import contiguous_placement, greedy_placement, systematic_imbalance
from simmoe.routing.popularity import inclusion_from_weights, uniform_inclusion, zipf_weights
from simmoe.routing.sampled_load import sample_load

BATCHES = np.array([1.0, 2, 5, 17, 64, 300, 1000, 4096, 65536])


def fields(load):
    yield "routed_pairs", load.routed_pairs
    yield "active_experts", load.active_experts
    yield "busiest_expert_tokens", load.busiest_expert_tokens
    for tile in TILES:
        yield f"row_blocks[{tile}]", load.row_blocks[tile]


@st.composite
def shapes(draw):
    num_experts = draw(st.sampled_from([4, 8, 24, 64, 128, 256]))
    top_k = draw(st.integers(1, min(8, num_experts)))
    ep = draw(st.sampled_from([d for d in (1, 2, 3, 4, 8, 32) if d <= num_experts]))
    weights = draw(st.one_of(st.none(), st.lists(st.floats(0.01, 10), min_size=num_experts, max_size=num_experts)))
    return num_experts, top_k, ep, None if weights is None else inclusion_from_weights(weights, top_k)


def test_ep_1_holds_every_expert_and_its_means_are_exact():
    zipf = inclusion_from_weights(zipf_weights(64, 0.8), 6)
    load = expected_load(BATCHES, 64, 6, inclusion=zipf)
    assert load.local_experts == 64
    assert load.routed_pairs == pytest.approx(6 * BATCHES)
    assert load.active_experts == pytest.approx(distinct_experts(zipf, BATCHES), rel=1e-12)
    # less popular experts are pooled into classes: the difference must not show
    for tile in TILES:
        assert load.row_blocks[tile] == pytest.approx(row_blocks(zipf, BATCHES, tile), rel=1e-4)


@pytest.mark.parametrize(("experts", "top_k", "tokens"), [(4, 2, 3), (4, 1, 4), (6, 3, 2), (6, 2, 3)])
def test_maxima_are_near_those_over_every_routing(experts, top_k, tokens):
    # toy sizes, where taking counts as independent is worst
    load = expected_load(tokens, experts, top_k, ep=2)
    half = experts // 2
    busiest = mean_over_routings(max, experts, top_k, tokens)
    pairs = mean_over_routings(lambda c: max(sum(c[:half]), sum(c[half:])), experts, top_k, tokens)
    active = mean_over_routings(
        lambda c: max(sum(n > 0 for n in c[:half]), sum(n > 0 for n in c[half:])), experts, top_k, tokens
    )
    assert float(load.busiest_expert_tokens) == pytest.approx(busiest, rel=0.07)
    assert float(load.routed_pairs) == pytest.approx(pairs, rel=0.07)
    assert float(load.active_experts) == pytest.approx(active, rel=0.07)


@pytest.mark.parametrize(
    ("experts", "top_k", "ep", "exponent", "groups", "tolerance"),
    [
        (256, 8, 8, 0.0, (1, 1), 0.02),
        (256, 8, 32, 0.0, (1, 1), 0.02),
        (64, 6, 2, 0.0, (1, 1), 0.02),
        (128, 1, 8, 0.0, (1, 1), 0.02),
        (256, 8, 8, 0.0, (8, 4), 0.03),
        (256, 8, 32, 0.0, (8, 4), 0.03),
        (64, 6, 4, 1.0, (1, 1), 0.02),
        (128, 8, 8, 0.7, (1, 1), 0.03),
    ],
)
def test_closed_form_agrees_with_drawn_routings(experts, top_k, ep, exponent, groups, tolerance):
    rng = np.random.default_rng(7)
    weights = rng.permutation(zipf_weights(experts, exponent))
    inclusion = inclusion_from_weights(weights, top_k)
    grouped = {"num_groups": groups[0], "top_groups": groups[1]}
    for tokens, draws in ((4, 800), (24, 400), (96, 150), (512, 30)):
        drawn = sample_load(rng, tokens, weights, top_k, ep=ep, draws=draws, **grouped)
        load = expected_load(tokens, experts, top_k, ep=ep, inclusion=inclusion, **grouped)
        for (name, sample), (_, expected) in zip(fields(drawn), fields(load), strict=True):
            slack = 4 * sample.std() / np.sqrt(draws) + tolerance * sample.mean()
            assert abs(float(expected) - sample.mean()) <= slack, (tokens, name, float(expected), sample.mean())


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [16, 128, 2048])
def test_row_blocks_of_one_rank_are_within_one_percent_of_drawn_ones(tokens):
    draws = 200 if tokens < 2048 else 40
    drawn = sample_load(np.random.default_rng(5), tokens, np.ones(256), 8, draws=draws)
    load = expected_load(tokens, 256, 8)
    for tile in TILES:
        assert float(load.row_blocks[tile]) == pytest.approx(drawn.row_blocks[tile].mean(), rel=0.01)


@settings(max_examples=60, deadline=None)
@given(shapes())
def test_the_busiest_rank_is_within_the_bounds_that_counting_sets(shape):
    num_experts, top_k, ep, inclusion = shape
    load = expected_load(BATCHES, num_experts, top_k, ep=ep, inclusion=inclusion)
    pairs, active, tall = load.routed_pairs, load.active_experts, load.busiest_expert_tokens
    assert load.local_experts == -(-num_experts // ep)
    assert np.all(pairs >= BATCHES * top_k / ep * (1 - 1e-9))
    assert np.all(pairs <= BATCHES * min(top_k, load.local_experts) * (1 + 1e-9))
    assert np.all((active >= 1 - 1e-9) & (active <= np.minimum(load.local_experts, pairs) * (1 + 1e-9)))
    assert np.all(tall >= np.maximum(1, BATCHES * top_k / num_experts) * (1 - 1e-9))
    assert np.all(tall <= BATCHES * (1 + 1e-9))
    for tile in TILES:
        assert np.all(load.row_blocks[tile] * tile >= pairs * (1 - 1e-9))
        assert np.all((load.row_blocks[tile] >= active * (1 - 1e-9)) & (load.row_blocks[tile] <= pairs * (1 + 1e-9)))


@settings(max_examples=60, deadline=None)
@given(shapes(), st.integers(1, 20_000))
@example((64, 5, 32, None), 1026)  # broken by 0.5 % while sizes between whole numbers were rounded
@example((24, 1, 8, None), 3294)  # by 0.2 %, and the next two by 1.8 and 0.8 %, while two moments stood for few counts
@example((8, 2, 4, None), 97)
@example((16, 6, 8, None), 360)
def test_more_tokens_never_mean_less_load(shape, tokens):
    num_experts, top_k, ep, inclusion = shape
    load = expected_load([tokens, tokens + max(1, tokens // 50)], num_experts, top_k, ep=ep, inclusion=inclusion)
    for name, (low, high) in fields(load):
        assert low <= high * (1 + 2e-3), name


@pytest.mark.parametrize("ep", [1, 8])
def test_a_smaller_k_never_means_more_load(ep):
    loads = [expected_load(BATCHES, 256, top_k, ep=ep) for top_k in range(1, 9)]
    for fewer, more in itertools.pairwise(loads):
        for (name, low), (_, high) in zip(fields(fewer), fields(more), strict=True):
            assert np.all(low <= high * (1 + 2e-3)), name


def test_load_of_uniform_popularity_is_the_same_given_or_implied():
    given_uniform = expected_load(BATCHES, 64, 6, ep=8, inclusion=uniform_inclusion(64, 6))
    implied = expected_load(BATCHES, 64, 6, ep=8)
    for (_, a), (_, b) in zip(fields(given_uniform), fields(implied), strict=True):
        assert a == pytest.approx(b, rel=1e-12)


def test_skew_loads_the_busiest_rank_and_placement_relieves_it():
    zipf = inclusion_from_weights(zipf_weights(64, 1.0), 6)
    contiguous = expected_load(65536, 64, 6, ep=8, inclusion=zipf)
    placement = greedy_placement(zipf, 8)
    greedy = expected_load(65536, 64, 6, ep=8, inclusion=zipf, placement=placement)
    mean = 65536 * 6 / 8
    # at 65536 tokens chance has averaged out and only the systematic part is left
    systematic = systematic_imbalance(zipf, contiguous_placement(64, 8))
    assert float(contiguous.routed_pairs) / mean == pytest.approx(systematic, rel=1e-3)
    assert systematic_imbalance(zipf, placement) <= float(greedy.routed_pairs) / mean < 1.35


@pytest.mark.parametrize(("tokens", "experts", "top_k", "drawn"), [(128, 256, 8, 10.44), (32, 64, 6, 7.39)])
def test_busiest_expert_matches_published_draws(tokens, experts, top_k, drawn):
    assert float(expected_load(tokens, experts, top_k).busiest_expert_tokens) == pytest.approx(drawn, rel=0.015)


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "ep", "factor"),
    [(128, 64, 6, 8, 1.146), (1024, 256, 8, 32, 1.129), (4096, 256, 8, 64, 1.106), (18432, 256, 8, 128, 1.078)],
)
def test_busiest_rank_matches_published_draws(tokens, experts, top_k, ep, factor):
    pairs = float(expected_load(tokens, experts, top_k, ep=ep).routed_pairs)
    assert pairs / (tokens * top_k / ep) == pytest.approx(factor, rel=0.006)


def test_tokens_that_route_alike_wake_fewer_experts_and_crowd_them():
    alone = expected_load(BATCHES, 128, 8)
    alike = expected_load(BATCHES, 128, 8, independence=0.4)
    assert alike.active_experts[0] == pytest.approx(8)  # one token resembles nobody
    assert np.all(alike.active_experts[1:-2] < alone.active_experts[1:-2])
    assert np.all(alike.busiest_expert_tokens[1:] > alone.busiest_expert_tokens[1:])
    assert alike.routed_pairs == pytest.approx(alone.routed_pairs)
    # 1 + phi (T - 1) independent tokens: 16 tokens at phi = 0.4 are seven
    assert expected_load(16, 128, 8, independence=0.4).active_experts == pytest.approx(
        distinct_experts(uniform_inclusion(128, 8), 7.0)
    )


def test_pairs_of_identical_tokens_fill_tiles_as_drawn_twice():
    rng, draws = np.random.default_rng(9), 200
    counts = np.stack(
        [
            np.bincount(rng.permuted(np.tile(np.arange(64), (50, 1)), axis=1)[:, :6].ravel(), minlength=64)
            for _ in range(draws)
        ]
    )
    # 99 tokens at phi = 49/98 route as 50 independent ones of 1.98 rows each
    load = expected_load(99, 64, 6, independence=0.5)
    blocks = np.ceil(1.98 * counts / 16).sum(axis=1).mean()
    assert float(load.row_blocks[16]) == pytest.approx(blocks, rel=0.02)
    assert float(load.busiest_expert_tokens) == pytest.approx(1.98 * counts.max(axis=1).mean(), rel=0.02)


@pytest.mark.parametrize("tokens", [1, 1_000_000])
@pytest.mark.parametrize("ep", [1, 8, 256])
def test_every_field_is_finite_from_one_token_to_a_million(tokens, ep):
    zipf = inclusion_from_weights(zipf_weights(256, 1.2), 8)
    for inclusion in (None, zipf):
        for name, value in fields(expected_load(tokens, 256, 8, ep=ep, inclusion=inclusion)):
            assert np.isfinite(value) and value >= 1, name


def test_degenerate_models_are_served():
    dense = expected_load(100, 1, 1)
    assert (float(dense.routed_pairs), float(dense.active_experts), float(dense.busiest_expert_tokens)) == (100, 1, 100)
    everything = expected_load(100, 8, 8, ep=4)
    assert (float(everything.routed_pairs), float(everything.active_experts)) == pytest.approx((200, 2))
    nothing = expected_load([0.0, 0.5, 1.0], 64, 6)
    assert nothing.routed_pairs == pytest.approx([0, 3, 6])
    assert nothing.active_experts == pytest.approx([0, 3, 6])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"inclusion": [0.5] * 8}, "sum to top_k = 2; got 8 that sum to 4"),
        ({"ep": 2, "placement": [0] * 8}, "placement must give each of 8 experts a rank 0..1"),
        ({"ep": 16}, "ep must be between 1 and num_experts = 8"),
        ({"independence": 0.0}, "independence must be above 0"),
        ({"num_groups": 3, "top_groups": 1}, "3 groups do not divide 8 experts"),
        ({"num_groups": 8, "top_groups": 1}, "1 groups of 1 experts cannot hold top_k = 2"),
    ],
)
def test_errors_say_what_would_be_right(arguments, words):
    with pytest.raises(SpecError, match=words):
        expected_load(4, 8, 2, **arguments)


def test_sixty_batch_sizes_take_milliseconds():
    tokens = np.geomspace(1, 65536, 60).round()
    zipf = inclusion_from_weights(zipf_weights(256, 1.0), 8)
    for inclusion, limit_s in ((None, 0.05), (zipf, 0.5)):  # ten times what a quiet core needs
        took = []
        for _ in range(5):
            start = time.process_time()
            expected_load(tokens, 256, 8, inclusion=inclusion)
            took.append(time.process_time() - start)
        assert min(took) < limit_s


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (256, 8)])
def test_blocks_of_ranks_that_hold_one_expert_follow_the_tallest_count(num_experts, top_k):
    """Their law is the count's own: within 3 % of drawn routings, and more tokens never mean fewer blocks."""
    tokens = np.array([90, 96, 98, 150, 300, 328, 334, 2000])
    load = expected_load(tokens, num_experts, top_k, ep=num_experts)
    for i, count in enumerate(tokens.tolist()):
        drawn = sample_load(np.random.default_rng(i), count, np.ones(num_experts), top_k, ep=num_experts, draws=400)
        for tile in TILES:
            assert load.row_blocks[tile][i] == pytest.approx(drawn.row_blocks[tile].mean(), rel=0.03)
    for tile in TILES:
        assert np.all(np.diff(load.row_blocks[tile]) >= 0)


def test_more_tokens_never_mean_fewer_blocks_on_ranks_of_few_experts():
    tokens = np.arange(1, 700)
    for num_experts, top_k, ep in ((8, 1, 4), (8, 2, 2), (16, 4, 8), (24, 3, 3), (32, 6, 16)):
        load = expected_load(tokens, num_experts, top_k, ep=ep)
        for tile in TILES:
            assert np.all(np.diff(load.row_blocks[tile]) >= -2e-4 * load.row_blocks[tile][1:]), (num_experts, ep, tile)


@pytest.mark.parametrize(("num_experts", "top_k", "ep"), [(8, 1, 4), (8, 2, 2), (16, 4, 8), (64, 6, 8)])
def test_blocks_of_ranks_that_hold_few_experts_follow_drawn_ones(num_experts, top_k, ep):
    for weights, within in ((np.ones(num_experts), 0.03), (zipf_weights(num_experts, 0.7), 0.045)):
        inclusion = inclusion_from_weights(weights, top_k)
        for count in (97, 193, 555):
            load = expected_load(count, num_experts, top_k, ep=ep, inclusion=inclusion)
            drawn = sample_load(np.random.default_rng(count), count, weights, top_k, ep=ep, draws=400)
            for tile in TILES:
                assert load.row_blocks[tile] == pytest.approx(drawn.row_blocks[tile].mean(), rel=within), (count, tile)
