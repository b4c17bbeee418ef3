"""Plans: the laws of a market (cheaper never loses, tighter never cheaper, more choice no worse), and their words."""

import json
import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from simmoe.cli import main as cli
from simmoe.errors import CapacityError, SpecError
from simmoe.planning import launch, runner, whatif
from simmoe.planning.co_located import cheapest
from simmoe.planning.confirm import Trial, confirm, scaled
from simmoe.planning.layouts import layouts
from simmoe.planning.objective import Limit, limits_from
from simmoe.planning.offers import offer, offers_from
from simmoe.planning.question import Question
from simmoe.planning.screen import LoadGrid, screen
from simmoe.planning.search import plan, screen_all
from simmoe.predict import compiled_for
from simmoe.report import plan as plan_report
from simmoe.specs import load
from simmoe.specs.deployment import Deployment
from simmoe.specs.workload import Lengths, Workload

H100, H200, L40S = (load.load_hardware(name) for name in ("h100", "h200", "l40s"))
LITE, V3 = load.load_model("deepseek-v2-lite"), load.load_model("deepseek-v3")
SLOW = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))


def question(rate=30.0, ttft=1.0, tpot=0.02, offers=None, **changes):
    return Question(
        models=(LITE,),
        offers=offers or (offer(H100, 3.0, name="h100"),),
        workload=Workload(rate=rate, input=Lengths(mean=600), output=Lengths(mean=120)),
        limits=(Limit("ttft", "p99", ttft), Limit("tpot", "p99", tpot)),
        **{"replica_devices": 2, "requests": 300, "split": False, **changes},
    )


@cache
def answered(rate=30.0, ttft=1.0, tpot=0.02, **changes):
    return plan(question(rate, ttft, tpot, **changes), runner_ups=0)


def grid(**changes):
    """A replica that carries 10 requests/s; TPOT 10 ms idle, growing with load; spread 10 %."""
    loads = np.linspace(0.1, 9.9, 50)
    known = {
        "requests_per_s": loads,
        "saturation_requests_per_s": 10.0,
        "latency_s": {("tpot", "p99"): 0.01 / (1 - loads / 10), ("ttft", "p99"): 0.1 + 0 * loads},
        "log_sigma": 0.1 + 0 * loads,
        "step_parts_s": {"attention": 0.01},
        "notes": (),
        "kv_tokens": 1000,
        "limit": "max_num_seqs",
    }
    return LoadGrid(**{**known, **changes})


# ---- slack and probability ------------------------------------------------------------------------------------------


def test_slack_solves_the_law_of_scaled_time():
    # f * 0.01 / (1 - 5 f / 10) = 0.05  =>  f = 10 / 7
    slack, binding = grid().slack(5.0, (Limit("tpot", "p99", 0.05),))
    assert slack == pytest.approx(0.05 / (0.01 + 0.5 * 0.05), rel=0.03)
    assert binding.startswith("TPOT p99")


def test_slack_of_a_loose_limit_ends_where_the_replica_saturates():
    assert grid().slack(5.0, (Limit("ttft", "p99", 100.0),)) == (pytest.approx(2.0, rel=0.02), "saturation")


def test_probability_is_a_half_where_the_prediction_just_holds():
    tpot = float(np.interp(5.0, grid().requests_per_s, grid().latency_s["tpot", "p99"]))
    assert grid().probability(5.0, (Limit("tpot", "p99", tpot),)) == pytest.approx(0.5, abs=0.05)


@given(rate=st.floats(0.5, 9.5), seconds=st.floats(0.012, 0.5), factor=st.floats(1.01, 3))
def test_a_looser_limit_or_a_lower_load_is_never_less_likely_to_hold(rate, seconds, factor):
    here = grid().probability(rate, (Limit("tpot", "p99", seconds),))
    assert grid().probability(rate, (Limit("tpot", "p99", seconds * factor),)) >= here - 1e-9
    assert grid().probability(rate / factor, (Limit("tpot", "p99", seconds),)) >= here - 1e-3


@given(rate=st.floats(1, 500), confidence=st.floats(0.5, 0.99))
def test_replicas_are_the_fewest_that_do(rate, confidence):
    limits = (Limit("tpot", "p99", 0.03),)
    count = grid().replicas(rate, limits, confidence, 10_000)
    assert grid().probability(rate / count, limits) >= confidence
    if count > max(1, math.ceil(rate / 10)):
        assert grid().probability(rate / (count - 1), limits) < confidence


def test_no_number_of_replicas_beats_a_limit_below_the_idle_latency():
    assert grid().replicas(5.0, (Limit("tpot", "p99", 0.005),), 0.9, 10_000) is None


def test_screened_latencies_scale_with_the_steps():
    limits = (Limit("tpot", "p99", 0.02),)
    workload = Workload(rate=5.0, input=Lengths(mean=600), output=Lengths(mean=120))
    one = screen(H100, LITE, Deployment(engine="generic"), workload, limits)
    two = screen(
        H100, LITE, Deployment(engine="generic", kernel_slowdown=2.0, host_time_per_step=1e-3), workload, limits
    )
    # kernels twice as slow, host time (0.5 ms) as well: everything takes twice as long at half the load
    assert two.saturation_requests_per_s == pytest.approx(one.saturation_requests_per_s / 2, rel=0.02)
    assert two.latency_s["tpot", "p99"] == pytest.approx(2 * one.latency_s["tpot", "p99"], rel=0.02)


# ---- the market -----------------------------------------------------------------------------------------------------


@SLOW
@given(price=st.floats(0.5, 2.9))
def test_a_cheaper_device_with_the_same_specs_is_never_ranked_below(price):
    offers = (offer(H100, 3.0, name="dear"), offer(H100, price, name="cheap"))
    assert plan(question(offers=offers), runner_ups=0).answer.offer.name == "cheap"


@SLOW
@given(st.sampled_from([0.2, 0.5, 1.0]), st.sampled_from([0.008, 0.012, 0.02, 0.03]), st.data())
def test_tightening_the_objective_never_lowers_the_price(ttft, tpot, data):
    tighter, split = data.draw(st.sampled_from([0.5, 0.8, 0.95])), data.draw(st.booleans())
    loose = answered(ttft=ttft, tpot=tpot, split=split).answer
    for tight in (
        answered(ttft=ttft * tighter, tpot=tpot, split=split).answer,
        answered(ttft=ttft, tpot=tpot * tighter, split=split).answer,
    ):
        assert tight is None or (loose is not None and tight.usd_per_hour >= loose.usd_per_hour)


@SLOW
@given(price=st.floats(0.3, 6), other=st.sampled_from([H200, L40S]), split=st.booleans())
def test_another_candidate_never_worsens_the_answer(price, other, split):
    fewer = answered(split=split).answer
    both = (offer(H100, 3.0, name="h100"), offer(other, price, name="o"))
    more = plan(question(offers=both, split=split), runner_ups=0).answer
    assert more.usd_per_hour <= fewer.usd_per_hour


def test_the_answer_is_the_cheapest_of_all_that_are_enumerated():
    asked = question(rate=60.0)
    found, _ = screen_all(asked)
    prices = [option.usd_per_hour for layout in found if (option := cheapest(layout, asked))]
    answer = answered(rate=60.0).answer
    assert answer.confirmation.confirms(0.9)
    # nothing cheaper was liked by screening unless simulation turned it down
    rejected = [option.usd_per_hour for option in answered(rate=60.0).rejected]
    assert min(prices) >= min([answer.usd_per_hour, *rejected])


def test_more_load_never_costs_less_and_confidence_has_its_price():
    prices = [answered(rate=rate).answer.usd_per_hour for rate in (10.0, 60.0, 240.0)]
    assert prices == sorted(prices)
    assert prices[-1] > prices[0]
    sure = answered(rate=240.0, confidence=0.99).answer
    assert sure.usd_per_hour >= answered(rate=240.0, confidence=0.5).answer.usd_per_hour
    assert sure.probability >= 0.99


def test_a_spare_is_one_replica_more_of_the_same_objective():
    with_spare = answered(spares=1).answer
    assert with_spare.devices == (with_spare.replicas + 1) * with_spare.layout.replica.devices_per_replica
    assert with_spare.usd_per_hour > answered().answer.usd_per_hour


def test_what_is_not_there_or_not_affordable_is_not_bought():
    unlimited = answered(rate=240.0).answer
    assert plan(question(rate=240.0, budget_usd_per_hour=unlimited.usd_per_hour - 0.01), runner_ups=0).answer is None
    scarce = (offer(H100, 3.0, name="few", available=unlimited.devices - 1),)
    assert plan(question(rate=240.0, offers=scarce), runner_ups=0).answer is None


def test_processes_do_not_change_the_answer():
    here, there = plan(question()), plan(question(), processes=2)
    assert plan_report.plan_json(here) == plan_report.plan_json(there)


def test_no_answer_is_said_and_the_nearest_is_marked_as_failing():
    found = answered(tpot=0.0005)
    assert found.answer is None
    text = plan_report.no_answer(found)
    assert "does NOT hold" in text and "TPOT p99 500 us" in text
    data = plan_report.plan_json(found)
    assert data["answer"] is None and data["closest"]["holds_objective"] is False


def test_too_few_devices_for_one_replica_are_said():
    scarce = plan(
        replace(question(offers=(offer(H100, 3.0, name="h100", available=8),)), models=(V3,), replica_devices=16)
    )
    assert scarce.answer is None
    assert "smallest replica that holds DeepSeek-V3 is 16 x h100, more than may be bought (8 x h100)" in (
        plan_report.no_answer(scarce)
    )


# ---- simulation -----------------------------------------------------------------------------------------------------


def trial(limit=0.02, **changes):
    return Trial(
        hardware=H100,
        model=LITE,
        deployment=Deployment(gpus=1),
        workload=Workload(rate=10.0, input=Lengths(mean=600), output=Lengths(mean=120)),
        limits=(Limit("tpot", "p99", limit),),
        log_sigma=0.1,
        requests=300,
        **{"confidence": 0.9} | changes,
    )


def test_confirmation_withstands_steps_as_slow_as_the_confidence_asks_for():
    done = confirm(trial())
    assert done.slow_factor == pytest.approx(math.exp(1.2816 * 0.1), rel=1e-3)
    assert done.slow_metrics.tpot.p99 > done.metrics.tpot.p99
    assert done.confirms(0.9) == (done.slow_metrics.tpot.p99 <= 0.02)


def test_a_limit_just_above_what_is_simulated_leaves_no_headroom():
    tight = confirm(trial()).metrics.tpot.p99 * 1.001
    done = confirm(trial(limit=tight))
    assert done.slack == pytest.approx(1.0, abs=0.06)
    assert not done.confirms(0.9)


def test_what_holds_as_predicted_holds_more_likely_than_not_whatever_confidence_is_asked():
    limit = confirm(trial()).metrics.tpot.p99 * 1.02
    sure, unsure = (confirm(trial(limit, confidence=confidence)) for confidence in (0.99, 0.6))
    assert not sure.confirms(0.99)
    assert min(sure.probability, unsure.probability) >= 0.5
    assert sure.probability == pytest.approx(unsure.probability, abs=0.1)


def test_scaled_tables_take_that_much_longer():
    table = compiled_for(H100, LITE, Deployment(), trial().workload).table
    assert scaled(table, 1.5).decode_s(8, 5000) == pytest.approx(1.5 * table.decode_s(8, 5000))


# ---- layouts, offers, objectives ------------------------------------------------------------------------------------


def test_layouts_are_cut_evenly_and_hold_the_model():
    feasible, refused = layouts(H100, V3, Deployment(), context_tokens=2500)
    assert {one.devices_per_replica for one in feasible} == {16, 32}
    assert all(V3.attention.heads % one.tp_size == 0 and one.tp_size <= 8 for one in feasible)
    assert any("needs 673 GB" in one.reason for one in refused)


def test_without_a_network_a_replica_stays_in_its_node():
    alone = H100.vary(scale_out=None)
    feasible, _ = layouts(alone, LITE, Deployment(), context_tokens=2500)
    assert max(one.devices_per_replica for one in feasible) == 8


def test_prices_are_the_users_or_the_middle_of_the_files_range():
    given_price, from_file = offers_from("h100,h200:64", ["h100=2.5"])
    assert (given_price.usd_per_device_hour, given_price.price_source) == (2.5, "given")
    assert from_file.usd_per_device_hour == pytest.approx((2.5 + 7) / 2)
    assert from_file.available == 64


@pytest.mark.parametrize(
    ("names", "prices", "words"),
    [
        ("h100", ["h200=2"], "h200"),
        ("h100", ["h100=x"], "h100=2.5"),
        ("h1000", [], "h100"),
        ("h100", ["h100=-1"], "above 0"),
    ],
)
def test_wrong_offers_are_one_line(names, prices, words):
    with pytest.raises(SpecError, match=words):
        offers_from(names, prices)


def test_limits_have_units_and_known_names():
    assert limits_from({"ttft-p99": "2s", "tpot-p50": None, "tpot-p99": "50 ms"}) == (
        Limit("ttft", "p99", 2.0),
        Limit("tpot", "p99", 0.05),
    )
    with pytest.raises(SpecError, match="--tpot-p99"):
        limits_from({"tpot-p99": "50"})


def test_runner_keeps_order_on_processes():
    assert list(runner.run(abs, [-3, 2, -1], processes=2)) == [3, 2, 1]


# ---- what is printed ------------------------------------------------------------------------------------------------


def test_launch_lines_carry_the_layout():
    wide = Deployment(gpus=16, tp=2, dp=8, ep=16, active_experts=6)
    vllm, sglang = launch.vllm(V3, wide, H200), launch.sglang(V3, wide, H200)
    assert "--tensor-parallel-size 2 --data-parallel-size 8" in vllm and "--enable-expert-parallel" in vllm
    assert "--tp-size 16 --dp-size 8 --enable-dp-attention --ep-size 16" in sglang and "--nnodes 2" in sglang
    assert vllm.startswith("vllm serve deepseek-ai/DeepSeek-V3 ")
    assert "--all2all-backend" not in vllm  # it gathers, unless told to do otherwise
    told = wide.vary(exchange=wide.exchange.vary(algorithm="deepep"))
    assert "--all2all-backend deepep_low_latency" in launch.vllm(V3, told, H200)
    assert "--all2all-backend deepep_high_throughput" in launch.vllm(V3, told, H200, role="prefill")
    for line in (vllm, sglang):
        assert '{"num_experts_per_tok": 6}' in line


def test_launch_lines_say_how_weights_come_to_their_number_format():
    for command in (launch.vllm, launch.sglang):
        assert "--quantization fp8" in command(LITE, Deployment(weight_precision="fp8"), H100)
        assert "--quantization" not in command(LITE, Deployment(weight_precision="bfloat16"), H100)
        assert command(LITE, Deployment(weight_precision="int4"), H100).endswith("# needs a checkpoint in int4")
        assert "--quantization" not in command(V3, Deployment(gpus=8), H200)  # published in fp8 blocks


def test_launch_lines_of_one_replica_over_nodes_leave_only_rank_and_address_to_each():
    two_nodes = launch.vllm(V3, Deployment(gpus=16, tp=16), H200)
    assert "--nnodes 2" in two_nodes and two_nodes.endswith(
        "--master-addr and --node-rank, all but the first --headless"
    )
    apart = launch.vllm(V3, Deployment(gpus=16, tp=2, dp=8, ep=16), H200)
    assert "--nnodes" not in apart and "--data-parallel-size-local 4" in apart


def test_changes_name_price_objective_spare_and_caps():
    two = (offer(H100, 3.0, name="h100"), offer(H200, 9.0, name="h200"))
    found = plan(question(rate=240.0, offers=two), runner_ups=2)
    said = {change.change: change for change in whatif.changes(found)}
    assert any(text.startswith("h200 below") for text in said)
    assert said["one spare replica"].usd_per_hour > found.answer.usd_per_hour
    assert any("active experts instead of 6" in text for text in said)


def run_cli(*words):
    return CliRunner().invoke(cli.app, ["plan", "--model", "deepseek-v2-lite", "--replica-gpus", "1", *words])


def test_command_answers_in_json():
    asked = ["--hardware", "h100", "--price", "h100=2", "--rate", "10", "--tpot-p99", "20ms"]
    result = run_cli(*asked, "--requests", "200", "--processes", "1", "--json")
    data = json.loads(result.stdout)
    assert result.exit_code == 0
    assert data["answer"]["usd_per_hour"] == 2 * data["answer"]["devices"]
    assert data["answer"]["simulated"]["probability"] >= 0.9
    assert data["answer"]["sides"][0]["launch"]["vllm"].startswith("vllm serve")


def test_drafted_tokens_reach_the_search_and_the_launch_lines():
    asked = [
        "--hardware",
        "h100",
        "--rate",
        "10",
        "--tpot-p99",
        "20ms",
        "--requests",
        "100",
        "--processes",
        "1",
        "--json",
    ]
    plain, drafted = (
        json.loads(run_cli(*asked, *more).stdout)["answer"] for more in ([], ["--speculative", "ngram:2,rate=0.7"])
    )
    assert drafted["simulated"]["metrics"]["tpot_s"]["p50"] < plain["simulated"]["metrics"]["tpot_s"]["p50"]
    assert "--speculative-config" in drafted["sides"][0]["launch"]["vllm"]


def test_command_fails_where_nothing_holds_the_objective():
    result = run_cli("--hardware", "h100", "--rate", "10", "--tpot-p99", "0.1ms", "--processes", "1")
    assert isinstance(result.exception, CapacityError)
    assert "No candidate carries 10 requests/s" in str(result.exception)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--hardware", "h100", "--rate", "10"], "objective"),
        (["--hardware", "h100", "--rate", "-1", "--tpot-p99", "20ms"], "rate"),
        (["--hardware", "h100", "--rate", "1", "--tpot-p99", "20ms", "--confidence", "1.5"], "confidence"),
        (["--hardware", "h100", "--rate", "1", "--tpot-p99", "20ms", "--cv", "-1"], "--cv -1"),
    ],
)
def test_wrong_questions_are_one_line(words, said):
    result = run_cli(*words)
    assert isinstance(result.exception, SpecError)
    assert said in str(result.exception) and "\n" not in str(result.exception)


def test_table_reads_in_words():
    from rich.console import Console

    console = Console(record=True, width=160)
    found = answered()
    console.print(plan_report.plan_table(replace(found)))
    text = console.export_text()
    for word in ("Buy ", "USD/h", "probability", "headroom", "bottleneck", "vllm serve", "sglang.launch_server"):
        assert word in text
