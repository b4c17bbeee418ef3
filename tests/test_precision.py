"""Number formats on devices with and without units for them: narrow weights save reading, units save multiplying."""

import pytest

from simmoe.costs.operators import experts
from simmoe.costs.precision import on_device, precision_of
from simmoe.engine.engine import Engine
from simmoe.engine.step import Batch
from simmoe.errors import SpecError
from simmoe.specs.deployment import Deployment
from simmoe.specs.load import load_hardware, load_model

MIXTRAL, V3 = load_model("mixtral-8x7b"), load_model("deepseek-v3")
FEW, MANY = Batch(4, 4 * 1000), Batch(0, 0, ((8000, 0),))


def experts_s(hardware, precision, batch):
    engine = Engine(load_hardware(hardware), MIXTRAL, Deployment(gpus=8, weight_precision=precision))
    parts = engine.step(batch).parts
    return parts["routed_experts"], parts["projections"]


@pytest.mark.parametrize(("hardware", "precision"), [("a100", "fp8"), ("a100", "fp8_block"), ("h100", "nvfp4")])
def test_weights_without_units_are_read_narrow_and_multiplied_in_16_bits(hardware, precision):
    narrow, wide = experts_s(hardware, precision, FEW), experts_s(hardware, "bfloat16", FEW)
    assert narrow[0] < 0.75 * wide[0]
    assert narrow[1] < wide[1]
    for here, there in zip(experts_s(hardware, precision, MANY), experts_s(hardware, "bfloat16", MANY), strict=True):
        assert here == pytest.approx(there, rel=0.1)


@pytest.mark.parametrize(("hardware", "precision"), [("a100", "int8"), ("h100", "fp8")])
def test_units_of_their_own_multiply_faster(hardware, precision):
    assert experts_s(hardware, precision, MANY)[0] < 0.6 * experts_s(hardware, "bfloat16", MANY)[0]


def test_integers_multiply_at_the_integer_peak_not_at_that_of_8_bit_floats():
    assert load_hardware("b300").device.peak.int8 < 0.1 * load_hardware("b300").device.peak.fp8
    assert experts_s("b300", "int8", MANY)[0] > 4 * experts_s("b300", "fp8", MANY)[0]


def test_widening_is_told_once_and_only_where_it_happens():
    said = {
        hw: on_device(precision_of(V3, Deployment()), load_hardware(hw).device, "vllm")[1] for hw in ("a100", "h100")
    }
    assert said["h100"] is None
    assert said["a100"].endswith("has no fp8 units: fp8_block weights are widened to 16 bits before they multiply")
    engine = Engine(load_hardware("a100"), V3, Deployment(gpus=16, tp=16))
    assert said["a100"] in engine.times.notes


@pytest.mark.parametrize("precision", ["fp8", "fp8_block", "mxfp4", "nvfp4"])
def test_volta_is_refused_what_no_engine_widens_there(precision):
    with pytest.raises(SpecError, match=f"^precision {precision}: NVIDIA V100 .* give float16, int8 or int4"):
        Engine(load_hardware("v100"), MIXTRAL, Deployment(gpus=8, weight_precision=precision))


def test_volta_widens_integers():
    few, many = ([experts_s("v100", name, batch)[0] for name in ("int4", "int8")] for batch in (FEW, MANY))
    assert few[0] < 0.8 * few[1]
    assert many[0] == pytest.approx(many[1], rel=0.05)


def test_blackwell_narrows_the_inputs_of_mxfp4_experts_where_the_engine_does():
    gpt_oss = load_model("gpt-oss-120b")

    def block(hardware, engine, precision=None, batch=MANY):
        d = Deployment(engine=engine, weight_precision=precision)
        return Engine(load_hardware(hardware), gpt_oss, d).step(batch).parts["routed_experts"]

    assert block("b200", "trtllm") == block("b200", "trtllm", "mxfp4_mxfp8")
    assert block("b200", "trtllm") < 0.8 * block("b200", "trtllm", "bfloat16")
    assert block("b200", "vllm", "mxfp4_mxfp8") < 0.8 * block("b200", "vllm")
    engine = Engine(load_hardware("h200"), gpt_oss, Deployment(engine="trtllm"))
    assert engine.precision.experts.compute_bits == 16  # Hopper widens the weights instead


def test_block_scaled_units_are_timed_as_fp8_with_one_scale_where_the_engine_has_such_a_kernel():
    chosen = Engine(load_hardware("b200"), MIXTRAL, Deployment(engine="trtllm", weight_precision="nvfp4"))
    chosen.step(FEW)
    assert any("moe: dtype fp8 for nvfp4" in note for note in chosen.times.notes)
    vllm = Engine(load_hardware("b200"), MIXTRAL, Deployment(engine="vllm", weight_precision="nvfp4"))
    vllm.step(FEW)
    assert any("moe: dtype fp8_block for nvfp4" in note for note in vllm.times.notes)


def test_few_tokens_fill_the_tiles_of_block_scaled_units(monkeypatch):
    """Two tokens on each of many small experts: weights are streamed, no empty rows are waited for."""
    gpt_oss, e = load_model("gpt-oss-120b"), load_model("gpt-oss-120b").experts
    bandwidth = load_hardware("b200").device.memory_bandwidth
    streamed = gpt_oss.layers * e.num_experts * 3 * e.inter_size * gpt_oss.hidden * 4.25 / 8 / bandwidth
    few, many = Batch(256, 256 * 100), Batch(0, 0, ((16384, 0),))

    def seconds(batch):
        return Engine(load_hardware("b200"), gpt_oss, Deployment(engine="trtllm")).step(batch).parts["routed_experts"]

    filled = seconds(few), seconds(many)
    monkeypatch.setattr(experts, "NARROW_TILES", frozenset())
    assert streamed < filled[0] < 1.4 * streamed
    assert seconds(few) > 1.1 * filled[0]
    assert seconds(many) == pytest.approx(filled[1], rel=0.1)
