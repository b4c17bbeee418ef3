"""A workload played through replicas behind a router: `simulate`, the discrete-event solver.

Left out: network between router and replicas, clients that give up.
Checked against: the step-by-step twin, Little's law, M/D/1, M/M/1//N (tests/test_sim*.py, tests/test_cluster.py).
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Literal

import simpy

from simmoe.costs.kv_offload import HostTier
from simmoe.engine.step import StepTable
from simmoe.errors import CapacityError, SpecError
from simmoe.metrics import RequestTable, ServingMetrics, StepLog, from_records
from simmoe.sim.arrivals import Recorded, Streams, arrival_ticks, shapes, think_ticks
from simmoe.sim.autoscale import autoscaling
from simmoe.sim.clock import At, Clock
from simmoe.sim.disaggregated import ARRIVAL, Handover, Mover
from simmoe.sim.failures import failing
from simmoe.sim.offload_books import Bookkeeping
from simmoe.sim.pool import Pool, PoolSetup
from simmoe.sim.recorder import Recorder
from simmoe.sim.replica import Replica
from simmoe.sim.request import Request
from simmoe.sim.routers import router_named
from simmoe.sim.ticks import S_PER_TICK, to_ticks
from simmoe.specs.cluster import Cluster
from simmoe.specs.deployment import Deployment
from simmoe.specs.traces import read_trace
from simmoe.specs.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationResult:
    """Metrics of a run, and what they were computed from."""

    metrics: ServingMetrics
    requests: RequestTable
    steps: StepLog
    measured: int
    """Requests with a lower index are measured."""
    refused: int
    """Measured requests too long for the KV cache."""
    preemptions: int
    found_tokens: int
    """Prompt tokens found in prefix caches, of all requests. [tokens]"""
    loaded_tokens: int
    """Tokens loaded from host memory. [tokens]"""
    seed: int
    policy: str
    """Scheduling policy, see `policies.POLICIES`."""
    failures: int
    """Replicas that failed."""
    replica_s: float
    """Time replicas were on, summed over them. [s]"""
    scaling: tuple[tuple[float, int], ...]
    """Replicas switched on from a time on: (time [s], replicas). Without autoscaling one entry."""
    kv_blocks: tuple[int, ...]
    """KV blocks of each rank."""
    end_s: float
    """When the last measured request left. [s]"""
    events: int = field(compare=False)
    """Events processed: SimPy's, or arrivals and batches of a replica alone."""


def simulate(
    table: StepTable,
    workload: Workload,
    deployment: Deployment,
    kv_tokens: int,
    *,
    requests: int | None = None,
    duration_s: float | None = None,
    seed: int = 0,
    warmup: float | Literal["mser"] | None = None,
    keep_load: bool = True,
    router: str | None = None,
    policy: str | None = None,
    cluster: Cluster | None = None,
    handover: Handover | None = None,
    tier: HostTier | None = None,
    bookkeeping: Bookkeeping | None = None,
    recorded: Recorded | None = None,
    every_step: bool = False,
) -> SimulationResult:
    """Play ``requests`` requests (or those that arrive in ``duration_s``) through the deployment's replicas.

    Parameters
    ----------
    table : StepTable
        Step time of one replica by its total batch, split evenly over data-parallel ranks; how ranks with different
        batches step together is said in `step_time`.
    kv_tokens : int
        KV capacity of one replica. Data-parallel ranks share it, and the deployment's limits, equally. [tokens]
    requests, duration_s : exactly one of them
        How many requests are measured, or for how long arrivals are. [requests], [s] Neither: all of a trace or of
        staged arrivals, which end by themselves.
    warmup : float or "mser", optional
        Share of the measured requests dropped at the start, or chosen from the data by MSER-5. By default a tenth,
        in a closed loop at least the first ``concurrency`` requests, which all come at once; never above a half.
    keep_load : bool
        Whether traffic goes on, unmeasured, until the last measured request is served, as in a steady state. If
        not, the run drains, as a benchmark with a fixed number of prompts does, and rates are over its whole length.
    router, policy : str, optional
        Names in `routers.ROUTERS` (default: least outstanding) and `policies.POLICIES` (default: the engine's);
        they go before those of ``cluster``.
    cluster : Cluster, optional
        Router, failures and autoscaling; its disaggregation is ``handover``, made by whoever knows the model.
    handover : Handover, optional
        A pool that decodes; ``table``, ``deployment`` and ``kv_tokens`` are then those of the prefill pool.
    tier : HostTier, optional
        Host memory of each rank for KV blocks, see `costs.kv_offload`.
    bookkeeping : Bookkeeping, optional
        What a rank's scheduler spends on the books of such a pool, see `offload_books`.
    recorded : Recorded, optional
        Arrivals and shapes in place of those the workload, then an open loop, describes.
    every_step : bool
        Whether the log keeps every step; otherwise older ones are merged when they are many (`recorder.MOST_ROWS`).

    Raises
    ------
    SpecError
        If the deployment's limits contradict each other, or the step table does not cover them.
    CapacityError
        If no request fits the KV cache.
    """
    rules = cluster or Cluster()
    finite = recorded is not None or (workload.open_loop and (workload.rate is None or bool(workload.arrivals.stages)))
    if requests is not None and duration_s is not None:
        raise SpecError("give exactly one of requests and duration_s")
    if requests is None and duration_s is None and not finite:
        raise SpecError("give exactly one of requests and duration_s: this traffic never ends")
    if requests is not None and recorded is None and workload.open_loop and workload.rate is None:
        assert workload.trace is not None
        if requests > (held := len(read_trace(workload.trace))):
            raise SpecError(f"requests {requests} exceeds the {held} requests of {workload.trace.path}")
    setup = PoolSetup(
        table=table,
        deployment=deployment,
        kv_tokens=kv_tokens,
        policy=policy or rules.policy,
        tier=tier,
        bookkeeping=bookkeeping,
        most_replicas=rules.autoscaling.maximum if rules.autoscaling else None,
    )
    for pool in (setup, *(() if handover is None else (handover.decode,))):
        limits = pool.deployment
        if limits.max_num_batched_tokens < limits.max_num_seqs * limits.rows_per_decode:
            rows = f" x {limits.rows_per_decode}" if limits.speculative else ""
            raise SpecError(
                f"max_num_batched_tokens {limits.max_num_batched_tokens} is below max_num_seqs "
                f"{limits.max_num_seqs}{rows}: a step could not give every running request a token"
                f"{' and its drafts' if rows else ''}"
            )
    run = _Cluster(
        setup,
        workload,
        rules,
        handover,
        recorded,
        Recorder(every_step=every_step),
        router=router or rules.router,
        seed=seed,
    )
    run.run(requests, None if duration_s is None else to_ticks(duration_s), keep_load=keep_load)
    return _result(run, kv_tokens, warmup, seed)


def _result(run: _Cluster, kv_tokens: int, warmup: float | Literal["mser"] | None, seed: int) -> SimulationResult:
    workload = run.workload
    everybody, log = run.recorder.requests(), run.recorder.steps()
    accepted = everybody.accepted()
    measured = int((accepted.request < run.limit).sum())
    refused = int(((everybody.rank < 0) & (everybody.request < run.limit)).sum())
    if not measured:
        if not refused:
            raise SpecError("no request arrived: raise the rate, or run for longer")
        shortest = int((everybody.input_tokens + everybody.output_tokens).min()) - 1
        raise CapacityError(
            f"no request fits the KV cache of {kv_tokens} tokens; the shortest of {refused} needs {shortest} tokens"
        )
    if warmup is None:
        warmup = 0.1
        if workload.concurrency is not None and measured:
            warmup = min(0.5, max(warmup, workload.concurrency / measured))
    end_s = run.env.now * S_PER_TICK
    schedulers = [rank for pool in run.pools for replica in pool.replicas for rank in replica.ranks]
    blocks = tuple(pool.blocks_per_rank for pool in run.pools for _ in pool.outstanding)
    metrics = from_records(
        accepted,
        log,
        end_s=end_s,
        measured=measured,
        warmup=warmup,
        ranks=len(blocks),
        kv_blocks_per_rank=sum(blocks) / len(blocks),
        objective=workload.objective,
        notes=(f"{refused} requests refused: longer than the KV cache",) if refused else (),
    )
    return SimulationResult(
        metrics=metrics,
        requests=everybody,
        steps=log,
        measured=run.limit,
        refused=refused,
        preemptions=int(accepted.preemptions.sum()),
        found_tokens=sum(s.prefixes.hit_tokens for s in schedulers if s.prefixes is not None),
        loaded_tokens=sum(s.loaded_tokens for s in schedulers),
        seed=seed,
        policy=run.pool.policy,
        failures=run.pool.failures,
        replica_s=sum(pool.replica_ticks() for pool in run.pools) * S_PER_TICK,
        scaling=tuple((tick * S_PER_TICK, count) for tick, count in run.pool.scaling),
        kv_blocks=blocks,
        end_s=end_s,
        events=run.events,
    )


class _Cluster:
    """Pools, router and source of one run."""

    def __init__(
        self, setup: PoolSetup, workload: Workload, rules: Cluster, handover: Handover | None,
        recorded: Recorded | None, recorder: Recorder, *, router: str, seed: int,
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
        if rules.autoscaling is not None:
            self.env.process(autoscaling(self.env, self.pool, rules.autoscaling))
        if rules.failures is not None:
            for replica, source in enumerate(streams.failures.spawn(setup.replicas)):
                self.env.process(failing(self.env, self.pool, replica, rules.failures, source))
        # what comes at times of its own, besides arrivals and step ends
        others = (rules.autoscaling, rules.failures, handover, self._thinking)
        self._eventful = any(other is not None for other in others)
        self.events = 0
        self._issued = 0
        self._until: int | None = None
        self._keep_load = True
        self._open = 0
        """Measured requests in the system."""
        self._ended = False
        self._over = self.env.event()

    def run(self, requests: int | None, until: int | None, *, keep_load: bool) -> None:
        """Run until every measured request has left."""
        self.limit = sys.maxsize if requests is None else requests
        self._until, self._keep_load = until, keep_load
        replicas = self.pool.replicas
        alone = not self._eventful and len(replicas) == 1
        replicas[0].eventless = alone
        if self.workload.concurrency is not None:
            for _ in range(self.workload.concurrency):
                self._issue()
        elif not alone:
            self.env.process(self._open_loop())
        if alone:
            self._play_alone(replicas[0])
        else:
            self.env.run(until=self._over)
            self.events = next(self.env._eid)  # noqa: SLF001 - SimPy has no public count
        for pool in self.pools:
            pool.close()

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
        clock, arrivals = self.env, self._arrivals
        upcoming = next(arrivals, None)
        events = 0
        while True:
            end = replica.begin_knowing(clock.now, upcoming)
            events += 1
            until = upcoming if end is None else end
            if until is None:  # nobody here and nobody to come
                self._no_more()
                break
            while upcoming is not None and upcoming <= until:
                clock.advance(upcoming)
                events += 1
                upcoming = next(arrivals, None) if self._issue() else None
                if upcoming is None:
                    self._no_more()
            if self._ended:
                break
            if end is not None:
                clock.advance(end)
                replica.end_knowing(end)
                if self._ended:
                    break
        self.events = events

    def _no_more(self) -> None:
        """Stages or trace have ended."""
        self.limit = min(self.limit, self._issued)
        self._check_over()

    def _issue(self) -> bool:
        """Offer the next request now; a closed-loop client whose request is refused goes on to its next."""
        while not self._ended:
            now, index = self.env.now, self._issued
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
                self.pool.send(request if self._mover is None else self._mover.prompt_of(request))
                return True
            self.recorder.refused(request)
            self._check_over()
            if self.workload.concurrency is None:
                return True
        return False

    def _fits(self, request: Request) -> bool:
        """Whether every pool can hold what it would get of a request."""
        if self._mover is None:
            return self.pool.can_ever_hold(request)
        prompt = Request(request.index, request.arrival, request.input_tokens, 1)
        return self.pool.can_ever_hold(prompt) and self.pools[1].can_ever_hold(request)

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
            if self._thinking is None:
                self._issue()
            else:
                At(self.env, next(self._thinking), ARRIVAL, self._thought)
        if self._open == 0:
            self._check_over()

    def _thought(self, _: simpy.Event) -> None:
        self._issue()

    def _check_over(self) -> None:
        if self._open == 0 and self._issued >= self.limit and not self._ended:
            self._ended = True
            self._over.succeed()
