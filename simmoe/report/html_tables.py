"""A page for results that have no page of their own (simulations, frontiers, training budgets): their tables in words.

Figures come with the commands' own ``--plot``; this shows every number of the result, and how it was run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from simmoe import units
from simmoe.report.html_page import Page

#: What a result was asked with; shown as written.
_ASKED = ("deployment", "workload", "cluster", "run", "engine_parameters", "provenance")
#: A key that each of these results has.
MARKS = frozenset({"metrics", "points", "choices"})
_LATENCIES = ("ttft", "tpot", "itl", "e2e")
#: Series over time are for pictures.
_LEFT_OUT = ("series", "replicas_on")


def tables_page(data: Mapping[str, Any]) -> Page:
    """The page of a result of ``simmoe simulate``, ``frontier`` or ``scaling``."""
    names = [str(data[key]) for key in ("model", "hardware") if key in data]
    page = Page(" on ".join(names) if "model" in data else f"A training budget, served on {names[0]}")
    shown = {key: value for key, value in data.items() if key not in (*_ASKED, *_LEFT_OUT)}
    _mapping(page, shown)
    scores = [score for point in data.get("points", ()) for score in point["scores"]]
    page.items(list(dict.fromkeys(f"{s['benchmark']}: {s['group']}, {s['method']}; {s['source']}" for s in scores)))
    if asked := {key: _stated(data[key]) for key in _ASKED if key in data}:
        page.heading("As asked")
        page.code(json.dumps(asked, indent=1))
    return page


def sweep_page(name: str, rows: Sequence[Mapping[str, Any]]) -> Page:
    """The page of a sweep's rows: what is the same at every point as a list, the rest as a table."""
    page = Page(f"Sweep {name}: {len(rows)} points")
    columns = [key for key in rows[0] if key not in ("point", "seed") and any(row[key] is not None for row in rows)]
    asked = columns[: columns.index("status")]
    same = [key for key in asked if len({str(row[key]) for row in rows}) == 1 and len(rows) > 1]
    page.heading("The same at every point")
    page.items([f"{key}: {_cell('', rows[0][key])}" for key in same])
    page.heading("Points")
    told = [key for key in columns if key not in same]
    page.table([key if key in asked else _words(key) for key in told],
               [[_cell("" if key in asked else key, row[key]) for key in told] for row in rows])  # fmt: skip
    page.heading("As run")
    page.items([f"digest of each point's inputs: {', '.join(str(row['point']) for row in rows)}"])
    return page


def _mapping(page: Page, values: Mapping[str, Any]) -> None:
    """Single values as a list; mappings and lists of them as tables, each under its name."""
    page.items([f"{_words(key)}: {_cell(key, value)}" for key, value in values.items() if _single(value)])
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            page.heading(_words(key))
            alike = {name: each for name, each in value.items() if isinstance(each, Mapping)}
            if rest := {name: each for name, each in value.items() if name not in alike}:
                page.table(("", ""), [(_words(name), _cell(name, each)) for name, each in rest.items()])
            if alike:
                _rows(page, [{"": _words(name), **_flat(each, name)} for name, each in alike.items()])
        elif isinstance(value, list) and value:
            page.heading(_words(key))
            if isinstance(value[0], Mapping):
                _rows(page, [_flat(each) for each in value])
            else:
                page.items([_cell(key, each) for each in value])


def _flat(values: Mapping[str, Any], outer: str = "", before: str = "") -> dict[str, str]:
    """Cells of a row; mappings inside are told by their names, seconds by the nearest name that ends so."""
    cells: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            cells |= _flat(value, key, f"{before}{_words(key)} ")
        elif key == "scores":
            cells |= {f"{each['benchmark']} [% correct]": _cell(key, each["score_percent"]) for each in value}
        elif value not in (None, []):
            cells[before + _words(key)] = _cell(key if _seconds(key) else outer or key, value)
    return cells


def _rows(page: Page, rows: Sequence[Mapping[str, str]]) -> None:
    """Tables of the rows, one for those that share a column beside the first."""
    groups: list[list[Mapping[str, str]]] = []
    for row in rows:
        shared = [group for group in groups if any(set(row) & set(other) - {""} for other in group)]
        shared[0].append(row) if shared else groups.append([row])
    for group in groups:
        columns = list(dict.fromkeys(name for row in group for name in row))
        page.table(columns, [[row.get(name, "-") for name in columns] for row in group])


def _single(value: object) -> bool:
    return value is None or isinstance(value, str | int | float)


def _seconds(key: str) -> bool:
    return key in _LATENCIES or (key.endswith("_s") and not key.endswith("_per_s"))


def _words(key: str) -> str:
    return key.removesuffix("_s").replace("_", " ") if _seconds(key) else key.replace("_per_s", "/s").replace("_", " ")


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return (", " if value and isinstance(value[0], str) else " .. ").join(_cell(key, each) for each in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return str(value)
    if _seconds(key):
        return units.text(value, "s")
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _stated(values: Any) -> Any:
    """Without what was left at nothing."""
    return {k: v for k, v in values.items() if v is not None} if isinstance(values, Mapping) else values
