"""Speculative decoding: who drafts tokens, how many a step, and how many of them are accepted. Part of a `Deployment`.

Model: a decode step verifies ``draft_tokens`` drafts beside the token it would make anyway and emits the accepted ones
and one more: ``acceptance_length`` tokens on average, between 1 and ``draft_tokens + 1`` (as engines' logs call it).
With every draft accepted independently at a rate p, that is ``(1 - p^(d+1)) / (1 - p)`` (Leviathan et al., arXiv
2211.17192, eq. 1). Left out: trees of drafts, a number of drafts that adapts to load, an acceptance that depends on the
request, or on the cap on active experts. What it costs is told in `simmoe.costs.speculation`.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Literal

from pydantic import Field, model_validator

from simmoe.specs.base import Spec

#: Acceptance lengths are taken as fractions with denominators up to this, so that simulated contexts stay exact: a
#: length given to hundredths is met exactly, any other within 0.5 %.
_DENOMINATOR = 100


class Speculative(Spec):
    """A draft and its acceptance: give the length or the rate.

    ``mtp``: the model's own multi-token-prediction layer, run once for each draft. ``draft``: a smaller model.
    ``ngram``: drafts are looked up in the request's own text, at no cost on the device.
    """

    method: Literal["mtp", "draft", "ngram"]
    draft_tokens: int = Field(ge=1, le=64, description="Drafts verified in a step, a request. [tokens]")
    acceptance_length: float | None = Field(
        default=None, ge=1, description="Mean tokens a decode step emits, the model's own among them. [tokens]"
    )
    acceptance_rate: float | None = Field(default=None, ge=0, le=1, description="Chance of a draft to be accepted. [-]")
    draft_model: str | None = Field(default=None, description="draft: preset or file of the smaller model.")

    @model_validator(mode="after")
    def _consistent(self) -> Speculative:
        if (self.acceptance_length is None) == (self.acceptance_rate is None):
            raise ValueError("give exactly one of acceptance_length and acceptance_rate")
        if self.acceptance_length is not None and self.acceptance_length > self.draft_tokens + 1:
            raise ValueError(
                f"acceptance_length {self.acceptance_length:g} exceeds the {self.draft_tokens + 1} tokens a step "
                f"with draft_tokens {self.draft_tokens} can emit"
            )
        if (self.method == "draft") != (self.draft_model is not None):
            raise ValueError("method draft needs draft_model; mtp and ngram take none")
        return self

    @property
    def tokens_per_step(self) -> Fraction:
        """Mean tokens a decode step emits for a request, as calculated with. [tokens]"""
        p, d = self.acceptance_rate, self.draft_tokens
        length = self.acceptance_length if p is None else float(d + 1 if p == 1 else (1 - p ** (d + 1)) / (1 - p))
        assert length is not None
        return min(Fraction(length).limit_denominator(_DENOMINATOR), Fraction(d + 1))

    def in_words(self) -> str:
        """For people: "mtp, 1 draft token, 1.85 tokens a step"."""
        d = self.draft_tokens
        who = f"{self.method} {self.draft_model}" if self.draft_model else self.method
        return f"{who}, {d} draft token{'s' * (d > 1)}, {float(self.tokens_per_step):.3g} tokens a step"


_SHORT = {"length": "acceptance_length", "rate": "acceptance_rate", "model": "draft_model"}


def speculative_values(text: str) -> dict[str, object]:
    """Fields of `Speculative` from one line: ``mtp:1,length=1.85``, ``draft:4,rate=0.7,model=llama-3.1-8b``.

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
        key, equals, setting = part.partition("=")
        key = _SHORT.get(key.strip(), key.strip())
        if not equals or key not in Speculative.model_fields:
            raise ValueError(f"--speculative {text!r}: {part!r} is not one of length=, rate=, model=")
        values[key] = setting.strip()
    return values
