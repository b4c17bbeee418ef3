"""Queue, batches and clients of the live server: plain Python around a served model.

Scheduling is that of vLLM V1 without preemption: one token budget per step, running decodes first, then prompt chunks
first come first served; a request holds one latent-cache line until its last token. The clients live in the same
thread: they look at the wall clock between steps, so a request is noticed at the next step boundary, as in a real
engine. Left out: preemption (lines are as long as the longest request), prefix caching, HTTP and tokenisation.
Checked in tests/test_profiling_live.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from simmoe.engine.step import Batch
from simmoe.errors import CapacityError, SpecError
from simmoe.profiling.clocks import Clock, clock_named
from simmoe.profiling.served_model import LIVE_MODEL, ServedModel
from simmoe.sim.arrivals import Streams, arrival_ticks, length_pairs
from simmoe.sim.ticks import S_PER_TICK
from simmoe.specs.deployment import Deployment
from simmoe.specs.model import Model
from simmoe.specs.workload import Workload

WARM_UP_STEPS = 5


@dataclass(frozen=True, kw_only=True)
class LiveConfig:
    """What is served, and the engine's limits.

    Parameters
    ----------
    longest : int
        Prompt plus output tokens a request may have. [tokens]
    threads : int or None
        Threads torch uses on a CPU; must be those of the profile it is compared with. None: leave as it is.
    timer : str
        "wall", or "cpu": the serving thread's own run time (`simmoe.profiling.clocks`).
    """

    model: Model = LIVE_MODEL
    device: str = "cpu"
    dtype: str = "float32"
    backend: str = "loop"
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 256
    longest: int = 512
    threads: int | None = None
    timer: str = "wall"
    seed: int = 0

    def deployment(self, active_experts: int | None = None, host_time_per_step: float | None = None) -> Deployment:
        """The same server as a deployment to predict."""
        precision = {"weight_precision": self.dtype, "activation_precision": self.dtype, "kv_precision": self.dtype}
        return Deployment.model_validate(
            {
                **precision,
                "active_experts": active_experts,
                "max_num_seqs": self.max_num_seqs,
                "max_num_batched_tokens": self.max_num_batched_tokens,
                "engine": "generic",
                "host_time_per_step": host_time_per_step,
            }
        )


@dataclass(slots=True, kw_only=True)
class Request:
    """One request in flight; times on the run's clock. [s]"""

    number: int
    arrival_s: float
    prompt: list[int]
    output_tokens: int
    slot: int = -1
    cached: int = 0
    made: int = 0
    last_token: int = -1
    first_scheduled_s: float = np.nan
    first_token_s: float = np.nan
    finished_s: float = np.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveStep:
    """One step as it happened.

    Attributes
    ----------
    start_s, wall_s : when the server began to schedule it, and how long until its tokens were handed out. [s]
    model_s : the part of ``wall_s`` inside the model's step. [s]
    finishing : prompts that ended with this step.
    """

    start_s: float
    wall_s: float
    model_s: float
    batch: Batch
    finishing: int
    running: int


@dataclass
class Server:
    """Queue, batch and clients of one run."""

    config: LiveConfig
    workload: Workload
    model: ServedModel
    clock: Clock = field(init=False)
    waiting: deque[Request] = field(default_factory=deque)
    running: list[Request] = field(default_factory=list)
    done: list[Request] = field(default_factory=list)
    steps: list[LiveStep] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.workload.think_time or self.workload.prompts is not None:
            raise SpecError("the live server has clients without think time and prompts like no other; leave these out")
        self.clock = clock_named(self.config.timer)
        self.streams = Streams.of(self.config.seed)
        self.lengths = length_pairs(self.workload, self.streams)
        self.free_slots = list(range(self.config.max_num_seqs))
        self.count = 0
        self.began_s = 0.0

    def now(self) -> float:
        """Time since the run began. [s]"""
        return self.clock.now() - self.began_s

    def warm_up(self) -> None:
        """A few steps nobody asked for: pages, allocator, code paths."""
        tokens = list(range(min(self.config.max_num_batched_tokens, self.config.longest - WARM_UP_STEPS, 64)))
        self.model.step([], [(0, 0, tokens)], [0])
        for step in range(WARM_UP_STEPS):
            self.model.step([(0, len(tokens) + step, 1)], [], [])

    def run(self, duration_s: float) -> None:
        """Serve until the time is over; what is unfinished then stays so."""
        arrivals = self._arrivals()
        upcoming = next(arrivals, np.inf)
        self.began_s = self.clock.now()
        for _ in range(self.workload.concurrency or 0):
            self._submit(0.0)
        while True:
            now = self.now()
            while upcoming <= now:
                self._submit(upcoming)
                upcoming = next(arrivals, np.inf)
            if now >= duration_s:
                return
            if not self.waiting and not self.running:
                self.clock.sleep(max(0.0, min(upcoming, duration_s) - self.now()))
                continue
            self._step(now)

    def _arrivals(self) -> Iterator[float]:
        if self.workload.concurrency is not None:
            return iter(())
        return (ticks * S_PER_TICK for ticks in arrival_ticks(self.workload, self.streams))

    def _submit(self, arrival_s: float) -> None:
        inputs, outputs = next(self.lengths)
        if inputs + outputs > self.config.longest:
            raise CapacityError(
                f"a request of {inputs} + {outputs} tokens exceeds the live server's cache line of "
                f"{self.config.longest}; give LiveConfig(longest=...) or shorter lengths"
            )
        prompt = self.streams.routing.integers(0, self.config.model.vocab, size=inputs).tolist()
        request = Request(number=self.count, arrival_s=arrival_s, prompt=prompt, output_tokens=outputs)
        self.count += 1
        self.waiting.append(request)

    def _schedule(self, now: float) -> tuple[list[Request], list[tuple[Request, int]]]:
        """Requests that decode, and (request, new tokens) of prompt chunks, within the budget."""
        budget = self.config.max_num_batched_tokens
        decoding = [request for request in self.running if request.made][:budget]
        budget -= len(decoding)
        chunks = []
        for request in self.running:
            if not request.made and budget:
                new = min(budget, len(request.prompt) - request.cached)
                chunks.append((request, new))
                budget -= new
        while budget and self.waiting and self.free_slots:
            request = self.waiting.popleft()
            request.slot = self.free_slots.pop()
            request.first_scheduled_s = now
            self.running.append(request)
            new = min(budget, len(request.prompt))
            chunks.append((request, new))
            budget -= new
        return decoding, chunks

    def _step(self, start_s: float) -> None:
        decoding, chunks = self._schedule(start_s)
        batch = Batch(
            decode_requests=len(decoding),
            decode_context_tokens=sum(request.cached for request in decoding),
            prefill_chunks=tuple((new, request.cached) for request, new in chunks),
        )
        ends = [i for i, (request, new) in enumerate(chunks) if request.cached + new == len(request.prompt)]
        before = self.clock.now()
        tokens = self.model.step(
            [(request.slot, request.cached, request.last_token) for request in decoding],
            [(r.slot, r.cached, r.prompt[r.cached : r.cached + new]) for r, new in chunks],
            ends,
        )
        after = self.clock.now()
        running = len(self.running)
        now = after - self.began_s
        for request, new in chunks:
            request.cached += new
        for request in decoding:
            request.cached += 1
        for request, token in zip([*decoding, *(chunks[i][0] for i in ends)], tokens, strict=True):
            self._hand_out(request, token, now)
        wall_s = self.now() - start_s
        self.steps.append(
            LiveStep(
                start_s=start_s,
                wall_s=wall_s,
                model_s=after - before,
                batch=batch,
                finishing=len(ends),
                running=running,
            )
        )

    def _hand_out(self, request: Request, token: int, now: float) -> None:
        request.last_token = token
        request.made += 1
        if request.made == 1:
            request.first_token_s = now
        if request.made == request.output_tokens:
            request.finished_s = now
            self.running.remove(request)
            self.free_slots.append(request.slot)
            self.done.append(request)
            if self.workload.concurrency:
                self._submit(now)
