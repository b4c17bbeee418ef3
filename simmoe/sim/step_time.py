"""Time of the step that schedulers have planned, read from the table: the seam to the engine.

One rank: the table's own formula, in ticks. Several data-parallel ranks: the table counts tokens and requests of the
whole replica and splits them evenly, so a rank's batch is timed as if every rank had the same; the step waits for the
slowest in each of its parts. Only where ranks share experts does the part that depends on the token count take the
tokens there are, for then all ranks' tokens meet at the experts. Left out: that dense layers and gates of a rank with
more tokens than the mean take longer than the mean there.
Checked in: tests/test_sim_replica.py, tests/reference/sim_stepwise.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from simmoe.sim.scheduler import Scheduler
from simmoe.sim.ticks import TickTable, to_ticks


def single_step(table: TickTable, s: Scheduler) -> tuple[int, int]:
    """Time of a rank's planned step, and what each further decode step takes more. [ticks]"""
    decoding = s.stepping
    if not s.chunks:
        slope = table.per_context[decoding]
        return table.decode[decoding] + slope * s.context, slope * decoding * s.stride
    token, attention = table.prompts[_micro_batches(table, s, 1) - 1]
    tokens, sampled, prefill = _chunks(attention, s, 1)
    rows = decoding * s.width
    time = token[tokens + rows] + table.head[sampled + rows] + prefill
    if decoding:
        time += table.mixed_base[decoding] + table.mixed_per_context[decoding] * s.context
    return (_with_loads(time, [s]) if s.loading else time), 0


def lockstep(table: TickTable, ranks: Sequence[Scheduler], steps: int, *, exchange: bool) -> tuple[int, int, int]:
    """First step's time and growth of ranks that step together, and for how many of ``steps`` both hold. [ticks]

    The slowest rank's decode attention is a maximum of lines in the step's number; the window ends where another
    line takes over.
    """
    dp = len(ranks)
    most_tokens = all_tokens = most_sampled = slowest_prefill = 0
    fewest = min((_micro_batches(table, s, dp) for s in ranks if s.chunks), default=0)
    lines = []
    for s in ranks:
        tokens, sampled, prefill = (0, 0, 0)
        if s.chunks:
            tokens, sampled, prefill = _chunks(table.prompts[_micro_batches(table, s, dp) - 1][1], s, dp)
        b = s.stepping
        rows = b * s.width
        all_tokens += tokens + rows
        most_tokens = max(most_tokens, tokens + rows)
        most_sampled = max(most_sampled, sampled + rows)
        slowest_prefill = max(slowest_prefill, prefill)
        base, slope = (
            (table.mixed_base, table.mixed_per_context) if s.chunks else (table.decode_base, table.per_context)
        )
        each = slope[dp * b]
        lines.append((base[dp * b] + each * dp * s.context, each * dp * b * s.stride) if b else (0, 0))
    first, growth = max(lines)
    for other_first, other_growth in lines:
        if other_growth > growth:
            steps = min(steps, (first - other_first) // (other_growth - growth) + 1)
    token = table.prompts[fewest - 1][0] if fewest else table.token
    common = token[all_tokens if exchange else dp * most_tokens] + table.head[dp * most_sampled] + slowest_prefill
    return (_with_loads(common + first, ranks) if any(s.loading for s in ranks) else common + first), growth, steps


def _with_loads(time: int, ranks: Sequence[Scheduler]) -> int:
    """A step that also loads from host memory: all ranks at once, each over its own links. [ticks]"""
    tier = ranks[0].tier
    assert tier is not None
    load = to_ticks(tier.latency_s) + to_ticks(tier.seconds_per_token) * max(s.loading for s in ranks)
    return max(time, load) if tier.layerwise else time + load


def _micro_batches(table: TickTable, s: Scheduler, dp: int) -> int:
    """Micro-batches that a rank's planned step makes, at most as many as there are pipeline stages."""
    if len(table.prompts) == 1:
        return 1
    rows = s.stepping * s.width + sum(new for _, new, _ in s.chunks)
    return table.micro_batches(len(s.chunks), dp * rows)


def _chunks(attention: list[int], s: Scheduler, dp: int) -> tuple[int, int, int]:
    """Prompt tokens, prompts that end, and attention time of the planned chunks. [tokens], [requests], [ticks]

    ``attention`` spreads a replica's prompts over its ``dp`` ranks; one rank's are timed as if each rank had as many.
    """
    tokens = sampled = pairs = before = longest = 0
    for request, new, cached in s.chunks:
        tokens += new
        sampled += cached + new == request.target
        pairs += new * (new + 1) // 2
        if new > 1:  # one token alone, as after a transfer, attends as a decode does
            longest = max(longest, cached + new)
            before += cached
        if cached:
            pairs += new * cached
    return tokens, sampled, prompts_attention(attention, dp, tokens, pairs, before, longest)


def prompts_attention(terms: list[int], dp: int, tokens: int, pairs: int, cached: int, longest: int) -> int:
    """Attention of prompt chunks on each of ``dp`` ranks, by the ``terms`` of `TickTable.prompts`. [ticks]

    Parameters
    ----------
    tokens, pairs, cached : computed, attended and cached before, of all chunks.
    longest : context of the chunk with most, of those longer than a token.
    """
    base, per_new, per_pair, per_cached, walk_base, walk = terms
    summed = base + dp * (per_new * tokens + per_pair * pairs + per_cached * cached)
    return max(summed, dp * (walk_base + walk * longest))
