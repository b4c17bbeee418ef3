"""Tuned and default tiles of Triton expert kernels: which shapes are bound, and that it shows in the measurements."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmoe.costs.operators import tuned_tiles
from simmoe.costs.operators.experts import MOE
from simmoe.engine.engine import Engine
from simmoe.engine.step import Batch
from simmoe.specs.deployment import Deployment
from simmoe.specs.load import load_hardware, load_model
from simmoe.specs.measurement import read_table
from simmoe.specs.mechanisms import Exchange

PROFILES = Path(__file__).parents[1] / "profiles"
H100 = "NVIDIA H100 SXM5 80GB"


def rows(kernel, tokens, experts, width, *, dtype="bfloat16", device=H100):
    number = np.array([tuned_tiles.list_number(kernel, dtype)])
    return tuned_tiles.fixed_rows(number, device, np.array([tokens]), np.array([experts]), np.array([width]))[0]


def test_shapes_with_shipped_tiles_are_free_and_others_bound_by_tokens_and_experts():
    kernel = "sglang_fused_moe_triton"
    assert rows(kernel, 1000.0, 128.0, 768.0) == 0  # E=128,N=768,device_name=NVIDIA_H100_80GB_HBM3.json
    assert rows(kernel, 256.0, 256.0, 2048.0) == 16
    assert rows(kernel, 257.0, 256.0, 2048.0) == 64
    assert rows(kernel, 1000.0, 128.0, 768.0, device="NVIDIA A100 SXM4 80GB") == 64


@given(st.floats(1, 1e5), st.integers(1, 512), st.integers(16, 16384))
def test_kernels_without_a_list_and_block_quantised_experts_are_free(tokens, experts, width):
    for kernel in ("moe_torch_flow_cutlass", "vllm_unquantizedfusedmoe_triton_tritonexperts", None):
        assert rows(kernel, tokens, float(experts), float(width)) == 0
    assert rows("sglang_fused_moe_triton", tokens, float(experts), float(width), dtype="fp8_block") == 0


@pytest.mark.parametrize("device", ["h100_sxm", "h200_sxm"])
def test_measured_bound_shapes_are_slower_than_tuned_ones(device):
    """FLOP/s reached by SGLang's bf16 kernel at many tokens: tuned shapes and bound ones do not overlap."""
    table = read_table(PROFILES / device / f"moe_{device}.csv.gz")
    wanted = (table.text("kernel_source") == "sglang_fused_moe_triton") & (table.text("dtype") == "bfloat16")
    table = table.take(wanted & (table.number("num_tokens") == 16384) & (table.number("moe_ep_size") == 1))
    inter = table.number("expert_inter_size") / table.number("moe_tp_size")
    table = table.take(inter >= 384)  # narrower experts are bound by other things than tiles
    features = MOE.features(table)
    bound = tuned_tiles.fixed_rows(
        features["tile_list"], load_hardware(device).device.name, features["tokens"], features["local_experts"],
        features["inter"],
    )  # fmt: skip
    flop = 6.0 * features["pairs"] * features["hidden"] * features["inter"]
    reached = flop / (table.number("latency_us") * 1e-6)
    assert 0 < (bound > 0).sum() < table.rows
    assert reached[bound == 0].min() > 1.2 * reached[bound > 0].max()


def test_an_engine_without_tuned_tiles_for_a_shape_takes_longer():
    """Qwen3-30B on two H100: SGLang ships tiles for 128 x 384 there, for a device it does not know none."""
    model, h100 = load_model("qwen3-30b-a3b"), load_hardware("h100")
    unknown = h100.vary(device=h100.device.vary(name="a device nobody tuned for"))
    deployment = Deployment(gpus=2, tp=2, engine="sglang", weight_precision="bfloat16")
    prefill = Batch(prefill_chunks=((8192, 0),))
    tuned, default = (Engine(hardware, model, deployment).step(prefill) for hardware in (h100, unknown))
    assert default.routed_experts_s > 1.3 * tuned.routed_experts_s
    assert default.attention_s == tuned.attention_s


def test_older_vllm_runs_its_default_tiles_where_it_shipped_none():
    """Mixtral's experts whole on a device (E=2, N=14336) have no tiles in vLLM up to 0.16; sliced by two they have."""
    h100, mixtral = load_hardware("h100"), load_model("mixtral-8x7b")
    whole = Deployment(gpus=4, tp=2, dp=2, ep=4, exchange=Exchange(algorithm="gather"))
    sliced = Deployment(gpus=2, tp=2)

    def experts_s(deployment: Deployment, version: str | None) -> float:
        engine = Engine(h100, mixtral, deployment.vary(engine_version=version))
        return engine.step(Batch(64, 64_000)).routed_experts_s

    for version in ("0.14.0", "0.15.1", "v0.16.0"):
        assert experts_s(whole, version) > 1.2 * experts_s(whole, None)
        assert experts_s(sliced, version) == experts_s(sliced, None)
    for version in ("0.17.0", "0.24", None):
        assert experts_s(whole, version) == experts_s(whole, None)


def test_default_tiles_of_another_engine_or_format_do_not_stand_in():
    assert tuned_tiles.older_kernel("vllm", "0.15.1", "fp8") is None
    assert tuned_tiles.older_kernel("sglang", "0.4.6", "bfloat16") is None
    number, variant = tuned_tiles.older_kernel("vllm", "0.15.1", "bfloat16")
    assert number == tuned_tiles.list_number("vllm_fused_moe", "bfloat16")
    assert variant["kernel_source"] == "sglang_fused_moe_triton"
