"""What a training budget buys, as text and plain data, beside the published claims of arXiv 2404.02852."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from simmoe.planning.offers import Offer
from simmoe.planning.training import Choice, Serving
from simmoe.provenance import stamp
from simmoe.scaling_law import Allocation
from simmoe.specs.load import calibration_of

SURROGATE = (
    "Law: a surrogate for arXiv 2404.02852, whose coefficients are not published: effective parameter counts of "
    "Clark et al. (2202.01169, S-BASE) in Chinchilla's law (2203.15556). Not a fit: trust directions, not percentages."
)


def training_table(
    budget: float, base: Allocation, choices: Mapping[int, Choice], offer: Offer, reference: int
) -> RenderableType:
    """A row per expert count, then ours beside the paper's."""
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    for column in ("experts", "dense size N", "tokens D", "loss", "all\nparameters", "USD per M\noutput tokens", "GPUs",
                   f"over-trained\nto {base.loss:.3f}: N", "share of\noptimal", "USD per M\noutput tokens",
                   "budget for\nthat loss"):  # fmt: skip
        table.add_column(column, justify="right")
    for count, choice in choices.items():
        best, matched = choice.optimal, choice.matched
        table.add_row(
            str(count), _billions(best.parameters), _billions(best.tokens), f"{best.loss:.3f}", _billions(best.total),
            *_cost(choice.optimal_serving), _billions(matched.parameters) if matched else "out of reach",
            f"{matched.parameters / best.parameters:.0%}" if matched else "-",
            _cost(choice.matched_serving)[0] if matched else "-",
            f"{choice.budget_share:.0%}",
        )  # fmt: skip
    head = (
        f"A training budget of {budget:.3g} FLOP; over-trained: the smallest model the whole budget trains to the "
        f"loss of the loss-optimal {reference}-expert one. Served on {offer.name} at saturation.\n{SURROGATE}\n"
    )
    return Group(Text(head), table, Text(""), _claims_table(claims(base, choices)))


def claims(base: Allocation, choices: Mapping[int, Choice]) -> list[dict[str, Any]]:
    """Published claims of arXiv 2404.02852 and what the surrogate and our engine say; ours None where out of reach."""

    def cost(serving: Serving | None) -> float | None:
        return None if serving is None else serving.usd_per_million_output_tokens

    found: list[dict[str, Any]] = []

    def say(claim: str, published: str, ours: float | None, agrees: bool | None) -> None:
        found.append({"claim": claim, "published": published, "ours": ours, "direction_agrees": agrees})

    four = choices.get(base.experts)
    for count, published in ((16, "0.16 (70-85 % smaller)"), (32, "0.30 (70-85 % smaller)")):
        if (c := choices.get(count)) is not None:
            share = c.matched.parameters / c.optimal.parameters if c.matched else None
            say(
                f"over-trained {count}-expert size over its loss-optimal size",
                published,
                share,
                share is not None and share < 0.5,
            )
    if (c := choices.get(16)) is not None:
        say("budget of a 16-expert model for the 4-expert loss", "0.237-0.428", c.budget_share, c.budget_share < 1)
    for count, published in ((8, "0.477-0.510"), (16, "0.47-0.52")):
        if (c := choices.get(count)) is not None and four is not None:
            ours, theirs = cost(c.matched_serving), cost(four.optimal_serving)
            ratio = ours / theirs if ours is not None and theirs is not None else None
            say(f"serving cost of the over-trained {count}-expert model over the loss-optimal 4-expert one", published,
                ratio, None if ratio is None else ratio < 1)  # fmt: skip
    if (one := choices.get(1)) is not None and four is not None:
        say("budget of a dense model for the 4-expert loss", "above 1", one.budget_share, one.budget_share > 1)
    return found


def training_json(budget: float, base: Allocation, choices: Mapping[int, Choice], offer: Offer) -> dict[str, Any]:
    """The same as plain data."""
    return {
        "budget_flop": budget,
        "law": SURROGATE,
        "reference": {**dataclasses.asdict(base), "total": base.total},
        "hardware": offer.name,
        "usd_per_device_hour": offer.usd_per_device_hour,
        "choices": {str(count): dataclasses.asdict(choice) for count, choice in choices.items()},
        "claims": claims(base, choices),
        "provenance": stamp(
            {"hardware": offer.hardware, "budget_flop": budget, "experts": sorted(choices)},
            calibration=calibration_of(offer.hardware),
        ).to_dict(),
    }


def _claims_table(found: list[dict[str, Any]]) -> Table:
    table = Table(title="Claims of arXiv 2404.02852", title_justify="left", show_edge=False, pad_edge=False,
                  header_style="bold")  # fmt: skip
    for column in ("claim", "published", "ours", "direction"):
        table.add_column(column)
    for one in found:
        agrees = {True: "agrees", False: "differs", None: "-"}[one["direction_agrees"]]
        table.add_row(one["claim"], one["published"], "-" if one["ours"] is None else f"{one['ours']:.2f}", agrees)
    return table


def _cost(serving: Serving | None) -> tuple[str, str]:
    return (
        ("does not fit", "-")
        if serving is None
        else (f"{serving.usd_per_million_output_tokens:.2f}", str(serving.devices))
    )


def _billions(value: float) -> str:
    return f"{value / 1e9:,.2f} B" if value < 1e11 else f"{value / 1e9:,.0f} B"
