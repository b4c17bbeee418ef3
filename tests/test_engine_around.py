"""What engines add around kernels: mixed steps, nucleus sampling, padding to captured graphs, wide attention."""

from __future__ import annotations

import numpy as np
import pytest

from simmoe.costs.memory import weights_per_device_bytes
from simmoe.costs.operators import nccl
from simmoe.engine.engine import Engine
from simmoe.engine.step import Batch
from simmoe.engine.tabulate import step_table
from simmoe.specs.deployment import Deployment
from simmoe.specs.engines import EngineParameters
from simmoe.specs.load import load_hardware, load_model

AROUND = EngineParameters(
    engine="vllm", source="test", nucleus_time=1e-3, nucleus_bytes_per_logit=330.0, pads_to_graphs=True
)


def engine(gpu: str = "h100", model: str = "llama-3.1-8b", **changes: object) -> Engine:
    deployment = Deployment(max_num_seqs=64, max_num_batched_tokens=2048, **changes)  # type: ignore[arg-type]
    return Engine(load_hardware(gpu), load_model(model), deployment, parameters=AROUND)


def test_decodes_beside_a_prompt_cost_more_only_where_query_heads_are_not_packed() -> None:
    requests, context = np.array([8, 32]), np.array([700.0, 700.0])
    for gpu, more in (("a100", True), ("h100", False)):
        e = engine(gpu)
        ratio = e.mixed_attention(requests, context) / e.decode_attention(requests, context)
        assert (ratio > 1.1).all() == more
        assert more or (ratio == 1).all()


def test_a_step_with_a_prompt_uses_the_mixed_attention_time() -> None:
    e = engine("a100")
    table = step_table(e, mean_context=700, prompt_tokens=575)
    batch, alone = Batch(32, 32 * 700, ((9, 566),)), Batch(32, 32 * 700)
    extra = float((e.mixed_attention(np.array([32]), np.array([700.0])) - e.decode_attention(
        np.array([32]), np.array([700.0])))[0])  # fmt: skip
    assert table.step_s(batch, 1) - table.step_s(alone) > 0.9 * extra
    assert table.breakdown(batch, 1).total_s == pytest.approx(table.step_s(batch, 1), rel=1e-6)


def test_nucleus_sampling_adds_its_launches_and_its_bytes() -> None:
    plain, nucleus = engine(), engine(nucleus_sampling=True)
    count = np.array([1.0, 40.0])
    added = nucleus.head(count) - plain.head(count)
    bandwidth = plain.hardware.device.memory_bandwidth
    np.testing.assert_allclose(added, 1e-3 + count * plain.model.vocab * 330 / bandwidth)


@pytest.mark.parametrize(
    ("tokens", "rows"), [(1, 1), (3, 4), (4, 4), (9, 16), (57, 64), (128, 128), (129, 129), (2000, 2000)]
)
def test_batches_are_padded_to_captured_sizes_and_no_further(tokens: int, rows: int) -> None:
    assert engine().rows(np.array([float(tokens)]))[0] == rows  # 64 seats: graphs up to 128


def test_padding_rows_wake_experts() -> None:
    e = engine(model="llama-4-scout", tp=2, gpus=2, weight_precision="fp8")
    assert e.step(Batch(9, 9 * 700)).routed_experts_s == e.step(Batch(16, 16 * 700)).routed_experts_s


def test_wide_attention_takes_two_bytes_for_attention_weights_alone() -> None:
    model = load_model("llama-4-scout")
    narrow = Deployment(gpus=2, tp=2, weight_precision="fp8")
    wide = narrow.vary(wide_attention=True)
    a = model.attention
    each = model.hidden * (a.heads * 2 + a.kv_heads * 2) * a.head_dim / 2
    added = weights_per_device_bytes(model, wide) - weights_per_device_bytes(model, narrow)
    assert added == pytest.approx(model.layers * each, rel=1e-3)
    slower = [engine(model="llama-4-scout", gpus=2, tp=2, weight_precision="fp8", wide_attention=w) for w in (0, 1)]
    first, second = (e.step(Batch(16, 16 * 700)) for e in slower)
    # fp8 with one scale is timed as block fp8, which reads slower than bf16: less than the bytes say
    assert second.projections_s > 1.15 * first.projections_s
    assert second.routed_experts_s == first.routed_experts_s


def test_ranks_gather_their_parts_of_the_vocabulary() -> None:
    """64 sequences x 128,256 logits of 2 B: three quarters of 16.4 MB reach each of four ranks over PCIe's 32 GB/s."""
    one, four = (engine("l40s", gpus=n).head(np.array([64.0]))[0] for n in (1, 4))
    least = 0.75 * 64 * 128256 * 2 / 32e9
    assert least < four - one / 4 < 10 * least  # measured: 0.4 ms on two L40S, 12 ms on eight
    # between nodes each device brings its share over its own link, as in an all-reduce
    h100 = engine(gpus=16, model="mixtral-8x7b").dense
    two_nodes, inside = (
        float(h100.times.seconds(nccl.OPERATOR, nccl.features_of("all_gather", 1e9, n))[0]) for n in (16, 8)
    )
    assert two_nodes - inside == pytest.approx(1e9 / 8 / 2 / 50e9, rel=0.01)


def test_an_int4_checkpoint_of_a_dense_model_is_in_four_bits_throughout() -> None:
    model, d = load_model("llama-3.1-70b"), Deployment(weight_precision="int4")
    assert weights_per_device_bytes(model, d) == pytest.approx(39.5e9, rel=0.01)  # 37 GB of AWQ, and two tables
    step = Batch(1, 1000)
    ratio = engine(model="llama-3.1-70b", weight_precision="int4").step(step).total_s
    assert ratio < 0.45 * engine(model="llama-3.1-70b").step(step).total_s


def test_kimi_k2_5_weighs_what_its_checkpoint_does() -> None:
    """594 GB published: scales of 16 bits for every 32 weights."""
    assert weights_per_device_bytes(load_model("kimi-k2.5"), Deployment()) == pytest.approx(594e9, rel=0.005)


def test_a_pruned_pool_has_a_smaller_router() -> None:
    full, half = (engine(model="glm-4.5", gpus=8, total_experts=n) for n in (160, 80))
    products = [{m.n for m in e._matrices() if m.part == "router"} for e in (full, half)]
    assert products == [{160}, {80}]
