"""Commands that decide and show: plan, sweep, report, schema. Mounted on the command line by `simmoe.cli.main`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from simmoe.cli import options
from simmoe.console import show, show_json
from simmoe.errors import CapacityError, SpecError


def plan(
    hardware: Annotated[str, typer.Option(help="Candidates, with how many there are if few: h100,h200:64,h20.")],
    rate: Annotated[float, typer.Option(help="Requests per second to carry.")],
    model: Annotated[str, typer.Option(help="Preset, YAML file or config.json; several with commas.")] = "deepseek-v3",
    input_tokens: Annotated[float, typer.Option("--input", help="Mean input tokens.")] = 1024,
    output_tokens: Annotated[float, typer.Option("--output", help="Mean output tokens.")] = 256,
    cv: Annotated[float, typer.Option(help="Coefficient of variation of both lengths (lognormal); 0: fixed.")] = 0.0,
    ttft_p99: Annotated[str | None, typer.Option(help="Limit on TTFT, e.g. 2s.")] = None,
    ttft_p90: Annotated[str | None, typer.Option()] = None,
    ttft_p50: Annotated[str | None, typer.Option()] = None,
    tpot_p99: Annotated[str | None, typer.Option(help="Limit on TPOT, e.g. 50ms.")] = None,
    tpot_p90: Annotated[str | None, typer.Option()] = None,
    tpot_p50: Annotated[str | None, typer.Option()] = None,
    e2e_p99: Annotated[str | None, typer.Option(help="Limit on the time to the last token.")] = None,
    price: Annotated[
        list[str] | None, typer.Option(help="USD per device-hour, e.g. h100=2.5; else the file's.")
    ] = None,
    confidence: Annotated[float, typer.Option(help="Chance with which the limits shall hold.")] = 0.9,
    spares: Annotated[int, typer.Option(help="Replicas that may fail: bought on top.")] = 0,
    max_gpus: Annotated[int, typer.Option(help="Most devices bought.")] = 1024,
    budget: Annotated[float | None, typer.Option(help="Most spent. [USD/h]")] = None,
    replica_gpus: Annotated[int, typer.Option(help="Largest replica tried. [devices]")] = 32,
    active_experts: options.Cap = None,
    speculative: options.Speculative = None,
    engine: options.Engine = None,
    precision: options.Precision = None,
    requests: Annotated[int, typer.Option(min=100, help="Requests measured in each simulated run.")] = 3000,
    seed: Annotated[int, typer.Option(help="Seed of arrivals, lengths and routing.")] = 0,
    split: Annotated[bool, typer.Option(help="Prefill and decode on replicas of their own compete too.")] = True,
    processes: options.Processes = None,
    ray: options.Ray = None,
    json: options.Json = False,
) -> None:
    """Find the cheapest deployment that holds a service objective, how surely, and what would change the answer.

    For example:

    `simmoe plan --hardware h100,h200,h20 --rate 20 --input 2000 --output 500 --ttft-p99 2s --tpot-p99 50ms`

    `simmoe plan --model qwen3-30b-a3b --hardware h100:16,l40s --price l40s=0.8 --rate 9 --tpot-p99 25ms --json`

    Exit status 1 if nothing that may be bought holds the objective.
    """
    from simmoe.planning import search  # noqa: PLC0415
    from simmoe.planning.objective import limits_from  # noqa: PLC0415
    from simmoe.planning.offers import offers_from  # noqa: PLC0415
    from simmoe.planning.question import Question  # noqa: PLC0415
    from simmoe.report import plan as plan_report  # noqa: PLC0415
    from simmoe.specs import flags, load  # noqa: PLC0415

    question = Question(
        models=tuple(load.load_model(name) for name in model.split(",")),
        offers=offers_from(hardware, price or ()),
        workload=_workload(rate, input_tokens, output_tokens, cv),
        limits=limits_from(
            {
                "ttft-p99": ttft_p99,
                "ttft-p90": ttft_p90,
                "ttft-p50": ttft_p50,
                "tpot-p99": tpot_p99,
                "tpot-p90": tpot_p90,
                "tpot-p50": tpot_p50,
                "e2e-p99": e2e_p99,
            }
        ),
        base=flags.deployment_from(
            None, active_experts=active_experts, engine=engine, weight_precision=precision, speculative=speculative
        ),
        confidence=confidence,
        spares=spares,
        most_devices=max_gpus,
        budget_usd_per_hour=budget,
        replica_devices=replica_gpus,
        split=split,
        seed=seed,
        requests=requests,
    )
    with _status() as tell:
        found = search.plan(question, processes=processes, ray=ray, progress=tell)
    if json:
        show_json(plan_report.plan_json(found))
    elif found.answer is not None:
        show(plan_report.plan_table(found))
    if found.answer is None:
        raise CapacityError(plan_report.no_answer(found))


def sweep(
    grid: Annotated[Path, typer.Argument(help="Grid file: model, hardware, deployment, workload; lists and ranges.")],
    out: Annotated[Path, typer.Option(help="Table to write, .csv or .parquet; a second run goes on where it ended.")],
    processes: options.Processes = None,
    ray: options.Ray = None,
    json: options.Json = False,
) -> None:
    """Predict or simulate every point of a grid of specs into a table.

    For example, with grid.yaml

    `{model: deepseek-v3, hardware: [h100, h200], deployment: {tp: 8, dp: [1, 2], active_experts: [8, 4]},
    workload: {rate: {from: 1, to: 16, steps: 5, scale: log}, input: 2000, output: 500}}`

    `simmoe sweep grid.yaml --out grid.csv`

    `simmoe sweep grid.yaml --out grid.parquet --ray auto`
    """
    from simmoe.planning import grid as grids  # noqa: PLC0415
    from simmoe.planning import sweep as sweeps  # noqa: PLC0415

    read = grids.load_grid(grid)
    total = len(grids.points(read))
    with _bar() as bar:
        task = bar.add_task(read.name, total=total)
        try:
            rows = sweeps.sweep(
                read, out=out, processes=processes, ray=ray, progress=lambda done, _: bar.update(task, completed=done)
            )
        except KeyboardInterrupt:
            typer.echo(f"simmoe: {out}: interrupted; the same command goes on where it ended", err=True)
            raise typer.Exit(130) from None
    if json:
        show_json(rows)
    else:
        typer.echo(f"{out}: {len(rows)} points, " + ", ".join(f"{n} {status}" for status, n in sweeps.counts(rows)))
    if {row["status"] for row in rows} <= {"infeasible", "failed"}:
        raise SpecError(f"{grid}: no point can be served; the first: {rows[0]['reason']}")


def report(
    result: Annotated[Path, typer.Argument(help="Table of a sweep, or what --json of another command wrote.")],
    out: Annotated[Path | None, typer.Option(help="Page to write. [default: the result's name with .html]")] = None,
    png: Annotated[Path | None, typer.Option(help="Folder for the figures as PNG.")] = None,
) -> None:
    """Write a result as one self-contained HTML page: it needs no network, fits phones and prints.

    For example:

    `simmoe plan --hardware h100,h200 --rate 20 --ttft-p99 2s --tpot-p99 50ms --json > plan.json`

    `simmoe report plan.json --png figures`

    `simmoe report grid.csv`
    """
    from simmoe.report import html as html_report  # noqa: PLC0415

    if result.is_dir():
        raise SpecError(f"{result}: is a folder; give the table or JSON file in it")
    for path in html_report.write(result, out or result.with_suffix(".html"), pictures=png):
        typer.echo(path)


def schema(
    kind: Annotated[str, typer.Argument(help="hardware, model, deployment, workload, scenario or grid")],
) -> None:
    """Print the JSON Schema of a kind of YAML file, for editors.

    For example:

    `simmoe schema hardware > hardware.schema.json`
    """
    from simmoe.schema import schema_of  # noqa: PLC0415

    show_json(schema_of(kind))


def _bar() -> Any:
    """A progress bar on stderr with the time left; silent when stderr is not a terminal."""
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _workload(rate: float, input_tokens: float, output_tokens: float, cv: float) -> Any:
    from simmoe.specs import flags  # noqa: PLC0415
    from simmoe.specs.workload import Lengths  # noqa: PLC0415

    workload = flags.workload_from(
        None, rate=rate, concurrency=None, input_tokens=input_tokens, output_tokens=output_tokens
    )
    if not 0 <= cv < math.inf:
        raise SpecError(f"--cv {cv:g}: a coefficient of variation is 0 (fixed lengths) or more")
    if not cv:
        return workload
    spread = {name: Lengths(kind="lognormal", mean=getattr(workload, name).mean, cv=cv) for name in ("input", "output")}
    return workload.vary(**spread)


def _status() -> Any:
    """One changing line on stderr, silent when stderr is not a terminal."""
    from contextlib import contextmanager  # noqa: PLC0415

    from rich.console import Console  # noqa: PLC0415

    @contextmanager
    def shown() -> Any:
        console = Console(stderr=True)
        with console.status("") as line:
            yield line.update if console.is_terminal else (lambda _: None)

    return shown()


def mount(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command()(plan)
    app.command()(sweep)
    app.command()(report)
    app.command()(schema)
