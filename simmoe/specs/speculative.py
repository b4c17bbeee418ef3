"""Speculative decoding: who drafts tokens, how many a step, and how many of them are accepted. Part of a `Deployment`.

Model: a decode step verifies ``draft_tokens`` drafts beside the token it would make anyway and emits the accepted ones
and one more: ``acceptance_length`` tokens on average, between 1 and ``draft_tokens + 1`` (as engines' logs call it).
With every draft accepted independently at a rate p, that is ``(1 - p^(d+1)) / (1 - p)`` (Leviathan et al., arXiv
2211.17192, eq. 1). Servers also log how often the first, the second ... draft is accepted (vLLM's per-position
acceptance rate); then the length is one and their sum. Closed forms take the mean, and so do simulations unless
acceptance is ``sampled``: then every step of every request draws how many drafts it keeps. Left out: trees of drafts, a
number of drafts that adapts to load, an acceptance that depends on the request, or on the cap on active experts. What
it costs is told in `simmoe.costs.speculation`.
"""

from __future__ import annotations

import itertools
import math
import re
from fractions import Fraction
from typing import Literal

from pydantic import Field, model_validator

from simmoe.specs.base import Spec

#: Acceptance lengths are taken as fractions with denominators up to this, so that simulated contexts stay exact: a
#: length given to hundredths is met exactly, any other within 0.5 %.
_DENOMINATOR = 100


class Speculative(Spec):
    """A draft and its acceptance: give the length, the rate, or the share of each position.

    ``mtp``: the model's own multi-token-prediction layer, run once for each draft. ``draft``: a smaller model.
    ``ngram``: drafts are looked up in the request's own text, at no cost on the device.
    """

    method: Literal["mtp", "draft", "ngram"]
    draft_tokens: int = Field(ge=1, le=64, description="Drafts verified in a step, a request. [tokens]")
    acceptance_length: float | None = Field(
        default=None, ge=1, description="Mean tokens a decode step emits, the model's own among them. [tokens]"
    )
    acceptance_rate: float | None = Field(default=None, ge=0, le=1, description="Chance of a draft to be accepted. [-]")
    acceptance_by_position: tuple[float, ...] | None = Field(
        default=None, description="Share of steps that accept the first, the second ... draft. [-]"
    )
    sampled: bool = Field(default=False, description="Simulations draw accepted drafts step by step; else the mean.")
    draft_model: str | None = Field(default=None, description="draft: preset or file of the smaller model.")

    @model_validator(mode="after")
    def _consistent(self) -> Speculative:
        told = (self.acceptance_length, self.acceptance_rate, self.acceptance_by_position)
        if sum(one is not None for one in told) != 1:
            raise ValueError("give exactly one of acceptance_length, acceptance_rate and acceptance_by_position")
        shares = self.acceptance_by_position
        if shares is not None:
            if len(shares) != self.draft_tokens:
                raise ValueError(
                    f"acceptance_by_position has {len(shares)} shares for {self.draft_tokens} draft_tokens"
                )
            if any(after > before for before, after in itertools.pairwise((1.0, *shares))) or shares[-1] < 0:
                raise ValueError(
                    "acceptance_by_position: a draft is accepted only after those before it; give shares from 1 to 0 "
                    "that never rise"
                )
        if self.acceptance_length is not None and self.acceptance_length > self.draft_tokens + 1:
            raise ValueError(
                f"acceptance_length {self.acceptance_length:g} exceeds the {self.draft_tokens + 1} tokens a step "
                f"with draft_tokens {self.draft_tokens} can emit"
            )
        if (self.method == "draft") != (self.draft_model is not None):
            raise ValueError("method draft needs draft_model; mtp and ngram take none")
        return self

    @property
    def accepted(self) -> tuple[float, ...]:
        """Share of steps that accept at least 1, 2 ... drafts, shape (draft_tokens,). [-]

        A length alone stands for drafts accepted independently at the rate that gives it.
        """
        if self.acceptance_by_position is not None:
            return self.acceptance_by_position
        p = self.acceptance_rate
        if p is None:
            assert self.acceptance_length is not None
            p = _rate_of(self.acceptance_length, self.draft_tokens)
        return tuple(p**i for i in range(1, self.draft_tokens + 1))

    @property
    def tokens_per_step(self) -> Fraction:
        """Mean tokens a decode step emits for a request, as calculated with. [tokens]"""
        length = self.acceptance_length
        if length is None:
            length = 1 + math.fsum(self.accepted)
        return min(Fraction(length).limit_denominator(_DENOMINATOR), Fraction(self.draft_tokens + 1))

    def in_words(self) -> str:
        """For people: "mtp, 1 draft token, 1.85 tokens a step"."""
        d = self.draft_tokens
        who = f"{self.method} {self.draft_model}" if self.draft_model else self.method
        drawn = " on average, drawn" if self.sampled else ""
        return f"{who}, {d} draft token{'s' * (d > 1)}, {float(self.tokens_per_step):.3g} tokens a step{drawn}"


def _rate_of(length: float, drafts: int) -> float:
    """Rate at which independent drafts give an acceptance length, by bisection. [-]"""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if 1 + math.fsum(middle**i for i in range(1, drafts + 1)) < length:
            low = middle
        else:
            high = middle
    return high


_SHORT = {
    "length": "acceptance_length", "rate": "acceptance_rate", "positions": "acceptance_by_position",
    "model": "draft_model",
}  # fmt: skip


def speculative_values(text: str) -> dict[str, object]:
    """Fields of `Speculative` from one line: ``mtp:1,length=1.85``, ``draft:4,rate=0.7,model=llama-3.1-8b``.

    ``mtp:3,positions=0.9/0.7/0.5,sampled``: the shares of each position, drawn step by step.

    Raises
    ------
    ValueError
        If it does not begin with ``method:draft_tokens`` or a part is not ``key=value``.
    """
    head, *rest = text.split(",")
    found = re.fullmatch(r"(mtp|draft|ngram):(\d+)", head.strip())
    if found is None:
        raise ValueError(
            f"--speculative {text!r}: begin with mtp, draft or ngram and the draft tokens, e.g. mtp:1,length=1.85"
        )
    values: dict[str, object] = {"method": found.group(1), "draft_tokens": int(found.group(2))}
    for part in rest:
        if part.strip() == "sampled":
            values["sampled"] = True
            continue
        key, equals, setting = part.partition("=")
        key = _SHORT.get(key.strip(), key.strip())
        if not equals or key not in Speculative.model_fields:
            raise ValueError(
                f"--speculative {text!r}: {part!r} is not one of length=, rate=, positions=, model=, sampled"
            )
        values[key] = setting.strip().split("/") if key == "acceptance_by_position" else setting.strip()
    return values
