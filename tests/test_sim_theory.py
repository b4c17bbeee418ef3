"""The simulator against queueing theory: where its queue is a textbook's, its waits are the textbook's.

Steps of constant length make a rank a station of as many servers as it has seats: a request of n tokens is served n
steps. Geometric lengths make service times close to exponential. Means over independent runs; within four standard
errors, which miss once in 16,000 tests, beside what is known to differ (a step's boundary, few queues).
"""

import math

import numpy as np
import pytest
from test_sim import constant_steps

from simmoe.sim.cluster import simulate
from simmoe.specs.deployment import Deployment
from simmoe.specs.workload import Lengths, Workload

STEP = 1e-3
MEAN = 100
RNG = np.random.default_rng(11)
GEOMETRIC = tuple(RNG.geometric(1 / MEAN, size=20000).tolist())
TWO_POINT = (10,) * 9 + (910,)
SERVICE = STEP * float(np.mean(GEOMETRIC))


def station(load, lengths, *, seats=1, replicas=1, requests=3000, runs=8, router="least_outstanding"):
    """Mean wait before service and mean time in the system of several runs, each with its standard error. [s]"""
    deployment = Deployment(
        gpus=replicas, tp=1, max_num_seqs=seats, max_num_batched_tokens=seats + 8, prefix_caching=False
    )
    rate = load * seats * replicas / (STEP * float(np.mean(lengths)))
    workload = Workload(rate=rate, input=Lengths(mean=1), output=Lengths(kind="empirical", values=lengths))
    table = constant_steps(STEP, seats + 8, seats)
    waits, times = [], []
    for seed in range(runs):
        result = simulate(table, workload, deployment, 10**7, requests=requests, seed=seed, router=router)
        served = result.requests.accepted()
        kept = (served.request >= requests // 5) & (served.request < requests)
        waits.append((served.first_scheduled_s - served.arrival_s)[kept].mean())
        times.append(served.e2e_s[kept].mean())
    return [(np.mean(x), 4 * np.std(x, ddof=1) / math.sqrt(runs)) for x in (waits, times)]


def erlang_c(seats, load):
    """Chance to wait in M/M/c."""
    offered = seats * load
    last = offered**seats / math.factorial(seats) / (1 - load)
    return last / (sum(offered**k / math.factorial(k) for k in range(seats)) + last)


@pytest.mark.parametrize(("lengths", "load"), [(GEOMETRIC, 0.7), (TWO_POINT, 0.5)])
def test_one_seat_is_m_g_1(lengths, load):
    """Pollaczek-Khinchine: rho E[S^2] / (2 E[S] (1 - rho)); ten and 910 tokens make eight times M/D/1's wait."""
    times = STEP * np.array(lengths)
    expected = load * np.mean(times**2) / (2 * times.mean() * (1 - load))
    (wait, error), _ = station(load, lengths)
    assert wait == pytest.approx(expected, abs=error)
    assert error < 0.3 * expected


@pytest.mark.parametrize(("seats", "load"), [(2, 0.7), (4, 0.8), (8, 0.8)])
def test_a_batch_of_seats_is_m_m_c(seats, load):
    """Erlang's C over c mu - lambda, and at most a step until the running one ends, unless none runs."""
    expected = erlang_c(seats, load) * SERVICE / (seats * (1 - load))
    (wait, error), (time, _) = station(load, GEOMETRIC, seats=seats)
    assert expected - error <= wait <= expected + STEP + error
    assert time == pytest.approx(wait + SERVICE, rel=0.02)
    assert error < 0.4 * expected


def test_turns_make_each_queue_gi_m_1():
    """Every 20th arrival of a Poisson stream: an Erlang gap; sigma = A*(mu (1 - sigma)), time 1 / (mu (1 - sigma))."""
    replicas, load = 20, 0.8
    sigma = 0.5
    for _ in range(200):
        sigma = (replicas * load / (replicas * load + 1 - sigma)) ** replicas
    _, (time, error) = station(load, GEOMETRIC, replicas=replicas, requests=6000, runs=6, router="round_robin")
    assert time == pytest.approx(SERVICE / (1 - sigma), abs=error + 0.02 * SERVICE)
    assert time < 0.7 * SERVICE / (1 - load)  # far from M/M/1


def test_the_better_of_two_queues_is_the_supermarket_model():
    """Mitzenmacher: with many queues the mean time is the sum over i of load^(2^i - 2) services; one: 1 / (1 - load).

    The shortest of all is better still, and one queue for all better than that.
    """
    replicas, load = 40, 0.8
    expected = SERVICE * sum(load ** (2.0**i - 2) for i in range(1, 12))
    found = {
        router: station(load, GEOMETRIC, replicas=replicas, requests=5000, runs=3, router=router)[1][0]
        for router in ("power_of_two", "least_outstanding")
    }
    assert found["power_of_two"] == pytest.approx(expected, rel=0.06)
    assert expected < 0.6 * SERVICE / (1 - load)
    shared = SERVICE + erlang_c(replicas, load) * SERVICE / (replicas * (1 - load))
    assert shared < found["least_outstanding"] < 0.7 * found["power_of_two"]
