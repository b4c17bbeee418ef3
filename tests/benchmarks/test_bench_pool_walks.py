"""How an entry of an offload pool's LRU list slows as the pool grows, with CPython on this machine.

What `simmoe.sim.offload_books.POOL_GROWTH` stands for: an ``OrderedDict`` of 32-byte keys to ctypes structures, as
vLLM's offloading manager has, after three turnovers; nothing in it may go, so that a walk reads every entry. Eight
walks of one pool and eight of one half as large again take turns in thread time, so that both see the same neighbours.
The figure depends on the core's L2 and on what else runs; it is printed, and asserted only loosely. Run with
``pytest -s -m slow tests/benchmarks/test_bench_pool_walks.py``.
"""

import ctypes
import os
import random
import time
from collections import OrderedDict

import numpy as np
import pytest

POOLS = 3
TURNS = 20
WALKS = 8
PLACES = 16


class Status(ctypes.Structure):
    """A place in the pool: how many use it (-1: not complete) and which it is."""

    _fields_ = (("ref_cnt", ctypes.c_int32), ("block_id", ctypes.c_int64))


def pool(entries, rng):
    """A pool after three turnovers, and other objects made among its entries."""
    held, others = OrderedDict(), []

    def add(place):
        held[rng.randbytes(32)] = Status(-1, place)
        if rng.random() < 0.5:
            others.append(bytearray(rng.choice((40, 100, 200))))
        if len(others) > 4096:
            del others[rng.randrange(len(others))]

    for place in range(entries):
        add(place)
    for _ in range(3 * entries // PLACES):
        keys = list(held)
        gone = [held.pop(key).block_id for key in keys[:PLACES]]
        for key in rng.sample(keys[PLACES:], 8):
            held.move_to_end(key)
        for place in gone:
            add(place)
    return held, others


def walk(held):
    """As the manager looks for places that may go; there are none."""
    for key, status in held.items():
        if status.ref_cnt == 0:
            return key
    return None


def entry_ns(held):
    """Thread time of an entry in walks of one pool after a first that brings it back, shape (WALKS,). [ns]"""
    times = []
    for _ in range(WALKS + 1):
        start = time.thread_time_ns()
        assert walk(held) is None
        times.append((time.thread_time_ns() - start) / len(held))
    return np.array(times[1:])


@pytest.mark.slow
@pytest.mark.parametrize("small", [1365, 2731, 5461, 8192])
def test_an_entry_of_a_larger_pool_takes_longer(small):
    growth = []
    for seed in range(POOLS):
        rng = random.Random(seed)
        pools = [pool(entries, rng) for entries in (small, small * 3 // 2)]
        turns = np.array([[entry_ns(held).sum() for held, _ in pools] for _ in range(TURNS)])
        growth.append(float(np.median(turns[:, 1] / turns[:, 0])))
    print(  # noqa: T201  (what it is for)
        f"\n{small} to {small * 3 // 2} entries: x{np.median(growth):.3f} ({min(growth):.3f} to {max(growth):.3f}), "
        f"power {np.log(np.median(growth)) / np.log(1.5):.2f}, load {os.getloadavg()[0]:.0f}"
    )
    assert 0.8 < np.median(growth) < 3
