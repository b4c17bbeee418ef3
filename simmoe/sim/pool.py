"""Replicas of one deployment behind a router, some of which may be down, starting or draining.

A replica is ``off``, ``starting``, ``serving``, ``draining`` (gets nothing new, leaves when empty) or ``down``.
Requests of a failed replica go to the others at once, or wait for the first that serves again.
Left out: network between router and replicas, the time to notice a failure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from simmoe.costs.kv_offload import HostTier
from simmoe.engine.step import StepTable
from simmoe.sim.acceptance import Acceptance, DrawnPool
from simmoe.sim.clock import Clock
from simmoe.sim.kv_cache import BlockPool
from simmoe.sim.offload_books import Bookkeeping
from simmoe.sim.policies import WHOLE_PROMPTS, policy_named
from simmoe.sim.recorder import Recorder
from simmoe.sim.replica import Replica
from simmoe.sim.request import Request
from simmoe.sim.routers import Router
from simmoe.sim.scheduler import Scheduler
from simmoe.sim.ticks import TickTable
from simmoe.specs.cluster import POLICY_OF_ENGINE
from simmoe.specs.deployment import Deployment


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSetup:
    """What a pool is made of: one replica's step times and KV capacity, and the deployment of its replicas."""

    table: StepTable
    deployment: Deployment
    kv_tokens: int
    policy: str | None = None
    tier: HostTier | None = None
    """Host memory of each rank for KV blocks."""
    bookkeeping: Bookkeeping | None = None
    """Host time for the books of such a pool."""
    most_replicas: int | None = None
    """With autoscaling; by default as many as the deployment has."""

    @property
    def replicas(self) -> int:
        """Replicas there can be at once."""
        return max(self.deployment.replicas, self.most_replicas or 0)


class Pool:
    """The replicas, each rank's outstanding requests, and who takes new ones.

    Parameters
    ----------
    first_replica, all_replicas : numbers over all pools of the run; ranks are numbered on from ``first_rank``.
    finished : called with the rank and the request when one has had its last token here.
    acceptance_key : of the draws of accepted drafts, where the deployment samples them.
    """

    def __init__(
        self,
        clock: Clock,
        setup: PoolSetup,
        *,
        recorder: Recorder,
        route: Router,
        finished: Callable[[int, Request], None],
        first_replica: int = 0,
        first_rank: int = 0,
        all_replicas: int | None = None,
        acceptance_key: int = 0,
    ) -> None:
        deployment, count = setup.deployment, setup.replicas
        drafts = deployment.speculative
        acceptance = Acceptance(drafts, acceptance_key) if drafts is not None and drafts.sampled else None
        per_step = deployment.tokens_per_decode if acceptance is None else Fraction(1)
        table = TickTable.of(
            setup.table,
            max_tokens=deployment.tokens_per_replica,
            max_requests=deployment.requests_per_replica,
            grain=per_step.denominator,
        )
        self.policy = setup.policy or POLICY_OF_ENGINE[deployment.engine]
        decide = policy_named(self.policy)
        dp = deployment.dp
        self.clock = clock
        self.dp = dp
        self.first_rank = first_rank
        self.replicas = [
            Replica(
                clock,
                index=first_replica + i,
                replicas=all_replicas or count,
                first_rank=first_rank + i * dp,
                ranks=[
                    Scheduler(
                        BlockPool(setup.kv_tokens // dp, deployment.kv_block_size, per_step)
                        if acceptance is None
                        else DrawnPool(setup.kv_tokens // dp, deployment.kv_block_size),
                        max_num_seqs=deployment.max_num_seqs,
                        max_num_batched_tokens=deployment.rank_tokens,
                        policy=decide,
                        prefix_caching=deployment.prefix_caching,
                        rows_per_decode=deployment.rows_per_decode,
                        tier=setup.tier,
                        acceptance=acceptance,
                        chunks_prompts=self.policy not in WHOLE_PROMPTS,
                    )
                    for _ in range(dp)
                ],
                exchange=deployment.ep > 1,
                steps_ahead=setup.table.steps_ahead,
                table=table,
                bookkeeping=setup.bookkeeping,
                recorder=recorder,
                finished=self._finished,
            )
            for i in range(count)
        ]
        self.can_ever_hold = self.replicas[0].ranks[0].can_ever_hold
        """Whether a request alone fits the KV cache of a rank."""
        self.blocks_per_rank = self.replicas[0].ranks[0].pool.total
        self.outstanding = [0] * (count * dp)
        self.taking: list[int] = []
        """Ranks that take new requests."""
        self.stranded: deque[Request] = deque()
        """Requests that no replica could take."""
        self.failures = 0
        self.scaling: list[tuple[int, int]] = []
        """Replicas switched on, at which ticks their number changed."""
        self._state = ["serving" if i < deployment.replicas else "off" for i in range(count)]
        self._on_ticks = 0
        self._changed = 0
        self._route = route
        self._left = finished
        self._refresh()

    @property
    def in_system(self) -> int:
        """Requests that wait or run."""
        return sum(self.outstanding) + len(self.stranded)

    def send(self, request: Request) -> None:
        """Route a request and queue it."""
        taking = self.taking
        if not taking:
            self.stranded.append(request)
            return
        rank = self._route(request, self.outstanding, taking) if len(taking) > 1 else taking[0]
        self.outstanding[rank] += 1
        self.replicas[rank // self.dp].arrive(rank + self.first_rank, request)

    def state(self, replica: int) -> str:
        """What a replica does, see the module's first lines."""
        return self._state[replica]

    def count(self, *states: str) -> int:
        """Replicas in one of the states."""
        return sum(state in states for state in self._state)

    def change(self, replica: int, state: str) -> None:
        """Put a replica into another state; a draining one that is empty is off at once."""
        if state == "draining" and not self._busy(replica):
            state = "off"
        self._count_time()
        self._state[replica] = state
        self._refresh()
        if state == "serving":
            while self.stranded:
                self.send(self.stranded.popleft())

    def fail(self, replica: int) -> None:
        """A replica stops at once; its requests go elsewhere, in the order they were admitted or came."""
        self.failures += 1
        self.change(replica, "down")
        for rank, request in self.replicas[replica].lose_everything():
            self.outstanding[rank - self.first_rank] -= 1
            self.send(request)

    def replica_ticks(self) -> int:
        """Time replicas have been on (all states but off), summed over them."""
        self._count_time()
        return self._on_ticks

    def close(self) -> None:
        """The run is over: log what is under way."""
        for replica in self.replicas:
            replica.close()

    def _busy(self, replica: int) -> bool:
        return any(self.outstanding[replica * self.dp : (replica + 1) * self.dp])

    def _count_time(self) -> None:
        now = self.clock.now
        self._on_ticks += self.count("starting", "serving", "draining", "down") * (now - self._changed)
        self._changed = now

    def _refresh(self) -> None:
        dp = self.dp
        self.taking = [i * dp + r for i, state in enumerate(self._state) if state == "serving" for r in range(dp)]
        on = self.count("starting", "serving", "draining", "down")
        if not self.scaling or self.scaling[-1][1] != on:
            self.scaling.append((self.clock.now, on))

    def _finished(self, rank: int, request: Request) -> None:
        mine = rank - self.first_rank
        self.outstanding[mine] -= 1
        if self._state[mine // self.dp] == "draining" and not self._busy(mine // self.dp):
            self.change(mine // self.dp, "off")
        self._left(rank, request)
