"""What engines add around kernels: mixed steps, nucleus sampling, padding to captured graphs, wide attention."""

from __future__ import annotations

import numpy as np
import pytest

from simmoe.costs.memory import weights_per_device_bytes
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
    assert second.projections_s > 1.3 * first.projections_s
    assert second.routed_experts_s == first.routed_experts_s
