"""What carries over from one device to another, and how much less sure it gets, and beyond the measured range."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmoe.costs import borrowing
from simmoe.costs.calibration import Calibration, FittedParameter, OperatorFit
from simmoe.costs.operators import experts, gemm, mla
from simmoe.costs.timing import KernelTimes, kernel_times
from simmoe.engine.engine import Engine
from simmoe.engine.step import Batch
from simmoe.specs.deployment import Deployment
from simmoe.specs.load import load_hardware, load_model

H100, H200, H20, H800, A100 = (load_hardware(name) for name in ("h100", "h200", "h20", "h800", "a100"))
OPERATORS = (gemm.OPERATOR, experts.MOE, mla.MLA_DECODE, mla.MLA_PREFILL)


def fit(operator=gemm.OPERATOR, ranges=None, **values):
    parameters = {**operator.defaults, **values}
    return OperatorFit(
        operator=operator.name,
        variant={"framework": "vllm", "dtype": "bfloat16"},
        parameters={name: FittedParameter(value=value) for name, value in parameters.items()},
        log_sigma=0.05,
        in_sample_mape_percent=5.0,
        held_out_mape_percent=5.0,
        held_out_median_ape_percent=5.0,
        held_out_p90_ape_percent=5.0,
        roofline_mape_percent=50.0,
        rows=100,
        groups=10,
        ranges=ranges or {"m": (1.0, 1000.0)},
        source="made up",
    )


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_every_operator_of_matrix_units_has_a_share_of_their_peak(operator):
    assert any(parameter.of_peak for parameter in operator.parameters)


@given(share=st.floats(0.05, 0.99))
def test_a_slower_matrix_unit_is_used_better_and_never_gets_faster_than_the_quicker_one(share):
    there = borrowing.carried_over(gemm.OPERATOR, fit(compute_efficiency=share), H100, H20)["compute_efficiency"]
    assert share < there <= 1.0
    peak = {device.name: device.device.flop_per_s("bfloat16") / device.device.sms for device in (H100, H20)}
    assert there * peak[H20.name] <= share * peak[H100.name] * (1 + 1e-9)
    # what a multiprocessor loses per FLOP is kept
    lost = [(1 / e - 1) / peak[name] for e, name in ((share, H100.name), (there, H20.name))]
    assert lost[0] == pytest.approx(lost[1])


def test_nothing_changes_between_like_multiprocessors_or_across_architectures():
    own = fit(compute_efficiency=0.5)
    assert borrowing.carried_over(gemm.OPERATOR, own, H100, H200) == pytest.approx(own.values())
    assert borrowing.carried_over(gemm.OPERATOR, own, A100, H100) == own.values()
    assert borrowing.carried_over(gemm.OPERATOR, own, None, H100) == own.values()


def test_measured_kernels_of_another_device_are_better_met_with_the_rule_than_without():
    """H800's DeepGEMM fits, put to H20's measured times: `simmoe calibrate --beyond` prints all pairs."""
    from pathlib import Path

    from simmoe.calibrate.kernels import plan
    from simmoe.costs.calibration import load

    root = Path(__file__).parents[1] / "profiles"
    (entry,), _ = plan([root / "h20" / "gemm_h20.csv"])
    (operator, sample, _), *_ = entry.jobs
    there = load(root / "h800" / "calibration.yaml").find("gemm", **dict(sample.variant))
    ruled, plain = (
        np.log(sample.seconds / operator.seconds(sample.features, values, H20, False))  # noqa: FBT003
        for values in (borrowing.carried_over(operator, there, H800, H20), there.values())
    )
    assert abs(np.median(ruled)) < 0.05 < abs(np.median(plain))
    assert np.quantile(np.abs(ruled), 0.9) < np.quantile(np.abs(plain), 0.9)


@given(m=st.floats(1e-3, 1e7), factor=st.floats(1, 100))
def test_the_farther_outside_the_less_sure(m, factor):
    one = fit()
    near, far = (borrowing.beyond(one, gemm.features_of(value, 512, 512))[()] for value in (m, m * factor))
    assert (near == 0) == (1 <= m <= 1000)
    if m >= 1000:
        assert far >= near
    assert borrowing.extrapolated_log_sigma(far) >= 0


def test_spread_widens_row_by_row_where_a_row_lies_outside():
    own = Calibration(device="x", created_by="test", digest="0", sources=(), fits=(fit(),))
    times = KernelTimes(H100, own, None, "vllm")
    _, sigma = times.seconds(gemm.OPERATOR, gemm.features_of([10, 1000, 1000 * np.e], 512, 512), dtype="bfloat16")
    assert sigma[:2] == pytest.approx(0.05)
    assert sigma[2] == pytest.approx(np.hypot(0.05, borrowing.EXTRAPOLATED_LOG_SIGMA))


def test_a_kernel_measured_on_the_device_answers_before_a_neighbours():
    times = kernel_times(H20, "sglang")
    assert times.choose(gemm.OPERATOR, {"dtype": "fp8_block"}).source == "gemm_h20.csv"
    assert times.choose(gemm.OPERATOR, {"dtype": "bfloat16"}).source == "gemm_h100_sxm.csv.gz"
    decode = times.choose(mla.MLA_DECODE, {"kv_cache_dtype": "bfloat16", "operation": "attention_kernel"})
    assert decode.source == "mla_decode_h20.csv"


# published by LMSYS and Ant Group (validate/serving/published_headline_points.csv, h20-decode-*): requests a device,
# experts over so many ranks, output tokens/s a device, tokens a step (1.8 to 1.9 with one drafted), verified
H20_DECODE = (
    (48, 16, 714, 1.85, 2),
    (8, 16, 278, 1.85, 2),
    (8, 32, 293, 1.85, 2),
    (32, 32, 585, 1.85, 2),
    (12, 16, 423, 2.55, 3),
)


@pytest.mark.parametrize(("requests", "ranks", "tokens_per_s", "accepted", "verified"), H20_DECODE)
def test_wide_decode_steps_on_h20_are_near_the_published_ones(requests, ranks, tokens_per_s, accepted, verified):
    """A drafted token is verified like another request's; the drafting itself, a layer of 61, is not counted here."""
    layout = Deployment(gpus=ranks, tp=1, dp=ranks, ep=ranks, engine="sglang")
    rows = requests * ranks * verified
    step = Engine(H20, load_model("deepseek-v3"), layout).step(Batch(rows, rows * (4096 + 1536 // 2)))
    assert step.total_s == pytest.approx(requests * accepted / tokens_per_s, rel=0.2)


def test_an_h20_shows_its_bandwidth_alone_and_its_matrix_units_in_a_crowd(simmoe):
    """Weights of a dense model are read in 3.35 / 4.0 of an H100's time; over 64 requests 64-row tiles take over."""
    alone, crowd = (
        [
            Engine(device, load_model("llama-3.1-8b"), Deployment()).step(Batch(n, 1152 * n)).total_s
            for device in (H20, H100)
        ]
        for n in (1, 64)
    )
    assert alone[0] / alone[1] == pytest.approx(3.35 / 4.0, rel=0.1)
    assert crowd[0] > 1.3 * crowd[1]
    for device, told in (("h20", True), ("h100", False), ("h800", False), ("h200", False)):
        assert (
            "is bound by them, not by its memory bandwidth" in " ".join(simmoe("predict", device)[1].split())
        ) == told


@pytest.mark.parametrize("framework", ["vllm", "sglang", "trtllm"])
@pytest.mark.parametrize("ep", [1, 4])
def test_four_bit_blocks_never_decode_slower_than_eight_bit_ones(framework, ep):
    """Nobody measured nvfp4: it is timed as the engine's kernel of the nearest format, on half the bytes."""
    b200, model = load_hardware("b200"), load_model("minimax-m2")
    for requests in (1, 16, 256):
        batch = Batch(decode_requests=requests, decode_context_tokens=1500.0 * requests)
        seconds = {
            name: Engine(
                b200, model, Deployment(gpus=4, tp=4, ep=ep, engine=framework, weight_precision=name),
                kernel_times(b200, framework),
            ).step(batch).total_s
            for name in ("fp8_block", "nvfp4")
        }  # fmt: skip
        assert seconds["nvfp4"] < seconds["fp8_block"]
