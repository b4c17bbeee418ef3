"""The simulator against queueing theory and against what must hold on any run."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sim_twin import make_table

from simmoe.engine.step import Batch, StepTable
from simmoe.errors import CapacityError, SpecError
from simmoe.sim.cluster import simulate
from simmoe.sim.step_time import lockstep, single_step
from simmoe.sim.ticks import S_PER_TICK, TickTable, boundary, steps_within, to_ticks, window_ticks
from simmoe.specs.deployment import Deployment
from simmoe.specs.workload import Lengths, Objective, Workload

SMALL = Deployment(gpus=1, tp=1, max_num_seqs=8, max_num_batched_tokens=64)
TABLE = make_table(64, 8)


def fixed(tokens):
    return Lengths(mean=tokens)


def constant_steps(seconds, tokens, requests):
    """A table in which every step takes the same time."""
    token_s = np.full(tokens + 1, seconds)
    token_s[0] = 0
    zeros = np.zeros(requests + 1)
    return StepTable(token_s, np.zeros(requests + tokens + 1), zeros, zeros, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_batch_of_one_with_constant_steps_is_m_d_1(load):
    """Mean time in system s + load * s / (2 (1 - load)) (Pollaczek-Khinchine), over 30 independent runs.

    A request of one output token takes one step; 4 standard errors miss once in 16,000 tests.
    """
    service = 0.01
    deployment = SMALL.vary(max_num_seqs=1, max_num_batched_tokens=16)
    workload = Workload(rate=load / service, input=fixed(16), output=fixed(1))
    table = constant_steps(service, 16, 1)
    means = [simulate(table, workload, deployment, 1000, requests=2000, seed=s).metrics.e2e.mean for s in range(30)]
    expected = service + load * service / (2 * (1 - load))
    assert abs(np.mean(means) - expected) < 4 * np.std(means, ddof=1) / np.sqrt(30)


def test_a_station_with_many_seats_and_constant_steps_delays_nobody_but_to_the_boundary():
    """With seats to spare a request waits for the running step's rest only: n steps, and less than one more."""
    deployment = SMALL.vary(max_num_seqs=32, max_num_batched_tokens=512)
    workload = Workload(rate=5.0, input=fixed(16), output=fixed(20))
    result = simulate(constant_steps(0.01, 512, 32), workload, deployment, 10**5, requests=500)
    extra = result.requests.accepted().e2e_s[:500] - 20 * 0.01
    assert extra.min() > -1e-12
    assert extra.max() <= 0.01


@settings(max_examples=30, deadline=None)
@given(
    st.one_of(st.builds(dict, rate=st.floats(0.5, 100)), st.builds(dict, concurrency=st.integers(1, 30))),
    st.integers(1, 3),
    st.integers(60, 500),
    st.integers(0, 2**20),
    st.booleans(),
)
def test_littles_law_and_conservation(loop, replicas, kv_tokens, seed, keep_load):
    """L = lambda W holds on the whole run exactly, for requests in the system; tokens out = tokens asked for."""
    workload = Workload(
        input=Lengths(kind="uniform", mean=20.5, low=1, high=40),
        output=Lengths(kind="lognormal", mean=20, cv=1),
        **loop,
    )
    deployment = SMALL.vary(gpus=replicas)
    result = simulate(TABLE, workload, deployment, kv_tokens, requests=60, seed=seed, warmup=0.0, keep_load=keep_load)
    m, everybody = result.metrics, result.requests.accepted()
    finished = np.isfinite(everybody.finished_s)
    # a refusal may come last
    end = max(everybody.finished_s[everybody.request < 60].max(), result.requests.arrival_s[:60].max())
    in_system = np.where(finished, everybody.finished_s, end) - everybody.arrival_s
    assert m.mean_running + m.mean_waiting == pytest.approx(in_system.sum() / end)
    assert len(np.unique(result.requests.request)) == len(result.requests)
    assert finished[everybody.request < 60].all()
    assert np.all(np.diff(np.stack([everybody.arrival_s, everybody.first_scheduled_s, everybody.first_token_s,
                                    everybody.finished_s])[:, finished], axis=0) >= 0)  # fmt: skip
    if not keep_load:
        assert (everybody.request < 60).all()
        assert m.output_tokens_per_s * end == pytest.approx(everybody.output_tokens.sum())
        assert m.requests_per_s * end == pytest.approx(len(everybody))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**30), st.sampled_from(["round_robin", "least_outstanding", "power_of_two"]))
def test_one_seed_gives_one_run(seed, router):
    workload = Workload(rate=20, input=fixed(20), output=Lengths(kind="lognormal", mean=20, cv=1))
    first, second = (
        simulate(TABLE, workload, SMALL.vary(gpus=3), 500, requests=50, seed=seed, router=router) for _ in range(2)
    )
    assert first.metrics == second.metrics
    np.testing.assert_array_equal(first.requests.finished_s, second.requests.finished_s)
    other = simulate(TABLE, workload, SMALL.vary(gpus=3), 500, requests=50, seed=seed + 1, router=router)
    assert other.requests.arrival_s.tolist() != first.requests.arrival_s.tolist()


def test_two_deployments_face_the_same_traffic():
    workload = Workload(
        rate=20,
        input=Lengths(kind="lognormal", mean=20, cv=1, high=60),
        output=Lengths(kind="uniform", mean=5, low=1, high=9),
    )
    runs = [
        simulate(TABLE, workload, SMALL.vary(gpus=n), 500, requests=50, seed=3, keep_load=False).requests
        for n in (1, 4)
    ]
    for column in ("arrival_s", "input_tokens", "output_tokens"):
        assert getattr(runs[0], column).tolist() == getattr(runs[1], column).tolist()
    assert runs[1].ttft_s.mean() < runs[0].ttft_s.mean()


@settings(max_examples=20, deadline=None)
@given(st.integers(-8, 8), st.integers(0, 1000))
def test_scaling_all_rates_scales_all_times(power, seed):
    """By a power of two, so that ticks scale without rounding."""
    factor = 2.0**power
    times = {name: value / factor for name, value in vars(TABLE).items() if name.endswith("_s") and value is not None}
    scaled = replace(TABLE, **times)
    shape = {"input": fixed(20), "output": Lengths(kind="uniform", mean=10.5, low=1, high=20)}
    slow = simulate(TABLE, Workload(rate=10, **shape), SMALL, 300, requests=40, seed=seed).metrics
    fast = simulate(scaled, Workload(rate=10 * factor, **shape), SMALL, 300, requests=40, seed=seed).metrics
    assert fast.e2e.p90 * factor == pytest.approx(slow.e2e.p90, rel=1e-6)
    assert fast.output_tokens_per_s == pytest.approx(slow.output_tokens_per_s * factor, rel=1e-6)


def test_closed_loop_keeps_its_concurrency_and_gives_it_over_the_cycle_time():
    """With no think time, X = N / R (Little): the steady window has no ramp and no drain in it."""
    workload = Workload(concurrency=6, input=fixed(16), output=Lengths(kind="uniform", mean=20.5, low=1, high=40))
    m = simulate(TABLE, workload, SMALL, 10**4, requests=3000).metrics
    assert m.mean_running + m.mean_waiting == pytest.approx(6, rel=1e-9)
    assert m.requests_per_s * m.e2e.mean == pytest.approx(6, rel=0.01)
    assert m.utilisation == pytest.approx(1)


def test_requests_too_long_for_the_cache_are_refused_and_counted():
    workload = Workload(concurrency=4, input=Lengths(kind="uniform", mean=50, low=1, high=99), output=fixed(2))
    result = simulate(TABLE, workload, SMALL, 64, requests=200, keep_load=False)
    refused = result.requests.where(result.requests.rank < 0)
    assert result.refused == len(refused) > 0
    assert refused.input_tokens.min() + 1 > 64
    assert result.metrics.notes == (f"{result.refused} requests refused: longer than the KV cache",)
    served = result.requests.accepted()
    assert (served.input_tokens.max() + 1) <= 64
    assert len(served) + len(refused) == 200


@pytest.mark.parametrize("loop", [{"rate": 5.0}, {"concurrency": 3}])
def test_no_request_fits(loop):
    with pytest.raises(CapacityError, match="KV cache of 64 tokens; the shortest of 10 needs 100"):
        simulate(TABLE, Workload(input=fixed(99), output=fixed(2), **loop), SMALL, 64, requests=10)


def test_prompts_longer_than_a_step_are_refused_where_they_are_not_chunked():
    workload = Workload(rate=5, input=Lengths(kind="uniform", low=50, high=80), output=fixed(4))
    result = simulate(TABLE, workload, SMALL, 1000, requests=40, policy="vllm_v0")
    assert 0 < result.refused < 40
    assert result.requests.accepted().input_tokens.max() <= SMALL.max_num_batched_tokens
    with pytest.raises(CapacityError, match="or a step of 64 tokens as vllm_v0 computes prompts"):
        simulate(TABLE, workload.vary(input=fixed(70)), SMALL, 1000, requests=5, policy="vllm_v0", keep_load=False)


def test_duration_measures_who_arrives_within_it():
    workload = Workload(rate=50, input=fixed(8), output=fixed(2))
    result = simulate(TABLE, workload, SMALL, 10**4, duration_s=4.0, keep_load=False)
    arrivals = result.requests.arrival_s
    assert arrivals.max() <= 4.0
    assert 120 < len(arrivals) < 280  # Poisson of mean 200: 5.6 standard deviations
    closed = simulate(TABLE, workload.vary(rate=None, concurrency=2), SMALL, 10**4, duration_s=1.0, keep_load=False)
    assert 0.9 < closed.requests.arrival_s.max() <= 1.0


def test_more_load_waits_longer_and_objectives_fail():
    means, good = [], []
    for rate in (2, 8, 14):
        workload = Workload(rate=rate, input=fixed(32), output=fixed(16), objective=Objective(ttft=0.06, tpot=0.02))
        m = simulate(TABLE, workload, SMALL, 10**4, requests=1500).metrics
        means.append(m.ttft.mean)
        good.append(m.goodput_requests_per_s / m.requests_per_s)
        low, high = m.interval_90["ttft"]
        assert low < m.ttft.mean < high
    assert means == sorted(means)
    assert good == sorted(good, reverse=True)


def test_identical_ranks_in_lockstep_step_as_the_whole_replica():
    """Two ranks with the same work each take the table's time for twice that work."""
    deployment = Deployment(gpus=2, tp=1, dp=2, max_num_seqs=4, max_num_batched_tokens=32)
    workload = Workload(concurrency=4, input=fixed(16), output=fixed(11))
    result = simulate(TABLE, workload, deployment, 10**4, requests=4, keep_load=False)
    # two prompts of 16 tokens a rank, then ten decode steps of four requests with 16.. tokens each
    first = TABLE.step_s(Batch(prefill_chunks=((16, 0), (16, 0)) * 2), 4)
    assert result.requests.first_token_s == pytest.approx([first] * 4)
    rest = sum(TABLE.decode_s(4, 4 * (16 + i)) for i in range(10))
    assert result.requests.finished_s == pytest.approx([first + rest] * 4)


@given(st.integers(1, 10**18), st.integers(0, 10**18), st.integers(0, 500), st.floats(0, 1))
def test_steps_within_inverts_the_window(first, growth, steps, share):
    growth = min(growth, first)
    start = window_ticks(first, growth, steps)
    next_step = first + growth * steps
    elapsed = start + min(int(share * next_step), next_step - 1)
    assert steps_within(first, growth, elapsed) == steps


@given(st.integers(1, 10**18), st.integers(0, 10**18), st.integers(1, 500), st.floats(0, 1))
def test_a_boundary_is_the_first_step_end_from_then_on(first, growth, steps, share):
    growth = min(growth, first)
    elapsed = window_ticks(first, growth, steps - 1) + int(share * (first + growth * (steps - 1)))
    found, ticks = boundary(first, growth, elapsed)
    assert ticks == window_ticks(first, growth, found) >= elapsed
    assert found == 1 or window_ticks(first, growth, found - 1) < elapsed


def planned_rank(decodes, context, chunks=()):
    """What a step's time is read from, without a scheduler."""
    return SimpleNamespace(stepping=decodes, context=context, chunks=list(chunks), width=1, stride=1, loading=0)


@settings(deadline=None)
@given(st.integers(0, 8), st.integers(0, 5000), st.lists(st.integers(1, 18), max_size=3))
def test_ticks_keep_the_tables_times(decodes, context, prompts):
    """The twin shares the rounding to ticks; this is the check of that rounding against float seconds."""
    if decodes + len(prompts) == 0:
        return
    ticks = TickTable.of(TABLE, max_tokens=64, max_requests=8)
    decodes = min(decodes, 8 - len(prompts))
    chunks = [(SimpleNamespace(target=n + 7), n, 7) for n in prompts]
    planned = planned_rank(decodes, context if decodes else 0, chunks)
    batch = Batch(decodes, context if decodes else 0, tuple((n, 7) for n in prompts))
    seconds = TABLE.step_s(batch, len(prompts))
    assert single_step(ticks, planned)[0] * S_PER_TICK == pytest.approx(seconds, rel=1e-9)
    assert to_ticks(seconds) * S_PER_TICK == pytest.approx(seconds, rel=1e-12)


def test_limits_that_contradict_are_named():
    workload = Workload(rate=1, input=fixed(4), output=fixed(4))
    with pytest.raises(SpecError, match="max_num_batched_tokens 4 is below max_num_seqs 8"):
        simulate(TABLE, workload, SMALL.vary(max_num_batched_tokens=4), 100, requests=3)
    with pytest.raises(SpecError, match="step table covers 64 tokens and 8 requests; the deployment's limits are 128"):
        simulate(TABLE, workload, SMALL.vary(max_num_batched_tokens=128), 100, requests=3)
    with pytest.raises(SpecError, match="exactly one of requests and duration_s"):
        simulate(TABLE, workload, SMALL, 100)
    with pytest.raises(SpecError, match="router 'magic' is unknown; known: least_outstanding"):
        simulate(TABLE, workload, SMALL, 100, requests=3, router="magic")


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 400)), min_size=2, max_size=2),
    st.integers(1, 60),
    st.booleans(),
)
def test_lockstep_window_is_the_slowest_rank_at_every_step(ranks, steps, exchange):
    """And where the window ends early, another rank does take over in the next step."""
    ticks = TickTable.of(TABLE, max_tokens=64, max_requests=8)
    planned = [planned_rank(b, b * c) for b, c in ranks]
    if not any(b for b, _ in ranks):
        return
    first, growth, held = lockstep(ticks, planned, steps, exchange=exchange)

    def slowest(step):
        now = [planned_rank(b, b * (c + step)) for b, c in ranks]
        return lockstep(ticks, now, 1, exchange=exchange)[0]

    assert 1 <= held <= steps
    assert [first + growth * i for i in range(held)] == [slowest(i) for i in range(held)]
    assert held == steps or slowest(held) > first + growth * held
