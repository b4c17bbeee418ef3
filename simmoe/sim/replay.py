"""A finite list of requests played through one engine, whose arrivals are all known beforehand.

The queue it models: that of `replica`, with what a measured run adds. Scheduling may be asynchronous: the step after
the running one is decided before that one ends, so who arrives now is computed two steps from now at the earliest
(vLLM's ``async_scheduling``). A client gives up after a while; its request is aborted at the next step boundary.
A new request goes to the data-parallel rank with the fewest. Copying KV blocks to host memory takes scheduler time
(`kv_offload`), which shows where it exceeds the device's, or always where steps are not scheduled ahead.
As arrivals are known, no event queue is needed: a window of like decode steps ends at the first boundary after the next
arrival that could join.
Left out: several engines behind a router (see `cluster`), failures. Compared with: `cluster.simulate` where both apply
(tests/test_replay.py), measured runs (validate/vllm_showdown).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simmoe.errors import CapacityError
from simmoe.sim.kv_offload import HostTier
from simmoe.sim.scheduler import Request, Scheduler
from simmoe.sim.step_time import lockstep, single_step
from simmoe.sim.ticks import S_PER_TICK, TickTable, steps_within, to_ticks, window_ticks

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """What became of the requests, in the order given; nan where a time never came. Times at the engine. [s]

    Attributes
    ----------
    first_token_s, finished_s : since the start of the list's clock.
    running_at_first, running_at_end : requests in the batch when the first and last token came.
    hit_tokens : prompt tokens found in the prefix cache. [tokens]
    """

    first_token_s: Array
    finished_s: Array
    running_at_first: Array
    running_at_end: Array
    preemptions: int
    hit_tokens: int


def replay(
    table: TickTable,
    requests: Sequence[Request],
    ranks: Sequence[Scheduler],
    *,
    steps_ahead: int = 0,
    patience_s: float | None = None,
    exchange: bool = False,
    tiers: Sequence[HostTier] = (),
    entry_s: float = 0.0,
) -> Replayed:
    """Play requests, sorted by arrival, through the ranks of one engine until the last has left.

    Parameters
    ----------
    steps_ahead : steps scheduled before the running one ends, 0 or 1.
    patience_s : time after which a client gives up; None: never. [s]
    exchange : whether data-parallel ranks share experts.
    tiers : each rank's pool in host memory, if it has one.
    entry_s : host time to walk one entry of it, if it is small. [s]

    Raises
    ------
    CapacityError
        If a request alone does not fit the KV cache.
    """
    return _Replay(table, requests, ranks, steps_ahead, patience_s, exchange, tiers, entry_s).run()


class _Replay:
    def __init__(
        self, table: TickTable, requests: Sequence[Request], ranks: Sequence[Scheduler], steps_ahead: int,
        patience_s: float | None, exchange: bool, tiers: Sequence[HostTier], entry_s: float,
    ) -> None:  # fmt: skip
        for request in requests:
            if not ranks[0].can_ever_hold(request):
                raise CapacityError(
                    f"request {request.index} needs {request.input_tokens + request.output_tokens - 1} tokens of KV "
                    f"cache; there are {ranks[0].pool.total * ranks[0].pool.block_tokens}"
                )
        self._table, self._requests, self._ranks, self._exchange = table, requests, ranks, exchange
        self._tiers, self._entry_s, self._host = tiers, entry_s, 0
        self._ahead = steps_ahead > 0
        self._patience = None if patience_s is None else to_ticks(patience_s)
        self._inbox: list[list[Request]] = [[] for _ in ranks]
        self._rank_of: dict[Request, int] = {}
        self._arrived = self._given_up = 0
        self._out = np.full((4, len(requests)), np.nan)
        self._place = {request: i for i, request in enumerate(requests)}
        self._preemptions = 0

    def run(self) -> Replayed:
        now = 0
        while self._rank_of or self._arrived < len(self._requests):
            if not self._rank_of:
                now = max(now, self._requests[self._arrived].arrival)
                self._take_arrivals(now)
                self._open_inbox()
            else:
                self._take_arrivals(now)
            now = self._step(now)
        return Replayed(
            first_token_s=self._out[0],
            finished_s=self._out[1],
            running_at_first=self._out[2],
            running_at_end=self._out[3],
            preemptions=self._preemptions,
            hit_tokens=sum(s.prefixes.hit_tokens for s in self._ranks if s.prefixes is not None),
        )

    def _take_arrivals(self, now: int) -> None:
        requests, n = self._requests, len(self._requests)
        while self._arrived < n and requests[self._arrived].arrival <= now:
            request = requests[self._arrived]
            rank = 0
            if len(self._ranks) > 1:
                held = [
                    len(s.running) + len(s.waiting) + len(box) for s, box in zip(self._ranks, self._inbox, strict=True)
                ]
                rank = held.index(min(held))
            self._rank_of[request] = rank
            self._inbox[rank].append(request)
            self._arrived += 1

    def _open_inbox(self) -> bool:
        """Let the schedulers see who came; return whether one of them could have joined the step just planned."""
        late = False
        for scheduler, box in zip(self._ranks, self._inbox, strict=True):
            if box:
                late |= scheduler.heeds_arrivals
                scheduler.waiting.extend(box)
                box.clear()
        return late

    def _plan(self, now: int) -> tuple[int, int, int]:
        """Steps, duration of the first and growth of the batch planned now."""
        if len(self._ranks) == 1:
            steps = self._ranks[0].plan(now)
            return (steps, *single_step(self._table, self._ranks[0])) if steps else (0, 0, 0)
        steps = min((p for p in [rank.plan(now) for rank in self._ranks] if p), default=0)
        if not steps:
            return 0, 0, 0
        first, growth, steps = lockstep(self._table, self._ranks, steps, exchange=self._exchange)
        return steps, first, growth

    def _step(self, now: int) -> int:
        """Plan, work through a window of steps, and account for it; return when it ended."""
        if not self._ahead:
            self._open_inbox()
        steps, first, growth = self._plan(now)
        if self._ahead:
            late = self._open_inbox()
            if not steps:
                steps, first, growth = self._plan(now)
            elif late:
                steps = 1
        assert steps, "nobody can be scheduled"
        if self._tiers:
            steps = min(steps, self._tiers[0].block_tokens)
        if steps > 1:
            steps = self._cut(now, steps, max(first, self._host), growth)
        if self._tiers:
            first, growth = self._with_host(first, growth, steps)
        end = now + window_ticks(first, growth, steps)
        for scheduler in self._ranks:
            if scheduler.decoding or scheduler.chunks:
                self._complete(scheduler, steps, end)
        self._give_up(end)
        return end

    def _with_host(self, first: int, growth: int, steps: int) -> tuple[int, int]:
        """First step's time and growth with the host's work on the pools, alike in all steps of a window. [ticks]"""
        walked = max(tier.entries_walked(s, steps) for tier, s in zip(self._tiers, self._ranks, strict=True))
        self._host = to_ticks(self._entry_s * walked / steps)
        if not self._ahead:
            return first + self._host, growth
        return (first, growth) if first >= self._host else (self._host, 0)

    def _cut(self, now: int, steps: int, first: int, growth: int) -> int:
        """Steps until the first boundary after the next arrival that could join, or a client's end of patience."""
        times = []
        if self._arrived < len(self._requests) and any(s.heeds_arrivals for s in self._ranks):
            times.append(self._requests[self._arrived].arrival)
        if self._patience is not None and self._given_up < self._arrived:
            times.append(self._requests[self._given_up].arrival + self._patience)
        if not times:
            return steps
        elapsed = max(0, min(times) - now)
        until = steps_within(first, growth, elapsed)
        if until == 0 or window_ticks(first, growth, until) < elapsed:
            until += 1
        return min(steps, until)

    def _complete(self, scheduler: Scheduler, steps: int, end: int) -> None:
        prompts = [request for request, _, _ in scheduler.chunks]
        running = len(scheduler.running)
        finished = scheduler.complete(steps, end)
        scheduler.gaps.clear()
        for request in prompts:
            place = self._place[request]
            if request.first_token >= 0 and np.isnan(self._out[0, place]):
                self._out[0, place] = request.first_token * S_PER_TICK
                self._out[2, place] = running
        for request in finished:
            place = self._place[request]
            self._out[1, place] = end * S_PER_TICK
            self._out[3, place] = running
            self._preemptions += request.preemptions
            del self._rank_of[request]

    def _give_up(self, now: int) -> None:
        if self._patience is None:
            return
        while self._given_up < self._arrived and self._requests[self._given_up].arrival + self._patience <= now:
            request = self._requests[self._given_up]
            self._given_up += 1
            rank = self._rank_of.pop(request, None)
            if rank is None:
                continue
            if request in self._inbox[rank]:
                self._inbox[rank].remove(request)
            else:
                self._ranks[rank].abort(request)
