"""The cheapest deployment that holds a service objective, how surely, and what would change the answer.

Every layout of one replica on every offer is screened analytically over its loads; the fewest replicas that hold the
objective with the confidence asked for are a candidate, and so is every pair of a prefill and a decode layout with the
fewest replicas that capacity allows. Candidates are simulated from the cheapest up until one is confirmed; one that is
not gets another replica and goes back into the queue. So the answer is the cheapest of all that simulation confirms: an
offer more, a lower price or a looser objective cannot make it dearer.
Left out: mixed fleets, prices that depend on quantity, unlike replicas behind one router.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from simmoe.errors import SimmoeError
from simmoe.planning import co_located, disaggregated
from simmoe.planning.layouts import describe, layouts
from simmoe.planning.objective import Limit
from simmoe.planning.offers import Offer
from simmoe.planning.option import Option
from simmoe.planning.question import Layout, Question
from simmoe.planning.runner import run
from simmoe.planning.screen import screen
from simmoe.specs.deployment import Deployment
from simmoe.specs.model import Model
from simmoe.specs.workload import Workload

#: Simulated candidates after which a plan gives up on confirming. A backstop: a handful is usual.
MOST_TRIALS = 60
#: Replicas more of one pair of prefill and decode layouts before it is given up.
_MOST_GROWTH = 6


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The answer.

    Attributes
    ----------
    answer : cheapest option that simulation confirms; None: nothing holds the objective.
    runner_ups : the next best, dearer or less sure, each kind of hardware and of service at its best.
    rejected : cheaper ones that screening liked and simulation did not.
    closest : without an answer, what comes nearest, and why it does not do.
    layouts : everything screened.
    refused : how many layouts could not serve, by first words of the reason.
    """

    question: Question
    answer: Option | None
    runner_ups: tuple[Option, ...]
    rejected: tuple[Option, ...]
    closest: tuple[Option, str] | None
    layouts: tuple[Layout, ...]
    refused: tuple[tuple[str, str], ...]
    trials: int


def plan(
    question: Question,
    *,
    processes: int | None = 1,
    ray: str | None = None,
    progress: Callable[[str], None] | None = None,
    runner_ups: int = 4,
) -> Plan:
    """Answer a question.

    Parameters
    ----------
    processes, ray : where screening and runner-ups run, see `simmoe.planning.runner.run`; the answer is the same.
    progress : told in words what is being done.
    runner_ups : how many to simulate beside the answer.
    """
    tell = progress or (lambda _: None)
    found, refused = screen_all(question, processes=processes, ray=ray, progress=tell)
    queue = [option for layout in found if (option := co_located.hopeful(layout, question)) is not None]
    if question.split:
        queue += disaggregated.hopeful(found, question)
    order = itertools.count()
    heap = [(*option.rank, next(order), option) for option in queue]
    heapq.heapify(heap)
    answer, rejected, trials = None, [], 0
    while heap and answer is None and trials < MOST_TRIALS:
        option = heapq.heappop(heap)[-1]
        tell(f"simulating {option.name}")
        trials += 1
        tried = option.simulated(question)
        if tried.holds(question):
            answer = tried
            continue
        rejected.append(tried)
        before = sum(_layouts(option) == _layouts(tried) for option in rejected)
        more = _grown(tried, question) if before <= _MOST_GROWTH or not tried.split else None
        if more is not None:
            heapq.heappush(heap, (*more.rank, next(order), more))
    waiting = _runner_ups(answer, heap)[:runner_ups] if answer else []
    if waiting:
        tell(f"simulating {len(waiting)} runner-ups")
    others = sorted(
        run(_confirmed, [(option, question) for option in waiting], processes=processes, ray=ray),
        key=lambda option: option.rank,
    )
    return Plan(
        question=question,
        answer=answer,
        runner_ups=tuple(others),
        rejected=tuple(rejected),
        closest=None if answer else _closest(found, rejected, question),
        layouts=tuple(found),
        refused=tuple(refused),
        trials=trials + len(others),
    )


def screen_all(
    question: Question,
    *,
    processes: int | None = 1,
    ray: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[list[Layout], list[tuple[str, str]]]:
    """Every feasible layout of every model on every offer, and what was refused: (what, why)."""
    tasks, refused = [], []
    w = question.workload
    for offer, model in itertools.product(question.offers, question.models):
        feasible, not_feasible = layouts(
            offer.hardware, model, question.base,
            context_tokens=w.input.mean + w.output.mean, most_devices=question.replica_devices,
        )  # fmt: skip
        tasks += [(offer, model, replica, w, question.limits) for replica in feasible]
        refused += [(f"{model.name} on {offer.name}, {describe(one.replica)}", one.reason) for one in not_feasible]
    found = []
    for layout in run(_screen_one, tasks, processes=processes, ray=ray):
        if isinstance(layout, Layout):
            found.append(layout)
        else:
            refused.append(layout)
        if progress:
            progress(f"screening layouts {len(found)}/{len(tasks)}")
    return found, refused


def _screen_one(
    task: tuple[Offer, Model, Deployment, Workload, tuple[Limit, ...]],
) -> Layout | tuple[str, str]:
    offer, model, replica, workload, limits = task
    try:
        grid = screen(offer.hardware, model, replica, workload, limits)
    except SimmoeError as problem:
        return f"{model.name} on {offer.name}, {describe(replica)}", str(problem)
    return Layout(offer=offer, model=model, replica=replica, grid=grid)


def _grown(option: Option, question: Question) -> Option | None:
    """What is tried after an option that simulation turned down: one replica more; None: that cannot be bought."""
    return disaggregated.grown(option, question) if option.split else co_located.grown(option, question)


def _runner_ups(answer: Option, heap: list[tuple[float, int, bool, float, int, Option]]) -> list[Option]:
    """The next best: first one of every other offer and of the other kind of service, then the cheapest of the rest."""
    waiting = [entry[-1] for entry in sorted(heap, key=lambda entry: entry[:-1])]
    chosen: list[Option] = []
    seen = {_market(answer)}
    for option in waiting:
        if _market(option) not in seen:
            seen.add(_market(option))
            chosen.append(option)
    return chosen + [option for option in waiting if option not in chosen]


def _layouts(option: Option) -> tuple[tuple[str, int], ...]:
    return tuple((side.role, id(side.layout)) for side in option.sides)


def _market(option: Option) -> tuple[str, str, bool]:
    return option.offer.name, option.model.name, option.split


def _confirmed(task: tuple[Option, Question]) -> Option:
    """The option with as many more replicas as simulation asks for, within a few; else as it is, not confirmed."""
    option, question = task
    first = tried = option.simulated(question)
    for _ in range(3):
        if tried.holds(question):
            return tried
        more = _grown(tried, question)
        if more is None:
            break
        tried = more.simulated(question)
    return tried if tried.holds(question) else first


def _closest(found: Sequence[Layout], rejected: Sequence[Option], question: Question) -> tuple[Option, str] | None:
    """The option with the best chance among all affordable ones, and what it breaks."""
    options = [*rejected, *(option for layout in found if (option := co_located.most(layout, question)) is not None)]
    if not options:
        return None
    best = max(options, key=lambda option: (option.probability, -option.usd_per_hour))
    return best, best.binding
