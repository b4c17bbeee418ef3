"""Recorded requests as one kind of table, and the workload that plays them: when, how long, with what prompt.

A file may be in any of the formats of `simmoe.specs.trace_formats`, gzip-compressed or not. Requests are sorted by
arrival; the first arrives at 0. Left out: texts, sessions, requests without an output (counted in `Trace.dropped`).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from simmoe.errors import SpecError
from simmoe.specs.trace_formats import READERS, BadLineError, Trace, format_of
from simmoe.specs.workload import Arrivals, Lengths, TraceReplay, Workload


def read_trace(replay: TraceReplay) -> Trace:
    """The trace a workload names; kept, so that repeated runs read it once.

    Raises
    ------
    SpecError
        If the file is missing, of no known format, or a line of it is wrong: file, line, what is wrong.
    """
    path = Path(replay.path)
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        raise SpecError(f"{path}: no such trace file") from None
    return _read(path, replay.format, replay.limit, changed)


def workload_of(replay: TraceReplay, **fields: Any) -> Workload:
    """A workload that plays a trace, its other fields given; see `fields_of`."""
    return Workload(**{"trace": replay, **fields_of(replay, fields), **fields})


def fields_of(replay: TraceReplay, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a workload can take from a trace: name, input and output with the trace's means, and a load if needed.

    A benchmark's file that does not say when requests came is played at the rate or concurrency it states.

    Raises
    ------
    SpecError
        If the trace cannot be read, or neither it nor ``fields`` say how requests come.
    """
    trace = read_trace(replay)
    found: dict[str, Any] = {"name": Path(replay.path).name}
    if trace.arrival_s is None and fields.get("rate") is None and fields.get("concurrency") is None:
        if trace.concurrency is not None:
            found["concurrency"] = trace.concurrency
        elif trace.rate is not None:
            found["rate"] = f"{trace.rate!r} request/s"
            if trace.burstiness != 1:
                found["arrivals"] = Arrivals(kind="gamma", cv=trace.burstiness**-0.5)
        else:
            raise SpecError(f"{replay.path}: does not say when requests came; give rate or concurrency beside trace")
    found["input"] = Lengths(kind="trace", mean=float(trace.input_tokens.mean()))
    found["output"] = Lengths(kind="trace", mean=float(trace.output_tokens.mean()))
    return found


def offered_per_s(workload: Workload) -> float | None:
    """Mean rate at which an open loop's requests come; None for a closed loop. [1/s]"""
    if workload.rate is not None or workload.trace is None or workload.concurrency is not None:
        return workload.rate
    rate = read_trace(workload.trace).mean_rate
    return None if rate is None else rate * workload.trace.speed


@lru_cache(maxsize=16)
def _read(path: Path, kind: str | None, limit: int | None, _changed: int) -> Trace:
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as problem:
        raise SpecError(f"{path}: cannot be read: {problem}") from None
    if not text.strip():
        raise SpecError(f"{path}: is empty")
    name = kind or format_of(text)
    if name not in READERS:
        raise SpecError(f"{path}: trace format {name or 'not recognised'}; known: {', '.join(READERS)}")
    try:
        trace = READERS[name](text)
    except BadLineError as problem:
        raise SpecError(f"{path}: {problem}") from None
    except (KeyError, TypeError, ValueError, json.JSONDecodeError) as problem:
        raise SpecError(f"{path}: not a {name} trace ({type(problem).__name__}: {problem})") from None
    if not len(trace):
        raise SpecError(f"{path}: holds no request with an output")
    return _first(trace, limit) if limit is not None and limit < len(trace) else trace


def _first(trace: Trace, limit: int) -> Trace:
    return replace(
        trace,
        arrival_s=None if trace.arrival_s is None else trace.arrival_s[:limit],
        input_tokens=trace.input_tokens[:limit],
        output_tokens=trace.output_tokens[:limit],
        prompts=None if trace.prompts is None else trace.prompts[:limit],
        stage=None if trace.stage is None else trace.stage[:limit],
    )
