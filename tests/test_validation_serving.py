"""Rows of published serving tables: how they are read, that finite runs are played as measured, and gains."""

from __future__ import annotations

import dataclasses
import math

import pytest

from simmoe.errors import MeasurementError, SpecError
from simmoe.report import plots
from simmoe.specs.engines import EngineParameters
from simmoe.specs.measurement import read_table
from simmoe.steady.front_end import delayed, front_end_s
from simmoe.validation import gains
from simmoe.validation.serving import compare as serving
from simmoe.validation.serving.engine_limits import LIMITS
from simmoe.validation.serving.row_traffic import ROUNDS
from simmoe.validation.serving.rows import Unspoken, describe

COLUMNS = [
    *("source_id", "model", "gpu", "num_gpus", "engine", "engine_version", "tp", "ep", "dp", "dp_attention"),
    *("precision", "input_tokens", "output_tokens", "length_distribution", "concurrency", "request_rate"),
    *("num_requests", "active_experts", "total_experts", "output_tokens_per_s", "total_tokens_per_s_per_gpu"),
    *("ttft_ms_unspecified", "tpot_ms_mean", "spec_decoding", "phase"),
]
PLAIN = {
    "source_id": "a", "model": "DeepSeek-V2-Lite", "gpu": "H100-SXM", "num_gpus": 1.0, "engine": "vllm", "tp": 1.0,
    "precision": "bf16", "input_tokens": 500.0, "output_tokens": 50.0, "concurrency": 4.0, "spec_decoding": "none",
}  # fmt: skip


def row(**cells):
    return PLAIN | cells


def table(path, *rows):
    lines = [",".join(COLUMNS)]
    lines += [",".join(str(cells.get(name, "")) for name in COLUMNS) for cells in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return read_table(path)


def test_inferencex_lengths_are_drawn_between_eight_tenths_and_nominal():
    workload = describe(row(length_distribution="random, each length uniform in [0.8,1.0] x nominal")).workload
    assert (workload.input.low, workload.input.high, workload.input.mean) == (400, 500, 450)
    assert (workload.output.low, workload.output.high) == (40, 50)


def test_a_closed_loop_without_a_count_sends_ten_rounds_and_a_stated_count_wins():
    assert describe(row()).requests == ROUNDS * 4
    assert describe(row(num_requests=77.0)).requests == 77


def test_requests_all_at_once_are_as_many_clients():
    run = describe(row(concurrency="", request_rate="inf (all queued)", num_requests=300.0))
    assert run.workload.concurrency == run.requests == 300


def test_an_open_loop_is_a_steady_state():
    run = describe(row(concurrency="", request_rate="10 nominal, measured 9.5"))
    assert run.requests is None
    assert run.workload.rate == 9.5


@pytest.mark.parametrize(
    ("cells", "layout"),
    [
        ({"tp": 8.0}, (8, 1, 1)),
        ({"tp": 8.0, "ep": 8.0}, (8, 1, 8)),
        ({"tp": 8.0, "dp_attention": "yes"}, (1, 8, 8)),
        ({"tp": 8.0, "dp": 8.0, "dp_attention": "yes"}, (1, 8, 8)),
        ({"tp": 8.0, "dp": 2.0, "dp_attention": "yes"}, (4, 2, 8)),
        ({"tp": 1.0, "dp": 8.0, "dp_attention": "yes"}, (1, 8, 8)),
        ({"tp": 8.0, "engine": "sglang", "engine_version": "0.4.3 (--enable-dp-attention)"}, (1, 8, 8)),
        ({"tp": 2.0, "dp": 4.0, "model": "Qwen3-32B (dense)"}, (2, 1, 1)),
    ],
)
def test_layouts_are_read_as_engines_mean_them(cells, layout):
    d = describe(row(model="DeepSeek-V3", num_gpus=8.0, precision="fp8") | cells).deployment
    assert (d.tp_size, d.dp, d.ep) == layout


@pytest.mark.parametrize(("version", "dp"), [("0.17", 1), ("1", 8)])
def test_tensorrt_llm_publishes_maximum_load_with_attention_dp_since_it_left_engines(version, dp):
    cells = {"concurrency": "", "request_rate": "inf (all queued)", "num_requests": 300.0, "engine_version": version}
    d = describe(row(model="Mixtral-8x7B", engine="trtllm", num_gpus=8.0, tp=8.0, precision="fp8", **cells)).deployment
    assert d.dp == dp


@pytest.mark.parametrize(
    ("engine", "words", "weights", "kv"),
    [
        ("vllm", "bf16", "bfloat16", "bfloat16"),
        ("vllm", "fp8", "fp8_block", "bfloat16"),
        ("trtllm", "fp8", "fp8_block", "fp8"),
        ("trtllm", "nvfp4", "nvfp4", "fp8"),
        ("vllm", "nvfp4", "nvfp4", "fp8"),
        ("trtllm", "fp16", "float16", "bfloat16"),
        ("vllm", "bf16/fp8 unstated", None, "bfloat16"),
    ],
)
def test_precision_words_give_weights_and_cache(engine, words, weights, kv):
    d = describe(row(engine=engine, precision=words)).deployment
    assert (d.weight_precision, d.kv_precision) == (weights, kv)


def test_a_launch_script_sets_what_its_rows_leave_out():
    said = "upstream: SemiAnalysis InferenceX database dump 2026-04-27, config 1"
    cells = row(model="DeepSeek-R1", gpu="B200-SXM", engine="sglang", precision="fp8", num_gpus=8.0, tp=8.0)
    d = describe(cells | {"source": said}).deployment
    assert (d.kv_precision, d.max_num_seqs, d.max_num_batched_tokens, d.memory_fraction) == ("fp8", 128, 32768, 0.82)
    d = describe(cells | {"source": said, "num_gpus": 4.0, "tp": 4.0}).deployment
    assert (d.max_num_seqs, d.memory_fraction) == (32, 0.95)
    assert describe(cells).deployment.kv_precision == "bfloat16"
    cells = row(model="gpt-oss-120b", gpu="H200-SXM", engine="trtllm", precision="mxfp4", concurrency=48.0)
    assert describe(cells | {"source": said}).deployment.max_num_seqs == 48


def test_a_page_that_names_another_device_than_its_steps_show_is_read_by_its_steps():
    page = "docs/performance-lab/glm-4.5-air/h100.md result block {} (section: {})"
    found = describe(row(model="GLM-4.5-Air", source=page.format(9, "Other Benchmark Cases")))
    assert found.hardware.device.architecture == "Ampere"
    assert found.deployment.max_num_batched_tokens == 2048
    other = describe(row(model="GLM-4.5-Air", source=page.format(2, "Choosing")))
    assert other.hardware.device.architecture == "Hopper"


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"spec_decoding": "mtp"}, "speculative"),
        ({"phase": "decode"}, "one phase"),
        ({"engine": "unstated"}, "not modelled"),
        ({"gpu": "Abacus"}, "no hardware file"),
        ({"model": "GPT-9"}, "no model preset"),
        ({"concurrency": ""}, "neither concurrency nor request rate"),
        ({"precision": "roman numerals"}, "not understood"),
        ({"concurrency": -3.0}, "concurrency: -3"),
        ({"output_tokens": 0.2}, "traffic not understood"),
        ({"tp": 64.0}, "not a multiple of tp 64"),
    ],
)
def test_rows_outside_the_model_say_why(cells, reason):
    with pytest.raises(Unspoken, match=reason):
        describe(row(**cells))


def test_skipped_rows_are_counted_with_their_reason(tmp_path):
    found = serving.compare(table(tmp_path / "x.csv", row(output_tokens_per_s=100.0), row(gpu="Abacus"), row()))
    assert [c.row for c in found.comparisons] == [2]
    assert found.comparisons[0].group == "x/DeepSeek-V2-Lite/H100-SXM/vllm"
    assert found.skipped == {"no hardware file for Abacus": 1, "no measured throughput or latency in the row": 1}


def test_figures_are_rates_of_all_gpus_and_latencies_in_milliseconds(tmp_path):
    cells = row(num_gpus=2.0, tp=2.0, total_tokens_per_s_per_gpu=50.0, ttft_ms_unspecified=80.0, tpot_ms_mean=9.0)
    found = {c.quantity: c for c in serving.compare(table(tmp_path / "x.csv", cells)).comparisons}
    assert found["total_tokens_per_s"].measured == 100.0
    metrics, *_ = serving.solve(describe(cells))
    assert found["ttft_unspecified"].predicted == pytest.approx(1e3 * metrics.ttft.mean)
    assert found["tpot_mean"].predicted == pytest.approx(1e3 * metrics.tpot.mean)
    assert all(c.lower < c.predicted < c.upper for c in found.values())


#: Answers that end one by one; equal ones would stay together, burst or not.
VARIED = "random uniform 1..800 in, 1..400 out"


def test_a_short_burst_delivers_less_than_the_steady_state_it_never_reaches():
    burst = describe(
        row(concurrency="", request_rate="inf", num_requests=200.0, output_tokens=200.0, length_distribution=VARIED)
    )
    steady = dataclasses.replace(burst, requests=None)
    assert serving.solve(burst)[0].output_tokens_per_s < 0.97 * serving.solve(steady)[0].output_tokens_per_s


def test_clients_that_start_together_wait_for_each_others_prompts():
    """Where steps are not decided ahead; with vLLM's asynchronous scheduling later rounds wait a step too."""
    one_round, many = (
        describe(row(engine="trtllm", concurrency=64.0, num_requests=n, length_distribution=VARIED))
        for n in (64.0, 64.0 * 40)
    )
    assert serving.solve(one_round)[0].ttft.mean > 1.5 * serving.solve(many)[0].ttft.mean


def test_the_front_end_delays_first_and_last_tokens_alike_and_nothing_else():
    parameters = EngineParameters(
        engine="vllm", front_end_time=0.1, front_end_time_per_request=0.01, front_end_time_per_token=1e-4, source="test"
    )
    before = serving.solve(describe(row()))[0]
    after = delayed(before, parameters, 500.0)
    delay = 0.1 + 0.01 * before.mean_running + 0.05
    assert front_end_s(parameters, before.mean_running, 500.0) == pytest.approx(delay)
    assert after.ttft.p99 - before.ttft.p99 == pytest.approx(delay)
    assert after.e2e.mean - before.e2e.mean == pytest.approx(delay)
    assert (after.tpot, after.output_tokens_per_s) == (before.tpot, before.output_tokens_per_s)


def capped(**cells):
    return row(model="DeepSeek-V2-Lite", output_tokens_per_s=100.0, total_experts=64.0, **cells)


@pytest.fixture
def study(tmp_path):
    return table(
        tmp_path / "study.csv",
        capped(source_id="s-c4-k6", active_experts=6.0),
        capped(source_id="s-c4-k3", active_experts=3.0) | {"output_tokens_per_s": 130.0},
        capped(source_id="s-c4-e16", active_experts=6.0) | {"total_experts": 16.0, "output_tokens_per_s": 150.0},
        capped(source_id="other-c8-k3", active_experts=3.0) | {"concurrency": 8.0},
    )


def test_gains_compare_capped_and_pruned_rows_with_the_native_row_of_their_load(study):
    found = {g.source_id: g for g in gains.gains(study)}
    assert set(found) == {"s-c4-k6", "s-c4-k3", "s-c4-e16"}  # the last has no native row
    assert found["s-c4-k3"].measured_gain == pytest.approx(0.3)
    assert found["s-c4-e16"].measured_gain == pytest.approx(0.5)
    assert found["s-c4-e16"].pruned
    assert not found["s-c4-k3"].pruned
    native, k3 = found["s-c4-k6"], found["s-c4-k3"]
    assert k3.predicted_gain == pytest.approx(k3.predicted_tokens_per_s / native.predicted_tokens_per_s - 1)
    assert k3.predicted_gain > 0.02
    assert native.native
    assert native.predicted_gain == 0.0


def test_gain_errors_are_points_beside_no_effect(study):
    found = gains.gains(study)
    error = gains.judge(found)[0]
    chosen = [g for g in found if not g.native]
    assert error.no_effect_points == pytest.approx(40.0)
    off = [100 * abs(g.predicted_gain - g.measured_gain) for g in chosen]
    assert error.mean_abs_error_points == pytest.approx(math.fsum(off) / 2)
    assert gains.to_json(found)["errors"][0]["n"] == 2


def test_gains_need_a_native_row(tmp_path):
    with pytest.raises(MeasurementError, match="native row"):
        gains.gains(table(tmp_path / "x.csv", capped(source_id="s-c4-k3", active_experts=3.0)))


def test_gains_are_tabulated_and_drawn(study, tmp_path):
    from rich.console import Console

    found = gains.gains(study)
    console = Console(width=200, record=True, quiet=False, file=(tmp_path / "out").open("w"))
    console.print(gains.table(found))
    words = console.export_text()
    assert "+30.0 %" in words
    assert '"no effect"' in words
    plots.gains(found, tmp_path / "gains.png")
    assert (tmp_path / "gains.png").stat().st_size > 5000
    with pytest.raises(SpecError, match="no gain to draw"):
        plots.gains([g for g in found if g.native], tmp_path / "none.png")


def test_every_engine_has_limits_it_is_predicted_with():
    assert set(LIMITS) == {"vllm", "sglang", "trtllm"}
