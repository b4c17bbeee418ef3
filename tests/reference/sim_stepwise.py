"""The simulator's slow twin: one loop, one step at a time, every request with its own list of blocks and token times.

Nothing is summed in closed form and nobody sleeps through anything; SimPy is not used. Written to be read beside the
scheduler's rules. Shares with the fast simulator only the traffic (`arrivals`) and the routers. What speculative
decoding emits on average is counted in fractions, request by request.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil, floor

from simmoe.sim.arrivals import Streams, arrival_ticks, length_pairs
from simmoe.sim.routers import ROUTERS

TICK = 2.0**-60


def ticks(seconds: float) -> int:
    return round(float(seconds) / TICK)


@dataclass(eq=False)
class Job:
    index: int
    arrival: int
    prompt: int
    output: int
    computed: int | Fraction = 0  # tokens whose keys and values are in the cache
    blocks: int = 0
    token_times: list[int] = field(default_factory=list)  # when a step emitted one or more
    tokens: int = 0  # emitted
    kept: int = 0  # of them, before it last began to decode
    speculated: Fraction = Fraction(0)  # and since
    admitted: int | None = None
    preemptions: int = 0
    decoding: bool = False  # has sampled a token since it was (re)admitted; else its step is a prompt chunk

    @property
    def known(self) -> int:
        """Tokens that exist: the prompt and what was generated."""
        return self.prompt + self.tokens


class Rank:
    def __init__(self, total_blocks, block, max_seqs, budget, policy, per_step=1, rows=1):
        self.per_step, self.rows = Fraction(per_step), rows
        self.total, self.free, self.block = total_blocks, total_blocks, block
        self.max_seqs, self.budget, self.policy = max_seqs, budget, policy
        self.waiting, self.running, self.work = [], [], []

    def grow(self, job, tokens):
        """Give the job blocks for ``tokens`` more tokens, or say that there are too few."""
        more = ceil(Fraction(job.computed + tokens) / self.block) - job.blocks
        if more > self.free:
            return False
        self.free -= more
        job.blocks += more
        return True

    def preempt(self):
        job = self.running.pop()
        self.free += job.blocks
        job.blocks = job.computed = 0
        job.preemptions += 1
        job.decoding = False
        self.waiting.insert(0, job)
        return job

    def plan(self, now):
        """Fill ``work`` with (job, new tokens) of the next step."""
        self.work = []
        if self.policy == "trtllm":
            return self.plan_no_evict(now)
        if self.policy == "sglang":
            return self.plan_prefill_first(now)
        left, preempted, i = self.budget, False, 0
        while i < len(self.running):
            job = self.running[i]
            new = self.rows if job.decoding else min(job.known - job.computed, left)
            while not self.grow(job, self.per_step if job.decoding else new):
                preempted = True
                if self.preempt() is job:
                    break
            else:
                self.work.append((job, new))
                left -= new
            i += 1
        while self.waiting and not preempted and left and len(self.running) < self.max_seqs:
            job = self.waiting[0]
            new = min(job.known - job.computed, left)  # a waiting job may have been computed elsewhere
            if not self.grow(job, new):
                break
            self.start(now, new)
            left -= new
        return None

    def plan_no_evict(self, now):
        left = self.budget
        for job in self.running:
            new = self.rows if job.decoding else min(job.known - job.computed, left)
            assert self.grow(job, self.per_step if job.decoding else new), "nobody should lack a block"
            self.work.append((job, new))
            left -= new
        while self.waiting and left and len(self.running) < self.max_seqs:
            job = self.waiting[0]
            promised = sum(self.most_blocks(j) for j in [*self.running, job])
            if promised > self.total:
                break
            new = min(job.known - job.computed, left)  # a waiting job may have been computed elsewhere
            assert self.grow(job, new)
            self.start(now, new)
            left -= new

    def plan_prefill_first(self, now):
        """Chunks only, while there are any; else every decoding job takes a token."""
        left = self.budget
        unfinished = [job for job in self.running if not job.decoding]
        for job in unfinished:
            new = min(job.known - job.computed, left)
            if not self.grow(job, new):
                self.preempt()
                return
            self.work.append((job, new))
            left -= new
        while self.waiting and left and len(self.running) < self.max_seqs:
            job = self.waiting[0]
            # steps to come after the step that ends its prompt
            to_come = sum(j.prompt + j.output - 1 - max(j.computed, j.known if not j.decoding else 0)
                          for j in [*self.running, job])  # fmt: skip
            needed = -(-(job.known + int(0.1 * float(to_come))) // self.block)
            if needed > self.free and self.running:
                break
            new = min(job.known - job.computed, left)  # a waiting job may have been computed elsewhere
            if not self.grow(job, new):
                break
            self.start(now, new)
            left -= new
        if self.work:
            return
        i = 0
        while i < len(self.running):
            job = self.running[i]
            while not self.grow(job, self.per_step):
                if self.preempt() is job:
                    break
            else:
                self.work.append((job, self.rows))
            i += 1

    def most_blocks(self, job):
        """Blocks at the job's end, when the last step may have emitted more than was left."""
        beyond = ceil(self.per_step - Fraction(1, self.per_step.denominator))
        return -(-(job.prompt + job.output - 1 + beyond) // self.block)

    def start(self, now, new):
        job = self.waiting.pop(0)
        if job.admitted is None:
            job.admitted = now
        self.running.append(job)
        self.work.append((job, new))

    def finish_step(self, now):
        done = []
        for job, new in self.work:
            if job.decoding:
                job.computed += self.per_step
                job.speculated += self.per_step
                emitted = True
                job.tokens = min(job.kept + floor(job.speculated), job.output)
            else:
                job.computed += new
                emitted = job.computed == job.known
                if emitted:
                    job.decoding, job.speculated = True, Fraction(0)
                    job.tokens += 1
                    job.kept = job.tokens
            if emitted:
                job.token_times.append(now)
                if job.tokens == job.output:
                    self.running.remove(job)
                    self.free += job.blocks
                    job.blocks = 0
                    done.append(job)
        assert self.free + sum(j.blocks for j in self.running) == self.total
        self.work = []
        return done


def step_time(table, ranks, exchange):
    """A step's time from the definition of StepTable, every entry rounded to ticks. [ticks]"""
    dp = len(ranks)
    tokens, sampled, prefill, attention, by_batches = [0], [0], [0], [0], []
    for rank in ranks:
        decodes = [(job, new) for job, new in rank.work if job.decoding]
        chunks = [(job, new) for job, new in rank.work if not job.decoding]
        tokens.append(sum(new for _, new in rank.work))
        sampled.append(len(decodes) * rank.rows + sum(job.computed + new == job.known for job, new in chunks))
        if decodes:
            b, context = dp * len(decodes), dp * sum(job.computed for job, _ in decodes)
            grain = rank.per_step.denominator
            attention.append(
                ticks(table.decode_base_s[b]) + ticks(table.decode_per_context_s[b] / grain) * int(context * grain)
            )
        if chunks:
            by_batches.append(min(len(chunks), len(table.prompt_shares)))
            share = table.prompt_shares[by_batches[-1] - 1]
            new = dp * sum(n for _, n in chunks)
            pairs = dp * sum(n * job.computed + n * (n + 1) // 2 for job, n in chunks)
            prefill.append(
                ticks(table.prefill_base_s * share) + ticks(table.prefill_per_token_s * share) * new
                + ticks(table.prefill_per_pair_s * share) * pairs
            )  # fmt: skip
    together = sum(tokens) if exchange or dp == 1 else dp * max(tokens)
    token_s = table.prompt_token_s[min(by_batches) - 1] if by_batches else table.token_s
    return ticks(token_s[together]) + ticks(table.head_s[dp * max(sampled)]) + max(prefill) + max(attention)


def simulate_stepwise(
    table, workload, deployment, kv_tokens, *, requests, seed, router="least_outstanding", policy="vllm"
):
    """Serve exactly ``requests`` requests. Returns jobs by index, and indices of the refused."""
    streams = Streams.of(seed)
    lengths = length_pairs(workload, streams)
    route = ROUTERS[router](streams.routing)
    dp = deployment.dp
    block = deployment.kv_block_size
    engines = [
        [
            Rank(kv_tokens // dp // block, block, deployment.max_num_seqs, deployment.max_num_batched_tokens, policy,
                 deployment.tokens_per_decode, deployment.rows_per_decode)
            for _ in range(dp)
        ]
        for _ in range(deployment.replicas)
    ]  # fmt: skip
    ranks = [rank for engine in engines for rank in engine]
    outstanding = [0] * len(ranks)
    ends: list[int | None] = [None] * len(engines)  # when each engine's step ends
    jobs, refused = {}, []

    def issue(now):
        """Offer the next request; in a closed loop, the next one that is not refused."""
        while len(jobs) + len(refused) < requests:
            job = Job(len(jobs) + len(refused), now, *next(lengths))
            if ranks[0].most_blocks(job) <= ranks[0].total:
                target = 0 if len(ranks) == 1 else route(None, outstanding, range(len(ranks)))
                jobs[job.index] = job
                outstanding[target] += 1
                ranks[target].waiting.append(job)
                return
            refused.append(job.index)
            if workload.concurrency is None:
                return

    arrivals = iter(())
    if workload.concurrency is None:
        every = arrival_ticks(workload, streams)
        arrivals = iter([next(every) for _ in range(requests)])
    else:
        for _ in range(workload.concurrency):
            issue(0)
    arrival = next(arrivals, None)
    now = 0
    while True:
        # at one instant: arrivals, then step ends by engine, then new batches
        while arrival == now:
            issue(now)
            arrival = next(arrivals, None)
        for e, engine in enumerate(engines):
            if ends[e] == now:
                ends[e] = None
                for r, rank in enumerate(engine):
                    for _ in rank.finish_step(now):
                        outstanding[e * dp + r] -= 1
                        if workload.concurrency is not None:
                            issue(now)
        for e, engine in enumerate(engines):
            if ends[e] is None and any(rank.running or rank.waiting for rank in engine):
                for rank in engine:
                    rank.plan(now)
                ends[e] = now + step_time(table, engine, deployment.ep > 1)
        upcoming = [t for t in [arrival, *ends] if t is not None]
        if not upcoming:
            return jobs, refused
        now = min(upcoming)
