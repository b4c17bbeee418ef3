"""Speed of the simulator, relative to what SimPy itself does in the same process.

Where the time goes: a request costs up to three windows (the one it ends by arriving, its prompt step, the one it ends
by finishing) and an arrival; at short outputs steps are so close to arrivals that windows are shared (1.5 a request at
50 % load and 128 tokens), at long ones they are not (2.7 at 1024 tokens, at most 3). A window is some
twenty small calls, none of which stands out: planning and accounting in `scheduler` take a third of the time, `replica`
and `cluster` a third, blocks, step times, policies and the log the rest; SimPy none with one replica. A request of 1024
tokens takes 1.5 times as long as one of 128 at the same concurrency: a window begins where the one before ended, so
windows of one run cannot be computed together.

Ratio = requests simulated per second / raw SimPy timeouts per second; the goal is 0.03. Both sides are the best of
several runs, so that other work on the machine disturbs neither. Run with
``pytest -s -m slow tests/benchmarks/test_bench_sim.py``; ratios are printed and stand in ``extra_info`` of
``--benchmark-json``.
"""

import resource
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
    "closed_loop_256_8_times_longer": ({"concurrency": 256}, 1024),
}


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
