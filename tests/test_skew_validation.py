"""Uneven routing beside even routing, and the gain of a cap, from fits that never saw the shape."""

import csv
import gzip
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from simmoe.calibrate import skew
from simmoe.cli.main import app
from simmoe.errors import MeasurementError
from simmoe.specs.load import data_folder
from simmoe.specs.measurement import read_table

WHOLE = Path(data_folder("profiles")) / "h200_sxm" / "moe_h200_sxm.csv.gz"


@pytest.fixture
def part(tmp_path):
    """Every third row of one kernel's series with eight and with six of 256 experts."""
    with gzip.open(WHOLE, "rt", newline="") as file:
        rows = list(csv.DictReader(file))
    kept = [
        row
        for row in rows
        if row["framework"] == "vllm" and row["dtype"] == "fp8_block" and "flashinfer" in row["kernel_source"]
        and (row["hidden_size"], row["num_experts"]) == ("4096", "256") and int(row["num_tokens"]) % 3 == 1
    ]  # fmt: skip
    path = tmp_path / "moe_h200_sxm.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(kept)
    return path


def test_skewed_rows_and_gains_are_judged_apart(part):
    found = CliRunner().invoke(app, ["validate", "skew", str(part), "--json"])
    assert found.exit_code == 0, found.exception
    told = json.loads(found.stdout)
    (errors,) = told["errors"]
    assert errors["balanced_rows"] > 50
    assert errors["power_law_percent"] < errors["balanced_percent"] + 4.0
    gains = {gain["where"]: gain for gain in told["gains_8_to_6"]}
    assert gains["power law"]["cells"] + 1 < gains["all rows"]["cells"]
    for gain in gains.values():
        assert gain["error_points"] < 8.0  # a part of one table; the whole stays within five
        assert gain["error_points"] < gain["no_effect_points"]
        assert 0.5 < gain["scatter_points"] < gain["error_points"] + 1.0


def test_tables_of_other_kernels_are_refused():
    with pytest.raises(MeasurementError, match="no table of expert kernels"):
        skew.compare([WHOLE.parent / "nccl_h200_sxm.csv"])


def test_series_slower_than_their_twins_at_one_token_are_shown_apart():
    """Six of TensorRT-LLM's in the table: one token wakes its eight experts under any law."""
    table = read_table(WHOLE)
    odd = skew.odd_series(table)
    trtllm = odd & (table.text("framework") == "trtllm")
    assert set(table.text("model_like")[trtllm]) == {"MiMo-V2-Flash"}
    assert trtllm.sum() == 6 * 27
    assert not odd[table.number("moe_ep_size") > 1].any()
    assert odd.sum() < 0.02 * table.rows
