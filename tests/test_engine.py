"""Laws of one step: faster devices, fewer experts, units, what is sent; and that the compiled table says the same."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simmoe.costs.operators import elementwise, nccl
from simmoe.costs.timing import kernel_times
from simmoe.engine.engine import Engine
from simmoe.engine.step import Batch, StepBreakdown, spread
from simmoe.engine.tabulate import step_table
from simmoe.errors import SpecError
from simmoe.specs.deployment import Deployment
from simmoe.specs.load import load_hardware, load_model

HARDWARE = {name: load_hardware(name) for name in ("h100", "h200", "a100", "l40s", "a800-pcie")}
MODELS = {
    name: load_model(name)
    for name in ("deepseek-v2-lite", "deepseek-v3", "qwen3-30b-a3b", "mixtral-8x7b", "llama-3.1-8b", "gpt-oss-20b")
}
ONE_RANK = {"gpus": 1}
LAYOUTS = (
    ONE_RANK,
    {"gpus": 8, "tp": 8},
    {"gpus": 4, "tp": 4, "ep": 4},
    {"gpus": 8, "tp": 1, "dp": 8, "ep": 8},
    {"gpus": 8, "tp": 2, "dp": 4, "ep": 8},
)
PARTS = len(StepBreakdown().parts)

few = settings(max_examples=40, deadline=None)


@st.composite
def engines(draw, layouts=LAYOUTS, models=tuple(MODELS)):
    model = MODELS[draw(st.sampled_from(models))]
    layout = draw(st.sampled_from(layouts)) if model.experts else {"gpus": 4}
    name = draw(st.sampled_from(["vllm", "sglang"]))
    return Engine(HARDWARE[draw(st.sampled_from(sorted(HARDWARE)))], model, Deployment(engine=name, **layout))


@st.composite
def batches(draw):
    decoding = draw(st.integers(0, 256))
    context = decoding * draw(st.integers(1, 8000))
    chunk = st.tuples(st.integers(1, 8192), st.integers(0, 8000))
    return Batch(decoding, context, tuple(draw(st.lists(chunk, min_size=0 if decoding else 1, max_size=3))))


def slower_device(hardware, factor, *, memory=1.0, peaks=1.0):
    """The device with its rates divided by ``factor`` to the powers given."""
    device = hardware.device
    known = {name: value for name, value in device.peak if value is not None}
    return device.vary(
        memory_bandwidth=device.memory_bandwidth / factor**memory,
        peak=device.peak.vary(**{name: value / factor**peaks for name, value in known.items()}),
    )


def slower_link(link, factor):
    return link and link.vary(bandwidth=link.bandwidth / factor, latency=link.latency * factor)


# ---- laws of a step ---------------------------------------------------------------------------------------------


@few
@given(engines(), batches(), st.floats(1.0, 10.0), st.sampled_from(["memory", "peaks", "link"]))
def test_more_bandwidth_or_flop_per_s_is_never_slower_in_any_part(engine, batch, factor, what):
    h = engine.hardware
    if what == "link":
        faster = h.vary(scale_up=h.scale_up.vary(bandwidth=h.scale_up.bandwidth * factor))
    else:
        other = {"memory": 0.0, "peaks": 0.0} | {what: 1.0}
        faster = h.vary(device=slower_device(h, 1.0 / factor, **other))
    before = engine.step(batch)
    after = Engine(faster, engine.model, engine.deployment).step(batch)
    for part, seconds in after.parts.items():
        assert seconds <= before.parts[part] * (1 + 1e-9), part
    if factor > 2 and what == "memory":
        assert after.total_s < before.total_s


@few
@given(engines(models=("deepseek-v2-lite", "deepseek-v3", "qwen3-30b-a3b", "mixtral-8x7b")), batches(), st.data())
def test_fewer_active_experts_are_never_slower_at_uniform_routing(engine, batch, data):
    native = engine.model.experts.top_k
    cap = data.draw(st.integers(1, native))
    before = engine.step(batch).parts
    after = Engine(engine.hardware, engine.model, engine.deployment.vary(active_experts=cap)).step(batch).parts
    for part in ("routed_experts", "dispatch", "combine"):
        assert after[part] <= before[part] * (1 + 1e-9)
    for part in ("attention", "projections", "router", "shared_experts", "head", "host"):
        assert after[part] == before[part]


def test_capping_experts_saves_time_where_experts_dominate():
    native, capped = (
        Engine(HARDWARE["h100"], MODELS["qwen3-30b-a3b"], Deployment(active_experts=cap)).step(Batch(16, 16 * 500))
        for cap in (8, 2)
    )
    assert capped.routed_experts_s < 0.7 * native.routed_experts_s


@few
@given(engines(), batches(), st.floats(0.1, 10.0))
def test_scaling_every_rate_and_latency_scales_every_part(engine, batch, factor):
    """A number of seconds hidden in a formula would not scale."""
    h = engine.hardware
    slow = h.vary(
        device=slower_device(h, factor),
        scale_up=slower_link(h.scale_up, factor),
        scale_out=slower_link(h.scale_out, factor),
    )
    scaled = Engine(slow, engine.model, engine.deployment, ScaledTimes(engine.times, slow, factor))
    p = engine.parameters
    scaled.__dict__["parameters"] = p.vary(
        host_time_per_step=p.host_time_per_step * factor, host_time_per_sequence=p.host_time_per_sequence * factor
    )
    before = engine.step(batch).parts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elementwise, "KERNEL_S", elementwise.KERNEL_S * factor)
        after = scaled.step(batch).parts
    for part, seconds in after.items():
        assert seconds == pytest.approx(factor * before[part], rel=1e-9), part


class ScaledTimes:
    """The same kernels on a device slower by a factor: fitted seconds longer, fitted rates lower."""

    def __init__(self, times, hardware, factor):
        self.notes = {}
        self.times, self.hardware, self.kernels = times, hardware, times.kernels
        self.power = {"s": factor, "B/s": 1.0 / factor}  # other units hold no time
        self.choose = times.choose

    def seconds(self, operator, features, *, cold=True, **variant):
        fit = self.times.choose(operator, variant)
        values = fit.values() if fit else operator.defaults
        scaled = {p.name: values[p.name] * self.power.get(p.unit, 1.0) for p in operator.parameters}
        seconds = operator.seconds(features, scaled, self.hardware, cold)
        return seconds, np.full(np.shape(seconds), 0.1)


@few
@given(engines(layouts=(ONE_RANK, {"gpus": 8, "tp": 8}, {"gpus": 8, "tp": 8, "ep": 8})), batches())
def test_one_expert_parallel_rank_sends_nothing(engine, batch):
    step = engine.step(batch)
    assert step.dispatch_s == 0
    assert step.combine_s == 0


def test_expert_parallel_ranks_with_own_attention_send_tokens_out_and_back():
    step = Engine(HARDWARE["h200"], MODELS["deepseek-v3"], Deployment(gpus=8, tp=1, dp=8, ep=8)).step(Batch(64, 64000))
    assert step.dispatch_s > 0
    assert step.combine_s > 0
    assert step.all_reduce_s == 0


def test_one_device_reduces_nothing_and_several_do():
    one, four = (
        Engine(HARDWARE["h100"], MODELS["mixtral-8x7b"], Deployment(gpus=n)).step(Batch(8, 800)) for n in (1, 4)
    )
    assert one.all_reduce_s == 0
    assert four.all_reduce_s > 0
    assert four.routed_experts_s < one.routed_experts_s


def test_tensor_parallel_ranks_sum_what_they_look_up_as_well():
    """Each has a part of the vocabulary (vLLM's VocabParallelEmbedding); a layer has two sums."""
    model = MODELS["mixtral-8x7b"]
    two, one = (model.vary(layers=n, moe_layers=n, published=None) for n in (2, 1))
    sums = [Engine(HARDWARE["h100"], m, Deployment(gpus=4)).step(Batch(8, 800)).all_reduce_s for m in (two, one)]
    assert sums[0] / sums[1] == pytest.approx(5 / 3)


def test_one_token_after_a_transferred_prompt_expands_no_latents():
    """A decode pool's newcomer brings its cache: its first token attends as a decode does, not as a prompt's chunk."""
    table = step_table(
        Engine(HARDWARE["h200"], MODELS["deepseek-v3"], Deployment(gpus=8, tp=8)), mean_context=8000, prompt_tokens=8000
    )
    assert table.prefill_per_cached_s > 0
    alone, two = ([table.step_s(Batch(0, 0, ((new, cached),))) for cached in (4000, 8000)] for new in (1, 2))
    assert alone[1] - alone[0] == pytest.approx(4000 * table.prefill_per_pair_s)
    assert two[1] - two[0] == pytest.approx(4000 * (2 * table.prefill_per_pair_s + table.prefill_per_cached_s))


@pytest.mark.parametrize("device", ["a100", "l40s", "h100"])
@pytest.mark.parametrize("prompt", [600, 8000])
def test_a_short_chunk_walks_over_its_cached_prefix(device, prompt):
    """FlashAttention 2 splits no keys of prompts: the table gave 16 tokens behind 8,000 half of their time."""
    alone = Engine(load_hardware(device), load_model("llama-3.1-8b"), Deployment())
    table = step_table(alone, mean_context=prompt + 100.0, prompt_tokens=float(prompt))
    for cached in (prompt, 8000):
        batch = Batch(prefill_chunks=((16, cached),))
        assert table.breakdown(batch, 1).attention_s == pytest.approx(alone.step(batch).attention_s, rel=0.2)


def test_over_nodes_ranks_reduce_as_nccl_does():
    """An engine's own all-reduce writes to its peers' memory, which ends at the node."""
    h100, model = HARDWARE["h100"], MODELS["deepseek-v3"]
    step = Engine(h100, model, Deployment(gpus=16, tp=16, engine="sglang")).step(Batch(1, 1000))
    message = nccl.features_of("all_reduce", np.array([2.0 * model.hidden]), 8)
    inside, _ = kernel_times(h100, "sglang").seconds(nccl.OPERATOR, message, operation="all_reduce")
    network = 2 * h100.scale_out.latency
    assert step.all_reduce_s > 2 * model.layers * (inside[0] + network)


@few
@given(engines(), st.integers(1, 200), st.integers(1, 4000))
def test_more_context_is_never_faster_and_touches_attention_alone(engine, requests, context):
    short, long = (engine.step(Batch(requests, requests * c)).parts for c in (context, 2 * context))
    assert long["attention"] >= short["attention"] * (1 - 1e-9)
    assert {p: s for p, s in long.items() if p != "attention"} == {p: s for p, s in short.items() if p != "attention"}


@given(*2 * [st.lists(st.floats(0, 1), min_size=PARTS, max_size=PARTS)])
def test_mixing_two_kinds_of_step_averages_their_totals(first, second):
    names = [f"{name}_s" for name in StepBreakdown().parts]
    a, b = (StepBreakdown(**dict(zip(names, values, strict=True))) for values in (first, second))
    assert a.mixed_with(b, 0.25).total_s == pytest.approx(0.75 * a.total_s + 0.25 * b.total_s)


def test_independent_parts_err_less_together_than_each():
    assert spread({"attention": 1.0, "head": 1.0}, {"attention": 0.1, "head": 0.1}) == pytest.approx(0.1 / 2**0.5)
    assert spread({"attention": 1.0}, {"attention": 0.1}) == pytest.approx(0.1)
    assert spread({}, {}) == 0


# ---- the compiled table -----------------------------------------------------------------------------------------


def table_of(name, hardware, layout, context=1024.0, prompt=1024.0):
    engine = Engine(HARDWARE[hardware], MODELS[name], Deployment(**layout))
    return engine, step_table(engine, mean_context=context, prompt_tokens=prompt)


COMPILED = [
    table_of("deepseek-v2-lite", "h100", ONE_RANK),
    table_of("qwen3-30b-a3b", "a100", {"gpus": 2}),
    table_of("deepseek-v3", "h200", {"gpus": 8, "tp": 1, "dp": 8, "ep": 8}),
    table_of("llama-3.1-8b", "l40s", ONE_RANK),
]
compiled = pytest.mark.parametrize(("engine", "table"), COMPILED, ids=lambda x: getattr(x, "model", x) and "")


@compiled
def test_table_agrees_with_the_engine_on_decode_steps(engine, table):
    for requests in (1, 2, 5, 8, 13, 37, 64, 100, 199, 256):
        for context in (512, 1024, 1536):
            batch = Batch(requests, requests * context)
            assert table.step_s(batch) == pytest.approx(engine.step(batch).total_s, rel=0.05), (requests, context)
            assert table.decode_s(requests, requests * context) == pytest.approx(table.step_s(batch), rel=1e-12)


@compiled
def test_table_agrees_with_the_engine_on_prompt_steps(engine, table):
    for requests in (0, 1, 30, 150):
        for chunk in (512, 700, 1024):
            batch = Batch(requests, requests * 1024, ((chunk, 0),))
            exact = engine.step(batch, 1).total_s
            assert table.step_s(batch, 1) == pytest.approx(exact, rel=0.05), (requests, chunk)


@compiled
def test_table_agrees_with_the_engine_on_chunks_behind_cached_tokens(engine, table):
    # MLA expands what is cached again for every chunk: a table of pairs alone told a quarter too little
    for chunk, cached in ((512, 512), (512, 2048), (1024, 4096), (512, 8192)):
        batch = Batch(0, 0, ((chunk, cached),))
        assert table.step_s(batch, 1) == pytest.approx(engine.step(batch).total_s, rel=0.06), (chunk, cached)


@compiled
def test_parts_of_the_tables_breakdown_add_up_to_its_time(engine, table):
    for batch in (Batch(1, 900), Batch(77, 77 * 1000), Batch(20, 20000, ((1024, 0),)), Batch(0, 0, ((512, 4096),))):
        finishing = len(batch.prefill_chunks)
        assert table.breakdown(batch, finishing).total_s == pytest.approx(table.step_s(batch, finishing), rel=1e-3)


def test_table_covers_what_the_deployment_allows():
    engine, table = COMPILED[0]
    assert table.max_requests == engine.deployment.max_num_seqs
    assert table.max_tokens >= engine.deployment.max_num_batched_tokens
    assert np.all(np.diff(table.head_s) >= 0)


def test_layers_with_a_window_cost_a_launch_and_their_window_however_long_the_prefix_is():
    layout = {"gpus": 1, "tp": 1}
    windowed = Engine(HARDWARE["h100"], load_model("gpt-oss-20b"), Deployment(**layout))
    attention = windowed.model.attention
    only = windowed.model.vary(attention=attention.vary(windowed_layers=windowed.model.layers))
    seconds = Engine(HARDWARE["h100"], only, Deployment(**layout)).prefill_attention(
        np.full(4, 64.0), np.array([0.0, 128.0, 8192.0, 131072.0])
    )
    assert np.all(seconds[1:] >= seconds[0] * (1 - 1e-9))  # a share of all pairs went to nothing, launches with it
    assert seconds[2] == pytest.approx(seconds[1])
    assert seconds[3] == pytest.approx(seconds[1])


# ---- what cannot be asked ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "changes", "says"),
    [
        ("deepseek-v2-lite", {"active_experts": 7}, "active_experts 7 exceeds the top-6 routing"),
        ("deepseek-v2-lite", {"total_experts": 65}, "exceeds the 64 experts"),
        ("deepseek-v2-lite", {"total_experts": 4, "active_experts": 6}, "exceeds the pool of 4"),
        ("deepseek-v2-lite", {"gpus": 4, "tp": 4, "ep": 4, "total_experts": 62}, "does not divide the 62 experts"),
        ("llama-3.1-8b", {"active_experts": 1}, "is dense"),
    ],
)
def test_caps_and_pools_the_model_cannot_have_are_refused_by_name(model, changes, says):
    with pytest.raises(SpecError, match=says):
        Engine(HARDWARE["h100"], MODELS[model], Deployment(**changes))


def test_pruned_pool_wakes_no_more_experts_than_it_has():
    full, pruned = (
        Engine(HARDWARE["h100"], MODELS["qwen3-30b-a3b"], Deployment(total_experts=n)).step(Batch(64, 64000))
        for n in (128, 32)
    )
    assert pruned.routed_experts_s < 0.5 * full.routed_experts_s
