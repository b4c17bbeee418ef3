"""Rows judged by engine times that never saw their model: what is left out, what answers instead, what is printed."""

from __future__ import annotations

import csv
import json

import pytest
from typer.testing import CliRunner

from simmoe.cli.main import app
from simmoe.specs.deployment import Deployment
from simmoe.specs.engines import engine_parameters, shipped_entries
from simmoe.specs.measurement import read_table
from simmoe.validation.serving import compare as serving
from simmoe.validation.serving.unseen import SUFFIX, entries_without, left_out

CELLS = {
    "source_id": "a", "model": "DeepSeek-R1", "gpu": "H200-SXM", "num_gpus": 8, "engine": "vllm",
    "engine_version": "0.7.3", "tp": 8, "precision": "fp8", "input_tokens": 800, "output_tokens": 50,
    "concurrency": 4, "spec_decoding": "none", "output_tokens_per_s": 100.0, "tpot_ms_mean": 20.0,
}  # fmt: skip
V3, LITE = "DeepSeek-V3", "DeepSeek-V2-Lite"


def write(path, *rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("model", sorted({model for entry in shipped_entries() for model in entry.fitted_to}))
def test_no_entry_fitted_to_a_model_answers_once_it_is_left_out(model):
    kept = {(e.engine, e.version, e.before, e.device): e for e in entries_without(model)}
    for entry in shipped_entries():
        place = (entry.engine, entry.version, entry.before, entry.device)
        if entry.fitted_to == (model,):
            assert place not in kept
        elif model in entry.fitted_to:
            times = ("host_time_per_step", "front_end_time", "front_end_time_per_request", "front_end_time_per_token")
            assert any(getattr(kept[place], name) != getattr(entry, name) for name in times)
            assert f"without {model}" in kept[place].source
        else:
            assert kept[place] == entry


def test_what_a_model_alone_was_fitted_to_gives_way_to_the_next_entry():
    old = Deployment(engine="vllm", engine_version="0.7.3")
    with left_out(V3):
        newer = engine_parameters(old, "any")
    assert (newer.before, newer.kernel_slowdown) == ("0.14", 1.0)
    with left_out(LITE):
        assert engine_parameters(old, "any").before == "0.8"
    assert engine_parameters(old, "any").before == "0.8"


def test_a_row_is_judged_without_its_model_and_predicted_as_before_afterwards(tmp_path):
    table = read_table(write(tmp_path / "runs.csv", CELLS, CELLS | {"source_id": "b", "model": "no such model"}))
    shipped = serving.compare(table)
    unseen = serving.compare_unseen(table)
    assert serving.compare(table).comparisons == shipped.comparisons
    known, hidden = ({c.quantity: c.predicted for c in found.comparisons} for found in (shipped, unseen))
    assert known.keys() == hidden.keys()
    assert hidden["tpot_mean"] < 0.7 * known["tpot_mean"]  # an old release without its slowdown
    assert {c.file for c in unseen.comparisons} == {f"runs.csv{SUFFIX}"}


def test_validate_prints_both_figures_and_counts_rows_once(tmp_path):
    write(tmp_path / "runs.csv", CELLS, CELLS | {"source_id": "b", "model": "no such model"})
    write(tmp_path / "look.csv", {"file": "runs.csv", "source_id": "a"})
    for paths in ([str(tmp_path)], [str(tmp_path / "look.csv")]):
        shown = CliRunner().invoke(app, ["validate", *paths, "--unseen", "--json"])
        assert shown.exit_code == 0, shown.output
        told = json.loads(shown.stdout)
        seen, hidden = told["lists"]["look.csv"], told["lists"][f"look.csv{SUFFIX}"]
        assert seen["n"] == hidden["n"] == {"throughput": 1, "tpot": 1}
        assert seen["rows"][0]["tpot"]["predicted"] > hidden["rows"][0]["tpot"]["predicted"]
        assert sum(group["group"].endswith(SUFFIX) for group in told["groups"]) == 2
    whole = json.loads(CliRunner().invoke(app, ["validate", str(tmp_path), "--unseen", "--json"]).stdout)
    assert [entry["n"] for entry in whole["skipped"]] == [1]
