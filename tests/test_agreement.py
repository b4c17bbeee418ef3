"""Closed form and simulation agree below 80 % load, over scenarios drawn at random, for every engine's policy.

Where they differ: data-parallel ranks that hold few requests each wait for one another in more ways than the closed
form counts. Then believe the simulation.
"""

import numpy as np
import pytest

from simmoe.errors import CapacityError, SpecError
from simmoe.predict import compiled_for
from simmoe.sim.cluster import simulate
from simmoe.specs.deployment import Deployment
from simmoe.specs.load import load_hardware, load_model
from simmoe.specs.workload import Lengths, Workload
from simmoe.steady.load_curve import load_curve, saturation_requests_per_s
from simmoe.steady.state import steady_state

MODELS = ("deepseek-v2-lite", "qwen3-30b-a3b", "mixtral-8x7b", "olmoe-1b-7b", "deepseek-v3")
DEVICES = ("h100", "h200", "l40s", "a100")
LAYOUTS = (
    {"tp": 1},
    {"tp": 2},
    {"tp": 4},
    {"tp": 8},
    {"tp": 4, "ep": 4},
    {"tp": 1, "dp": 4, "ep": 4},
    {"tp": 2, "dp": 8, "ep": 16},
)


def scenario(seed, engines=("vllm", "generic"), kind="lognormal"):
    """(predicted, simulated, what) of a random scenario below 80 % load; None where it does not fit.

    Predicted and simulated are output tokens/s, mean TTFT and mean TPOT.
    """
    draw = np.random.default_rng(seed)
    model, hardware = load_model(str(draw.choice(MODELS))), load_hardware(str(draw.choice(DEVICES)))
    sizes = LAYOUTS[draw.integers(len(LAYOUTS))]
    deployment = Deployment(gpus=sizes["tp"] * sizes.get("dp", 1), engine=str(draw.choice(engines)), **sizes)
    lengths = {
        name: Lengths(kind=kind, mean=float(draw.integers(*between)), cv=0.5 if kind == "lognormal" else 0.0)
        for name, between in (("input", (128, 3000)), ("output", (32, 600)))
    }
    share, open_loop = draw.uniform(0.1, 0.8), bool(draw.integers(2))
    workload = Workload(rate=1.0, **lengths)
    try:
        parts = compiled_for(hardware, model, deployment, workload)
        curve = load_curve(parts.table, deployment, workload, parts.memory.kv_tokens)
    except (CapacityError, SpecError):
        return None
    rate = share * saturation_requests_per_s(curve)
    if open_loop:
        workload = workload.vary(rate=rate)
    else:
        in_flight = float(np.interp(rate, curve.requests_per_s[: curve.peak + 1], curve.in_flight[: curve.peak + 1]))
        workload = workload.vary(rate=None, concurrency=max(1, round(in_flight)))
        curve = load_curve(parts.table, deployment, workload, parts.memory.kv_tokens)
    metrics, _ = steady_state(curve, deployment, workload, parts.memory.kv_tokens)
    # long enough for chance in arrivals to stay near 2 %, and filling the deployment at the start not to count
    requests = max(4000, round(12 * metrics.mean_running))
    run = simulate(parts.table, workload, deployment, parts.memory.kv_tokens, requests=requests, seed=seed)
    # the lengths drawn differ a little from their mean
    drawn = float(run.requests.output_tokens[:requests].mean()) / workload.output.mean if open_loop else 1.0
    return (
        np.array([metrics.output_tokens_per_s * drawn, metrics.ttft.mean, metrics.tpot.mean]),
        np.array([run.metrics.output_tokens_per_s, run.metrics.ttft.mean, run.metrics.tpot.mean]),
        f"{model.name} {hardware.name} {deployment.engine} {sizes} {workload.rate or workload.concurrency}",
    )


def compared(seeds, **kinds):
    """What differs, and errors of output tokens/s, mean TTFT and mean TPOT, shape (scenarios, 3)."""
    found = [each for seed in seeds if (each := scenario(seed, **kinds)) is not None]
    return [what for *_, what in found], np.array([predicted / simulated - 1 for predicted, simulated, _ in found])


def test_closed_form_and_simulation_agree_below_80_percent_load():
    errors = np.sort(abs(compared(range(16))[1][:, 0]))
    assert errors[-2] <= 0.05
    assert errors[-1] <= 0.12


@pytest.mark.parametrize("kind", ["lognormal", "fixed"])
def test_closed_form_and_simulation_agree_where_decodes_wait_for_prompts(kind):
    """SGLang's policy, many in flight among them: throughput, mean TTFT and mean TPOT."""
    what, errors = compared(range(1000, 1012), engines=("sglang",), kind=kind)
    assert len(what) >= 8
    assert (abs(errors).mean(axis=0) <= [0.02, 0.05, 0.03]).all(), errors
    assert (abs(errors[:, 0]) <= 0.05).all(), what


LONG = {"kind": "lognormal", "cv": 1.0}
#: Engine, model, GPUs, prompt and output lengths, share of saturation: open loops whose tails differ for reasons of
#: their own: lengths that vary, prompts that queue behind each other, decodes that wait for prompts, few requests.
OPEN = {
    "lognormal": ("vllm", "olmoe-1b-7b", 1, Lengths(mean=1500, **LONG), Lengths(mean=150, **LONG), 0.5),
    "uniform": ("trtllm", "qwen3-30b-a3b", 2, Lengths(kind="uniform", low=200, high=3000), Lengths(mean=120), 0.6),
    "long prompts": ("vllm", "deepseek-v2-lite", 1, Lengths(mean=6000), Lengths(mean=100), 0.85),
    "prompts of many steps": (
        "vllm",
        "mixtral-8x7b",
        4,
        Lengths(kind="lognormal", mean=12000, cv=0.5),
        Lengths(mean=60),
        0.4,
    ),
    "prompts first": ("sglang", "olmoe-1b-7b", 2, Lengths(mean=2700, **LONG), Lengths(mean=120), 0.3),
    "long prompts first": ("sglang", "deepseek-v2-lite", 1, Lengths(mean=8000), Lengths(mean=64), 0.6),
    "seldom": ("sglang", "deepseek-v2-lite", 1, Lengths(mean=20000), Lengths(mean=64), 0.002),
}


@pytest.mark.parametrize("case", OPEN)
def test_tails_of_open_loops_agree(case):
    """Told by Poisson arrivals at one mean number and every length at its mean, p99 was 30 to 75 % low here."""
    engine, name, gpus, prompts, outputs, share = OPEN[case]
    model, hardware = load_model(name), load_hardware("h100")
    deployment = Deployment(gpus=gpus, tp=gpus, engine=engine)
    workload = Workload(rate=1.0, input=prompts, output=outputs)
    parts = compiled_for(hardware, model, deployment, workload)
    curve = load_curve(parts.table, deployment, workload, parts.memory.kv_tokens)
    workload = workload.vary(rate=share * saturation_requests_per_s(curve))
    told, _ = steady_state(curve, deployment, workload, parts.memory.kv_tokens)
    run = simulate(parts.table, workload, deployment, parts.memory.kv_tokens, requests=10_000, seed=3).metrics

    figures = [(metric, statistic) for metric in ("ttft", "tpot", "itl", "e2e") for statistic in ("mean", "p99")]
    off = {key: getattr(getattr(told, key[0]), key[1]) / getattr(getattr(run, key[0]), key[1]) - 1 for key in figures}
    # a p99 of one run is itself sure to some 10 % only where prompts queue
    limits = {"mean": 0.02, "p99": 0.02} if case == "seldom" else {"mean": 0.18, "p99": 0.37}
    if case == "long prompts first":  # one or two of a hundred gaps are long, by more than the chain's decodes explain
        assert abs(off.pop(("itl", "p99"))) <= 0.6
    assert all(abs(error) <= limits[statistic] for (_, statistic), error in off.items()), off


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engines", "share"),
    # prompts first: a burst of arrivals holds all decodes up, which a mean state near 80 % load tells less well
    [(("vllm", "generic"), 0.97), (("sglang",), 0.95), (("trtllm",), 0.97)],
    ids=["vllm", "sglang", "trtllm"],
)
def test_closed_form_and_simulation_agree_over_a_hundred_scenarios(engines, share):
    what, errors = compared(range(1000, 1200), engines=engines)
    what, errors = what[:100], errors[:100]
    assert len(errors) == 100
    throughput = errors[:, 0]
    worst = sorted(zip(abs(throughput), what, strict=True), reverse=True)[:5]
    assert (abs(throughput) <= 0.05).mean() >= share, worst
    assert abs(throughput.mean()) < 0.02
    assert (np.median(abs(errors[:, 1:]), axis=0) <= [0.06, 0.03]).all(), np.median(abs(errors), axis=0)
