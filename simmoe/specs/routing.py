"""Who gets the tokens: popularity of experts, likeness of a batch's tokens, the rule that picks, and where experts lie.

Part of a `Deployment`. The defaults say what is assumed when nobody measured: all experts equally likely, tokens
independent, the model's own top-k in every layer, experts in order over the ranks, no copies.
Left out: routers that look at load while they route (expert choice); `dispatch` of the deployment says what happens to
tokens beyond a capacity. What the fields mean for a batch is told in `simmoe.routing.layers`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from simmoe.specs.base import Spec


class Routing(Spec):
    """Popularity, correlation, picking rule and placement. Every field has a default that changes nothing."""

    popularity: Literal["uniform", "balanced", "zipf", "dirichlet", "counts", "domains", "hash"] = Field(
        default="uniform",
        description="balanced: every expert gets the same number of tokens, as BASE layers and forced benchmarks do. "
        "zipf: weights i**-exponent in an order drawn by seed. dirichlet: each layer draws its own. counts: measured. "
        "domains: Zipf laws in different orders, mixed. hash: experts by token id, ids following Zipf.",
    )
    exponent: float = Field(default=1.0, ge=0, description="Of the Zipf law (zipf, domains, hash). [-]")
    concentration: float = Field(default=1.0, gt=0, description="Dirichlet parameter of each expert; large: uniform.")
    layers_drawn: int = Field(
        default=8, ge=1, le=1000, description="dirichlet: different layers drawn, each standing for many."
    )
    orders: int = Field(
        default=1,
        ge=1,
        description="zipf: orders of popularity drawn, each for as many layers; 1: one for all.",
    )
    counts: tuple[float, ...] | None = Field(default=None, description="Tokens each expert got. [tokens]")
    counts_file: str | None = Field(
        default=None, description="CSV of counts without header: one line per MoE layer (or one for all), E columns."
    )
    domains: int = Field(default=2, ge=1, description="domains: how many.")
    domain_shares: tuple[float, ...] | None = Field(default=None, description="Their shares; None: equal.")
    placed_shares: tuple[float, ...] | None = Field(
        default=None, description="domains: their shares when experts were placed; None: as now."
    )
    drift: float = Field(
        default=0.0, ge=0, le=1, description="Share of the popularity that has moved to other experts since placement."
    )
    seed: int = Field(default=0, ge=0, description="Of drawn popularities and orders.")

    independence: float = Field(
        default=1.0, gt=0, le=1, description="A batch of T tokens routes like 1 + independence (T - 1) unlike ones."
    )
    tasks: int | None = Field(
        default=None, ge=1,
        description="Task-level routing: all tokens of a task take the same k experts. Session-level: as many tasks as "
        "there are users, of which few are in a step twice. [tasks]",
    )  # fmt: skip

    top_k_per_layer: tuple[int, ...] | None = Field(
        default=None, description="Experts per token, MoE layer by layer or for equal blocks of them."
    )
    refill_to: int | None = Field(
        default=None, ge=1,
        description="Opportunistic refill: active_experts are picked, then up to this many from those the batch woke.",
    )  # fmt: skip
    top_k_shares: tuple[float, ...] | None = Field(
        default=None, description="Adaptive k: share of tokens that take 1, 2, ... experts."
    )
    keep_threshold: float | None = Field(
        default=None, gt=0, lt=1, description="Adaptive k: keep experts whose score is above this share of the best."
    )
    keep_entropy: float | None = Field(
        default=None, gt=0, description="Adaptive k: keep this share of exp(entropy of the top-k weights), rounded up."
    )
    keep_min: int = Field(default=1, ge=1, description="keep_threshold, keep_entropy: experts kept in any case.")
    logit_spread: float = Field(
        default=1.0, gt=0, description="keep_...: standard deviation of router logits; assumed Gaussian. [-]"
    )

    placement: Literal["contiguous", "greedy", "eplb"] = Field(
        default="contiguous", description="greedy: popular experts first, to the least-loaded rank. eplb: with copies."
    )
    redundant_experts: int = Field(default=0, ge=0, description="Extra copies of popular experts, over all ranks.")

    @property
    def varies_k(self) -> bool:
        """Whether k differs between tokens or layers: no quality was measured for that."""
        rules = (self.top_k_per_layer, self.top_k_shares, self.keep_threshold, self.keep_entropy)
        return any(rule is not None for rule in rules)

    def in_words(self) -> str:
        """What is assumed of the router, for people: "uniform over experts", "zipf, exponent 0.8, independence 0.5"."""
        changed = {
            name: value
            for name in type(self).model_fields
            if (value := getattr(self, name)) != type(self).model_fields[name].default and name != "popularity"
        }
        if self.popularity in ("zipf", "domains", "hash"):
            changed = {"exponent": self.exponent, **changed}
        if self.popularity == "dirichlet":
            changed = {"concentration": self.concentration, **changed}
        law = "uniform over experts" if self.popularity == "uniform" else self.popularity
        told = [
            f"{name.replace('_', ' ')} {f'of {len(value)}' if isinstance(value, tuple) else value}"
            for name, value in changed.items()
        ]
        return ", ".join([law, *told])

    @model_validator(mode="after")
    def _consistent(self) -> Routing:
        if (self.popularity == "counts") != (self.counts is not None or self.counts_file is not None):
            raise ValueError("popularity counts needs counts or counts_file; other kinds take neither")
        if self.orders > 1 and self.popularity != "zipf":
            raise ValueError(f"orders {self.orders}: only popularity zipf draws orders")
        if self.counts is not None and self.counts_file is not None:
            raise ValueError("give counts or counts_file, not both")
        for name in ("domain_shares", "placed_shares"):
            if (shares := getattr(self, name)) is None:
                continue
            if self.popularity != "domains" or len(shares) != self.domains:
                raise ValueError(f"{name}: give {self.domains} shares, with popularity domains")
            if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
                raise ValueError(f"{name} must be 0 or more and sum to 1")
        if self.placed_shares is not None and self.placement == "contiguous":
            raise ValueError("placed_shares needs a placement that knows of popularity: greedy or eplb")
        if self.top_k_shares is not None and (min(self.top_k_shares) < 0 or abs(sum(self.top_k_shares) - 1) > 1e-6):
            raise ValueError("top_k_shares must be 0 or more and sum to 1")
        rules = {
            "top_k_per_layer": self.top_k_per_layer, "refill_to": self.refill_to, "top_k_shares": self.top_k_shares,
            "keep_threshold": self.keep_threshold, "keep_entropy": self.keep_entropy,
        }  # fmt: skip
        given = [name for name, value in rules.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other")
        if self.keep_threshold is None and self.keep_entropy is None and (self.keep_min > 1 or self.logit_spread != 1):
            raise ValueError("keep_min and logit_spread belong to a gate: give keep_threshold or keep_entropy too")
        if self.top_k_per_layer is not None and (not self.top_k_per_layer or min(self.top_k_per_layer) < 1):
            raise ValueError("top_k_per_layer: every layer takes 1 expert or more")
        if self.redundant_experts and self.placement != "eplb":
            raise ValueError("redundant_experts needs placement eplb")
        if self.popularity == "balanced" and (self.placement != "contiguous" or self.drift or self.independence < 1):
            raise ValueError("popularity balanced leaves nothing to place, to drift or to correlate")
        return self


#: name in ``--routing`` -> (popularity, field that the number after the colon sets)
_NAMES = {
    "uniform": ("uniform", None),
    "balanced": ("balanced", None),
    "zipf": ("zipf", "exponent"),
    "dirichlet": ("dirichlet", "concentration"),
    "counts": ("counts", "counts_file"),
    "domains": ("domains", "domains"),
    "hash": ("hash", "exponent"),
}
_SHORT = {
    "redundant": "redundant_experts",
    "refill": "refill_to",
    "threshold": "keep_threshold",
    "entropy": "keep_entropy",
}


def routing_values(text: str) -> dict[str, object]:
    """Fields of `Routing` from one line: ``zipf:0.8``, ``zipf:1,independence=0.7,placement=eplb,redundant=32``.

    Raises
    ------
    ValueError
        If the law is not known or a part is not ``key=value``.
    """
    head, *rest = text.split(",")
    name, _, value = head.partition(":")
    if name not in _NAMES:
        raise ValueError(f"--routing {text!r}: {name!r} is not known; use {', '.join(_NAMES)}, e.g. zipf:0.8")
    popularity, field = _NAMES[name]
    values: dict[str, object] = {"popularity": popularity}
    if value and field is None:
        raise ValueError(f"--routing {text!r}: {name} takes no number")
    if value and field is not None:
        values[field] = value
    for part in rest:
        key, equals, setting = part.partition("=")
        key = _SHORT.get(key.strip(), key.strip())
        if not equals or key not in Routing.model_fields:
            raise ValueError(f"--routing {text!r}: {part!r} is not key=value; keys: {', '.join(Routing.model_fields)}")
        values[key] = setting.split("/") if "/" in setting and key != "counts_file" else setting
    return values
