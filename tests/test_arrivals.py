"""Traffic against the laws it claims to follow; tolerances are 4 or more standard errors."""

from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simmoe.sim.arrivals import Streams, arrival_ticks, draw_lengths, shapes, think_ticks
from simmoe.sim.ticks import S_PER_TICK
from simmoe.specs.traces import workload_of
from simmoe.specs.workload import Arrivals, Lengths, Prompts, TraceReplay, Workload

TEN = Lengths(mean=10)


def times(arrivals, count, *, rate=5.0, seed=0):
    workload = Workload(rate=rate, arrivals=arrivals, input=TEN, output=TEN)
    return np.array(list(islice(arrival_ticks(workload, Streams.of(seed)), count)), dtype=float) * S_PER_TICK


@pytest.mark.parametrize("cv", [0.3, 1.0, 3.0])
def test_gamma_gaps_have_the_rate_and_the_variation_asked_for(cv):
    gaps = np.diff(times(Arrivals(kind="gamma", cv=cv), 40_000), prepend=0.0)
    assert gaps.mean() == pytest.approx(0.2, rel=4 * cv / 200)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.03 * max(1, cv))


def test_gamma_of_one_is_poisson():
    gaps = np.diff(times(Arrivals(kind="gamma"), 20_000), prepend=0.0)
    grid = np.array([0.1, 0.5, 1.0, 2.0]) * 0.2
    share = (gaps[:, None] > grid).mean(axis=0)
    np.testing.assert_allclose(share, np.exp(-grid * 5.0), atol=4 * 0.5 / np.sqrt(len(gaps)))


def test_on_off_has_the_mean_rate_and_dispersion_of_its_markov_chain():
    """I(inf) = 1 + 2 (l1 - l2)^2 r12 r21 / ((r12 + r21)^2 (l1 r21 + l2 r12)), from the process' own parameters."""
    arrivals = Arrivals(kind="on_off", on_time=2.0, off_time=6.0, peak=2.5)
    rate, on, off = 5.0, 2.0, 6.0
    fast, slow = 2.5 * rate, (rate * (on + off) - 2.5 * rate * on) / off
    r12, r21 = 1 / on, 1 / off
    expected = 1 + 2 * (fast - slow) ** 2 * r12 * r21 / ((r12 + r21) ** 2 * (fast * r21 + slow * r12))
    when = times(arrivals, 400_000, rate=rate)
    window = 200.0  # a hundred times the chain's memory
    counts = np.histogram(when, np.arange(0, when[-1], window))[0]
    assert counts.mean() / window == pytest.approx(rate, rel=4 * np.sqrt(expected / len(when)))
    assert counts.var() / counts.mean() == pytest.approx(expected, rel=4 * np.sqrt(2 / len(counts)) + 0.02)
    assert expected > 8


def test_on_off_without_a_peak_is_silent_between_bursts():
    when = times(Arrivals(kind="on_off", on_time=1.0, off_time=50.0), 2000, rate=10.0)
    assert np.diff(when).max() > 20  # rate in bursts is 510/s
    assert np.median(np.diff(when)) < 0.01


def test_diurnal_rate_integrates_to_the_sine():
    arrivals = Arrivals(kind="diurnal", amplitude=0.6, period=1000.0, phase=0.25)
    when = times(arrivals, 100_000, rate=10.0)
    days = int(when[-1] // 1000)
    phase = when[when < days * 1000] % 1000
    edges = np.linspace(0, 1000, 9)
    counts = np.histogram(phase, edges)[0] / days

    def total(t):  # integral of 10 (1 + 0.6 sin(2 pi (t / 1000 - 0.25)))
        return 10 * (t - 0.6 * 1000 / (2 * np.pi) * np.cos(2 * np.pi * (t / 1000 - 0.25)))

    expected = np.diff(total(edges))
    np.testing.assert_allclose(counts, expected, atol=4.5 * np.sqrt(expected.max() / days))


@pytest.mark.parametrize("exact", [False, True])
def test_stages_follow_their_rates_and_end(exact):
    stages = [{"rate": 40, "duration": 50}, {"rate": 0, "duration": 30}, {"rate": 100, "duration": 20}]
    workload = Workload(arrivals={"kind": "staged", "stages": stages, "exact_counts": exact}, input=TEN, output=TEN)
    assert workload.rate == pytest.approx(40.0)
    when = np.array(list(arrival_ticks(workload, Streams.of(1)))) * S_PER_TICK
    counts = np.histogram(when, [0, 50, 80, 100])[0]
    assert counts[1] == 0
    if exact:
        assert counts.tolist() == [2000, 0, 2000]
    else:
        assert counts.tolist() != [2000, 0, 2000]
        np.testing.assert_allclose(counts, [2000, 0, 2000], atol=4 * np.sqrt(2000))


@settings(max_examples=40, deadline=None)
@given(
    st.one_of(
        st.builds(Arrivals),
        st.builds(Arrivals, kind=st.just("gamma"), cv=st.floats(0.1, 10)),
        st.builds(Arrivals, kind=st.just("on_off"), on_time=st.floats(0.1, 50), off_time=st.floats(0.1, 50)),
        st.builds(Arrivals, kind=st.just("diurnal"), amplitude=st.floats(0, 1), period=st.floats(1, 1e5)),
    ),
    st.floats(0.01, 1e4),
    st.integers(0, 2**30),
)
def test_arrivals_never_go_back_and_repeat_under_their_seed(arrivals, rate, seed):
    workload = Workload(rate=rate, arrivals=arrivals, input=TEN, output=TEN)
    first, second = (list(islice(arrival_ticks(workload, Streams.of(seed)), 300)) for _ in range(2))
    assert first == second
    assert first[0] >= 0
    assert all(a <= b for a, b in pairwise(first))


def test_empirical_lengths_occur_as_often_as_in_the_list():
    lengths = Lengths(kind="empirical", values=(1, 1, 1, 50, 200, 200))
    assert lengths.mean == pytest.approx(453 / 6)
    drawn = np.array(draw_lengths(lengths, 60_000, np.random.default_rng(0)))
    share = [(drawn == v).mean() for v in (1, 50, 200)]
    np.testing.assert_allclose(share, [1 / 2, 1 / 6, 1 / 3], atol=4 * 0.5 / np.sqrt(len(drawn)))


def test_think_times_have_their_mean_and_need_a_closed_loop():
    workload = Workload(concurrency=2, think_time=3.0, input=TEN, output=TEN)
    drawn = np.array(list(islice(think_ticks(workload, Streams.of(0)), 40_000)), dtype=float) * S_PER_TICK
    assert drawn.mean() == pytest.approx(3.0, rel=0.02)
    assert drawn.std() == pytest.approx(3.0, rel=0.03)
    fixed = think_ticks(workload.vary(think="fixed"), Streams.of(0))
    assert next(fixed) * S_PER_TICK == pytest.approx(3.0)
    assert think_ticks(workload.vary(think_time=0.0), Streams.of(0)) is None
    with pytest.raises(ValueError, match="think_time belongs to a closed loop"):
        Workload(rate=1.0, think_time=3.0, input=TEN, output=TEN)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 40), st.sampled_from(["round_robin", "random"]))
def test_repeated_prompts_keep_their_length_and_share_their_groups_head(distinct, groups, shared, order):
    groups = min(groups, distinct)
    workload = Workload(
        rate=1.0,
        input=Lengths(kind="uniform", low=shared + 1, high=shared + 60),  # longer than the head, hence different
        output=TEN,
        prompts=Prompts(distinct=distinct, groups=groups, shared_tokens=shared, order=order),
    )
    drawn = list(islice(shapes(workload, Streams.of(4)), 3 * distinct))
    assert all(sum(tokens for _, tokens in prompt) == size for size, _, prompt in drawn)
    by_prompt = {prompt: size for size, _, prompt in drawn}
    assert len(by_prompt) <= distinct
    if order == "round_robin":
        assert len(by_prompt) == distinct
        assert [prompt for *_, prompt in drawn[:distinct]] == [prompt for *_, prompt in drawn[distinct : 2 * distinct]]
        if shared:
            heads = {prompt[0][0] for prompt in by_prompt}
            assert len(heads) == groups
            assert all(prompt[0][1] == min(shared, size) for prompt, size in by_prompt.items())


def test_traced_prompts_of_a_group_share_a_head_and_other_lengths_stand_in(tmp_path):
    path = tmp_path / "t.csv"
    rows = [f"0,{i},{i % 3},{50 + i % 3},10,1" for i in range(6)]
    path.write_text("\n".join(["stage,arrival_s,prompt_id,input_tokens,output_tokens,ok", *rows]), encoding="utf-8")
    replay = TraceReplay(path=str(path), group_prompts=2, shared_tokens=20)
    played = list(islice(shapes(workload_of(replay), Streams.of(0)), 4))
    assert played[0] == (50, 10, ((-1, 20), (0, 30)))
    assert played[1] == (51, 10, ((-1, 20), (1, 31)))
    assert played[2] == (52, 10, ((-2, 20), (2, 32)))
    assert played[3] == played[0]
    fixed = workload_of(replay, output=Lengths(mean=7))
    assert [o for _, o, _ in islice(shapes(fixed, Streams.of(0)), 8)] == [7] * 8
    assert next(shapes(fixed, Streams.of(0)))[2] == played[0][2]
