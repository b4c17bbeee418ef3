"""Throughput against quality: what is dominated is not on the front, and no score is made up."""

import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from simmoe.cli import main as cli
from simmoe.errors import MeasurementError, SpecError
from simmoe.planning.frontier import Policy, front, frontier, policies
from simmoe.report import frontier as frontier_report
from simmoe.specs import load
from simmoe.specs.deployment import Deployment
from simmoe.specs.workload import Lengths, Workload

H100 = load.load_hardware("h100")
LITE, QWEN, DENSE, KIMI = (
    load.load_model(name) for name in ("deepseek-v2-lite", "qwen3-30b-a3b", "qwen3-8b", "kimi-k2")
)
LOADED = Workload(concurrency=8, input=Lengths(mean=1024), output=Lengths(mean=1024))
MEASURED = Path(__file__).parents[1] / "validate" / "serving" / "yang2025_faster_moe_throughput.csv"
AVERAGE = "average of six"


@cache
def lite(price=None):
    chosen = policies(LITE, caps=[6, 5, 4, 2, 1], pools=[32])
    return frontier(H100, LITE, Deployment(), LOADED, chosen, loads=[8, 64], usd_per_device_hour=price)


@given(st.lists(st.tuples(st.floats(1, 1e4), st.floats(0, 100)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_dominates(points):
    flags = front(points)
    for one, flag in zip(points, flags, strict=True):
        dominated = any(o[0] >= one[0] and o[1] >= one[1] and o != one for o in points)
        assert flag == (not dominated)
    assert any(flags)


def test_scores_within_the_noise_count_as_equal():
    assert front([(100.0, 73.0), (110.0, 72.9), (120.0, 70.6)], noise=0.5) == [False, True, True]


def test_fewer_active_experts_are_faster_and_the_native_model_gains_nothing():
    for concurrency in (8, 64):
        here = [p for p in lite().points if p.load == concurrency and p.policy.total_experts is None]
        gains = [p.gain for p in here]
        assert gains[0] == 0
        assert gains == sorted(gains)


def test_caps_never_measured_have_no_score_and_are_on_no_front():
    (one,) = [p for p in lite().points if p.policy.active_experts == 1 and p.load == 8]
    assert one.scores == () and one.on_front == ()
    (five,) = [p for p in lite().points if p.policy.active_experts == 5 and p.load == 8]
    assert not five.score(AVERAGE).measured


def test_a_pool_is_scored_by_its_best_known_cut():
    pool = next(p for p in lite().points if p.policy.total_experts == 32)
    assert pool.score(AVERAGE).score == 57.8
    assert {s.score for s in pool.scores} == {37.7, 56.3, 57.8}


def test_cost_is_price_over_throughput():
    point = lite(price=3.6).points[0]
    assert point.usd_per_million_output_tokens == pytest.approx(1e6 * 3.6 / 3600 / point.tokens_per_s)


def test_a_refilled_cap_costs_little_speed_and_keeps_quality():
    chosen = policies(QWEN, caps=[8, 3], refill=True)
    found = frontier(H100, QWEN, Deployment(), LOADED, chosen, loads=[8])
    native, plain, refilled = found.points
    assert refilled.policy == Policy(active_experts=3, refill_to=8)
    assert native.tokens_per_s < refilled.tokens_per_s <= plain.tokens_per_s
    assert refilled.score("AIME24").score > plain.score("AIME24").score
    assert "AIME24" in refilled.on_front


def test_a_model_nobody_measured_gets_no_front_and_no_borrowed_score():
    found = frontier(
        load.load_hardware("h200"), KIMI, Deployment(gpus=16, tp=8, pp=2), LOADED, policies(KIMI), loads=[8]
    )
    assert found.benchmarks == () and all(p.on_front == () for p in found.points)
    console = Console(record=True, width=200)
    console.print(frontier_report.frontier_table(found))
    assert "No quality was measured for Kimi-K2" in console.export_text()


def test_a_dense_model_has_nothing_to_vary():
    with pytest.raises(SpecError, match="dense"):
        policies(DENSE)


def test_measured_gains_stand_beside_ours_for_the_same_load_lengths_and_devices():
    a800 = load.load_hardware("a800-pcie")
    found = frontier(a800, LITE, Deployment(gpus=2, tp=2), LOADED, policies(LITE, caps=[6, 4]), loads=[8])
    measured = frontier_report.read_measured(MEASURED, found)
    capped = found.points[1]
    expected = measured[8, 4, 64] / measured[8, 6, 64] - 1
    assert frontier_report.measured_gain(found, capped, measured) == pytest.approx(expected)
    assert frontier_report.read_measured(MEASURED, lite()) == {}  # measured on two devices, asked for one


def test_command_prints_json_and_draws(tmp_path):
    picture = tmp_path / "frontier.png"
    words = [
        "frontier",
        "h100",
        "--concurrency",
        "8,64",
        "--caps",
        "6,4",
        "--pools",
        "32",
        "--plot",
        str(picture),
        "--json",
    ]
    result = CliRunner().invoke(cli.app, words)
    data = json.loads(result.stdout)
    assert result.exit_code == 0 and picture.stat().st_size > 10_000
    assert len(data["points"]) == 2 * 3
    assert data["points"][0]["scores"][0]["source"]


def test_a_plot_of_an_unknown_benchmark_says_what_is_known(tmp_path):
    with pytest.raises(MeasurementError, match=AVERAGE):
        frontier_report.plot(lite(), tmp_path / "x.png", "MMLU")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("frontier h100 --concurrency 8,nan", "--concurrency '8,nan': every number must be above 0 and finite"),
        ("frontier h100 --concurrency 8,0.2", "--concurrency '8,0.2': give whole numbers with commas"),
        ("frontier h100 --pools 48.5", "--pools '48.5': give whole numbers with commas"),
        ("plan --hardware h100 --rate 5 --ttft-p99 2s --budget nan", "--budget nan: give USD per hour"),
        ("plan --hardware h100 --rate 5 --ttft-p99 2s --seed -1", "--seed -1: a seed is 0 or more"),
        ("plan --hardware h100 --rate 5 --ttft-p99 1e400s", "--ttft-p99: "),
        (
            "alternatives v100 --precision fp8",
            "none of the alternatives can be served; the first: precision fp8: NVIDIA",
        ),
        ("frontier h100 --rate 1,inf", "--rate '1,inf': every number must be above 0 and finite"),
        ("plan --hardware h100 --rate 5 --ttft-p99 2s --cv nan", "--cv nan: a coefficient of variation is 0"),
    ],
)
def test_numbers_that_are_none_are_told_by_their_flag(words, says):
    problem = CliRunner().invoke(cli.app, words.split()).exception
    assert isinstance(problem, SpecError)
    assert str(problem).startswith(says)
