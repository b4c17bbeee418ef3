"""Replicas that serve whole requests: how many of a layout hold the objective, as screened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from simmoe.planning.objective import Limit
from simmoe.planning.option import Option, Side
from simmoe.planning.question import OPTIMISM, Layout, Question


def cheapest(layout: Layout, question: Question, limits: Sequence[Limit] | None = None) -> Option | None:
    """The layout with the fewest replicas that do, as screened; None: no affordable number does."""
    most = _most_replicas(layout, question)
    count = (
        layout.grid.replicas(question.rate, limits or question.limits, question.confidence, most) if most > 0 else None
    )
    return None if count is None else with_replicas(layout, question, count, limits)


def hopeful(layout: Layout, question: Question) -> Option | None:
    """The fewest replicas that would do if screening were pessimistic by `OPTIMISM`."""
    favoured = replace(layout, grid=replace(layout.grid, correction=layout.grid.correction * OPTIMISM))
    option = cheapest(favoured, question)
    return None if option is None else with_replicas(layout, question, option.replicas)


def grown(option: Option, question: Question) -> Option | None:
    """One replica more."""
    return with_replicas(option.layout, question, option.replicas + 1)


def most(layout: Layout, question: Question) -> Option | None:
    """As many replicas as may be bought."""
    count = _most_replicas(layout, question)
    return with_replicas(layout, question, count) if count > 0 else None


def with_replicas(
    layout: Layout, question: Question, count: int, limits: Sequence[Limit] | None = None
) -> Option | None:
    """An option with ``count`` replicas under load; None where that is more than may be bought."""
    if count > _most_replicas(layout, question):
        return None
    chosen, each = limits or question.limits, question.rate / count
    slack, binding = layout.grid.slack(each, chosen)
    return Option(
        sides=(Side(role="serve", layout=layout, replicas=count),),
        spares=question.spares,
        rate=question.rate,
        slack=slack,
        binding=binding,
        probability=layout.grid.probability(each, chosen),
        utilisation=each / layout.grid.saturation_requests_per_s,
        log_sigma=layout.grid.sigma(each),
    )


def _most_replicas(layout: Layout, question: Question) -> int:
    return question.affordable(layout.offer) // layout.replica.devices_per_replica - question.spares
