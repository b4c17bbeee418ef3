"""What a run leaves behind: a row per request and one per window of like steps, in columns.

A window of K decode steps is one row (first step's time, growth per step), so the rows grow with arrivals and
completions, not with tokens; still every single step's time can be read back exactly. Beyond `MOST_ROWS` of them the
log is merged (`merging`) unless every step is asked for, so it stays bounded; requests take 52 B each.
"""

from __future__ import annotations

import sys
from array import array
from math import nan

import numpy as np
from numpy.typing import NDArray

from simmoe.metrics import RequestTable, StepLog
from simmoe.sim.merging import merged
from simmoe.sim.request import Request
from simmoe.sim.ticks import S_PER_TICK

MOST_ROWS = 1 << 18
"""Rows of steps (80 B each), and of gaps, that are kept one by one: of some 150,000 requests or more."""

_ROW, _GAP, _REQUEST = 10, 3, 9
_BLOCK = _REQUEST << 14
_TYPES = (np.int32, np.int32, float, float, float, float, np.int32, np.int32, np.int32)
"""Of a request's index, rank, four times, input and output tokens, preemptions."""


class Recorder:
    """Appends rows during the run; `requests` and `steps` give them as arrays afterwards.

    Parameters
    ----------
    every_step : whether the log is never merged.
    """

    __slots__ = ("_blocks", "_gaps", "_merged_until_s", "_most", "_requests", "_steps")

    def __init__(self, *, every_step: bool = False) -> None:
        self._requests = array("d")
        self._blocks: list[tuple[NDArray[np.generic], ...]] = []
        """Requests before those, in columns of fitting types."""
        self._steps = array("d")
        self._gaps = array("d")
        self._most = sys.maxsize if every_step else MOST_ROWS
        self._merged_until_s = 0.0

    def served(self, request: Request, rank: int, now: int) -> None:
        """A request had its last token."""
        self._requests.extend(
            (
                request.index,
                rank,
                request.arrival * S_PER_TICK,
                request.admitted * S_PER_TICK,
                request.first_token * S_PER_TICK,
                now * S_PER_TICK,
                request.input_tokens,
                request.output_tokens,
                request.preemptions,
            )
        )
        if len(self._requests) >= _BLOCK:
            self._store()

    def unfinished(self, request: Request, rank: int) -> None:
        """A request was still here when the run ended."""
        self._without_end(request, rank)

    def refused(self, request: Request) -> None:
        """A request can never fit the KV cache."""
        self._without_end(request, -1)

    def _without_end(self, r: Request, rank: int) -> None:
        admitted, first = (t * S_PER_TICK if t >= 0 else nan for t in (r.admitted, r.first_token))
        self._requests.extend(
            (
                r.index,
                rank,
                r.arrival * S_PER_TICK,
                admitted,
                first,
                nan,
                r.input_tokens,
                r.output_tokens,
                r.preemptions,
            )
        )

    def _store(self) -> None:
        rows = np.array(self._requests).reshape(-1, _REQUEST)
        self._blocks.append(tuple(column.astype(kind) for column, kind in zip(rows.T, _TYPES, strict=True)))
        self._requests = array("d")

    def window(
        self, rank: int, start: int, steps: int, first: int, growth: int, decodes: int, computed: int, sampled: float,
        running: int, blocks: float,
    ) -> None:  # fmt: skip
        """One rank did ``steps`` like steps; ``blocks`` is their mean use."""
        rows = self._steps
        rows.extend(
            (
                rank,
                start * S_PER_TICK,
                steps,
                first * S_PER_TICK,
                growth * S_PER_TICK,
                decodes,
                computed,
                sampled,
                running,
                blocks,
            )
        )
        if len(rows) >= self._most * _ROW:
            self._merge()

    def gap(self, now: int, gap: int, count: int = 1) -> None:
        """``count`` tokens came ``gap`` after the ones before them, more than their step took."""
        self._gaps.extend((now * S_PER_TICK, gap * S_PER_TICK, count))
        if len(self._gaps) >= self._most * _GAP:
            self._merge()

    def _merge(self) -> None:
        rows, gaps = (np.array(kept).reshape(-1, n) for kept, n in ((self._steps, _ROW), (self._gaps, _GAP)))
        ranks = int(rows[:, 0].max()) + 1
        self._merged_until_s = float(rows[-1, 1])
        rows, gaps = merged(rows, gaps, max(1, self._most // (4 * ranks)))
        self._steps, self._gaps = array("d", rows.tobytes()), array("d", gaps.tobytes())

    def requests(self) -> RequestTable:
        """All requests, in order of arrival."""
        self._store()
        blocks, self._blocks = self._blocks, []
        index = np.concatenate([block[0] for block in blocks])
        order = np.argsort(index, kind="stable")
        columns = [np.concatenate([block[i] for block in blocks])[order] for i in range(_REQUEST)]
        self._blocks = [tuple(columns)]
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
        rows = np.frombuffer(self._steps, dtype=float).reshape(-1, 10) if self._steps else np.empty((0, 10))
        gaps = np.frombuffer(self._gaps, dtype=float).reshape(-1, 3) if self._gaps else np.empty((0, 3))
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
