"""Published quantitative claims about serving MoE models, each beside what simmoe computes from the stated inputs.

A claim's tolerance is set by its kind before anything is computed: counting 3 %, operators 15 %, whole systems 25 %,
historic systems whose software is not described a factor of 2; gains in percentage points 5. Claims whose inputs hold
the answer are marked as such. What a model of this kind cannot speak to is listed with the reason. Computations:
`counted`, `timed`, `historic`. Table: validate/claims/.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simmoe.validation import markdown
from simmoe.validation.claims import counted, historic, timed, unspoken
from simmoe.validation.claims.claim import Claim, Spoken


def all_claims() -> list[Claim]:
    """Every claim: counted, timed, of historic systems, and those nobody can compute here."""
    return [claim for part in (counted, timed, historic, unspoken) for claim in part.claims()]


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
