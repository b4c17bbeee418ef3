"""Replicas that fail and restart: exponential time to failure while on, then a fixed time until it serves again.

Left out: failures of single devices that only slow a replica down, common causes that take several replicas at once.
"""

from __future__ import annotations

import math
from collections.abc import Generator

import numpy as np
import simpy

from simmoe.sim.clock import Clock
from simmoe.sim.pool import Pool
from simmoe.sim.ticks import TICKS_PER_S, to_ticks
from simmoe.specs.cluster import Failures


def failing(
    clock: Clock, pool: Pool, replica: int, failures: Failures, rng: np.random.Generator
) -> Generator[simpy.Event, None, None]:
    """The life of one replica. A failure that falls into a time when it is off or starting does nothing."""
    restart = to_ticks(failures.restart_time)
    while True:
        yield clock.timeout(1 + int(rng.exponential(failures.mean_time_between) * TICKS_PER_S))
        before = pool.state(replica)
        if before in ("serving", "draining"):
            pool.fail(replica)
            yield clock.timeout(restart)
            pool.change(replica, "off" if before == "draining" else "serving")


def losses_per_request(failures: Failures, prompt_s: float, output_s: float) -> float:
    """Mean times a request alone is lost before it ends: after each, its tokens are computed again before the next. [-]

    Of exponential times to failure with mean m, exp(p / m) tries get through p seconds of prompt, and one more loss is
    met every m seconds of decoding.
    """
    prompt, output = prompt_s / failures.mean_time_between, output_s / failures.mean_time_between
    return math.exp(min(prompt, 700.0)) * (1.0 + output) - 1.0
