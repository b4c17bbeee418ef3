"""`simmoe validate --live`: parse, run, print."""

from __future__ import annotations

import json as json_module
import sys
import tempfile
from pathlib import Path

import typer

from simmoe.cli.profile import budget_seconds, require_torch
from simmoe.errors import SpecError


def validate_live(
    *,
    device: str,
    budget: str,
    caps: str | None,
    loads: str,
    duration: str,
    repeats: int,
    threads: int | None,
    timer: str,
    out: Path | None,
    rows: Path | None,
    fail_above: float | None,
    json: bool,
) -> None:
    """Profile this device, fit, predict, serve and compare; print the grid."""
    require_torch()
    from rich.console import Console  # noqa: PLC0415

    from simmoe.live import figures as live_figures  # noqa: PLC0415
    from simmoe.live import validation as live_validation  # noqa: PLC0415
    from simmoe.report import live as live_report  # noqa: PLC0415
    from simmoe.validation import ToleranceError, summary  # noqa: PLC0415

    settings = live_validation.LiveSettings(
        device=device, budget_s=budget_seconds(budget), caps=_numbers(caps), loads=tuple(loads.split(",")),
        duration_s=budget_seconds(duration), repeats=repeats, threads=threads, timer=timer,
    )  # fmt: skip

    def say(line: str) -> None:
        sys.stderr.write(f"{line}\n")

    with tempfile.TemporaryDirectory() as scratch:
        outcome = live_validation.validate_live(settings, out or Path(scratch), say)
        plain = live_figures.to_json(outcome)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            (out / "live.json").write_text(json_module.dumps(plain, indent=2) + "\n", encoding="utf-8")
        compared = outcome.comparisons()
        if rows is not None:
            summary.write_rows(compared, rows)
        if json:
            typer.echo(json_module.dumps(plain, indent=2))
        else:
            width = None if sys.stdout.isatty() else 160
            Console(width=width, highlight=False).print(live_report.table(outcome))
    worst = max(summary.summarise(compared.comparisons), key=lambda group: group.mape_percent)
    if fail_above is not None and worst.mape_percent > fail_above:
        said = f"{worst.group} {worst.quantity}: mean error {worst.mape_percent:.1f} %"
        raise ToleranceError(f"{said} is above --fail-above {fail_above:g}")


def _numbers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise SpecError(f"--caps {text!r}: give whole numbers with commas, e.g. 6,4,2") from None
