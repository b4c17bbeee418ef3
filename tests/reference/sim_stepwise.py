"""The simulator's slow twin: one loop, one step at a time, every request with its own list of blocks and token times.

Nothing is summed in closed form and nobody sleeps through anything; SimPy is not used. Written to be read beside the
scheduler's rules. Shares with the fast simulator only the traffic (`arrivals`), the routers and the draws of accepted
drafts. What speculative decoding emits on average is counted in fractions, request by request.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil, floor
from types import SimpleNamespace

from simmoe.sim.acceptance import Acceptance
from simmoe.sim.arrivals import Streams, arrival_ticks, shapes
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
    segments: tuple = ()
    computed: int | Fraction = 0  # tokens whose keys and values are in the cache
    moved: bool = False  # computed elsewhere: no prompt to look up
    blocks: list = field(default_factory=list)
    token_times: list[int] = field(default_factory=list)  # when a step emitted one or more
    tokens: int = 0  # emitted
    kept: int = 0  # of them, before it last began to decode
    speculated: Fraction = Fraction(0)  # and since
    admitted: int | None = None
    preemptions: int = 0
    decoding: bool = False  # has sampled a token since it was (re)admitted; else its step is a prompt chunk
    swapped: int = 0  # tokens in host memory since a preemption
    found: int = 0  # tokens of prompts found, in all
    drawn: int = 0  # decode steps so far

    @property
    def known(self) -> int:
        """Tokens that exist: the prompt and what was generated."""
        return self.prompt + self.tokens

    def as_routed(self):
        """What a router sees of it."""
        return SimpleNamespace(prompt=self.segments, input_tokens=self.prompt)

    @property
    def content(self):
        """The prompt, token by token, as far as others can have the same."""
        return [(identity, i) for identity, length in self.segments for i in range(length)]


class Rank:
    """Blocks have numbers, users and maybe a key: all tokens up to their end. Free ones queue, oldest first."""

    def __init__(self, total_blocks, block, max_seqs, budget, policy, tier=None, per_step=1, rows=1, draw=None):
        self.draw = draw  # request and step to what the step emits; None: per_step
        self.per_step, self.rows = Fraction(per_step), rows
        self.total, self.block = total_blocks, block
        self.max_seqs, self.budget, self.policy, self.tier = max_seqs, budget, policy, tier
        self.waiting, self.running, self.work = [], [], []
        self.unseen = []  # came since the last decision
        self.loaded = 0  # tokens loaded from host memory, in all
        self.clear()

    def clear(self):
        self.free = OrderedDict.fromkeys(range(self.total))
        self.users = [0] * self.total
        self.key_of, self.block_of = {}, {}
        self.host = OrderedDict()  # keys of blocks there, least recently moved there first
        self.swapped = 0  # blocks there of preempted jobs
        self.loading = 0  # tokens loaded in the step decided

    def trim(self):
        """Host memory holds so much."""
        most = 0 if self.tier is None else self.tier.tokens // self.block
        while self.host and len(self.host) + self.swapped > most:
            self.host.popitem(last=False)
        assert self.swapped <= most

    def new_block(self):
        number, _ = self.free.popitem(last=False)
        key = self.key_of.pop(number, None)
        if key is not None:
            del self.block_of[key]
            self.host[key] = None
            self.trim()
        self.users[number] = 1
        return number

    def writes(self, job):
        """Tokens that the job's next decode step emits."""
        return self.per_step if self.draw is None else min(self.draw(job.index, job.drawn), job.output - job.tokens)

    def more(self, job, tokens):
        return ceil(Fraction(job.computed + tokens) / self.block) - len(job.blocks)

    def grow(self, job, tokens):
        """Give the job blocks for ``tokens`` more tokens, or say that there are too few."""
        more = self.more(job, tokens)
        if more > len(self.free):
            return False
        job.blocks += [self.new_block() for _ in range(more)]
        return True

    def release(self, job):
        for number in reversed(job.blocks):
            self.users[number] -= 1
            if not self.users[number]:
                self.free[number] = None
        job.blocks = []

    def found(self, job):
        """Blocks of a waiting job's prompt on the device, and keys of those after them in host memory."""
        here, there, content = [], [], job.content
        if job.moved:
            return here, there
        for end in range(self.block, min(len(content), job.known - 1) + 1, self.block):
            key = tuple(content[:end])
            if not there and key in self.block_of:
                here.append(self.block_of[key])
            elif key in self.host:
                there.append(key)
            else:
                break
        return here, there

    def cached(self, job, here, there):
        if job.moved:
            return job.computed
        return max(job.swapped, (len(here) + len(there)) * self.block)

    def preempt(self):
        job = self.running.pop()
        tokens = floor(job.computed)
        if job in [other for other, _ in self.work]:
            self.work = [(other, new) for other, new in self.work if other is not job]
        # a block taken for the step that is being decided holds nothing yet
        held = -(-tokens // self.block)
        self.release(job)
        job.computed = 0
        job.moved = False
        job.preemptions += 1
        job.decoding = False
        if self.tier is not None and self.tier.swap and self.swapped + held <= self.tier.tokens // self.block:
            self.swapped += held
            job.swapped = tokens
            self.trim()
        self.waiting.insert(0, job)
        return job

    def admit(self, now, left):
        """Take the first waiting job into the step with what is left of the budget; return that, 0 if it cannot be."""
        job = self.waiting[0]
        here, there = self.found(job)
        cached = self.cached(job, here, there)
        new = min(job.known - cached, left)
        idle = sum(not self.users[number] for number in here)
        taken = job.known if self.policy == "trtllm_max_utilization" else cached + new
        needed = -(-taken // self.block) - len(here)
        if needed + idle > len(self.free):
            return 0
        for number in here:
            self.users[number] += 1
            self.free.pop(number, None)
        if not job.moved and self.tier is not None:
            self.loading += cached - len(here) * self.block
        if job.swapped:
            self.swapped -= -(-job.swapped // self.block)
        if job.moved or cached == job.swapped:
            there = []
        job.found += (len(here) + len(there)) * self.block
        for key in there:
            del self.host[key]
        job.blocks = list(here)
        job.blocks += [self.new_block() for _ in range(needed)]
        for number, key in zip(job.blocks[len(here) :], there, strict=False):  # loaded: can be found again at once
            self.key_of[number], self.block_of[key] = key, number
        job.swapped = 0
        job.computed = cached
        self.start(now, new)
        return new

    def publish(self, job):
        content = job.content
        for i in range(min(len(content), job.computed) // self.block):
            key = tuple(content[: (i + 1) * self.block])
            if key not in self.block_of:
                self.block_of[key], self.key_of[job.blocks[i]] = job.blocks[i], key
                self.host.pop(key, None)

    def plan(self, now):
        """Fill ``work`` with (job, new tokens) of the next step."""
        self.work, self.loading = [], 0
        if self.policy == "trtllm":
            return self.plan_no_evict(now)
        if self.policy == "sglang":
            return self.plan_prefill_first(now)
        left, preempted, i = self.budget, False, 0
        while i < len(self.running):
            job = self.running[i]
            new = self.rows if job.decoding else min(job.known - job.computed, left)
            while not self.grow(job, self.writes(job) if job.decoding else new):
                preempted = True
                if not job.decoding and not (self.tier and self.tier.swap) and any(j.decoding for j in self.running):
                    break  # preempted, its blocks would be found again
                if self.preempt() is job:
                    break
            else:
                self.work.append((job, new))
                left -= new
            i += 1
        while self.waiting and not preempted and left and len(self.running) < self.max_seqs:
            new = self.admit(now, left)
            if not new:
                break
            left -= new
        return None

    def plan_no_evict(self, now):
        left = self.budget
        for job in self.running:
            new = self.rows if job.decoding else min(job.known - job.computed, left)
            assert self.grow(job, self.writes(job) if job.decoding else new), "nobody should lack a block"
            self.work.append((job, new))
            left -= new
        while self.waiting and left and len(self.running) < self.max_seqs:
            job = self.waiting[0]
            promised = sum(self.most_blocks(j) for j in [*self.running, job])
            if promised > self.total:
                break
            new = self.admit(now, left)
            assert new
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
            if needed > len(self.free) and self.running:
                break
            new = self.admit(now, left)
            if not new:
                break
            left -= new
        if self.work:
            return
        i = 0
        while i < len(self.running):
            job = self.running[i]
            while not self.grow(job, self.writes(job)):
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
        self.loaded += self.loading
        for job, new in self.work:
            if job.decoding:
                job.speculated += self.writes(job)
                job.computed += self.writes(job)
                job.drawn += 1
                emitted = True
                job.tokens = min(job.kept + floor(job.speculated), job.output)
            else:
                job.computed += new
                self.publish(job)
                emitted = job.computed == job.known
                if emitted:
                    job.decoding, job.speculated = True, Fraction(0)
                    job.tokens += 1
                    job.kept = job.tokens
            if emitted:
                job.token_times.append(now)
                if job.tokens == job.output:
                    self.running.remove(job)
                    self.release(job)
                    done.append(job)
        assert len(self.free) + len({n for j in self.running for n in j.blocks}) == self.total
        self.work = []
        return done


def requests_in_step(rank):
    """Requests a step works on, and those whose decoding waits for it."""
    if not rank.work:
        return 0
    working = {job.index for job, _ in rank.work}
    return len(working | {job.index for job in rank.running if job.decoding})


def plan_together(engine, now, steps_ahead):
    """Decide a step; with one decided ahead, those who just came are in it only if there is nothing else to do."""
    if not steps_ahead:
        see(engine)
    for rank in engine:
        rank.plan(now)
    see(engine)
    if not any(rank.work for rank in engine):
        for rank in engine:
            rank.plan(now)


def see(engine):
    for rank in engine:
        rank.waiting += rank.unseen
        rank.unseen = []


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
            full = dp * sum(new for _, new in rank.work) // table.batch_tokens
            by_batches.append(min(max(len(chunks), full), len(table.prompt_shares)))
            share = table.prompt_shares[by_batches[-1] - 1]
            new = dp * sum(n for _, n in chunks)
            pairs = dp * sum(n * job.computed + n * (n + 1) // 2 for job, n in chunks)
            cached = dp * sum(job.computed for job, new in chunks if new > 1)
            walk = max((job.computed + new for job, new in chunks if new > 1), default=0)
            summed = (
                ticks(table.prefill_base_s * share) + ticks(table.prefill_per_token_s * share) * new
                + ticks(table.prefill_per_pair_s * share) * pairs
                + ticks(table.prefill_per_cached_s * share) * cached
            )  # fmt: skip
            walked = dp * (ticks(table.prefill_walk_base_s * share) + ticks(table.prefill_walk_s * share) * walk)
            prefill.append(max(summed, walked))
    together = sum(tokens) if exchange or dp == 1 else dp * max(tokens)
    token_s = table.prompt_token_s[min(by_batches) - 1] if by_batches else table.token_s
    time = ticks(token_s[together]) + ticks(table.head_s[dp * max(sampled)]) + max(prefill) + max(attention)
    loading, tier = max(rank.loading for rank in ranks), ranks[0].tier
    if not loading:
        return time
    load = ticks(tier.latency_s) + ticks(tier.seconds_per_token) * loading
    return max(time, load) if tier.layerwise else time + load


def drawing(deployment, streams):
    """Tokens emitted by a request's n-th decode step, where that is drawn."""
    if deployment.speculative is None or not deployment.speculative.sampled:
        return {"per_step": deployment.tokens_per_decode, "rows": deployment.rows_per_decode}
    source = Acceptance(deployment.speculative, int(streams.acceptance.integers(2**63)))
    return {"draw": lambda request, n: source.tokens(request, n + 1)[n], "rows": deployment.rows_per_decode}


def simulate_stepwise(
    table, workload, deployment, kv_tokens, *, requests, seed, router="least_outstanding", policy="vllm", tier=None
):
    """Serve exactly ``requests`` requests. Returns jobs by index, indices of the refused, tokens loaded."""
    streams = Streams.of(seed)
    lengths = shapes(workload, streams)
    route = ROUTERS[router](streams.routing)
    dp = deployment.dp
    block = deployment.kv_block_size
    drawn = drawing(deployment, streams)
    engines = [
        [
            Rank(kv_tokens // dp // block, block, deployment.max_num_seqs, deployment.rank_tokens, policy,
                 tier, **drawn)
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
                target = 0 if len(ranks) == 1 else route(job.as_routed(), outstanding, range(len(ranks)))
                jobs[job.index] = job
                outstanding[target] += 1
                ranks[target].unseen.append(job)
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
            if ends[e] is None and any(rank.running or rank.waiting or rank.unseen for rank in engine):
                plan_together(engine, now, table.steps_ahead)
                ends[e] = now + step_time(table, engine, deployment.ep > 1)
        upcoming = [t for t in [arrival, *ends] if t is not None]
        if not upcoming:
            assert not any(rank.swapped for rank in ranks)
            return jobs, refused, sum(rank.loaded for rank in ranks)
        now = min(upcoming)
