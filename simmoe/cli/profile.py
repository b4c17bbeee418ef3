"""`simmoe profile`: the command that needs torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simmoe import units
from simmoe.cli import options
from simmoe.errors import CoverageError, SpecError

if TYPE_CHECKING:
    from simmoe.profiling.profiler import ProfileResult


def profile(
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cpu",
    budget: Annotated[str, typer.Option(help="Wall time for everything, e.g. 3min or 900 s.")] = "15min",
    out: Annotated[Path, typer.Option(help="Folder for `<device>/*.csv` and hardware.yaml.")] = Path("profiles"),
    model: Annotated[list[str] | None, typer.Option(help="Model whose layers to measure; repeat for more.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16, bfloat16 or fp8_block. [default: by device]")
    ] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="Expert backend: loop, grouped, vllm, sglang, deep_gemm.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads on a CPU. [default: all]")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Processes for collectives; 1 measures none.")] = 1,
    timer: Annotated[
        str, typer.Option(help="wall, or cpu: one thread's run time, for a machine others use too.")
    ] = "wall",
    name: Annotated[str | None, typer.Option(help="Device name to use instead of the system's.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of inputs and routing.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and measure nothing.")] = False,
    json: options.Json = False,
) -> None:
    """Measure kernels of real layers on this device, row by row; a rerun adds what is missing.

    For example:

    `simmoe profile --device cpu --budget 3min`

    `simmoe profile --device cuda --budget 20min --ranks 8 --model deepseek-v3`
    """
    profiler = require_torch()
    seconds = budget_seconds(budget)
    try:
        result = profiler.run_profile(
            device=device, budget_s=seconds, out=out, models=model, dtype=dtype, backends=backend, threads=threads,
            ranks=ranks, name=name, seed=seed, dry_run=dry_run, timer=timer,
        )  # fmt: skip
    except KeyboardInterrupt:
        typer.echo(f"stopped; rows measured so far are under {out}, and the same command goes on from there", err=True)
        raise
    if json:
        import json as json_module  # noqa: PLC0415

        typer.echo(json_module.dumps(summary(result, dry_run=dry_run), indent=2))
    elif dry_run:
        typer.echo(profiler.plan_text(result))
    else:
        typer.echo(
            f"{result.folder}: {result.measured} rows measured, {result.present} were there, {len(result.skipped)} "
            f"skipped, {result.left_over} left for lack of time (rerun to add them)\n"
            f"Next: simmoe calibrate {result.folder}, then simmoe predict {result.hardware_file} "
            f"--model {model[0] if model else profiler.default_models(device)[0]}"
        )


def require_torch() -> Any:
    """The profiler, or one line that says what to install."""
    try:
        from simmoe.profiling import profiler  # noqa: PLC0415
    except ModuleNotFoundError as problem:
        if problem.name != "torch":
            raise
        raise CoverageError("measuring needs torch, which is not installed: pip install 'simmoe[profile]'") from None
    return profiler


def budget_seconds(text: str) -> float:
    """Parse a time budget; SpecError unless it is a positive time with a unit."""
    try:
        seconds = units.parse(text, "second")
    except SpecError as problem:
        raise SpecError(f"--budget {text}: give a time with its unit, e.g. 3min ({problem})") from None
    if seconds <= 0:
        raise SpecError(f"--budget {text}: must be more than 0 s")
    return seconds


def summary(result: ProfileResult, *, dry_run: bool) -> dict[str, Any]:
    """What a run did, as plain data."""
    return {
        "device": result.facts.name,
        "folder": str(result.folder),
        "hardware_file": str(result.hardware_file),
        "planned": len(result.planned),
        "measured": result.measured,
        "present": result.present,
        "skipped": list(result.skipped),
        "left_over": result.left_over,
        "dry_run": dry_run,
    }
