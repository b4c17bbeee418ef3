"""Results of vllm bench serve and sglang.bench_serving, written here with their keys, become runs and figures."""

import json
import math

import pytest
from typer.testing import CliRunner

from simmoe.cli.main import app
from simmoe.errors import MeasurementError, SpecError
from simmoe.predict import predict
from simmoe.specs.load import load_hardware, load_model
from simmoe.validation import run
from simmoe.validation.serving.bench_json import describe, engine_of, figures_of, read_results, setup_from
from simmoe.validation.serving.rows import Unspoken

VLLM = {
    "date": "20260101-120000", "endpoint_type": "vllm", "backend": "vllm", "label": None,
    "model_id": "deepseek-ai/DeepSeek-V2-Lite", "tokenizer_id": "deepseek-ai/DeepSeek-V2-Lite", "num_prompts": 64,
    "request_rate": "inf", "burstiness": 1.0, "max_concurrency": 16, "duration": 20.0, "completed": 64, "failed": 0,
    "total_input_tokens": 65536, "total_output_tokens": 8192, "request_throughput": 3.2, "request_goodput": None,
    "output_throughput": 409.6, "total_token_throughput": 3686.4, "mean_ttft_ms": 150.0, "median_ttft_ms": 120.0,
    "std_ttft_ms": 30.0, "p99_ttft_ms": 400.0, "mean_tpot_ms": 30.0, "median_tpot_ms": 29.0, "p99_tpot_ms": 35.0,
    "mean_itl_ms": 30.5, "median_itl_ms": 25.0, "p99_itl_ms": 90.0, "mean_e2el_ms": 4000.0, "median_e2el_ms": 3900.0,
    "p99_e2el_ms": 4500.0,
}  # fmt: skip
SGLANG = {
    "backend": "sglang", "dataset_name": "random", "request_rate": 4.0, "max_concurrency": None,
    "sharegpt_output_len": None, "random_input_len": 1024, "random_output_len": 256, "random_range_ratio": 0.5,
    "duration": 100.0, "completed": 400, "total_input_tokens": 307200, "total_output_tokens": 76800,
    "total_output_tokens_retokenized": 76700, "request_throughput": 4.0, "input_throughput": 3072.0,
    "output_throughput": 768.0, "total_throughput": 3840.0, "mean_e2e_latency_ms": 3000.0,
    "median_e2e_latency_ms": 2900.0, "p99_e2e_latency_ms": 5000.0, "mean_ttft_ms": 80.0, "median_ttft_ms": 60.0,
    "p99_ttft_ms": 300.0, "mean_tpot_ms": 15.0, "median_tpot_ms": 14.0, "p99_tpot_ms": 20.0, "mean_itl_ms": 15.0,
    "median_itl_ms": 13.0, "p99_itl_ms": 40.0, "concurrency": 12.0, "accept_length": None,
}  # fmt: skip


def setup(**layout):
    return setup_from("h100", layout.pop("model", "deepseek-v2-lite"), layout.pop("deployment", None), **layout)


def test_all_figures_of_a_vllm_result_arrive_under_the_columns_of_serving_tables():
    assert figures_of(VLLM) == {
        "output_tokens_per_s": 409.6, "total_tokens_per_s": 3686.4, "requests_per_s": 3.2,
        "ttft_ms_mean": 150.0, "ttft_ms_median": 120.0, "ttft_ms_p99": 400.0,
        "tpot_ms_mean": 30.0, "tpot_ms_median": 29.0, "tpot_ms_p99": 35.0,
        "itl_ms_mean": 30.5, "itl_ms_median": 25.0, "itl_ms_p99": 90.0,
        "e2e_ms_mean": 4000.0, "e2e_ms_median": 3900.0, "e2e_ms_p99": 4500.0,
    }  # fmt: skip


def test_sglang_names_the_same_figures_its_own_way():
    ours, theirs = figures_of(VLLM), figures_of(SGLANG)
    assert set(ours) == set(theirs)
    assert theirs["e2e_ms_p99"] == 5000.0
    assert theirs["total_tokens_per_s"] == 3840.0


def test_a_client_limit_is_a_closed_loop_of_so_many_requests():
    told = describe(VLLM, setup(gpus=2, tp=2))
    assert (told.workload.concurrency, told.workload.rate, told.requests) == (16, None, 64)
    assert (told.workload.input.mean, told.workload.output.mean) == (1024, 128)
    assert (told.deployment.tp, told.deployment.engine) == (2, "vllm")


def test_everything_at_once_is_a_closed_loop_of_all_prompts():
    told = describe(VLLM | {"max_concurrency": None}, setup())
    assert (told.workload.concurrency, told.requests) == (64, 64)


@pytest.mark.parametrize("rate", ["inf", math.inf, None])
def test_an_unlimited_rate_is_read_however_it_is_written(rate):
    assert describe(VLLM | {"request_rate": rate}, setup()).workload.concurrency == 16


def test_a_finite_rate_is_an_open_loop_with_the_range_of_random_lengths():
    told = describe(SGLANG, setup())
    assert (told.workload.rate, told.workload.concurrency, told.requests) == (4.0, None, None)
    assert (told.workload.input.kind, told.workload.input.low, told.workload.input.high) == ("uniform", 512, 1024)
    assert told.workload.input.mean == 768


def test_a_finite_rate_beyond_the_client_limit_is_a_closed_loop():
    told = describe(SGLANG | {"max_concurrency": 12, "request_rate": 50.0}, setup())
    assert (told.workload.rate, told.workload.concurrency) == (None, 12)
    told = describe(SGLANG | {"max_concurrency": 64}, setup())
    assert told.workload.rate == 4.0


def test_listed_lengths_give_their_spread():
    lens = [100] * 32 + [1948] * 32
    told = describe(VLLM | {"input_lens": lens, "output_lens": [128] * 64}, setup())
    assert told.workload.input.kind == "lognormal"
    assert told.workload.input.cv == pytest.approx(924 / 1024)
    assert told.workload.output.kind == "fixed"


def test_the_engine_is_what_the_client_was_told_else_the_tools_own():
    assert engine_of(VLLM) == "vllm"
    assert engine_of(SGLANG) == "sglang"
    assert engine_of(VLLM | {"backend": "openai-chat"}) == "vllm"
    assert engine_of(SGLANG | {"backend": "vllm"}) == "vllm"
    assert engine_of(VLLM | {"backend": "tensorrt-llm"}) == "trtllm"


def test_what_sglangs_server_says_of_its_layout_is_used_and_flags_override_it():
    server = {"model_path": "deepseek-ai/DeepSeek-V3", "tp_size": 8, "dp_size": 8, "enable_dp_attention": True}
    told = describe(SGLANG | {"server_info": server}, setup(model=None))
    d = told.deployment
    assert (d.gpus, d.tp, d.dp, d.ep) == (8, 1, 8, 8)
    assert told.model == load_model("deepseek-v3")
    plain = server | {"enable_dp_attention": False, "dp_size": 1}
    told = describe(SGLANG | {"server_info": plain}, setup(gpus=16, tp=16))
    assert (told.deployment.gpus, told.deployment.tp) == (16, 16)


def test_a_deployment_file_is_taken_as_it_is(tmp_path):
    file = tmp_path / "deployment.yaml"
    file.write_text("gpus: 4\ntp: 2\nmax_num_seqs: 33\nengine: vllm\n")
    told = describe(VLLM, setup(deployment=file))
    assert (told.deployment.gpus, told.deployment.max_num_seqs) == (4, 33)


def test_runs_simmoe_cannot_speak_to_say_why():
    with pytest.raises(Unspoken, match="speculative"):
        describe(SGLANG | {"accept_length": 2.4}, setup())
    with pytest.raises(Unspoken, match="no request completed"):
        describe(VLLM | {"completed": 0}, setup())
    with pytest.raises(Unspoken, match="request rate 'trace'"):
        describe(SGLANG | {"request_rate": "trace"}, setup())
    with pytest.raises(SpecError, match="give --model"):
        describe(SGLANG, setup(model=None))


def test_one_result_many_lines_and_lists_are_all_read(tmp_path):
    whole, lines, listed = (tmp_path / name for name in ("a.json", "b.jsonl", "c.json"))
    whole.write_text(json.dumps(VLLM, indent=2))
    lines.write_text(json.dumps(SGLANG) + "\n\n" + json.dumps(SGLANG | {"request_rate": math.inf}) + "\n")
    listed.write_text(json.dumps([VLLM, VLLM, {"other": 1}]))
    assert [line for line, _ in read_results(whole)] == [1]
    assert [line for line, _ in read_results(lines)] == [1, 3]
    assert [line for line, _ in read_results(listed)] == [1, 2]
    lines.write_text(json.dumps(SGLANG) + "\nbroken")
    with pytest.raises(MeasurementError, match="neither JSON nor JSON lines"):
        read_results(lines)


def test_figures_are_grouped_by_file_model_hardware_and_engine_and_predicted_like_any_run(tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps(SGLANG | {"request_rate": 2.0, "random_range_ratio": 1.0, "random_input_len": 768}))
    outcome = run.compare([file], setup=setup())
    assert {c.group for c in outcome.comparisons} == {"chat/DeepSeek-V2-Lite/H100-SXM/sglang"}
    found = {c.quantity: c for c in outcome.comparisons}
    latencies = {f"{m}_{s}" for m in ("ttft", "tpot", "itl", "e2e") for s in ("mean", "median", "p99")}
    assert set(found) == {"output_tokens_per_s"} | latencies
    told = describe(json.loads(file.read_text()), setup())
    direct = predict(load_hardware("h100"), told.model, told.deployment, told.workload).metrics
    assert found["tpot_median"].predicted == pytest.approx(1e3 * direct.tpot.p50)


def test_a_folder_of_results_without_tables_is_fine_and_other_json_is_counted(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(VLLM))
    (tmp_path / "config.json").write_text('{"hidden_size": 2048}')
    outcome = run.compare([tmp_path], setup=setup())
    assert outcome.comparisons
    assert outcome.skipped["config.json: not a benchmark result"] == 1
    with pytest.raises(MeasurementError, match=r"config.json: not a result of"):
        run.compare([tmp_path / "config.json"], setup=setup())


def test_results_without_hardware_and_hardware_flags_without_hardware_are_errors(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(VLLM))
    with pytest.raises(SpecError, match="give --hardware"):
        run.compare([tmp_path / "one.json"])
    with pytest.raises(SpecError, match="--tp: describes"):
        setup_from(None, None, None, tp=2, gpus=None)


def test_the_command_reads_results_explains_them_and_fails_above_a_tolerance(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(VLLM))
    arguments = ["validate", str(tmp_path / "one.json"), "--hardware", "h100", "--explain", "3"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert {group["quantity"] for group in said["groups"]} >= {"output_tokens_per_s", "ttft_mean", "tpot_p99"}
    assert len(said["misses"]) == 3
    assert said["misses"][0]["suspects"][0]["factor"] > 0
    assert CliRunner().invoke(app, [*arguments, "--fail-above", "1e9"]).exit_code == 0
    failed = CliRunner().invoke(app, [*arguments, "--fail-above", "10"])
    assert failed.exit_code == 1
    assert "is above --fail-above 10" in str(failed.exception)
