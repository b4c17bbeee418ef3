"""A list of rows to look at: a CSV of file names and source ids, followed into the serving tables beside it.

A row's throughput, TPOT and TTFT stand for it, one figure each: the mean where the source gives it, else the median,
else what it does not name. A listed row without a figure says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table as RichTable

from simmoe.specs.measurement import Table, read_table
from simmoe.validation.serving import compare as serving
from simmoe.validation.serving.unseen import SUFFIX
from simmoe.validation.summary import Comparison, ListedRow, Outcome

_NEEDED = frozenset({"file", "source_id"})
KINDS = ("throughput", "tpot", "ttft")
#: What stands for a kind, best first.
_STATISTICS = ("mean", "median", "unspecified")


def is_list(table: Table) -> bool:
    """Whether a table names rows of other files."""
    return set(table.columns) >= _NEEDED and not serving.is_serving_table(table)


def compare(
    table: Table, already: Sequence[Path] = (), before: Outcome | None = None, *, unseen: bool = False
) -> Outcome:
    """Predict the rows a list names; those of files compared ``already`` are looked up in the outcome ``before``.

    ``unseen``: with each row's own model left out of the engine times, as ``before`` must have been too.
    """
    suffix = SUFFIX if unseen else ""
    outcome = Outcome()
    wanted: dict[str, list[str]] = {}
    for name, source_id in zip(table.text("file"), table.text("source_id"), strict=True):
        wanted.setdefault(str(name), []).append(str(source_id))
    rows: list[ListedRow] = []
    for name, ids in wanted.items():
        path = _beside(table.path, name)
        if path is None:
            reason = f"{name} is not beside {table.path.name}"
            found = _none(reason, ids)
        elif path in already and before is not None:
            found, reason = _looked_up(before, path.name + suffix), "no such source_id, or no throughput, TPOT or TTFT"
        else:
            found, reason = _one_file(path, ids, unseen=unseen), "no throughput, TPOT or TTFT"
        if path is None or path not in already:
            outcome.extend(found)
        for source_id in ids:
            figures = _figures([c for c in found.comparisons if c.source_id == source_id])
            why = None if figures else found.skipped_rows.get(source_id, reason)
            rows.append(ListedRow(name, source_id, figures, why))
    if rows:
        outcome.lists[table.path.name + suffix] = rows
    return outcome


def _one_file(path: Path, ids: list[str], *, unseen: bool) -> Outcome:
    table = read_table(path)
    if not serving.is_serving_table(table):
        return _none(f"{path.name}: columns of no kind simmoe compares", ids)
    outcome = (serving.compare_unseen if unseen else serving.compare)(table, frozenset(ids))
    present = set(table.text("source_id").tolist())
    for source_id in ids:
        if source_id not in present:
            outcome.skip(f"{path.name} has no such source_id", row=source_id)
    return outcome


def _looked_up(before: Outcome, file: str) -> Outcome:
    made = [c for c in before.comparisons if c.file == file]
    return Outcome(comparisons=made, skipped_rows=before.skipped_rows)


def _none(reason: str, ids: list[str]) -> Outcome:
    outcome = Outcome()
    for source_id in ids:
        outcome.skip(reason, row=source_id)
    return outcome


def _beside(listing: Path, name: str) -> Path | None:
    plain = name.removesuffix(".gz")
    for candidate in (listing.parent / plain, listing.parent / f"{plain}.gz"):
        if candidate.is_file():
            return candidate
    return None


def _figures(comparisons: Sequence[Comparison]) -> dict[str, Comparison]:
    by_quantity = {c.quantity: c for c in comparisons}
    rates = [c for name, c in by_quantity.items() if name.endswith("_per_s")]
    found = {"throughput": rates[0]} if rates else {}
    for kind in ("tpot", "ttft"):
        names = [f"{kind}_{statistic}" for statistic in _STATISTICS if f"{kind}_{statistic}" in by_quantity]
        if names:
            found[kind] = by_quantity[names[0]]
    return found


def medians(rows: Sequence[ListedRow]) -> dict[str, tuple[int, float]]:
    """Per kind: how many rows have it, and the median of their absolute errors. [%]"""
    found = {}
    for kind in KINDS:
        errors = [100 * abs(row.figures[kind].error) for row in rows if kind in row.figures]
        if errors:
            found[kind] = len(errors), float(np.median(errors))
    return found


def table(name: str, rows: Sequence[ListedRow]) -> RichTable:
    """The listed rows with their errors in percent, the medians last."""
    made = RichTable(title=f"Rows of {name}: error in %", show_edge=False, pad_edge=False, header_style="bold")
    made.add_column("row", overflow="fold")
    for kind in KINDS:
        made.add_column(kind if kind == "throughput" else kind.upper(), justify="right")
    made.add_column("not predicted", overflow="fold")
    for row in rows:
        errors = [f"{100 * row.figures[kind].error:+.1f}" if kind in row.figures else "" for kind in KINDS]
        made.add_row(row.source_id, *errors, row.reason or "")
    found = medians(rows)
    made.add_section()
    made.add_row("median of |error|", *(f"{found[kind][1]:.1f}" if kind in found else "" for kind in KINDS), "")
    made.add_row("rows", *(str(found[kind][0]) if kind in found else "0" for kind in KINDS), "")
    return made


def to_json(rows: Sequence[ListedRow]) -> dict[str, Any]:
    """The listed rows as plain data; errors in percent."""
    return {
        "rows": [
            {
                "file": row.file,
                "source_id": row.source_id,
                "predicted": row.reason is None,
                "reason": row.reason,
                **{
                    kind: {
                        "quantity": c.quantity, "measured": c.measured, "predicted": round(c.predicted, 6),
                        "error_percent": round(100 * c.error, 4), "lower": c.lower, "upper": c.upper,
                    }
                    for kind, c in row.figures.items()
                },
            }
            for row in rows
        ],
        "median_ape_percent": {kind: round(error, 4) for kind, (_, error) in medians(rows).items()},
        "n": {kind: count for kind, (count, _) in medians(rows).items()},
        "not_predicted": sum(row.reason is not None for row in rows),
    }  # fmt: skip
