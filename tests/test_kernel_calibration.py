"""From tables of a new device to a calibration that predicts: labels, resume, warnings, the ready hardware file."""

import csv
import json

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from simmoe.calibrate import kernels as kernel_calibration
from simmoe.calibrate.checks import check, gaps, outliers, unidentified
from simmoe.calibrate.fit import Sample, calibrate_operator, samples, scatter_percent
from simmoe.calibrate.repeats import repeat_error_percent, repeat_errors
from simmoe.cli.main import app
from simmoe.costs import calibration as calibration_files
from simmoe.costs.operators import alltoall, gemm
from simmoe.costs.operators.registry import described, measured_device
from simmoe.costs.timing import kernel_times
from simmoe.errors import CalibrationError, SpecError
from simmoe.report import calibration as calibration_report
from simmoe.specs.load import data_folder, load_hardware
from simmoe.specs.measurement import read_table

TRUE = gemm.OPERATOR.defaults
WARM = False


def hardware_file(path, name="my-gpu", **changes):
    text = yaml.safe_load((data_folder("hardware") / "a100.yaml").read_text())
    text |= {"name": name, "calibration": name, **changes}
    text.pop("nearest_calibration", None)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(text))
    return path


SHAPES = ((512, 2048), (4096, 4096), (7168, 2048), (2048, 7168), (1024, 1024), (8192, 1024))


def gemm_table(path, rows_m=(1, 4, 16, 64, 256, 1024, 4096), shapes=SHAPES, spoil=()):
    hardware = load_hardware("a100")
    generator = np.random.default_rng(3)
    path.parent.mkdir(parents=True, exist_ok=True)
    points = [(n, k, m) for n, k in shapes for m in rows_m]
    n, k, m = np.array(points, dtype=float).T
    features = gemm.features_of(m, n, k)
    features = {**features, "copies": np.full(len(m), 6.0)}
    seconds = gemm.OPERATOR.seconds(features, TRUE, hardware, WARM) * np.exp(0.02 * generator.standard_normal(len(m)))
    seconds[list(spoil)] *= 3.0
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("framework", "version", "kernel_source", "dtype", "n", "k", "m", "latency_us"))
        for point, second in zip(points, seconds, strict=True):
            writer.writerow(("torch", "2", "x", "bfloat16", *point, f"{1e6 * second:.5g}"))
    return path


def sample_of(path):
    (sample,) = samples(gemm.OPERATOR, read_table(path))
    return sample, calibrate_operator(gemm.OPERATOR, sample, load_hardware("a100"), path.name, folds=3)


def test_calibrating_a_new_device_leaves_a_hardware_file_that_predicts_from_it(tmp_path):
    file = hardware_file(tmp_path / "my-gpu" / "hardware.yaml")
    gemm_table(tmp_path / "my-gpu" / "gemm_my-gpu.csv")
    result = CliRunner().invoke(app, ["calibrate", str(tmp_path / "my-gpu"), "--folds", "3", "--processes", "1"])
    assert result.exit_code == 0, result.output
    assert f"simmoe predict {file}" in result.output
    loaded = load_hardware(file)
    times = kernel_times(loaded, "torch")
    assert times.own is not None
    assert times.own.sources == ("gemm_my-gpu.csv",)
    seconds, sigma = times.seconds(gemm.OPERATOR, gemm.features_of(64.0, 4096.0, 4096.0), framework="torch")
    truth = gemm.OPERATOR.seconds(gemm.features_of(64.0, 4096.0, 4096.0), TRUE, loaded, True)  # noqa: FBT003
    assert seconds == pytest.approx(truth, rel=0.1)
    assert sigma < 0.1


def test_a_hardware_file_elsewhere_gets_a_copy_beside_the_calibration(tmp_path):
    file = hardware_file(tmp_path / "described" / "my-gpu.yaml", calibration="somewhere-else")
    gemm_table(tmp_path / "tables" / "gemm_my-gpu.csv")
    (entry,), left_out = kernel_calibration.plan([tmp_path / "tables"], file)
    assert not left_out
    calibration = kernel_calibration.run(entry, folds=3, processes=1)
    ready = kernel_calibration.write(entry, calibration, entry.folder(tmp_path / "out"))
    assert ready is not None
    assert ready != file
    assert kernel_times(load_hardware(ready), "torch").own == calibration_of(ready)
    assert load_hardware(ready).vary(calibration=None) == load_hardware(file).vary(calibration=None)


def calibration_of(ready):
    from simmoe.costs.calibration import load

    return load(ready.parent / "calibration.yaml")


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    gemm_table(tmp_path / "gemm_my-gpu.csv")
    hardware_file(tmp_path / "hardware.yaml")
    (entry,), _ = kernel_calibration.plan([tmp_path])
    first = kernel_calibration.run(entry, folds=3, processes=1, keep=tmp_path / ".fits")
    assert len(list((tmp_path / ".fits").iterdir())) == len(entry.jobs) == 1
    # fitting again would fail now: the fits come from disk
    monkeypatch.setattr(kernel_calibration, "ProcessPoolExecutor", None)
    assert kernel_calibration.run(entry, folds=3, keep=tmp_path / ".fits") == first
    # other rows, other folds: not the same fit
    with pytest.raises(TypeError):
        kernel_calibration.run(entry, folds=4, keep=tmp_path / ".fits")
    kernel_calibration.write(entry, first, tmp_path)
    assert not (tmp_path / ".fits").exists()


def test_a_kept_fit_cut_short_by_a_crash_is_fitted_again(tmp_path):
    gemm_table(tmp_path / "gemm_my-gpu.csv")
    hardware_file(tmp_path / "hardware.yaml")
    (entry,), _ = kernel_calibration.plan([tmp_path])
    first = kernel_calibration.run(entry, folds=3, processes=1, keep=tmp_path / ".fits")
    (kept,) = (tmp_path / ".fits").iterdir()
    kept.write_text(kept.read_text()[:100])
    assert kernel_calibration.run(entry, folds=3, processes=1, keep=tmp_path / ".fits") == first


def test_devices_are_told_by_the_file_given_then_the_file_beside_then_the_shipped_ones(tmp_path):
    given = hardware_file(tmp_path / "given.yaml", name="box")
    hardware_file(tmp_path / "tables" / "hardware.yaml", name="bench")
    assert measured_device(tmp_path / "tables" / "gemm_bench.csv").file == tmp_path / "tables" / "hardware.yaml"
    assert measured_device(tmp_path / "tables" / "gemm_box.csv") is None
    assert measured_device(tmp_path / "tables" / "gemm_box.csv", described(given)).file == given
    assert measured_device(tmp_path / "tables" / "gemm_h100_sxm.csv").file is None
    with pytest.raises(SpecError, match="no such file"):
        described(tmp_path / "absent.yaml")


def test_a_calibration_beside_the_file_is_found_whether_or_not_the_folder_bears_its_name(tmp_path):
    inside = hardware_file(tmp_path / "my-gpu" / "hardware.yaml")
    outside = hardware_file(tmp_path / "hardware.yaml")
    assert load_hardware(inside).calibration == load_hardware(outside).calibration == "my-gpu"
    (tmp_path / "my-gpu" / "calibration.yaml").write_text("")
    assert load_hardware(inside).calibration == load_hardware(outside).calibration == str(tmp_path / "my-gpu")


def test_rows_far_from_the_fit_are_counted_and_named_by_their_line(tmp_path):
    hardware = load_hardware("a100")
    sample, fit = sample_of(gemm_table(tmp_path / "gemm_a100_sxm.csv"))
    assert outliers(gemm.OPERATOR, sample, hardware, fit) == []
    sample, fit = sample_of(gemm_table(tmp_path / "gemm_a100_sxm.csv", spoil=(10, 30)))
    (line,) = outliers(gemm.OPERATOR, sample, hardware, fit)
    assert line.startswith("2 of 42 rows")
    assert "line 12 takes" in line
    assert "line 32 takes" in line


def test_sizes_not_measured_are_named(tmp_path):
    sample, _ = sample_of(gemm_table(tmp_path / "gemm_a100_sxm.csv", rows_m=(64, 96, 128, 192, 256)))
    assert gaps(gemm.OPERATOR, sample) == ["no small or large rows: measured 64 to 256 (0.6 decades)"]
    sample, _ = sample_of(gemm_table(tmp_path / "gemm_a100_sxm.csv", shapes=((512, 2048), (4096, 4096))))
    assert gaps(gemm.OPERATOR, sample) == ["only 2 shapes: errors on unseen shapes are poorly known"]


def test_parameters_that_rows_cannot_tell_are_named(tmp_path):
    hardware = load_hardware("a100")
    # large products alone: what launches and weights cost does not show
    shapes = ((4096, 4096), (8192, 8192), (4096, 8192))
    sample, fit = sample_of(gemm_table(tmp_path / "gemm_a100_sxm.csv", range(2048, 8193, 1024), shapes))
    poor = unidentified(gemm.OPERATOR, sample, hardware, fit)
    assert poor
    assert check(gemm.OPERATOR, sample, hardware, fit)[: len(poor)] == poor


def test_report_carries_the_warnings_as_json(tmp_path):
    gemm_table(tmp_path / "gemm_a100_sxm.csv", spoil=(10,))
    arguments = ["calibrate", "--report", str(tmp_path), "--folds", "3", "--processes", "1", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    (device,) = json.loads(result.stdout)["calibrations"].values()
    assert any("1 of 42 rows" in line for line in device["warnings"]["gemm torch/bfloat16"])
    assert not list(tmp_path.glob("**/calibration.yaml"))


def repeated(seconds, name, rows):
    """Exchange rows of one variant on a device."""
    features = {"tokens": np.arange(rows, dtype=float), "ranks": np.full(rows, 8.0)}
    return Sample({"framework": name}, features, seconds, np.zeros(rows, dtype=np.intp), np.arange(rows))


def test_two_like_devices_tell_how_far_one_measurement_is_off():
    """The noise put in; a device slower throughout, rows in another order or without a twin change nothing."""
    rng, rows = np.random.default_rng(0), 4000
    truth = 1e-4 * (1 + np.arange(rows) / 50)
    here, there = (truth * np.exp(0.1 * rng.standard_normal(rows)) for _ in range(2))
    order = rng.permutation(rows)[: rows - 100]
    error = repeat_error_percent(repeated(here, "a", rows), repeated(1.3 * there, "a", rows).take(order))
    assert error == pytest.approx(100 * 0.1 * np.sqrt(2 / np.pi), rel=0.05)
    assert repeat_error_percent(repeated(here[:10], "a", 10), repeated(there[:10], "a", 10)) is None
    plans = [
        kernel_calibration.Plan(name, load_hardware(name), jobs=[(alltoall.OPERATOR, repeated(s, "a", rows), "t.csv")])
        for name, s in (("h100", here), ("h200", there), ("a100", there))
    ]
    found = repeat_errors(plans)
    assert set(found) == {("h100", "moe_alltoall", ("a",)), ("h200", "moe_alltoall", ("a",))}  # an A100's links differ


def test_the_report_says_of_each_table_and_series_whether_its_goal_holds():
    calibrations = {
        name: calibration_files.load(data_folder("profiles") / name / "calibration.yaml")
        for name in ("h100_sxm", "h200_sxm")
    }
    noise = {("h100_sxm", "moe_alltoall", ("vllm", "deepep_ll", "combine")): 14.0}
    found = calibration_report.goals(calibrations, noise)
    assert [of_table["table"] for of_table in found] == ["moe_alltoall_h100_sxm.csv", "moe_alltoall_h200_sxm.csv"]
    for of_table in found:
        rows = [one["rows"] for one in of_table["series"]]
        each = [one["unseen_mape_percent"] for one in of_table["series"]]
        assert of_table["unseen_mape_percent"] == pytest.approx(np.average(each, weights=rows))
        assert of_table["holds"]
        assert [one["holds"] for one in of_table["series"]] == [error <= 12 for error in each]
    missed = {one["series"] for one in found[0]["series"] if not one["holds"]}
    assert missed
    assert all(series.startswith("vllm/") for series in missed)
    assert {one["series"]: one["repeat_percent"] for one in found[0]["series"]}["vllm/deepep_ll/combine"] == 14.0


def test_one_operator_alone_is_fitted_again_and_the_others_stay(tmp_path):
    folder = tmp_path / "my-gpu"
    hardware_file(folder / "hardware.yaml")
    gemm_table(folder / "gemm_my-gpu.csv")
    command = ["calibrate", str(folder), "--folds", "3", "--processes", "1"]
    assert CliRunner().invoke(app, command).exit_code == 0
    written = folder / "calibration.yaml"
    before = calibration_files.load(written)
    stranger = before.fits[0].vary(operator="mla_bmm")
    calibration_files.dump(before.vary(fits=(stranger, before.fits[0].vary(log_sigma=9.0))), written)

    result = CliRunner().invoke(app, [*command, "--operator", "gemm"])
    assert result.exit_code == 0, result.output
    again = calibration_files.load(written)
    assert {fit.operator: fit.log_sigma for fit in again.fits} == {
        "gemm": before.fits[0].log_sigma,
        "mla_bmm": before.fits[0].log_sigma,
    }

    with pytest.raises(CalibrationError, match="--operator moe: no table of it; there are gemm"):
        kernel_calibration.plan([folder], only=["moe"])
    gemm_table(folder / "gemm_my-gpu.csv", rows_m=(2, 8, 32, 128, 512, 2048))
    plans, _ = kernel_calibration.plan([folder], only=["gemm"])
    with pytest.raises(CalibrationError, match="made from other tables"):
        kernel_calibration.with_others(kernel_calibration.run(plans[0], folds=3, processes=1), folder)


# ---- scatter --------------------------------------------------------------------------------------------------------


def swept(noise, groups=40, points=13):
    """Rows of a smooth law of the swept size times log-normal noise; the model knows the law up to a bend."""
    generator = np.random.default_rng(4)
    tokens = np.tile(2.0 ** np.arange(points), groups)
    seconds = 1e-5 * (1 + tokens / 300) * np.exp(noise * generator.standard_normal(tokens.size))
    group = np.repeat(np.arange(groups), points)
    sample = Sample({}, {"tokens": tokens}, seconds, group, np.arange(tokens.size))
    return sample, np.log(seconds / (1e-5 * (1 + tokens / 250)))


@pytest.mark.parametrize("noise", [0.02, 0.15])
def test_scatter_is_the_noise_and_not_the_models_smooth_error(noise):
    sample, residual = swept(noise)
    assert scatter_percent(sample, residual, "tokens") == pytest.approx(100 * noise * np.sqrt(2 / np.pi), rel=0.12)
    assert scatter_percent(sample, residual, None) is None


def test_series_of_different_shapes_are_no_neighbours():
    sample, residual = swept(0.02, groups=2)
    apart = residual + np.where(sample.groups == 1, 1.0, 0.0)
    assert scatter_percent(sample, apart, "tokens") == pytest.approx(scatter_percent(sample, residual, "tokens"))
