"""From a deployment's `Routing` to the load of its MoE layers: which kinds of layer there are, what each meets.

Model: layers that route alike form a kind; a kind has an inclusion probability per physical expert (copies included), a
rank for each, and counts of experts picked per token. Popularity is told in `popularity`, copies and ranks in
`redundancy`, the expected load in `expert_load`, refill in `refill`, varying k in `schedules`.
Left out: popularity that differs between layers other than by draw or by measured counts; replicas of unequal speed.
Checked against drawn routings in tests/test_mechanisms_routing.py.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simmoe.errors import SpecError
from simmoe.routing import popularity as laws
from simmoe.routing.expert_load import TILES, ExpertLoad, expected_load
from simmoe.routing.placement import contiguous_placement
from simmoe.routing.redundancy import eplb_placement
from simmoe.routing.refill import refilled_load
from simmoe.routing.schedules import entropy_shares, kept_shares
from simmoe.specs.model import Experts
from simmoe.specs.routing import Routing

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LayerKind:
    """MoE layers that route alike.

    Attributes
    ----------
    layers : how many layers are of this kind; need not be whole for drawn kinds.
    top_k : (token, expert) pairs per token, mean. [pairs/token]
    woken_by : experts a token picks freely; below top_k where a refill follows. [experts]
    slots : physical experts, copies included.
    inclusion : chance of each slot to serve a token by free choice, shape (slots,); None: all alike. [-]
    placement : rank of each slot, shape (slots,); None: in order.
    num_groups, top_groups : group-limited choice.
    independence, tasks, balanced : as in `Routing`.
    """

    layers: float
    top_k: float
    woken_by: float
    slots: int
    ep: int
    inclusion: Array | None = None
    placement: NDArray[np.intp] | None = None
    num_groups: int = 1
    top_groups: int = 1
    independence: float = 1.0
    tasks: int | None = None
    balanced: bool = False

    def load(self, tokens: Array) -> ExpertLoad:
        """Load of the busiest rank for ``tokens`` of the whole group, shape (B,)."""
        if self.balanced:
            return balanced_load(tokens, self.slots, self.top_k, self.ep)
        load = expected_load(
            tokens,
            self.slots,
            self.woken_by,
            ep=self.ep,
            inclusion=self.inclusion,
            placement=self.placement,
            num_groups=self.num_groups,
            top_groups=self.top_groups,
            independence=self.unlikeness(tokens),
        )
        return refilled_load(load, self.woken_by, self.top_k) if self.top_k > self.woken_by else load

    def unlikeness(self, tokens: Array) -> Array | float:
        """What `Routing.independence` comes to in steps of so many tokens: T of them are in fewer tasks. [-]"""
        if self.tasks is None:
            return self.independence
        t = np.maximum(np.asarray(tokens, dtype=np.float64), 1.0)
        present = self.tasks * -np.expm1(t * np.log1p(-min(1.0 / self.tasks, 1 - 1e-12)))
        return np.asarray(
            self.independence * np.clip((present - 1.0) / np.maximum(t - 1.0, 1e-9), 1e-9, 1.0), dtype=np.float64
        )

    def unlike_tokens(self, tokens: Array) -> Array:
        """Tokens that route independently and wake as many experts as ``tokens`` do, shape (B,). [tokens]"""
        return np.asarray(1.0 + self.unlikeness(tokens) * (np.maximum(tokens, 1.0) - 1.0), dtype=np.float64)

    def receiver_skew(self, tokens: Array, load: ExpertLoad) -> tuple[Array, Array]:
        """Incast: what the hottest receiver gets over what it gets when all experts are alike and in order. [-]

        A copy for each pair, and one for each token that has any: the first is what low-latency kernels send it, the
        second what bulk kernels do, and no more than all tokens however hot it is; each of shape (B,). Dispatch and
        combine were measured with experts alike; all of them end when the hottest link has carried its share.
        """
        alike = self.inclusion is None and self.placement is None and not self.balanced
        if self.ep == 1 or (alike and self.independence == 1.0 and self.tasks is None):
            return np.ones_like(load.routed_pairs), np.ones_like(load.routed_pairs)
        plain = expected_load(tokens, self.slots - self.slots % self.ep, self.top_k, ep=self.ep)
        of_pairs = np.asarray(load.routed_pairs / plain.routed_pairs, dtype=np.float64)
        return of_pairs, of_pairs * self._meeting()

    def _meeting(self) -> float:
        """Skew of a copy a token over that of a copy a pair: how much oftener pairs meet at the hottest rank. [-]

        A token spares a rank when it spares each of its experts, as if these were picked independently.
        """
        if self.inclusion is None:
            return 1.0
        ranks = contiguous_placement(self.slots, self.ep) if self.placement is None else self.placement
        spared = np.bincount(ranks, weights=np.log1p(-np.minimum(self.inclusion, 1 - 1e-12)), minlength=self.ep)
        pairs = np.bincount(ranks, weights=self.inclusion, minlength=self.ep)
        alike = np.log1p(-min(self.inclusion.mean(), 1 - 1e-12)) * self.slots / self.ep
        return float(np.expm1(spared).min() / np.expm1(alike) * pairs.mean() / pairs.max())


def balanced_load(tokens: Array, num_experts: int, top_k: float, ep: int) -> ExpertLoad:
    """Every expert gets the same number of tokens, as far as there are enough; arrays of the shape of ``tokens``."""
    t = np.asarray(tokens, dtype=np.float64)
    local = num_experts / ep
    pairs = t * top_k / ep
    active = np.minimum(local, pairs)
    each = np.maximum(pairs / np.maximum(active, 1e-12), 1.0)
    blocks = {tile: active * np.ceil(each / tile - 1e-9) for tile in TILES}
    return ExpertLoad(t, pairs, active, np.ceil(each - 1e-9), blocks, round(local))


@lru_cache(maxsize=512)
def layer_kinds(
    routing: Routing, experts: Experts, moe_layers: int, *, pool: int, top_k: int, ep: int, vocab: int = 50_000
) -> tuple[LayerKind, ...]:
    """Kinds of MoE layer of a deployment; their layers add up to ``moe_layers``.

    Parameters
    ----------
    routing : what the deployment says.
    experts : the model's.
    pool, top_k : experts left after pruning (the most popular ones), experts per token after the cap.
    ep : expert-parallel ranks.
    vocab : token ids, for experts chosen by hashing them.

    Raises
    ------
    SpecError
        If counts, schedules or copies do not fit the model or the ranks.
    """
    grouped = pool == experts.num_experts and pool // experts.num_groups * experts.top_groups >= top_k
    groups = (experts.num_groups, experts.top_groups) if grouped else (1, 1)
    rules = _rules(routing, experts, moe_layers, top_k)
    kinds = []
    now = then = _laws(routing, experts, pool, vocab)
    if routing.placed_shares is not None:
        then = _laws(routing.vary(domain_shares=routing.placed_shares), experts, pool, vocab)
    for (share, law), (_, law_then) in zip(now, then, strict=True):
        for layers, shares, pairs in rules:
            woken = sum(j * part for j, part in shares.items())
            kept = _drifted(routing, _inclusion(law, shares))
            placed_by = _inclusion(law_then, shares)
            slots, placement = pool, None
            if routing.placement != "contiguous":
                by = np.full(pool, 1.0) if placed_by is None else placed_by
                laid = eplb_placement(by, ep, routing.redundant_experts)
                slots, placement = len(laid.expert), laid.rank
                kept = laid.inclusion(np.full(pool, woken / pool) if kept is None else kept)
            num_groups, top_groups = groups if slots == pool else (1, 1)
            kinds.append(
                LayerKind(
                    layers=share * layers,
                    top_k=max(woken, pairs),
                    woken_by=woken,
                    slots=slots,
                    ep=ep,
                    inclusion=kept,
                    placement=placement,
                    num_groups=num_groups,
                    top_groups=top_groups,
                    independence=routing.independence,
                    tasks=routing.tasks,
                    balanced=routing.popularity == "balanced",
                )
            )
    return tuple(kinds)


def _rules(
    routing: Routing, experts: Experts, moe_layers: int, top_k: int
) -> list[tuple[float, dict[int, float], float]]:
    """(layers, share of tokens by number of experts picked, pairs per token after refill) of each rule."""
    if routing.top_k_per_layer is not None:
        schedule = routing.top_k_per_layer
        if moe_layers % len(schedule) or max(schedule) > experts.top_k:
            raise SpecError(
                f"routing.top_k_per_layer: {len(schedule)} entries up to {max(schedule)}; the model has {moe_layers} "
                f"MoE layers of top-{experts.top_k}: give one entry a layer, or one for each of equal blocks of layers"
            )
        capped = [min(k, top_k) for k in schedule for _ in range(moe_layers // len(schedule))]
        return [(float(capped.count(k)), {k: 1.0}, float(k)) for k in sorted(set(capped))]
    if routing.refill_to is not None:
        if not top_k <= routing.refill_to <= experts.top_k:
            raise SpecError(
                f"routing.refill_to {routing.refill_to}: must lie between the cap, active_experts = {top_k}, and the "
                f"model's top-{experts.top_k}"
            )
        return [(float(moe_layers), {top_k: 1.0}, float(routing.refill_to))]
    shares: tuple[float, ...] | None = routing.top_k_shares
    for gate, setting in ((kept_shares, routing.keep_threshold), (entropy_shares, routing.keep_entropy)):
        if setting is not None:
            shares = gate(
                experts.num_experts, top_k, setting, keep_min=routing.keep_min, spread=routing.logit_spread,
                sigmoid=experts.score.startswith("sigmoid"),
            )  # fmt: skip
    if shares is not None:
        if len(shares) > experts.top_k:
            raise SpecError(
                f"routing.top_k_shares: {len(shares)} shares; the model takes at most {experts.top_k} experts"
            )
        # tokens that would take more than the cap take the cap
        spread: dict[int, float] = {}
        for j, part in enumerate(shares, start=1):
            if part > 0:
                spread[min(j, top_k)] = spread.get(min(j, top_k), 0.0) + part
        return [(float(moe_layers), spread, sum(j * part for j, part in spread.items()))]
    return [(float(moe_layers), {top_k: 1.0}, float(top_k))]


#: Selection weights of experts, with the share of tokens that draw by them: one entry, or one for each domain.
Law = list[tuple[float, Array]]


def _laws(routing: Routing, experts: Experts, pool: int, vocab: int) -> list[tuple[float, Law | None]]:
    """(share of layers, law over the pool's experts) of each kind of layer; None: all alike."""
    rng = np.random.default_rng(routing.seed)
    match routing.popularity:
        case "uniform" | "balanced":
            return [(1.0, None)]
        case "zipf":
            # ids know nothing of popularity: in order of it, rank 0 would hold all favourites
            law = laws.zipf_weights(pool, routing.exponent)
            return [(1.0 / routing.orders, [(1.0, rng.permutation(law))]) for _ in range(routing.orders)]
        case "dirichlet":
            draws = np.maximum(rng.gamma(routing.concentration, size=(routing.layers_drawn, pool)), 1e-12)
            return [(1.0 / len(draws), [(1.0, draw)]) for draw in draws]
        case "domains":
            shares = routing.domain_shares or (1.0 / routing.domains,) * routing.domains
            law = laws.zipf_weights(pool, routing.exponent)
            return [(1.0, [(share, rng.permutation(law)) for share in shares])]
        case "hash":
            frequency = laws.zipf_weights(vocab, routing.exponent)
            hashed = np.bincount(rng.integers(pool, size=vocab), weights=frequency, minlength=pool) + 1e-12
            return [(1.0, [(1.0, np.asarray(hashed, dtype=np.float64))])]
        case "counts":
            rows = _counts(routing, experts.num_experts)
            kept = [np.sort(row)[::-1][:pool] if pool < len(row) else row for row in rows]
            # floored at half a token: a count of nothing is no proof of no chance
            native = [laws.inclusion_from_counts(np.maximum(row, 0.5), min(experts.top_k, pool)) for row in kept]
            return [(1.0 / len(native), [(1.0, laws.weights_from_inclusion(p))]) for p in native]


def _counts(routing: Routing, num_experts: int) -> list[Array]:
    if routing.counts is not None:
        rows = [np.array(routing.counts)]
    else:
        path = Path(str(routing.counts_file))
        try:
            with path.open(newline="", encoding="utf-8") as file:
                rows = [np.array([float(cell) for cell in row]) for row in csv.reader(file) if row]
        except OSError as problem:
            raise SpecError(f"routing.counts_file {path}: {problem.strerror}") from None
        except ValueError as problem:
            raise SpecError(f"routing.counts_file {path}: {problem}; write numbers only, no header") from None
    wrong = next((len(row) for row in rows if len(row) != num_experts), None)
    if not rows or wrong is not None:
        raise SpecError(f"routing.counts: {wrong or 0} counts in a line; the model has {num_experts} experts")
    return rows


def _inclusion(law: Law | None, shares: dict[int, float]) -> Array | None:
    """Inclusion where a token draws by one of the law's weights, and takes j experts with chance shares[j].

    None: all alike.
    """
    if law is None:
        return None
    total = np.zeros(len(law[0][1]))
    for part, weights in law:
        for j, chance in shares.items():
            total += part * chance * laws.inclusion_from_weights(weights, j)
    return total


def _drifted(routing: Routing, before: Array | None) -> Array | None:
    """Inclusion after a share of it has moved to other experts."""
    if before is None or not routing.drift:
        return before
    moved = np.random.default_rng(routing.seed + 1).permutation(before)
    return (1.0 - routing.drift) * before + routing.drift * moved
