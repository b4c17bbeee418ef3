"""The validation tables as Markdown, written between two marks of a page so that its numbers are a command's own.

Kernels are summed up per operator and device, runs per file and kind of figure. Left out: the words around them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from simmoe.errors import SpecError
from simmoe.validation import misses
from simmoe.validation.summary import KERNEL_QUANTITY, Comparison, GroupError, Outcome, summarise

BEGIN, END = "<!-- tables: written by simmoe validate -->", "<!-- end of tables -->"
#: Marks of the short table: medians of runs per file.
MEDIANS, MEDIANS_END = "<!-- medians: written by simmoe validate -->", "<!-- end of medians -->"
_KINDS = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2e": "end to end"}


def write(outcome: Outcome, path: Path) -> None:
    """Put the tables between the marks of a page, and the medians where it has marks for them; raises as `put`."""
    short = path.is_file() and MEDIANS in path.read_text(encoding="utf-8")
    if short:
        put(medians(outcome), path, (MEDIANS, MEDIANS_END))
    if not short or BEGIN in path.read_text(encoding="utf-8"):
        put(text(outcome), path)


def put(tables: str, path: Path, marks: tuple[str, str] = (BEGIN, END)) -> None:
    """Put Markdown between the marks of a page; a page that is not there yet is begun.

    Raises
    ------
    SpecError
        If the page has no marks, or cannot be written.
    """
    try:
        first, last = marks
        page = path.read_text(encoding="utf-8") if path.exists() else f"{first}\n{last}\n"
        before, mark, rest = page.partition(first)
        _, end, after = rest.partition(last)
        if not (mark and end):
            raise SpecError(f"--markdown {path}: mark where the tables go with the lines {first!r} and {last!r}")
        path.write_text(f"{before}{first}\n\n{tables}\n{last}{after}", encoding="utf-8")
    except OSError as problem:
        raise SpecError(f"--markdown {path}: cannot write ({problem.strerror})") from problem


def text(outcome: Outcome) -> str:
    """Both tables and the large misses by part, those that have rows."""
    kernels = [c for c in outcome.comparisons if c.quantity == KERNEL_QUANTITY]
    runs = [c for c in outcome.comparisons if c.quantity != KERNEL_QUANTITY]
    parts = []
    if kernels:
        parts.append("**Kernels**, by operator and device.\n\n" + _table(_regrouped(kernels, _kernel_group, "time")))
    if runs:
        parts.append("**Runs**, by source.\n\n" + _table(_regrouped(runs, _file_of, None)))
        parts.append(_blame(outcome, runs))
    return "\n".join(parts)


def medians(outcome: Outcome) -> str:
    """Per file of runs: figures, median absolute error and in brackets the median error; no percentiles. [%]"""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for c in outcome.comparisons:
        if c.quantity != KERNEL_QUANTITY and not c.quantity.endswith("_p99"):
            found[_file_of(c)][_kind(c.quantity)].append(100 * c.error)
    kinds = ("throughput", "TPOT", "TTFT", "ITL")
    lines = ["| file | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for file, errors in sorted(found.items()):
        cells = [_median_cell(errors[kind]) for kind in kinds]
        lines.append(f"| {file} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _median_cell(errors: list[float]) -> str:
    if not errors:
        return ""
    return f"{len(errors)}: {np.median(np.abs(errors)):.0f} % ({np.median(errors):+.0f} %)"


def _regrouped(found: Iterable[Comparison], group: Callable[[Comparison], str], kind: str | None) -> list[GroupError]:
    return summarise(replace(c, group=group(c), quantity=kind or _kind(c.quantity)) for c in found)


def _kernel_group(c: Comparison) -> str:
    return " / ".join(c.group.split("/")[:2])


def _file_of(c: Comparison) -> str:
    return c.group.split("/")[0]


def _kind(quantity: str) -> str:
    return _KINDS.get(quantity.partition("_")[0], "throughput")


def _table(groups: list[GroupError]) -> str:
    lines = [
        "| | figure | n | mean error % | median % | p90 % | bias % | inside 90 % band |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for g in groups:
        figures = (g.mape_percent, g.median_ape_percent, g.p90_ape_percent, g.bias_percent, g.inside_90_percent)
        lines.append(f"| {g.group} | {g.quantity} | {g.n} | " + " | ".join(f"{value:.1f}" for value in figures) + " |")
    return "\n".join(lines) + "\n"


def _blame(outcome: Outcome, runs: list[Comparison]) -> str:
    counted: dict[str, Counter[str]] = defaultdict(Counter)
    for group, parts in misses.by_part(outcome).items():
        counted[group.split("/")[0]] += parts
    total = Counter(_file_of(c) for c in runs)
    lines = ["| | large misses | of | the part that would explain them |", "|---|--:|--:|---|"]
    for file, parts in sorted(counted.items()):
        said = ", ".join(f"{part} {n}" for part, n in parts.most_common(4))
        lines.append(f"| {file} | {sum(parts.values())} | {total[file]} | {said} |")
    return "**Large misses** of runs: outside the 90 % band and over 20 % off.\n\n" + "\n".join(lines) + "\n"
