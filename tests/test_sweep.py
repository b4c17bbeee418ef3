"""Sweeps: every combination once, infeasible ones with their reason, the same wherever and however often they run."""

import csv
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from simmoe.cli import main as cli
from simmoe.errors import MeasurementError, SpecError
from simmoe.planning.grid import Grid, load_grid, points
from simmoe.planning.objective import Limit
from simmoe.planning.offers import offers_from
from simmoe.planning.question import Question
from simmoe.planning.search import plan
from simmoe.planning.sweep import evaluate, sweep
from simmoe.predict import predict
from simmoe.report import plan as plan_report
from simmoe.specs import load
from simmoe.specs.deployment import Deployment
from simmoe.specs.workload import Lengths, Workload

GRID = """
model: deepseek-v2-lite
hardware: [h100, l40s]
deployment: {tp: [1, 2, 3], active_experts: [6, 3]}
workload: {concurrency: [1, 32], input: 512, output: 128}
"""


def small(**changes):
    known = {
        "model": "deepseek-v2-lite",
        "hardware": ["h100", "l40s"],
        "deployment": {"tp": [1, 2, 3]},
        "workload": {"rate": [1, 8], "input": 512, "output": 128},
    }
    return Grid.model_validate({**known, **changes})


def test_a_grid_is_the_product_of_its_lists():
    found = points(small())
    assert len(found) == 2 * 3 * 2 == len({point.key for point in found})
    chosen = {
        (dict(p.fields)["hardware"], dict(p.fields)["deployment.tp"], dict(p.fields)["workload.rate"]) for p in found
    }
    assert chosen == set(itertools.product(["h100", "l40s"], [1, 2, 3], [1, 8]))


def test_ranges_are_spaced_as_they_say():
    grid = small(workload={"rate": {"from": 1, "to": 16, "steps": 5, "scale": "log"}, "input": 512, "output": 128})
    assert [dict(p.fields)["workload.rate"] for p in points(grid)[:5]] == [1, 2, 4, 8, 16]
    with pytest.raises(SpecError, match="not a range"):
        points(small(deployment={"tp": {"from": 1, "upto": 4}}))
    with pytest.raises(SpecError, match=r"rate.steps: 0 values are none; give 1 or more"):
        points(small(workload={"rate": {"from": 1, "to": 64, "steps": 0, "scale": "log"}, "input": 512, "output": 128}))


def test_a_row_is_the_prediction_of_its_point():
    (row,) = sweep(small(hardware="h100", deployment={"tp": 1}, workload={"rate": 8, "input": 512, "output": 128}))
    asked = Workload(rate=8, input=Lengths(mean=512), output=Lengths(mean=128))
    direct = predict(load.load_hardware("h100"), load.load_model("deepseek-v2-lite"), Deployment(tp=1), asked)
    assert row["status"] == "ok"
    assert row["tpot_p99_s"] == direct.metrics.tpot.p99
    assert row["usd_per_hour"] == pytest.approx((1.5 + 5.0) / 2)


def test_what_cannot_be_stays_with_its_reason():
    rows = sweep(small())
    by_tp = {tp: [row for row in rows if row["deployment.tp"] == tp] for tp in (1, 3)}
    assert {row["status"] for row in by_tp[3]} == {"infeasible"}
    assert all("tp 3 does not divide" in row["reason"] for row in by_tp[3])
    (swamped,) = sweep(
        small(hardware="l40s", deployment={"tp": 1}, workload={"rate": 1e4, "input": 512, "output": 128})
    )
    assert swamped["status"] == "saturated" and swamped["saturation_output_tokens_per_s"] > 0
    (unfit,) = sweep(
        small(model="deepseek-v3", hardware="l40s", deployment={}, workload={"rate": 1, "input": 9, "output": 9})
    )
    assert unfit["status"] == "infeasible" and "weights" in unfit["reason"]


def test_an_interrupted_sweep_goes_on_where_it_ended(tmp_path, monkeypatch):
    out = tmp_path / "grid.csv"
    grid = small(deployment={"tp": [1, 2]})
    whole = sweep(grid, out=out)
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:4]) + lines[4][:30])  # killed in the middle of a line
    done = []
    from simmoe.planning import sweep as module

    monkeypatch.setattr(module, "evaluate", lambda point: done.append(point.key) or evaluate(point))
    again = sweep(grid, out=out)
    assert len(done) == len(whole) - 3
    assert again == whole
    assert sweep(grid, out=out) == whole
    assert len(done) == len(whole) - 3


def test_processes_and_reruns_give_the_same_table(tmp_path):
    grid = small(method="simulated", requests=50, hardware="h100", deployment={"tp": [1, 2]})
    assert sweep(grid) == sweep(grid, processes=2)
    sweep(grid, out=tmp_path / "a.csv")
    sweep(grid, out=tmp_path / "b.csv", processes=2)
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_a_simulated_point_depends_on_its_seed():
    one, same, other = (
        sweep(small(method="simulated", requests=50, hardware="h100", deployment={}, seed=seed))[1]
        for seed in (1, 1, 2)
    )
    assert one["ttft_p99_s"] == same["ttft_p99_s"] != other["ttft_p99_s"]


def test_parquet_holds_the_same_rows(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = sweep(small(), out=tmp_path / "grid.parquet")
    table = parquet.read_table(tmp_path / "grid.parquet").to_pylist()
    assert [row["tpot_p99_s"] for row in table] == [row["tpot_p99_s"] for row in rows]
    assert [row["status"] for row in table] == [row["status"] for row in rows]


def test_a_table_of_something_else_is_not_written_to(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(MeasurementError, match="not a table of a sweep"):
        sweep(small(), out=tmp_path / "other.csv")
    assert (tmp_path / "other.csv").read_text() == "a,b\n1,2\n"


def test_a_sweep_over_other_fields_is_not_mixed_in(tmp_path):
    sweep(small(), out=tmp_path / "grid.csv")
    with pytest.raises(MeasurementError, match="other fields"):
        sweep(small(deployment={"ep": [1]}), out=tmp_path / "grid.csv")


def test_command_writes_the_table_and_counts(tmp_path):
    (tmp_path / "grid.yaml").write_text(GRID)
    out = tmp_path / "grid.csv"
    result = CliRunner().invoke(cli.app, ["sweep", str(tmp_path / "grid.yaml"), "--out", str(out), "--processes", "1"])
    assert result.exit_code == 0
    assert "24 points, 16 ok, 8 infeasible" in result.stdout
    with out.open() as file:
        assert len(list(csv.DictReader(file))) == 24


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: x\nworkload: {}\n", "hardware"),
        ("model: x\nhardware: h\nworkload: {}\nmodle: 3\n", "modle"),
        ("[]", "mapping"),
    ],
)
def test_a_wrong_grid_is_one_line(tmp_path, text, words):
    (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(SpecError, match=words):
        load_grid(tmp_path / "grid.yaml")


def test_ray_gives_the_same_table_and_the_same_plan():
    """One local cluster for both: starting it is most of the time."""
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    asked = Question(
        models=(load.load_model("deepseek-v2-lite"),),
        offers=offers_from("h100,l40s"),
        workload=Workload(rate=10.0, input=Lengths(mean=600), output=Lengths(mean=120)),
        limits=(Limit("tpot", "p99", 0.03),),
        replica_devices=2,
        requests=100,
    )
    grid = small(method="simulated", requests=50)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        assert sweep(grid, ray="auto") == sweep(grid)
        assert plan_report.plan_json(plan(asked, ray="auto")) == plan_report.plan_json(plan(asked))
    finally:
        ray.shutdown()


def test_a_sweep_without_a_point_that_can_be_served_says_why_and_fails(tmp_path):
    (tmp_path / "grid.yaml").write_text(
        "{model: deepseek-v3, hardware: l40s, workload: {rate: 1, input: 5, output: 5}}"
    )
    words = ["sweep", str(tmp_path / "grid.yaml"), "--out", str(tmp_path / "grid.csv"), "--processes", "1"]
    problem = CliRunner().invoke(cli.app, words).exception
    assert isinstance(problem, SpecError)
    assert "grid.yaml: no point can be served; the first: " in str(problem)
    assert "weights" in str(problem)


SLIPS = {
    "key of a deployment": ("tp: [1, 2, 3]", "tpp: 1", "deployment.tpp: unknown key; did you mean 'tp'?"),
    "key of a workload": ("concurrency", "concurency", "workload.concurency: unknown key; did you mean 'concurrency'?"),
    "key below": ("tp: [1, 2, 3]", "routing: {popularty: zipf}", "deployment.routing.popularty: unknown key; did you"),
    "one of several values": ("tp: [1, 2, 3]", "tp: [1, 0]", "deployment.tp: 0 will not do"),
    "text for a number": ("tp: [1, 2, 3]", "gpus: two", "deployment.gpus: 'two' will not do"),
    "half a rank": ("tp: [1, 2, 3]", "tp: {from: 1, to: 2, steps: 3}", "deployment.tp: 1.5 will not do"),
    "length that is none": (
        "input: 512",
        "input: short",
        "workload.input: 'short' will not do: give a number of tokens",
    ),
    "no length": ("input: 512, ", "", "workload.input: missing"),
    "hardware": ("h100", "h1000", "hardware 'h1000' is not known; did you mean 'h100'"),
    "model": ("deepseek-v2-lite", "deepseek-v2-lit", "model 'deepseek-v2-lit' is not known; did you mean"),
    "same value twice": ("[6, 3]", "[6, 6]", "deployment.active_experts: 6 is given twice"),
    "price of another": ("model", "price: {h200: 2}\nmodel", "price.h200: not among the grid's hardware: h100, l40s"),
}


@pytest.mark.parametrize(("right", "wrong", "says"), SLIPS.values(), ids=SLIPS)
def test_a_slip_ends_a_sweep_in_one_line_and_leaves_no_table(simmoe, tmp_path, right, wrong, says):
    (tmp_path / "grid.yaml").write_text(GRID.replace(right, wrong, 1))
    status, out, err = simmoe("sweep", "grid.yaml", "--out", "grid.csv", "--processes", "1")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"simmoe: grid.yaml: {says}")
    assert not (tmp_path / "grid.csv").exists()


def test_a_table_of_other_inputs_is_refused_with_how_to_go_on_and_a_wider_grid_goes_on(simmoe, tmp_path):
    grid = "{model: deepseek-v2-lite, hardware: mine.yaml, workload: {rate: [1, 2], input: 512, output: 128}}"
    for name in ("h100", "l40s"):
        described = load.hardware_names()[name].read_text()
        (tmp_path / f"{name}.yaml").write_text(described)
    (tmp_path / "mine.yaml").write_text((tmp_path / "h100.yaml").read_text())

    def swept(text):
        (tmp_path / "grid.yaml").write_text(text)
        return subprocess.run(
            [Path(sys.executable).with_name("simmoe"), "sweep", "grid.yaml", "--out", "grid.csv", "--processes", "1"],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip

    assert swept(grid).stdout == "grid.csv: 2 points, 2 ok\n"
    table = (tmp_path / "grid.csv").read_bytes()
    how = "; give another --out, or delete grid.csv to begin anew\n"
    for changed, says in (
        (grid.replace("[1, 2]", "[1, 3]"), "1 of its 2 rows are not of this grid (the first has workload.rate 2, the "),
        (grid.replace("model:", "seed: 1, model:"), "2 of its 2 rows are not of this grid (made with another method, "),
        (grid.replace("rate: [1", "think_time: 0, rate: [1"), "other fields (it lacks workload.think_time)"),
    ):
        refused = swept(changed)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert refused.stderr.startswith("simmoe: grid.csv: ") and refused.stderr.endswith(how)
        assert says in refused.stderr
    assert (tmp_path / "grid.csv").read_bytes() == table
    assert swept(grid.replace("[1, 2]", "[1, 2, 3]")).stdout == "grid.csv: 3 points, 3 ok\n"
    assert (tmp_path / "grid.csv").read_bytes().startswith(table)
    (tmp_path / "mine.yaml").write_text((tmp_path / "l40s.yaml").read_text())  # the same name, another device
    assert "other contents of the model's, hardware's" in swept(grid).stderr
