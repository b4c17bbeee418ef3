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
        s, clock, unseen, record, rank = self.s, self.clock, self.unseen, self.recorder.window, self.rank
        if s.partial or s.paused:
            return arrival
        s.forget_plan()
        pool, waiting, ends, due, period = s.pool, s.waiting, s.ends, s.pool.due, s.pool.period
        decode, per_context = self.table.decode, self.table.per_context
        while arrival is not None and not clock.over:
            now, step, decoding = clock.now, s.step, s.decoding
            if unseen and self.window[1] > 1:
                self._see_early()
            joined: list[Request] = []
            steps, growth, tokens, blocks, cut = 1, 0, 0, 0, False
            if waiting:
                joined = list(waiting)
                tokens, blocks = self._whole(joined)
                if not tokens:
                    break
                first = self._with_prompts(joined, tokens)
                end = now + first
            elif decoding:
                slope = per_context[decoding]
                first, growth = decode[decoding] + slope * s.context, slope * decoding
                seats = decoding < s.max_num_seqs
                if not (unseen and seats):
                    steps = ends[0] - step
                end = now + steps * first + growth * (steps * (steps - 1) // 2)
                if end >= arrival and seats and steps > 1:
                    until, ticks = boundary(first, growth, arrival - now)
                    if unseen is not None:  # the next step is decided, too
                        ticks += first + growth * until
                        until += 1
                    if until < steps:
                        steps, end, cut = until, now + ticks, True
            else:
                break
            at = step % period
            need = steps // period * decoding + sum(due[at : at + steps % period])
            free = pool.free - need - blocks
            if free < 0:
                break
            pool.free = free
            for request in joined:
                s.enter(request, now)
            if joined:
                waiting.clear()
            if unseen:
                waiting.extend(request for _, request in unseen)
                unseen.clear()
            s.blocks_held = held = pool.total - free - need / 2
            running = decoding + len(joined)
            record(rank, now, steps, first, growth, decoding, tokens, float(len(joined)), running, held)
            self.window = now, steps, first, growth
            if end >= arrival:  # nobody's coming ends a run that somebody is served in
                arrival = come(end, arrival)
            else:
                clock.advance(end)
            s.step = step + steps
            s.context += decoding * steps
            if cut:
                continue
            done = s.end_decoding() if ends and ends[0] == s.step else []
            for request in joined:
                request.cached = request.input_tokens
                s.prompt_done(request, end, done)
            for request in done:
                self.finished(rank, request)
        return arrival

    def _see_early(self) -> None:
        """Queue who came before the last step began, in which the next one was decided."""
        assert self.unseen is not None
        start, steps, first, growth = self.window
        known = start + window_ticks(first, growth, steps - 1)
        while self.unseen and self.unseen[0][0] <= known:
            self.s.waiting.append(self.unseen.pop(0)[1])

    def _whole(self, joining: list[Request]) -> tuple[int, int]:
        """Tokens and blocks of new prompts that can join the next step whole; (0, 0) if there is more to decide."""
        s, block = self.s, self.s.pool.block_tokens
        tokens = blocks = 0
        for request in joining:
            if request.prompt or request.preemptions:
                return 0, 0
            tokens += request.input_tokens
            blocks -= -request.input_tokens // block
        decoding = s.decoding
        fit = decoding + len(joining) <= s.max_num_seqs and decoding + tokens <= s.max_num_batched_tokens
        return (tokens, blocks) if fit and s.policy is vllm else (0, 0)

    def _with_prompts(self, joined: list[Request], tokens: int) -> int:
        """Time of a step with whole prompts of so many tokens in all, as `step_time.single_step`. [ticks]"""
        table, decoding = self.table, self.s.decoding
        token, (base, per_new, per_pair, _) = table.of_chunks(len(joined))
        pairs = 0
        for request in joined:
            new = request.input_tokens
            pairs += new * (new + 1) // 2
        time = token[tokens + decoding] + table.head[len(joined) + decoding] + base + per_new * tokens + per_pair * pairs
        if decoding:
            time += table.mixed_base[decoding] + table.mixed_per_context[decoding] * self.s.context
        return time
