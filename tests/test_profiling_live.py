"""The live server: what it schedules, what it records, and that its traffic is the simulator's."""

from __future__ import annotations

import csv
import itertools
import math
import time

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from simmoe.errors import CalibrationError, CapacityError, SpecError  # noqa: E402
from simmoe.profiling.layers import MoE  # noqa: E402
from simmoe.profiling.live import LiveConfig, build, serve  # noqa: E402
from simmoe.profiling.overhead import overhead_of  # noqa: E402
from simmoe.profiling.served_model import LIVE_MODEL, ServedModel, draw  # noqa: E402
from simmoe.sim.arrivals import Streams, arrival_ticks, length_pairs  # noqa: E402
from simmoe.sim.ticks import S_PER_TICK  # noqa: E402
from simmoe.specs.workload import Lengths, Workload  # noqa: E402

TINY = LIVE_MODEL.vary(
    name="tiny",
    hidden=64,
    layers=2,
    vocab=64,
    moe_layers=1,
    dense_inter_size=32,
    experts=LIVE_MODEL.experts.vary(num_experts=8, top_k=4, inter_size=16, shared_inter_size=16),
)
CONFIG = LiveConfig(model=TINY, threads=1, max_num_seqs=4, max_num_batched_tokens=24, longest=48, seed=3)
LENGTHS = {"input": Lengths(kind="uniform", mean=20, low=10, high=30), "output": Lengths(mean=6)}


@pytest.fixture(scope="module")
def closed():
    return serve(CONFIG, Workload(concurrency=6, **LENGTHS), duration_s=1.0)


@pytest.fixture(scope="module")
def poisson():
    return serve(CONFIG, Workload(rate=40.0, **LENGTHS), duration_s=1.0)


def test_every_step_respects_the_limits_of_the_engine(closed):
    assert len(closed.steps) > 20
    for step in closed.steps:
        assert 0 < step.batch.rows() <= CONFIG.max_num_batched_tokens
        assert step.running <= CONFIG.max_num_seqs
        assert step.batch.decode_requests + len(step.batch.prefill_chunks) <= step.running
        assert 0 < step.model_s <= step.wall_s


def test_tokens_are_conserved_between_requests_and_steps(closed):
    finished = closed.requests.finished_s == closed.requests.finished_s
    begun = closed.requests.first_token_s == closed.requests.first_token_s
    made = sum(step.batch.decode_requests + step.finishing for step in closed.steps)
    assert made >= 6 * finished.sum()
    assert made < 6 * begun.sum() + 1
    assert sum(step.finishing for step in closed.steps) == begun.sum()
    prompt = sum(sum(new for new, _ in step.batch.prefill_chunks) for step in closed.steps)
    unfinished_prompts = CONFIG.max_num_seqs * 30
    assert 0 <= prompt - closed.requests.input_tokens[begun].sum() <= unfinished_prompts


def test_a_decode_step_sees_the_context_its_requests_have():
    lengths = {"input": Lengths(mean=10), "output": Lengths(mean=5)}
    run = serve(CONFIG, Workload(concurrency=1, **lengths), duration_s=0.4)
    contexts = [step.batch.decode_context_tokens for step in run.steps if step.batch.decode_requests]
    # a token made by the prompt's last step is cached by the first decode step
    assert contexts[:8] == [10, 11, 12, 13, 10, 11, 12, 13]


def test_a_closed_loop_keeps_its_concurrency(closed):
    requests = closed.requests
    assert np.all(requests.arrival_s[:6] == 0.0)
    finishes = np.sort(requests.finished_s[np.isfinite(requests.finished_s)])
    later = np.sort(requests.arrival_s[6:])
    assert np.array_equal(later, finishes[: len(later)])


def test_the_live_traffic_is_the_traffic_of_a_simulation_with_the_same_seed(poisson):
    workload = Workload(rate=40.0, **LENGTHS)
    streams = Streams.of(CONFIG.seed)
    arrivals = [t * S_PER_TICK for t in itertools.islice(arrival_ticks(workload, streams), len(poisson.requests))]
    lengths = list(itertools.islice(length_pairs(workload, Streams.of(CONFIG.seed)), len(poisson.requests)))
    assert poisson.requests.arrival_s.tolist() == arrivals
    assert poisson.requests.input_tokens.tolist() == [i for i, _ in lengths]
    assert len(arrivals) > 15


def test_requests_are_served_first_come_first_served_and_never_before_they_arrive(poisson):
    requests = poisson.requests
    scheduled = requests.first_scheduled_s[np.isfinite(requests.first_scheduled_s)]
    assert np.all(np.diff(scheduled) >= 0)
    assert np.all(scheduled >= requests.arrival_s[: len(scheduled)])
    seen = np.isfinite(requests.finished_s)
    assert np.all(requests.finished_s[seen] > requests.first_token_s[seen])
    assert np.all(requests.first_token_s[seen] > requests.first_scheduled_s[seen])


def test_the_metrics_are_those_of_the_wall_clock(closed):
    m = closed.metrics
    assert 0 < m.mean_running <= 4
    assert m.utilisation > 0.9  # a closed loop never lets the server idle
    gaps = closed.requests.tpot_s[np.isfinite(closed.requests.finished_s)]
    assert m.tpot.mean == pytest.approx(gaps[int(0.1 * len(gaps)) :].mean(), rel=0.3)
    # Little's law within the tokens of the edges
    assert m.output_tokens_per_s == pytest.approx(6 * m.requests_per_s, rel=0.2)
    assert closed.host_s_per_step < 0.01


def test_an_idle_server_sleeps_until_the_next_arrival():
    began = time.perf_counter()
    run = serve(CONFIG, Workload(rate=5.0, **LENGTHS), duration_s=1.0)
    assert time.perf_counter() - began >= 1.0
    assert run.metrics.utilisation < 0.8


def test_a_cap_reaches_every_layer_and_the_deployment():
    model = build(CONFIG, active_experts=2)
    assert {layer.mlp.gate.top_k for layer in model.decoder_layers if isinstance(layer.mlp, MoE)} == {2}
    deployment = CONFIG.deployment(active_experts=2, host_time_per_step=1e-3)
    assert deployment.active_experts == 2
    assert deployment.weight_precision == "float32"
    assert deployment.max_num_batched_tokens == 24


def test_batching_does_not_change_what_a_request_computes():
    """The same request alone and among others: same hidden states, so same tokens up to the draw."""
    from simmoe.profiling.mla import plan_step

    cpu = torch.device("cpu")

    def fresh():
        return ServedModel(TINY, slots=3, longest=32, dtype=torch.float32, device=cpu)

    tokens = torch.arange(12) % TINY.vocab
    with torch.inference_mode():
        alone = fresh().hidden_states(tokens, plan_step([], [(0, 0, 12)], 64, cpu))
        model = fresh()
        model.hidden_states(torch.arange(20, 25), plan_step([], [(1, 0, 5)], 64, cpu))
        rows = torch.cat([torch.tensor([7]), tokens])
        mixed = model.hidden_states(rows, plan_step([(1, 5)], [(2, 0, 12)], 64, cpu))
    torch.testing.assert_close(mixed[1:], alone, rtol=1e-4, atol=1e-4)


def test_tokens_are_drawn_with_the_probabilities_of_the_softmax():
    probabilities = torch.tensor([0.1, 0.0, 0.2, 0.7])
    logits = probabilities.log().expand(20_000, 4)
    drawn = torch.bincount(draw(logits, torch.Generator().manual_seed(0)), minlength=4) / 20_000
    assert torch.all((drawn - probabilities).abs() <= 4 * (probabilities * (1 - probabilities) / 20_000).sqrt())


def test_requests_longer_than_a_cache_line_and_runs_too_short_are_refused():
    with pytest.raises(SpecError, match="think time"):
        serve(CONFIG, Workload(concurrency=1, think_time=1.0, **LENGTHS), duration_s=0.1)
    with pytest.raises(CapacityError, match="longest"):
        serve(CONFIG, Workload(concurrency=1, input=Lengths(mean=40), output=Lengths(mean=20)), duration_s=0.1)
    with pytest.raises(SpecError, match="longer"):
        serve(CONFIG, Workload(concurrency=1, input=Lengths(mean=10), output=Lengths(mean=30)), duration_s=1e-4)


def test_overhead_is_recovered_from_glue_with_known_constants(tmp_path):
    path = tmp_path / "glue_x.csv"
    rng = np.random.default_rng(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["part", "model_like", "num_tokens", "latency_us"])
        for part, constant, slope in (("layer", 150.0, 0.8), ("step", 90.0, 0.3)):
            for tokens in (1, 4, 16, 64, 256):
                noise = math.exp(rng.normal(0, 0.01))
                writer.writerow([part, TINY.name, tokens, noise * (constant + slope * tokens)])
        writer.writerow(["layer", "other", 1, 1e6])
    found = overhead_of(path, TINY)
    assert found.step_s == pytest.approx((2 * 150 + 90) * 1e-6, rel=0.02)
    assert found.token_s == pytest.approx((2 * 0.8 + 0.3) * 1e-6, rel=0.05)
    assert found.seconds(100) == pytest.approx(found.step_s + 100 * found.token_s)
    with pytest.raises(CalibrationError, match="profile longer"):
        overhead_of(path, TINY.vary(name="absent"))
