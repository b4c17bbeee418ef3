"""Commands that decide: plan, frontier, sweep, scaling. Mounted on the command line's app by `simmoe.cli`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from simmoe.console import show, show_json
from simmoe.errors import CapacityError, SpecError

JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]
RayOption = Annotated[
    str | None, typer.Option(help="Run on a Ray cluster: its address, auto, or local to start one here.")
]
ProcessesOption = Annotated[int | None, typer.Option(min=1, help="Local processes. [default: one per core]")]


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
    active_experts: Annotated[int | None, typer.Option(help="Cap on active experts; costs quality.")] = None,
    engine: Annotated[str | None, typer.Option(help="vllm, sglang, trtllm or generic.")] = None,
    precision: Annotated[str | None, typer.Option(help="Weights: bfloat16, fp8, fp8_block, int8, int4 ...")] = None,
    requests: Annotated[int, typer.Option(min=100, help="Requests measured in each simulated run.")] = 3000,
    seed: Annotated[int, typer.Option(help="Seed of arrivals, lengths and routing.")] = 0,
    split: Annotated[bool, typer.Option(help="Prefill and decode on replicas of their own compete too.")] = True,
    processes: ProcessesOption = None,
    ray: RayOption = None,
    json: JsonOption = False,
) -> None:
    """Find the cheapest deployment that holds a service objective, how surely, and what would change the answer.

    For example:

    `simmoe plan --hardware h100,h200,h20 --rate 20 --input 2000 --output 500 --ttft-p99 2s --tpot-p99 50ms`

    `simmoe plan --model qwen3-30b-a3b --hardware h100:16,l40s --price l40s=0.8 --rate 9 --tpot-p99 25ms --json`

    Exit status 1 if nothing that may be bought holds the objective.
    """
    from simmoe import plan_report  # noqa: PLC0415
    from simmoe.planning import search  # noqa: PLC0415
    from simmoe.planning.objective import limits_from  # noqa: PLC0415
    from simmoe.planning.offers import offers_from  # noqa: PLC0415
    from simmoe.planning.question import Question  # noqa: PLC0415
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
        base=flags.deployment_from(None, active_experts=active_experts, engine=engine, weight_precision=precision),
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


def frontier(
    hardware: Annotated[str, typer.Argument(help="Hardware file or shipped name.")],
    model: Annotated[str, typer.Option(help="Preset, YAML file or config.json.")] = "deepseek-v2-lite",
    gpus: Annotated[int, typer.Option(help="Devices.")] = 1,
    tp: Annotated[int | None, typer.Option(help="Tensor-parallel size. [default: all devices of a replica]")] = None,
    ep: Annotated[int, typer.Option(help="Expert-parallel size.")] = 1,
    dp: Annotated[int, typer.Option(help="Data-parallel attention ranks.")] = 1,
    concurrency: Annotated[str | None, typer.Option(help="Requests in flight. [default: 8,64,256]")] = None,
    rate: Annotated[str | None, typer.Option(help="Or requests per second, e.g. 2,8,16.")] = None,
    input_tokens: Annotated[float, typer.Option("--input", help="Mean input tokens.")] = 1024,
    output_tokens: Annotated[float, typer.Option("--output", help="Mean output tokens.")] = 1024,
    caps: Annotated[str | None, typer.Option(help="Caps on active experts. [default: native, 3/4, 1/2, 1/4]")] = None,
    pools: Annotated[str | None, typer.Option(help="Pool sizes after removing experts, e.g. 48,32.")] = None,
    refill: Annotated[bool, typer.Option("--refill", help="Also caps refilled from experts the batch woke.")] = False,
    price: Annotated[float | None, typer.Option(help="USD per device-hour; else the file's. ")] = None,
    benchmark: Annotated[
        str | None, typer.Option(help="Benchmark on the plot's axis. [default: the first known]")
    ] = None,
    engine: Annotated[str | None, typer.Option(help="vllm, sglang, trtllm or generic.")] = None,
    engine_version: Annotated[str | None, typer.Option(help="Its version, e.g. 0.4.4.post1.")] = None,
    precision: Annotated[str | None, typer.Option(help="Weights: bfloat16, fp8, fp8_block, int8, int4 ...")] = None,
    measured: Annotated[Path | None, typer.Option(help="Table of measured runs to show gains beside.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw speed against quality to this file.")] = None,
    json: JsonOption = False,
) -> None:
    """Weigh throughput and cost against measured quality over caps, pools and refilled caps.

    For example:

    `simmoe frontier h100 --model deepseek-v2-lite --caps 6,4,2 --pools 48,32 --plot frontier.png`

    `simmoe frontier h200 --model deepseek-v3 --gpus 8 --concurrency 16,64,128 --json`

    `simmoe frontier h100 --model qwen3-30b-a3b --caps 8,6,5,4,3 --refill`

    Beside measured runs: docs/frontiers.md.
    """
    from simmoe import frontier_report  # noqa: PLC0415
    from simmoe.planning import frontier as frontiers  # noqa: PLC0415
    from simmoe.planning.offers import offer  # noqa: PLC0415
    from simmoe.specs import flags, load  # noqa: PLC0415

    if rate is not None and concurrency is not None:
        raise SpecError("give --rate (open loop) or --concurrency (closed loop), not both")
    loads = _numbers("rate", rate) if rate is not None else _numbers("concurrency", concurrency or "8,64,256")
    described, shapes = load.load_hardware(hardware), load.load_model(model)
    priced = described.price_per_device_hour is not None or price is not None
    workload = flags.workload_from(
        None,
        rate=loads[0] if rate is not None else None,
        concurrency=None if rate is not None else round(loads[0]),
        input_tokens=input_tokens,
        output_tokens=output_tokens,
    )
    found = frontiers.frontier(
        described,
        shapes,
        flags.deployment_from(
            None,
            gpus=gpus,
            tp=tp,
            ep=ep,
            dp=dp,
            engine=engine,
            engine_version=engine_version,
            weight_precision=precision,
        ),
        workload,
        frontiers.policies(
            shapes,
            caps=[round(n) for n in _numbers("caps", caps)] if caps else None,
            pools=[round(n) for n in _numbers("pools", pools)] if pools else (),
            refill=refill,
        ),
        loads=loads,
        usd_per_device_hour=offer(described, price, name=hardware).usd_per_device_hour if priced else None,
    )
    beside = frontier_report.read_measured(measured, found) if measured else None
    if plot is not None:
        frontier_report.plot(found, plot, benchmark, beside)
    if json:
        show_json(frontier_report.frontier_json(found, beside))
    else:
        show(frontier_report.frontier_table(found, beside))


def sweep(
    grid: Annotated[Path, typer.Argument(help="Grid file: model, hardware, deployment, workload; lists and ranges.")],
    out: Annotated[Path, typer.Option(help="Table to write, .csv or .parquet; a second run goes on where it ended.")],
    processes: ProcessesOption = None,
    ray: RayOption = None,
    json: JsonOption = False,
) -> None:
    """Predict or simulate every point of a grid of specs into a table.

    For example, with grid.yaml

    `{model: deepseek-v3, hardware: [h100, h200], deployment: {tp: 8, dp: [1, 2], active_experts: [8, 4]},
    workload: {rate: {from: 1, to: 16, steps: 5, scale: log}, input: 2000, output: 500}}`

    `simmoe sweep grid.yaml --out grid.csv`

    `simmoe sweep grid.yaml --out grid.parquet --ray auto`
    """
    from simmoe.planning import sweep as sweeps  # noqa: PLC0415

    read = sweeps.load_grid(grid)
    total = len(sweeps.points(read))
    with _bar() as bar:
        task = bar.add_task(read.name, total=total)
        rows = sweeps.sweep(
            read, out=out, processes=processes, ray=ray, progress=lambda done, _: bar.update(task, completed=done)
        )
    if json:
        show_json(rows)
    else:
        typer.echo(f"{out}: {len(rows)} points, " + ", ".join(f"{n} {status}" for status, n in sweeps.counts(rows)))


def scaling(
    budget: Annotated[float, typer.Option(help="Training budget. [FLOP]")] = 5.15e21,
    experts: Annotated[str, typer.Option(help="Expert counts to compare.")] = "1,4,8,16,32",
    reference: Annotated[int, typer.Option(min=1, help="Expert count whose loss is to be matched.")] = 4,
    hardware: Annotated[str, typer.Option(help="What serves the model.")] = "a100-40gb",
    price: Annotated[float | None, typer.Option(help="USD per device-hour; else the file's.")] = None,
    input_tokens: Annotated[float, typer.Option("--input", help="Mean input tokens.")] = 161,
    output_tokens: Annotated[float, typer.Option("--output", help="Mean output tokens.")] = 338,
    json: JsonOption = False,
) -> None:
    """Weigh training budget against serving cost over expert counts, with the scaling law of MoE models.

    For example:

    `simmoe scaling`

    `simmoe scaling --budget 8.18e21 --experts 1,4,8,16 --hardware h100 --json`

    Default lengths: mean ShareGPT prompt and answer, as vLLM's first paper states them (arXiv 2309.06180, section 6.1).
    """
    from simmoe import training_report  # noqa: PLC0415
    from simmoe.planning import training  # noqa: PLC0415
    from simmoe.planning.offers import offer  # noqa: PLC0415
    from simmoe.specs import load  # noqa: PLC0415

    counts = sorted({reference, *(round(n) for n in _numbers("experts", experts))})
    sold = offer(load.load_hardware(hardware), price, name=hardware)
    base, choices = training.compare(
        budget, counts, sold, _workload(1.0, input_tokens, output_tokens, 0.0), reference=reference
    )
    if json:
        show_json(training_report.training_json(budget, base, choices, sold))
    else:
        show(training_report.training_table(budget, base, choices, sold, reference))


def report(
    result: Annotated[Path, typer.Argument(help="What `simmoe plan --json` or `simmoe predict --json` wrote.")],
    out: Annotated[Path | None, typer.Option(help="Page to write. [default: the result's name with .html]")] = None,
    png: Annotated[Path | None, typer.Option(help="Folder for the figures as PNG.")] = None,
) -> None:
    """Write a result as one self-contained HTML page: it needs no network, fits phones and prints.

    For example:

    `simmoe plan --hardware h100,h200 --rate 20 --ttft-p99 2s --tpot-p99 50ms --json > plan.json`

    `simmoe report plan.json --png figures`
    """
    from simmoe import html_report  # noqa: PLC0415

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


def _numbers(flag: str, text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise SpecError(f"--{flag} {text!r}: give numbers with commas, e.g. 8,64,256") from None
    if min(numbers) <= 0:
        raise SpecError(f"--{flag} {text!r}: every number must be above 0")
    return numbers


def _workload(rate: float, input_tokens: float, output_tokens: float, cv: float) -> Any:
    from simmoe.specs import flags  # noqa: PLC0415
    from simmoe.specs.workload import Lengths  # noqa: PLC0415

    workload = flags.workload_from(
        None, rate=rate, concurrency=None, input_tokens=input_tokens, output_tokens=output_tokens
    )
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
    app.command()(frontier)
    app.command()(sweep)
    app.command()(scaling)
    app.command()(report)
    app.command()(schema)
