"""`simmoe simulate` and what it is made of: scenarios, replications, saturation, series, stages, the trace file."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import test_traces as traced
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from test_sim import SMALL, TABLE, fixed
from typer.testing import CliRunner

from simmoe.cli.main import app
from simmoe.errors import SaturationError, SimmoeError, SpecError
from simmoe.output_analysis import t_95, t_interval
from simmoe.series import _held, interval_series, stage_metrics
from simmoe.sim import chrome_trace
from simmoe.sim.cluster import simulate
from simmoe.sim.failures import losses_per_request
from simmoe.simulation import run_scenario
from simmoe.specs.cluster import Failures
from simmoe.specs.scenario import load_scenario
from simmoe.specs.workload import Lengths, Workload

RUNNER = CliRunner()
STAGED = Workload(
    arrivals={"kind": "staged", "stages": [{"rate": 20, "duration": 10}, {"rate": 5, "duration": 10}]},
    input=fixed(20),
    output=Lengths(kind="uniform", low=1, high=20),
)


def run(*arguments):
    return RUNNER.invoke(app, ["simulate", *arguments], catch_exceptions=True)


def as_json(*arguments):
    outcome = run(*arguments, "--json")
    assert outcome.exit_code == 0, outcome.output
    return json.loads(outcome.stdout)


def write(folder, text, name="scenario.yaml"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


SCENARIO = """
hardware: h100
model: deepseek-v2-lite
workload: {rate: 8 request/s, input: {mean: 512}, output: {mean: 64}}
run: {requests: 200, seed: 3}
"""


def test_a_file_and_its_flags_are_the_same_run_and_seeds_differ(tmp_path):
    path = write(tmp_path, SCENARIO)
    flags = ("h100", "--rate", "8", "--input", "512", "--output", "64", "--requests", "200")
    from_file, from_flags = as_json(path), as_json(*flags, "--seed", "3")
    assert from_file["metrics"] == from_flags["metrics"]
    assert from_file == as_json(path)
    assert as_json(path, "--seed", "4")["metrics"] != from_file["metrics"]
    m = from_file["metrics"]
    assert m["requests"] == 180
    assert m["ttft_s"]["p50"] < m["ttft_s"]["p99"] < 1
    assert not from_file["saturated"]
    assert from_file["provenance"]["seed"] == 3


def test_flags_override_the_file(tmp_path):
    slow = as_json(write(tmp_path, SCENARIO))
    fast = as_json(write(tmp_path, SCENARIO), "--output", "16", "--rate", "4", "--requests", "100")
    assert fast["workload"]["output"]["mean"] == 16
    assert fast["workload"]["input"]["mean"] == 512
    assert fast["metrics"]["e2e_s"]["mean"] < slow["metrics"]["e2e_s"]["mean"]


def test_people_see_rates_latencies_and_saturation(tmp_path):
    shown = run("h100", "--rate", "200", "--input", "512", "--output", "256", "--requests", "800").output
    assert "SATURATED" in shown
    assert "TTFT" in shown
    assert "SATURATED" not in run("h100", "--rate", "5", "--requests", "300", "--output", "64").output
    # a server that fills: nobody waits, and nobody has ended yet
    assert "SATURATED" not in run("h100", "--rate", "4", "--requests", "100", "--output", "2000").output
    flags = ("h100", "--rate", "200", "--output", "256", "--requests", "800")
    assert as_json(*flags, "--allow-saturation")["saturated"]
    assert not as_json("h100", "--concurrency", "700", "--output", "64", "--requests", "800")["saturated"]


def test_an_endless_overload_is_an_error_after_the_results_and_one_that_ends_is_not(tmp_path, capsys):
    load = "h100 --rate 200 --output 256 --requests 800"
    with pytest.raises(SaturationError, match=r"^rate 200 request/s: SATURATED from .* lower the rate, .*--drain"):
        app(["simulate", *load.split(), "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["metrics"]["requests_per_s"] < 100
    assert as_json(*load.split(), "--drain")["saturated"]
    stages = "{arrivals: {kind: staged, stages: [{rate: 200 request/s, duration: 4 s}]}, input: {mean: 512}, "
    staged = "hardware: h100\nmodel: deepseek-v2-lite\nworkload: " + stages + "output: {mean: 256}}\n"
    assert as_json(write(tmp_path, staged))["saturated"]
    endless = SCENARIO.replace("8 request/s", "200 request/s").replace("200,", "900,")
    with pytest.raises(SaturationError, match=r"scenario.yaml: rate 200 request/s: SATURATED"):
        app(["simulate", write(tmp_path, endless)], standalone_mode=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hardware: h100\n", "model: missing"),
        (SCENARIO + "wrokload: 3\n", "unknown key; did you mean 'workload'"),
        (SCENARIO.replace("8 request/s", "8"), 'workload.rate: 8 has no unit; write e.g. "8 request/s"'),
        (SCENARIO.replace("requests: 200", "requets: 200"), "run.requets: unknown key; did you mean 'requests'"),
        (
            SCENARIO + "cluster: {router: dice}\n",
            "cluster.router: 'dice' will not do: it should be 'round_robin', 'least_outstanding'",
        ),
        (SCENARIO + "cluster: 3\n", "cluster: 3 will not do: it should be a mapping of keys to values"),
        (
            SCENARIO.replace("rate: 8 request/s,", "rate: 8 request/s, concurrency: 3,"),
            ".yaml: workload: give exactly one",
        ),
        (
            SCENARIO.replace("seed: 3", "warmup: some"),
            "run.warmup: 'some' is neither a share of the requests, e.g. 0.1, nor",
        ),
        (SCENARIO.replace("{mean: 512}", "{file: gone.txt}"), "gone.txt: no list of token counts can be read there"),
        (SCENARIO + "deployment: {max_num_batched_tokens: 9}\n", "scenario.yaml: max_num_batched_tokens 9 is below"),
        (SCENARIO + "deployment: {kv_blocks: 3}\n", "kv_blocks 3 of 16 tokens hold 48 where 544 are asked for; raise"),
        (SCENARIO.replace("h100", "h1o0"), "did you mean"),
        (SCENARIO.replace("input: {mean: 512}", "trace: gone.csv"), "gone.csv: no such trace file"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, text, message):
    outcome = run(write(tmp_path, text))
    assert isinstance(outcome.exception, SimmoeError)
    assert message in str(outcome.exception)
    assert "\n" not in str(outcome.exception)


def test_a_missing_file_is_named():
    outcome = run("nowhere.yaml")
    assert str(outcome.exception) == "nowhere.yaml: no such scenario or hardware file"


def test_a_trace_and_observed_lengths_are_found_beside_the_file(tmp_path):
    rows = "".join(f"{t / 10},GPT-4,{100 + t},20,0,API log\n" for t in range(60))
    write(tmp_path, "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n" + rows, "burst.csv")
    head = "hardware: h100\nmodel: deepseek-v2-lite\n"
    played = as_json(write(tmp_path, head + "workload: {trace: burst.csv}\nrun: {warmup: 0.0, drain: true}\n"))
    assert played["metrics"]["requests"] == 60
    assert played["metrics"]["output_tokens_per_s"] * played["duration_s"] == pytest.approx(1200)
    write(tmp_path, "10\n20\n60\n", "lengths.txt")
    workload = "workload: {concurrency: 2, input: {file: lengths.txt}, output: {mean: 4}}\nrun: {requests: 30}\n"
    scenario = load_scenario(tmp_path / write(tmp_path, head + workload, "two.yaml"))
    assert scenario.workload.input.values == (10, 20, 60)


def test_replications_are_independent_and_their_interval_is_students(tmp_path):
    scenario = load_scenario(tmp_path / write(tmp_path, SCENARIO.replace("seed: 3", "replications: 4")))
    told = []
    result = run_scenario(scenario, lambda n, of: told.append((n, of)))
    means = [r.metrics.output_tokens_per_s for r in result.runs]
    assert len(set(means)) == 4
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    low, high = result.metrics.interval_90["output_tokens_per_s"]
    half = stats.t.ppf(0.95, 3) * np.std(means, ddof=1) / 2
    assert (low, high) == pytest.approx((np.mean(means) - half, np.mean(means) + half), rel=1e-4)
    assert result.metrics.ttft.mean > np.mean([r.metrics.ttft.mean for r in result.runs])  # the front end's time


@given(st.integers(1, 200))
def test_students_quantile(freedom):
    assert t_95(freedom) == pytest.approx(stats.t.ppf(0.95, freedom), rel=1e-3)


def test_one_run_has_no_interval_across_runs():
    assert t_interval(np.array([3.0])) == (-np.inf, np.inf)


@given(
    st.lists(st.tuples(st.floats(0, 50), st.floats(0, 30), st.floats(0, 9)), min_size=1, max_size=20),
    st.lists(st.floats(0, 100), min_size=2, max_size=8, unique=True),
)
def test_integrals_over_intervals_are_those_of_each_row(rows, edges):
    start, wide, amount = np.array(rows).T
    edges = np.sort(edges)
    expected = [
        sum(a * max(0.0, min(s + w, high) - max(s, low)) for s, w, a in rows) for low, high in itertools.pairwise(edges)
    ]
    np.testing.assert_allclose(_held(start, start + wide, amount, edges), expected, atol=1e-8)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**30), st.integers(1, 3))
def test_series_add_up_to_the_run(seed, gpus):
    result = simulate(TABLE, STAGED, SMALL.vary(gpus=gpus), 500, seed=seed, warmup=0.0)
    served = result.requests.accepted()
    edges = np.linspace(0, result.end_s, 12)
    series = interval_series(served, result.steps, edges, sum(result.kv_blocks), gpus)
    width = np.diff(edges)
    assert (series.arrivals_per_s * width).sum() == pytest.approx(len(served))
    assert (series.output_tokens_per_s * width).sum() == pytest.approx(served.output_tokens.sum())
    assert ((series.running + series.waiting) * width).sum() == pytest.approx(served.e2e_s.sum())  # Little's law
    m = result.metrics
    assert series.kv_utilisation @ width / result.end_s == pytest.approx(m.kv_utilisation)
    assert series.utilisation @ width / result.end_s == pytest.approx(m.utilisation)


def test_stages_are_measured_apart():
    result = simulate(TABLE, STAGED, SMALL, 10**4, warmup=0.0)
    first, second = stage_metrics(result.requests, result.steps, [0.0, 10.0, 20.0])
    assert first.requests + second.requests == len(result.requests)
    assert first.arrivals_per_s == pytest.approx(20, rel=0.25)
    assert second.arrivals_per_s == pytest.approx(5, rel=0.5)
    assert first.ttft.mean > second.ttft.mean
    assert first.output_tokens_per_s > second.output_tokens_per_s


def test_the_trace_keeps_to_the_format_and_to_the_run(tmp_path):
    """Keys per phase as the Trace Event Format asks; slices of a track in order and apart; counters as logged."""
    result = simulate(TABLE, STAGED, SMALL.vary(gpus=2), 500, warmup=0.0)
    path = tmp_path / "folder" / "run.json"
    chrome_trace.write_trace(result, path)
    events = json.loads(path.read_text())["traceEvents"]
    needed = {"X": {"ts", "dur", "tid", "cat"}, "C": {"ts"}, "M": {"tid"}}
    for event in events:
        assert needed[event["ph"]] | {"name", "ph", "pid", "args"} == set(event)
        assert all(isinstance(event[key], int) for key in ("pid", "tid") if key in event)
        assert all(np.isfinite(event[key]) and event[key] >= 0 for key in ("ts", "dur") if key in event)
        if event["ph"] == "C":
            assert all(isinstance(value, float) for value in event["args"].values())
    slices = [e for e in events if e["ph"] == "X"]
    assert sum(e["args"]["steps"] for e in slices) == result.steps.steps.sum()
    for process in {e["pid"] for e in slices}:
        track = [(e["ts"], e["dur"]) for e in slices if e["pid"] == process]
        assert all(a + wide <= b + 1e-6 * b for (a, wide), (b, _) in itertools.pairwise(track))
    waiting = [e["args"]["requests"] for e in events if e["name"] == "waiting"]
    assert min(waiting) == 0
    assert waiting[-1] == 0
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == {"cluster", "rank 0", "rank 1"}
    for name, most in (("batch", SMALL.max_num_seqs), ("KV cache", result.kv_blocks[0])):
        levels = [value for e in events if e["name"] == name for value in e["args"].values()]
        assert len(levels) == len(slices)
        assert 0 < max(levels) <= most
    assert [e["args"] for e in events if e["name"] == "replicas"] == [{"on": 2.0}]


def test_a_trace_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError, match=r"--trace .*file/run.json: cannot write"):
        chrome_trace.write_trace(simulate(TABLE, STAGED, SMALL, 500), tmp_path / "file" / "run.json")


def test_the_picture_and_the_trace_are_written(tmp_path):
    plot, trace = tmp_path / "run.png", tmp_path / "run.json"
    outcome = run("h100", "--requests", "50", "--output", "16", "--plot", str(plot), "--trace", str(trace))
    assert outcome.exit_code == 0, outcome.output
    assert plot.read_bytes()[:4] == b"\x89PNG"
    assert trace.stat().st_size > 1000


def test_flags_of_traffic_and_scheduling_are_those_of_a_file():
    base = ("h100", "--rate", "8", "--output", "32", "--requests", "60")
    plain = as_json(*base)
    flagged = as_json(*base, "--burstiness", "0.25", "--goodput", "ttft=60ms, tpot=30 ms", "--policy", "sglang")
    assert flagged["workload"]["arrivals"]["cv"] == 2.0
    assert flagged["workload"]["objective"] == {"ttft": 0.06, "tpot": 0.03, "e2e": None}
    assert 0 < flagged["metrics"]["goodput_requests_per_s"] < flagged["metrics"]["requests_per_s"]
    assert flagged["notes"][0].startswith("scheduling policy sglang")
    assert flagged["metrics"]["ttft_s"]["p99"] > plain["metrics"]["ttft_s"]["p99"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--goodput", "tftf=3s"), "--goodput 'tftf=3s': 'tftf=3s' is not one of ttft=, tpot=, e2e= with a time"),
        (("--goodput", "ttft=3"), "--goodput 'ttft=3': ttft: '3' has no unit"),
        (("--rate", "3", "--burstiness", "0"), "--burstiness: 0 will not do: it should be above 0; 1 is Poisson"),
        (("--burstiness", "2"), "--burstiness is of an open loop's arrivals; give --rate"),
        (
            ("--policy", "fifo"),
            "--policy: 'fifo' will not do: it should be 'vllm', 'trtllm', 'trtllm_max_utilization', ",
        ),
        (("--router", "dice"), "--router: 'dice' will not do: it should be 'round_robin', "),
    ],
)
def test_what_is_wrong_with_a_flag_is_one_line(options, message):
    assert message in str(run("h100", "--requests", "20", *options).exception)


@pytest.mark.parametrize(
    ("text", "load", "served"),
    [
        (traced.AZURE, "open loop, 0.7936 requests/s as in", 3),
        (traced.AZURE_2024, "open loop, 1.01 requests/s as in", 2),
        (traced.BURSTGPT, "open loop, 0.02469 requests/s as in", 2),
        (traced.MOONCAKE, "open loop, 0.6667 requests/s as in", 2),
        (traced.REQUESTS, "open loop, 0.25 requests/s as in", 3),
        (json.dumps(traced.VLLM), "closed loop, 2 clients", 2),
        (json.dumps({**traced.VLLM, "start_times": [100.5, 100.0, 101.0]}), "open loop, 2 requests/s as in", 2),
        (traced.SGLANG, "open loop, 4 requests/s (poisson)", 2),
        (traced.SGLANG.replace("4.0", "Infinity"), "closed loop, 2 clients", 2),
    ],
)
def test_every_trace_format_is_played_by_the_command(tmp_path, text, load, served):
    path = tmp_path / "trace"
    path.write_text(text, encoding="utf-8")
    options = ("h100", "--replay", str(path), "--warmup", "0", "--drain", "--requests", str(served))
    outcome = run(*options)
    assert outcome.exit_code == 0, outcome.exception
    shown = " ".join(outcome.output.split())
    assert load in shown
    assert f"{served} requests measured" in shown


def test_burstiness_of_a_trace_needs_a_rate(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(traced.AZURE, encoding="utf-8")
    refused = run("h100", "--replay", str(path), "--burstiness", "0.5")
    assert str(refused.exception) == (
        "--burstiness is of an open loop's arrivals at a rate; give --rate beside --replay"
    )
    spread = as_json("h100", "--replay", str(path), "--rate", "3", "--burstiness", "0.25", "--requests", "40")
    assert spread["workload"]["arrivals"]["cv"] == 2.0


def test_help_shows_examples():
    shown = run("--help").output
    assert "simmoe simulate h100 --model deepseek-v2-lite --rate 8" in shown.replace("\n", " ")


def test_disaggregation_runs_from_a_file(tmp_path):
    text = SCENARIO + "deployment: {gpus: 1}\ncluster: {disaggregation: {decode: {gpus: 1}}}\n"
    apart = as_json(write(tmp_path, text))
    together = as_json(write(tmp_path, SCENARIO))
    assert apart["metrics"]["tpot_s"]["p99"] < together["metrics"]["tpot_s"]["p99"]  # no prompts between tokens
    assert apart["metrics"]["requests"] == together["metrics"]["requests"]


def test_requests_longer_than_the_models_context_are_told_and_a_run_of_nothing_else_refused(tmp_path):
    rows = [
        {"timestamp": 0, "input_length": n, "output_length": 5, "hash_ids": [i]} for i, n in enumerate((200_000, 300))
    ]
    trace = tmp_path / "long.jsonl"
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert any(
        "1 of 2 requests exceed the 163840 tokens" in note for note in as_json("h100", "--replay", str(trace))["notes"]
    )
    trace.write_text(json.dumps(rows[0]) + "\n", encoding="utf-8")
    refused = run("h100", "--replay", str(trace))
    assert refused.exit_code != 0
    assert "all requests exceed" in str(refused.exception)


def test_failures_that_let_hardly_a_request_end_are_refused(tmp_path):
    often = SCENARIO + "cluster: {failures: {mean_time_between: 10 ms, restart_time: 1 s}}\n"
    said = r"mean_time_between: 10 ms is too short: .* takes 2\d\d ms alone and would be lost \d+ times before it ends"
    with pytest.raises(SpecError, match=said):
        run_scenario(load_scenario(Path(write(tmp_path, often))))
    assert as_json(write(tmp_path, often.replace("10 ms", "400 ms")))["failures"] > 10


def test_losses_of_a_request_are_those_of_a_renewal_process():
    rule, rng = Failures(mean_time_between=1.0, restart_time=0.0), np.random.default_rng(5)
    prompt, output, losses = 0.7, 1.6, []
    for _ in range(20_000):
        left, lost = output, 0
        while (up := rng.exponential(1.0)) < prompt + left:
            left -= max(0.0, up - prompt)
            lost += 1
        losses.append(lost)
    assert losses_per_request(rule, prompt, output) == pytest.approx(np.mean(losses), rel=0.03)
