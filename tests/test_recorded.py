"""A recorded list of requests played through a replica, and the laws of asynchronous scheduling."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from simmoe.engine.step import StepTable
from simmoe.errors import CapacityError
from simmoe.sim.arrivals import Recorded
from simmoe.sim.cluster import SimulationResult, simulate
from simmoe.sim.ticks import to_ticks
from simmoe.specs.deployment import Deployment
from simmoe.specs.workload import Lengths, Workload
from simmoe.steady.load_curve import load_curve
from simmoe.steady.state import steady_state

STEP_S = 0.01
SEATS = Deployment(gpus=1, tp=1, max_num_seqs=16, max_num_batched_tokens=256)


def table(slope: float = 2e-8, mixed: float = 0.0) -> StepTable:
    seats, tokens = 32, 512
    base, per_context = np.full(seats + 1, 1e-4), np.full(seats + 1, slope)
    base[0] = 0.0
    return StepTable(
        np.full(tokens + 1, STEP_S), np.full(tokens + seats + 1, 1e-5), base, per_context, 1e-4, 1e-6, 1e-9,
        mixed_base_s=base + mixed, mixed_per_context_s=per_context,
    )  # fmt: skip


def play(
    requests: list[tuple[float, int, int]], *, ahead: int = 0, tokens: int = 20_000, steps: StepTable | None = None,
    ranks: int = 1,
) -> SimulationResult:  # fmt: skip
    """Requests of (arrival [s], input, output)."""
    return simulate(
        replace(steps or table(), steps_ahead=ahead),
        Workload(rate=1.0, input=Lengths(mean=1), output=Lengths(mean=1)),
        SEATS.vary(gpus=ranks, dp=ranks),
        tokens * ranks,
        requests=len(requests),
        keep_load=False,
        warmup=0.0,
        recorded=Recorded([to_ticks(a) for a, _, _ in requests], [(i, o, ()) for _, i, o in requests]),
    )


@pytest.mark.parametrize("kv_tokens", [20_000, 2_000])
def test_a_recorded_run_is_the_run_it_was_recorded_from(kv_tokens: int) -> None:
    workload = Workload(
        rate=12.0,
        input=Lengths(kind="uniform", mean=150, low=20, high=280),
        output=Lengths(kind="uniform", mean=60, low=1, high=119),
    )
    run = simulate(table(), workload, SEATS, kv_tokens, requests=300, seed=3, keep_load=False)
    t = run.requests
    rows = zip(t.arrival_s.tolist(), t.input_tokens.tolist(), t.output_tokens.tolist(), strict=True)
    again = play([(a, int(i), int(o)) for a, i, o in rows], tokens=kv_tokens)
    assert again.requests.finished_s.tolist() == t.finished_s.tolist()
    assert again.requests.first_token_s.tolist() == t.first_token_s.tolist()
    assert again.preemptions == run.preemptions
    assert kv_tokens > 10_000 or run.preemptions > 0


def test_newcomer_waits_half_a_step_and_with_asynchronous_scheduling_one_more() -> None:
    rng = np.random.default_rng(0)
    arrivals = np.cumsum(rng.uniform(0.15, 0.25, 400))
    requests = [(0.0, 10, 20_000)] + [(a, 10, 1) for a in arrivals.tolist()]
    waits = []
    for ahead in (0, 1):
        result = play(requests, ahead=ahead, tokens=40_000, steps=table(slope=0.0))
        waits.append((result.requests.first_token_s[1:] - arrivals).mean() / STEP_S)
    assert waits[0] == pytest.approx(1.5, abs=0.08)
    assert waits[1] == pytest.approx(2.5, abs=0.08)


def test_whoever_queued_before_the_last_step_takes_a_seat_as_soon_as_it_is_free() -> None:
    """All seats are taken when the newcomer comes; it was known when the step after the completion was decided."""
    requests = [(0.0, 10, 50)] * 16 + [(0.2, 10, 1)]
    finished = [play(requests, ahead=ahead).requests.finished_s for ahead in (0, 1)]
    assert finished[0].tolist() == finished[1].tolist()


def test_lone_request_is_computed_at_once_however_far_ahead_steps_are_decided() -> None:
    lone = [play([(5.0, 10, 5)], ahead=ahead).requests.first_token_s[0] for ahead in (0, 1)]
    assert lone[0] == lone[1] == pytest.approx(5.0 + STEP_S, rel=0.05)


def test_mixed_steps_take_their_own_attention_time() -> None:
    requests = [(0.0, 10, 100), (0.305, 10, 5)]
    fast, slow = play(requests), play(requests, steps=table(mixed=0.02))
    assert slow.requests.finished_s[0] - fast.requests.finished_s[0] == pytest.approx(0.02, abs=1e-6)


def test_ranks_share_the_load() -> None:
    requests = [(0.001 * i, 50, 200) for i in range(32)]
    two, one = play(requests, ranks=2), play(requests)
    assert two.requests.finished_s.max() < 0.6 * one.requests.finished_s.max()


def test_requests_that_cannot_fit_are_counted_or_named() -> None:
    assert play([(0.0, 10, 10), (0.0, 1000, 20_000)]).refused == 1
    with pytest.raises(CapacityError, match="the shortest of 1 needs 20999 tokens"):
        play([(0.0, 1000, 20_000)])


@pytest.mark.parametrize("loop", [{"rate": 6.0}, {"rate": 20.0}, {"concurrency": 12}])
def test_closed_form_tells_the_step_decided_ahead(loop: dict[str, float]) -> None:
    """Lengths vary, so that completions spread; TTFT within 10 % of the simulation's, the extra step within 15 %."""
    workload = Workload(
        input=Lengths(kind="uniform", low=20, high=80), output=Lengths(kind="uniform", low=1, high=39), **loop
    )
    told, simulated = [], []
    for ahead in (0, 1):
        steps = replace(table(), steps_ahead=ahead)
        curve = load_curve(steps, SEATS, workload, 10_000)
        told.append(steady_state(curve, SEATS, workload, 10_000)[0].ttft.mean)
        simulated.append(simulate(steps, workload, SEATS, 10_000, requests=4000).metrics.ttft.mean)
    assert told == pytest.approx(simulated, rel=0.1)
    assert told[1] - told[0] == pytest.approx(simulated[1] - simulated[0], rel=0.15)
    assert simulated[1] - simulated[0] > 0.5 * STEP_S
