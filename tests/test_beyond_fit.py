"""The experiments behind the spread of borrowed and extrapolated times, and that the constants in use are theirs."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from simmoe import console
from simmoe.calibrate.beyond import OUTSIDE, STATED, Beyond, added_log_sigma, experiments
from simmoe.cli import main as cli
from simmoe.costs import borrowing
from simmoe.errors import CalibrationError
from simmoe.report import calibration as calibration_report

PROFILES = Path(__file__).parents[1] / "profiles"


def beyond(log_ratio, distance=1.0, log_sigma=0.05):
    ratio = np.asarray(log_ratio, dtype=float)
    return Beyond(
        operator="gemm", variant="", device="", case="", kind=OUTSIDE,
        log_ratio=ratio, distance=np.full(ratio.shape, distance), log_sigma=log_sigma,
    )  # fmt: skip


@given(sigma=st.floats(0.2, 1.0), distance=st.floats(0.5, 3.0))
def test_the_added_spread_is_found_again_from_draws(sigma, distance):
    draws = np.random.default_rng(0).normal(0, np.hypot(0.05, sigma * distance), 4000)
    assert added_log_sigma([beyond(draws, distance)]) == pytest.approx(sigma, rel=0.08)


def test_nothing_is_added_where_the_own_spread_covers_the_rows():
    draws = np.random.default_rng(0).normal(0, 0.05, 20000)
    assert added_log_sigma([beyond(draws, log_sigma=0.06)]) == pytest.approx(0.0, abs=1e-3)


def test_tables_of_two_devices_give_both_experiments_and_the_command_prints_them():
    words = ["calibrate", "--beyond", str(PROFILES / "h20" / "gemm_h20.csv"), str(PROFILES / "h800" / "gemm_h800.csv")]
    data = json.loads(CliRunner().invoke(cli.app, [*words, "--json"]).stdout)
    assert set(data["kinds"]) == {borrowing.UNLIKE, OUTSIDE}
    for kind, figures in data["kinds"].items():
        assert figures["added_log_sigma_in_use"] == STATED[kind]
    across = {one["case"]: one for one in data["experiments"] if one["kind"] == borrowing.UNLIKE}
    assert set(across) == {"from h20", "from h800"}
    assert across["from h800"]["mean_error_percent"] < 10
    outside = [one for one in data["experiments"] if one["kind"] == OUTSIDE]
    assert {one["case"].split()[0] for one in outside} == {"m", "n", "k"}


def test_a_table_tells_what_is_measured_from_what_is_in_use(capsys):
    console.show(calibration_report.beyond_table([beyond([0.1, -0.3, 0.2])]))
    assert f"{STATED[OUTSIDE]:.2f}" in capsys.readouterr().out


def test_tables_without_a_fit_are_refused():
    with pytest.raises(CalibrationError, match="no table"):
        experiments([PROFILES / "h800" / "mla_prefill_h800.csv"])


@pytest.mark.slow
def test_the_constants_in_use_are_what_is_measured():
    found = experiments([PROFILES])
    for kind, stated in STATED.items():
        assert added_log_sigma([one for one in found if one.kind == kind]) == pytest.approx(stated, rel=0.15)
