"""Predictions for shipped hardware and models: laws, a sum by hand, honesty about what is borrowed or does not fit."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simmoe.costs.calibration import load
from simmoe.engine.engine import Engine
from simmoe.engine.step import Batch
from simmoe.errors import CapacityError, SaturationError
from simmoe.predict import default_caps, predict, predict_caps
from simmoe.specs.deployment import Deployment
from simmoe.specs.load import hardware_names, load_hardware, load_model, profile_names
from simmoe.specs.workload import Arrivals, Lengths, Prompts, Workload
from simmoe.steady.front_end import front_end_s

H100 = load_hardware("h100")
LITE = load_model("deepseek-v2-lite")
V3 = load_model("deepseek-v3")
QWEN = load_model("qwen3-30b-a3b")
few = settings(max_examples=25, deadline=None)


def work(input_tokens=1024, output_tokens=256, **loop):
    return Workload(
        input=Lengths(mean=input_tokens), output=Lengths(mean=output_tokens), **(loop or {"concurrency": 64})
    )


def faster(hardware, factor):
    device = hardware.device
    peaks = {name: value * factor for name, value in device.peak if value is not None}
    device = device.vary(memory_bandwidth=device.memory_bandwidth * factor, peak=device.peak.vary(**peaks))
    return hardware.vary(device=device)


loads = st.tuples(st.integers(16, 4096), st.integers(2, 1024), st.integers(1, 300))


# ---- laws -------------------------------------------------------------------------------------------------------


@few
@given(loads, st.floats(1.01, 4), st.sampled_from([LITE, QWEN]))
def test_a_faster_device_serves_more_and_answers_sooner(load, factor, model):
    inputs, outputs, clients = load
    workload = work(inputs, outputs, concurrency=clients)
    before = predict(H100, model, Deployment(), workload)
    after = predict(faster(H100, factor), model, Deployment(), workload)
    assert after.metrics.output_tokens_per_s > before.metrics.output_tokens_per_s
    assert after.metrics.tpot.mean < before.metrics.tpot.mean
    assert after.saturation_output_tokens_per_s > before.saturation_output_tokens_per_s


@few
@given(loads, st.integers(1, 6))
def test_fewer_active_experts_never_serve_less(load, cap):
    inputs, outputs, clients = load
    native, capped = predict_caps(H100, LITE, Deployment(), work(inputs, outputs, concurrency=clients), (6, cap))
    assert capped.metrics.output_tokens_per_s >= native.metrics.output_tokens_per_s * (1 - 1e-6)
    assert capped.saturation_output_tokens_per_s >= native.saturation_output_tokens_per_s * (1 - 1e-6)
    assert capped.memory.weights == native.memory.weights  # every expert stays loaded


@few
@given(loads)
def test_requests_in_the_system_are_throughput_times_their_time(load):
    inputs, outputs, clients = load
    predicted = predict(H100, LITE, Deployment(), work(inputs, outputs, concurrency=clients))
    metrics = predicted.metrics
    # clients wait for the engine and for the front end; nobody is anywhere else
    assert metrics.requests_per_s * metrics.e2e.mean == pytest.approx(clients, rel=1e-9)
    inside = metrics.e2e.mean - front_end_s(predicted.engine_parameters, metrics.mean_running, inputs)
    assert metrics.requests_per_s * inside == pytest.approx(metrics.mean_running + metrics.mean_waiting, rel=1e-9)
    assert metrics.output_tokens_per_s == pytest.approx(metrics.requests_per_s * outputs)
    assert metrics.total_tokens_per_s == pytest.approx(metrics.requests_per_s * (inputs + outputs))


@few
@given(loads)
def test_the_interval_holds_the_prediction(load):
    inputs, outputs, clients = load
    p = predict(H100, LITE, Deployment(), work(inputs, outputs, concurrency=clients))
    low, high = p.throughput_90
    assert low < p.metrics.output_tokens_per_s < high
    # 90 % of a normal distribution in the logarithm
    assert math.log(high / low) == pytest.approx(2 * 1.645 * p.log_sigma, rel=1e-3)
    assert 0.02 < p.log_sigma < 0.5


def test_an_open_loop_delivers_what_is_offered_and_its_interval_ends_there():
    p = predict(H100, LITE, Deployment(), work(rate=4.0))
    low, high = p.throughput_90
    assert p.metrics.requests_per_s == 4.0
    assert high == pytest.approx(4.0 * 256)
    assert low <= high
    assert p.bound == "offered rate"


@pytest.mark.parametrize("model", [LITE, QWEN, load_model("llama-3.1-8b")], ids=lambda m: m.name)
def test_one_request_takes_the_sum_of_its_steps(model):
    """Prefill of 500 tokens, then one decode step for each further token, each timed by the engine itself."""
    engine = Engine(H100, model, Deployment())
    by_hand = engine.step(Batch(0, 0, ((500, 0),))).total_s
    by_hand += sum(engine.step(Batch(1, 500 + i)).total_s for i in range(1, 64))
    metrics = predict(H100, model, Deployment(), work(500, 64, concurrency=1)).metrics
    in_front = front_end_s(engine.parameters, 1, 500)
    assert metrics.e2e.mean == pytest.approx(in_front + by_hand, rel=0.02)
    assert metrics.output_tokens_per_s == pytest.approx(64 / (in_front + by_hand), rel=0.02)


def test_the_mean_step_and_the_metrics_tell_the_same_time():
    p = predict(H100, LITE, Deployment(), work())
    assert p.breakdown.total_s == pytest.approx(p.metrics.mean_step_s, rel=0.05)


def test_memory_grows_with_the_requests_running():
    few_running, many = (predict(H100, LITE, Deployment(), work(concurrency=n)) for n in (1, 200))
    assert few_running.memory_used_bytes < many.memory_used_bytes <= H100.device.memory
    assert many.metrics.kv_utilisation > 50 * few_running.metrics.kv_utilisation


def test_twice_the_replicas_serve_twice_the_clients():
    one = predict(H100, LITE, Deployment(gpus=1, tp=1), work(concurrency=50)).metrics
    two = predict(H100, LITE, Deployment(gpus=2, tp=1), work(concurrency=100)).metrics
    assert two.output_tokens_per_s == pytest.approx(2 * one.output_tokens_per_s)
    assert two.tpot.p50 == pytest.approx(one.tpot.p50)


# ---- saturation and what does not fit ---------------------------------------------------------------------------


def test_a_saturated_cap_has_no_metrics_and_the_others_keep_theirs():
    native = predict(H100, LITE, Deployment(), work(rate=1.0)).saturation_output_tokens_per_s / 256
    saturated, capped = predict_caps(H100, LITE, Deployment(), work(rate=1.01 * native), (6, 2))
    assert saturated.metrics is None
    assert saturated.bound.startswith("saturated (")
    assert capped.metrics.requests_per_s == pytest.approx(1.01 * native)


def test_a_rate_beyond_every_cap_is_one_line_with_the_capacity():
    with pytest.raises(
        SaturationError, match=r"^--rate 1e\+06: .* saturates at [\d.]+ requests/s .*lower --rate"
    ) as caught:
        predict_caps(H100, LITE, Deployment(), work(rate=1e6), (6, 4))
    assert "\n" not in str(caught.value)
    native = predict(H100, LITE, Deployment(), work(rate=1.0)).saturation_output_tokens_per_s / 256
    assert f"saturates at {native:.4g} requests/s ({native:.4g} with 6, " in str(caught.value)


def test_answers_of_one_token_have_no_gaps():
    metrics = predict(H100, LITE, Deployment(), work(output_tokens=1, rate=1.0)).metrics
    assert math.isnan(metrics.tpot.p50)
    assert math.isnan(metrics.itl.p99)
    assert metrics.ttft.p50 > 0


@pytest.mark.parametrize("engine", ["vllm", "trtllm", "sglang"])
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize(("load", "most"), [((1024, 256, 64), 0.12), ((4096, 16, 2), 0.7)])
def test_the_front_end_costs_a_closed_loop_the_requests_its_clients_cannot_send(engine, replicas, load, most):
    """Few clients with long prompts and short answers lose most; two replicas share clients, not front ends."""
    inputs, outputs, clients = load
    deployment = Deployment(engine=engine, gpus=replicas)
    without = deployment.vary(
        engine_overrides={f"front_end_time{part}": 0.0 for part in ("", "_per_request", "_per_token")}
    )
    loaded = work(inputs, outputs, concurrency=replicas * clients)
    told, bare = (predict(H100, LITE, one, loaded).metrics for one in (deployment, without))
    assert told.requests_per_s * told.e2e.mean == pytest.approx(replicas * clients, rel=1e-9)
    assert 1 - most < told.requests_per_s / bare.requests_per_s < 1
    if clients == 2:
        assert told.requests_per_s < 0.9 * bare.requests_per_s


def test_a_model_that_does_not_fit_says_in_one_line_what_would():
    with pytest.raises(CapacityError) as caught:
        predict(H100, V3, Deployment(gpus=1), work())
    message = str(caught.value)
    assert "\n" not in message
    assert "DeepSeek-V3" in message
    assert "16" in message  # 671 GB in fp8 exceed eight devices of 80 GB; powers of two


def test_a_context_longer_than_the_cache_is_refused():
    small = load_hardware("l40s")
    with pytest.raises(CapacityError, match="KV cache"):
        predict(small, LITE, Deployment(memory_fraction=0.75), work(150_000, 10))


# ---- how sure ---------------------------------------------------------------------------------------------------


def test_a_calibrated_device_borrows_no_dense_products():
    p = predict(H100, LITE, Deployment(), work())
    assert not any("not calibrated" in note for note in p.notes)
    assert not any(note.startswith("gemm") and "default" in note for note in p.notes)


def test_a_device_without_calibration_borrows_and_is_less_sure():
    borrowed = predict(load_hardware("a800-pcie"), LITE, Deployment(), work())
    own = predict(load_hardware("a100"), LITE, Deployment(), work())
    assert any("is not calibrated: efficiencies of" in note for note in borrowed.notes)
    assert borrowed.log_sigma > own.log_sigma


def test_a_device_nobody_can_lend_to_uses_documented_defaults_and_says_so():
    stranger = H100.vary(name="stranger", calibration=None, nearest_calibration=None)
    p = predict(stranger, LITE, Deployment(), work())
    assert any("documented default efficiencies throughout" in note for note in p.notes)
    assert p.log_sigma > predict(H100, LITE, Deployment(), work()).log_sigma


def test_shapes_outside_the_measured_range_are_named_with_the_range():
    wide = LITE.vary(name="wide vocabulary", vocab=400_000)
    notes = predict(H100, wide, Deployment(), work()).notes
    assert any(note.startswith("gemm: n 400000 outside measured") for note in notes)


def test_every_calibrated_device_predicts_and_names_its_own_calibration():
    shipped = [load_hardware(name) for name in hardware_names()]
    named = {h.calibration for h in shipped} | {h.nearest_calibration for h in shipped}
    assert named - {None} <= set(profile_names())
    for hardware in shipped:
        if hardware.calibration:
            fitted = load(profile_names()[hardware.calibration])
            assert fitted.fits
            assert predict(hardware, LITE, Deployment(), work()).metrics.output_tokens_per_s > 0


# ---- caps and provenance ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "caps"), [(LITE, (6, 4, 3, 2)), (V3, (8, 6, 4, 2)), (QWEN, (8, 6, 4, 2))])
def test_default_caps_are_the_native_top_k_and_parts_of_it(model, caps):
    assert default_caps(model) == caps


def test_a_dense_model_has_one_row_and_no_cap():
    dense = load_model("llama-3.1-8b")
    (only,) = predict_caps(H100, dense, Deployment(), work(), default_caps(dense))
    assert only.active_experts == 0
    assert only.breakdown.routed_experts_s == 0


def test_the_same_question_has_the_same_answer_and_stamp():
    first, second = (predict(H100, LITE, Deployment(), work()) for _ in range(2))
    assert first == second
    assert first.provenance == second.provenance
    assert first.provenance != predict(H100, LITE, Deployment(active_experts=4), work()).provenance


def test_a_tail_the_closed_form_does_not_know_is_told_where_prompts_go_first():
    long = {"input": Lengths(mean=8000), "output": Lengths(mean=64)}
    most = predict(H100, LITE, Deployment(engine="sglang"), Workload(concurrency=64, **long))
    capacity = most.saturation_output_tokens_per_s / 64

    def told(share, engine):
        found = predict(H100, LITE, Deployment(engine=engine), Workload(rate=share * capacity, **long))
        return any("plays their queue" in note for note in found.notes)

    assert told(0.9, "sglang")
    assert not told(0.8, "sglang")
    assert not told(0.9, "vllm")


def test_traffic_that_the_closed_form_does_not_know_is_told():
    h100, lite, shape = load_hardware("h100"), load_model("deepseek-v2-lite"), {"input": Lengths(mean=512)}
    plain = Workload(rate=2.0, output=Lengths(mean=64), **shape)
    bursty = plain.vary(arrivals=Arrivals(kind="gamma", cv=3.0), prompts=Prompts(distinct=20))
    told = [set(predict(h100, lite, Deployment(), load).notes) for load in (bursty, plain)]
    assert {note.split(":")[0] for note in told[0] - told[1]} == {
        "arrivals gamma", "prompts that repeat or share heads",
    }  # fmt: skip
