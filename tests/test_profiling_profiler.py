"""The profiler: statistics, plan, rows that survive a crash, and a real run on this CPU."""

from __future__ import annotations

import csv
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from simmoe.cli.profile import profile  # noqa: E402
from simmoe.errors import CoverageError, MeasurementError, SpecError  # noqa: E402
from simmoe.profiling import points, profiler  # noqa: E402
from simmoe.profiling.arena import Arena  # noqa: E402
from simmoe.profiling.backends import BACKENDS  # noqa: E402
from simmoe.profiling.bench import Bench  # noqa: E402
from simmoe.profiling.candidates import CANDIDATES, Limits  # noqa: E402
from simmoe.profiling.device import describe  # noqa: E402
from simmoe.profiling.plan import make_plan, spread_out  # noqa: E402
from simmoe.profiling.profiler import run_profile  # noqa: E402
from simmoe.profiling.served_model import LIVE_MODEL  # noqa: E402
from simmoe.profiling.tables import KEYS, Rows  # noqa: E402
from simmoe.profiling.timing import Effort, measure, median_interval  # noqa: E402
from simmoe.specs.load import load_hardware, load_model  # noqa: E402
from simmoe.specs.measurement import read_table  # noqa: E402

CPU = torch.device("cpu")
SMALL = LIVE_MODEL.vary(
    name="tiny",
    hidden=64,
    layers=2,
    vocab=64,
    moe_layers=1,
    dense_inter_size=32,
    experts=LIVE_MODEL.experts.vary(num_experts=8, top_k=2, inter_size=16, shared_inter_size=16),
)


def versions():
    return {"torch": "0", "loop": "0"}


def bench(arena_bytes=2.0**26) -> Bench:
    return Bench(
        device=CPU,
        dtype_name="float32",
        arena=Arena(CPU, cold_bytes=2.0**20, limit_bytes=arena_bytes, seed=0),
        backends=BACKENDS,
        generator=torch.Generator().manual_seed(0),
    )


def test_the_interval_of_the_median_covers_the_true_median_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        samples = rng.lognormal(0.0, 0.5, size=40)
        median, half_width = median_interval(samples.tolist())
        ordered = np.sort(samples)
        reach = 0.98 * np.sqrt(40)
        low, high = ordered[int(20 - reach)], ordered[int(np.ceil(20 + reach))]
        assert half_width == pytest.approx((high - low) / 2 / median)
        covered += low <= 1.0 <= high
    assert 930 <= covered <= 990  # 95 % plus what rounding ranks outwards adds; 4 standard errors are 28


def test_a_known_delay_is_timed_and_repeats_stop_when_the_interval_is_narrow():
    def sleep() -> None:
        time.sleep(0.002)

    timing = measure([sleep], CPU, Effort(half_width=0.2, max_seconds=5.0))
    assert 0.002 <= timing.median_s < 0.02
    assert 7 <= timing.repeats < 400
    hurried = measure([sleep], CPU, Effort(half_width=1e-9, max_seconds=0.02))
    assert 3 <= hurried.repeats <= 15


def test_calls_are_rotated():
    seen: list[int] = []
    measure([lambda i=i: seen.append(i) for i in range(5)], CPU, Effort(max_repeats=20, half_width=0.0))
    timed = seen[3:]
    assert timed[:10] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]


def test_views_of_the_arena_do_not_overlap_until_it_is_walked_through():
    arena = Arena(CPU, cold_bytes=2.0**18, limit_bytes=2.0**24, seed=1)
    copies = arena.copies(2.0**14)
    assert copies * 2**14 >= 2**18
    arena.start(torch.float32, copies * 2.0**14)
    views = [arena.take(15, 256) for _ in range(copies)]
    starts = sorted(view.data_ptr() for view in views)
    assert all(b - a >= 15 * 256 * 4 for a, b in itertools.pairwise(starts))
    assert 0.04 < float(views[0].std()) < 0.06
    with pytest.raises(torch.OutOfMemoryError, match="allowed"):
        arena.start(torch.float32, 2.0**25)


@pytest.mark.parametrize("operator", list(CANDIDATES))
def test_every_operator_of_the_plan_can_be_built_and_called(operator):
    # head widths of DeepSeek, few tokens
    candidates = CANDIDATES[operator](SMALL, Limits(tokens=16, context=32), "float32", versions())
    assert candidates
    for point in (candidates[0], candidates[-1]):
        assert tuple(point.key) == KEYS[operator]
        with torch.inference_mode():
            prepared = points.prepare(point, bench())
            for call in prepared.calls[:2]:
                call()


def test_measured_active_experts_agree_with_uniform_routing():
    model = LIVE_MODEL
    point = next(
        p
        for p in CANDIDATES["moe"](model, Limits(tokens=8, context=32), "float32", versions())
        if p.key["top_k"] == 6 and p.key["num_tokens"] == 8
    )
    found = points.prepare(point, bench(arena_bytes=2.0**30)).columns["active_experts"]
    expected = 48 * (1 - (1 - 6 / 48) ** 8)
    assert found == pytest.approx(expected, rel=0.1)  # few copies: each a draw of some 31 +- 2 experts


def test_glue_leaves_out_the_operators_it_stands_in_for():
    """Ready-made results make a layer far cheaper than its real operators; the shapes must still fit."""
    wide = SMALL.vary(hidden=256, experts=SMALL.experts.vary(inter_size=512, shared_inter_size=512))
    limits = Limits(tokens=64, context=64)
    glue = CANDIDATES["glue"](wide, limits, "float32", versions())
    layer = CANDIDATES["layer"](wide, limits, "float32", versions())
    with torch.inference_mode():
        alone = points.prepare(next(p for p in glue if p.key["num_tokens"] == 64 and p.key["part"] == "layer"), bench())
        whole = points.prepare(next(p for p in layer if p.key["batch_size"] == 64), bench(2.0**28))
        assert alone.calls[0]().shape == whole.calls[0]().shape == (64, 256)
        effort = Effort(max_seconds=0.3)
        assert measure(alone.calls, CPU, effort).median_s < 0.7 * measure(whole.calls, CPU, effort).median_s


@settings(max_examples=20, deadline=None)
@given(budget=st.floats(5.0, 600.0), more=st.floats(1.0, 5.0))
def test_a_larger_budget_only_adds_points_and_the_same_budget_gives_the_same_plan(budget, more):
    options = {"kind": "cpu", "dtype": "float32", "versions": versions(), "point_s": 0.3}
    short = make_plan([SMALL], budget_s=budget, **options)
    again = make_plan([SMALL], budget_s=budget, **options)
    longer = make_plan([SMALL], budget_s=budget * more, **options)
    assert [p.key for p in short] == [p.key for p in again]
    assert [p.key for p in longer[: len(short)]] == [p.key for p in short]


def test_any_prefix_of_the_plan_covers_the_range_of_tokens_better_than_the_grid_order():
    points_given = CANDIDATES["gemm"](SMALL, Limits(tokens=1024, context=64), "float32", versions())
    ordered = spread_out(points_given)
    assert sorted(map(repr, ordered)) == sorted(map(repr, points_given))

    def largest_gap(chosen):
        logs = np.log2([[float(p.key[n]) for n in ("m", "n", "k")] for p in chosen])
        everything = np.log2([[float(p.key[n]) for n in ("m", "n", "k")] for p in points_given])
        return max(np.min(np.linalg.norm(logs - place, axis=1)) for place in everything)

    assert largest_gap(ordered[:15]) < 0.7 * largest_gap(points_given[:15])


def test_the_gpu_plan_holds_whole_models_of_several_kinds():
    models = [load_model(name) for name in profiler.CUDA_MODELS]
    plan = make_plan(models, kind="cuda", dtype="bfloat16", versions=versions(), budget_s=600.0, point_s=1.0)
    assert {p.operator for p in plan} == set(CANDIDATES)
    assert {p.key["hidden_size"] for p in plan if p.operator == "moe"} >= {2048, 7168}


def row_of(rows: Rows, **changes):
    return dict.fromkeys(rows.header, 1) | changes


def test_a_row_cut_short_is_dropped_and_measured_again(tmp_path):
    rows = Rows(tmp_path, "gemm", "x")
    rows.append(row_of(rows, m=1))
    rows.append(row_of(rows, m=2))
    whole = rows.path.read_text()
    rows.path.write_text(whole[:-7])  # killed inside the last write
    again = Rows(tmp_path, "gemm", "x")
    assert len(again) == 1
    assert again.has(row_of(rows, m=1))
    assert not again.has(row_of(rows, m=2))
    again.append(row_of(rows, m=2))
    assert rows.path.read_text() == whole
    with pytest.raises(MeasurementError, match="header"):
        again.append({"m": 1})
    rows.path.write_text("a,b\n1,2\n")
    with pytest.raises(MeasurementError, match="move the file away"):
        Rows(tmp_path, "gemm", "x")


def run_small(out: Path, **options):
    defaults = {"budget_s": 3.0, "models": [SMALL], "threads": 1, "name": "test cpu", "quiet": True, "point_s": 0.02}
    return run_profile(device="cpu", out=out, **(defaults | options))


@pytest.fixture
def _small_probes(monkeypatch):
    monkeypatch.setattr(profiler.probes, "LARGEST_BUFFER_BYTES", 2.0**24)
    monkeypatch.setattr(profiler.probes, "MATMUL_SIZES", (128, 256))
    facts = describe("cpu", 1, "test cpu")
    small = type(facts)(**{n: getattr(facts, n) for n in facts.__slots__} | {"cache_bytes": 2.0**21})
    monkeypatch.setattr(profiler, "describe", lambda *_: small)


@pytest.mark.usefixtures("_small_probes")
def test_a_run_writes_readable_rows_and_a_hardware_file_and_a_rerun_measures_nothing_twice(tmp_path, monkeypatch):
    first = run_small(tmp_path)
    assert first.folder == tmp_path / "test"
    assert first.measured + len(first.skipped) + first.left_over == len(first.planned)
    assert first.measured > 10
    assert not first.skipped
    files = {path.name: path.read_text() for path in first.folder.glob("*.csv")}
    table = read_table(first.folder / "moe_test.csv")
    assert np.all(table.number("latency_us") > 0)
    most = np.minimum(table.number("num_experts"), table.number("num_tokens") * table.number("top_k"))
    assert np.all(table.number("active_experts") <= most)
    hardware = load_hardware(first.hardware_file)
    assert hardware.device.memory_bandwidth > 1e8
    assert "not a data sheet" in hardware.device.source
    monkeypatch.setattr(profiler.probes, "MATMUL_SIZES", (2,))  # a disturbed second look at the peaks
    second = run_small(tmp_path)
    assert load_hardware(second.hardware_file).device.flop_per_s("float32") == hardware.device.flop_per_s("float32")
    assert second.present >= first.measured
    if not first.left_over:
        assert second.measured == 0
        assert {path.name: path.read_text() for path in first.folder.glob("*.csv")} == files


@pytest.mark.usefixtures("_small_probes")
def test_a_point_without_memory_is_skipped_named_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    real = points.BUILDERS["moe"]

    def starved(point, bench):
        if point.number("num_tokens") == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return real(point, bench)

    monkeypatch.setitem(points.BUILDERS, "moe", starved)
    result = run_small(tmp_path, quiet=False)
    assert result.skipped
    assert all("out of memory" in text for text in result.skipped)
    assert "skipped moe" in capsys.readouterr().err
    assert result.measured > 10


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("AMD EPYC 7B13 64-Core Processor 2t", "epyc_7b13_64_core_2t"),
        ("mycpu", "mycpu"),
        ("NVIDIA L4", "l4"),
        ("@", "device"),
    ],
)
def test_a_name_given_is_kept_whole_in_the_folders_name(name, slug):
    assert describe("cpu", name=name).slug == slug


def test_a_stopped_run_says_where_its_rows_are_and_how_to_go_on(tmp_path, monkeypatch, capsys):
    def stopped(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(profiler, "run_profile", stopped)
    with pytest.raises(KeyboardInterrupt):
        profile(out=tmp_path)
    assert f"under {tmp_path}, and the same command goes on" in capsys.readouterr().err


def test_a_dry_run_plans_and_writes_nothing(tmp_path):
    result = run_small(tmp_path, dry_run=True)
    text = profiler.plan_text(result)
    assert f"{len(result.planned)} points" in text
    assert "num_tokens=" in text
    assert not list(tmp_path.iterdir())


def test_unknown_devices_formats_and_backends_are_refused(tmp_path):
    with pytest.raises(CoverageError, match="cuda or cpu"):
        run_profile(device="npu", out=tmp_path)
    with pytest.raises(SpecError, match="float32"):
        run_small(tmp_path, dtype="int3")
    with pytest.raises(CoverageError, match="usable here: loop"):
        run_small(tmp_path, backends=["vllm"])


@pytest.mark.slow
def test_killed_halfway_and_resumed_it_ends_with_the_rows_of_an_uninterrupted_run(tmp_path):
    script = textwrap.dedent("""
        import sys
        from pathlib import Path
        sys.path.insert(0, "tests")
        import test_profiling_profiler as t
        t.profiler.probes.LARGEST_BUFFER_BYTES = 2.0**24
        t.profiler.probes.MATMUL_SIZES = (128, 256)
        for _ in range(4):  # on a busy machine the plan may take more than one budget
            r = t.run_small(Path(sys.argv[1]), budget_s=25.0)
            if not r.left_over:
                break
        assert not r.left_over, r.left_over
    """)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(out: Path):
        command = [sys.executable, "-c", script, str(out)]
        return subprocess.Popen(command, cwd=Path(__file__).parents[1], env=environment)

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = start(killed)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(killed.glob("*/gemm_*.csv")):
        time.sleep(0.05)
    time.sleep(1.0)
    process.send_signal(signal.SIGKILL)
    process.wait()

    def keys(out: Path):
        found = {}
        for path in out.glob("*/*.csv"):
            operator = path.name.removesuffix("_test.csv")
            with path.open() as file:
                rows = list(csv.DictReader(file))
            found[operator] = sorted(tuple(row[c] for c in KEYS[operator]) for row in rows)
        return found

    partial = keys(killed)
    assert start(killed).wait() == 0
    assert start(whole).wait() == 0
    assert sum(map(len, partial.values())) < sum(map(len, keys(killed).values()))
    assert keys(killed) == keys(whole)


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "batch", "context"), [("decode", 8, 128), ("decode", 1, 128), ("prefill", 1, 64)])
def test_the_operators_and_the_glue_of_a_layer_add_up_to_the_layer(phase, batch, context):
    """In this thread's own CPU time, so that a busy machine does not decide; calls of all parts take turns."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    model, h, e = LIVE_MODEL, LIVE_MODEL.attention.heads, LIVE_MODEL.experts
    tokens = batch if phase == "decode" else context

    def calls(operator, **key):
        candidates = CANDIDATES[operator](model, Limits(tokens=64, context=256), "float32", versions())
        point = next(p for p in candidates if all(p.key[name] == value for name, value in key.items()))
        return points.prepare(point, bench(arena_bytes=2.0**30)).calls

    def gemm(n, k):
        return calls("gemm", n=n, k=k, m=tokens)

    with torch.inference_mode():
        latent, width = model.attention.kv_elements_per_token, e.shared_inter_size
        parts = [
            gemm(h * model.attention.head_dim + latent, model.hidden),
            gemm(model.hidden, h * model.attention.v_head_dim),
            gemm(e.num_experts, model.hidden),
            gemm(2 * width, model.hidden),
            gemm(model.hidden, width),
            calls("moe", num_tokens=tokens, top_k=e.top_k),
            calls("glue", part="layer", num_tokens=tokens),
        ]
        if phase == "decode":
            parts += [calls("mla_bmm", operation=f"mla_gen_{end}", num_tokens=batch) for end in ("pre", "post")]
            parts.append(calls("mla_decode", batch_size=batch, context_tokens=context))
        else:
            parts += [gemm(h * 256, 512), calls("mla_prefill", batch_size=1, prompt_tokens=context)]
        whole = calls("layer", phase=phase, batch_size=batch, context_tokens=context, active_experts_cap=e.top_k)
        taken = [[] for _ in range(len(parts) + 1)]
        for turn in range(30):
            for times, rotation in zip(taken, [*parts, whole], strict=True):
                start = time.thread_time()
                rotation[turn % len(rotation)]()
                times.append(time.thread_time() - start)
    torch.set_num_threads(before)
    *seconds, total = (float(np.median(times)) for times in taken)
    # measured 0.95 to 1.06 on a busy 2-core machine
    assert 0.85 < sum(seconds) / total < 1.15


def test_collectives_between_processes_give_rows_once(tmp_path, monkeypatch):
    from simmoe.profiling import collectives

    monkeypatch.setattr(collectives, "MESSAGE_BYTES", (2048,))
    taken = dict.fromkeys(("threads", "driver", "torch", "clock_mhz", "timer", "seed"), 0)
    added = collectives.measure_collectives(tmp_path, "x", "cpu", 2, taken, 30.0)
    table = read_table(tmp_path / "nccl_x.csv")
    assert added == table.rows >= 2
    assert {"all_reduce", "all_gather"} <= set(table.text("operation"))
    assert np.all(table.number("num_gpus") == 2)
    assert read_table(tmp_path / "allreduce_x.csv").rows == 1
    assert collectives.measure_collectives(tmp_path, "x", "cpu", 2, taken, 30.0) == 0
    reduce = table.number("latency_us")[table.text("operation") == "all_reduce"][0]
    assert collectives.link_bytes_per_s(tmp_path, "x", 2) == pytest.approx(2048 / (reduce * 1e-6))
    assert collectives.link_bytes_per_s(tmp_path, "x", 4) is None
