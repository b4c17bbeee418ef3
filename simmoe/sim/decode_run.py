"""Nothing but decodes: from completion to completion up to the next arrival, in one loop.

While nobody waits and no prompt is unfinished, who ends when is known, and so is every window up to the next arrival:
a look-up and a few sums each. The rules are those of `scheduler` and `replica` for one rank without drafts; where they
have anything to decide (an arrival, blocks running out), the loop ends.
Checked in: tests/test_sim_twin.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from simmoe.sim.clock import Clock
from simmoe.sim.recorder import Recorder
from simmoe.sim.request import Request
from simmoe.sim.scheduler import Scheduler
from simmoe.sim.ticks import TickTable, boundary


class Window(NamedTuple):
    """Like steps: when they begin, how many, the first one's time and what each further one takes more. [ticks]"""

    start: int
    steps: int
    first: int
    growth: int


def run_decodes(
    s: Scheduler, table: TickTable, clock: Clock, arrival: int, *, ahead: int, rank: int, recorder: Recorder,
    finished: Callable[[int, Request], None],
) -> Window | None:  # fmt: skip
    """Do the windows that end before ``arrival``, and the one that it cuts if nobody ends with that.

    Parameters
    ----------
    ahead : steps, after the one that it comes in, that an arrival does not join (asynchronous scheduling).
    rank, recorder, finished : as a `Replica` has them.

    Returns
    -------
    The last window, if any was done; the clock stands at its end.
    """
    s.forget_plan()
    pool, ends, record = s.pool, s.ends, recorder.window
    due, period = pool.due, pool.period
    decode, per_context = table.decode, table.per_context
    now, step = clock.now, s.step
    last = None
    while decoding := s.decoding:
        steps, context = ends[0] - step, s.context
        slope = per_context[decoding]
        first, growth = decode[decoding] + slope * context, slope * decoding
        end = now + steps * first + growth * (steps * (steps - 1) // 2)
        cut = end >= arrival
        if cut:
            until, ticks = boundary(first, growth, arrival - now)
            if ahead:
                ticks += first + growth * until
                until += 1
            if until >= steps or decoding == s.max_num_seqs:
                break
            steps, end = until, now + ticks
        at = step % period
        need = steps // period * decoding + sum(due[at : at + steps % period])
        free = pool.free - need
        if free < 0:
            break
        pool.free = free
        s.blocks_held = blocks = pool.total - free - need / 2
        record(rank, now, steps, first, growth, decoding, 0, 0.0, decoding, blocks)
        last = now, steps, first, growth
        s.step = step = step + steps
        s.context = context + decoding * steps
        clock.advance(now := end)
        if cut:
            break
        for request in s.end_decoding():
            finished(rank, request)
        if clock.over:
            break
    return None if last is None else Window(*last)
