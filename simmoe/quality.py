"""What activating, or keeping, fewer experts costs in quality: measured scores looked up, never computed.

Model: linear between measured points of the same model and benchmark; nothing outside them (None, not a guess), nothing
between models. For a model nobody measured, `elsewhere` gives the range other models spanned, named as such. Data:
simmoe/quality.yaml, each curve with its benchmark, method and paper. Left out: quantisation, fine-tuning after a cut,
error bars (none were published; below about 0.5 points differences are noise).
Checked in tests/test_quality.py against validate/serving/accuracy_vs_active_experts.csv.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from simmoe.specs.base import from_yaml

ZERO_SHOT = "zero-shot classification"
#: Differences in score below this are noise [%]; from repeated rows of arXiv 2505.03531, Table 10.
NOISE = 0.5


@dataclass(frozen=True, slots=True)
class Curve:
    """Measured scores of one model on one benchmark.

    Attributes
    ----------
    varied : "active_experts", "refill_from" or "total_experts".
    native : what the model was trained with. [experts]
    points : experts -> score. [%]
    """

    model: str
    benchmark: str
    group: str
    varied: str
    native: int
    method: str
    points: Mapping[int, float]
    source: str

    def score(self, experts: float) -> float | None:
        """Score, linear between measured points; None outside them. [%]"""
        known = sorted(self.points)
        if not known[0] <= experts <= known[-1]:
            return None
        above = next(k for k in known if k >= experts)
        if above == experts:
            return self.points[above]
        below = max(k for k in known if k < experts)
        share = (experts - below) / (above - below)
        return self.points[below] + share * (self.points[above] - self.points[below])


@dataclass(frozen=True, slots=True)
class Score:
    """A score and what it is of.

    Attributes
    ----------
    score : at the number of experts asked for. [%]
    measured : whether that very number was measured; else it lies between two that were.
    """

    curve: Curve
    experts: int
    score: float
    measured: bool

    @property
    def native_score(self) -> float:
        """Score of the model as trained. [%]"""
        return self.curve.points[self.curve.native]

    def __str__(self) -> str:
        mark = "" if self.measured else " (between measured points)"
        return f"{self.curve.benchmark} {self.score:.1f}{mark}, native {self.native_score:.1f}"


@cache
def curves() -> tuple[Curve, ...]:
    """Every measured curve."""
    text = resources.files("simmoe").joinpath("quality.yaml").read_text(encoding="utf-8")
    raw: list[dict[str, Any]] = from_yaml(text)
    return tuple(Curve(**entry) for entry in raw)


def scores(
    model: str, *, active_experts: int | None = None, total_experts: int | None = None, refill_from: int | None = None
) -> tuple[Score, ...]:
    """Scores of a model with one thing changed: a cap on active experts, a refilled cap, or a smaller pool.

    A pool and a cap at once were never measured together, so nothing is known of them. Pools are cut in several ways;
    each is a curve of its own. Empty: not measured for this model, or outside what was.
    """
    asked = {"active_experts": active_experts, "total_experts": total_experts, "refill_from": refill_from}
    native = {(c.model, c.varied): c.native for c in curves() if _same(c.model, model)}
    changed = {
        name: value
        for name, value in asked.items()
        if value is not None and value != next((n for (_, varied), n in native.items() if varied == name), None)
    }
    if len(changed) > 1:
        return ()
    name, value = next(iter(changed.items()), ("active_experts", None))
    found = []
    for curve in curves():
        if not _same(curve.model, model) or curve.varied != name:
            continue
        experts = curve.native if value is None else value
        score = curve.score(experts)
        if score is not None:
            found.append(Score(curve, experts, score, experts in curve.points))
    return tuple(found)


def known(model: str) -> bool:
    """Whether anything was measured for this model."""
    return any(_same(curve.model, model) for curve in curves())


def elsewhere(share: float, group: str | None = None) -> tuple[float, float, tuple[str, ...]] | None:
    """Range of score over native score that other models showed with this share of their native active experts.

    Parameters
    ----------
    share : active experts over native ones. [-]

    Returns
    -------
    (lowest, highest, names of the models), or None if nobody measured such a share. Not a prediction for any other
    model: it says how far those that were measured lie apart.
    """
    found: list[tuple[float, str]] = []
    for curve in curves():
        if curve.varied == "active_experts" and group in (None, curve.group):
            score = curve.score(share * curve.native)
            if score is not None:
                found.append((score / curve.points[curve.native], curve.model))
    if not found:
        return None
    ratios = [ratio for ratio, _ in found]
    return min(ratios), max(ratios), tuple(dict.fromkeys(name for _, name in found))


def in_words(model: str, *, active_experts: int, native: int) -> str:
    """One line for a table: what is measured for this cap, or what other models showed, said to be such."""
    found = scores(model, active_experts=active_experts)
    headline = [score for score in found if score.curve.benchmark == "average of six"] or list(found)
    if headline:
        return "; ".join(str(score) for score in headline)
    if known(model):
        return "outside what was measured"
    span = elsewhere(active_experts / native)
    if span is None:
        return "not measured for any model"
    low, high, models = span
    return f"not measured; {', '.join(models)} kept {100 * low:.0f} to {100 * high:.0f} % of their scores"


def _same(one: str, other: str) -> bool:
    return _key(one) == _key(other)


def _key(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
