"""An exact clock: time in integer ticks of 2^-60 s, so that sums of step times do not depend on their order.

With integers, K decode steps summed in closed form are *equal* to the same steps added one at a time, ties between
events are real ties, and a fast-forwarded run can be compared with a step-by-step one by ``==``. A tick is
0.87 attoseconds: a table entry of 10 ns is kept to 1 part in 10^10. Python integers do not overflow.
Checked against: ``StepTable.step_s`` and the step-by-step twin in ``tests/reference/sim_stepwise.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt, sqrt

import numpy as np
from numpy.typing import NDArray

from simmoe.engine.step import StepTable, micro_batches
from simmoe.errors import SpecError

TICKS_PER_S = 1 << 60
S_PER_TICK = 2.0**-60


def to_ticks(seconds: float) -> int:
    """Nearest tick to a time in seconds. [ticks]"""
    return round(seconds * TICKS_PER_S)


def _all_to_ticks(seconds: NDArray[np.float64]) -> list[int]:
    """As `to_ticks`, for many; a scaling by a power of two loses nothing."""
    ticks: NDArray[np.float64] = np.rint(seconds * TICKS_PER_S)
    if ticks.max(initial=0.0) >= 2.0**63:  # a step of 8 s
        return [int(tick) for tick in ticks.tolist()]
    whole: list[int] = ticks.astype(np.int64).tolist()
    return whole


@dataclass(frozen=True, slots=True)
class TickTable:
    """A `StepTable` in ticks. ``decode[b]`` is the whole context-free part of a pure decode step of b requests.

    ``per_context`` and ``mixed_per_context`` are per grain of context (`kv_cache`). ``prompts[i]`` is of steps with
    i + 1 micro-batches of prompts: the part that depends on the tokens alone, and the prompts'
    attention (base, per new token, per pair, per cached token; and the longest walk's base and per token).
    """

    token: list[int]
    prompts: list[tuple[list[int], list[int]]]
    head: list[int]
    decode_base: list[int]
    decode: list[int]
    per_context: list[int]
    mixed_base: list[int]
    mixed_per_context: list[int]
    batch_tokens: int

    @classmethod
    def of(cls, table: StepTable, *, max_tokens: int, max_requests: int, grain: int = 1) -> TickTable:
        """Convert the part of ``table`` that batches of these limits can reach.

        Raises
        ------
        SpecError
            If the table is shorter than the limits, or a step would take no time.
        """
        width = table.rows_per_decode
        most_rows = max_requests * width
        if table.max_tokens < max_tokens or table.max_requests < max_requests or len(table.head_s) <= most_rows:
            raise SpecError(
                f"step table covers {table.max_tokens} tokens and {table.max_requests} requests; the deployment's "
                f"limits are {max_tokens} tokens and {max_requests} requests; compile the table for these"
            )
        token = _all_to_ticks(table.token_s[: max_tokens + 1])
        if min(token[1:]) <= 0:
            raise SpecError("step table: token_s must be > 0 for every step of one token or more")
        head = _all_to_ticks(table.head_s[: most_rows + 1])
        base = _all_to_ticks(table.decode_base_s[: max_requests + 1])
        slope = _all_to_ticks(table.decode_per_context_s[: max_requests + 1] / grain)
        mixed = [
            alone if part is None else _all_to_ticks(part[: max_requests + 1] / unit)
            for part, alone, unit in ((table.mixed_base_s, base, 1), (table.mixed_per_context_s, slope, grain))
        ]
        by_batches, shares = table.prompts
        tokens = [token]
        if len(by_batches) > 1:
            tokens = [_all_to_ticks(row[: max_tokens + 1]) for row in by_batches]
        terms = (*table.prefill_terms, table.prefill_walk_base_s, table.prefill_walk_s)
        attention = ([to_ticks(term * share) for term in terms] for share in shares.tolist())
        return cls(
            token=token,
            prompts=list(zip(tokens, attention, strict=True)),
            head=head,
            decode_base=base,
            decode=[t + h + b for t, h, b in zip(token[::width], head[::width], base, strict=False)],
            per_context=slope,
            mixed_base=mixed[0],
            mixed_per_context=mixed[1],
            batch_tokens=table.batch_tokens,
        )

    def micro_batches(self, chunks: int, rows: int) -> int:
        """Micro-batches of a step with so many prompt chunks, of the replica's rows; at most as many as stages."""
        stages = len(self.prompts)
        return 1 if stages == 1 else min(micro_batches(chunks, rows, self.batch_tokens), stages)


def window_ticks(first: int, growth: int, steps: int) -> int:
    """Duration of ``steps`` steps, the first taking ``first`` and each further one ``growth`` more. [ticks]"""
    return steps * first + growth * (steps * (steps - 1) // 2)


def steps_within(first: int, growth: int, elapsed: int) -> int:
    """Largest number of such steps that end by ``elapsed``; exact, for ``first >= growth >= 0`` and ``first > 0``.

    k steps fit if (2 growth k + a)^2 <= a^2 + 8 growth elapsed with a = 2 first - growth > 0, and the left side is
    the square of an integer, so the integer square root of the right decides.
    """
    if growth == 0:
        return elapsed // first
    a = 2 * first - growth
    return (isqrt(a * a + 8 * growth * elapsed) - a) // (2 * growth)


def boundary(first: int, growth: int, elapsed: int) -> tuple[int, int]:
    """Fewest such steps, at least one, that last ``elapsed`` or longer, and how long they last. [steps], [ticks]

    A float's guess, set right exactly: `steps_within` with its root of a large integer takes twice as long.
    """
    a = 2.0 * first - growth
    steps = int(4.0 * elapsed / (a + sqrt(a * a + 8.0 * growth * elapsed))) or 1
    ticks = steps * first + growth * (steps * (steps - 1) // 2)
    while ticks < elapsed:
        ticks += first + growth * steps
        steps += 1
    while steps > 1 and (fewer := ticks - first - growth * (steps - 1)) >= elapsed:
        ticks = fewer
        steps -= 1
    return steps, ticks
