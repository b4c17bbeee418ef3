"""How rows of served runs are read: commands, dates, lengths, pools, lists; what the mechanisms they name do."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from simmoe.calibrate.releases import overridden
from simmoe.cli.main import app
from simmoe.engine.engine import Engine
from simmoe.engine.step import Batch
from simmoe.routing.expert_load import expected_load, with_shared
from simmoe.specs.deployment import Deployment
from simmoe.specs.engines import engine_parameters
from simmoe.specs.load import load_hardware, load_model
from simmoe.specs.measurement import read_table
from simmoe.specs.mechanisms import Exchange
from simmoe.validation.serving import chat_flood
from simmoe.validation.serving import compare as serving
from simmoe.validation.serving.engine_limits import limits, release
from simmoe.validation.serving.row_traffic import SHAREGPT_SHORTEST
from simmoe.validation.serving.rows import Unspoken, describe

H100, H200, A100 = (load_hardware(name) for name in ("h100", "h200", "a100"))
V3, LITE, QWEN = (load_model(name) for name in ("deepseek-v3", "deepseek-v2-lite", "qwen3-235b-a22b"))
PLAIN = {
    "source_id": "a", "model": "DeepSeek-V2-Lite", "gpu": "H100-SXM", "num_gpus": 1.0, "engine": "vllm",
    "engine_version": "0.11.0", "tp": 1.0, "precision": "bf16", "input_tokens": 500.0, "output_tokens": 50.0,
    "concurrency": 4.0, "spec_decoding": "none",
}  # fmt: skip


def row(**cells):
    return PLAIN | cells


@pytest.mark.parametrize(
    ("version", "measured", "read"),
    [
        ("0.7.4.dev181+gf35f8e22", "2025-03", "0.7.4.dev181+gf35f8e22"),
        ("Aug 2024 (no MLA)", "", "0.5 (by date)"),
        ("nightly 2026-02", "20260214", "0.16 (by date)"),
        ("", "2025-07-08", "0.9 (by date)"),
        ("", "", ""),
    ],
)
def test_a_release_without_a_number_is_the_newest_of_its_date(version, measured, read):
    assert release("vllm", version, measured) == read


@pytest.mark.parametrize(
    ("engine", "version", "hardware", "words", "tokens", "seqs"),
    [
        ("vllm", "0.11.0", H100, "", 8192, 1024),
        ("vllm", "0.11.0", A100, "", 2048, 256),
        ("vllm", "0.11.0", A100, "vllm serve x --max-num-batched-tokens 4096", 4096, 256),
        ("vllm", "0.19.0", H100, "max_num_seqs 128 per engine, max_num_batched_tokens 2048", 2048, 128),
        ("vllm", "0.7.3", H200, "", 163840, 256),
        ("vllm", "0.7.3", H200, "prefix caching on", 2048, 256),
        ("sglang", "0.5.4", H100, "--chunked-prefill-size 4096", 4096, 2048),
    ],
)
def test_limits_are_those_quoted_or_the_releases_own(engine, version, hardware, words, tokens, seqs):
    found = limits(engine, version, hardware.device, V3, offline=False, words=words)
    assert (found["max_num_batched_tokens"], found["max_num_seqs"]) == (tokens, seqs)


def test_sglang_cuts_its_limits_among_attention_ranks():
    found = limits("sglang", "0.5.3", H200.device, V3, offline=False, words="", dp=8)
    assert (found["max_num_batched_tokens"], found["max_num_seqs"]) == (1024, 256)


def test_lengths_told_in_words_are_drawn():
    words = "random uniform 1..180 in, 1..400 out (means from an issue)"
    told = describe(row(length_distribution=words)).workload
    assert (told.input.low, told.input.high, told.output.high) == (1, 180, 400)
    broad = describe(row(length_distribution="mean of actual lengths (nominal 1024/1024)", input_tokens=502.0)).workload
    assert (broad.input.low, broad.input.mean) == (1, 502)


def test_a_finite_open_loop_ends_and_its_rate_holds_the_drain():
    cells = row(concurrency="", request_rate="10 nominal, measured 9.5", num_requests=40.0, output_tokens=400.0)
    run = describe(cells)
    assert run.requests == 40
    rate = serving.solve(run)[0].requests_per_s
    assert rate < 0.9 * 9.5


def test_lengths_listed_beside_a_file_are_drawn(tmp_path):
    words = "per request in the companion file"
    write(tmp_path / "runs.csv", [row(ep=1.0, length_distribution=words, tpot_ms_mean=9.0)])
    (alone,) = serving.rows_of(read_table(tmp_path / "runs.csv"))
    assert describe(alone).workload.input.kind == "fixed"
    logged = [{"source_id": s, "input_tokens": i, "output_tokens": 7} for s, i in (("a", 10), ("a", 30), ("b", 999))]
    write(tmp_path / "runs_per_request.csv", logged)
    told = describe(alone).workload
    assert (told.input.values, told.input.mean, told.output.mean) == ((10, 30), 20, 7)


def test_a_latency_scenario_of_a_hundred_prompts_has_four_clients():
    cells = {"length_distribution": "ShareGPT", "request_rate": "inf", "concurrency": 9.0, "num_requests": 100.0}
    assert describe(row(**cells)).workload.concurrency == 4
    assert describe(row(**cells | {"num_requests": 1000.0, "concurrency": 1000.0})).workload.concurrency == 1000


def test_gaps_between_streamed_chunks_hold_as_many_tokens_as_said():
    plain = row(itl_ms_median=1.0)
    chunked = plain | {"notes": "ITL is per streamed chunk (about 7 tokens)"}
    predicted = []
    for cells in (plain, chunked):
        run = describe(cells)
        predicted.append({q: p for q, _, p in serving.figures(cells, serving.solve(run)[0], run)}["itl_median"])
    assert predicted[1] == pytest.approx(7 * predicted[0])


def test_shared_heads_are_found_in_the_prefix_cache():
    alone = row(input_tokens=3000.0, concurrency=16.0, num_requests=100.0)
    notes = "10 groups x 50 prompts, shared system prompt 2000 tokens + question 1000; prefix caching on"
    run = describe(alone | {"notes": notes})
    assert run.workload.prompts is not None
    assert (run.workload.prompts.groups, run.workload.prompts.shared_tokens) == (10, 2000)
    assert serving.solve(run)[0].ttft.mean < serving.solve(describe(alone))[0].ttft.mean


def test_old_vllm_computes_a_waves_prompts_in_one_step():
    """All clients get their first token together, as no token of another comes before the batch of prompts is done."""
    cells = row(concurrency=8.0, num_requests=16.0, input_tokens=3000.0, gpu="H200-SXM")
    old = serving.solve(describe(cells | {"engine_version": "0.7.3"}))[0]
    new = serving.solve(describe(cells | {"engine_version": "0.11.0"}))[0]
    assert describe(cells | {"engine_version": "0.7.3"}).policy == "vllm_v0"
    assert old.ttft.p99 < 1.05 * old.ttft.p50
    assert new.ttft.p99 > 1.3 * new.ttft.p50


POOLS = {
    "model": "DeepSeek-R1", "gpu": "H200-SXM", "engine": "sglang", "engine_version": "0.5.8", "precision": "fp8",
    "disaggregated": "yes", "num_gpus": 24.0, "tp": "", "concurrency": 64.0, "num_requests": 128.0,
    "prefill_workers": 1.0, "prefill_tp": 8.0, "prefill_ep": 1.0, "prefill_dp_attention": 1.0,
    "decode_workers": 2.0, "decode_tp": 1.0, "decode_ep": 8.0, "decode_dp_attention": 8.0,
    "input_tokens": 2000.0, "output_tokens": 200.0, "total_tokens_per_s_per_gpu": 100.0,
}  # fmt: skip


def test_pools_are_read_worker_by_worker_and_both_count():
    run = describe(row(**POOLS))
    assert (run.deployment.gpus, run.deployment.tp_size, run.deployment.replicas) == (8, 8, 1)
    assert run.decode is not None
    assert (run.decode.gpus, run.decode.dp, run.decode.ep, run.decode.replicas) == (16, 8, 8, 2)
    assert run.gpus == 24
    cells = row(**POOLS)
    metrics = serving.solve(run)[0]
    assert {q: m for q, m, _ in serving.figures(cells, metrics, run)}["total_tokens_per_s"] == 2400
    more = serving.solve(describe(row(**POOLS | {"prefill_workers": 4.0})))[0]
    assert more.ttft.mean < 0.7 * metrics.ttft.mean
    one = serving.solve(describe(row(**POOLS | {"decode_workers": 1.0})))[0]
    assert one.tpot.mean > 1.05 * metrics.tpot.mean


def test_pools_without_workers_say_so():
    with pytest.raises(Unspoken, match="workers"):
        describe(row(**POOLS | {"prefill_workers": ""}))


def test_attention_ranks_of_one_node_gather_all_tokens():
    d = describe(row(**POOLS)).decode
    assert d is not None
    assert d.exchange.algorithm == "gather"
    few = Batch(16, 16 * 500)
    gathered, sent = (
        Engine(H200, V3, d.vary(exchange=Exchange(algorithm=name))).step(few) for name in ("gather", "deepep_normal")
    )
    assert gathered.dispatch_s + gathered.combine_s < 0.5 * (sent.dispatch_s + sent.combine_s)
    many = Batch(prefill_chunks=((8192, 0),) * 8)
    small, large = (Engine(H200, V3, d).step(batch).dispatch_s for batch in (few, many))
    assert large > 20 * small


def test_a_shared_expert_in_the_routed_kernel_costs_one_more_expert():
    fused = Deployment(gpus=8, tp=8, engine="sglang", engine_version="0.5.8", weight_precision="fp8_block")
    apart = fused.vary(engine_version="0.4.5")
    assert engine_parameters(fused, H200.device.name).fuses_shared_expert
    with overridden(kernel_slowdown=1.0, host_time_per_step=0.0):
        steps = [Engine(H200, V3, d).step(Batch(4, 4000)) for d in (fused, apart, fused.vary(ep=8))]
    assert steps[0].shared_experts_s == 0
    assert steps[1].shared_experts_s > 0
    assert steps[2].shared_experts_s > 0
    extra = steps[0].routed_experts_s - steps[1].routed_experts_s
    assert 0 < extra < 0.3 * steps[1].shared_experts_s


def test_a_shared_expert_on_a_second_stream_shows_only_in_large_steps():
    d = Deployment(gpus=8, tp=8, engine="trtllm", engine_version="1.1", weight_precision="fp8_block")
    small, large = (Engine(H200, V3, d).step(batch) for batch in (Batch(8, 8000), Batch(prefill_chunks=((2048, 0),))))
    assert small.shared_experts_s == 0
    assert large.shared_experts_s > 0
    with overridden(shared_beside_tokens=0):
        assert Engine(H200, V3, d).step(Batch(8, 8000)).shared_experts_s > 0


def test_one_more_expert_takes_every_token():
    load = expected_load([4.0, 100.0], 64, 6)
    more = with_shared(load)
    assert (more.routed_pairs - load.routed_pairs).tolist() == [4, 100]
    assert (more.active_experts - load.active_experts).tolist() == [1, 1]
    assert more.busiest_expert_tokens.tolist() == [4, 100]


def test_overridden_values_end_with_their_context():
    d = Deployment(engine="sglang", engine_version="0.5.8")
    before = engine_parameters(d, H100.device.name)
    with overridden(host_time_per_step=0.25):
        assert engine_parameters(d, H100.device.name).host_time_per_step == 0.25
    assert engine_parameters(d, H100.device.name) == before


def write(path, rows):
    names = list(dict.fromkeys(name for cells in rows for name in cells))
    lines = [",".join(names), *(",".join(str(cells.get(name, "")) for name in names) for cells in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def listing(tmp_path):
    serving_rows = [
        row(source_id="good", ep=1.0, tpot_ms_mean=9.0, ttft_ms_median=50.0, output_tokens_per_s=400.0),
        row(source_id="other", ep=1.0, tpot_ms_mean=9.0),
        row(source_id="drafted", ep=1.0, spec_decoding="mtp", tpot_ms_mean=9.0),
    ]
    write(tmp_path / "runs.csv", serving_rows)
    ids = [("runs.csv", "good"), ("runs.csv", "drafted"), ("runs.csv", "lost"), ("gone.csv", "x")]
    write(tmp_path / "look.csv", [{"file": file, "source_id": source, "why": "w"} for file, source in ids])
    return tmp_path / "look.csv"


def test_a_list_is_followed_to_exactly_its_rows(listing):
    result = CliRunner().invoke(app, ["validate", str(listing), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["lists"]["look.csv"]
    rows = {entry["source_id"]: entry for entry in found["rows"]}
    assert list(rows) == ["good", "drafted", "lost", "x"]
    assert {"throughput", "tpot", "ttft"} <= set(rows["good"])
    assert rows["good"]["ttft"]["quantity"] == "ttft_median"
    assert "speculative" in rows["drafted"]["reason"]
    assert "no such source_id" in rows["lost"]["reason"]
    assert "not beside" in rows["x"]["reason"]
    assert found["not_predicted"] == 3
    error = abs(rows["good"]["tpot"]["predicted"] / 9.0 - 1)
    assert found["median_ape_percent"]["tpot"] == pytest.approx(100 * error, abs=1e-3)
    shown = CliRunner().invoke(app, ["validate", str(listing)]).output
    assert "median of |error|" in shown


def test_a_list_beside_its_files_is_not_counted_twice(listing):
    both = json.loads(CliRunner().invoke(app, ["validate", str(listing.parent), "--json"]).stdout)
    rows = {entry["source_id"]: entry for entry in both["lists"]["look.csv"]["rows"]}
    assert rows["good"]["predicted"]
    assert "speculative" in rows["drafted"]["reason"]
    assert sum(group["n"] for group in both["groups"] if group["quantity"] == "tpot_mean") == 2


def test_a_run_without_pools_is_one_pool():
    run = describe(row())
    assert run.decode is None
    assert run.gpus == run.deployment.gpus
    assert dataclasses.replace(run, tokens_per_chunk=2.0).policy is None


def test_sharegpt_is_drawn_from_its_own_lengths_stretched_to_a_rows_mean():
    cells = {"length_distribution": "ShareGPT", "request_rate": "inf", "num_requests": 1000.0, "concurrency": 1000.0}
    found = describe(row(input_tokens=214.5, output_tokens=199.9, **cells)).workload
    assert found.input.mean == pytest.approx(214.5, rel=0.01)
    assert found.output.mean == pytest.approx(199.9, rel=0.01)
    answers = np.array(found.output.values)
    assert 0.15 < (answers < 20).mean() < 0.25  # a log-normal of that mean and spread has 2 %
    assert answers.min() >= SHAREGPT_SHORTEST


def test_a_flood_of_chat_requests_reaches_the_scheduler_when_all_of_it_is_read():
    cells = {"request_rate": "inf", "num_requests": 200.0, "concurrency": 200.0, "input_tokens": 100.0}
    alone, chat = row(**cells), row(**cells, source="gpustack/gpustack commit 47277d79 file x.md")
    assert (describe(alone).chat, describe(chat).chat) == (False, True)
    without, with_it = (serving.solve(describe(one))[0] for one in (alone, chat))
    waited = 200 * chat_flood.TAKING_IN_S["vllm"]
    assert with_it.ttft.p99 - without.ttft.p99 == pytest.approx(waited)
    assert with_it.tpot == without.tpot
    assert 200 / with_it.requests_per_s - 200 / without.requests_per_s == pytest.approx(waited)
    assert not describe(chat | {"model": "gpt-oss-20b", "precision": "mxfp4"}).chat


def test_a_loop_of_chat_requests_or_one_into_another_engine_waits_for_none():
    chat = row(source="gpustack/gpustack commit 47277d79 file x.md", concurrency=4.0, num_requests=40.0)
    assert chat_flood.before_flood_s(describe(chat)) == 0
    flood = chat | {"num_requests": 4.0, "request_rate": "inf", "engine": "sglang", "engine_version": "0.5.3"}
    assert chat_flood.before_flood_s(describe(flood)) == 0
