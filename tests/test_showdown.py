"""The showdown on a small made-up folder: figures as the runs define them, any model, peers on the same runs."""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from simmoe.cli import main as cli
from simmoe.sim.offload_books import bookkeeping_of
from simmoe.simulation import run_scenario
from simmoe.specs.engines import engine_parameters
from simmoe.specs.scenario import load_scenario
from simmoe.validation import run as validation_run
from simmoe.validation.showdown import compare as showdown
from simmoe.validation.showdown import fit as showdown_fit
from simmoe.validation.showdown import scenarios as showdown_scenarios
from simmoe.validation.showdown.runs import Run, read_runs
from simmoe.validation.showdown.scenarios import scenario_of
from simmoe.validation.showdown.table import large_misses
from simmoe.validation.summary import summarise

SHIPPED = Path(__file__).parents[1] / "validate" / "vllm_showdown"
ROW = {
    "exp_id": "x1",
    "series": "test",
    "model": "Qwen3-30B-A3B",
    "hf_id": "Qwen/Qwen3-30B-A3B",
    "is_moe": "1",
    "precision_label": "FP16",
    "gpu": "H100-80GB-SXM",
    "tp": "2",
    "dp": "1",
    "pp": "1",
    "ep": "not stated",
    "engine_version": "0.15.1 (fork)",
    "max_num_seqs": "64",
    "max_num_batched_tokens": "2048",
    "kv_block_size": "16",
    "gpu_memory_utilization": "0.9 (assumed)",
    "prefix_caching": "1",
    "stages": "2rps*40s;4rps*40s",
    "system_prompt_tokens_nominal": "100",
    "question_tokens_nominal": "400",
    "unique_prompts": "100",
    "output_tokens_nominal": "100",
    "output_tokens_measured_mean": "98",
    "saturated": "",
    "cpu_offload": "",
    "cpu_kv_blocks": "",
    "trace_file": "",
}


def folder(tmp_path: Path, *rows: dict[str, str], trace: list[dict[str, object]] | None = None) -> Path:
    with (tmp_path / "experiments.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(ROW))
        writer.writeheader()
        writer.writerows(ROW | row for row in rows)
    lines = ["exp_id,stage,metric,value,unit,kind,source"]
    for row in rows:
        name = (ROW | row)["exp_id"]
        for metric, value in (("e2e_mean", 1000), ("ttft_mean", 30), ("itl_mean", 10), ("output_throughput", 300)):
            lines.append(f"{name},all,{metric},{value},ms,measured,test")
    (tmp_path / "measured.csv").write_text("\n".join(lines), encoding="utf-8")
    peers = ["simulator,exp_id,is_moe,stage,metric,unit,predicted,measured,ape_percent,source"]
    peers += [
        "other@1,x1,1,all,e2e_mean,ms,1100,1000,10,test",
        "other@1,x1,1,0,e2e_mean,ms,5000,1000,400,test",
        "other@1,gone,1,all,e2e_mean,ms,5000,1000,400,test",
    ]
    (tmp_path / "peer_predictions.csv").write_text("\n".join(peers), encoding="utf-8")
    if trace is not None:
        (tmp_path / "traces").mkdir()
        with gzip.open(tmp_path / "traces" / "x1.csv.gz", "wt", newline="") as file:
            traced = csv.DictWriter(file, list(trace[0]))
            traced.writeheader()
            traced.writerows(trace)
    return tmp_path


def only(path: Path) -> Run:
    runs, refused = read_runs(path)
    assert not refused
    return runs[0]


def test_any_model_and_layout_is_compared_and_peers_stand_on_the_same_runs(tmp_path: Path) -> None:
    path = folder(tmp_path, {}, {"exp_id": "x2", "model": "Llama-3.1-8B", "hf_id": "a/Llama-3.1-8B", "is_moe": "0"})
    outcome = validation_run.compare([path])
    errors = {(g.group, g.quantity): g for g in summarise(outcome.comparisons)}
    for quantity in ("e2e_mean", "ttft_mean", "itl_mean", "output_tokens_per_s"):
        assert errors["vllm_showdown/simmoe/all", quantity].n == 2
        assert errors["vllm_showdown/simmoe/moe", quantity].n == 1
    peer = errors["vllm_showdown/other@1/all", "e2e_mean"]
    assert (peer.n, round(peer.mape_percent, 6)) == (1, 10.0)


def test_unknown_model_is_counted_with_its_reason(tmp_path: Path) -> None:
    outcome = showdown.compare(folder(tmp_path, {}, {"exp_id": "x2", "model": "Nobody-1B", "hf_id": "no/Nobody-1B"}))
    assert len(outcome.skipped) == 1
    assert "Nobody-1B" in next(iter(outcome.skipped))


def test_command_takes_experiments_nobody_has_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other models, devices, layouts, limits and loads; what cannot be done is told and the rest compared."""
    rows = [
        {"exp_id": "moe-dp", "model": "Mixtral-8x22B", "hf_id": "a/Mixtral-8x22B-v0.1", "tp": "4", "dp": "2"},
        {"exp_id": "moe-a100", "model": "Phi-3.5-MoE", "hf_id": "", "gpu": "A100-80GB-SXM", "stages": "1rps*60s"},
        {"exp_id": "moe-fp8", "model": "Llama-4-Scout", "precision_label": "FP8", "gpu": "H200-141GB-SXM"},
        {
            "exp_id": "dense",
            "model": "Qwen3-32B",
            "hf_id": "Qwen/Qwen3-32B",
            "tp": "2",
            "max_num_batched_tokens": "512",
        },
        {
            "exp_id": "dense-dp",
            "model": "?",
            "hf_id": "a/Mistral-7B-Instruct-v0.2",
            "dp": "2",
            "tp": "1",
            "gpu": "L40S-48GB",
        },
        {"exp_id": "no-cache", "prefix_caching": "0", "max_num_seqs": "16", "cpu_offload": "1"},
        {"exp_id": "small", "tp": "1", "model": "Llama-2-70B", "hf_id": "a/Llama-2-70b-hf"},
        {"exp_id": "unknown", "model": "Nobody-1B", "hf_id": "no/Nobody-1B"},
    ]
    path = folder(tmp_path, *rows)
    with (path / "measured.csv").open("a", encoding="utf-8") as file:
        file.writelines(f"\n{row['exp_id']},all,ttft_p99,60,ms,measured,test" for row in rows)
    monkeypatch.setattr(sys, "argv", ["simmoe", "validate", str(path), "--json"])
    with contextlib.suppress(SystemExit):
        cli.main()
    told = json.loads(capsys.readouterr().out)
    counted = {(g["group"], g["quantity"]): g["n"] for g in told["groups"]}
    for quantity in ("e2e_mean", "ttft_mean", "itl_mean", "ttft_p99", "output_tokens_per_s"):
        assert counted["vllm_showdown/simmoe/all", quantity] == 6
        assert counted["vllm_showdown/simmoe/moe", quantity] == 4
    skipped = json.dumps(told["skipped"])
    assert "small: CapacityError: Llama-2-70B in bfloat16 needs" in skipped
    assert "unknown: SpecError: model 'no/Nobody-1B' is not known" in skipped


def test_more_of_a_resource_is_never_slower(tmp_path: Path) -> None:
    """Devices, bandwidth, cached prompts, narrower weights; and a higher rate is never quicker."""
    runs = read_runs(
        folder(
            tmp_path,
            {"exp_id": "base", "stages": "4rps*60s"},
            {"exp_id": "tp4", "stages": "4rps*60s", "tp": "4"},
            {"exp_id": "h200", "stages": "4rps*60s", "gpu": "H200-141GB-SXM"},
            {"exp_id": "fp8", "stages": "4rps*60s", "precision_label": "FP8"},
            {"exp_id": "a100", "stages": "4rps*60s", "gpu": "A100-80GB-SXM"},
            {"exp_id": "uncached", "stages": "4rps*60s", "prefix_caching": "0"},
            {"exp_id": "busy", "stages": "16rps*60s"},
            {"exp_id": "few seats", "stages": "16rps*60s", "max_num_seqs": "16"},
        )
    )[0]
    e2e = {run.name: showdown.predict_run(run)["all"].e2e_mean for run in runs}
    assert max(e2e["tp4"], e2e["h200"], e2e["fp8"]) < e2e["base"]
    assert e2e["base"] < min(e2e["a100"], e2e["uncached"], e2e["busy"])
    assert e2e["busy"] < e2e["few seats"]


def test_overloaded_runs_stand_apart(tmp_path: Path) -> None:
    outcome = showdown.compare(folder(tmp_path, {"saturated": "overloaded: many failed"}))
    assert {c.group for c in outcome.comparisons} == {
        "vllm_showdown/simmoe/overloaded",
        "vllm_showdown/other@1/overloaded",
    }


def test_figures_are_formed_as_measured(tmp_path: Path) -> None:
    run = only(folder(tmp_path, {}))
    figures = showdown.predict_run(run)["all"]
    assert figures.itl_mean == pytest.approx((figures.e2e_mean - figures.ttft_mean) / 97)
    assert figures.succeeded == 240
    span = 240 * 98 / figures.output_tokens_per_s
    assert run.arrival_s[-1] - run.arrival_s[0] < span < run.arrival_s[-1] + 5


def test_requests_follow_the_stages_and_prompts_repeat(tmp_path: Path) -> None:
    run = only(folder(tmp_path, {}))
    assert [(run.stage == n).sum() for n in (0, 1)] == [80, 160]
    assert run.arrival_s[80] > 43
    assert (np.diff(run.arrival_s) >= 0).all()
    assert run.prompt.tolist() == [i % 100 for i in range(240)]
    assert run.deployment.nucleus_sampling


def test_prefix_caching_shortens_ttft_and_can_be_off(tmp_path: Path) -> None:
    off, on = tmp_path / "off", tmp_path / "on"
    off.mkdir()
    on.mkdir()
    without = showdown.predict_run(only(folder(off, {"prefix_caching": "0"})))["1"]
    cached = showdown.predict_run(only(folder(on, {})))["1"]
    assert cached.ttft_mean < 0.9 * without.ttft_mean


def test_trace_is_replayed_request_by_request(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"idx": i, "stage": 0, "arrival_s": 10 + i, "prompt_id": i % 3, "input_tokens": 400 + i % 3, "output_tokens": 5}
        for i in range(6)
    ]
    run = only(folder(tmp_path, {"trace_file": "traces/x1.csv.gz"}, trace=rows))
    assert run.arrival_s.tolist() == [0, 1, 2, 3, 4, 5]
    assert run.prompt.tolist() == [0, 1, 2, 0, 1, 2]
    assert run.output_tokens == 100  # what the server generates, whatever its text is tokenised to


def test_trace_is_found_however_it_is_packed_and_may_lack_columns(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"idx": i, "arrival_s": 0.5 * i, "input_tokens": "" if i == 2 else 300} for i in range(5)
    ]
    path = folder(tmp_path, {"trace_file": "elsewhere/x1.csv"}, trace=rows)
    run = only(path)
    assert run.arrival_s.tolist() == [0, 0.5, 1, 1.5, 2]
    assert run.input_tokens.tolist() == [300] * 5
    assert run.stage.tolist() == [0] * 5
    assert run.prompt.tolist() == [0, 1, 2, 3, 4]


def test_run_without_its_trace_follows_its_load(tmp_path: Path) -> None:
    run = only(folder(tmp_path, {"trace_file": "traces/gone.csv.gz"}))
    assert run.arrival_s.size == 2 * 40 + 4 * 40


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"stages": "8rps"}, "stages '8rps': not like 8rps\\*600s"),
        ({"output_tokens_nominal": "", "output_tokens_measured_mean": ""}, "no output_tokens_nominal"),
        ({"tp": "3"}, "tp 3 does not divide the 32 heads"),
        ({"max_num_seqs": "0"}, "max_num_seqs: 0 will not do"),
        ({"gpu": "TPU-v9"}, "'TPU-v9' is not known"),
    ],
)
def test_row_that_cannot_be_run_is_one_clear_line(tmp_path: Path, change: dict[str, str], reason: str) -> None:
    outcome = showdown.compare(folder(tmp_path, {}, {"exp_id": "x2"} | change))
    [skipped] = outcome.skipped
    assert re.search(reason, skipped)
    assert skipped.startswith(f"{tmp_path.name}/x2: ")
    assert "\n" not in skipped
    assert {c.source_id for c in outcome.comparisons} == {"x1"}


def test_optional_columns_may_be_missing(tmp_path: Path) -> None:
    path = folder(tmp_path, {})
    few = ("exp_id", "model", "gpu", "stages", "tp", "question_tokens_nominal", "output_tokens_nominal")
    (path / "experiments.csv").write_text(
        ",".join(few) + "\n" + ",".join(ROW[name] for name in few) + "\n", encoding="utf-8"
    )
    (path / "peer_predictions.csv").unlink()
    groups = {c.group for c in showdown.compare(path).comparisons}
    assert groups == {"vllm_showdown/simmoe/all", "vllm_showdown/simmoe/moe"}
    measured = (path / "measured.csv").read_text(encoding="utf-8").replace("ttft_mean,30", "ttft_mean,700")
    (path / "measured.csv").write_text(measured, encoding="utf-8")
    assert {c.group for c in showdown.compare(path).comparisons} == {"vllm_showdown/simmoe/overloaded"}


def test_pool_in_host_memory_has_the_blocks_that_were_logged_or_fit(tmp_path: Path) -> None:
    rows = [{}, {"exp_id": "x2", "cpu_offload": "1"}, {"exp_id": "x3", "cpu_offload": "1", "cpu_kv_blocks": "77"}]
    runs = read_runs(folder(tmp_path, *rows))[0]
    per_block = 16 * 48 * (4 / 2) * 2 * 128 * 2  # tokens, layers, KV heads on a device, keys and values, width, B
    books = [bookkeeping_of(run.model, run.deployment, showdown.parameters_for(run)) for run in runs]
    assert [kept and kept.blocks for kept in books] == [None, int(8 * 2**30 // per_block), 77]


def test_overfilled_pool_in_host_memory_slows_the_run(tmp_path: Path) -> None:
    rows = [{"cpu_kv_blocks": "1000"}, {"exp_id": "x2"}, {"exp_id": "x3", "cpu_offload": ""}]
    same = {"cpu_offload": "1", "output_tokens_nominal": "400", "stages": "40rps*10s"}
    runs = read_runs(folder(tmp_path, *[same | row for row in rows]))[0]
    parameters = showdown.parameters_for(runs[0]).vary(offload_entry_time=4e-7)
    slow, free, none = (showdown.predict_run(run, parameters)["all"].itl_mean for run in runs)
    assert free == pytest.approx(none, rel=5e-3)
    assert slow > 1.3 * none


def test_ranks_of_a_dense_model_are_engines_of_their_own(tmp_path: Path) -> None:
    dense = {"model": "Llama-3.1-8B", "hf_id": "a/Llama-3.1-8B", "tp": "1", "stages": "16rps*60s"}
    two, one = read_runs(folder(tmp_path, dense | {"dp": "2"}, dense | {"exp_id": "x2", "stages": "8rps*60s"}))[0]
    parameters = showdown.parameters_for(one)
    two_s, one_s = (showdown.predict_run(run, parameters)["all"].itl_mean for run in (two, one))
    assert two_s == pytest.approx(one_s, rel=0.02)  # lock step would wait for the slower of two


def test_entry_time_is_recovered_from_overloaded_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"stages": "40rps*10s", "output_tokens_nominal": "400", "saturated": "1", "cpu_offload": "1"}
    path = folder(tmp_path, row | {"cpu_kv_blocks": "1000"})
    values = {"front_end_time": 6e-3}
    monkeypatch.setattr(showdown_fit, "ENTRY_TIMES", np.geomspace(2e-7, 8e-7, 4))
    truth = showdown.parameters_for(only(path)).vary(offload_entry_time=4e-7, **values)
    itl = showdown.predict_run(only(path), truth)["all"].itl_mean
    monkeypatch.setattr(showdown_fit, "measured_figures", lambda _: {("x1", "0"): {"itl_mean": itl}})
    found, without = showdown_fit.estimate_entry_time(path, values, {"Qwen3-30B-A3B": values})
    assert found == pytest.approx(4e-7, rel=0.1)
    assert without == {"Qwen3-30B-A3B": 0.0}  # nothing to learn it from


def test_runs_of_an_estimated_model_use_parameters_estimated_without_it(tmp_path: Path) -> None:
    shared = {"model": "Mixtral-8x7B", "hf_id": "mistralai/Mixtral-8x7B-v0.1"}
    runs, _ = read_runs(folder(tmp_path, {}, shared | {"exp_id": "x2"}))
    table = showdown._estimates()
    new, known = (showdown.parameters_for(run) for run in runs)
    assert new.front_end_time == table["all"]["front_end_time"]
    assert known.front_end_time == table["without"]["Mixtral-8x7B"]["front_end_time"]
    assert known.steps_ahead == 1


def test_estimate_recovers_the_parameters_that_made_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"exp_id": "x1", "model": "Llama-3.1-8B", "hf_id": "a/Llama-3.1-8B", "is_moe": "0", "tp": "1"},
        {"exp_id": "x2", "model": "Mistral-Nemo-12B", "hf_id": "a/Mistral-Nemo", "is_moe": "0", "tp": "1"},
        {"exp_id": "x3", "model": "Llama-3.1-8B", "hf_id": "a/Llama-3.1-8B", "is_moe": "0", "stages": "30rps*20s"},
    ]
    path = folder(tmp_path, *rows)
    truth = {"front_end_time": 8e-3, "front_end_time_per_request": 60e-6, "host_time_per_step": 0.2e-3}
    truth["nucleus_time"] = 0.6e-3
    from simmoe.specs.engines import EngineParameters

    parameters = EngineParameters.model_validate({"engine": "vllm", "source": "", **showdown.KNOWN, **truth})
    figures = {}
    for run in read_runs(path)[0]:
        for stage, made in showdown.predict_run(run, parameters).items():
            figures[run.name, stage] = {"itl_mean": made.itl_mean, "ttft_mean": made.ttft_mean}
    monkeypatch.setattr(showdown_fit, "measured_figures", lambda _: figures)
    found, without = showdown_fit.estimate(path, rounds=12)
    for name, value in truth.items():
        assert found[name] == pytest.approx(value, rel=0.3), name
    assert found["front_end_time"] == pytest.approx(8e-3, rel=0.05)
    assert set(without) == {run.model.name for run in read_runs(path)[0]}


def test_large_misses_name_run_and_figure(tmp_path: Path) -> None:
    lines = large_misses(showdown.compare(folder(tmp_path, {})).comparisons)
    assert any(line.startswith("x1: ") for line in lines)


def test_a_scenario_simulates_what_is_validated() -> None:
    run = next(run for run in read_runs(SHIPPED)[0] if run.name == "gt02")
    agree(run, SHIPPED / "scenarios" / "gt02.yaml", rel=1e-9)


@pytest.mark.slow
def test_a_scenario_of_an_overfull_pool_simulates_what_is_validated() -> None:
    """At the client's time limit only the whole run agrees; its scenario goes on with those who gave up."""
    run = next(run for run in read_runs(SHIPPED)[0] if run.name == "gt12")
    _, served_s = showdown._played(run, showdown.parameters_for(run))
    result = run_scenario(load_scenario(SHIPPED / "scenarios" / "gt12.yaml"))
    assert result.runs[0].requests.finished_s == pytest.approx(served_s, rel=1e-9)


def test_the_shipped_scenarios_are_what_is_written_of_the_runs() -> None:
    for run in read_runs(SHIPPED)[0]:
        text = (SHIPPED / "scenarios" / f"{run.name}.yaml").read_text(encoding="utf-8")
        assert yaml.safe_load(text) == scenario_of(run), run.name


def test_a_scenario_has_the_deployment_and_the_engine_of_its_run() -> None:
    for run in read_runs(SHIPPED)[0]:
        told = load_scenario(SHIPPED / "scenarios" / f"{run.name}.yaml").deployment
        assert told.vary(engine_overrides=None, host_time_per_step=None) == run.deployment, run.name
        engine = engine_parameters(told, run.hardware.device.name)
        numbers = {name: value for name, value in engine.model_dump().items() if isinstance(value, int | float)}
        if run.deployment.kv_offload is None:
            numbers["offload_entry_time"] = showdown.parameters_for(run).offload_entry_time
        assert numbers == {name: getattr(showdown.parameters_for(run), name) for name in numbers}, run.name


def test_a_written_scenario_keeps_the_books_of_its_pool(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"idx": i, "stage": 0, "arrival_s": 0.02 * i, "prompt_id": i % 100, "input_tokens": 500, "output_tokens": 398}
        for i in range(300)
    ]
    run_row = {"cpu_offload": "1", "cpu_kv_blocks": "1000", "output_tokens_nominal": "400", "trace_file": "x1.csv.gz"}
    path = folder(tmp_path, run_row, trace=rows)
    (path / "scenarios").mkdir()
    showdown_scenarios.write(path)
    file = path / "scenarios" / "x1.yaml"
    run = only(path)
    kept = agree(run, file, rel=1e-9)
    told = yaml.safe_load(file.read_text(encoding="utf-8"))
    told["deployment"]["engine_overrides"]["offload_entry_time"] = "400 ns"
    file.write_text(yaml.safe_dump(told), encoding="utf-8")
    slower = agree(run, file, rel=1e-9, offload_entry_time=4e-7)
    assert slower > 1.3 * kept


def agree(run: Run, scenario: Path, rel: float, **changes: float) -> float:
    """Compare `simmoe simulate` with what is validated; the mean time of a request. [ms]"""
    validated = showdown.predict_run(run, showdown.parameters_for(run).vary(**changes))["all"]
    metrics = run_scenario(load_scenario(scenario)).metrics
    assert metrics.ttft.mean * 1e3 == pytest.approx(validated.ttft_mean, rel=rel)
    assert metrics.ttft.p99 * 1e3 == pytest.approx(validated.ttft_p99, rel=rel)
    assert metrics.e2e.mean * 1e3 == pytest.approx(validated.e2e_mean, rel=rel)
    return validated.e2e_mean
