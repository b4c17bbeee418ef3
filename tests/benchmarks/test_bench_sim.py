"""Speed of the simulator, relative to what SimPy itself does in the same process.

Where the time goes: a request costs up to three windows of like steps (the one it ends by arriving, its prompt step,
the one it ends by finishing). At short outputs windows are shared (1.5 a request at 50 % load and 128 tokens, 0.7 at 90
%), at long ones they are not (2.7 and 2.4 at 1024 tokens, at most 3). Plain ones are done in one loop
(`sim/plain_run`): 34 and 30 Python calls a request at 50 and 90 % load with 128 tokens, 39 and 37 with 1024 (51 and 39,
68 and 64 where every window passes the whole scheduler). A window begins where the one before ended and its batch is
another, so none can be left out or computed beside others: the CPU time of a request of 1024 tokens stays above that of
one of 128, 1.5 times at 50 and 1.8 times at 90 % load (`test_cost_of_8_times_longer_outputs` prints it).

Ratio = requests simulated per second / raw SimPy timeouts per second; the goal is 0.03. Both sides are the best of
several runs, so that other work on the machine disturbs neither. Run with
``pytest -s -m slow tests/benchmarks/test_bench_sim.py``; ratios are printed and stand in ``extra_info`` of
``--benchmark-json``.
"""

import resource
import sys
import time

import numpy as np
import pytest
import simpy

from simmoe.engine.step import StepTable
from simmoe.sim.cluster import simulate
from simmoe.specs.deployment import Deployment
from simmoe.specs.workload import Lengths, Workload

REQUESTS = 5000
DEPLOYMENT = Deployment()
CAPACITY = 100.0
"""Requests of 512 + 128 tokens per second that the table below sustains at 256 in flight."""


def table() -> StepTable:
    """Step times of the size of a small MoE model on one H100; made up, only their size matters here."""
    tokens, requests = DEPLOYMENT.max_num_batched_tokens, DEPLOYMENT.max_num_seqs
    t = np.arange(tokens + 1)
    return StepTable(
        token_s=4e-3 + 8e-6 * t + 3e-3 * (1 - np.exp(-t / 30)),
        head_s=np.linspace(1e-4, 4e-3, tokens + requests + 1),
        decode_base_s=1e-4 + 1e-6 * np.arange(requests + 1),
        decode_per_context_s=np.full(requests + 1, 1.3e-8),
        prefill_base_s=1e-5,
        prefill_per_token_s=1e-7,
        prefill_per_pair_s=2e-10,
    )


def raw_timeouts_per_s(count: int = 100_000) -> float:
    """What SimPy alone can do: one process, one timeout after another."""

    def process(env):
        for _ in range(count):
            yield env.timeout(1.0)

    best = np.inf
    for _ in range(5):
        env = simpy.Environment()
        env.process(process(env))
        start = time.perf_counter()
        env.run()
        best = min(best, time.perf_counter() - start)
    return count / best


LOADS = {
    "poisson_50_percent": ({"rate": 0.5 * CAPACITY}, 128),
    "poisson_90_percent": ({"rate": 0.9 * CAPACITY}, 128),
    "closed_loop_256": ({"concurrency": 256}, 128),
    "poisson_same_concurrency_8_times_longer": ({"rate": 0.5 * CAPACITY / 8 * 1.2}, 1024),
    "poisson_90_percent_8_times_longer": ({"rate": 0.9 * CAPACITY / 8 * 1.2}, 1024),
    "closed_loop_256_8_times_longer": ({"concurrency": 256}, 1024),
}
LONGER = {
    "poisson_50_percent": "poisson_same_concurrency_8_times_longer",
    "poisson_90_percent": "poisson_90_percent_8_times_longer",
    "closed_loop_256": "closed_loop_256_8_times_longer",
}


def play(name, requests):
    loop, output = LOADS[name]
    workload = Workload(input=Lengths(mean=512), output=Lengths(mean=output), **loop)
    return simulate(table(), workload, DEPLOYMENT, 10**6, requests=requests)


@pytest.mark.slow
@pytest.mark.parametrize("name", LONGER)
def test_cost_of_8_times_longer_outputs(name):
    """CPU time a request, the least of several runs of each kind, one after the other so that both meet the same."""
    seconds = {name: [], LONGER[name]: []}
    for _ in range(7):
        for load, spent in seconds.items():
            start = time.process_time()
            play(load, REQUESTS)
            spent.append(time.process_time() - start)
    short, long = (min(spent) / REQUESTS * 1e6 for spent in seconds.values())
    print(f"\n{name}: {short:.1f} us a request, {long:.1f} with 8 times longer outputs, {long / short:.2f}x")  # noqa: T201
    assert long / short < 2.0


def calls_per_request(name):
    """Python calls a request takes, the same on any machine; what a run takes whatever its length is left out."""
    count = 0

    def look(_frame, event, _arg):
        nonlocal count
        count += event == "call"

    few, many = 500, 2000
    play(name, few)  # what is looked up once
    totals = []
    for n in (few, many):
        count = 0
        sys.setprofile(look)
        try:
            play(name, n)
        finally:
            sys.setprofile(None)
        totals.append(count)
    return (totals[1] - totals[0]) / (many - few)


@pytest.mark.parametrize("name", ["poisson_50_percent", "poisson_90_percent"])
def test_longer_outputs_take_few_more_calls_a_request(name):
    """Windows of like steps are done in one loop, whose only calls are the log's and the cut's."""
    short, long = calls_per_request(name), calls_per_request(LONGER[name])
    print(f"\n{name}: {short:.1f} calls a request, with 8 times longer outputs {long:.1f}")  # noqa: T201
    assert long < 1.3 * short
    assert long < 45


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADS)
def test_requests_per_simpy_timeout(benchmark, name):
    loop, output = LOADS[name]
    workload = Workload(input=Lengths(mean=512), output=Lengths(mean=output), **loop)
    steps = table()

    def run():
        return simulate(steps, workload, DEPLOYMENT, 10**6, requests=REQUESTS)

    result = benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    ratio = REQUESTS / benchmark.stats.stats.min / raw_timeouts_per_s()
    benchmark.extra_info["ratio"] = round(ratio, 4)
    benchmark.extra_info["events_per_request"] = round(result.events / REQUESTS, 2)
    print(f"\n{name}: ratio {ratio:.4f}, {result.events / REQUESTS:.2f} events per request")  # noqa: T201
    # long Poisson outputs share fewer steps between requests; windows per request stay bounded, below
    assert ratio > (0.01 if output > 128 else 0.03)


@pytest.mark.parametrize("load", [0.25, 0.5])
def test_events_per_request_do_not_grow_with_output_length(load):
    """At most an arrival, the window it ends, a prompt step and a window to a completion: four events a request.

    Shorter outputs at the same load come closer together and share steps, so that they need fewer.
    """
    events = []
    for output in (128, 1024, 4096):
        workload = Workload(rate=load * CAPACITY * 128 / output, input=Lengths(mean=512), output=Lengths(mean=output))
        result = simulate(table(), workload, DEPLOYMENT, 10**7, requests=1000)
        events.append(result.events / 1000)
    assert max(events) < 4.3


@pytest.mark.slow
def test_a_million_requests_within_90_s_and_a_gigabyte():
    workload = Workload(rate=0.5 * CAPACITY, input=Lengths(mean=512), output=Lengths(mean=128))
    start = time.perf_counter()
    simulate(table(), workload, DEPLOYMENT, 10**6, requests=10**6)
    assert time.perf_counter() - start < 90
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 1e6  # KiB
