"""One run: requests come, go to pools of replicas and leave, until every measured one has left.

Open loop: requests come at their own times; closed loop: a client's next one when its last has ended, passed the front
end (`steady.front_end`) and been thought about. A request's clock starts when it reaches the router: all of the front
end's time stands behind its last token here, and `steady.front_end.at_client` puts it where it belongs. A replica alone
needs no event queue, for the next thing to happen is its next arrival or its step's end (`Play._play_alone`).
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from heapq import heappop, heappush
from itertools import count

import simpy

from simmoe.sim.arrivals import Recorded, Streams, arrival_ticks, shapes, think_ticks
from simmoe.sim.autoscale import autoscaling
from simmoe.sim.clock import At, Clock
from simmoe.sim.disaggregated import ARRIVAL, Handover, Mover
from simmoe.sim.failures import failing
from simmoe.sim.pool import Pool, PoolSetup
from simmoe.sim.recorder import Recorder
from simmoe.sim.replica import Replica
from simmoe.sim.request import Request
from simmoe.sim.routers import router_named
from simmoe.sim.ticks import to_ticks
from simmoe.specs.cluster import Cluster
from simmoe.specs.engines import EngineParameters
from simmoe.specs.workload import Workload
from simmoe.steady.front_end import front_end_s


class Play:
    """Pools, router and source of one run; `run` plays it, ``recorder`` has what happened."""

    def __init__(
        self, setup: PoolSetup, workload: Workload, rules: Cluster, handover: Handover | None,
        recorded: Recorded | None, recorder: Recorder, *, router: str, seed: int,
        front_end: EngineParameters | None = None,
    ) -> None:  # fmt: skip
        self.env = Clock()
        self.recorder = recorder
        self.workload = workload
        self.limit = 0
        """Requests with a lower index are measured."""
        streams = Streams.of(seed)
        if recorded is not None:
            self._shapes, self._arrivals = iter(recorded.shapes), iter(recorded.arrivals)
        else:
            self._shapes = shapes(workload, streams)
            self._arrivals = arrival_ticks(workload, streams) if workload.open_loop else iter(())
        self._thinking = think_ticks(workload, streams)
        key = int(streams.acceptance.integers(2**63))
        total = setup.replicas + (0 if handover is None else handover.decode.replicas)
        self.pool = Pool(
            self.env,
            setup,
            recorder=self.recorder,
            route=router_named(router, streams.routing),
            finished=self._finished if handover is None else self._prompt_done,
            all_replicas=total,
            acceptance_key=key,
        )
        self.pools = [self.pool]
        self._mover: Mover | None = None
        self._fits, self._send = self.pool.can_ever_hold, self.pool.send
        """Whether a request could ever be served, and where it goes."""
        if handover is not None:
            decode = Pool(
                self.env,
                handover.decode,
                recorder=self.recorder,
                route=router_named(router, streams.routing),
                finished=self._finished,
                first_replica=setup.replicas,
                first_rank=len(self.pool.outstanding),
                all_replicas=total,
                acceptance_key=key,
            )
            self.pools.append(decode)
            self._mover = Mover(
                self.env,
                decode,
                handover.transfer,
                prefill_ranks=len(self.pool.outstanding),
                done=self._finished,
            )
            self._fits, self._send = self._fits_both, self._send_prompt
        if rules.autoscaling is not None:
            self.env.process(autoscaling(self.env, self.pool, rules.autoscaling))
        if rules.failures is not None:
            for replica, source in enumerate(streams.failures.spawn(setup.replicas)):
                self.env.process(failing(self.env, self.pool, replica, rules.failures, source))
        self._front_end = None if workload.open_loop else front_end
        for pool in self.pools:
            for one in pool.replicas:
                one.counts_running = self._front_end is not None
        self._away: list[tuple[int, int]] = []
        """When clients of a replica alone send again [ticks], in order, and the order in which they began to wait."""
        self._waits = count()
        # what comes at times of its own, besides arrivals and step ends
        others = (rules.autoscaling, rules.failures, handover)
        self._eventful = any(other is not None for other in others)
        self._issued = 0
        self._until: int | None = None
        self._keep_load = True
        self._open = 0
        """Measured requests in the system."""
        self._over = self.env.event()
        self._alone = False

    def run(self, requests: int | None, until: int | None, *, keep_load: bool) -> None:
        """Run until every measured request has left."""
        self.limit = sys.maxsize if requests is None else requests
        self._until, self._keep_load = until, keep_load
        replicas = self.pool.replicas
        alone = self._alone = not self._eventful and len(replicas) == 1
        replicas[0].eventless = alone
        if self.workload.concurrency is not None:
            for _ in range(self.workload.concurrency):
                self._issue()
        elif not alone:
            self.env.process(self._open_loop())
        if alone and self.workload.concurrency is not None:
            self._play_clients_alone(replicas[0])
        elif alone:
            self._play_alone(replicas[0])
        else:
            self.env.run(until=self._over)
        for pool in self.pools:
            pool.close()

    @property
    def events(self) -> int:
        """After the run: SimPy's events, or arrivals and windows of a replica alone."""
        if self._alone:
            return self._issued + self.recorder.windows
        return next(self.env._eid)  # noqa: SLF001 - SimPy has no public count

    def _open_loop(self) -> Generator[simpy.Event, None, None]:
        """Arrivals at their own times, whatever becomes of them."""
        env = self.env
        for tick in self._arrivals:
            if tick > env.now:
                yield env.timeout(tick - env.now)
            if not self._issue():
                return
        self._no_more()

    def _play_alone(self, replica: Replica) -> None:
        """One replica whose next arrival is always known: a loop over step ends does without an event queue.

        At one instant the order is the same: arrivals, then step ends, then new batches.
        """
        clock = self.env
        upcoming = next(self._arrivals, None)
        while not clock.over:
            if upcoming is not None:
                upcoming = replica.go_plainly(upcoming, self._arrivals_until)
                if clock.over:
                    break
            end = replica.begin_knowing(clock.now, upcoming)
            until = upcoming if end is None else end
            if until is None:  # nobody here and nobody to come
                self._no_more()
                break
            upcoming = self._arrivals_until(until, upcoming)
            if end is not None and not clock.over:
                replica.account(end)

    def _arrivals_until(self, until: int, upcoming: int | None) -> int | None:
        """Offer who comes until then to a replica alone; return who comes next, None if nobody."""
        clock = self.env
        while upcoming is not None and upcoming <= until:
            clock.advance(upcoming)
            upcoming = next(self._arrivals, None) if self._issue() else None
            if upcoming is None:
                self._no_more()
            if clock.over:
                return None
        clock.advance(until)
        return upcoming

    def _play_clients_alone(self, replica: Replica) -> None:
        """As `_play_alone`, for a closed loop: who comes next may be told by the step that ends."""
        clock, away = self.env, self._away
        while not clock.over:
            end = replica.begin_knowing(clock.now, away[0][0] if away else None)
            if end is None and not away:  # nobody here and nobody to come
                self._no_more()
                break
            until = away[0][0] if end is None else end
            while away and away[0][0] <= until:
                clock.advance(heappop(away)[0])
                self._issue()
            if end is not None and not clock.over:
                clock.advance(end)
                replica.account(end)

    def _no_more(self) -> None:
        """Stages or trace have ended."""
        self.limit = min(self.limit, self._issued)
        self._check_over()

    def _issue(self) -> bool:
        """Offer the next request now; a closed-loop client whose request is refused goes on to its next."""
        clock = self.env
        while not clock.over:
            now, index = clock.now, self._issued
            if self._until is not None and now > self._until:
                self.limit, self._until = index, None
            measured = index < self.limit
            if not (measured or self._keep_load):
                self._check_over()
                break
            self._issued += 1
            request = Request(index, now, *next(self._shapes))
            if self._fits(request):
                self._open += measured
                self._send(request)
                return True
            self.recorder.refused(request)
            self._check_over()
            if self.workload.concurrency is None:
                return True
        return False

    def _fits_both(self, request: Request) -> bool:
        """Whether both pools can hold what they would get of a request."""
        prompt = Request(request.index, request.arrival, request.input_tokens, 1)
        return self.pool.can_ever_hold(prompt) and self.pools[1].can_ever_hold(request)

    def _send_prompt(self, request: Request) -> None:
        """To the prefill pool first."""
        assert self._mover is not None
        self.pool.send(self._mover.prompt_of(request))

    def _prompt_done(self, rank: int, request: Request) -> None:
        """The prefill pool is done with a request."""
        assert self._mover is not None
        self._mover.prompt_done(rank, request)

    def _finished(self, rank: int, request: Request) -> None:
        """A request had its last token; in a closed loop its client sends the next one, once it has thought."""
        self.recorder.served(request, rank, self.env.now)
        if request.index < self.limit:
            self._open -= 1
        if self.workload.concurrency is not None:
            pause = 0 if self._thinking is None else next(self._thinking)
            if self._front_end is not None:
                running = self._replica_of(rank).in_step
                pause += to_ticks(front_end_s(self._front_end, running, request.input_tokens))
            if not pause:
                self._issue()
            elif self._alone:
                heappush(self._away, (self.env.now + pause, next(self._waits)))
            else:
                At(self.env, pause, ARRIVAL, self._back)
        if self._open == 0:
            self._check_over()

    def _replica_of(self, rank: int) -> Replica:
        pool = self.pools[-1] if rank >= self.pools[-1].first_rank else self.pool
        return pool.replicas[(rank - pool.first_rank) // pool.dp]

    def _back(self, _: simpy.Event) -> None:
        self._issue()

    def _check_over(self) -> None:
        if self._open == 0 and self._issued >= self.limit and not self.env.over:
            self.env.over = True
            self._over.succeed()
