"""Published quantitative claims about serving MoE models, each beside what simmoe computes from the stated inputs.

A claim's tolerance is set by its kind before anything is computed: counting 3 %, operators 15 %, whole systems 25 %,
historic systems whose software is not described a factor of 2; gains in percentage points 5. Claims whose inputs hold
the answer are marked as such. What a model of this kind
cannot speak to is listed with the reason. Computations: `claims_counted`, `claims_timed`,
`claims_historic`. Table: validate/claims/.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal

from simmoe.errors import SimmoeError
from simmoe.validation import markdown

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


def all_claims() -> list[Claim]:
    """Every claim: counted, timed, and those nobody can compute here."""
    from simmoe.validation import claims_counted, claims_historic, claims_timed, claims_unspoken  # noqa: PLC0415

    parts = (claims_counted, claims_timed, claims_historic, claims_unspoken)
    return [claim for part in parts for claim in part.claims()]


def to_json(spoken: Sequence[Spoken]) -> list[dict[str, Any]]:
    """Plain data: claim, source, published, ours (null where simmoe cannot speak), unit, verdict."""
    return [
        {
            "claim": one.claim.claim,
            "source": one.claim.source,
            "published": one.claim.published,
            "ours": None if one.ours is None else float(f"{one.ours:.6g}"),
            "unit": one.claim.unit,
            "verdict": one.verdict,
            "inputs": one.claim.inputs,
        }
        for one in spoken
    ]


def to_markdown(spoken: Sequence[Spoken]) -> str:
    """The table of validate/claims/README.md."""
    rows = ["| claim | published | ours | unit | verdict | inputs | source |", "|---|---|---|---|---|---|---|"]
    rows += [
        f"| {s.claim.claim} | {_number(s.claim.published)} | {_number(s.ours)} | {s.claim.unit} | {s.verdict} | "
        f"{s.claim.inputs} | {s.claim.source} |"
        for s in spoken
    ]
    return "\n".join(rows) + "\n"


def write_page(spoken: Sequence[Spoken], path: Path) -> None:
    """Put the table between the marks of a page; SpecError if it has none."""
    markdown.put(f"{summary(spoken)}.\n\n{to_markdown(spoken)}", path)


def summary(spoken: Sequence[Spoken]) -> str:
    """One line: how many are reproduced, differ, and cannot be spoken to."""
    reproduced = sum(one.verdict.startswith("reproduced") for one in spoken)
    given = sum(one.verdict.endswith("by definition") for one in spoken)
    silent = sum(one.ours is None for one in spoken)
    differ = len(spoken) - reproduced - silent
    return (
        f"{len(spoken)} claims: {reproduced} reproduced ({given} of them by definition), {differ} differ, "
        f"{silent} cannot be spoken to"
    )


def table(spoken: Sequence[Spoken]) -> Any:
    """A rich table."""
    from rich.table import Table  # noqa: PLC0415

    shown = Table(title="published claims", caption=summary(spoken))
    for column in ("claim", "published", "ours", "unit", "verdict", "source"):
        shown.add_column(column)
    for s in spoken:
        shown.add_row(
            s.claim.claim, _number(s.claim.published), _number(s.ours), s.claim.unit, s.verdict, s.claim.source
        )
    return shown


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
