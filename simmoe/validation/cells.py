"""Cells of a measured table's row as text and numbers, and why a row may not be predicted."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from pydantic import ValidationError

from simmoe.specs.base import Spec
from simmoe.specs.problems import describe

Row = Mapping[str, object]
#: Key under which a row tells the folder of its file.
BESIDE = "folder of the file"


class Unspoken(Exception):  # noqa: N818  (a reason, not an error)
    """Why a row is not predicted."""


def text(row: Row, name: str) -> str:
    """A cell as text, empty if it is missing."""
    value = row.get(name, "")
    if isinstance(value, float | np.floating):
        return "" if math.isnan(value) else f"{value:g}"
    return str(value)


def number(row: Row, name: str) -> float | None:
    """A cell as a number, None if it is missing or not one."""
    try:
        value = float(row.get(name))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return None if math.isnan(value) else value


def integer(row: Row, name: str) -> int | None:
    """A cell as a whole number, None if it is missing or not one."""
    value = number(row, name)
    return None if value is None else round(value)


def why(problem: ValueError, kind: type[Spec]) -> str:
    """What is wrong with a row read as a ``kind``, in one line."""
    return short(describe(problem, kind) if isinstance(problem, ValidationError) else str(problem))


def reason(problem: Exception) -> str:
    """Why a row is not predicted, in one line: an `Unspoken`'s own words, or the kind of error and what it says."""
    return str(problem) if isinstance(problem, Unspoken) else f"{type(problem).__name__}: {short(str(problem))}"


def short(words: str) -> str:
    """One line of at most 120 characters."""
    return " ".join(words.split())[:120]
