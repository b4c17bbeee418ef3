"""A published number, ours, and the verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Literal

from simmoe.errors import SimmoeError

Kind = Literal["count", "operator", "system", "historic", "points", "at least", "at most"]

#: Relative tolerance of a kind; "points" is absolute. [-], [percentage points]
TOLERANCE: dict[Kind, float] = {"count": 0.03, "operator": 0.15, "system": 0.25, "historic": 1.0, "points": 5.0}


@dataclass(frozen=True)
class Claim:
    """One published number: a row of the table.

    Attributes
    ----------
    claim, unit, source : in words.
    published : the number; None where the claim has none.
    compute : our number; None where simmoe cannot speak.
    kind : which tolerance holds, or that the number is a bound.
    inputs : what the computation takes as given.
    because : why it differs or cannot speak; not shown where it is reproduced.
    by_definition : the inputs hold the answer, by a definition or an identity: it checks the code, not the model.
    """

    claim: str
    published: float | None
    unit: str
    compute: Callable[[], float] | None = None
    _: KW_ONLY
    source: str
    kind: Kind = "count"
    inputs: str = ""
    because: str = ""
    by_definition: bool = False


@dataclass(frozen=True)
class Spoken:
    """A claim with our number and the verdict."""

    claim: Claim
    ours: float | None
    verdict: str


def speak(claim: Claim) -> Spoken:
    """Compute a claim and judge it by its kind's tolerance."""
    if claim.compute is None or claim.published is None:
        return Spoken(claim, None, f"cannot speak: {claim.because}")
    try:
        ours = float(claim.compute())
    except SimmoeError as problem:
        return Spoken(claim, None, f"cannot speak: {problem}")
    if holds(claim.kind, ours, claim.published):
        return Spoken(claim, ours, "reproduced, by definition" if claim.by_definition else "reproduced")
    return Spoken(claim, ours, f"differs, because {claim.because or 'the model lacks something'}")


def holds(kind: Kind, ours: float, published: float) -> bool:
    """Whether our number agrees with the published one, as its kind asks."""
    match kind:
        case "at least":
            return ours >= published
        case "at most":
            return ours <= published
        case "points":
            return abs(ours - published) <= TOLERANCE[kind]
        case "historic":
            factor = 1.0 + TOLERANCE[kind]
            return published / factor <= ours <= published * factor
        case _:
            return abs(ours / published - 1.0) <= TOLERANCE[kind]
