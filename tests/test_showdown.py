"""The showdown on a small made-up folder: figures as the runs define them, any model, peers on the same runs."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import numpy as np
import pytest

from simmoe.simulation import run_scenario
from simmoe.specs.scenario import load_scenario
from simmoe.validation import run as validation_run
from simmoe.validation import showdown, showdown_fit
from simmoe.validation.showdown_runs import Run, read_runs
from simmoe.validation.showdown_table import large_misses
from simmoe.validation.summary import summarise

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
    rows = [
        {"idx": i, "stage": 0, "arrival_s": 10 + i, "prompt_id": i % 3, "input_tokens": 400 + i % 3, "output_tokens": 5}
        for i in range(6)
    ]
    run = only(folder(tmp_path, {"trace_file": "traces/x1.csv.gz"}, trace=rows))
    assert run.arrival_s.tolist() == [0, 1, 2, 3, 4, 5]
    assert run.prompt.tolist() == [0, 1, 2, 0, 1, 2]
    assert run.output_tokens == 100  # what the server generates, whatever its text is tokenised to


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
    found, without = showdown_fit.estimate(path, rounds=4)
    for name, value in truth.items():
        assert found[name] == pytest.approx(value, rel=0.3), name
    assert found["front_end_time"] == pytest.approx(8e-3, rel=0.05)
    assert set(without) == {run.model.name for run in read_runs(path)[0]}


def test_large_misses_name_run_and_figure(tmp_path: Path) -> None:
    lines = large_misses(showdown.compare(folder(tmp_path, {})).comparisons)
    assert any(line.startswith("x1: ") for line in lines)


def test_a_scenario_simulates_what_is_validated() -> None:
    shipped = Path(__file__).parents[1] / "validate" / "vllm_showdown"
    run = next(run for run in read_runs(shipped)[0] if run.name == "gt02")
    validated = showdown.predict_run(run)["all"]
    metrics = run_scenario(load_scenario(shipped / "scenarios" / "gt02.yaml")).metrics
    assert metrics.ttft.mean * 1e3 == pytest.approx(validated.ttft_mean, rel=1e-9)
    assert metrics.ttft.p99 * 1e3 == pytest.approx(validated.ttft_p99, rel=1e-9)
    assert metrics.e2e.mean * 1e3 == pytest.approx(validated.e2e_mean, rel=1e-9)
