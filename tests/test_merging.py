"""A merged step log against the log of the same run with every step."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simmoe.engine.step import StepTable
from simmoe.errors import SpecError
from simmoe.output_analysis import pooled_quantiles
from simmoe.series import interval_series
from simmoe.sim import recorder
from simmoe.sim.chrome_trace import write_trace
from simmoe.sim.cluster import simulate
from simmoe.sim.merging import merged
from simmoe.specs.deployment import Deployment
from simmoe.specs.engines import engine_parameters
from simmoe.specs.workload import Lengths, Workload
from simmoe.steady.front_end import at_client

MOST_ROWS = 600
"""In place of 2^18: a run of some thousand rows is merged several times."""
QUANTILES = (0.01, 0.5, 0.9, 0.99)


def step_times(budget=2048, slots=64):
    tokens = np.arange(budget + 1)
    return StepTable(
        token_s=4e-3 + 2e-5 * tokens,
        head_s=np.linspace(1e-4, 4e-3, budget + slots + 1),
        decode_base_s=1e-4 + 1e-6 * np.arange(slots + 1),
        decode_per_context_s=np.full(slots + 1, 1e-7),
        prefill_base_s=1e-5,
        prefill_per_token_s=1e-6,
        prefill_per_pair_s=2e-10,
    )


@pytest.fixture(params=[(1, 100_000, 12.0), (3, 100_000, 6.0), (1, 2_200, 14.0)], ids=["one", "three", "preempted"])
def runs(request, monkeypatch):
    """The same run with every step, and merged."""
    gpus, kv_tokens, rate = request.param
    monkeypatch.setattr(recorder, "MOST_ROWS", MOST_ROWS)
    monkeypatch.setattr(recorder, "_AT_ONCE", MOST_ROWS // 10)
    deployment = Deployment(gpus=gpus, max_num_seqs=64, max_num_batched_tokens=2048)
    lengths = {
        "input": Lengths(kind="lognormal", mean=200, cv=0.5, high=1000),
        "output": Lengths(kind="uniform", low=1, high=99),
    }
    workload = Workload(rate=rate * gpus, **lengths)
    exact, close = (
        simulate(step_times(), workload, deployment, kv_tokens, requests=3000, every_step=every)
        for every in (True, False)
    )
    assert (exact.preemptions > 20) == (request.node.callspec.id == "preempted")
    return exact, close


def test_a_merged_run_has_the_metrics_of_every_step(runs):
    exact, close = (run.metrics for run in runs)
    assert len(runs[1].steps.rank) < MOST_ROWS < len(runs[0].steps.rank) / 4
    assert runs[0].steps.merged_until_s == 0 < runs[1].steps.merged_until_s < runs[1].end_s
    for latency in ("ttft", "tpot", "e2e"):
        assert getattr(close, latency) == getattr(exact, latency)
    for field in ("output_tokens_per_s", "mean_running", "mean_step_s", "mean_batch_tokens", "kv_utilisation"):
        assert getattr(close, field) == pytest.approx(getattr(exact, field), rel=2e-3), field
    assert close.utilisation == pytest.approx(exact.utilisation, rel=1e-3)
    for statistic in ("mean", "p50", "p90", "p99"):
        assert getattr(close.itl, statistic) == pytest.approx(getattr(exact.itl, statistic), rel=1e-2), statistic


def test_so_are_the_series_and_what_clients_see(runs):
    edges = np.linspace(0, runs[0].end_s, 11)
    one, other = (
        interval_series(run.requests.accepted(), run.steps, edges, sum(run.kv_blocks), len(run.kv_blocks))
        for run in runs
    )
    for field in ("output_tokens_per_s", "running", "kv_utilisation", "utilisation"):
        assert getattr(other, field) == pytest.approx(getattr(one, field), rel=0.03), field
    own = {"front_end_time": 12.1e-3, "front_end_time_per_request": 1e-3, "front_end_time_per_token": 15.8e-6}
    parameters = engine_parameters(Deployment(), "H100").vary(**own)  # whatever is fitted
    seen = [at_client(run.requests.accepted().part(0, 3000), run.steps, parameters, 1) for run in runs]
    # some 150 bins for 11,000 steps, and a front end that takes a millisecond for every request in the engine
    assert seen[1].ttft_s.mean() == pytest.approx(seen[0].ttft_s.mean(), rel=0.03)


def test_a_trace_asks_for_every_step(runs, tmp_path):
    write_trace(runs[0], tmp_path / "steps.json")
    with pytest.raises(SpecError, match="every_step=True"):
        write_trace(runs[1], tmp_path / "merged.json")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_gaps_keep_their_number_and_mean_and_quantiles_within_a_bin(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    n = data.draw(st.integers(1, 60))
    count = rng.integers(1, 80, n).astype(float)
    first, growth = rng.uniform(1e-3, 5e-2, n), rng.choice([0.0, 1e-7, 1e-4], n)
    decodes = rng.integers(0, 5, n).astype(float)
    took = count * first + growth * count * (count - 1) / 2
    rows = np.stack(
        [np.zeros(n), np.cumsum(took) - took, count, first, growth, decodes, *rng.uniform(0, 9, (4, n))], axis=1
    )
    gaps = np.stack([rng.uniform(0, took.sum(), 3), rng.uniform(0.01, 3, 3), np.ones(3)], axis=1)
    fewer, counted = merged(*merged(rows, gaps, 16), 4)  # merged rows merge again
    assert len(fewer) <= 4
    made = fewer[:, 7].sum()
    assert made == pytest.approx((decodes * count).sum() + rows[:, 7].sum())
    assert (fewer[:, 2] * fewer[:, 3]).sum() == pytest.approx(took.sum())
    assert counted[:, 2].sum() == pytest.approx((decodes * count).sum() + 3)
    ones, three = np.ones(len(counted)), np.ones(3)
    exact = pooled_quantiles(
        *(
            np.concatenate(pair)
            for pair in ((first, gaps[:, 1]), (growth, 0 * three), (count, three), (decodes, three))
        ),
        QUANTILES,
    )
    close = pooled_quantiles(counted[:, 1], 0 * ones, ones, counted[:, 2], QUANTILES)
    assert close[0] == pytest.approx(exact[0], rel=1e-9)
    if len(first) > 20:  # few values are far apart, and what stands between two of them moves with either
        assert close[1:] == pytest.approx(exact[1:], rel=3e-3)
