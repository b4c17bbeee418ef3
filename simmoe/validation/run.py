"""Which files can be compared and how: kernel tables, serving tables, benchmark results; and what a person reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from simmoe.costs.operators.registry import described
from simmoe.errors import MeasurementError
from simmoe.specs.measurement import read_table, stem, table_paths
from simmoe.validation import kernels, misses
from simmoe.validation.serving import bench_json, listed
from simmoe.validation.serving import compare as serving
from simmoe.validation.serving.bench_json import Setup
from simmoe.validation.showdown import compare as showdown
from simmoe.validation.showdown import table as showdown_table
from simmoe.validation.summary import GroupError, Outcome, summarise

if TYPE_CHECKING:
    from rich.progress import Progress

_FIGURES = ("mape_percent", "median_ape_percent", "p90_ape_percent", "bias_percent", "inside_90_percent")


def compare(
    paths: Sequence[Path], progress: Progress | None = None, setup: Setup | None = None, *, unseen: bool = False
) -> Outcome:
    """Compare every table and benchmark result found in the paths that simmoe recognises by its columns or keys.

    Parameters
    ----------
    setup : where and how the engines of benchmark results ran; its hardware file also tells the devices of kernel
        tables that end in its name.
    unseen : judge rows of serving tables once more with their own model left out of the engine times.

    Raises
    ------
    MeasurementError
        If a path does not exist, a folder has nothing to compare, or a file is neither CSV nor JSON.
    SpecError
        If there are benchmark results but no setup.
    """
    outcome = Outcome()
    showdowns = [path for path in paths if path.is_dir() and showdown.is_showdown(path)]
    for folder in showdowns:
        outcome.extend(showdown.compare(folder, progress))
    paths = [path for path in paths if path not in showdowns]
    results = bench_json.result_paths(paths)
    tables = _tables(paths, results)
    file = Path(setup.hardware_name) if setup else None
    given = described(file) if file is not None and file.is_file() else None
    task = progress.add_task("comparing", total=len(tables) + len(results)) if progress else None
    lists = []
    hidden = Outcome()
    for path in tables:
        table = read_table(path)
        if kernels.is_kernel_table(table):
            outcome.extend(kernels.compare(table, given))
        elif serving.is_serving_table(table):
            outcome.extend(serving.compare(table))
            if unseen:
                hidden.extend(serving.compare_unseen(table))
        elif listed.is_list(table):
            lists.append(table)
        else:
            outcome.skip(f"{path.name}: columns of no kind simmoe compares", table.rows)
        if progress and task is not None:
            progress.advance(task)
    for table in lists:
        outcome.extend(listed.compare(table, tables, outcome))
        if unseen:
            hidden.extend(listed.compare(table, tables, hidden, unseen=True))
    hidden.skipped.clear()  # counted once already
    outcome.extend(hidden)
    for path in results:
        found = _compare_results(path, setup)
        if not found.comparisons and not found.skipped:
            if path in paths:
                raise MeasurementError(f"{path}: not a result of vllm bench serve or sglang.bench_serving")
            outcome.skip(f"{path.name}: not a benchmark result")
        outcome.extend(found)
        if progress and task is not None:
            progress.advance(task)
    return outcome


def _tables(paths: Sequence[Path], results: Sequence[Path]) -> list[Path]:
    """CSV tables; a folder without any is fine if it holds results."""
    found: list[Path] = []
    for path in paths:
        if path in results:
            continue
        try:
            found += table_paths([path])
        except MeasurementError:
            if not any(path in result.parents for result in results):
                raise
    return found


def _compare_results(path: Path, setup: Setup | None) -> Outcome:
    lines = []
    for line, row, result in bench_json.rows(path, setup):
        assert setup is not None
        told = partial(bench_json.describe, result, setup)
        lines.append((line, row, "/".join((stem_of(path), *bench_json.names(result, setup))), told))
    return serving.compare_runs(str(path), lines) if lines else Outcome()


def stem_of(path: Path) -> str:
    """File name without its ending."""
    return path.stem if path.suffix in (".json", ".jsonl") else stem(path)


def table(outcome: Outcome) -> RenderableType:
    """Errors per group and quantity, what large misses of runs point to, what was not compared or was substituted."""
    errors = RichTable(show_edge=False, pad_edge=False, header_style="bold")
    errors.add_column("group")
    errors.add_column("quantity")
    for title in ("n", "mean\nerror %", "median\nerror %", "p90\nerror %", "bias %", "inside\n90 % band"):
        errors.add_column(title, justify="right")
    rest = [c for c in outcome.comparisons if not showdown_table.is_showdown_group(c.group)]
    for group in summarise(rest):
        errors.add_row(group.group, group.quantity, str(group.n), *_figures(group))
    parts: list[RenderableType] = [errors] if rest or not outcome.comparisons else []
    if len(rest) < len(outcome.comparisons):
        parts.append(showdown_table.table(outcome.comparisons))
    parts += [listed.table(name, rows) for name, rows in outcome.lists.items()]
    blamed = blame_lines(outcome)
    if blamed:
        said = (
            "\nLarge misses of runs (outside the 90 % band and over 20 % off), by the part that would explain them:\n"
        )
        parts.append(Text(said + "\n".join(f"  {line}" for line in blamed)))
    lines = [f"  {n:6d}  {reason}" for reason, n in outcome.skipped.most_common()]
    if lines:
        parts.append(Text("\nRows not predicted:\n" + "\n".join(lines)))
    if outcome.notes:
        parts.append(Text("\nCoverage:\n" + "\n".join(f"  - {note}" for note in sorted(outcome.notes))))
    return Group(*parts)


def _figures(group: GroupError) -> list[str]:
    return [f"{getattr(group, name):.1f}" for name in _FIGURES]


def blame_lines(outcome: Outcome) -> list[str]:
    """One line per group with large misses of runs: how many figures, and which part each points to."""
    figures = Counter(c.group for c in outcome.comparisons)
    return [
        f"{group}: {sum(parts.values())} of {figures[group]} figures: "
        + ", ".join(f"{part} {n}" for part, n in parts.most_common())
        for group, parts in sorted(misses.by_part(outcome).items())
        if not showdown_table.is_showdown_group(group)
    ]
