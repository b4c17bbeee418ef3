"""Fits on synthetic measurements whose truth is known: values, honest standard errors, held-out figures, robustness."""

import csv

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simmoe.calibrate.fit import Sample, calibrate_operator, fit, held_out, pseudo_residuals, samples
from simmoe.costs.calibration import Calibration, FittedParameter, dump, load
from simmoe.costs.operators import gemm
from simmoe.costs.operators.base import Operator, Parameter
from simmoe.errors import CalibrationError
from simmoe.specs.load import load_hardware
from simmoe.specs.measurement import read_table

H100 = load_hardware("h100")
BANDWIDTH = H100.device.memory_bandwidth

LAUNCH = Parameter(name="launch_s", unit="s", default=1e-6, lower=1e-7, upper=1e-3, meaning="fixed")
EFFICIENCY = Parameter(name="efficiency", unit="-", default=0.9, lower=0.05, upper=1.0, meaning="of bandwidth")
UNSEEN = Parameter(name="unseen", unit="-", default=0.3, lower=0.01, upper=10.0, meaning="nothing depends on it")


def copy_seconds(features, p, hardware, cold):
    return p["launch_s"] + features["bytes"] / (p["efficiency"] * hardware.device.memory_bandwidth)


def operator(*parameters):
    """A copy kernel: launch plus bytes over a share of bandwidth."""
    return Operator(
        name="copy",
        parameters=parameters,
        seconds=copy_seconds,
        roofline=lambda f, hardware: f["bytes"] / hardware.device.memory_bandwidth,
        features=lambda table: {"bytes": table.number("bytes")},
        variant_columns=(),
        group_columns=("shape",),
        range_features=("bytes",),
    )


COPY = operator(LAUNCH, EFFICIENCY)
TRUTH = {"launch_s": 5e-6, "efficiency": 0.6}


def measured(seed, groups=30, each=8, shared=0.0, single=0.0, truth=TRUTH):
    """Rows of `groups` shapes; noise on the logarithm, part of it shared by all rows of a shape."""
    generator = np.random.default_rng(seed)
    group = np.repeat(np.arange(groups), each)
    features = {"bytes": np.exp(generator.uniform(np.log(1e5), np.log(1e9), group.size))}
    noise = shared * generator.standard_normal(groups)[group] + single * generator.standard_normal(group.size)
    seconds = copy_seconds(features, truth, H100, cold=False) * np.exp(noise)
    return Sample({}, features, seconds, group, np.arange(group.size))


# ---- values and standard errors ---------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.floats(3e-7, 3e-4), st.floats(0.1, 0.95), st.integers(0, 1000))
def test_true_parameters_are_recovered_from_exact_times(launch_s, efficiency, seed):
    truth = {"launch_s": launch_s, "efficiency": efficiency}
    values = fit(COPY, measured(seed, truth=truth), H100)
    # the pull to the documented default moves a well measured parameter by less than half a percent
    assert values == pytest.approx(truth, rel=5e-3)


@pytest.mark.parametrize(("shared", "single"), [(0.0, 0.05), (0.05, 0.0), (0.1, 0.1)])
def test_standard_errors_are_as_wide_as_the_estimates_scatter(shared, single):
    """Sixty repetitions: errors shared within a shape must widen the standard error as they widen the scatter."""
    fits = [
        calibrate_operator(COPY, measured(seed, shared=shared, single=single), H100, "made up", 2) for seed in range(60)
    ]
    for name, true in TRUTH.items():
        values = np.array([f.parameters[name].value for f in fits])
        errors = np.array([f.parameters[name].standard_error for f in fits])
        assert np.mean(errors) == pytest.approx(np.std(values), rel=0.25)  # sd of 60 values is known to 9 %
        covered = np.mean(np.abs(values - true) < 1.96 * errors)
        assert covered > 0.85  # 0.95 expected, with its own standard error of 0.03


def test_shared_errors_are_not_mistaken_for_many_independent_ones():
    alone, together = (
        np.mean([calibrate_operator(COPY, measured(s, **noise), H100, "", 2).parameters["efficiency"].standard_error
                 for s in range(10)])
        for noise in ({"single": 0.05}, {"shared": 0.05})
    )  # fmt: skip
    assert together > 1.7 * alone


def test_a_parameter_nothing_depends_on_stays_at_its_default_without_an_error():
    result = calibrate_operator(operator(LAUNCH, EFFICIENCY, UNSEEN), measured(0, single=0.02), H100, "")
    assert result.parameters["unseen"].value == pytest.approx(UNSEEN.default)
    assert result.parameters["unseen"].standard_error is None
    assert result.parameters["efficiency"].standard_error is not None


def test_a_parameter_on_its_bound_has_no_standard_error():
    beyond = measured(0, single=0.01, truth={"launch_s": 5e-6, "efficiency": 1.3})
    result = calibrate_operator(COPY, beyond, H100, "")
    assert result.parameters["efficiency"].value == pytest.approx(1.0, rel=1e-3)
    assert result.parameters["efficiency"].standard_error is None


def test_a_few_wild_rows_hardly_move_the_fit():
    sample = measured(1, single=0.02)
    wild = sample.seconds.copy()
    wild[::30] *= 5.0
    spoilt = Sample({}, sample.features, wild, sample.groups, sample.rows)
    assert fit(COPY, spoilt, H100)["efficiency"] == pytest.approx(fit(COPY, sample, H100)["efficiency"], rel=0.03)


def test_fewer_rows_than_parameters_are_refused():
    with pytest.raises(CalibrationError, match=r"copy .*: 2 rows for 2 parameters"):
        fit(COPY, measured(0, groups=2, each=1), H100)


# ---- how it is judged -------------------------------------------------------------------------------------------


def test_every_group_is_predicted_by_a_fit_that_never_saw_it():
    """Two shapes, one twice as slow: each is predicted as fast as the other."""
    sample = measured(3, groups=2, each=40)
    slow = Sample(
        {}, sample.features, sample.seconds * np.where(sample.groups == 1, 2.0, 1.0), sample.groups, sample.rows
    )
    ratio = held_out(COPY, slow, H100, {}, folds=2) / slow.seconds
    assert np.median(ratio[slow.groups == 0]) == pytest.approx(2.0, rel=0.05)
    assert np.median(ratio[slow.groups == 1]) == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("seed", range(4))
def test_reported_spread_is_the_noise_put_in(seed):
    result = calibrate_operator(COPY, measured(seed, groups=60, single=0.08), H100, "")
    assert result.log_sigma == pytest.approx(0.08, rel=0.15)
    assert result.held_out_mape_percent == pytest.approx(100 * 0.08 * np.sqrt(2 / np.pi), rel=0.15)
    assert result.inside_90_percent == pytest.approx(90, abs=1)
    assert result.in_sample_mape_percent <= result.held_out_mape_percent
    assert result.roofline_mape_percent > 3 * result.held_out_mape_percent
    assert result.ranges["bytes"][0] < 1e6
    assert result.ranges["bytes"][1] > 1e8


def test_fitting_twice_gives_the_same_numbers():
    one, other = (calibrate_operator(COPY, measured(7, single=0.05), H100, "") for _ in range(2))
    assert one == other


# ---- from a table -----------------------------------------------------------------------------------------------


def write(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("framework", "dtype", "m", "n", "k", "latency_us", "anomalous"), *rows])
    return read_table(path)


def test_tables_are_split_by_variant_and_grouped_by_shape(tmp_path):
    table = write(
        tmp_path / "gemm_h100_sxm.csv",
        [
            ("vllm", "bfloat16", 1, 256, 512, 5, 0),
            ("vllm", "bfloat16", 2, 256, 512, 5, 0),
            ("vllm", "bfloat16", 2, 512, 512, 6, 0),
            ("sglang", "bfloat16", 2, 512, 512, 6, 0),
            ("vllm", "bfloat16", 2, 512, 512, 60, 1),
            ("vllm", "bfloat16", 2, 512, 512, "", 0),
            ("vllm", "bfloat16", "", 512, 512, 6, 0),
        ],
    )
    found = {sample.variant["framework"]: sample for sample in samples(gemm.OPERATOR, table)}
    assert set(found) == {"vllm", "sglang"}
    assert found["vllm"].rows.tolist() == [0, 1, 2]
    assert found["vllm"].groups.tolist() == [0, 0, 1]
    assert found["vllm"].seconds == pytest.approx([5e-6, 5e-6, 6e-6])
    assert found["sglang"].rows.tolist() == [3]


def test_a_calibration_survives_writing_and_reading(tmp_path):
    fitted = calibrate_operator(COPY, measured(0, single=0.05), H100, "made up")
    written = Calibration(device="d", created_by="test", digest="abc", sources=("a.csv",), fits=(fitted,))
    dump(written, tmp_path / "new" / "calibration.yaml")
    read = load(tmp_path / "new" / "calibration.yaml")
    assert read.find("copy").values() == pytest.approx(fitted.values(), rel=1e-5)
    assert read.find("copy").parameters["efficiency"].standard_error == pytest.approx(
        fitted.parameters["efficiency"].standard_error, rel=1e-5
    )
    assert read.of("paste") == ()


@pytest.mark.parametrize(
    ("text", "says"),
    [("- 1", "expected a mapping"), ("a: [", "not YAML"), ("device: x\n", "Field required")],
)
def test_a_broken_calibration_file_is_one_line_with_its_name(tmp_path, text, says):
    path = tmp_path / "calibration.yaml"
    path.write_text(text)
    with pytest.raises(CalibrationError, match=says) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_calibration_says_how_to_make_one(tmp_path):
    with pytest.raises(CalibrationError, match="no such calibration; make one with `simmoe calibrate`"):
        load(tmp_path / "calibration.yaml")


def test_a_calibration_of_another_schema_is_refused(tmp_path):
    parameter = FittedParameter(value=1.0)
    assert parameter.standard_error is None
    path = tmp_path / "calibration.yaml"
    dump(Calibration(schema_version=99, device="d", created_by="t", digest="0", sources=(), fits=()), path)
    with pytest.raises(CalibrationError, match="schema_version 99; this simmoe reads"):
        load(path)


def test_pseudo_residuals_are_the_noise_around_a_smooth_curve():
    """Of a straight line nothing; of noise its mean size, sqrt(2/pi) sigma, on unevenly spaced places too."""
    place = np.sort(np.random.default_rng(1).uniform(0, 9, 4000))
    assert pseudo_residuals(place, 3.0 + 2.0 * place) == pytest.approx(0.0, abs=1e-9)
    noisy = 3.0 + 2.0 * place + np.random.default_rng(2).normal(0.0, 0.5, place.size)
    assert pseudo_residuals(place, noisy).mean() == pytest.approx(0.5 * np.sqrt(2 / np.pi), rel=0.05)
