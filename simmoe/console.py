"""Where text for people goes: as wide as the terminal; into a pipe, $COLUMNS or 160 columns, and never under 120."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress


def show(renderable: RenderableType) -> None:
    """Print a rich renderable on stdout."""
    from rich.console import Console  # noqa: PLC0415  (only once something is printed)

    columns = os.environ.get("COLUMNS", "")
    wide = max(int(columns), 120) if columns.isdigit() else 160  # narrower tables break words apart
    Console(width=None if sys.stdout.isatty() else wide, highlight=False).print(renderable)


def show_json(data: Any) -> None:
    """Print plain data on stdout, for machines."""
    sys.stdout.write(json.dumps(data, indent=2, default=str) + "\n")


def progress() -> Progress:
    """A progress bar on stderr, with the time left; silent when stderr is not a terminal."""
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
