"""Routers by name: which rank a new request goes to.

A router is made from a random stream and called as ``(request, outstanding, taking) -> rank``: ``outstanding`` counts
each rank's requests that wait or run, ``taking`` lists the ranks that take new ones, in rising order. Ties go to the
lowest rank.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from simmoe.errors import SpecError
from simmoe.sim.request import Request

Router = Callable[[Request, Sequence[int], Sequence[int]], int]

#: SGLang router's defaults: least share of the prompt that must match, and when load goes before affinity
MATCH_SHARE, IMBALANCE_REQUESTS, IMBALANCE_RATIO = 0.5, 32, 1.5
#: heads remembered by `prefix_aware`, least recently used first out
REMEMBERED = 1 << 20


def round_robin(_: np.random.Generator) -> Router:
    """In turn."""
    turn = -1

    def route(_: Request, __: Sequence[int], taking: Sequence[int]) -> int:
        nonlocal turn
        turn = (turn + 1) % len(taking)
        return taking[turn]

    return route


def least_outstanding(_: np.random.Generator) -> Router:
    """To the rank with the fewest requests (join the shortest queue)."""

    def route(_: Request, outstanding: Sequence[int], taking: Sequence[int]) -> int:
        return min(taking, key=outstanding.__getitem__)

    return route


def power_of_two(rng: np.random.Generator) -> Router:
    """To the less loaded of two ranks drawn at random (Mitzenmacher, IEEE TPDS 12(10), 2001)."""

    def route(_: Request, outstanding: Sequence[int], taking: Sequence[int]) -> int:
        ranks = len(taking)
        if ranks == 1:
            return taking[0]
        first = int(rng.integers(ranks))
        second = (first + 1 + int(rng.integers(ranks - 1))) % ranks
        return min(taking[first], taking[second], key=lambda r: (outstanding[r], r))

    return route


def prefix_aware(_: np.random.Generator) -> Router:
    """To the rank that last served the longest head of this prompt, if that is much of it and the load is even.

    As the cache-aware policy of SGLang's router, which keeps a tree of sent prompts per rank; else to the rank with the
    fewest requests. It remembers what it sent, not what the ranks have evicted since.
    """
    sent: OrderedDict[tuple[object, int, int], int] = OrderedDict()

    def route(request: Request, outstanding: Sequence[int], taking: Sequence[int]) -> int:
        loads = [outstanding[r] for r in taking]
        low, high = min(loads), max(loads)
        heads: list[tuple[object, int, int]] = []
        head: object = 0
        for identity, tokens in request.prompt:
            head = (hash(head), identity, tokens)
            heads.append(head)
        chosen = taking[loads.index(low)]
        if high - low <= IMBALANCE_REQUESTS or high <= IMBALANCE_RATIO * low:
            matched = request.input_tokens
            covered = sum(tokens for *_, tokens in heads)
            matched = min(matched, covered)
            for key in reversed(heads):
                if matched < MATCH_SHARE * request.input_tokens:
                    break
                if (known := sent.get(key, -1)) in taking:
                    chosen = known
                    break
                matched -= key[2]
        for key in heads:
            sent[key] = chosen
            sent.move_to_end(key)
        while len(sent) > REMEMBERED:
            sent.popitem(last=False)
        return chosen

    return route


ROUTERS: dict[str, Callable[[np.random.Generator], Router]] = {
    "round_robin": round_robin,
    "least_outstanding": least_outstanding,
    "power_of_two": power_of_two,
    "prefix_aware": prefix_aware,
}


def router_named(name: str, rng: np.random.Generator) -> Router:
    """A fresh router called ``name``.

    Raises
    ------
    SpecError
        If there is none.
    """
    if name not in ROUTERS:
        raise SpecError(f"router {name!r} is unknown; known: {', '.join(sorted(ROUTERS))}")
    return ROUTERS[name](rng)
