"""The plain case in one loop: new prompts that fit join whole, the others decode, from completion to completion.

Most steps of most runs are of this kind, and what each does is known without asking anybody: a look-up and a few sums.
The rules are those of `policies.vllm`, `scheduler` and `replica` for one rank without drafts, whose books are right at
every step's end. A step in which they have more to decide (who of a queue joins, who is preempted, what of a prompt is
known or has to wait) is left to them, as is any with prompts under another policy.
Checked in: tests/test_sim_twin.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from simmoe.sim.clock import Clock
from simmoe.sim.policies import vllm
from simmoe.sim.recorder import Recorder
from simmoe.sim.request import Request
from simmoe.sim.scheduler import Scheduler
from simmoe.sim.step_time import prompts_attention
from simmoe.sim.ticks import TickTable, boundary, window_ticks

Come = Callable[[int, int], int | None]
"""Queues who comes until a tick, the next of them at another, and moves the clock there; when the next one comes."""


@dataclass(slots=True)
class PlainRun:
    """One rank and what its replica knows.

    Attributes
    ----------
    finished : called with rank and request when a request has its last token.
    unseen : when who came since the last decision, if steps are decided ahead; else None: every step sees all.
    window : the last like steps: start, how many, the first one's time, what each further one takes more. [ticks]
    """

    s: Scheduler
    table: TickTable
    clock: Clock
    recorder: Recorder
    rank: int
    finished: Callable[[int, Request], None]
    unseen: list[tuple[int, Request]] | None
    window: tuple[int, int, int, int] = (0, 0, 0, 0)

    def go(self, arrival: int | None, come: Come) -> int | None:
        """Do plain steps, as many as follow each other; return when the next request comes.

        The clock then stands at the last one's end, and who came until then is queued.
        """
        s, clock, unseen, waiting = self.s, self.clock, self.unseen, self.s.waiting
        if s.partial or s.paused or not (waiting or s.decoding):
            return arrival
        s.forget_plan()
        pool, due, period = s.pool, s.pool.due, s.pool.period
        decode, per_context = self.table.decode, self.table.per_context
        ends, most, rank, record = s.ends, s.max_num_seqs, self.rank, self.recorder.window
        now, step, window = clock.now, s.step, self.window
        while arrival is not None and not clock.over:
            if unseen and window[1] > 1:
                self._see_early(window)
            decoding = s.decoding
            joined: list[Request] = []
            if waiting:
                joined = list(waiting)
                first = self._join(joined, now)
                if not first:
                    break
                waiting.clear()
                steps, growth, end = 1, 0, now + first
            elif decoding:
                slope = per_context[decoding]
                first, growth = decode[decoding] + slope * s.context, slope * decoding
                steps = 1 if unseen and decoding < most else ends[0] - step
                end = now + steps * first + growth * (steps * (steps - 1) // 2)
                if end >= arrival and decoding < most and steps > 1:
                    until, ticks = boundary(first, growth, arrival - now)
                    if unseen is not None:  # the next step is decided, too
                        ticks += first + growth * until
                        until += 1
                    if until < steps:
                        steps, end = until, now + ticks
                at = step % period
                need = steps // period * decoding + sum(due[at : at + steps % period])
                free = pool.free - need
                if free < 0:
                    break
                pool.free = free
                s.blocks_held = held = pool.total - free - need / 2
                record(rank, now, steps, first, growth, decoding, 0, 0, decoding, held)
            else:
                break
            if unseen:
                waiting.extend([request for _, request in unseen])
                unseen.clear()
            window = now, steps, first, growth
            now = end
            if end < arrival:
                clock.advance(end)
            else:  # nobody's coming ends a run that somebody is served in
                arrival = come(end, arrival)
            s.step = step = step + steps
            s.context += decoding * steps
            done = s.end_decoding() if ends and ends[0] == step else []
            for request in joined:
                request.cached = request.input_tokens
                s.prompt_done(request, end, done)
            for request in done:
                self.finished(rank, request)
        self.window = window
        return arrival

    def _see_early(self, window: tuple[int, int, int, int]) -> None:
        """Queue who came before the last of these steps began, in which the next one was decided."""
        assert self.unseen is not None
        start, steps, first, growth = window
        known = start + window_ticks(first, growth, steps - 1)
        while self.unseen and self.unseen[0][0] <= known:
            self.s.waiting.append(self.unseen.pop(0)[1])

    def _join(self, joining: list[Request], now: int) -> int:
        """Take them into the step that begins now, whole, and log it; its time, 0 if there is more to decide. [ticks]

        The time is that of `step_time.single_step`.
        """
        s, table, pool = self.s, self.table, self.s.pool
        tokens = blocks = pairs = longest = 0
        for request in joining:
            if request.prompt or request.preemptions:
                return 0
            new = request.input_tokens
            tokens += new
            blocks -= -new // pool.block_tokens
            pairs += new * (new + 1) // 2
            longest = max(longest, new)
        decoding, prompts = s.decoding, len(joining)
        rows, running = tokens + decoding, prompts + decoding
        need = pool.need(s.step)
        free = pool.free - need - blocks
        if s.policy is not vllm or running > s.max_num_seqs or rows > s.max_num_batched_tokens or free < 0:
            return 0
        pool.free = free
        s.blocks_held = held = pool.total - free - need / 2
        for request in joining:
            s.enter(request, now)
        token, attention = table.prompts[table.micro_batches(prompts, rows) - 1]
        time = token[rows] + table.head[running]
        time += prompts_attention(attention, 1, tokens, pairs, 0, longest if longest > 1 else 0)
        if decoding:
            time += table.mixed_base[decoding] + table.mixed_per_context[decoding] * s.context
        self.recorder.window(self.rank, now, 1, time, 0, decoding, tokens, prompts, running, held)
        return time
