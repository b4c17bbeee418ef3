"""What a run leaves behind: a row per request and one per window of like steps, in columns.

A window of K decode steps is one row (first step's time, growth per step), so the rows grow with arrivals and
completions, not with tokens; still every single step's time can be read back exactly. Beyond `MOST_ROWS` of them the
log is merged (`merging`) unless every step is asked for, so it stays bounded; requests take 52 B each.
"""

from __future__ import annotations

import sys
from math import nan
from struct import Struct

import numpy as np
from numpy.typing import NDArray

from simmoe.metrics import RequestTable, StepLog
from simmoe.sim.merging import merged
from simmoe.sim.request import Request
from simmoe.sim.ticks import S_PER_TICK

Array = NDArray[np.float64]

MOST_ROWS = 1 << 18
"""Rows of steps (80 B each), and of gaps, that are kept one by one: of some 150,000 requests or more."""

_AT_ONCE = 4096
"""Rows gathered, each packed as it comes (half the time of a tuple converted later), before they become columns."""
_STEP, _GAP, _REQUEST = (Struct(f"{width}d").pack for width in (10, 3, 9))
_STEP_TICKS, _GAP_TICKS, _REQUEST_TICKS = (1, 3, 4), (0, 1), (2, 3, 4, 5)
"""Columns that hold times."""
_TYPES = (np.int32, np.int32, float, float, float, float, np.int32, np.int32, np.int32)
"""Of a request's index, rank, four times, input and output tokens, preemptions."""


class Recorder:
    """Appends rows during the run; `requests` and `steps` give them as arrays afterwards.

    Parameters
    ----------
    every_step : whether the log is never merged.
    """

    __slots__ = (
        "_gaps",
        "_merged_until_s",
        "_most",
        "_requests",
        "_served",
        "_steps",
        "_stored_gaps",
        "_stored_steps",
        "windows",
    )

    def __init__(self, *, every_step: bool = False) -> None:
        self._requests: list[bytes] = []
        self._served: list[tuple[NDArray[np.generic], ...]] = []
        """Requests before those, in columns of fitting types."""
        self._steps: list[bytes] = []
        self._gaps: list[bytes] = []
        self._stored_steps: list[Array] = []
        self._stored_gaps: list[Array] = []
        self._most = sys.maxsize if every_step else MOST_ROWS
        self._merged_until_s = 0.0
        self.windows = 0
        """Rows of steps stored, before any was merged."""

    def served(self, request: Request, rank: int, now: int) -> None:
        """A request had its last token."""
        r = request
        self._requests.append(
            _REQUEST(
                r.index,
                rank,
                r.arrival,
                r.admitted,
                r.first_token,
                now,
                r.input_tokens,
                r.output_tokens,
                r.preemptions,
            )
        )
        if len(self._requests) >= _AT_ONCE:
            self._store_requests()

    def unfinished(self, request: Request, rank: int) -> None:
        """A request was still here when the run ended."""
        r = request
        admitted, first = (t if t >= 0 else nan for t in (r.admitted, r.first_token))
        self._requests.append(
            _REQUEST(r.index, rank, r.arrival, admitted, first, nan, r.input_tokens, r.output_tokens, r.preemptions)
        )

    def refused(self, request: Request) -> None:
        """A request can never fit the KV cache."""
        self.unfinished(request, -1)

    def window(
        self, rank: int, start: int, steps: int, first: int, growth: int, decodes: int, computed: int, sampled: float,
        running: int, blocks: float,
    ) -> None:  # fmt: skip
        """One rank did ``steps`` like steps; ``blocks`` is their mean use."""
        self._steps.append(_STEP(rank, start, steps, first, growth, decodes, computed, sampled, running, blocks))
        if len(self._steps) >= _AT_ONCE:
            self._store_steps()

    def gap(self, now: int, gap: int, count: int = 1) -> None:
        """``count`` tokens came ``gap`` after the ones before them, more than their step took."""
        self._gaps.append(_GAP(now, gap, count))
        if len(self._gaps) >= _AT_ONCE:
            self._store_steps()

    def _store_requests(self) -> None:
        rows = _columns(self._requests, len(_TYPES), _REQUEST_TICKS)
        self._served.append(tuple(column.astype(kind) for column, kind in zip(rows.T, _TYPES, strict=True)))

    def _store_steps(self) -> None:
        """Convert what was gathered, and merge if that makes too many."""
        self.windows += len(self._steps)
        self._stored_steps.append(_columns(self._steps, 10, _STEP_TICKS))
        self._stored_gaps.append(_columns(self._gaps, 3, _GAP_TICKS))
        if max(sum(map(len, self._stored_steps)), sum(map(len, self._stored_gaps))) < self._most:
            return
        rows, gaps = np.concatenate(self._stored_steps), np.concatenate(self._stored_gaps)
        self._merged_until_s = float(rows[-1, 1])
        ranks = int(rows[:, 0].max()) + 1
        rows, gaps = merged(rows, gaps, max(1, self._most // (4 * ranks)))
        self._stored_steps, self._stored_gaps = [rows], [gaps]

    def requests(self) -> RequestTable:
        """All requests, in order of arrival."""
        self._store_requests()
        blocks, self._served = self._served, []
        order = np.argsort(np.concatenate([block[0] for block in blocks]), kind="stable")
        columns = [np.concatenate(kept)[order] for kept in zip(*blocks, strict=True)]
        self._served = [tuple(columns)]
        request, rank, arrival, scheduled, first, finished, inputs, outputs, preemptions = columns
        return RequestTable(
            request=request,
            rank=rank,
            arrival_s=arrival,
            first_scheduled_s=scheduled,
            first_token_s=first,
            finished_s=finished,
            input_tokens=inputs,
            output_tokens=outputs,
            preemptions=preemptions,
        )

    def steps(self) -> StepLog:
        """Windows of steps in order of their end, and the gaps longer than a step."""
        self._store_steps()
        rows, gaps = np.concatenate(self._stored_steps), np.concatenate(self._stored_gaps)
        return StepLog(
            rank=rows[:, 0],
            start_s=rows[:, 1],
            steps=rows[:, 2],
            first_s=rows[:, 3],
            growth_s=rows[:, 4],
            decodes=rows[:, 5],
            prompt_tokens=rows[:, 6],
            sampled=rows[:, 7],
            running=rows[:, 8],
            blocks=rows[:, 9],
            gap_end_s=gaps[:, 0],
            gap_s=gaps[:, 1],
            gap_count=gaps[:, 2],
            merged_until_s=self._merged_until_s,
        )


def _columns(rows: list[bytes], width: int, ticks: tuple[int, ...]) -> Array:
    """The rows as an array, ``ticks`` of their columns in seconds; the list is emptied."""
    columns = np.frombuffer(bytearray().join(rows)).reshape(-1, width)
    columns[:, ticks] *= S_PER_TICK
    rows.clear()
    return columns
