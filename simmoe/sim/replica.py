"""One engine as a queue over simulated time: sleep through a step, account for it, form the next batch.

The queue it models: a server that takes *batches*; service is one engine step, whose time depends on the batch; a
request comes round again until its last token. Data-parallel ranks of one engine each have their own queue and KV cache
and step together (`step_time.lockstep`).

Fast-forward: while nothing is to be decided (no prompt to compute, nobody admitted), decode steps form an arithmetic
progression, the context growing by one token per request and step. Such a window is slept through as one event, up to
the next completion or shortage of KV blocks; an arrival that could join cuts it at the next step boundary.
Equal to stepping one at a time, to the tick: tests/reference/sim_stepwise.py. Its gain is the mean length of a window:
large for small batches and long outputs, near one where every step sees an arrival or a completion. A request costs
at most three windows: one it ends by arriving, its prompt step, one it ends by finishing. A replica alone needs no
event queue for that (`play`), and in an open loop most of its windows no decision either (`plain_run`).
At one instant the order is: arrivals, then step ends by replica, then new batches.

Scheduling may be asynchronous (vLLM's ``async_scheduling``): the step that begins when another ends was decided before
that end, so who came during the other one is not in it, and waits for it too. Known when it is decided: who ends, for
lengths are; so seats and blocks pass on at once. An engine with nothing to do decides at once.
Keeping the books of a KV pool in host memory (`offload_books`) takes scheduler time, which adds to a step, or shows
where it exceeds the device's if steps are decided ahead.
"""

from __future__ import annotations

from collections.abc import Callable

import simpy

from simmoe.sim.clock import At, Clock
from simmoe.sim.offload_books import Bookkeeping, OffloadBooks
from simmoe.sim.plain_run import Come, PlainRun
from simmoe.sim.recorder import Recorder
from simmoe.sim.request import Request
from simmoe.sim.scheduler import Scheduler
from simmoe.sim.step_time import lockstep, single_step
from simmoe.sim.ticks import TickTable, boundary, steps_within, to_ticks, window_ticks

#: SimPy priorities at one instant: arrivals are NORMAL (1), then the ends of steps (2), then new batches
FIRST_STEP_END = 2


class Replica:
    """A process over the ranks of one engine.

    Parameters
    ----------
    index, replicas : which of how many; settles the order of simultaneous step ends.
    ranks : scheduler per data-parallel rank, numbered over all replicas from ``first_rank`` on.
    exchange : whether the ranks share experts (expert parallelism), see `step_time.lockstep`.
    steps_ahead : steps decided before the running one ends, 0 or 1 (asynchronous scheduling).
    bookkeeping : of each rank's KV pool in host memory; None: it takes no time.
    finished : called with rank number and request when a request has its last token.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        index: int,
        replicas: int,
        first_rank: int,
        ranks: list[Scheduler],
        exchange: bool,
        steps_ahead: int,
        table: TickTable,
        recorder: Recorder,
        finished: Callable[[int, Request], None],
        bookkeeping: Bookkeeping | None = None,
    ) -> None:
        self.clock = clock
        self.ranks = ranks
        self.first_rank = first_rank
        self._single = ranks[0] if len(ranks) == 1 else None
        self._exchange = exchange
        self._unseen: list[list[tuple[int, Request]]] | None = [[] for _ in ranks] if steps_ahead else None
        """Per rank, when who came since the last decision; None where the next step always sees them."""
        self._bookkeeping = bookkeeping
        self._books: list[OffloadBooks] = []
        self._open_books()
        self._plan = self._form if bookkeeping is None and not steps_ahead else self._plan_with_host
        """Forms the next batch; whether there is one."""
        self._alone = replicas == 1
        self._end_priority = FIRST_STEP_END + index
        self._begin_priority = FIRST_STEP_END + replicas
        self._table = table
        self._recorder = recorder
        self._finished = finished
        self._plain = None
        if self._single is not None and self._single.width == 1 and bookkeeping is None:
            unseen = None if self._unseen is None else self._unseen[0]
            self._plain = PlainRun(self._single, table, clock, recorder, first_rank, finished, unseen)
        self._awaited: simpy.Event | None = None
        """The one event that moves this replica on; any other of its events was overtaken by an arrival."""
        self._stepping = False
        self.eventless = False
        """Whether whoever runs the replica calls it at the right times, see `begin_knowing`."""
        self.counts_running = False
        """Whether `in_step` is kept."""
        self.in_step = 0
        """Requests in the step accounted for last, over the ranks."""
        self._start = self._steps = self._first = self._growth = 0

    def arrive(self, rank: int, request: Request) -> None:
        """Queue a request at one rank now."""
        scheduler = self.ranks[rank - self.first_rank]
        heeded = not self.eventless and scheduler.heeds_arrivals
        if self._unseen is None:
            scheduler.waiting.append(request)
        else:
            self._unseen[rank - self.first_rank].append((self.clock.now, request))
        if self.eventless:
            return
        if self._awaited is None:  # asleep; others may arrive at this instant
            self._awaited = At(self.clock, 0, self._begin_priority, self._begin)
        elif heeded and self._stepping and self._steps > 1:
            self._cut()

    def _cut(self) -> None:
        """End the window at the first step boundary from now on."""
        elapsed = self.clock.now - self._start
        steps, ticks = boundary(self._first, self._growth, elapsed)
        if steps < self._steps:
            self._steps = steps
            self._awaited = At(self.clock, ticks - elapsed, self._end_priority, self._end)

    def _plan_with_host(self, now: int) -> bool:
        """As `_form`, for steps decided ahead, and with the host's time for the books of a KV pool."""
        formed = self._form(now) if self._unseen is None else self._form_ahead(now)
        if formed and self._books:
            self._keep_books()
        return formed

    def _form_ahead(self, now: int) -> bool:
        """Form the next batch as decided before the last step's end."""
        assert self._unseen is not None
        if self._steps > 1 and any(self._unseen):  # none could join before; but all but the last step's are known
            self._see_arrivals(self._start + window_ticks(self._first, self._growth, self._steps - 1))
        formed = self._form(now)
        joining = self._see_arrivals(now)
        if not formed:
            return self._form(now)
        if joining:
            self._steps = 1
        return True

    def _see_arrivals(self, until: int) -> bool:
        """Queue who came ``until`` a tick; whether one of them could join the step after the one decided."""
        assert self._unseen is not None
        joining = False
        for scheduler, came in zip(self.ranks, self._unseen, strict=True):
            if came:
                joining |= scheduler.heeds_arrivals
                scheduler.waiting.extend(request for tick, request in came if tick <= until)
                came[:] = [entry for entry in came if entry[0] > until]
        return joining

    def _form(self, now: int) -> bool:
        """Let the schedulers form the next batch of whom they see; whether there is one."""
        single = self._single
        if single is not None:
            steps = single.plan(now)
            if not steps:
                return False
            self._first, self._growth = single_step(self._table, single)
        else:
            steps = min(filter(None, [rank.plan(now) for rank in self.ranks]), default=0)
            if not steps:
                return False
            self._first, self._growth, steps = lockstep(self._table, self.ranks, steps, exchange=self._exchange)
        self._stepping = True
        self._start, self._steps = now, steps
        return True

    def _open_books(self) -> None:
        kept = self._bookkeeping
        self._books = [] if kept is None else [OffloadBooks(kept.blocks, r.pool.block_tokens) for r in self.ranks]

    def _keep_books(self) -> None:
        """Add the host's work on the pools, alike in all steps of a window, which then fills at most a block."""
        assert self._bookkeeping is not None
        pool = self.ranks[0].pool
        steps = self._steps = min(self._steps, max(1, pool.period // pool.stride))
        walked = max(books.entries_walked(rank, steps) for books, rank in zip(self._books, self.ranks, strict=True))
        host = to_ticks(self._bookkeeping.entry_s * walked / steps)
        if self._unseen is None:
            self._first += host
        elif host > self._first:
            self._first, self._growth = host, 0

    def _begin(self, event: simpy.Event | None = None) -> None:
        """Form the next batch and sleep through its steps."""
        if event is not None and event is not self._awaited:
            return  # planned before a failure at this instant
        if not self._plan(self.clock._now):  # noqa: SLF001 - the property costs a call in the hottest path
            self._awaited = None
            return
        ticks = window_ticks(self._first, self._growth, self._steps)
        self._awaited = At(self.clock, ticks, self._end_priority, self._end)

    def go_plainly(self, arrival: int, come: Come) -> int | None:
        """Without events: do the steps that take no decision; return when the next request comes, see `PlainRun.go`."""
        plain = self._plain
        if plain is None:
            return arrival
        plain.window = self._start, self._steps, self._first, self._growth
        after = plain.go(arrival, come)
        self._start, self._steps, self._first, self._growth = plain.window
        return after

    def begin_knowing(self, now: int, arrival: int | None) -> int | None:
        """Without events: form the next batch and return when its steps end; None if there is nothing to do.

        The next ``arrival`` is known, so a window it could join is as long as `_cut` would leave it.
        """
        if not self._plan(now):
            return None
        steps = self._steps
        if steps == 1:
            return now + self._first
        ticks = steps * self._first + self._growth * (steps * (steps - 1) // 2)
        if arrival is not None and arrival - now < ticks:
            single = self._single
            if single.heeds_arrivals if single is not None else any(rank.heeds_arrivals for rank in self.ranks):
                self._steps, ticks = boundary(self._first, self._growth, arrival - now)
        return now + ticks

    def _end(self, event: simpy.Event) -> None:
        """Account for the steps just done; at the same instant, once all replicas have, go on."""
        if event is not self._awaited:
            return
        self.account(self.clock._now)  # noqa: SLF001
        if self._alone:
            self._begin()
        else:
            self._awaited = At(self.clock, 0, self._begin_priority, self._begin)

    def account(self, now: int) -> None:
        """Complete the steps under way, the last of which ended ``now``, on every rank."""
        self._stepping = False
        steps = self._steps
        rank = self.first_rank
        if self.counts_running:
            self.in_step = sum(
                scheduler.decoding + len(scheduler.chunks)
                for scheduler in self.ranks
                if scheduler.chunks or (scheduler.decoding and not scheduler.pausing)
            )
        for scheduler in self.ranks:
            decoding, chunks = 0 if scheduler.pausing else scheduler.decoding, scheduler.chunks
            if decoding or chunks:
                resumed = decoding if scheduler.paused else 0
                running = scheduler.decoding + len(chunks)
                accepted = scheduler.accepted(decoding, steps) if scheduler.width > 1 else 0
                finished = scheduler.complete(steps, now)
                plain = scheduler.width == 1 and not (chunks or resumed)
                computed, sampled = (0, 0.0) if plain else self._tokens(scheduler, decoding, resumed, accepted)
                self._recorder.window(
                    rank, self._start, steps, self._first, self._growth, decoding - resumed, computed, sampled,
                    running, scheduler.blocks_held,
                )  # fmt: skip
                if scheduler.gaps:
                    for gap, count in scheduler.gaps:
                        self._recorder.gap(now, gap, count)
                    scheduler.gaps.clear()
                for request in finished:
                    self._finished(rank, request)
            rank += 1

    def lose_everything(self) -> list[tuple[int, Request]]:
        """Fail now: steps that have ended count, the one under way is lost; return (rank, request) of who was here."""
        now = self.clock.now
        last = now
        if self._stepping:
            done = min(self._steps, steps_within(self._first, self._growth, now - self._start))
            self._awaited = None
            if done:
                last = self._start + window_ticks(self._first, self._growth, done)
                self._steps = done
                self.account(last)
            self._stepping = False
        self._awaited = None
        if self._unseen is not None:
            self._see_arrivals(self.clock.now)
        self._open_books()
        return [
            (rank, request)
            for rank, scheduler in enumerate(self.ranks, start=self.first_rank)
            for request in scheduler.lose_everything(last)
        ]

    def _tokens(self, scheduler: Scheduler, decoding: int, resumed: int, accepted: int) -> tuple[int, float]:
        """Tokens computed beside one for each of ``decoding`` in each step, and sampled beside those for the log.

        The gaps of ``resumed`` requests, longer than the step, are recorded apart.
        ``accepted``: drafts, also beyond requests' ends. [grains]
        """
        computed, sampled = 0, float(resumed)
        for request, new, cached in scheduler.chunks:
            computed += new
            sampled += cached + new == request.target
        if scheduler.width > 1:  # drafts verified, and those accepted beyond one token a step
            computed += decoding * self._steps * (scheduler.width - 1)
            sampled += (accepted - scheduler.overshoot) / scheduler.pool.grain
            scheduler.overshoot = 0
        return computed, sampled

    def close(self) -> None:
        """The run is over: log the steps under way (the metrics cut them at its end) and whoever is still here."""
        if self._unseen is not None:
            self._see_arrivals(self.clock.now)
        for rank, scheduler in enumerate(self.ranks, start=self.first_rank):
            decoding = scheduler.stepping
            if self._stepping and (decoding or scheduler.chunks):
                resumed = decoding if scheduler.paused else 0
                accepted = scheduler.accepted(decoding, self._steps) if scheduler.width > 1 else 0
                self._recorder.window(
                    rank, self._start, self._steps, self._first, self._growth, decoding - resumed,
                    *self._tokens(scheduler, decoding, resumed, accepted), len(scheduler.running),
                    scheduler.blocks_held,
                )  # fmt: skip
            for request in (*scheduler.running, *scheduler.waiting):
                self._recorder.unfinished(request, rank)
