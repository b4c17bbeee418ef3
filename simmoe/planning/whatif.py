"""What would change a plan's answer: price, objective, confidence, load, spares, and how many experts are activated.

All by screening, from the grids the plan already has; only caps on active experts are screened anew. What simulation
said of a layout's slack corrects its screened one; layouts not simulated get the median correction of those that were
and are alike in having data-parallel ranks or not. Pairs of prefill and decode layouts are taken to need as many more
replicas than capacity allows as those did that were simulated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import median

from simmoe import quality
from simmoe.errors import SimmoeError
from simmoe.planning import co_located, disaggregated
from simmoe.planning.confirm import Confirmation
from simmoe.planning.layouts import describe
from simmoe.planning.objective import Limit, held
from simmoe.planning.option import Option
from simmoe.planning.question import Layout, Question
from simmoe.planning.screen import screen
from simmoe.planning.search import Plan
from simmoe.predict import default_caps


@dataclass(frozen=True, slots=True)
class Change:
    """A change of the question and the answer it would bring.

    Attributes
    ----------
    change : in words.
    answer : in words; None: the same.
    usd_per_hour : what it would cost; None where a price is what changes. [USD/h]
    """

    change: str
    answer: str
    usd_per_hour: float | None = None


@dataclass(frozen=True)
class Market:
    """What could be bought instead, as screened and corrected by what simulation said."""

    plan: Plan
    layouts: tuple[Layout, ...]
    growth: float

    @classmethod
    def of(cls, plan: Plan) -> Market:
        """The layouts a plan screened, with what its simulations said."""
        return cls(plan, tuple(_corrected(plan)), _growth(plan))

    def best(self, question: Question) -> tuple[float, Option] | None:
        """(price, option): the cheapest for a question like the plan's. [USD/h]"""
        found = [co_located.cheapest(layout, question) for layout in self.layouts]
        options = [(option.usd_per_hour, option) for option in found if option is not None]
        if question.split:
            options += [
                (option.usd_per_hour * self.growth, option)
                for option in disaggregated.hopeful(self.layouts, question)
                if not self.refuted(option, question)
            ]
        return min(options, key=lambda entry: (entry[0], *entry[1].rank), default=None)

    def refuted(self, option: Option, question: Question) -> bool:
        """Whether simulation turned down as many or more of these pairs of layouts."""
        wanted = [_identity(side.layout) for side in option.sides]
        for tried in _tried(self.plan):
            seen = tried.confirmation
            assert seen is not None
            if (
                wanted == [_identity(side.layout) for side in tried.sides]
                and option.devices * self.growth <= tried.devices
                and not _held(seen, question, self.plan.question)
            ):
                return True
        return False

    def named(self, option: Option) -> str:
        """In words; of what simulation would ask more replicas of, about how many devices."""
        if not option.split or self.growth == 1.0:
            return option.name
        layouts = " and ".join(f"{side.role} x ({describe(side.layout.replica)})" for side in option.sides)
        return f"about {option.devices * self.growth:.0f} x {option.offer.name}: {layouts}"


def _held(seen: Confirmation, question: Question, simulated: Question) -> bool:
    """Whether a simulation made for one question also answers another with yes; other limits, at its confidence."""
    if question.limits == simulated.limits:
        return seen.confirms(question.confidence)
    return held(question.limits, seen.slow_metrics)


def changes(plan: Plan) -> list[Change]:
    """Changes of the question that matter, each with the screened answer."""
    if plan.answer is None:
        return []
    market = Market.of(plan)
    return [*_prices(plan), *_objectives(market), *_confidence(market), _load(market), *_spare(market), *_caps(market)]


def _tried(plan: Plan) -> list[Option]:
    return [option for option in (plan.answer, *plan.runner_ups, *plan.rejected) if option and option.confirmation]


def _corrected(plan: Plan) -> list[Layout]:
    known: dict[tuple[str, str, str], list[float]] = {}
    alike: dict[bool, list[float]] = {}
    for option in _tried(plan):
        if option.split:
            continue
        assert option.confirmation is not None
        ratio = option.confirmation.slack / option.slack
        known.setdefault(_identity(option.layout), []).append(ratio)
        alike.setdefault(option.layout.replica.dp > 1, []).append(ratio)
    found = []
    for layout in plan.layouts:
        ratios = known.get(_identity(layout)) or alike.get(layout.replica.dp > 1) or [1.0]
        found.append(replace(layout, grid=replace(layout.grid, correction=median(ratios))))
    return found


def _growth(plan: Plan) -> float:
    """Devices of pairs that hold the objective over the fewest that capacity allows, the median of those known. [-]"""
    first = {
        tuple(id(side.layout) for side in option.sides): option
        for option in (disaggregated.hopeful(plan.layouts, plan.question) if plan.question.split else ())
    }
    ratios = []
    for option in _tried(plan):
        start = first.get(tuple(id(side.layout) for side in option.sides))
        if start is not None and option.holds(plan.question):
            ratios.append(option.devices / start.devices)
    return median(ratios) if ratios else 1.0


def _identity(layout: Layout) -> tuple[str, str, str]:
    return layout.offer.name, layout.model.name, describe(layout.replica)


def _prices(plan: Plan) -> list[Change]:
    """At what price each other kind of hardware would win."""
    answer = plan.answer
    assert answer is not None
    found = []
    for offer in plan.question.offers:
        if offer.name == answer.offer.name:
            continue
        others = [
            option
            for option in plan.runner_ups
            if option.offer.name == offer.name and option.probability >= plan.question.confidence
        ]
        if not others:
            continue
        fewest = min(option.devices for option in others)
        price = answer.usd_per_hour / fewest
        found.append(
            Change(
                f"{offer.name} below {price:.2f} USD a device-hour (now {offer.usd_per_device_hour:.2f})",
                f"{fewest} x {offer.name}",
            )
        )
    return found


def _objectives(market: Market) -> list[Change]:
    found = []
    question = market.plan.question
    for limit in question.limits:
        for factor in (0.5, 0.8, 1.25, 2.0):
            changed = Limit(limit.metric, limit.statistic, limit.seconds * factor)
            limits = tuple(changed if one == limit else one for one in question.limits)
            found.append(_asked(market, str(changed), replace(question, limits=limits), tighter=factor < 1))
    return [change for change in found if change is not None]


def _confidence(market: Market) -> list[Change]:
    found = []
    question = market.plan.question
    for confidence in (0.5, 0.99):
        asked = replace(question, confidence=confidence)
        found.append(_asked(market, f"confidence {confidence:.0%}", asked, tighter=confidence > question.confidence))
    return [change for change in found if change is not None]


def _load(market: Market) -> Change:
    """The largest load the answer carries with the confidence asked for; of prefill and decode apart, at least.

    Apart: steps slower by f at a load are those of f times the load, and all times f times as long: what withstands f
    still holds at f times the load.
    """
    answer, question = market.plan.answer, market.plan.question
    assert answer is not None
    assert answer.confirmation is not None
    if answer.split:
        most = question.rate * max(answer.confirmation.slack / answer.confirmation.slow_factor, 1.0)
    else:
        most = _carried(market, answer)
    side = answer.sides[-1]
    more = side.layout.replica.devices_per_replica * answer.offer.usd_per_device_hour
    which = f"another {side.role} replica" if answer.split else "another replica"
    return Change(f"more than {most:.3g} requests/s", which, answer.usd_per_hour + more)


def _carried(market: Market, answer: Option) -> float:
    """Largest load of co-located replicas, by the grid that simulation corrected. [1/s]"""
    question = market.plan.question
    known = next((one for one in market.layouts if _identity(one) == _identity(answer.layout)), answer.layout)
    low, high = question.rate, 20 * question.rate
    for _ in range(30):
        middle = (low * high) ** 0.5
        each = middle / answer.replicas
        good = (
            each < known.grid.saturation_requests_per_s
            and known.grid.probability(each, question.limits) >= question.confidence
        )
        low, high = (middle, high) if good else (low, middle)
    return low


def _spare(market: Market) -> list[Change]:
    question, answer = market.plan.question, market.plan.answer
    if question.spares:
        return []
    assert answer is not None
    own = replace(answer, spares=1)  # the answer itself with another replica always does
    name, price = own.name, own.usd_per_hour
    other = market.best(replace(question, spares=1))
    if other is not None and answer.usd_per_hour < other[0] < price:
        price, name = other[0], market.named(other[1])
    return [Change("one spare replica" + (" of each kind" if answer.split else ""), name, price)]


def _caps(market: Market) -> list[Change]:
    """The answer's layouts with fewer active experts; quality falls, see `simmoe.quality`."""
    answer, question = market.plan.answer, market.plan.question
    assert answer is not None
    experts = answer.model.experts
    if experts is None:
        return []
    now = answer.layout.replica.active_experts or experts.top_k
    found = []
    for cap in (cap for cap in default_caps(answer.model) if cap < now):
        try:
            capped = [_capped(side.layout, cap, market) for side in answer.sides]
        except SimmoeError:
            continue
        if answer.split:
            pairs = [
                option
                for option in disaggregated.hopeful(capped, question)
                if all(side.layout is layout for side, layout in zip(option.sides, capped, strict=True))
            ]
            option = min(pairs, key=lambda one: one.rank, default=None)
            price = option.usd_per_hour * market.growth if option else 0.0
        else:
            option = co_located.cheapest(capped[0], question)
            price = option.usd_per_hour if option else 0.0
        if option is not None:
            grid, native = capped[-1].grid, answer.layout.grid
            gain = grid.saturation_requests_per_s / native.saturation_requests_per_s - 1
            cost = quality.in_words(answer.model.name, active_experts=cap, native=experts.top_k)
            what = f"{market.named(option)}, saturation {100 * gain:+.0f} %; {cost}"
            # fewer experts are less work in every step: they never cost more
            found.append(Change(f"{cap} active experts instead of {now}", what, min(price, answer.usd_per_hour)))
    return found


def _capped(layout: Layout, cap: int, market: Market) -> Layout:
    """A layout with fewer active experts, with what simulation said of it with all."""
    question = market.plan.question
    replica = layout.replica.vary(active_experts=cap)
    grid = screen(layout.offer.hardware, layout.model, replica, question.workload, question.limits)
    known = next((one for one in market.layouts if _identity(one) == _identity(layout)), layout)
    return replace(layout, replica=replica, grid=replace(grid, correction=known.grid.correction))


def _asked(market: Market, change: str, question: Question, *, tighter: bool) -> Change | None:
    found = market.best(question)
    if found is None:
        return Change(change, "nothing holds it")
    answer = market.plan.answer
    assert answer is not None
    price, option = found
    # screening may like what simulation never saw: what asks for more cannot cost less, nor less more
    if math.isclose(price, answer.usd_per_hour) or tighter == (price < answer.usd_per_hour):
        return None
    return Change(change, market.named(option), price)
