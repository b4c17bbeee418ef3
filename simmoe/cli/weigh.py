"""Commands that weigh speed against quality, and training against serving: frontier, scaling."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from simmoe.cli import options
from simmoe.console import show, show_json
from simmoe.errors import SpecError


def frontier(
    hardware: Annotated[str, typer.Argument(help="Hardware file or shipped name.")],
    model: options.Model = "deepseek-v2-lite",
    gpus: Annotated[int, typer.Option(help="Devices.")] = 1,
    tp: options.Tp = None,
    ep: Annotated[int, typer.Option(help="Expert-parallel size.")] = 1,
    dp: Annotated[int, typer.Option(help="Data-parallel attention ranks.")] = 1,
    concurrency: Annotated[str | None, typer.Option(help="Requests in flight. [default: 8,64,256]")] = None,
    rate: Annotated[str | None, typer.Option(help="Or requests per second, e.g. 2,8,16.")] = None,
    input_tokens: Annotated[float, typer.Option("--input", help="Mean input tokens.")] = 1024,
    output_tokens: Annotated[float, typer.Option("--output", help="Mean output tokens.")] = 1024,
    caps: Annotated[str | None, typer.Option(help="Caps on active experts. [default: native, 3/4, 1/2, 1/4]")] = None,
    pools: Annotated[str | None, typer.Option(help="Pool sizes after removing experts, e.g. 48,32.")] = None,
    refill: Annotated[bool, typer.Option("--refill", help="Also caps refilled from experts the batch woke.")] = False,
    price: options.Price = None,
    benchmark: Annotated[
        str | None, typer.Option(help="Benchmark on the plot's axis. [default: the first known]")
    ] = None,
    engine: options.Engine = None,
    engine_version: options.EngineVersion = None,
    precision: options.Precision = None,
    measured: Annotated[Path | None, typer.Option(help="Table of measured runs to show gains beside.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw speed against quality to this file.")] = None,
    json: options.Json = False,
) -> None:
    """Weigh throughput and cost against measured quality over caps, pools and refilled caps.

    For example:

    `simmoe frontier h100 --model deepseek-v2-lite --caps 6,4,2 --pools 48,32 --plot frontier.png`

    `simmoe frontier h200 --model deepseek-v3 --gpus 8 --concurrency 16,64,128 --json`

    `simmoe frontier h100 --model qwen3-30b-a3b --caps 8,6,5,4,3 --refill`

    Beside measured runs: docs/frontiers.md.
    """
    from simmoe.planning import frontier as frontiers  # noqa: PLC0415
    from simmoe.planning.offers import offer  # noqa: PLC0415
    from simmoe.report import frontier as frontier_report  # noqa: PLC0415
    from simmoe.specs import flags, load  # noqa: PLC0415

    if rate is not None and concurrency is not None:
        raise SpecError("give --rate (open loop) or --concurrency (closed loop), not both")
    loads = (
        _numbers("rate", rate) if rate is not None else [*map(float, _whole("concurrency", concurrency or "8,64,256"))]
    )
    if benchmark is not None and plot is None:
        raise SpecError(f"--benchmark {benchmark}: it is for the axis of a plot; give --plot FILE too, or leave it out")
    described, shapes = load.load_hardware(hardware), load.load_model(model)
    priced = described.price_per_device_hour is not None or price is not None
    workload, *_ = (  # each is looked at, so that a wrong one is told by its flag
        flags.workload_from(
            None,
            rate=at if rate is not None else None,
            concurrency=None if rate is not None else round(at),
            input_tokens=input_tokens,
            output_tokens=output_tokens,
        )
        for at in loads
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
            caps=_whole("caps", caps) if caps else None,
            pools=_whole("pools", pools) if pools else (),
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


def scaling(
    budget: Annotated[float, typer.Option(help="Training budget. [FLOP]")] = 5.15e21,
    experts: Annotated[str, typer.Option(help="Expert counts to compare.")] = "1,4,8,16,32",
    reference: Annotated[int, typer.Option(min=1, help="Expert count whose loss is to be matched.")] = 4,
    hardware: Annotated[str, typer.Option(help="What serves the model.")] = "a100-40gb",
    price: options.Price = None,
    input_tokens: Annotated[float, typer.Option("--input", help="Mean input tokens.")] = 161,
    output_tokens: Annotated[float, typer.Option("--output", help="Mean output tokens.")] = 338,
    json: options.Json = False,
) -> None:
    """Weigh training budget against serving cost over expert counts, with the scaling law of MoE models.

    For example:

    `simmoe scaling`

    `simmoe scaling --budget 8.18e21 --experts 1,4,8,16 --hardware h100 --json`

    Default lengths: mean ShareGPT prompt and answer, as vLLM's first paper states them (arXiv 2309.06180, section 6.1).
    """
    from simmoe.planning import training  # noqa: PLC0415
    from simmoe.planning.offers import offer  # noqa: PLC0415
    from simmoe.report import training as training_report  # noqa: PLC0415
    from simmoe.specs import flags, load  # noqa: PLC0415

    counts = sorted({reference, *_whole("experts", experts)})
    sold = offer(load.load_hardware(hardware), price, name=hardware)
    base, choices = training.compare(
        budget,
        counts,
        sold,
        flags.workload_from(None, rate=1.0, concurrency=None, input_tokens=input_tokens, output_tokens=output_tokens),
        reference=reference,
    )
    if json:
        show_json(training_report.training_json(budget, base, choices, sold))
    else:
        show(training_report.training_table(budget, base, choices, sold, reference))


def _numbers(flag: str, text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise SpecError(f"--{flag} {text!r}: give numbers with commas, e.g. 8,64,256") from None
    if not all(0 < number < math.inf for number in numbers):
        raise SpecError(f"--{flag} {text!r}: every number must be above 0 and finite")
    return numbers


def _whole(flag: str, text: str) -> list[int]:
    numbers = _numbers(flag, text)
    if any(number % 1 for number in numbers):
        raise SpecError(f"--{flag} {text!r}: give whole numbers with commas, e.g. 8,6,4")
    return [round(number) for number in numbers]


def mount(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command()(frontier)
    app.command()(scaling)
