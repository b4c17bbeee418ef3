"""Routing mechanisms the slow way: draw every token's experts, apply the rule, count."""

from __future__ import annotations

import math

import numpy as np

from simmoe.routing.sampling import sample_choices

Rng = np.random.Generator


def counts_of(choices: list[np.ndarray], num_experts: int) -> np.ndarray:
    """Tokens of each expert; choices: one array of experts per token."""
    return np.bincount(np.concatenate(choices), minlength=num_experts)


def refill(rng: Rng, tokens: int, num_experts: int, picked: int, top_k: int) -> np.ndarray:
    """Tokens of each expert when tokens pick few and top up from what the batch woke."""
    first = [rng.permutation(num_experts)[:picked] for _ in range(tokens)]
    woken = np.unique(np.concatenate(first))
    full = []
    for mine in first:
        others = rng.permutation(np.setdiff1d(woken, mine))[: top_k - picked]
        full.append(np.concatenate([mine, others]))
    return counts_of(full, num_experts)


def adaptive(rng: Rng, tokens: int, weights: np.ndarray, shares: dict[int, float]) -> np.ndarray:
    """Tokens of each expert when a token takes j experts with chance shares[j]."""
    sizes = rng.choice(list(shares), size=tokens, p=list(shares.values()))
    return counts_of([sample_choices(rng, 1, weights, int(j))[0] for j in sizes], len(weights))


def entropy_gate(rng: Rng, num_experts: int, top_k: int, share: float, spread: float, *, sigmoid: bool) -> int:
    """Experts one token keeps: as many as a share of exp(entropy) of its top-k weights, rounded up."""
    logits = [float(spread * rng.standard_normal()) for _ in range(num_experts)]
    best = sorted(logits, reverse=True)[:top_k]
    scores = [1 / (1 + math.exp(-x)) if sigmoid else math.exp(x) for x in best]
    weights = [score / sum(scores) for score in scores]
    entropy = -sum(weight * math.log(weight) for weight in weights)
    return max(1, min(top_k, math.ceil(share * math.exp(entropy))))


def domains(rng: Rng, tokens: int, laws: list[np.ndarray], shares: list[float], top_k: int) -> np.ndarray:
    """Tokens of each expert when every token belongs to one domain and picks by its law."""
    which = rng.choice(len(laws), size=tokens, p=shares)
    return counts_of([sample_choices(rng, 1, laws[m], top_k)[0] for m in which], len(laws[0]))


def tasks(rng: Rng, tokens: int, num_experts: int, top_k: int, num_tasks: int) -> np.ndarray:
    """Tokens of each expert when every task has its own k experts."""
    experts_of = [rng.permutation(num_experts)[:top_k] for _ in range(num_tasks)]
    return counts_of([experts_of[task] for task in rng.integers(num_tasks, size=tokens)], num_experts)


def over_copies(rng: Rng, counts: np.ndarray, slot_expert: np.ndarray, slot_rank: np.ndarray) -> np.ndarray:
    """Pairs of each rank when every token of an expert goes to one of its copies at random."""
    pairs = np.zeros(slot_rank.max() + 1)
    for expert, count in enumerate(counts):
        slots = np.flatnonzero(slot_expert == expert)
        np.add.at(pairs, slot_rank[rng.choice(slots, size=count)], 1.0)
    return pairs


def lru_hits(rng: Rng, popularity: np.ndarray, cached: int, stickiness: float, steps: int) -> float:
    """Hit rate of a least-recently-used cache under single accesses, some repeating the last."""
    held: list[int] = []
    hits = seen = 0
    last = 0
    for step in range(steps):
        pick = last if step and rng.random() < stickiness else int(rng.choice(len(popularity), p=popularity))
        last = pick
        if step > steps // 10:
            seen += 1
            hits += pick in held
        if pick in held:
            held.remove(pick)
        held.append(pick)
        held = held[-cached:]
    return hits / seen


def dropped(rng: Rng, tokens: int, num_experts: int, top_k: int, slots: int, *, second_choice: bool) -> float:
    """Share of pairs without a slot; a second choice is one more expert at random, full or not."""
    counts = np.zeros(num_experts, dtype=int)
    lost = 0
    overflow = 0
    for choice in sample_choices(rng, tokens, np.ones(num_experts), top_k):
        for expert in choice:
            if counts[expert] < slots:
                counts[expert] += 1
            else:
                overflow += 1
    if not second_choice:
        return overflow / (tokens * top_k)
    for expert in rng.integers(num_experts, size=overflow):
        if counts[expert] < slots:
            counts[expert] += 1
        else:
            lost += 1
    return lost / (tokens * top_k)


def torus_link_load(sides: tuple[int, ...], bytes_per_node: float) -> float:
    """Largest bytes on any directed link of a torus with wrap-around: all-to-all, dimension by dimension, shortest way.

    Half the ring away, half of the bytes go each way.
    """
    nodes = list(np.ndindex(*sides))
    share = bytes_per_node / len(nodes)
    load: dict[tuple[tuple[int, ...], int, int], float] = {}
    for source in nodes:
        for target in nodes:
            here = list(source)
            for axis, side in enumerate(sides):
                distance = (target[axis] - here[axis]) % side
                ways = [(1, distance, 1.0)] if distance < side / 2 else [(-1, side - distance, 1.0)]
                if distance * 2 == side:
                    ways = [(1, distance, 0.5), (-1, distance, 0.5)]
                for direction, hops, part in ways:
                    at = list(here)
                    for _ in range(hops):
                        key = (tuple(at), axis, direction)
                        load[key] = load.get(key, 0.0) + part * share
                        at[axis] = (at[axis] + direction) % side
                here[axis] = target[axis]
    return max(load.values())
