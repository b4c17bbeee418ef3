"""Traffic: when requests come, how long they are and what their prompts share, from independent random streams.

Open loop: arrivals as `Workload.arrivals` says, or a trace's, whatever the deployment does. Closed loop:
``concurrency`` clients, each sending its next request when its last one has ended and its think time has passed.
Streams for arrivals, lengths, routing and so on are spawned from one `numpy.random.SeedSequence`, so two deployments
under one seed face the same traffic: request i has the same lengths and prompt and, in the open loop, the same arrival
time.
Left out: dependence between input and output length, conversations. Checked in: tests/test_arrivals.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from simmoe.sim.ticks import TICKS_PER_S, to_ticks
from simmoe.specs.trace_formats import Segments, Trace
from simmoe.specs.traces import read_trace
from simmoe.specs.workload import Arrivals, Lengths, Prompts, Workload

_CHUNK = 2048  # draws at a time: numpy's cost per call is spread, memory stays flat


@dataclass(frozen=True, slots=True)
class Streams:
    """One independent generator per purpose."""

    arrivals: np.random.Generator
    inputs: np.random.Generator
    outputs: np.random.Generator
    routing: np.random.Generator
    prompts: np.random.Generator
    thinking: np.random.Generator
    failures: np.random.Generator
    acceptance: np.random.Generator

    @classmethod
    def of(cls, seed: int) -> Streams:
        """Spawn the streams of a run."""
        return cls(*(np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(8)))


@dataclass(frozen=True, slots=True)
class Recorded:
    """Requests of one run, in order of arrival: when each came [ticks], and its shape as `shapes` gives it."""

    arrivals: Sequence[int]
    shapes: Sequence[tuple[int, int, Segments]]


def draw_lengths(lengths: Lengths, n: int, rng: np.random.Generator) -> list[int]:
    """``n`` independent token counts. A lognormal's ``mean`` and ``cv`` are those before rounding and clipping."""
    if lengths.kind == "fixed":
        return [max(1, round(lengths.mean))] * n
    if lengths.kind == "uniform":
        assert lengths.high is not None
        return [int(x) for x in rng.integers(lengths.low, lengths.high, size=n, endpoint=True)]
    if lengths.kind == "empirical":
        assert lengths.values is not None
        return [lengths.values[i] for i in rng.integers(len(lengths.values), size=n).tolist()]
    variance = math.log1p(lengths.cv**2)
    drawn = np.rint(rng.lognormal(math.log(lengths.mean) - variance / 2, math.sqrt(variance), size=n))
    return [int(x) for x in np.clip(drawn, lengths.low, lengths.high)]


def shapes(workload: Workload, streams: Streams) -> Iterator[tuple[int, int, Segments]]:
    """Endless (input tokens, output tokens, prompt) of request 0, 1, 2, ...; () is a prompt like no other.

    A prompt is segments of (identity, tokens) from its start; what is beyond them is shared with nobody. A trace starts
    over after its last request; lengths of another kind than "trace" stand in for its own.
    """
    if workload.trace is not None:
        trace = read_trace(workload.trace)
        prompts = trace.prompts or [()] * len(trace)
        if (shared := workload.trace.shared_tokens) and trace.prompts:
            prompts = [_with_head(prompt, shared, workload.trace.group_prompts) for prompt in trace.prompts]
        inputs, outputs = trace.input_tokens.tolist(), trace.output_tokens.tolist()
        while True:
            if workload.input.kind != "trace":
                inputs, prompts = draw_lengths(workload.input, len(trace), streams.inputs), [()] * len(trace)
            if workload.output.kind != "trace":
                outputs = draw_lengths(workload.output, len(trace), streams.outputs)
            yield from zip(inputs, outputs, prompts, strict=True)
    if workload.prompts is not None:
        yield from _repeated_prompts(workload, workload.prompts, streams)
    while True:
        for i, o in zip(
            draw_lengths(workload.input, _CHUNK, streams.inputs),
            draw_lengths(workload.output, _CHUNK, streams.outputs),
            strict=True,
        ):
            yield i, o, ()


def _with_head(prompt: Segments, shared: int, group: int) -> Segments:
    """A prompt of one segment whose first tokens are those of its group, but for the last token at least."""
    if len(prompt) != 1:
        return prompt
    ((which, tokens),) = prompt
    head = min(shared, tokens - 1)
    return tuple(part for part in ((-1 - which // group, head), (which, tokens - head)) if part[1])


def length_pairs(workload: Workload, streams: Streams) -> Iterator[tuple[int, int]]:
    """Endless (input tokens, output tokens) of request 0, 1, 2, ..."""
    return ((i, o) for i, o, _ in shapes(workload, streams))


def _repeated_prompts(workload: Workload, prompts: Prompts, streams: Streams) -> Iterator[tuple[int, int, Segments]]:
    """Prompts used again and again; each keeps its length, the answers differ."""
    pool: list[tuple[int, Segments]] = []
    for i, size in enumerate(draw_lengths(workload.input, prompts.distinct, streams.inputs)):
        shared = min(prompts.shared_tokens, size)
        head = (-1 - i * prompts.groups // prompts.distinct, shared)  # identities of heads are negative
        pool.append((size, tuple(part for part in (head, (i, size - shared)) if part[1])))
    turn = 0
    while True:
        outputs = draw_lengths(workload.output, _CHUNK, streams.outputs)
        if prompts.order == "random":
            chosen = streams.prompts.integers(prompts.distinct, size=_CHUNK).tolist()
        else:
            chosen = [(turn + i) % prompts.distinct for i in range(_CHUNK)]
            turn = (turn + _CHUNK) % prompts.distinct
        for which, output in zip(chosen, outputs, strict=True):
            size, segments = pool[which]
            yield size, output, segments


def arrival_ticks(workload: Workload, streams: Streams) -> Iterator[int]:
    """Arrival times of an open loop, never going back; endless but for stages and traces, which end. [ticks]"""
    if workload.trace is not None and workload.rate is None:
        trace = read_trace(workload.trace)
        assert trace.arrival_s is not None
        return iter(_trace_ticks(trace, workload.trace.speed))
    assert workload.rate is not None
    return _PROCESSES[workload.arrivals.kind](workload.rate, workload.arrivals, streams.arrivals)


def think_ticks(workload: Workload, streams: Streams) -> Iterator[int] | None:
    """Endless think times of a closed loop; None if nobody thinks. [ticks]"""
    if not workload.think_time:
        return None
    return _thinking(workload, streams.thinking)


def _thinking(workload: Workload, rng: np.random.Generator) -> Iterator[int]:
    while True:
        if workload.think == "fixed":
            yield to_ticks(workload.think_time)
        else:
            for pause in rng.exponential(workload.think_time, size=_CHUNK).tolist():
                yield int(pause * TICKS_PER_S)


def _trace_ticks(trace: Trace, speed: float) -> list[int]:
    assert trace.arrival_s is not None
    return [to_ticks(second / speed) for second in trace.arrival_s.tolist()]


def _renewal(draw: Callable[[int], np.ndarray[tuple[int], np.dtype[np.float64]]]) -> Iterator[int]:
    """Gaps are rounded to ticks before they are added, so times never go back."""
    now = 0
    while True:
        for gap in draw(_CHUNK).tolist():
            now += int(gap * TICKS_PER_S)
            yield now


def _poisson(rate: float, _: Arrivals, rng: np.random.Generator) -> Iterator[int]:
    return _renewal(lambda n: rng.exponential(1.0 / rate, size=n))


def _gamma(rate: float, arrivals: Arrivals, rng: np.random.Generator) -> Iterator[int]:
    """Gaps of mean 1 / rate and shape 1 / cv^2."""
    shape = arrivals.cv**-2
    return _renewal(lambda n: rng.gamma(shape, 1.0 / (rate * shape), size=n))


def _on_off(rate: float, arrivals: Arrivals, rng: np.random.Generator) -> Iterator[int]:
    """A two-state Markov-modulated Poisson process, begun in its stationary state.

    Mean rate (r_on t_on + r_off t_off) / (t_on + t_off) with mean times t in the states (Fischer and Meier-Hellstern,
    "The Markov-modulated Poisson process (MMPP) cookbook", Performance Evaluation 18, 1993).
    """
    on, off = arrivals.on_time, arrivals.off_time
    peak = 1 + off / on if arrivals.peak is None else arrivals.peak
    fast = rate * peak
    slow = max(0.0, (rate * (on + off) - fast * on) / off)
    bursting = bool(rng.random() < on / (on + off))
    start = 0.0
    while True:
        end = start + rng.exponential(on if bursting else off)
        yield from _uniform(start, end, rng.poisson((fast if bursting else slow) * (end - start)), rng)
        start, bursting = end, not bursting


def _diurnal(rate: float, arrivals: Arrivals, rng: np.random.Generator) -> Iterator[int]:
    """Thinning of a Poisson process at the highest rate (Lewis and Shedler, Naval Research Logistics 26, 1979)."""
    highest = rate * (1 + arrivals.amplitude)
    now = 0.0
    while True:
        times = now + np.cumsum(rng.exponential(1.0 / highest, size=_CHUNK))
        now = float(times[-1])
        angle = 2 * np.pi * (times / arrivals.period - arrivals.phase)
        kept = rng.random(_CHUNK) * (1 + arrivals.amplitude) < 1 + arrivals.amplitude * np.sin(angle)
        yield from (to_ticks(t) for t in times[kept].tolist())


def _staged(_: float, arrivals: Arrivals, rng: np.random.Generator) -> Iterator[int]:
    start = 0.0
    for stage in arrivals.stages:
        mean = stage.rate * stage.duration
        count = round(mean) if arrivals.exact_counts else int(rng.poisson(mean))
        yield from _uniform(start, start + stage.duration, count, rng)
        start += stage.duration


def _uniform(start: float, end: float, count: int, rng: np.random.Generator) -> Iterator[int]:
    """A Poisson process on an interval, given how many came."""
    return (to_ticks(t) for t in np.sort(rng.uniform(start, end, size=count)).tolist())


_PROCESSES: dict[str, Callable[[float, Arrivals, np.random.Generator], Iterator[int]]] = {
    "poisson": _poisson,
    "gamma": _gamma,
    "on_off": _on_off,
    "diurnal": _diurnal,
    "staged": _staged,
}
