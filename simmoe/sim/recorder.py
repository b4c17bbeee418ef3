"""What a run leaves behind: one row per request and one per window of like steps, in flat columns of floats.

A window of K decode steps is one row (first step's time, growth per step), so the rows grow with arrivals and
completions, not with tokens; still every single step's time can be read back exactly.
"""

from __future__ import annotations

from array import array
from math import nan

import numpy as np

from simmoe.metrics import RequestTable, StepLog
from simmoe.sim.scheduler import Request
from simmoe.sim.ticks import S_PER_TICK


class Recorder:
    """Appends rows during the run; `requests` and `steps` give them as arrays afterwards."""

    __slots__ = ("_gaps", "_others", "_requests", "_steps")

    def __init__(self) -> None:
        self._requests = array("d")
        self._steps = array("d")
        self._gaps = array("d")
        self._others: list[tuple[float, ...]] = []

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

    def unfinished(self, request: Request, rank: int) -> None:
        """A request was still here when the run ended."""
        self._others.append(self._without_end(request, rank))

    def refused(self, request: Request) -> None:
        """A request can never fit the KV cache."""
        self._others.append(self._without_end(request, -1))

    @staticmethod
    def _without_end(r: Request, rank: int) -> tuple[float, ...]:
        admitted, first = (t * S_PER_TICK if t >= 0 else nan for t in (r.admitted, r.first_token))
        return (
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

    def window(
        self, rank: int, start: int, steps: int, first: int, growth: int, decodes: int, computed: int, sampled: float,
        running: int, blocks: float,
    ) -> None:  # fmt: skip
        """One rank did ``steps`` like steps; ``blocks`` is their mean use."""
        self._steps.extend(
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

    def gap(self, now: int, gap: int, count: int = 1) -> None:
        """``count`` tokens came ``gap`` after the ones before them, more than their step took."""
        self._gaps.extend((now * S_PER_TICK, gap * S_PER_TICK, count))

    def requests(self) -> RequestTable:
        """All requests, in order of arrival."""
        rows = np.array(self._requests, dtype=float).reshape(-1, 9)
        if self._others:
            rows = np.concatenate([rows, np.array(self._others, dtype=float)])
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        return RequestTable(
            request=rows[:, 0].astype(np.int64),
            rank=rows[:, 1].astype(np.int64),
            arrival_s=rows[:, 2],
            first_scheduled_s=rows[:, 3],
            first_token_s=rows[:, 4],
            finished_s=rows[:, 5],
            input_tokens=rows[:, 6],
            output_tokens=rows[:, 7],
            preemptions=rows[:, 8],
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
        )
