"""Pipeline stages: how layers are cut, the bubble against a slow pipeline played event by event, laws of a step."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simmoe.costs import pipeline
from simmoe.costs.device_fit import footprint
from simmoe.costs.memory import kv_bytes_per_token, weights_per_device_bytes
from simmoe.engine.engine import Engine
from simmoe.engine.step import Batch
from simmoe.engine.tabulate import step_table
from simmoe.errors import CoverageError
from simmoe.predict import compiled_for, predict
from simmoe.sim.cluster import simulate
from simmoe.specs.deployment import Deployment
from simmoe.specs.load import load_hardware, load_model
from simmoe.specs.workload import Lengths, Workload
from simmoe.steady.load_curve import load_curve
from simmoe.steady.state import steady_state

H200 = load_hardware("h200")
MODELS = {name: load_model(name) for name in ("deepseek-v3", "qwen3-30b-a3b", "llama-3.1-70b")}
few = settings(max_examples=30, deadline=None)


def staged(pp, tp=8, **changes):
    return Deployment(gpus=tp * pp, tp=tp, pp=pp, **changes)


def closed(concurrency, inputs=500, outputs=200):
    return Workload(concurrency=concurrency, input=Lengths(mean=inputs), output=Lengths(mean=outputs))


# ---- the law, against a pipeline played event by event ----------------------------------------------------------


def played(stage_s, micro_batches, rounds):
    """When each micro-batch leaves the last stage, round by round: stages serve in order, one at a time."""
    free = [0.0] * len(stage_s)
    ready = [0.0] * micro_batches
    left = []
    for _ in range(rounds):
        for i in range(micro_batches):
            for s, seconds in enumerate(stage_s):
                ready[i] = free[s] = max(ready[i], free[s]) + seconds
        left.append(list(ready))
    return left


@given(st.lists(st.floats(0.1, 5), min_size=1, max_size=6), st.integers(1, 12))
def test_a_drained_step_takes_as_long_as_the_pipeline_played(stage_s, micro_batches):
    column = np.array(stage_s)[:, None]
    assert pipeline.step_s(column, micro_batches, drained=True)[0] == pytest.approx(
        played(stage_s, micro_batches, 1)[0][-1]
    )


@given(st.lists(st.floats(0.1, 5), min_size=1, max_size=6), st.integers(1, 12))
def test_steps_that_follow_each_other_take_as_long_as_the_pipeline_played(stage_s, requests):
    """As many micro-batches in flight as stages; each comes back when it leaves. The first rounds settle."""
    in_flight = min(requests, len(stage_s))
    left = played(stage_s, in_flight, 60)
    cycle = (left[-1][0] - left[9][0]) / 50
    assert pipeline.step_s(np.array(stage_s)[:, None], in_flight)[0] == pytest.approx(cycle, rel=1e-6)


@given(st.integers(1, 16), st.integers(1, 16), st.floats(1e-3, 10))
def test_equal_stages_leave_gpipes_bubble_and_none_once_full(stages, micro_batches, seconds):
    even, in_flight = np.full((stages, 1), seconds), min(micro_batches, stages)
    bubble = (micro_batches + stages - 1) / micro_batches
    assert pipeline.step_s(even, micro_batches, drained=True)[0] == pytest.approx(bubble * micro_batches * seconds)
    assert pipeline.step_s(even, stages)[0] == pytest.approx(stages * seconds)
    for drained in (True, False):
        share = pipeline.prompt_share(np.array([float(in_flight)]), stages, drained=drained)[0]
        work = in_flight * stages * seconds  # of all layers on all micro-batches
        assert share == pytest.approx(pipeline.step_s(even, in_flight, drained=drained)[0] / work)


# ---- how layers are cut -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "sizes"), [(1, [61]), (2, [31, 30]), (4, [15, 15, 16, 15]), (3, [20, 21, 20])])
def test_layers_are_cut_as_vllm_cuts_them(count, sizes):
    cut = pipeline.stages(MODELS["deepseek-v3"], count)
    assert [stage.layers for stage in cut] == sizes
    assert [stage.dense_layers for stage in cut] == [3] + [0] * (count - 1)
    assert [stage.embeds for stage in cut] == [True] + [False] * (count - 1)
    assert [stage.samples for stage in cut] == [False] * (count - 1) + [True]


@given(st.sampled_from(sorted(MODELS)), st.integers(1, 24))
def test_every_layer_is_in_one_stage(name, count):
    model = MODELS[name]
    cut = pipeline.stages(model, count)
    assert sum(stage.layers for stage in cut) == model.layers
    assert sum(stage.moe_layers for stage in cut) == model.moe_layers
    assert max(stage.layers for stage in cut) - min(stage.layers for stage in cut) <= 1


def test_activations_take_the_network_where_stages_are_in_different_nodes():
    model, tokens = MODELS["deepseek-v3"], np.array([64.0])
    inside = pipeline.hand_over_s(model, staged(2, tp=4), H200, tokens)
    across = pipeline.hand_over_s(model, staged(2, tp=8), H200, tokens)
    assert inside[0] == across[0] == 0.0
    message = 64 * model.hidden * 2 * 2
    assert inside[1, 0] == pytest.approx(H200.scale_up.latency + message / 4 / H200.scale_up.bandwidth)
    assert across[1, 0] == pytest.approx(H200.scale_out.latency + message / 8 / H200.scale_out.bandwidth)
    with pytest.raises(CoverageError, match="pipeline stages lie in different nodes"):
        pipeline.hand_over_s(model, staged(2, tp=8), H200.vary(scale_out=None), tokens)


def test_the_fullest_stage_decides_memory():
    model = MODELS["llama-3.1-70b"]
    table = 2 * model.vocab * model.hidden
    ends, middle = (weights_per_device_bytes(model, staged(pp, tp=1)) for pp in (2, 80))
    whole = weights_per_device_bytes(model, staged(1, tp=1))
    layer = (whole - 2 * table) / 80
    assert ends == pytest.approx(40 * layer + table, rel=1e-3)
    assert middle == pytest.approx(layer + table, rel=1e-3)  # a layer, and the table of its end
    deepseek = MODELS["deepseek-v3"]
    for pp in (2, 4):
        held = weights_per_device_bytes(deepseek, staged(pp))
        assert weights_per_device_bytes(deepseek, staged(1)) / pp <= held
        assert kv_bytes_per_token(deepseek, staged(pp)) == -(-61 // pp) / 61 * kv_bytes_per_token(deepseek, staged(1))
        assert footprint(deepseek, staged(pp), H200).kv_tokens > footprint(deepseek, staged(1), H200).kv_tokens


# ---- laws of a step ---------------------------------------------------------------------------------------------


@st.composite
def batches(draw):
    decoding = draw(st.integers(0, 200))
    prompts = draw(st.lists(st.integers(16, 2000), min_size=0 if decoding else 1, max_size=5))
    return Batch(decoding, decoding * draw(st.integers(16, 4000)), tuple((n, 0) for n in prompts))


def engine(name, pp, **changes):
    return Engine(H200, MODELS[name], staged(pp, **changes))


@few
@given(st.sampled_from(sorted(MODELS)), batches(), st.sampled_from([2, 3, 4, 8]))
def test_a_step_is_never_shorter_than_without_bubbles(name, batch, pp):
    """At best every stage works all the time: as long as one device needs for a micro-batch of 1/pp of the batch."""
    step = engine(name, pp).step(batch)
    assert step.pipeline_s > 0
    assert engine(name, pp, pipeline="drained").step(batch).total_s >= step.total_s * (1 - 1e-9)
    chunks = len(batch.prefill_chunks)
    if not chunks:
        share = -(-batch.decode_requests // pp)
        alone = engine(name, 1).step(Batch(share, round(share * batch.decode_context_tokens / batch.decode_requests)))
        assert step.total_s >= alone.total_s * (1 - 1e-6)
    whole = engine(name, 1).step(batch)
    busy = whole.total_s - whole.host_s - whole.head_s - whole.attention_s
    ours = step.total_s - step.host_s - step.head_s - step.attention_s
    assert ours >= busy / pp * (1 - 1e-6)


@few
@given(st.sampled_from(sorted(MODELS)), st.integers(1, 8000), st.sampled_from([2, 4, 8]))
def test_a_request_alone_gains_nothing_from_stages(name, tokens, pp):
    one, many = engine(name, 1), engine(name, pp)
    for batch in (Batch(1, tokens), Batch(prefill_chunks=((tokens, 0),))):
        assert many.step(batch).total_s >= one.step(batch).total_s * (1 - 1e-6)


def test_nor_does_it_in_steady_state_while_many_do():
    rates = {
        (n, pp): predict(H200, MODELS["qwen3-30b-a3b"], staged(pp, tp=1), closed(n)).metrics.output_tokens_per_s
        for n in (1, 128)
        for pp in (1, 4)
    }
    assert rates[1, 4] < rates[1, 1]
    assert rates[128, 1] * 1.1 < rates[128, 4] < 4 * rates[128, 1]


@few
@given(st.sampled_from(sorted(MODELS)), batches())
def test_one_stage_changes_nothing(name, batch):
    one = engine(name, 1)
    table = step_table(one, mean_context=1000, prompt_tokens=500)
    assert one.step(batch).pipeline_s == 0.0
    assert table.prompts[0].shape[0] == 1
    assert (table.prompts[0][0] == table.token_s).all()
    assert table.prompts[1].tolist() == [1.0]
    assert table.detail.pipeline_s.max() == 0.0


def test_many_prompts_fill_the_stages_unless_each_step_drains_them():
    """Four equal prompts on four stages: a quarter of one device's time, 7/4 of that if the stages are emptied."""
    prompts = Batch(prefill_chunks=((2000, 0),) * 4)
    model = MODELS["llama-3.1-70b"]  # 80 layers
    whole, flowing, drained = (
        Engine(H200, model, staged(pp, tp=2, pipeline=kind)).step(prompts)
        for pp, kind in ((1, "continuous"), (4, "continuous"), (4, "drained"))
    )
    layers = [step.total_s - step.host_s - step.head_s for step in (whole, flowing, drained)]
    assert layers[1] == pytest.approx(layers[0] / 4, rel=0.1)
    assert layers[2] == pytest.approx(7 / 4 * layers[1], rel=0.05)


def test_unequal_stages_and_their_head_wait_for_the_fullest():
    found = Engine(H200, MODELS["deepseek-v3"], staged(8)).step(Batch(256, 256 * 1000))
    parts = {name: np.array([value]) for name, value in found.parts.items() if name not in ("pipeline", "draft")}
    times = pipeline.stage_times(parts, MODELS["deepseek-v3"], 8)[:, 0]
    assert times.sum() == pytest.approx(found.total_s - found.host_s - found.pipeline_s)
    lost = 8 * times.max() - times.sum()
    assert lost > 0.02 * found.total_s  # 61 layers on 8 stages: 7.6 each, the fullest has 8
    assert lost <= found.pipeline_s < 1.3 * lost


@few
@given(st.sampled_from(sorted(MODELS)), batches(), st.sampled_from([2, 4]), st.sampled_from(["continuous", "drained"]))
def test_the_table_says_what_the_step_says(name, batch, pp, kind):
    staged_engine = engine(name, pp, pipeline=kind)
    mean = batch.decode_context_tokens / batch.decode_requests if batch.decode_requests else 500
    chunk = np.mean([n for n, _ in batch.prefill_chunks]) if batch.prefill_chunks else 500
    table = step_table(staged_engine, mean_context=float(mean), prompt_tokens=float(chunk))
    chunks = len(batch.prefill_chunks)
    told = table.breakdown(batch, chunks)
    assert told.total_s == pytest.approx(table.step_s(batch, chunks), rel=0.01)
    assert told.total_s == pytest.approx(staged_engine.step(batch).total_s, rel=0.15)


@settings(max_examples=8, deadline=None)
@given(st.sampled_from([1, 6, 64]), st.sampled_from([2, 4]), st.integers(0, 99))
def test_closed_form_and_simulation_agree(concurrency, pp, seed):
    model = MODELS["qwen3-30b-a3b"]
    sizes = (("input", 600), ("output", 200))
    lengths = {name: Lengths(kind="uniform", mean=m, low=m // 2, high=3 * m // 2) for name, m in sizes}
    workload = Workload(concurrency=concurrency, **lengths)
    parts = compiled_for(H200, model, staged(pp, tp=1), workload)
    requests = max(60, 20 * concurrency)
    run = simulate(parts.table, workload, staged(pp, tp=1), parts.memory.kv_tokens, requests=requests, seed=seed)
    told = predict(H200, model, staged(pp, tp=1), workload).metrics
    assert told.output_tokens_per_s == pytest.approx(run.metrics.output_tokens_per_s, rel=0.06)


@pytest.mark.parametrize("engine_name", ["sglang", "vllm"])
@pytest.mark.parametrize(("pp", "prompt", "kind"), [(2, 8000, "fixed"), (2, 8192, "fixed"), (4, 8000, "fixed"),
                                                    (2, 8000, "uniform")])  # fmt: skip
def test_successive_prompts_of_a_batch_each_fill_the_stages(engine_name, pp, prompt, kind):
    """Closed form and simulation alike; 8,000 tokens overlapped in simulation alone, 8,192 in neither."""
    model, deployment = MODELS["qwen3-30b-a3b"], staged(pp, tp=1, engine=engine_name)
    varied = {"low": prompt // 2, "high": 3 * prompt // 2} if kind == "uniform" else {}
    load = Workload(concurrency=32, input=Lengths(kind=kind, mean=prompt, **varied), output=Lengths(mean=200))
    parts = compiled_for(H200, model, deployment, load)
    run = simulate(parts.table, load, deployment, parts.memory.kv_tokens, requests=192, seed=1).metrics
    curve = load_curve(parts.table, deployment, load, parts.memory.kv_tokens)
    told, _ = steady_state(curve, deployment, load, parts.memory.kv_tokens)
    assert told.output_tokens_per_s == pytest.approx(run.output_tokens_per_s, rel=0.1)
    if kind == "fixed":
        one = staged(1, tp=1, engine=engine_name)
        alone = compiled_for(H200, model, one, load)
        flat = simulate(alone.table, load, one, alone.memory.kv_tokens, requests=192, seed=1).metrics
        assert run.output_tokens_per_s > 0.6 * pp * flat.output_tokens_per_s


def test_steps_that_now_and_then_hold_two_prompts_are_between_those_of_one_and_of_two():
    """Two stages at 60 % load, 0.7 prompts a step: counted as one prompt each, requests took 1.65 times as long."""
    h100, dense, deployment = load_hardware("h100"), load_model("llama-3.1-8b"), Deployment(gpus=2, tp=1, pp=2)
    load = Workload(rate=56, input=Lengths(mean=512), output=Lengths(mean=128))
    told = predict(h100, dense, deployment, load).metrics
    parts = compiled_for(h100, dense, deployment, load)
    run = simulate(parts.table, load, deployment, parts.memory.kv_tokens, requests=3000, seed=1).metrics
    assert told.tpot.mean == pytest.approx(run.tpot.mean, rel=0.1)
