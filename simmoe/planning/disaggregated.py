"""Prompts on replicas of their own: how many prefill and decode replicas hold the objective, and at what price.

For one offer, a prefill and a decode layout are chosen by what a device of each carries alone: prompt tokens a second,
and output tokens a second within the TPOT limit with steps as slow as the confidence asks for. Counts follow from the
load and grow, the binding side first, until a simulated run with the cache's transfer holds the objective.
Left out: unlike devices for the two sides, prefill and decode layouts beyond the best few of each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from simmoe.load_curve import decode_steps
from simmoe.metrics import ServingMetrics
from simmoe.planning.confirm import scaled
from simmoe.planning.layouts import describe
from simmoe.planning.objective import held
from simmoe.planning.search import Layout, Question
from simmoe.predict import Compiled, compiled_for
from simmoe.sim.cluster import simulate
from simmoe.sim.disaggregated import Handover, transfer_of
from simmoe.sim.pool import PoolSetup
from simmoe.specs.cluster import Disaggregation
from simmoe.specs.deployment import Deployment

_BEST = 2
_MOST_TRIALS = 6
#: Prefill replicas are first sized to this share of what they carry, to leave room for bursts.
_PREFILL_LOAD = 0.7


@dataclass(frozen=True, kw_only=True)
class Split:
    """A disaggregated deployment that simulation confirms at the confidence's step times.

    Attributes
    ----------
    metrics : simulated, at the step times predicted. Front end excluded.
    """

    offer_name: str
    model_name: str
    prefill: Deployment
    decode: Deployment
    spares: int
    usd_per_hour: float
    metrics: ServingMetrics

    @property
    def devices(self) -> int:
        """Both sides together, spares of each included. [devices]"""
        spare = self.spares * (self.prefill.devices_per_replica + self.decode.devices_per_replica)
        return self.prefill.gpus + self.decode.gpus + spare

    @property
    def name(self) -> str:
        """In words."""
        sides = (("prefill", self.prefill), ("decode", self.decode))
        spare = f" + {self.spares} spare" if self.spares else ""
        said = ", ".join(f"{side.replicas}{spare} {word} x ({describe(side)})" for word, side in sides)
        return f"{self.devices} x {self.offer_name}: {said}"


def split(question: Question, layouts: Sequence[Layout]) -> Split | None:
    """The cheapest disaggregated deployment found on any offer; None: none holds the objective within the means."""
    found = []
    for name, model in dict.fromkeys((layout.offer.name, layout.model.name) for layout in layouts):
        mine = [one for one in layouts if one.offer.name == name and one.model.name == model]
        one = _on_offer(question, mine)
        if one is not None:
            found.append(one)
    return min(found, key=lambda one: (one.usd_per_hour, one.devices), default=None)


def _on_offer(question: Question, layouts: Sequence[Layout]) -> Split | None:
    parts = {
        id(layout): compiled_for(layout.offer.hardware, layout.model, layout.replica, question.workload)
        for layout in layouts
    }
    slow = {id(layout): _slow_factor(question, layout) for layout in layouts}

    def prefill_rate(layout: Layout) -> float:
        return _prefill_per_s(question, layout, parts[id(layout)], slow[id(layout)])

    def decode_rate(layout: Layout) -> float:
        return _decode_per_s(question, layout.replica, parts[id(layout)], slow[id(layout)])

    def per_device(rate: float, layout: Layout) -> float:
        return rate / layout.replica.devices_per_replica

    first = sorted(layouts, key=lambda one: -per_device(prefill_rate(one), one))[:_BEST]
    second = sorted(
        (one for one in layouts if decode_rate(one) > 0), key=lambda one: -per_device(decode_rate(one), one)
    )[:_BEST]
    pairs = []
    for p in first:
        for d in second:
            counts = (
                math.ceil(question.rate / (_PREFILL_LOAD * prefill_rate(p))),
                math.ceil(question.rate / decode_rate(d)),
            )
            pairs.append((_devices(p, d, counts), p, d, counts))
    for _, p, d, counts in sorted(pairs, key=lambda entry: entry[0])[:_BEST]:
        done = _grown(question, p, d, counts, parts, max(slow[id(p)], slow[id(d)]))
        if done is not None:
            return done
    return None


def _grown(
    question: Question, p: Layout, d: Layout, counts: tuple[int, int], parts: dict[int, Compiled], slow: float
) -> Split | None:
    """Counts raised, the side that breaks its limit first, until the simulation holds the objective."""
    prefills, decodes = counts
    for _ in range(_MOST_TRIALS):
        devices = _devices(p, d, (prefills + question.spares, decodes + question.spares))
        usd = devices * p.offer.usd_per_device_hour
        affordable = devices <= min(question.most_devices, p.offer.available or devices)
        if not affordable or (question.budget_usd_per_hour is not None and usd > question.budget_usd_per_hour):
            return None
        prefill = p.replica.vary(gpus=prefills * p.replica.devices_per_replica)
        decode = d.replica.vary(gpus=decodes * d.replica.devices_per_replica)
        slower = _run(question, p, d, prefill, decode, parts, slow)
        if held(question.limits, slower):
            metrics = _run(question, p, d, prefill, decode, parts, 1.0)
            return Split(
                offer_name=p.offer.name,
                model_name=p.model.name,
                prefill=prefill,
                decode=decode,
                spares=question.spares,
                usd_per_hour=usd,
                metrics=metrics,
            )
        broken = [limit for limit in question.limits if limit.of(slower) > limit.seconds]
        if all(limit.metric == "ttft" for limit in broken):
            prefills += 1
        else:
            decodes += 1
    return None


def _run(
    question: Question,
    p: Layout,
    d: Layout,
    prefill: Deployment,
    decode: Deployment,
    parts: dict[int, Compiled],
    factor: float,
) -> ServingMetrics:
    rule = Disaggregation(decode=decode)
    theirs = parts[id(d)]
    handover = Handover(
        decode=PoolSetup(table=scaled(theirs.table, factor), deployment=decode, kv_tokens=theirs.memory.kv_tokens),
        transfer=transfer_of(p.model, prefill, rule, p.offer.hardware),
    )
    mine = parts[id(p)]
    return simulate(
        scaled(mine.table, factor), question.workload, prefill, mine.memory.kv_tokens,
        requests=question.requests, seed=question.seed, handover=handover,
    ).metrics  # fmt: skip


def _slow_factor(question: Question, layout: Layout) -> float:
    return math.exp(NormalDist().inv_cdf(question.confidence) * float(layout.grid.log_sigma[-1]))


def _prefill_per_s(question: Question, layout: Layout, parts: Compiled, slow: float) -> float:
    """Prompts a second of one replica that does nothing else: steps full of prompts. [1/s]"""
    table, tokens = parts.table, question.workload.input.mean
    most = min(layout.replica.tokens_per_replica, table.max_tokens)
    chunk = min(most, max(1, int(most // tokens)) * tokens)
    pairs = chunk * (tokens + 1) / 2
    attention = table.prefill_base_s + table.prefill_per_token_s * chunk + table.prefill_per_pair_s * pairs
    by_batches, shares = table.prompts
    prompts = min(max(1, int(chunk // tokens)), len(shares)) - 1
    step = float(by_batches[prompts, int(chunk)] + shares[prompts] * attention)
    return chunk / tokens / (step * slow)


def _decode_per_s(question: Question, deployment: Deployment, parts: Compiled, slow: float) -> float:
    """Requests a second that one replica decodes within the TPOT limit and its KV cache; 0: it cannot. [1/s]"""
    table, w = parts.table, question.workload
    context = w.input.mean + w.output.mean / 2
    most = min(table.max_requests, int(parts.memory.kv_tokens / (w.input.mean + w.output.mean)))
    if most < 1:
        return 0.0
    batch = np.unique(np.geomspace(1, most, 64).astype(int))
    step = slow * np.array([table.decode_s(int(b), b * context) for b in batch])
    limit = min((one.seconds for one in question.limits if one.metric in ("tpot", "itl")), default=math.inf)
    steps = decode_steps(w.output, deployment.tokens_per_decode)
    good = step * steps / max(w.output.mean - 1, 1) <= limit
    if not good.any():
        return 0.0
    return float((batch[good] / step[good]).max() / max(steps, 1))


def _devices(p: Layout, d: Layout, counts: tuple[int, int]) -> int:
    return counts[0] * p.replica.devices_per_replica + counts[1] * d.replica.devices_per_replica
