"""The showdown for people: every simulator's errors in one table, and the runs simmoe misses by much."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from simmoe.validation.showdown.compare import GROUP, OWN
from simmoe.validation.summary import Comparison

_SHOWN = ("e2e_mean", "ttft_mean", "itl_mean", "ttft_p99", "output_tokens_per_s")
_TITLES = ("e2e", "TTFT", "ITL", "TTFT p99", "output rate")
LARGE = 0.15


def is_showdown_group(group: str) -> bool:
    """Whether a comparison's group belongs to the showdown."""
    return group.startswith(f"{GROUP}/")


def table(comparisons: Sequence[Comparison]) -> RenderableType:
    """Mean / median absolute error per simulator, all runs and MoE alone; simmoe first, then by error of e2e."""
    found: dict[tuple[str, str], dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for c in comparisons:
        if is_showdown_group(c.group):
            _, simulator, scope = c.group.split("/")
            found[simulator, scope][c.quantity][c.source_id] = c.error
    errors = RichTable(show_edge=False, pad_edge=False, header_style="bold")
    for title in ("simulator", "runs"):
        errors.add_column(title)
    errors.add_column("n", justify="right")
    for title in _TITLES:
        errors.add_column(f"{title}\nerror %", justify="right")
    errors.add_column("simmoe's e2e, TTFT,\nITL on these runs", justify="right")
    for scope in ("all", "moe", "overloaded"):
        rows = [(simulator, figures) for (simulator, where), figures in found.items() if where == scope]
        rows.sort(key=lambda row: (row[0] != OWN, _mean(row[1].get("e2e_mean", {}))))
        own = found.get((OWN, scope), {})
        for simulator, figures in rows:
            n = max(len(values) for values in figures.values())
            cells = [_cell(figures.get(quantity, {})) for quantity in _SHOWN]
            errors.add_row(simulator, scope, str(n), *cells, _on_same(own, figures) if simulator != OWN else "")
        errors.add_section()
    lines = [f"  {line}" for line in large_misses(comparisons)]
    heading = Text("Mean / median absolute error per simulator over the runs it predicted\n")
    parts: list[RenderableType] = [heading, errors]
    if lines:
        parts.append(Text(f"\nFigures of simmoe more than {LARGE:.0%} off:\n" + "\n".join(lines)))
    return Group(*parts)


def large_misses(comparisons: Sequence[Comparison]) -> list[str]:
    """List what simmoe gets more than 15 % off, run by run."""
    missed: dict[str, list[str]] = defaultdict(list)
    for c in comparisons:
        if c.group in (f"{GROUP}/{OWN}/all", f"{GROUP}/{OWN}/overloaded") and abs(c.error) > LARGE:
            missed[c.source_id].append(f"{c.quantity} {c.error:+.0%}")
    return [f"{run}: {', '.join(figures)}" for run, figures in sorted(missed.items())]


def _mean(errors: Mapping[str, float]) -> float:
    return float(np.mean(np.abs(list(errors.values())))) if errors else np.inf


def _cell(errors: Mapping[str, float]) -> str:
    if not errors:
        return "-"
    sizes = 100 * np.abs(list(errors.values()))
    return f"{np.mean(sizes):.1f} / {np.median(sizes):.1f}"


def _on_same(own: Mapping[str, Mapping[str, float]], peer: Mapping[str, Mapping[str, float]]) -> str:
    cells = []
    for quantity in _SHOWN[:3]:
        mine, runs = own.get(quantity, {}), peer.get(quantity, {})
        shared = {run: mine[run] for run in runs if run in mine}
        cells.append(f"{100 * _mean(shared):.1f}" if shared else "-")
    return ", ".join(cells)
