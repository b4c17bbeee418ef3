"""A run as a trace that Perfetto and chrome://tracing open: ranks as tracks of steps, counters for queue and KV cache.

Format: Chrome's Trace Event Format, JSON object form (docs "Trace Event Format", events of phase X, C and M; times in
microseconds). A slice is a row of the step log: one step, or a window of like decode steps. Each rank is a thread of
its engine; requests waiting, batch and KV blocks are counters per rank; the waiting ones are shown for the whole
cluster, since the log does not tell which queue a request stood in before it was admitted.
Left out: single tokens, single requests.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from simmoe.errors import SpecError
from simmoe.sim.cluster import SimulationResult

CLUSTER = 0
"""Process number of what belongs to no rank; ranks are processes 1, 2, ..."""


def write_trace(run: SimulationResult, path: Path) -> None:
    """Write a run to a file.

    Raises
    ------
    SpecError
        If the file cannot be written, or the run's steps were merged.
    """
    if run.steps.merged_until_s:
        raise SpecError(f"--trace {path}: this run merged its older steps; simulate with every_step=True")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
            for i, event in enumerate(trace_events(run)):
                file.write((",\n" if i else "") + json.dumps(event))
            file.write("\n]}\n")
    except OSError as problem:
        raise SpecError(f"--trace {path}: cannot write ({problem.strerror})") from problem


def trace_events(run: SimulationResult) -> Iterator[dict[str, Any]]:
    """Events of a run, metadata first."""
    yield _name("process_name", CLUSTER, "cluster")
    for rank in range(len(run.kv_blocks)):
        yield _name("process_name", rank + 1, f"rank {rank}")
        yield _name("thread_name", rank + 1, "steps")
    yield from _waiting(run)
    for time, replicas in run.scaling:
        yield _counter("replicas", CLUSTER, time * 1e6, {"on": float(replicas)})
    log = run.steps
    start_us, wide_us = log.start_s * 1e6, log.duration_s * 1e6
    columns = zip(
        log.rank.astype(int).tolist(), start_us.tolist(), wide_us.tolist(), log.steps.astype(int).tolist(),
        log.decodes.tolist(), log.prompt_tokens.tolist(), log.sampled.tolist(), log.running.tolist(),
        log.blocks.tolist(), strict=True,
    )  # fmt: skip
    for rank, start, wide, steps, decodes, prompt, sampled, running, blocks in columns:
        kind = "prefill" if prompt and not decodes else "mixed" if prompt else "decode"
        yield {
            "name": kind if steps == 1 else f"{kind} x {steps}",
            "cat": "step",
            "ph": "X",
            "ts": start,
            "dur": wide,
            "pid": rank + 1,
            "tid": 0,
            "args": {"steps": steps, "decodes": decodes, "prompt_tokens": prompt, "first_tokens": sampled},
        }
        yield _counter("batch", rank + 1, start, {"requests": running})
        yield _counter("KV cache", rank + 1, start, {"blocks": blocks})


def _waiting(run: SimulationResult) -> Iterator[dict[str, Any]]:
    """Requests that have arrived and not been scheduled yet, at every change."""
    requests = run.requests.accepted()
    known = requests.first_scheduled_s[~np.isnan(requests.first_scheduled_s)]
    times = np.concatenate([requests.arrival_s, known])
    changes = np.concatenate([np.ones(len(requests)), -np.ones(len(known))])
    order = np.lexsort((-changes, times))
    for time, count in zip(times[order].tolist(), np.cumsum(changes[order]).tolist(), strict=True):
        yield _counter("waiting", CLUSTER, time * 1e6, {"requests": count})


def _counter(name: str, process: int, start_us: float, values: dict[str, float]) -> dict[str, Any]:
    return {"name": name, "ph": "C", "ts": start_us, "pid": process, "args": values}


def _name(what: str, process: int, text: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": process, "tid": 0, "args": {"name": text}}
