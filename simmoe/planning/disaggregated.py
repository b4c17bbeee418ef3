"""Prompts on replicas of their own: how many prefill and decode replicas could hold the objective, and at what price.

A side's capacity is what a replica carries alone, with steps as slow as the confidence asks for: prompts a second in
steps full of them, and output tokens a second within the TPOT limit and the KV cache. The fewest replicas by capacity
are where a search starts; simulation with the cache's transfer says which side lacks one more.
Left out: unlike devices for the two sides, prefill layouts beyond those that read the most prompts a device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from simmoe.planning.objective import Limit
from simmoe.planning.option import Option, Side
from simmoe.planning.question import OPTIMISM, Layout, Question
from simmoe.predict import compiled_for
from simmoe.specs.workload import Workload
from simmoe.steady.load_curve import decode_steps
from simmoe.steady.step_times import StepTimes

#: Prefill layouts tried with every decode layout.
_PREFILL_LAYOUTS = 2
#: No queue of prompts is short beyond this share of what prefill replicas carry.
_MOST_PREFILL_LOAD = 0.9


@dataclass(frozen=True, slots=True)
class _Capacity:
    """What a replica of a layout carries as prefill and as decode side, at predicted step times. [1/s]"""

    layout: Layout
    prompts_per_s: float
    prompt_s: float
    sigma: float

    @property
    def prompts_per_device(self) -> float:
        return self.prompts_per_s / self.layout.replica.devices_per_replica


def hopeful(layouts: Sequence[Layout], question: Question) -> list[Option]:
    """Every pair of layouts of one offer, each with the fewest replicas that capacity allows, within the means."""
    found = []
    for key in dict.fromkeys((layout.offer.name, layout.model.name) for layout in layouts):
        mine = [one for one in layouts if (one.offer.name, one.model.name) == key]
        capacities = [_capacity(one, question.workload) for one in mine]
        best = sorted(capacities, key=lambda one: -one.prompts_per_device)[:_PREFILL_LAYOUTS]
        found += [
            option for p in best for d in mine if (option := _fewest(p, d, question, question.limits)) is not None
        ]
    return found


def grown(option: Option, question: Question) -> Option | None:
    """One replica more on the side whose limit the simulation broke; None: more than may be bought."""
    assert option.confirmation is not None
    seen = option.confirmation.slow_metrics
    broken = [limit for limit in question.limits if limit.of(seen) > limit.seconds]
    prefill = bool(broken) and all(limit.metric == "ttft" for limit in broken)
    counts = tuple(side.replicas + int((side.role == "prefill") == prefill) for side in option.sides)
    return pair(option.sides[0].layout, option.sides[1].layout, counts, question)


def pair(p: Layout, d: Layout, counts: Sequence[int], question: Question) -> Option | None:
    """An option with so many prefill and decode replicas; None: more than may be bought."""
    sigma = max(_sigma(p), _sigma(d))
    capacity = _capacity(p, question.workload)
    loads = (
        question.rate / (counts[0] * capacity.prompts_per_s),
        question.rate / max(counts[1] * _decode_per_s(d, question.workload, question.limits, 1.0), 1e-12),
    )
    slack = min(_MOST_PREFILL_LOAD / loads[0], 1 / loads[1])
    option = Option(
        sides=(Side(role="prefill", layout=p, replicas=counts[0]), Side(role="decode", layout=d, replicas=counts[1])),
        spares=question.spares,
        rate=question.rate,
        slack=slack,
        binding="prefill replicas" if loads[0] > loads[1] * _MOST_PREFILL_LOAD else "decode replicas",
        probability=NormalDist().cdf(math.log(slack) / max(sigma, 1e-9)),
        utilisation=max(loads),
        log_sigma=sigma,
    )
    return option if option.devices <= question.affordable(p.offer) else None


def _fewest(p: _Capacity, d: Layout, question: Question, limits: Sequence[Limit]) -> Option | None:
    slow = math.exp(NormalDist().inv_cdf(question.confidence) * max(p.sigma, _sigma(d))) / OPTIMISM
    first = min((one.seconds for one in limits if one.metric == "ttft"), default=math.inf)
    decode = _decode_per_s(d, question.workload, limits, slow)
    if p.prompt_s * slow > first or not decode:
        return None
    prefills = math.ceil(question.rate * slow / (_MOST_PREFILL_LOAD * p.prompts_per_s))
    return pair(p.layout, d, (prefills, math.ceil(question.rate / decode)), question)


def _sigma(layout: Layout) -> float:
    return float(layout.grid.log_sigma[-1])


def _capacity(layout: Layout, workload: Workload) -> _Capacity:
    """A replica that does nothing but steps full of prompts, each of which is one data-parallel rank's."""
    replica, tokens = layout.replica, workload.input.mean
    table = compiled_for(layout.offer.hardware, layout.model, replica, workload).table
    times = StepTimes(table, replica, workload)

    def step_s(chunk: float) -> float:
        return float(times.mixed_s(np.zeros(1), np.array([chunk]), np.ones(1))[0])

    most = min(replica.rank_tokens, table.max_tokens // replica.dp)
    alone = min(tokens, most)
    full = replica.dp * max(1, int(most // tokens)) * alone
    return _Capacity(layout, full / tokens / step_s(full), step_s(alone) * tokens / alone, _sigma(layout))


def _decode_per_s(layout: Layout, workload: Workload, limits: Sequence[Limit], slow: float) -> float:
    """Requests a second that one replica decodes within the TPOT limit and its KV cache; 0: it cannot. [1/s]"""
    parts = compiled_for(layout.offer.hardware, layout.model, layout.replica, workload)
    table, w = parts.table, workload
    context = w.input.mean + w.output.mean / 2
    most = min(table.max_requests, int(parts.memory.kv_tokens / (w.input.mean + w.output.mean)))
    if most < 1:
        return 0.0
    batch = np.unique(np.geomspace(1, most, 64).astype(int))
    step = slow * np.array([table.decode_s(int(b), b * context) for b in batch])
    limit = min((one.seconds for one in limits if one.metric in ("tpot", "itl")), default=math.inf)
    steps = decode_steps(w.output, layout.replica.tokens_per_decode)
    good = step * steps / max(w.output.mean - 1, 1) <= limit
    if not good.any():
        return 0.0
    return float((batch[good] / step[good]).max() / max(steps, 1))
