"""The loop on one device: figures of a window, clocks, a device made of known parameters that must predict itself."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from typer.testing import CliRunner  # noqa: E402

from simmoe.cli.main import app  # noqa: E402
from simmoe.costs.calibration import Calibration, FittedParameter, OperatorFit, dump  # noqa: E402
from simmoe.costs.operators.host_attention import HOST_MLA_DECODE, HOST_MLA_PREFILL  # noqa: E402
from simmoe.costs.operators.host_glue import HOST_GLUE  # noqa: E402
from simmoe.costs.operators.host_products import HOST_BMM, HOST_GEMM, HOST_MOE  # noqa: E402
from simmoe.costs.operators.registry import operator_of  # noqa: E402
from simmoe.engine.step import Batch  # noqa: E402
from simmoe.errors import SpecError  # noqa: E402
from simmoe.live import figures as live_figures  # noqa: E402
from simmoe.live import validation as live_validation  # noqa: E402
from simmoe.live.figures import Cell, Figures, LiveOutcome, figures_of  # noqa: E402
from simmoe.live.validation import LiveSettings, validate_live  # noqa: E402
from simmoe.metrics import RequestTable, StepLog  # noqa: E402
from simmoe.predict import compiled_for  # noqa: E402
from simmoe.profiling.candidates import CANDIDATES, Limits  # noqa: E402
from simmoe.profiling.clocks import ThreadClock, WallClock, clock_named  # noqa: E402
from simmoe.profiling.device import describe  # noqa: E402
from simmoe.profiling.hardware_file import hardware_of, write_hardware  # noqa: E402
from simmoe.profiling.live import LiveConfig, serve  # noqa: E402
from simmoe.profiling.mla import plan_step  # noqa: E402
from simmoe.profiling.pace import pace_s  # noqa: E402
from simmoe.profiling.plan import spread_out  # noqa: E402
from simmoe.profiling.probes import Probe  # noqa: E402
from simmoe.profiling.served_model import LIVE_MODEL, ServedModel  # noqa: E402
from simmoe.profiling.tables import EXTRA, KEYS  # noqa: E402
from simmoe.profiling.timing import Effort, Sweep, measure  # noqa: E402
from simmoe.report import live as live_report  # noqa: E402
from simmoe.sim.cluster import simulate  # noqa: E402
from simmoe.specs.load import load_hardware  # noqa: E402
from simmoe.specs.measurement import read_table  # noqa: E402
from simmoe.specs.workload import Lengths, Workload  # noqa: E402

CPU = torch.device("cpu")
OPERATORS = {
    "gemm": HOST_GEMM, "mla_bmm": HOST_BMM, "moe": HOST_MOE, "mla_prefill": HOST_MLA_PREFILL,
    "mla_decode": HOST_MLA_DECODE, "glue": HOST_GLUE,
}  # fmt: skip


# ---- figures ------------------------------------------------------------------------------------------------------


def requests(rows):
    """Rows of (arrival, first token, finished, output tokens)."""
    columns = [np.array(column, dtype=float) for column in zip(*rows, strict=True)]
    n = len(rows)
    return RequestTable(
        request=np.arange(n), rank=np.zeros(n, dtype=int), arrival_s=columns[0], first_scheduled_s=columns[0],
        first_token_s=columns[1], finished_s=columns[2], input_tokens=np.ones(n), output_tokens=columns[3],
        preemptions=np.zeros(n),
    )  # fmt: skip


def steps(rows):
    """Rows of (start, steps alike, time of one, decodes, sampled)."""
    start, count, each, decodes, sampled = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    zero = np.zeros(len(rows))
    return StepLog(
        rank=zero, start_s=start, steps=count, first_s=each, growth_s=zero, decodes=decodes, prompt_tokens=zero,
        sampled=sampled, running=decodes, blocks=zero, gap_end_s=zero[:0], gap_s=zero[:0], gap_count=zero[:0],
    )  # fmt: skip


def test_figures_are_of_what_falls_inside_the_window():
    table = requests(
        [
            (0.0, 1.0, 3.0, 3),  # arrived before the window
            (2.0, 2.5, 4.5, 5),  # inside: TTFT 0.5, TPOT 0.5
            (3.0, 4.5, 9.0, 2),  # first token inside, last one behind
            (4.9, math.nan, math.nan, 4),  # nothing yet
        ]
    )
    # from 0 to 4: 8 steps of 0.5 s with 2 tokens; from 4 to 6: one step that samples 3, half of it inside
    log = steps([(0.0, 8, 0.5, 2, 0), (4.0, 1, 2.0, 0, 3)])
    found = figures_of(table, log, 2.0, 5.0)
    assert found.output_tokens_per_s == pytest.approx((4 * 2 + 1.5) / 3.0)
    assert found.ttft_mean_s == pytest.approx((0.5 + 1.5) / 2)
    assert found.tpot_mean_s == pytest.approx(0.5)
    nobody = figures_of(table, log, 4.95, 5.0)
    assert math.isnan(nobody.ttft_mean_s)
    assert math.isnan(nobody.tpot_mean_s)


def cell(cap, load, predicted, measured, **changes):
    made = [Figures(output_tokens_per_s=x, ttft_mean_s=10 / x, tpot_mean_s=1 / x) for x in (predicted, *measured)]
    given = {
        "cap": cap, "load": load, "closed_loop": True, "workload": None, "table": None, "predicted": made[0],
        "closed_form": made[0], "log_sigma": 0.05, "measured": made[1:], "step_ratios": [1.1] * len(measured),
    }  # fmt: skip
    return Cell(**{**given, **changes})


def outcome(cells):
    return LiveOutcome(
        model="m", device="d", timer="wall", threads=1, cells=cells, host_s_per_step=4e-5, pace=1.02,
        held_out_percent={"host_gemm torch": 9.0}, rows=100, folder="f", settings={"seed": 0},
    )  # fmt: skip


def test_gains_are_against_the_largest_cap_at_the_same_load():
    found = outcome(
        [
            cell(6, "8", 100.0, [100.0, 110.0]),
            cell(2, "8", 150.0, [140.0, 143.0]),
            cell(2, "1", 30.0, [30.0, 30.0]),
            cell(6, "1", 20.0, [25.0, 25.0]),
            cell(6, "2/s", 5.0, [5.0, 5.0], closed_loop=False),
        ]
    ).gains()
    assert [(g.cap, g.load) for g in found] == [(2, "8"), (2, "1")]
    assert found[0].predicted == pytest.approx(0.5)
    assert found[0].measured == pytest.approx(141.5 / 105 - 1)
    assert found[0].noise == pytest.approx(0.4 - 0.3)
    assert found[1].measured == pytest.approx(0.2)


def test_the_json_has_the_groups_of_validate_and_the_live_part():
    cells = [cell(6, "8", 110.0, [100.0, 100.0]), cell(2, "8", 150.0, [140.0, 160.0], closed_form=None)]
    plain = json.loads(json.dumps(live_figures.to_json(outcome(cells))))
    groups = {(g["group"], g["quantity"]): g for g in plain["groups"]}
    simulated = groups["live/m/d/torch", "output_tokens_per_s"]
    assert simulated["n"] == 2
    assert simulated["mape_percent"] == pytest.approx((10 + 0) / 2)
    assert groups["live/m/d/torch/closed form", "tpot_mean"]["n"] == 1
    assert {"ttft_mean", "tpot_mean"} <= {quantity for _, quantity in groups}
    live = plain["live"]
    assert live["repeatability_percent"]["output_tokens_per_s"] == pytest.approx(100 * (20 / 150) / 2, rel=1e-3)
    assert live["gain_signs_right"] == 1
    assert live["cells"][0]["ttft_mean"]["predicted"] == pytest.approx(1e3 * 10 / 110, rel=1e-3)
    assert plain["skipped"][0]["n"] == 1


def test_the_report_shows_every_cell_error_and_gain():
    from rich.console import Console

    console = Console(width=200, record=True, file=io.StringIO())
    console.print(
        live_report.table(outcome([cell(6, "8", 110.0, [100.0, 100.0]), cell(2, "8", 150.0, [150.0, 150.0])]))
    )
    text = console.export_text()
    for expected in ("8 clients", "+10.0", "cap 2, 8 clients", "+50.0", "sign right in 1 of 1", "2.0 % more", "wall"):
        assert expected in text


# ---- what is asked for --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", ["x", "0", "120%", "-3/s", ""])
def test_a_load_nobody_can_serve_is_refused(load, tmp_path):
    with pytest.raises(SpecError, match=r"--loads|concurrency|rate"):
        validate_live(LiveSettings(loads=(load,)), tmp_path)


def test_caps_and_timers_are_checked_before_anything_is_measured(tmp_path):
    with pytest.raises(SpecError, match=r"--caps 9.*1\.\.6"):
        validate_live(LiveSettings(caps=(9,)), tmp_path)
    with pytest.raises(SpecError, match="--threads 1"):
        validate_live(LiveSettings(timer="cpu"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_validate_without_tables_says_what_it_takes():
    result = CliRunner().invoke(app, ["validate"])
    assert isinstance(result.exception, SpecError)
    assert "--live" in str(result.exception)


# ---- clocks and sweeps --------------------------------------------------------------------------------------------


def test_the_thread_s_clock_counts_work_and_skips_pauses():
    clock, wall = ThreadClock(), time.perf_counter()
    before = clock.now()
    clock.sleep(5.0)
    assert time.perf_counter() - wall < 1.0
    time.sleep(0.05)  # not its own work
    assert 5.0 <= clock.now() - before < 5.04
    assert isinstance(clock_named("wall"), WallClock)
    with pytest.raises(SpecError, match="wall or cpu"):
        clock_named("gpu")


TINY = LIVE_MODEL.vary(
    name="tiny", hidden=64, layers=2, vocab=64, moe_layers=1, dense_inter_size=32,
    experts=LIVE_MODEL.experts.vary(num_experts=8, top_k=4, inter_size=16, shared_inter_size=16),
)  # fmt: skip


def test_an_idle_server_on_the_thread_s_clock_does_not_wait():
    config = LiveConfig(model=TINY, threads=1, timer="cpu", max_num_seqs=4, max_num_batched_tokens=24, longest=48)
    load = Workload(rate=2.0, input=Lengths(mean=10), output=Lengths(mean=4))
    began = time.perf_counter()
    run = serve(config, load, duration_s=10.0)
    assert time.perf_counter() - began < 8.0
    assert len(run.requests) > 8
    assert run.metrics.utilisation < 0.5


def test_a_cap_is_changed_in_place():
    served = ServedModel(TINY, slots=1, longest=8, dtype=torch.float32, device=CPU)
    weights = served.decoder_layers[1].mlp.gate_up
    served.cap(1)
    assert served.decoder_layers[1].mlp.gate.top_k == 1
    served.cap(None)
    assert served.decoder_layers[1].mlp.gate.top_k == 4
    assert served.decoder_layers[1].mlp.gate_up is weights
    with pytest.raises(SpecError, match=r"1\.\.4"):
        served.cap(5)


def test_prompts_of_one_step_are_expanded_together_and_come_out_as_alone():
    def served():
        return ServedModel(TINY, slots=3, longest=32, dtype=torch.float32, device=CPU)

    first, second = torch.arange(12) % TINY.vocab, torch.arange(30, 37)
    with torch.inference_mode():
        alone = [
            served().hidden_states(tokens, plan_step([], [(0, 0, len(tokens))], 64, CPU)) for tokens in (first, second)
        ]
        step = plan_step([], [(0, 0, 12), (2, 0, 7)], 64, CPU)
        together = served().hidden_states(torch.cat([first, second]), step)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_time_spent_sweeping_is_not_the_call_s():
    sweep = Sweep(2.0**24, "cpu")
    x = torch.ones(64)
    effort = Effort(max_seconds=1.0, max_repeats=15, timer="cpu")
    plain = measure([x.sum], CPU, effort).median_s
    swept = measure([lambda: (sweep(x), x.sum())], CPU, effort, sweep=sweep).median_s
    assert sweep.spent_s / 30 > 5 * swept
    assert swept < 50 * plain + 1e-4


def test_the_pace_is_that_of_one_product():
    assert 1e-4 < pace_s("cpu", "cpu") < 1.0


# ---- a device made of known parameters ----------------------------------------------------------------------------

TRUE = {
    "gemm": {"memory_efficiency": 0.7, "packing": 1.2, "compute_efficiency": 0.6},
    "moe": {"memory_efficiency": 0.7, "packing": 1.2, "compute_efficiency": 0.5, "active_expert": 6e-5},
    "mla_decode": {"request": 6e-5},
    "mla_prefill": {"prompt": 9e-5},
    "glue": {"fixed": 5e-4},
    "mla_bmm": {},
}


def parameters(operator):
    return {**OPERATORS[operator].defaults, **TRUE[operator]}


def hardware_facts():
    facts = describe("cpu", 1, "test")
    values = {("read_bandwidth", "float32"): 15e9, ("matmul_peak", "float32"): 180e9, ("matmul_peak", "bfloat16"): 1e12}
    probes = [Probe(quantity=q, dtype=d, value=v, unit="", repeats=1) for (q, d), v in values.items()]
    return facts, hardware_of(facts, probes)


def write_profile(folder, facts, hardware):
    """Rows as `simmoe profile` writes them, made of the true parameters with 2 % of noise."""
    write_hardware(folder / "hardware.yaml", hardware)
    rng = np.random.default_rng(0)
    for operator, model in OPERATORS.items():
        versions = {"torch": "0", "loop": "0"}
        found = CANDIDATES[operator](LIVE_MODEL, Limits(tokens=512, context=1024), "float32", versions)
        points = spread_out(found)[:60]
        path = folder / f"{operator}_{facts.slug}.csv"
        extra = [name for name in EXTRA.get(operator, ()) if name == "anomalous"]

        def write(times, path=path, operator=operator, points=points, extra=extra):
            with path.open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow([*KEYS[operator], "latency_us", *extra])
                for point, time_us in zip(points, times, strict=True):
                    writer.writerow([*point.key.values(), f"{time_us:.6g}", *(0 for _ in extra)])

        write(np.ones(len(points)))
        table = read_table(path)
        assert operator_of(table) is not None
        seconds = model.seconds(model.features(table), parameters(operator), hardware, True)  # noqa: FBT003
        write(1e6 * seconds * np.exp(0.02 * rng.standard_normal(len(points))))


def true_fits():
    for operator, model in OPERATORS.items():
        variants = ({"part": "layer"}, {"part": "step"}) if operator == "glue" else ({},)
        for variant in variants:
            yield OperatorFit(
                operator=model.name, variant={"framework": "torch", **variant},
                parameters={name: FittedParameter(value=value) for name, value in parameters(operator).items()},
                log_sigma=0.01, in_sample_mape_percent=0.0, held_out_mape_percent=0.0, held_out_median_ape_percent=0.0,
                held_out_p90_ape_percent=0.0, roofline_mape_percent=0.0, rows=1, groups=1, ranges={}, source="",
            )  # fmt: skip


def test_a_device_of_known_parameters_is_profiled_fitted_predicted_and_found_again(tmp_path, monkeypatch):
    """The measured runs are simulations with the true parameters; the prediction knows the noisy rows alone."""
    facts, hardware = hardware_facts()
    truth_folder, host_s = tmp_path / "truth" / facts.slug, 5e-5
    write_hardware(truth_folder / "hardware.yaml", hardware)
    truth = Calibration(device=facts.name, created_by="test", digest="0", sources=(), fits=tuple(true_fits()))
    dump(truth, truth_folder / "calibration.yaml")
    true_hardware = load_hardware(truth_folder / "hardware.yaml")

    def profile(*, out, **_):
        folder = out / facts.slug
        write_profile(folder, facts, hardware)
        return SimpleNamespace(
            measured=1, present=0, folder=folder, hardware_file=folder / "hardware.yaml", facts=facts
        )

    def served(config, workload, *, duration_s, active_experts, served):
        deployment = config.deployment(active_experts, host_s)
        parts = compiled_for(true_hardware, config.model, deployment, workload)
        run = simulate(
            parts.table, workload, deployment, int(parts.memory.kv_tokens), duration_s=duration_s, seed=config.seed,
            keep_load=False,
        )  # fmt: skip
        batch = Batch(decode_requests=4, decode_context_tokens=400)
        step = SimpleNamespace(batch=batch, finishing=0, wall_s=parts.table.step_s(batch))
        return SimpleNamespace(requests=run.requests, log=run.steps, steps=(step,), host_s_per_step=host_s)

    monkeypatch.setattr(live_validation, "pace_s", lambda *_: 1e-3)
    monkeypatch.setattr(live_validation, "run_profile", profile)
    monkeypatch.setattr(live_validation, "serve", served)
    monkeypatch.setattr(live_validation, "build", lambda _: None)
    found = validate_live(LiveSettings(loads=("2", "8", "60%"), threads=1, duration_s=20.0), tmp_path / "out")
    assert [(c.cap, c.load) for c in found.cells[:4]] == [(6, "2"), (4, "2"), (2, "2"), (6, "8")]
    rate = found.cells[-1].workload.rate
    assert found.cells[-1].load == f"{rate:g}/s"
    errors = {(c.group, c.quantity): [] for c in found.comparisons().comparisons}
    for c in found.comparisons().comparisons:
        errors[c.group, c.quantity].append(abs(c.error))
    group = f"live/simmoe-live-48e/{facts.slug}/torch"
    assert max(errors[group, "output_tokens_per_s"]) < 0.06
    assert max(errors[group, "tpot_mean"]) < 0.06
    assert max(errors[group, "ttft_mean"]) < 0.15  # a request that just misses a step waits for the whole of it
    assert np.median(errors[f"{group}/closed form", "output_tokens_per_s"]) < 0.06
    assert len(found.gains()) == 4
    assert all(g.noise == 0.0 and g.measured > 0.05 for g in found.gains())
    assert all(abs(g.predicted - g.measured) < 0.08 for g in found.gains())
    assert all(abs(ratio - 1) < 0.06 for c in found.cells for ratio in c.step_ratios)


@pytest.mark.slow
def test_a_real_model_served_here_is_near_its_prediction(tmp_path):
    """By the thread's own run time, so that a busy machine does not decide; bounds for a busy one all the same."""
    settings = LiveSettings(budget_s=60.0, caps=(6, 2), loads=("4",), duration_s=5.0, repeats=1, threads=1, timer="cpu")
    found = validate_live(settings, tmp_path)
    for c in found.comparisons().comparisons:
        if c.quantity == "output_tokens_per_s":
            assert abs(c.error) < 0.35
    (gain,) = found.gains()
    assert gain.measured > 0.1
    assert gain.predicted > 0.1
    assert (tmp_path / found.device / "calibration.yaml").exists()
