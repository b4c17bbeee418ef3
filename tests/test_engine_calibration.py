"""What engines add around kernels: entries found by version and device, and estimates that recover known values."""

from __future__ import annotations

import numpy as np
import pytest

from simmoe.calibrate import engines as engine_calibration
from simmoe.calibrate import releases
from simmoe.engine.engine import Engine
from simmoe.errors import CalibrationError
from simmoe.specs.deployment import Deployment, EngineOverrides
from simmoe.specs.engines import engine_kernels, engine_parameters, release_note, shipped_entries, version_numbers
from simmoe.specs.load import load_hardware, load_model
from simmoe.specs.measurement import read_table
from simmoe.validation.serving import compare as serving
from simmoe.validation.serving.rows import describe

pytest.importorskip("scipy")

H200, A100, LITE = load_hardware("h200"), load_hardware("a100"), load_model("deepseek-v2-lite")
V3 = load_model("deepseek-v3")
COLUMNS = (
    *("source_id", "model", "gpu", "num_gpus", "engine", "engine_version", "tp", "precision", "input_tokens"),
    *("output_tokens", "concurrency", "num_requests", "active_experts", "total_experts", "output_tokens_per_s"),
    *("ttft_ms_mean", "tpot_ms_mean"),
)


def row(clients, **cells):
    plain = {
        "source_id": f"c{clients}", "model": "DeepSeek-V2-Lite", "gpu": "H200-SXM", "num_gpus": 1, "engine": "vllm",
        "engine_version": "0.19.0", "tp": 1, "precision": "bf16", "input_tokens": 300, "output_tokens": 60,
        "concurrency": clients, "num_requests": 4 * clients, "active_experts": 6, "total_experts": 64,
    }  # fmt: skip
    return plain | cells


def table(path, rows):
    lines = [",".join(COLUMNS), *(",".join(str(cells.get(name, "")) for name in COLUMNS) for cells in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return read_table(path)


def played(cells, **changes):
    """Metrics of a row whose engine has other parameters than assumed."""
    run = describe(cells)
    deployment = run.deployment.vary(**changes)
    return serving.solve(serving.Run(run.hardware, run.model, deployment, run.workload, run.requests))[0]


@pytest.fixture(scope="module")
def slow_engine():
    rows = []
    for clients in (1, 4, 16, 64, 200):
        cells = row(clients, engine="sglang", engine_version="0.5.1")
        rate = played(cells, host_time_per_step=0.004, kernel_slowdown=1.6).output_tokens_per_s
        rows.append(cells | {"output_tokens_per_s": rate})
    return rows


def test_host_time_and_slowdown_are_recovered_from_throughput(slow_engine, tmp_path):
    (fit,) = releases.estimate(table(tmp_path / "x.csv", slow_engine))
    assert fit.parameters.host_time_per_step == pytest.approx(0.004, rel=0.05)
    assert fit.parameters.kernel_slowdown == pytest.approx(1.6, rel=0.05)
    assert fit.mape_percent < 1 < fit.mape_before_percent
    assert (fit.parameters.version, fit.parameters.device) == ("0.5.1", H200.device.name)


def test_capped_pruned_and_excluded_rows_do_not_touch_the_estimate(slow_engine, tmp_path):
    poison = [
        slow_engine[2] | {"source_id": "capped", "active_experts": 3, "output_tokens_per_s": 1.0},
        slow_engine[2] | {"source_id": "pruned", "total_experts": 16, "output_tokens_per_s": 1.0},
        slow_engine[2] | {"source_id": "odd", "output_tokens_per_s": 1.0},
    ]
    clean, dirty = table(tmp_path / "x.csv", slow_engine), table(tmp_path / "y.csv", slow_engine + poison)
    (with_them,) = releases.estimate(dirty, exclude=["odd"])
    (without,) = releases.estimate(clean)
    assert with_them.rows == without.rows
    assert with_them.parameters.kernel_slowdown == without.parameters.kernel_slowdown


def test_an_estimate_needs_a_native_throughput(tmp_path):
    with pytest.raises(CalibrationError, match="native top-k"):
        releases.estimate(table(tmp_path / "x.csv", [row(4, active_experts=3, output_tokens_per_s=9.0)]))


def test_defaults_recover_host_and_front_end_times_from_latencies(tmp_path):
    rows = []
    for model, native in (("DeepSeek-V2-Lite", (6, 64)), ("Qwen3-30B-A3B", (8, 128))):
        for clients in (1, 8, 40, 120):
            for prompt in (100, 1500):
                cells = row(
                    clients, model=model, active_experts=native[0], total_experts=native[1], input_tokens=prompt
                )
                run = describe(cells)
                own = engine_parameters(run.deployment, H200.device.name, run.model.layers)
                metrics = played(cells, host_time_per_step=0.003)
                running = metrics.mean_running
                front = (
                    1e-3 * run.model.layers - own.front_end_time + (0.002 - own.front_end_time_per_request) * running
                )
                front += (4e-5 - own.front_end_time_per_token) * prompt
                times = {"tpot_ms_mean": 1e3 * metrics.tpot.mean, "ttft_ms_mean": 1e3 * (metrics.ttft.mean + front)}
                rows.append(cells | times)
    (fit,) = engine_calibration.estimate_defaults([table(tmp_path / "x.csv", rows)])
    assert fit.times["host_time_per_step"] == pytest.approx(0.003, rel=0.1)
    assert fit.times["launch_time_per_layer"] == pytest.approx(1e-3, rel=0.1)
    assert fit.times["front_end_time_per_request"] == pytest.approx(0.002, rel=0.1)
    assert fit.times["front_end_time_per_token"] == pytest.approx(4e-5, rel=0.15)
    assert fit.tpot_percent < 5
    assert fit.tpot_rows == fit.ttft_rows == 16


def test_defaults_leave_out_bursts_and_versions_with_an_entry_of_their_own(tmp_path):
    latency = {"tpot_ms_mean": 10.0, "ttft_ms_mean": 100.0}
    rows = [
        row(4, **latency), row(8, **latency), row(16, **latency), row(4, num_requests=4, **latency),
        row(4, engine_version="0.7.3", **latency),
    ]  # fmt: skip
    (fit,) = engine_calibration.estimate_defaults([table(tmp_path / "x.csv", rows)])
    assert fit.tpot_rows == 3


def engine(name, version=None):
    return Deployment(engine=name, engine_version=version)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("0.4.4.post1 (commit ad4e58bf)", (0, 4, 4)), ("v1.0rc3", (1, 0)), ("1", (1,)), ("Apr 2025", None), (None, None)],
)
def test_release_numbers_of_versions(text, numbers):
    assert version_numbers(text) == numbers


def test_the_most_specific_entry_answers():
    old, newest = engine_parameters(engine("sglang", "0.4.3"), "any"), engine_parameters(engine("sglang"), "any")
    assert old.before == "0.4.6"
    assert newest.before is None
    assert engine_parameters(engine("sglang", "0.4.6"), "any") == newest
    assert engine_parameters(engine("sglang", "0.4.4.post1"), H200.device.name).version == "0.4.4.post1"
    assert engine_parameters(engine("sglang", "0.4.4.post12"), H200.device.name) == old
    assert old.kernel_slowdown > newest.kernel_slowdown == 1.0


def test_a_deployments_own_values_go_before_the_entry():
    asked = engine("sglang", "0.4.3").vary(host_time_per_step=0.5, kernel_slowdown=3.0)
    found = engine_parameters(asked, "any")
    assert (found.host_time_per_step, found.kernel_slowdown, found.source) == (0.5, 3.0, "deployment")


@pytest.mark.parametrize(
    ("deployment", "architecture", "kernel"),
    [
        (engine("sglang", "0.4.4.post1"), "Hopper", "triton"),
        (engine("sglang", "0.4.6"), "Hopper", None),
        (engine("sglang"), "Hopper", None),
        (engine("sglang"), "Ampere", "triton"),
        (engine("trtllm"), "Ampere", None),
    ],
)
def test_engines_run_the_latent_decode_kernel_of_their_time_and_chip(deployment, architecture, kernel):
    choice = engine_kernels(deployment, architecture).get("mla_decode")
    assert (choice.kernel_source if choice else None) == kernel


def test_a_kernel_not_measured_on_the_device_is_borrowed_and_said_so():
    early = Engine(A100, LITE, engine("sglang", "0.4.4"))
    early.decode_attention(np.array([4.0]), np.array([1000.0]))
    assert any("triton kernel with efficiencies of NVIDIA L40S" in note for note in early.times.notes)


def test_slowdown_spares_expert_kernels_that_shipped_tuned():
    tokens = np.array([16.0])
    tuned = Deployment(gpus=8, tp=8, engine="sglang", engine_version="0.4.4.post1")
    assert engine_parameters(tuned, H200.device.name).kernel_slowdown > 2
    twice, once = (Engine(H200, V3, tuned.vary(kernel_slowdown=s)).token_parts(tokens) for s in (4.0, 2.0))
    assert twice["routed_experts"][0] == pytest.approx(once["routed_experts"][0])
    assert twice["projections"][0] == pytest.approx(2 * once["projections"][0])
    sliced = Deployment(gpus=4, tp=4, engine="sglang", engine_version="0.4.4.post1")  # a shape with no tuned tiles
    twice, once = (Engine(H200, V3, sliced.vary(kernel_slowdown=s)).token_parts(tokens) for s in (4.0, 2.0))
    assert twice["routed_experts"][0] == pytest.approx(2 * once["routed_experts"][0])


@pytest.mark.parametrize(
    ("engine", "version", "says"),
    [
        ("vllm", None, None),
        ("vllm", "99.9", "vllm 99.9: times around kernels are those of the newest known (0.14 on)"),
        ("vllm", "0.1", "vllm 0.1: times around kernels are those of releases before 0.8"),
        ("vllm", "0.11.2", "vllm 0.11.2: times around kernels are those of releases before 0.14"),
        (
            "vllm",
            "nightly",
            "vllm nightly (no release number): times around kernels are those of the newest known (0.14",
        ),
        ("sglang", "0.4.4.post1", None),
        ("trtllm", "1.2", "trtllm 1.2: times around kernels are those of the newest known (1 on)"),
        ("trtllm", "0.17", "trtllm 0.17: times around kernels are those of releases before 1"),
    ],
)
def test_a_named_version_is_told_which_releases_times_stand_for_it(engine, version, says):
    found = release_note(Deployment(engine=engine, engine_version=version), H200.device.name)
    assert found is None if says is None else found.startswith(says)
    assert release_note(Deployment(engine="sglang", engine_version="0.4.4.post1"), A100.device.name).endswith("0.4.6")


def test_launches_of_a_prompts_layers_are_before_the_first_token_unless_a_deployment_says_its_own():
    bare = engine_parameters(engine("trtllm"), "any")
    deep = engine_parameters(engine("trtllm"), "any", 60)
    per_layer = next(e for e in shipped_entries() if e.engine == "trtllm").launch_time_per_layer
    assert per_layer > 0
    assert deep.front_end_time - bare.front_end_time == pytest.approx(60 * per_layer)
    told = engine("trtllm").vary(engine_overrides=EngineOverrides(front_end_time=0.02))
    assert engine_parameters(told, "any", 60).front_end_time == 0.02
