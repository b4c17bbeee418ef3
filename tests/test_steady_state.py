"""The closed-form steady state against tables whose answer follows by hand, and against queueing laws."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simmoe.api import simulate
from simmoe.engine.step import StepTable
from simmoe.errors import CapacityError, SaturationError
from simmoe.predict import predict
from simmoe.sim.cluster import simulate as play
from simmoe.specs.deployment import Deployment
from simmoe.specs.load import load_hardware, load_model
from simmoe.specs.workload import Lengths, Workload
from simmoe.steady.load_curve import load_curve, saturation_requests_per_s
from simmoe.steady.state import steady_state, steady_states

PLENTY = 10_000_000.0
"""A KV cache that never binds. [tokens]"""
few = settings(max_examples=60, deadline=None)


def table(step_s=0.01, per_token_s=0.0, per_context_s=0.0, slots=256, budget=8192):
    """Step time: a constant, a part per new token, a part per token of context."""
    tokens = np.arange(budget + 1)
    token_s = step_s + per_token_s * tokens
    token_s[0] = 0.0
    return StepTable(
        token_s=token_s,
        head_s=np.zeros(slots + budget + 1),
        decode_base_s=np.zeros(slots + 1),
        decode_per_context_s=np.full(slots + 1, per_context_s),
        prefill_base_s=0.0,
        prefill_per_token_s=0.0,
        prefill_per_pair_s=0.0,
    )


def work(input_tokens=100, output_tokens=50, **loop):
    return Workload(input=Lengths(mean=input_tokens), output=Lengths(mean=output_tokens), **loop)


def solve(steps, workload, kv_tokens=PLENTY, **limits):
    deployment = Deployment(**limits)
    curve = load_curve(steps, deployment, workload, kv_tokens)
    return steady_state(curve, deployment, workload, kv_tokens)


# ---- closed loop, by hand ---------------------------------------------------------------------------------------


@few
@given(st.integers(1, 256), st.integers(2, 500), st.floats(1e-4, 1.0))
def test_constant_steps_give_clients_over_output_length_times_step(clients, output, step_s):
    """Each request needs `output` steps, whoever else is there: X = N / (O t)."""
    metrics, bound = solve(table(step_s), work(20, output, concurrency=clients))
    assert metrics.requests_per_s == pytest.approx(clients / (output * step_s), rel=0.01)
    assert metrics.tpot.mean == pytest.approx(step_s, rel=1e-6)
    assert metrics.e2e.mean == pytest.approx(output * step_s, rel=0.01)
    assert metrics.mean_running == pytest.approx(clients, rel=1e-12)  # X times the time in the engine
    assert metrics.mean_waiting == 0
    assert bound == "concurrency"


@few
@given(st.floats(1e-6, 1e-3), st.integers(2, 400), st.integers(1, 2000), st.booleans())
def test_linear_steps_are_shared_by_every_token_of_a_request(per_token_s, output, prompt, closed):
    """With t = a + b tokens a step that carries r requests' share takes a + b r (I + O - 1), so X = r / t."""
    a, b = 0.01, per_token_s
    loop = {"concurrency": 1} if closed else {"rate": 1.0}
    curve = load_curve(table(a, b), Deployment(), work(prompt, output, **loop), PLENTY)
    inner = slice(0, -1)  # the last point is put where the slots end, between two of the others
    busy = curve.decoding[inner] > 1
    r = curve.decoding[inner][busy] / (output - 1)
    expected = r / (a + b * r * (prompt + output - 1))
    assert curve.requests_per_s[inner][busy] == pytest.approx(expected, rel=1e-4)


def test_one_client_waits_for_its_own_steps_alone():
    """One prefill of 100 tokens, then 49 decode steps at context 101..149."""
    a, b, c = 0.01, 1e-5, 1e-6
    metrics, _ = solve(table(a, b, c), work(100, 50, concurrency=1))
    by_hand = (a + 100 * b) + sum(a + b + c * (100 + i) for i in range(1, 50))
    assert metrics.e2e.mean == pytest.approx(by_hand, rel=0.01)
    assert metrics.output_tokens_per_s == pytest.approx(50 / by_hand, rel=0.01)
    # the closed form lets the prompt's step carry the mean number decoding, here the request itself: 1 % too long
    assert metrics.ttft.mean == pytest.approx(a + 100 * b, rel=0.02)


def test_a_prompt_longer_than_the_budget_takes_several_steps():
    metrics, _ = solve(table(0.01, budget=1024), work(4000, 2, concurrency=1), max_num_batched_tokens=1024)
    assert metrics.ttft.mean == pytest.approx(4 * 0.01, rel=0.01)


def test_a_single_output_token_needs_no_decoding():
    metrics, _ = solve(table(0.01, 1e-5), work(100, 1, concurrency=1))
    assert metrics.requests_per_s == pytest.approx(1 / (0.01 + 100 * 1e-5), rel=0.01)


def test_clients_beyond_the_slots_wait_and_change_no_throughput():
    limits = {"max_num_seqs": 16}
    full, _ = solve(table(slots=16), work(concurrency=16), **limits)
    over, bound = solve(table(slots=16), work(concurrency=64), **limits)
    assert over.requests_per_s == pytest.approx(full.requests_per_s, rel=0.01)
    assert over.mean_waiting == pytest.approx(48, rel=0.02)
    assert over.ttft.mean > 3 * full.e2e.mean * 0.95
    assert bound == "max_num_seqs"


def test_the_kv_cache_limits_how_many_run():
    kv = 10 * (100 + 25 + 8)  # ten requests, half a block of 16 lost each, but for half of the next prompt
    metrics, bound = solve(table(), work(concurrency=64), kv_tokens=kv)
    assert metrics.mean_running == pytest.approx(10 - 50 / 133, rel=0.01)
    played = play(table(), work(concurrency=64), Deployment(), kv, requests=3000).metrics
    assert metrics.mean_running == pytest.approx(played.mean_running, rel=0.02)
    assert bound == "KV cache"
    assert 0.9 < metrics.kv_utilisation <= 1


def test_one_request_larger_than_the_kv_cache_is_refused():
    with pytest.raises(CapacityError, match=r"one request of 100 \+ 50 tokens"):
        solve(table(), work(concurrency=1), kv_tokens=149)


def test_replicas_share_the_clients():
    one, _ = solve(table(1e-2, 1e-5), work(concurrency=32))
    four, _ = solve(table(1e-2, 1e-5), work(concurrency=128), gpus=4, tp=1)
    assert four.requests_per_s == pytest.approx(4 * one.requests_per_s, rel=1e-9)
    assert four.e2e.mean == pytest.approx(one.e2e.mean, rel=1e-9)
    assert four.mean_running == pytest.approx(128)


# ---- laws -------------------------------------------------------------------------------------------------------

loads = st.tuples(st.floats(1e-3, 1e-1), st.floats(1e-7, 1e-4), st.integers(1, 3000), st.integers(2, 800))


@few
@given(loads, st.integers(1, 1000))
def test_little_holds_in_a_closed_loop(load, clients):
    step_s, per_token_s, prompt, output = load
    metrics, _ = solve(table(step_s, per_token_s), work(prompt, output, concurrency=clients))
    assert metrics.mean_running + metrics.mean_waiting == pytest.approx(clients)
    assert metrics.requests_per_s * metrics.e2e.mean == pytest.approx(clients, rel=0.02)


@few
@given(loads, st.floats(0.05, 0.9))
def test_little_holds_in_an_open_loop(load, share):
    step_s, per_token_s, prompt, output = load
    steps = table(step_s, per_token_s)
    capacity = saturation_requests_per_s(load_curve(steps, Deployment(), work(prompt, output, rate=1.0), PLENTY))
    metrics, _ = solve(steps, work(prompt, output, rate=share * capacity))
    in_system = metrics.mean_running + metrics.mean_waiting
    assert metrics.requests_per_s == pytest.approx(share * capacity)
    # the birth-death chain and the latencies are approximated apart: they may differ where few requests are held
    slack = 0.05 * in_system + metrics.requests_per_s * metrics.mean_step_s
    assert abs(metrics.requests_per_s * metrics.e2e.mean - in_system) < slack


@few
@given(loads, st.integers(1, 300), st.sampled_from(["fixed", "lognormal"]))
def test_more_clients_never_lower_throughput_or_raise_speed_per_user(load, clients, kind):
    """Equal answers come round together: a prompt that just does not fit costs the whole round one step more.

    Simulated, too: DeepSeek-V2-Lite on an H100 under vLLM, 191 tokens in and 2 out: 327, 310 and 350 requests/s with
    42, 43 and 45 clients.
    """
    step_s, per_token_s, prompt, output = load
    steps = table(step_s, per_token_s, 1e-9)
    lengths = [Lengths(kind=kind, mean=mean, cv=0.5 if kind == "lognormal" else 0.0) for mean in (prompt, output)]
    fewer, more = (
        solve(steps, Workload(input=lengths[0], output=lengths[1], concurrency=n))[0] for n in (clients, clients + 1)
    )
    one_step = fewer.mean_step_s * fewer.requests_per_s / clients if kind == "fixed" else 1e-6  # share of a round
    assert more.requests_per_s >= fewer.requests_per_s / (1 + one_step)
    assert more.tpot.mean >= fewer.tpot.mean * (1 - 1e-3)


@few
@given(loads, st.floats(0.05, 0.9), st.floats(0.1, 10))
def test_scaling_time_scales_every_latency_and_rate(load, share, factor):
    step_s, per_token_s, prompt, output = load
    steps, slow = table(step_s, per_token_s), table(factor * step_s, factor * per_token_s)
    capacity = saturation_requests_per_s(load_curve(steps, Deployment(), work(prompt, output, rate=1.0), PLENTY))
    rate = share * capacity
    before, _ = solve(steps, work(prompt, output, rate=rate))
    after, _ = solve(slow, work(prompt, output, rate=rate / factor))
    assert after.mean_running == pytest.approx(before.mean_running, rel=1e-6)
    for name in ("ttft", "tpot", "itl", "e2e"):
        one, other = getattr(before, name), getattr(after, name)
        assert (other.mean, other.p99) == pytest.approx((factor * one.mean, factor * one.p99), rel=1e-6), name


@few
@given(loads, st.floats(0.05, 0.95))
def test_quantiles_are_in_order(load, share):
    step_s, per_token_s, prompt, output = load
    steps = table(step_s, per_token_s)
    capacity = saturation_requests_per_s(load_curve(steps, Deployment(), work(prompt, output, rate=1.0), PLENTY))
    metrics, _ = solve(steps, work(prompt, output, rate=share * capacity))
    for q in (metrics.ttft, metrics.tpot, metrics.itl, metrics.e2e):
        assert 0 < q.p50 <= q.p90 <= q.p99


# ---- saturation -------------------------------------------------------------------------------------------------


def test_constant_steps_saturate_when_every_slot_is_busy():
    """256 slots, 50 steps of 10 ms a request: 512 requests/s."""
    curve = load_curve(table(0.01), Deployment(), work(10, 50, rate=1.0), PLENTY)
    assert saturation_requests_per_s(curve) == pytest.approx(256 / (50 * 0.01), rel=0.02)
    assert curve.limit == "max_num_seqs"


def test_long_prompts_saturate_the_token_budget():
    """A request brings 4000 + 1 tokens, a step takes 1024: 0.256 requests a step."""
    deployment = Deployment(max_num_batched_tokens=1024)
    curve = load_curve(table(0.01, budget=1024), deployment, work(4000, 2, rate=1.0), PLENTY)
    assert saturation_requests_per_s(curve) == pytest.approx(1024 / 4001 / 0.01, rel=0.02)
    assert curve.limit == "token budget"


def test_offering_more_than_capacity_names_the_capacity_and_what_to_do():
    with pytest.raises(SaturationError, match=r"1000 requests/s saturate .* carries 5\d\d.* lower --rate"):
        solve(table(0.01), work(10, 50, rate=1000.0))


def test_near_saturation_waiting_grows_without_bound():
    capacity = saturation_requests_per_s(load_curve(table(0.01), Deployment(), work(10, 50, rate=1.0), PLENTY))
    waits = [solve(table(0.01), work(10, 50, rate=f * capacity))[0].mean_waiting for f in (0.5, 0.95, 0.99, 0.999)]
    assert waits[0] < 0.5 * capacity * 0.01  # nobody waits for longer than the running step of 10 ms
    assert waits[1] < waits[2] < waits[3]
    assert waits[3] > 100


@few
@given(st.integers(1, 2000), st.integers(1, 300), st.lists(st.floats(1e-6, 0.999), min_size=1, max_size=5))
def test_rates_solved_together_are_as_rates_solved_one_by_one(prompt, output, shares):
    steps, deployment = table(0.01, 1e-5, 1e-9), Deployment(gpus=2)
    workload = work(prompt, output, rate=1.0)
    curve = load_curve(steps, deployment, workload, PLENTY)
    rates = np.array(shares) * saturation_requests_per_s(curve) * deployment.replicas
    together = steady_states(curve, deployment, workload, PLENTY, rates)
    for rate, (metrics, bound) in zip(rates.tolist(), together, strict=True):
        alone, alone_bound = steady_state(curve, deployment, workload.vary(rate=rate), PLENTY)
        assert bound == alone_bound
        assert metrics.output_tokens_per_s == pytest.approx(rate * output)
        for latency in ("ttft", "tpot", "itl", "e2e"):
            one, other = getattr(metrics, latency), getattr(alone, latency)
            assert (one.mean, one.p50, one.p99) == pytest.approx((other.mean, other.p50, other.p99), rel=1e-9)


def test_an_almost_idle_replica_serves_as_if_alone():
    alone, _ = solve(table(0.01, 1e-5), work(concurrency=1))
    idle, _ = solve(table(0.01, 1e-5), work(rate=1e-3))
    assert idle.tpot.mean == pytest.approx(alone.tpot.mean, rel=0.01)
    assert idle.ttft.mean == pytest.approx(alone.ttft.mean, rel=0.01)
    assert idle.utilisation == pytest.approx(1e-3 * alone.e2e.mean, rel=0.05)


def test_time_to_first_token_does_not_fall_where_clients_begin_to_queue():
    """82 requests fill this cache; a prompt met what the step decided ahead holds, then suddenly not: -36 %."""
    h20, v3, deployment = load_hardware("h20"), load_model("deepseek-v3"), Deployment(gpus=8)
    shape = {"input": Lengths(mean=512), "output": Lengths(mean=128)}
    ttft = [predict(h20, v3, deployment, Workload(concurrency=c, **shape)).metrics.ttft.mean for c in range(76, 92, 2)]
    assert all(later > 0.99 * before for before, later in itertools.pairwise(ttft))


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_prompts_longer_than_a_rank_computes_in_a_step_go_piece_by_piece_as_simulated(engine):
    """16 ranks of 8192 tokens a step, prompts of 32,768: each is one rank's for four steps, beside those of others.

    Taken for one step that waits for the whole prompt on one rank, the answer was less than half of this.
    """
    deployment = Deployment(gpus=16, tp=1, dp=16, ep=16, engine=engine)
    load = Workload(concurrency=32, input=Lengths(mean=32768), output=Lengths(mean=128))
    told = predict(load_hardware("h200"), load_model("deepseek-v3"), deployment, load).metrics
    played = simulate(load_hardware("h200"), load_model("deepseek-v3"), deployment, load, requests=256).metrics
    assert told.output_tokens_per_s == pytest.approx(played.output_tokens_per_s, rel=0.1)
    assert told.ttft.mean == pytest.approx(played.ttft.mean, rel=0.2)


@pytest.mark.parametrize("prompt", [8192, 9000, 30000])
@pytest.mark.parametrize("engine", ["vllm", "trtllm", "sglang"])
def test_one_client_does_not_meet_its_own_prompt(engine, prompt):
    """A prompt of one to four steps (8192 tokens) and 50 tokens: decodes were told up to 41 % slow."""
    deployment, load = Deployment(engine=engine), Workload(
        concurrency=1, input=Lengths(mean=prompt), output=Lengths(mean=50)
    )  # fmt: skip
    h100, lite = load_hardware("h100"), load_model("deepseek-v2-lite")
    told = predict(h100, lite, deployment, load).metrics
    played = simulate(h100, lite, deployment, load, requests=20).metrics
    assert told.tpot.mean == pytest.approx(played.tpot.mean, rel=0.02)
    assert told.ttft.mean == pytest.approx(played.ttft.mean, rel=0.05)


def test_clients_that_think_do_not_come_back_together():
    """64 clients that think for 30 s keep an H100 5 % busy; read as one cohort they waited for all prompts."""
    load = Workload(concurrency=64, think_time=30.0, input=Lengths(mean=1024), output=Lengths(mean=256))
    h100, lite = load_hardware("h100"), load_model("deepseek-v2-lite")
    told = predict(h100, lite, Deployment(), load).metrics
    played = simulate(h100, lite, Deployment(), load, requests=1000).metrics
    assert told.ttft.mean == pytest.approx(played.ttft.mean, rel=0.4)


def test_cohorts_of_equal_answers_wait_for_each_other_as_simulated():
    """A pause of the front end brings cohorts of equal answers back nearly as one."""
    load = Workload(concurrency=128, input=Lengths(mean=6000), output=Lengths(mean=300))
    h100, qwen = load_hardware("h100"), load_model("qwen3-30b-a3b")
    told = predict(h100, qwen, Deployment(gpus=2), load).metrics
    played = simulate(h100, qwen, Deployment(gpus=2), load, requests=1500).metrics
    assert told.ttft.mean == pytest.approx(played.ttft.mean, rel=0.33)
    assert told.tpot.mean == pytest.approx(played.tpot.mean, rel=0.05)
