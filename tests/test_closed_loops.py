"""Closed loops in closed form against the simulation: short answers, full KV caches, clients that come back late."""

import numpy as np
import pytest
from test_steady_state import table, work

from simmoe.api import simulate
from simmoe.predict import predict
from simmoe.specs.deployment import Deployment
from simmoe.specs.load import load_hardware, load_model
from simmoe.specs.workload import Lengths, Workload
from simmoe.steady.cohorts import round_of_cohorts
from simmoe.steady.kv_seats import kv_seats
from simmoe.steady.load_curve import load_curve, saturation_requests_per_s

H100, LITE = load_hardware("h100"), load_model("deepseek-v2-lite")


def lengths(mean, kind):
    half = {"low": mean // 2, "high": 2 * mean - mean // 2} if kind == "uniform" else {}
    return Lengths(kind=kind, mean=mean, cv=0.5 if kind == "lognormal" else 0.0, **half)


def loop(clients, prompt, output, kind="fixed", **more):
    return Workload(concurrency=clients, input=lengths(prompt, kind), output=lengths(output, kind), **more)


def compared(deployment, workload, requests):
    """Closed form over simulation: requests/s, mean TTFT and mean TPOT.

    Simulated requests/s by Little's law: requests that come in bunches are miscounted at the ends of a run.
    """
    told = predict(H100, LITE, deployment, workload).metrics
    played = simulate(H100, LITE, deployment, workload, requests=requests).metrics
    return np.array(
        [played.e2e.mean / told.e2e.mean, told.ttft.mean / played.ttft.mean, told.tpot.mean / played.tpot.mean]
    )


@pytest.mark.parametrize("engine", ["vllm", "trtllm"])
@pytest.mark.parametrize(
    ("clients", "prompt", "output"),
    [(8, 1024, 2), (32, 1024, 2), (128, 1024, 2), (128, 1024, 8), (128, 4096, 16), (32, 4096, 8), (128, 1024, 32)],
)
def test_short_equal_answers_come_round_as_simulated(engine, clients, prompt, output):
    """Answers of a few tokens end before all prompts are computed; TPOT was told up to 86 % short."""
    ratio = compared(Deployment(engine=engine), loop(clients, prompt, output), 6 * clients)
    assert (abs(ratio - 1) <= [0.02, 0.05, 0.03]).all(), ratio


def test_a_round_of_cohorts_by_hand():
    """4 prompts of 600 tokens, 2 a step beside decodes; steps of 10 ms and 0.1 ms a token, 5 decode steps, no pause.

    The first pair's prompts take step 1, the second's step 2. The first pair ends with step 6, its seats' next prompts
    take step 7, in which the second pair has its last token: everybody decodes once beside prompts and 4 times alone.
    """
    deployment = Deployment(max_num_batched_tokens=1202)
    load = load_curve(table(0.01, 1e-4, budget=1202), deployment, work(600, 6, concurrency=4), 1e7).load
    found = round_of_cohorts(load, work(600, 6, concurrency=4), 4.0, 0.0, 0.0, 0)
    mixed, decode = 0.01 + 1e-4 * 1202, 0.01 + 1e-4 * 4
    assert found.requests_per_s == pytest.approx(4 / (2 * mixed + 4 * decode), rel=2e-3)
    assert found.decodes_s == pytest.approx([mixed + 4 * decode] * 4, rel=2e-3)
    assert found.prefill_s[0] == pytest.approx(mixed, rel=2e-3)


def test_where_prompts_never_end_everybody_decodes_in_full_steps():
    """100 clients of 1000 tokens: ten full steps of prompts, and answers that end after three."""
    deployment = Deployment(max_num_batched_tokens=10_000)
    load = load_curve(table(0.01, 1e-4, budget=10_000), deployment, work(1000, 3, concurrency=100), 1e7).load
    found = round_of_cohorts(load, work(1000, 3, concurrency=100), 100.0, 0.0, 0.0, 1)
    full = 0.01 + 1e-4 * 10_000
    assert found.full
    assert found.requests_per_s == pytest.approx(10_000 / 1002 / full, rel=1e-3)
    assert found.decodes_s == pytest.approx(np.full(100, 2 * full), rel=1e-3)


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
@pytest.mark.parametrize(
    ("prompt", "output", "kind"), [(500, 500, "fixed"), (500, 500, "lognormal"), (100, 500, "lognormal")]
)
def test_a_short_kv_cache_carries_what_is_simulated(engine, prompt, output, kind):
    """64 clients, blocks for half of them: requests/s were told 2 to 81 % high."""
    deployment = Deployment(engine=engine, kv_blocks=int(0.5 * 64 * (prompt + output / 2) / 16))
    ratio = compared(deployment, loop(64, prompt, output, kind), 800)
    assert ratio[0] == pytest.approx(1, abs=0.06)
    assert ratio[2] == pytest.approx(1, abs=0.2)


def test_tensorrt_llm_seats_whole_requests_and_vllm_those_half_done():
    """1000 blocks of 16: a request of 500 + 500 has 63 at its end, 758 tokens half done; half a prompt is free."""
    shape = work(500, 500, concurrency=64)
    assert kv_seats("trtllm", shape, Deployment(), 16_000).most == 15
    assert kv_seats("vllm", shape, Deployment(), 16_000).most == pytest.approx(15_750 / 758)


@pytest.mark.parametrize(
    ("engine", "clients", "prompt", "output"),
    [("sglang", 48, 8000, 32), ("sglang", 100, 2500, 30), ("trtllm", 110, 1800, 36)],
)
def test_late_clients_make_prompts_and_decodes_take_turns_as_simulated(engine, clients, prompt, output):
    """A front end of 0.1 to 0.2 s, and more prompts than decodes: TTFT was told 40 to 70 % short."""
    ratio = compared(Deployment(engine=engine), loop(clients, prompt, output, "uniform"), 12 * clients)
    assert (abs(ratio - 1) <= [0.08, 0.2, 0.2]).all(), ratio


@pytest.mark.parametrize("think", ["fixed", "exponential"])
def test_short_pauses_leave_cohorts_together(think):
    load = loop(128, 2000, 200, think_time=0.1, think=think)
    ratio = compared(Deployment(), load, 800)
    assert (abs(ratio - 1) <= [0.03, 0.2, 0.05]).all(), ratio


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
def test_one_deployment_has_one_saturation(engine):
    """SGLang, 1024 in and 256 out, was told 27.4 requests/s by a closed loop of many clients, 23.9 by an open loop."""
    deployment = Deployment(engine=engine)
    open_loop = predict(H100, LITE, deployment, loop(1, 1024, 256).vary(concurrency=None, rate=1.0))
    closed = predict(H100, LITE, deployment, loop(1000, 1024, 256))
    saturation = open_loop.saturation_output_tokens_per_s
    assert closed.saturation_output_tokens_per_s == pytest.approx(saturation, rel=1e-6)
    assert closed.metrics.output_tokens_per_s == pytest.approx(saturation, rel=0.02)


def test_an_open_loop_of_equal_answers_saturates_with_its_seats_in_cohorts():
    deployment = Deployment(engine="sglang", max_num_seqs=64)
    curve = load_curve(table(0.01, 1e-4, slots=64), deployment, work(1000, 50, rate=1.0), 1e7)
    apart = load_curve(
        table(0.01, 1e-4, slots=64),
        deployment,
        Workload(rate=1.0, input=lengths(1000, "fixed"), output=lengths(50, "lognormal")),
        1e7,
    )
    assert saturation_requests_per_s(curve) > 1.02 * saturation_requests_per_s(apart)
