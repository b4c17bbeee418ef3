"""Speed of screening: predictions per second on one core over a grid of layouts x loads of DeepSeek-V3.

A prediction is the full set of serving metrics of one layout at one load; a layout's loads are solved together, as
`simmoe.planning.screen` does. Warm: the layouts' step tables are compiled,
as in a plan's second question; cold: compiling them counts. Goal: 2000 a second warm. Seconds differ from machine to
machine, so nothing is asserted on them; the figures and the ratio to a fixed numpy workload are in ``extra_info``.
Run with ``pytest -s -m slow tests/benchmarks/test_bench_screen.py``.
"""

import time

import numpy as np
import pytest

from simmoe import predict
from simmoe.planning.layouts import layouts
from simmoe.planning.screen import LOADS
from simmoe.specs.deployment import Deployment
from simmoe.specs.load import load_hardware, load_model
from simmoe.specs.workload import Lengths, Workload
from simmoe.steady.load_curve import load_curve, saturation_requests_per_s
from simmoe.steady.state import steady_states

GOAL_PER_S = 2000
V3 = load_model("deepseek-v3")
OFFERS = [load_hardware(name) for name in ("h100", "h200", "h20")]
TRAFFIC = Workload(rate=1.0, input=Lengths(mean=2000), output=Lengths(mean=500))


def grid_of_layouts():
    return [
        (hardware, replica)
        for hardware in OFFERS
        for replica in layouts(hardware, V3, Deployment(), context_tokens=2500)[0]
    ]


def screen_all(chosen):
    """Metrics of every layout at every load; how many there are."""
    count = 0
    for hardware, replica in chosen:
        parts = predict.compiled_for(hardware, V3, replica, TRAFFIC)
        curve = load_curve(parts.table, replica, TRAFFIC, parts.memory.kv_tokens)
        rates = LOADS * saturation_requests_per_s(curve)
        found = steady_states(curve, replica, TRAFFIC, parts.memory.kv_tokens, rates)
        count += sum(metrics.output_tokens_per_s > 0 for metrics, _ in found)
    return count


def fixed_work():
    values = np.random.default_rng(0).random(100_000)
    return np.exp(np.sort(values)).sum()


@pytest.mark.slow
def test_screening_layouts_and_loads(benchmark):
    chosen = grid_of_layouts()
    predict.compiled.cache_clear()
    start = time.perf_counter()
    count = screen_all(chosen)
    cold_s = time.perf_counter() - start
    assert count == len(chosen) * len(LOADS)
    cpu_s = []

    def timed():
        before = time.process_time()
        screen_all(chosen)
        cpu_s.append(time.process_time() - before)

    benchmark.pedantic(timed, rounds=5)
    start = time.perf_counter()
    for _ in range(20):
        fixed_work()
    fixed_s = (time.perf_counter() - start) / 20
    figures = {
        "warm_per_s": count / benchmark.stats.stats.min,
        "warm_per_cpu_s": count / min(cpu_s),
        "cold_per_s": count / cold_s,
        "goal_per_s": GOAL_PER_S,
        "ratio_to_fixed_work": benchmark.stats.stats.min / count / fixed_s,
    }
    benchmark.extra_info.update(layouts=len(chosen), loads=len(LOADS), **figures)
    told = ", ".join(f"{name} {value:,.4g}" for name, value in figures.items())
    print(f"\n{len(chosen)} layouts x {len(LOADS)} loads: {told}")  # noqa: T201
