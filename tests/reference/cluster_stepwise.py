"""The slow twin of clusters: engines that fail and restart, and prompts computed in one pool and decoded in another.

One loop over instants, one step at a time, on the ranks of `sim_stepwise`. Shares with the fast simulator only the
traffic, the routers and the random streams.
"""

from __future__ import annotations

import heapq

from reference.sim_stepwise import Job, Rank, drawing, plan_together, requests_in_step, step_time, ticks

from simmoe.sim.arrivals import Streams, arrival_ticks, shapes, think_ticks
from simmoe.sim.routers import ROUTERS
from simmoe.sim.ticks import TICKS_PER_S


class Engines:
    """The engines of one pool."""

    def __init__(self, table, deployment, kv_tokens, policy, route, tier=None, streams=None):
        d = deployment
        self.table, self.exchange, self.dp, self.route = table, d.ep > 1, d.dp, route
        drawn = drawing(d, streams)
        total = kv_tokens // d.dp // d.kv_block_size
        self.engines = [
            [
                Rank(total, d.kv_block_size, d.max_num_seqs, d.rank_tokens, policy, tier,
                     **drawn)
                for _ in range(d.dp)
            ]
            for _ in range(d.replicas)
        ]  # fmt: skip
        self.ranks = [rank for engine in self.engines for rank in engine]
        self.up = [True] * d.replicas
        self.ends = [None] * d.replicas
        self.outstanding = [0] * len(self.ranks)
        self.stranded = []

    def send(self, job):
        taking = [r for r in range(len(self.ranks)) if self.up[r // self.dp]]
        if not taking:
            self.stranded.append(job)
            return
        target = taking[0] if len(taking) == 1 else self.route(job.as_routed(), self.outstanding, taking)
        self.outstanding[target] += 1
        self.ranks[target].unseen.append(job)

    def finish(self, e, now):
        """Complete a step that ends now; yield (rank, job) of who is done, one after another."""
        self.ends[e] = None
        self.in_step = sum(map(requests_in_step, self.ranks[e * self.dp : (e + 1) * self.dp]))
        for r in range(e * self.dp, (e + 1) * self.dp):
            for job in self.ranks[r].finish_step(now):
                self.outstanding[r] -= 1
                yield r, job

    def begin(self, e, now):
        engine = self.engines[e]
        if self.ends[e] is None and self.up[e] and any(rank.running or rank.waiting or rank.unseen for rank in engine):
            plan_together(engine, now, self.table.steps_ahead)
            self.ends[e] = now + step_time(self.table, engine, self.exchange)

    def fail(self, e):
        """The step under way is lost; everybody goes elsewhere, running ones first."""
        self.up[e], self.ends[e] = False, None
        for r in range(e * self.dp, (e + 1) * self.dp):
            rank = self.ranks[r]
            for job in rank.running:
                job.preemptions += 1
            left = [*rank.running, *rank.waiting, *rank.unseen]
            rank.running, rank.waiting, rank.unseen, rank.work = [], [], [], []
            rank.clear()
            for job in left:
                job.blocks, job.computed, job.swapped = [], 0, 0
                job.decoding = False
            self.outstanding[r] = 0
            for job in left:
                self.send(job)


def simulate_cluster(
    table, workload, deployment, kv_tokens, *, requests, seed, router="least_outstanding", policy="vllm",
    failures=None, decode=None, transfer=None, tier=None, front_end=(0.0, 0.0, 0.0),
):  # fmt: skip
    """Serve ``requests`` requests; ``decode``: (table, deployment, kv_tokens) of the second pool. Returns the jobs.

    ``front_end``: seconds, per request in the step that ends and per prompt token, before a client sends again.
    """
    streams = Streams.of(seed)
    lengths = shapes(workload, streams)
    thinking = think_ticks(workload, streams)
    first = Engines(table, deployment, kv_tokens, policy, ROUTERS[router](streams.routing), tier, streams)
    pools = [first]
    if decode is not None:
        pools.append(Engines(*decode, "vllm", ROUTERS[router](streams.routing), streams=streams))
    jobs = {}
    events = []  # (time, order of coming up, what)
    came = 0

    def at(time, what):
        nonlocal came
        heapq.heappush(events, (time, came, what))
        came += 1

    def issue(now):
        if len(jobs) == requests:
            return
        job = jobs[len(jobs)] = Job(len(jobs), now, *next(lengths))
        first.send(job if decode is None else Job(job.index, now, job.prompt, 1, job.segments))

    def gone(now, job, in_step):
        if workload.concurrency is not None:
            pause = 0 if thinking is None else next(thinking)
            pause += ticks(front_end[0] + front_end[1] * in_step + front_end[2] * job.prompt)
            if pause == 0:
                issue(now)
            else:
                at(now + pause, lambda: issue(now_of[0]))

    free_at = [0] * len(first.ranks)

    def moved(rank, proxy, now, in_step):
        job = jobs[proxy.index]
        job.token_times, job.admitted, job.preemptions = proxy.token_times, proxy.admitted, proxy.preemptions
        job.tokens, job.found = proxy.tokens, proxy.found
        if job.output == 1:
            gone(now, job, in_step)
            return
        job.computed, job.moved = job.prompt, True
        whole = ticks(transfer.seconds_per_token * job.prompt)
        if transfer.layers > 1:
            whole = max(whole // transfer.layers, whole - (now - job.admitted))
        free_at[rank] = max(now, free_at[rank]) + whole
        at(free_at[rank] + ticks(transfer.latency_s), lambda: pools[1].send(job))

    now_of = [0]
    if workload.concurrency is None:
        every = arrival_ticks(workload, streams)
        for _ in range(requests):
            at(next(every), lambda: issue(now_of[0]))
    else:
        for _ in range(workload.concurrency):
            issue(0)
    if failures is not None:
        sources = streams.failures.spawn(deployment.replicas)

        def lives(e, now):
            at(now + 1 + int(sources[e].exponential(failures.mean_time_between) * TICKS_PER_S), lambda: dies(e))

        def dies(e):
            now = now_of[0]
            if first.ends[e] == now:
                for _, job in first.finish(e, now):
                    gone(now, job, first.in_step)
            first.fail(e)
            at(now + ticks(failures.restart_time), lambda: restarts(e))

        def restarts(e):
            first.up[e] = True
            back, first.stranded = first.stranded, []
            for job in back:
                first.send(job)
            lives(e, now_of[0])

        for e in range(deployment.replicas):
            lives(e, 0)
    while True:
        now = now_of[0]
        while events and events[0][0] == now:
            heapq.heappop(events)[2]()
        for i, pool in enumerate(pools):
            for e in range(len(pool.engines)):
                if pool.ends[e] == now:
                    for rank, job in pool.finish(e, now):
                        if decode is not None and i == 0:
                            moved(rank, job, now, pool.in_step)
                        else:
                            gone(now, job, pool.in_step)
        while events and events[0][0] == now:  # transfers that take no time
            heapq.heappop(events)[2]()
        for pool in pools:
            for e in range(len(pool.engines)):
                pool.begin(e, now)
        if len(jobs) == requests and all(job.tokens == job.output for job in jobs.values()):
            return jobs
        now_of[0] = min(t for t in [*(e[0] for e in events[:1]), *(t for p in pools for t in p.ends)] if t is not None)
