"""Prefill and decode apart: counted, priced and confirmed on both sides, and competing with whole replicas."""

import json
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from simmoe.cli import main as cli
from simmoe.planning import disaggregated, launch, whatif
from simmoe.planning.objective import Limit
from simmoe.planning.offers import offer
from simmoe.planning.question import Question
from simmoe.planning.search import plan, screen_all
from simmoe.predict import compiled_for
from simmoe.report import plan as plan_report
from simmoe.sim.cluster import simulate
from simmoe.specs import load
from simmoe.specs.deployment import Deployment
from simmoe.specs.workload import Lengths, Workload

LITE, H100 = load.load_model("deepseek-v2-lite"), load.load_hardware("h100")


def asked(rate=40.0, prompt=2000, answer=100, ttft=1.0, tpot=0.02, **changes):
    known = {
        "models": (LITE,),
        "offers": (offer(H100, 3.0, name="h100"),),
        "workload": Workload(rate=rate, input=Lengths(mean=prompt), output=Lengths(mean=answer)),
        "limits": (Limit("ttft", "p99", ttft), Limit("tpot", "p99", tpot)),
        "replica_devices": 1,
        "requests": 300,
    }
    return Question(**{**known, **changes})


@cache
def apart(**changes):
    """The cheapest pair that simulation confirms."""
    question = asked(**changes)
    options = disaggregated.hopeful(screen_all(question)[0], question)
    option = min(options, key=lambda one: one.rank, default=None)
    while option is not None:
        option = option.simulated(question)
        if option.holds(question):
            return option
        option = disaggregated.grown(option, question)
    return None


def counts(option):
    return tuple(side.replicas for side in option.sides)


def test_both_sides_are_bought_and_the_objective_holds():
    one = apart()
    assert one.split
    assert min(counts(one)) >= 1
    assert one.usd_per_hour == 3.0 * one.devices == 3.0 * sum(side.deployment.gpus for side in one.sides)
    seen = one.confirmation.slow_metrics
    assert seen.ttft.p99 <= 1.0
    assert seen.tpot.p99 <= 0.02


def test_longer_prompts_ask_for_prefill_replicas_and_longer_answers_for_decode():
    prompts, answers = counts(apart(prompt=6000, answer=50)), counts(apart(prompt=200, answer=800))
    assert prompts[0] > answers[0]
    assert prompts[1] < answers[1]


@pytest.mark.parametrize(("tp", "dp"), [(8, 1), (1, 8), (2, 4)])
def test_a_prompt_is_computed_by_one_data_parallel_rank(tp, dp):
    """As in simulation: counted over all ranks, 30,000 tokens on eight ranks took a fifth of their time."""
    hardware, model = load.load_hardware("h200"), load.load_model("deepseek-v3")
    replica = Deployment(gpus=8, tp=tp, dp=dp, ep=8 if dp > 1 else 1, engine="sglang")
    workload = Workload(concurrency=1, input=Lengths(mean=30_000), output=Lengths(mean=2))
    layout = SimpleNamespace(
        offer=SimpleNamespace(hardware=hardware), model=model, replica=replica, grid=SimpleNamespace(log_sigma=[0.1])
    )
    parts = compiled_for(hardware, model, replica, workload)
    run = simulate(parts.table, workload, replica, parts.memory.kv_tokens, requests=5, seed=1, warmup=0.0)
    assert disaggregated._capacity(layout, workload).prompt_s == pytest.approx(run.metrics.ttft.mean, rel=0.1)


def test_spares_are_on_both_sides_and_budgets_are_kept():
    one = apart()
    question = asked(spares=1)
    spared = disaggregated.pair(one.sides[0].layout, one.sides[1].layout, counts(one), question)
    assert spared.devices == one.devices + 2
    poor = asked(budget_usd_per_hour=one.usd_per_hour - 0.01)
    assert disaggregated.pair(one.sides[0].layout, one.sides[1].layout, counts(one), poor) is None
    assert apart(tpot=1e-4) is None


def test_the_answer_is_never_dearer_for_having_the_choice():
    """Short answers to long prompts under a tight TPOT: mixed steps break it, decode replicas of their own hold it."""
    for changes in ({}, {"prompt": 6000, "tpot": 0.012}, {"prompt": 300, "answer": 300}):
        either, together = plan(asked(**changes)).answer, plan(asked(**changes, split=False)).answer
        assert either is not None
        assert together is None or either.usd_per_hour <= together.usd_per_hour
    assert plan(asked(prompt=6000, tpot=0.012)).answer.split


def test_a_split_answer_reads_in_words_and_says_what_would_change_it():
    found = plan(asked(prompt=6000, tpot=0.012))
    data = plan_report.plan_json(found)
    assert [side["role"] for side in data["answer"]["sides"]] == ["prefill", "decode"]
    assert data["answer"]["kind"] == "disaggregated"
    said = {change.change: change for change in whatif.changes(found)}
    assert said["one spare replica of each kind"].usd_per_hour > found.answer.usd_per_hour
    capped = [change for name, change in said.items() if "active experts instead of" in name]
    assert capped
    assert all(change.usd_per_hour <= found.answer.usd_per_hour for change in capped)
    assert whatif.changes(replace(found, answer=None)) == []


def test_what_simulation_turned_down_changes_no_answer():
    """A pair that broke a limit by far is not offered for a looser one that it breaks as well."""
    found = plan(asked(prompt=6000, tpot=0.012))

    def looser(tpot):
        loose = Limit("tpot", "p99", tpot)
        return replace(found.question, limits=tuple(loose if x.metric == "tpot" else x for x in found.question.limits))

    pair = disaggregated.hopeful(found.layouts, looser(0.0125))[0]
    assert not whatif.Market.of(replace(found, rejected=())).refuted(pair, looser(0.0125))
    seen = found.answer.confirmation
    late = replace(seen.slow_metrics, tpot=replace(seen.slow_metrics.tpot, p99=0.02))
    turned_down = replace(pair, confirmation=replace(seen, probability=0.6, slow_metrics=late))
    market = replace(whatif.Market.of(replace(found, rejected=(turned_down,))), growth=1.0)
    assert market.refuted(pair, found.question)
    assert market.refuted(pair, looser(0.0125))
    assert not market.refuted(pair, looser(0.021))
    assert not market.refuted(pair, replace(found.question, confidence=0.55))


def test_launch_lines_say_which_side_they_start():
    assert "--disaggregation-mode prefill" in launch.sglang(LITE, Deployment(), H100, "prefill")
    assert "--disaggregation-mode" not in launch.sglang(LITE, Deployment(), H100)
    assert "NixlConnector" in launch.vllm(LITE, Deployment(), H100, "decode")
    assert "--kv-transfer-config" not in launch.vllm(LITE, Deployment(), H100)


@pytest.mark.parametrize("flag", ["--split", "--no-split"])
def test_command_lets_them_compete_or_not(flag):
    words = ["plan", "--model", "deepseek-v2-lite", "--hardware", "h100", "--rate", "20", "--tpot-p99", "20ms",
             "--replica-gpus", "1", "--requests", "200", "--processes", "1", "--json", flag]  # fmt: skip
    data = json.loads(CliRunner().invoke(cli.app, words).stdout)
    kinds = {option["kind"] for option in (data["answer"], *data["runner_ups"], *data["rejected_by_simulation"])}
    assert ("disaggregated" in kinds) == (flag == "--split")
