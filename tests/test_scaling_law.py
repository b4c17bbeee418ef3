"""Scaling laws against the papers' own numbers, and the surrogate against the directions they found."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from simmoe import scaling_law as law
from simmoe.cli import main as cli
from simmoe.costs.work import parameters
from simmoe.errors import SpecError
from simmoe.planning import training
from simmoe.planning.offers import offer
from simmoe.specs.load import load_hardware
from simmoe.specs.workload import Lengths, Workload

BUDGET = 5.15e21


@pytest.mark.parametrize(
    ("active", "tokens", "granularity", "published"),
    [(100e6, 4.37e9, 8, 3.133), (1e9, 28.94e9, 16, 2.491), (7e9, 137.6e9, 32, 2.076)],
)
def test_krajewski_gives_the_losses_of_its_table_2(active, tokens, granularity, published):
    # about 43 N_active in all: attention is not repeated
    assert law.krajewski(43 * active, tokens, granularity) == pytest.approx(published, rel=0.01)


def test_clark_sees_a_small_model_with_many_experts_as_the_paper_does():
    # S-BASE, 5 M with 128 experts performs like a dense 55 M (section 1 of the paper)
    assert law.effective_parameters(5e6, 128) == pytest.approx(55e6, rel=0.1)
    assert law.routing_stops_helping("s-base") == pytest.approx(937e9, rel=0.1)


def test_chinchilla_spends_its_budget_as_published():
    # arXiv 2203.15556: 70 B parameters on 1.4 T tokens reach about 1.94 nats
    assert law.chinchilla(70e9, 1.4e12) == pytest.approx(1.937, abs=0.005)


@given(experts=st.floats(1, 1e5))
def test_experts_saturate(experts):
    start, most = 1.847, 314.478
    seen = law.saturated_experts(experts, start, most)
    assert start - 1e-9 <= seen <= most
    assert law.saturated_experts(1, start, most) == pytest.approx(start)
    assert law.saturated_experts(2 * experts, start, most) > seen


@given(size=st.floats(1e7, 1e11), experts=st.integers(1, 256))
def test_effective_parameters_of_a_dense_model_are_its_own(size, experts):
    assert law.effective_parameters(size, 1) == pytest.approx(size, rel=1e-6)
    assert law.effective_parameters(size, experts) >= size * (1 - 1e-9)


@given(budget=st.floats(1e19, 1e23), experts=st.sampled_from([1, 4, 8, 16, 32]), factor=st.floats(1.05, 10))
def test_the_loss_optimal_model_beats_its_neighbours_on_the_same_budget(budget, experts, factor):
    best = law.loss_optimal(budget, experts)
    assert law.training_flop(best.parameters, best.tokens) == pytest.approx(budget)
    for other in (best.parameters * factor, best.parameters / factor):
        assert law.surrogate(other, budget / (6 * other), experts) > best.loss


@given(experts=st.sampled_from([8, 16, 32]), budget=st.floats(1e20, 1e22))
def test_over_trained_models_are_smaller_and_just_reach_the_loss(experts, budget):
    four = law.loss_optimal(budget, 4)
    best, small = law.loss_optimal(budget, experts), law.over_trained(budget, experts, four.loss)
    assert small.parameters < best.parameters
    assert small.loss == pytest.approx(four.loss, abs=1e-6)
    assert small.tokens > best.tokens


def test_budget_and_loss_are_each_others_inverse():
    loss = law.loss_optimal(BUDGET, 8).loss
    assert law.budget_for(loss, 8) == pytest.approx(BUDGET, rel=1e-3)
    assert law.over_trained(BUDGET, 1, loss) is None
    with pytest.raises(SpecError, match="out of reach"):
        law.budget_for(1.0, 8)


def test_directions_of_the_paper_hold():
    four = law.loss_optimal(BUDGET, 4)
    # more experts reach the 4-expert loss with less compute, a dense model needs more
    shares = [law.budget_for(four.loss, experts) / BUDGET for experts in (1, 4, 8, 16, 32)]
    assert shares == sorted(shares, reverse=True) and shares[0] > 1 > shares[2]
    # over-trained 16- and 32-expert models are far smaller than their loss-optimal ones (70-85 % in the paper)
    for experts in (16, 32):
        small = law.over_trained(BUDGET, experts, four.loss)
        assert 0.1 < small.parameters / law.loss_optimal(BUDGET, experts).parameters < 0.4
    # at equal total size fewer experts reach the lower loss for a fixed ratio of tokens
    eight = law.of_size(BUDGET, 8, four.total)
    assert eight.parameters < four.parameters and eight.total == pytest.approx(four.total)


def test_total_size_is_the_papers():
    assert [round(law.total_parameters(1, e), 2) for e in (1, 4, 8, 16, 32)] == [1.0, 2.0, 3.33, 6.0, 11.33]


@pytest.mark.parametrize("experts", [1, 8])
@pytest.mark.parametrize("size", [7e8, 3e9, 2e10])
def test_the_served_shape_has_the_size_asked_for(size, experts):
    model = training.shape(size, experts)
    count = parameters(model)
    held = count.total - 2 * model.vocab * model.hidden
    assert held == pytest.approx(law.total_parameters(size, experts), rel=0.15)


def test_serving_cost_grows_with_the_model():
    sold = offer(load_hardware("a100-40gb"))
    traffic = Workload(rate=1, input=Lengths(mean=161), output=Lengths(mean=338))
    costs = [
        training.serving(law.of_size(BUDGET, 8, total), sold, traffic).usd_per_million_output_tokens
        for total in (3e9, 1e10, 6e10)
    ]
    assert costs == sorted(costs)
    assert training.serving(law.of_size(BUDGET, 8, 1e12), sold, traffic) is None


def test_command_lays_ours_beside_the_paper():
    result = CliRunner().invoke(cli.app, ["scaling", "--experts", "4,16", "--json"])
    data = json.loads(result.stdout)
    assert result.exit_code == 0
    assert "surrogate" in data["law"]
    assert {claim["direction_agrees"] for claim in data["claims"]} <= {True, False, None}
    assert data["choices"]["16"]["matched_serving"]["usd_per_million_output_tokens"] > 0
