"""Which fit answers for a kernel, and that whatever was substituted is said."""

import numpy as np
import pytest

from simmoe.costs.borrowing import ACROSS, BORROWED_LOG_SIGMA, DEFAULT_LOG_SIGMA
from simmoe.costs.calibration import Calibration, FittedParameter, OperatorFit
from simmoe.costs.operators import gemm
from simmoe.costs.timing import KernelTimes, kernel_times
from simmoe.errors import CalibrationError
from simmoe.specs.load import load_hardware

H100 = load_hardware("h100")


def fit(framework="vllm", dtype="bfloat16", held_out=5.0, sigma=0.07, **changes):
    values = {
        "operator": "gemm",
        "variant": {"framework": framework, "dtype": dtype},
        "parameters": {name: FittedParameter(value=value) for name, value in gemm.OPERATOR.defaults.items()},
        "log_sigma": sigma,
        "in_sample_mape_percent": held_out,
        "held_out_mape_percent": held_out,
        "held_out_median_ape_percent": held_out,
        "held_out_p90_ape_percent": held_out,
        "roofline_mape_percent": 50.0,
        "rows": 100,
        "groups": 10,
        "ranges": {"m": (1.0, 4096.0), "n": (256.0, 8192.0)},
        "source": "made up",
    }
    return OperatorFit(**(values | changes))


def calibration(*fits, device="one device"):
    return Calibration(device=device, created_by="test", digest="0", sources=(), fits=fits)


def times(*fits, neighbour=None, framework="vllm"):
    return KernelTimes(H100, calibration(*fits) if fits else None, neighbour, framework)


def ask(kernel_times, m=64, dtype="bfloat16", cold=True):
    return kernel_times.seconds(gemm.OPERATOR, gemm.features_of(m, 4096, 4096), cold=cold, dtype=dtype)


def test_the_variant_asked_for_answers_without_a_note():
    chosen = times(fit("sglang"), fit("vllm", "fp8_block"), fit("vllm"))
    assert chosen.choose(gemm.OPERATOR, {"dtype": "bfloat16"}).variant == {"framework": "vllm", "dtype": "bfloat16"}
    assert not chosen.notes


def test_the_number_format_counts_for_more_than_the_framework():
    chosen = times(fit("sglang", "fp8_block"), fit("vllm", "bfloat16"))
    assert chosen.choose(gemm.OPERATOR, {"dtype": "fp8_block"}).variant["framework"] == "sglang"
    assert list(chosen.notes) == ["gemm: framework sglang for vllm (closest measured kernel)"]


@pytest.mark.parametrize("wanted", ["fp8", "int8"])
def test_eight_bit_products_nobody_measured_are_not_timed_as_16_bit_ones(wanted):
    chosen = times(fit("vllm", "bfloat16", held_out=1.0), fit("trtllm", "fp8_block"))
    assert chosen.choose(gemm.OPERATOR, {"dtype": wanted}).variant == {"framework": "trtllm", "dtype": "fp8_block"}
    assert f"gemm: framework trtllm for vllm, dtype fp8_block for {wanted} (closest measured kernel)" in chosen.notes


def test_a_format_measured_counts_for_more_than_the_engines_own_kernel_of_another():
    chosen = times(fit("vllm", "fp8_block", held_out=1.0), fit("vllm"), fit("trtllm", "fp8"))
    assert chosen.choose(gemm.OPERATOR, {"dtype": "fp8"}).variant == {"framework": "trtllm", "dtype": "fp8"}


def test_among_equals_the_better_held_out_error_answers():
    chosen = times(fit("sglang", held_out=9.0), fit("trtllm", held_out=4.0))
    assert chosen.choose(gemm.OPERATOR, {"dtype": "bfloat16"}).variant["framework"] == "trtllm"


def test_an_operator_not_measured_here_is_borrowed_with_a_wider_spread():
    own = fit(operator="moe")
    borrowed = times(own, neighbour=calibration(fit(sigma=0.07), device="its neighbour"))
    _, sigma = ask(borrowed)
    assert sigma == pytest.approx(np.hypot(0.07, BORROWED_LOG_SIGMA[ACROSS]))
    assert sigma > 0.1
    assert "gemm: not measured on this device; efficiencies of its neighbour" in borrowed.notes
    assert ask(times(fit(sigma=0.07)))[1] == 0.07


def test_an_operator_nobody_measured_uses_documented_defaults_and_says_so():
    unmeasured = times()
    seconds, sigma = ask(unmeasured)
    features = gemm.features_of(64, 4096, 4096)
    assert seconds == pytest.approx(gemm.OPERATOR.seconds(features, gemm.OPERATOR.defaults, H100, True))  # noqa: FBT003
    assert sigma == DEFAULT_LOG_SIGMA
    assert list(unmeasured.notes) == ["gemm: no measurement; documented default parameters"]


def test_extrapolation_names_the_worst_value_and_the_range():
    measured = times(fit())
    ask(measured, m=np.array([64.0, 9000.0]))
    assert list(measured.notes) == ["gemm: m 9000 outside measured 1..4096"]


def test_weights_from_device_memory_take_longer_than_replayed_ones():
    """The benchmarks' L2 reuse must be off unless asked for: 4096 x 4096 in bf16 are 34 MB, L2 has 50."""
    own = kernel_times(H100, "trtllm")
    cold, _ = ask(own, m=1, dtype="fp8_block")
    warm, _ = ask(own, m=1, dtype="fp8_block", cold=False)
    default, _ = own.seconds(gemm.OPERATOR, gemm.features_of(1, 4096, 4096), dtype="fp8_block")
    assert cold > warm
    assert default == cold


def test_a_calibration_of_another_version_is_refused_with_the_remedy():
    lacking = fit()
    parameters = dict(lacking.parameters)
    name, _ = parameters.popitem()
    with pytest.raises(CalibrationError, match=rf"gemm vllm/bfloat16: no parameter {name}; .*simmoe calibrate"):
        ask(times(lacking.vary(parameters=parameters)))


def test_a_device_without_calibration_says_whose_efficiencies_it_uses():
    borrowed = kernel_times(load_hardware("a800-pcie"), "vllm")
    stranger = H100.vary(calibration=None, nearest_calibration="a100_sxm")  # another generation
    assert (
        ask(kernel_times(stranger, "vllm"))[1] > ask(borrowed)[1] > ask(kernel_times(load_hardware("a100"), "vllm"))[1]
    )
    assert borrowed.own is None
    assert any("is not calibrated: efficiencies of" in note for note in borrowed.notes)
