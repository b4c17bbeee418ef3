"""Operator models of CPUs: laws, what a fit recovers, and which device gets which model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmoe.calibrate.fit import calibrate_operator, samples
from simmoe.costs.operators import bmm, experts, gemm, gqa, mla
from simmoe.costs.operators.host import is_host, operator_on
from simmoe.costs.operators.host_attention import HOST_MLA_DECODE, HOST_MLA_PREFILL
from simmoe.costs.operators.host_glue import HOST_GLUE, layer_features, step_features
from simmoe.costs.operators.host_products import HOST_GEMM, HOST_MOE, VECTOR_ROWS, packed_share
from simmoe.costs.operators.registry import operator_of
from simmoe.costs.timing import kernel_times
from simmoe.engine.engine import Engine
from simmoe.engine.step import Batch
from simmoe.errors import CalibrationError
from simmoe.routing.expert_load import expected_load
from simmoe.specs.deployment import Deployment
from simmoe.specs.hardware import Hardware
from simmoe.specs.load import load_hardware, load_model
from simmoe.specs.measurement import Table

CPU = Hardware.model_validate(
    {
        "name": "test_cpu",
        "device": {
            "name": "some CPU",
            "architecture": "cpu",
            "memory": 32e9,
            "memory_bandwidth": 15e9,
            "peak": {"bfloat16": 1e12, "float32": 180e9},
            "sms": 1,
            "source": "made up",
        },
        "devices_per_node": 1,
        "scale_up": {"bandwidth": 15e9, "latency": 5e-6},
    }
)
F32 = {"weight_bytes": 4.0, "activation_bytes": 4.0, "compute_bits": 32.0}
sizes = st.integers(1, 4096)


def product(m, n, k):
    return HOST_GEMM.seconds(gemm.features_of(m, n, k, **F32), HOST_GEMM.defaults, CPU, True)  # noqa: FBT003


def layer(tokens, cap, experts_of_layer=48):
    load = expected_load(np.atleast_1d(np.asarray(tokens, dtype=float)), experts_of_layer, cap)
    features = experts.features_of(
        load, hidden=512, inter=512, top_k=cap, num_experts=experts_of_layer, matrices=3, **F32
    )
    return HOST_MOE.seconds(features, HOST_MOE.defaults, CPU, True)  # noqa: FBT003


def table(**columns):
    arrays = {name: np.asarray(value) for name, value in columns.items()}
    return Table(None, arrays, len(next(iter(arrays.values()))))


@given(sizes, sizes, sizes, st.integers(1, 3))
def test_a_larger_product_never_takes_less(m, n, k, factor):
    base = product(m, n, k)
    assert base > 0
    for bigger in ((m * factor, n, k), (m, n * factor, k), (m, n, k * factor)):
        assert product(*bigger) >= base


@given(sizes, sizes)
def test_packing_comes_with_the_third_row(n, k):
    two, three, four = (float(product(rows, n, k)) for rows in (VECTOR_ROWS, VECTOR_ROWS + 1, VECTOR_ROWS + 2))
    packing = HOST_GEMM.defaults["packing"] * 4.0 * n * k / (HOST_GEMM.defaults["memory_efficiency"] * 15e9)
    assert (three - two) - (four - three) == pytest.approx(packing)


@given(st.integers(1, 512), st.integers(1, 5))
def test_one_more_active_expert_a_token_takes_longer(tokens, cap):
    assert layer(tokens, cap) < layer(tokens, cap + 1)


def test_the_share_of_packed_experts_is_that_of_drawn_routings():
    rng = np.random.default_rng(0)
    for tokens in (4, 16, 64, 256):
        counts = np.stack(
            [np.bincount(rng.random((tokens, 48)).argsort(axis=1)[:, :6].ravel(), minlength=48) for _ in range(200)]
        )
        drawn = (counts > VECTOR_ROWS).sum() / (counts > 0).sum()
        share = packed_share({"pairs": np.array([6.0 * tokens]), "local_experts": np.array([48.0])})
        assert float(share[0]) == pytest.approx(drawn, abs=0.06)  # pairs of a token are of different experts


def test_two_prompts_take_twice_what_one_does_but_for_starting():
    one, two = (mla.prefill_features(b, 128.0, 4.0, compute_bits=32.0) for b in (1.0, 2.0))
    p = HOST_MLA_PREFILL.defaults
    first, both = (HOST_MLA_PREFILL.seconds(f, p, CPU, True) for f in (one, two))  # noqa: FBT003
    assert both - p["call"] == pytest.approx(2 * (first - p["call"]))


def test_a_longer_context_takes_longer_in_proportion():
    def time(context):
        f = mla.decode_features(4.0, context, 4.0, kv_bytes=4.0, compute_bits=32.0)
        return float(HOST_MLA_DECODE.seconds(f, HOST_MLA_DECODE.defaults, CPU, True))  # noqa: FBT003

    assert time(300.0) - time(200.0) == pytest.approx(time(200.0) - time(100.0))
    assert time(200.0) > time(100.0)


def test_only_a_cpu_gets_a_cpu_s_models():
    assert is_host(CPU)
    assert not is_host(load_hardware("h100"))
    for operator in (gemm.OPERATOR, bmm.OPERATOR, experts.MOE, mla.MLA_PREFILL, mla.MLA_DECODE):
        assert operator_on(operator, load_hardware("h100")) is operator
        assert operator_on(operator, CPU).name == f"host_{operator.name}"
    assert operator_on(gqa.ATTENTION_DECODE, CPU) is gqa.ATTENTION_DECODE


def test_kernel_times_of_a_cpu_are_its_own_and_torch_s():
    times = kernel_times(CPU, "vllm")
    features = gemm.features_of(64.0, 512.0, 512.0, **F32)
    seconds, _ = times.seconds(gemm.OPERATOR, features, dtype="float32", framework="trtllm")
    assert float(seconds) == pytest.approx(float(product(64, 512, 512)))
    assert times.framework == "torch"


def test_float32_rows_are_counted_as_four_bytes_and_32_bits():
    products = gemm.features(table(m=[8.0], n=[64.0], k=[32.0], dtype=["float32"]))
    absorbed = bmm.features(table(operation=["mla_gen_pre"], num_tokens=[4.0], num_heads=[4.0], dtype=["float32"]))
    for features in (products, absorbed):
        assert features["weight_bytes"] == features["activation_bytes"] == 4.0
        assert features["compute_bits"] == 32.0
        assert features["quantise"] == 0.0
    attention = {"batch_size": [2.0], "num_heads": [4.0], "kv_cache_dtype": ["float32"]}
    decode = mla.MLA_DECODE.features(table(context_tokens=[128.0], **attention))
    prefill = mla.MLA_PREFILL.features(table(prompt_tokens=[128.0], **attention))
    assert decode["kv_element_bytes"] == prefill["kv_element_bytes"] == 4.0
    assert decode["compute_bits"] == prefill["compute_bits"] == 32.0


def moe_table(**extra):
    row = {
        "framework": "torch", "version": "2", "kernel_source": "loop", "dtype": "float32", "hidden_size": 512.0,
        "expert_inter_size": 512.0, "num_experts": 48.0, "gated": 1.0, "moe_tp_size": 1.0, "moe_ep_size": 1.0,
        "routing_distribution": "uniform",
    }  # fmt: skip
    pairs = [(cap, tokens) for cap in (1, 2, 4, 6) for tokens in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)]
    columns = {name: [value] * len(pairs) for name, value in row.items()}
    return table(**columns, top_k=[float(c) for c, _ in pairs], num_tokens=[float(t) for _, t in pairs], **extra)


def test_the_active_experts_that_were_counted_go_before_the_expected_ones():
    expected = HOST_MOE.features(moe_table())["active_experts"]
    counted = HOST_MOE.features(moe_table(active_experts=expected + 0.5))["active_experts"]
    assert np.allclose(counted, expected + 0.5)


def test_a_fit_recovers_what_made_the_rows():
    true = {**HOST_MOE.defaults, "packing": 1.6, "memory_efficiency": 0.6, "compute_efficiency": 0.5}
    features = HOST_MOE.features(moe_table())
    noise = np.exp(0.02 * np.random.default_rng(1).standard_normal(40))
    rows = moe_table(latency_us=1e6 * HOST_MOE.seconds(features, true, CPU, True) * noise)  # noqa: FBT003
    (sample,) = samples(HOST_MOE, rows)
    fit = calibrate_operator(HOST_MOE, sample, CPU, "made up", folds=4)
    assert fit.held_out_mape_percent < 4.0
    for name in ("memory_efficiency", "compute_efficiency"):
        assert fit.parameters[name].value == pytest.approx(true[name], rel=0.1)


def test_glue_rows_are_recognised_and_told_apart_by_part():
    rows = table(
        part=["layer", "step"], framework=["torch"] * 2, dtype=["float32"] * 2, model_like=["x"] * 2,
        hidden_size=[512.0] * 2, num_heads=[4.0] * 2, vocab_size=[8192.0] * 2, num_tokens=[16.0] * 2,
    )  # fmt: skip
    assert operator_of(rows) is HOST_GLUE
    of_layer, of_step = HOST_GLUE.features(rows)["touched_bytes"]
    assert of_layer == layer_features(16.0, 512.0, 4.0, 4.0)["touched_bytes"]
    assert of_step == step_features(16.0, 8192.0)["touched_bytes"] == 16 * 8192 * 4


def test_a_step_on_a_cpu_counts_measured_glue_instead_of_small_kernels():
    model = load_model("simmoe-live-48e")
    deployment = Deployment(
        weight_precision="float32", kv_precision="float32", engine="generic", host_time_per_step="100 us",
        max_num_seqs=16, max_num_batched_tokens=256,
    )  # fmt: skip
    engine = Engine(CPU, model, deployment)
    step = engine.step(Batch(decode_requests=8, decode_context_tokens=8 * 128))
    one = HOST_GLUE.seconds(layer_features(8.0, 512.0, 4.0, 4.0), HOST_GLUE.defaults, CPU, True)  # noqa: FBT003
    assert step.elementwise_s == pytest.approx(4 * float(one))
    around = HOST_GLUE.seconds(step_features(8.0, 8192.0), HOST_GLUE.defaults, CPU, True)  # noqa: FBT003
    assert step.head_s == pytest.approx(float(product(8, 8192, 512)) + float(around))
    assert 0.005 < step.total_s < 0.5
    fewer = Engine(CPU, model, deployment.vary(active_experts=2)).step(Batch(8, 8 * 128))
    assert fewer.routed_experts_s < 0.6 * step.routed_experts_s
    assert not any("bfloat16" in note for note in engine.times.notes)


def test_an_engine_of_gpus_hides_nothing_under_a_cpu_s_experts_and_brings_none_of_its_kernels():
    model, batch = load_model("simmoe-live-48e"), Batch(decode_requests=8, decode_context_tokens=8 * 128)
    plain, engine = (
        Engine(CPU, model, Deployment(weight_precision="float32", kv_precision="float32", engine=name))
        for name in ("generic", "vllm")
    )
    assert engine.parameters.shared_beside_tokens > 8
    step = engine.step(batch)
    assert step.shared_experts_s == plain.step(batch).shared_experts_s > 0
    assert step.routed_experts_s == plain.step(batch).routed_experts_s
    assert not any(note.startswith("moe:") for note in engine.times.notes)


def test_fitting_without_scipy_says_what_to_install(monkeypatch):
    import sys

    from simmoe.calibrate import fit as calibrate

    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(CalibrationError, match=r"pip install 'simmoe\[fit\]'"):
        calibrate.solver()
