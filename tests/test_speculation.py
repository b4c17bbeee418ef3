"""Speculative decoding: acceptance, steps a request takes, what verifying and drafting cost, what it gains."""

import json
from dataclasses import replace
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sim import constant_steps
from typer.testing import CliRunner

from simmoe.cli.main import app
from simmoe.costs.device_fit import footprint
from simmoe.costs.memory import kv_bytes_per_token, weights_per_device_bytes
from simmoe.engine.engine import Engine
from simmoe.engine.step import Batch
from simmoe.engine.tabulate import step_table
from simmoe.errors import CapacityError, SpecError
from simmoe.planning import launch
from simmoe.predict import compiled_for, predict
from simmoe.sim.acceptance import Acceptance
from simmoe.sim.cluster import simulate
from simmoe.specs.deployment import Deployment
from simmoe.specs.flags import deployment_from
from simmoe.specs.load import load_deployment, load_hardware, load_model
from simmoe.specs.speculative import Speculative, speculative_values
from simmoe.specs.workload import Lengths, Workload
from simmoe.steady.load_curve import decode_steps
from simmoe.validation.serving.speculative_rows import speculation

H200, V3, SMALL = load_hardware("h200"), load_model("deepseek-v3"), load_model("deepseek-v2-lite")
EIGHT = Deployment(gpus=8, engine="sglang")
few = settings(max_examples=25, deadline=None)


def mtp(drafts, length):
    return Speculative(method="mtp", draft_tokens=drafts, acceptance_length=length)


def ngram(drafts, length):
    return Speculative(method="ngram", draft_tokens=drafts, acceptance_length=length)


def closed(concurrency, inputs=1000, outputs=500):
    return Workload(concurrency=concurrency, input=Lengths(mean=inputs), output=Lengths(mean=outputs))


def output_rate(deployment, workload, model=V3, hardware=H200):
    return predict(hardware, model, deployment, workload).metrics.output_tokens_per_s


# ---- acceptance -------------------------------------------------------------------------------------------------


@given(st.floats(0, 1), st.integers(1, 8))
def test_acceptance_length_is_the_mean_over_all_ways_drafts_are_accepted(rate, drafts):
    """Leviathan et al., eq. 1, against every pattern of accepted and rejected drafts."""
    mean = 0.0
    for pattern in product((True, False), repeat=drafts):
        accepted = next((i for i, good in enumerate(pattern) if not good), drafts)
        chance = 1.0
        for good in pattern:
            chance *= rate if good else 1 - rate
        mean += chance * (accepted + 1)
    chosen = Speculative(method="ngram", draft_tokens=drafts, acceptance_rate=rate)
    assert float(chosen.tokens_per_step) == pytest.approx(mean, rel=5e-3)


@given(st.integers(1, 6), st.integers(0, 10**4))
def test_lengths_to_hundredths_are_met_exactly(drafts, share):
    length = Fraction(100 + share * drafts // 100, 100)
    chosen = ngram(drafts, float(length))
    assert chosen.tokens_per_step == length
    assert 1 <= chosen.tokens_per_step <= drafts + 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"draft_tokens": 1}, "exactly one of acceptance_length, acceptance_rate and acceptance_by_pos"),
        ({"draft_tokens": 2, "acceptance_by_position": [0.5]}, "has 1 shares for 2 draft_tokens"),
        ({"draft_tokens": 2, "acceptance_by_position": [0.5, 0.6]}, "shares from 1 to 0 that never rise"),
        ({"draft_tokens": 1, "acceptance_length": 1.5, "acceptance_rate": 0.5}, "exactly one"),
        ({"draft_tokens": 1, "acceptance_length": 2.1}, "exceeds the 2 tokens a step"),
        ({"draft_tokens": 1, "acceptance_length": 1.5, "method": "draft"}, "needs draft_model"),
        ({"draft_tokens": 1, "acceptance_length": 1.5, "draft_model": "qwen3-8b"}, "mtp and ngram take none"),
    ],
)
def test_contradictions_are_named(values, message):
    with pytest.raises(SpecError, match=message):
        Speculative(**{"method": "mtp", **values})


@settings(deadline=None)
@given(st.integers(1, 8), st.floats(0, 1))
def test_a_length_stands_for_the_rate_that_gives_it(drafts, rate):
    known = Speculative(method="ngram", draft_tokens=drafts, acceptance_rate=rate)
    length = 1 + sum(known.accepted)
    assert Speculative(method="ngram", draft_tokens=drafts, acceptance_length=length).accepted == pytest.approx(
        known.accepted, abs=1e-9
    )
    told = Speculative(method="ngram", draft_tokens=drafts, acceptance_by_position=known.accepted)
    assert told.tokens_per_step == known.tokens_per_step


def test_drawn_drafts_are_accepted_as_often_as_each_position_says():
    """And independently of each other from step to step, and alike for whoever asks again."""
    source = Acceptance(Speculative(method="mtp", draft_tokens=3, acceptance_by_position=(0.9, 0.5, 0.45)), key=7)
    drawn = np.array([source.tokens(request, 400) for request in range(100)])
    for position, share in enumerate((0.9, 0.5, 0.45), start=1):
        assert (drawn > position).mean() == pytest.approx(share, abs=4 * 0.5 / 200)
    assert abs(np.corrcoef(drawn[:, :-1].ravel(), drawn[:, 1:].ravel())[0, 1]) < 4 / 200
    assert source.tokens(5, 400) == drawn[5].tolist()
    assert len({tuple(row) for row in drawn.tolist()}) == 100


def test_sampled_acceptance_keeps_the_rate_and_spreads_requests():
    """Renewal theory: a request's decode steps vary by cv sqrt(tokens / length), a share that falls with its length."""
    step, tokens = 0.01, 241
    chosen = Speculative(method="ngram", draft_tokens=2, acceptance_by_position=(0.8, 0.4))
    workload = Workload(concurrency=4, input=Lengths(mean=1), output=Lengths(mean=tokens))
    tpot = {}
    for sampled in (False, True):
        deployment = Deployment(
            max_num_seqs=4, max_num_batched_tokens=16, speculative=chosen.vary(sampled=sampled), prefix_caching=False
        )
        table = replace(constant_steps(step, 16, 12), rows_per_decode=3)
        run = simulate(table, workload, deployment, 10**5, requests=800, keep_load=False, warmup=0.0)
        tpot[sampled] = run.requests.accepted().tpot_s
    assert tpot[False].std() < 0.01 * tpot[False].mean()
    assert tpot[True].mean() == pytest.approx(step / 2.2, rel=0.02)
    spread = np.sqrt(0.2 * 1.2**2 + 0.4 * 0.2**2 + 0.4 * 0.8**2) / 2.2  # coefficient of variation of 1, 2 or 3 tokens
    assert tpot[True].std() / tpot[True].mean() == pytest.approx(spread / np.sqrt((tokens - 1) / 2.2), rel=0.1)


def test_a_line_and_a_file_say_the_same(tmp_path):
    line = deployment_from(None, gpus=8, speculative="mtp:1,length=1.85")
    file = tmp_path / "deployment.yaml"
    file.write_text("gpus: 8\nspeculative: {method: mtp, draft_tokens: 1, acceptance_length: 1.85}\n")
    assert load_deployment(file) == line == Deployment(gpus=8, speculative=mtp(1, 1.85))
    assert deployment_from(file, speculative="none").speculative is None
    assert speculative_values("draft:4,rate=0.7,model=qwen3-8b")["draft_model"] == "qwen3-8b"
    for wrong, message in (("mtp", "begin with mtp"), ("mtp:1,depth=3", "not one of length=")):
        with pytest.raises(SpecError, match=message):
            deployment_from(None, speculative=wrong)


def test_models_without_a_prediction_layer_and_stages_refuse():
    with pytest.raises(SpecError, match="DeepSeek-V2-Lite has no multi-token-prediction layer"):
        predict(load_hardware("h100"), SMALL, Deployment(speculative=mtp(1, 1.5)), closed(4))
    unknown = Speculative(method="draft", draft_tokens=1, acceptance_rate=0.5, draft_model="nobody")
    with pytest.raises(SpecError, match=r"speculative.draft_model: model 'nobody' is not known"):
        predict(H200, V3, EIGHT.vary(speculative=unknown), closed(4))
    with pytest.raises(SpecError, match="pp above 1"):
        Deployment(gpus=2, tp=1, pp=2, speculative=ngram(1, 1.5))


# ---- steps of a request -----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(0, 100), st.integers(1, 60))
def test_a_request_takes_as_many_steps_as_its_tokens_over_the_acceptance_length(drafts, share, outputs):
    length = float(Fraction(100 + share * drafts, 100))
    chosen = ngram(drafts, length)
    deployment = Deployment(max_num_seqs=4, max_num_batched_tokens=64, speculative=chosen)
    table = constant_steps(0.25, tokens=64, requests=4)
    table = type(table)(**{**vars(table), "rows_per_decode": 1 + drafts})
    workload = Workload(concurrency=1, input=Lengths(mean=5), output=Lengths(mean=outputs))
    run = simulate(table, workload, deployment, 1000, requests=2, keep_load=False, warmup=0.0)
    steps = -(-(outputs - 1) // chosen.tokens_per_step)
    assert steps == decode_steps(workload.output, chosen.tokens_per_step)
    assert run.requests.finished_s - run.requests.first_token_s == pytest.approx([0.25 * steps] * 2)
    log = run.steps
    assert (log.decodes * log.steps + log.sampled).sum() == pytest.approx(2 * outputs)
    if outputs > 1:  # a chunk a step, whatever it holds: as vllm bench serve counts gaps
        assert run.metrics.itl.mean == pytest.approx(0.25)
        assert run.metrics.tpot.mean == pytest.approx(0.25 * steps / (outputs - 1))


# ---- what a step costs ------------------------------------------------------------------------------------------


@few
@given(st.integers(1, 60), st.integers(1, 4), st.integers(100, 6000), st.sampled_from(["v3", "lite"]))
def test_verified_rows_meet_products_and_experts_as_requests_do_but_share_a_read_of_the_cache(b, drafts, context, name):
    model, base = {"v3": (V3, EIGHT), "lite": (SMALL, Deployment())}[name]
    plain = Engine(H200, model, base)
    checked = Engine(H200, model, base.vary(speculative=ngram(drafts, 1.0))).step(Batch(b, b * context)).parts
    alone, many = (plain.step(Batch(n, n * context)).parts for n in (b, b * (1 + drafts)))
    for part in ("projections", "router", "routed_experts", "shared_experts", "dense_ffn", "all_reduce", "head"):
        assert checked[part] == pytest.approx(many[part], rel=1e-9), part
    assert alone["attention"] <= checked["attention"] * (1 + 1e-9)
    if b * context > 50_000:
        assert checked["attention"] < many["attention"]
    assert checked["draft"] == 0.0


def test_verifying_costs_attention_where_that_is_bound_by_products():
    """Latent attention of 128 heads is on an H20, which multiplies little for its bandwidth."""
    plain, checked = (
        Engine(load_hardware("h20"), V3, EIGHT.vary(tp=1, dp=8, ep=8, speculative=chosen)).step(Batch(256, 256 * 8000))
        for chosen in (None, ngram(1, 1.5))
    )
    assert 1.7 < checked.attention_s / plain.attention_s < 2.1


def test_more_experts_are_woken_and_alike_tokens_wake_fewer():
    """The price of verifying drafts in a MoE: with eight requests two drafts each wake almost three times as many."""

    def grown(**changes):
        base = EIGHT.vary(**changes)
        times = [
            Engine(H200, V3, base.vary(speculative=chosen)).step(Batch(4, 4000)).routed_experts_s
            for chosen in (None, ngram(2, 2.0))
        ]
        return times[1] / times[0]

    assert grown() > 1.5
    assert grown(routing={"independence": 0.1}) < grown() - 0.2


@pytest.mark.parametrize("drafts", [1, 3])
def test_drafting_with_a_model_costs_its_passes(drafts):
    small = load_model("qwen3-8b")
    chosen = Speculative(method="draft", draft_tokens=drafts, acceptance_rate=0.6, draft_model="qwen3-8b")
    found = Engine(H200, V3, EIGHT.vary(speculative=chosen)).step(Batch(16, 16 * 1000))
    alone = Engine(H200, small, Deployment(gpus=8, engine="sglang"))
    one = alone.step(Batch(16, 16 * 1000))
    checked = Engine(H200, small, Deployment(gpus=8, engine="sglang", speculative=ngram(drafts, 1.0)))
    wide = checked.step(Batch(16, 16 * 1000))
    passes = (wide.total_s - wide.host_s - wide.head_s) + (drafts - 1) * (one.total_s - one.host_s - one.head_s)
    assert found.draft_s == pytest.approx(passes + drafts * one.head_s, rel=1e-6)


def test_drafts_of_the_prediction_layer_cost_about_a_layer_each():
    plain = Engine(H200, V3, EIGHT).step(Batch(32, 32000))
    layers = plain.total_s - plain.host_s - plain.head_s
    one, three = (Engine(H200, V3, EIGHT.vary(speculative=mtp(d, 1.5))).step(Batch(32, 32000)) for d in (1, 3))
    assert layers / 61 < one.draft_s < 3 * layers / 61
    assert 2 * one.draft_s < three.draft_s < 4 * one.draft_s


def test_a_model_too_large_with_its_drafts_is_told_what_fits():
    with pytest.raises(CapacityError, match="Smallest that fits: 8 x"):
        footprint(V3, Deployment(gpus=4, speculative=mtp(1, 1.85)), H200)
    dense = load_model("llama-3.1-405b")
    with pytest.raises(CapacityError):
        footprint(dense, Deployment(gpus=1, speculative=ngram(1, 1.2)), H200)


def test_the_drafter_takes_memory():
    wide = Deployment(gpus=8, tp=1, pp=1, dp=8, ep=8, weight_precision="bfloat16")
    one = wide.vary(speculative=mtp(1, 1.85))
    added = weights_per_device_bytes(V3, one.vary(gpus=1, dp=1, ep=1)) - weights_per_device_bytes(
        V3, wide.vary(gpus=1, dp=1, ep=1)
    )
    copies = 2 * V3.vocab * V3.hidden  # the checkpoint repeats embedding and head, engines do not
    assert added / 2 + copies == pytest.approx(685e9 - 671e9, rel=0.05)
    assert kv_bytes_per_token(V3, one) / kv_bytes_per_token(V3, wide) == pytest.approx(62 / 61)
    small = Speculative(method="draft", draft_tokens=2, acceptance_rate=0.5, draft_model="qwen3-8b")
    rooms = [
        footprint(V3, EIGHT.vary(speculative=s), H200).kv_tokens for s in (None, ngram(2, 1.5), mtp(1, 1.5), small)
    ]
    assert rooms[0] == rooms[1] > rooms[2] > rooms[3]


@few
@given(
    st.sampled_from([ngram(2, 1.5), mtp(1, 1.85), mtp(3, 2.5)]),
    st.integers(0, 64),
    st.lists(st.sampled_from([100, 1000, 2000]), max_size=2),
)
def test_the_table_says_what_the_step_says_part_by_part(chosen, decoding, prompts):
    if decoding + len(prompts) == 0:
        return
    engine = Engine(H200, V3, EIGHT.vary(speculative=chosen))
    table = step_table(engine, mean_context=1500, prompt_tokens=1000)
    batch = Batch(decoding, decoding * 1500, tuple((n, 0) for n in prompts))
    step, told = engine.step(batch), table.breakdown(batch, len(prompts))
    assert told.total_s == pytest.approx(table.step_s(batch, len(prompts)), rel=0.01)
    assert told.total_s == pytest.approx(step.total_s, rel=0.06)
    assert told.draft_s == pytest.approx(step.draft_s, rel=0.25, abs=2e-5)


# ---- what it changes for users ----------------------------------------------------------------------------------


def test_accepted_drafts_raise_throughput_and_rejected_ones_lower_it():
    base = output_rate(EIGHT, closed(8))
    assert output_rate(EIGHT.vary(speculative=mtp(1, 1.85)), closed(8)) > 1.2 * base
    assert output_rate(EIGHT.vary(speculative=mtp(1, 1.0)), closed(8)) < 0.95 * base


@few
@given(st.integers(1, 3), st.floats(0, 1), st.floats(0, 1), st.sampled_from([2, 32, 400]))
def test_a_longer_acceptance_never_lowers_throughput(drafts, low, high, concurrency):
    low, high = sorted((low, high))
    rates = [
        output_rate(EIGHT.vary(speculative=mtp(drafts, 1 + share * drafts)), closed(concurrency))
        for share in (low, high)
    ]
    assert rates[1] >= rates[0] * (1 - 1e-3)


@settings(max_examples=12, deadline=None)
@given(st.sampled_from([mtp(1, 1.85), mtp(2, 2.4), ngram(4, 1.7)]), st.sampled_from([4, 24, 100]), st.integers(0, 99))
def test_closed_form_and_simulation_agree(chosen, concurrency, seed):
    deployment = EIGHT.vary(speculative=chosen, engine="vllm")
    sizes = (("input", 600), ("output", 200))
    lengths = {name: Lengths(kind="uniform", mean=m, low=m // 2, high=3 * m // 2) for name, m in sizes}
    workload = Workload(concurrency=concurrency, **lengths)
    parts = compiled_for(H200, V3, deployment, workload)
    run = simulate(parts.table, workload, deployment, parts.memory.kv_tokens, requests=20 * concurrency, seed=seed)
    told = predict(H200, V3, deployment, workload).metrics
    assert told.output_tokens_per_s == pytest.approx(run.metrics.output_tokens_per_s, rel=0.05)
    assert told.tpot.mean == pytest.approx(run.metrics.tpot.mean, rel=0.05)
    assert told.itl.mean == pytest.approx(run.metrics.itl.mean, rel=0.05)
    assert told.itl.mean > 1.2 * told.tpot.mean


def test_the_command_line_speculates_and_says_so():
    run = CliRunner().invoke(
        app, ["predict", "h200", "--model", "deepseek-v3", "--gpus", "8", "--speculative", "mtp:1,length=1.85"]
    )
    assert "speculative decoding (mtp, 1 draft token, 1.85 tokens a step)" in " ".join(run.stdout.split())
    assert "draft " in run.stdout
    words = ["h200", "--model", "deepseek-v3", "--gpus", "8", "--concurrency", "8", "--output", "100", "--json"]
    rates = []
    for extra in ([], ["--speculative", "mtp:1,length=1.85"]):
        told = json.loads(CliRunner().invoke(app, ["simulate", *words, "--requests", "40", *extra]).stdout)
        rates.append(told["metrics"]["output_tokens_per_s"])
    assert rates[1] > 1.15 * rates[0]


def test_launch_commands_ask_for_the_drafts():
    replica = EIGHT.vary(speculative=mtp(2, 2.4))
    assert '"num_speculative_tokens": 2, "method": "mtp"' in launch.vllm(V3, replica, H200)
    assert "--speculative-num-steps 2 --speculative-eagle-topk 1" in launch.sglang(V3, replica, H200)


@pytest.mark.parametrize(
    ("words", "source", "notes", "drafts", "length", "known"),
    [
        ("simulated mtp (60% acceptance, dummy attention slowdown)", "", "", 1, 1.6, "stated"),
        ("mtp (3-token window, accept 2.18)", "", "", 2, 2.18, "stated"),
        ("mtp steps=2 (accept ...)", "blog/2025-09-26-sglang-ant-group.md", "", 2, 2.55, "stated"),
        ("mtp steps=1", "elsewhere", "", 1, 1.875, "assumed"),
        ("mtp3", "", "", 3, 3.31, "assumed"),
        ("eagle/mtp", "", "--speculative-num-steps 1 --spec", 1, 1.875, "assumed"),
    ],
)
def test_measured_rows_tell_their_drafts(words, source, notes, drafts, length, known):
    chosen, how = speculation(words, source, notes)
    assert (chosen.draft_tokens, how) == (drafts, known)
    assert float(chosen.tokens_per_step) == pytest.approx(length, abs=0.005)


@pytest.mark.parametrize("words", ["unknown", "eagle/mtp", "yes"])
def test_rows_that_may_have_speculated_somehow_stay_out(words):
    assert speculation(words) is None
    assert speculation("none") == (None, "")
