"""A workload played through replicas behind a router: `simulate`, the discrete-event solver.

Left out: network between router and replicas, clients that give up.
Checked against: the step-by-step twin, Little's law, M/D/1, M/M/1//N (tests/test_sim*.py, tests/test_cluster.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from simmoe.costs.kv_offload import HostTier
from simmoe.engine.step import StepTable
from simmoe.errors import CapacityError, SpecError
from simmoe.metrics import RequestTable, ServingMetrics, StepLog, from_records
from simmoe.sim.arrivals import Recorded
from simmoe.sim.disaggregated import Handover
from simmoe.sim.offload_books import Bookkeeping
from simmoe.sim.play import Play
from simmoe.sim.pool import PoolSetup
from simmoe.sim.recorder import Recorder
from simmoe.sim.ticks import S_PER_TICK, to_ticks
from simmoe.specs.cluster import Cluster
from simmoe.specs.deployment import Deployment
from simmoe.specs.engines import EngineParameters
from simmoe.specs.traces import read_trace
from simmoe.specs.workload import Workload

MOST_LINK_LOAD = 100.0
"""Seconds of sending per second of arrivals beyond which a KV link is refused: a run that keeps its load up plays as
many times the requests that it measures."""


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
    front_end: EngineParameters | None = None,
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
    front_end : EngineParameters, optional
        Whose front end is in the cycle of a closed loop's clients; times in the result are the engine's, see
        `steady.front_end.at_client`.
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
    if handover is not None and keep_load and workload.open_loop and workload.rate is not None:
        _check_link(handover, workload, workload.rate, setup.replicas * deployment.dp)
    run = Play(
        setup,
        workload,
        rules,
        handover,
        recorded,
        Recorder(every_step=every_step),
        router=router or rules.router,
        seed=seed,
        front_end=front_end,
    )
    run.run(requests, None if duration_s is None else to_ticks(duration_s), keep_load=keep_load)
    return _result(run, kv_tokens, warmup, seed)


def _check_link(handover: Handover, workload: Workload, rate: float, links: int) -> None:
    """Refuse a link so slow that its queue, which grows for as long as requests come, would keep a run from its end."""
    busy = rate / links * workload.input.mean * handover.transfer.seconds_per_token
    if busy > MOST_LINK_LOAD:
        raise CapacityError(
            f"disaggregation.link is {busy:,.0f} times too slow: at {rate:g} requests/s of {workload.input.mean:g} "
            f"prompt tokens the KV caches of one second take each of {links} prefill ranks {busy:,.0f} s to send; "
            "raise the link's bandwidth or lower the rate"
        )


def _result(run: Play, kv_tokens: int, warmup: float | Literal["mser"] | None, seed: int) -> SimulationResult:
    workload = run.workload
    everybody, log = run.recorder.requests(), run.recorder.steps()
    accepted = everybody.accepted()
    measured = int((accepted.request < run.limit).sum())
    refused = int(((everybody.rank < 0) & (everybody.request < run.limit)).sum())
    if not measured:
        if not refused:
            raise SpecError("no request arrived: raise the rate, or run for longer")
        shortest = int((everybody.input_tokens + everybody.output_tokens).min()) - 1
        rank = run.pool.replicas[0].ranks[0]
        step = f", or a step of {rank.max_num_batched_tokens} tokens as {run.pool.policy} computes prompts"
        whole = "" if rank.chunks_prompts else step
        raise CapacityError(
            f"no request fits the KV cache of {kv_tokens} tokens{whole}; the shortest of {refused} needs {shortest} "
            "tokens"
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
