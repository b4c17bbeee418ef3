"""The command `simmoe simulate`. Mounted on the command line's app by `simmoe.cli.main`."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer

from simmoe import console
from simmoe.cli import options
from simmoe.console import show
from simmoe.errors import SaturationError, SimmoeError, SpecError


def simulate(
    target: Annotated[str, typer.Argument(help="A scenario file (YAML), or a hardware file or shipped name.")],
    model: Annotated[
        str | None, typer.Option(help="Preset name, YAML file or config.json. [default: deepseek-v2-lite]")
    ] = None,
    gpus: options.Gpus = None,
    tp: options.Tp = None,
    ep: options.Ep = None,
    dp: options.Dp = None,
    pp: options.Pp = None,
    rate: options.Rate = None,
    concurrency: options.Concurrency = None,
    input_tokens: options.Input = None,
    output_tokens: options.Output = None,
    active_experts: options.Cap = None,
    total_experts: options.Pool = None,
    routing: options.Routing = None,
    speculative: options.Speculative = None,
    engine: options.Engine = None,
    engine_version: options.EngineVersion = None,
    precision: options.Precision = None,
    deployment: options.Deployment = None,
    workload: options.Workload = None,
    replay: Annotated[
        Path | None, typer.Option(help="Play a recorded trace (Azure, BurstGPT, Mooncake, benchmark output ...).")
    ] = None,
    burstiness: Annotated[
        float | None, typer.Option(help="Shape of gamma distributed gaps, as in vllm bench serve; below 1: bursts.")
    ] = None,
    goodput: Annotated[str | None, typer.Option(help="Count requests within limits: ttft=500ms,tpot=30ms.")] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="Requests measured. [default: 2000, or all]")] = None,
    duration: Annotated[float | None, typer.Option(help="Or: measure who arrives within this time. [s]")] = None,
    warmup: Annotated[str | None, typer.Option(help="Share of requests dropped, or mser. [default: 0.1]")] = None,
    drain: Annotated[bool, typer.Option("--drain", help="Stop traffic after the last request measured.")] = False,
    allow_saturation: Annotated[
        bool, typer.Option("--allow-saturation", help="Exit 0 though an endless load is more than can be carried.")
    ] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Root of all random numbers. [default: 0]")] = None,
    replications: Annotated[int | None, typer.Option(min=1, help="Independent runs. [default: 1]")] = None,
    router: Annotated[
        str | None, typer.Option(help="round_robin, least_outstanding, power_of_two or prefix_aware.")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="Scheduling: vllm, sglang, trtllm, trtllm_max_utilization or vllm_v0. [default: the engine's]"
        ),
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="Write steps, batches, queue, KV use here, for Perfetto.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw queue, batch and KV use over time to this file.")] = None,
    json: options.Json = False,
) -> None:
    """Play single requests through queues, batches and KV caches, and measure what clients see.

    For example:

    `simmoe simulate h100 --model deepseek-v2-lite --rate 8 --requests 10000 --input 512 --output 128 --json`

    `simmoe simulate h200 --model deepseek-v3 --gpus 8 --concurrency 64 --replications 5 --trace run.json`

    `simmoe simulate h100 --replay AzureLLMInferenceTrace_conv.csv --plot day.png`

    `simmoe simulate h100 --rate 12 --burstiness 0.3 --goodput ttft=500ms,tpot=30ms`

    `simmoe simulate h200 --model deepseek-v3 --gpus 8 --ep 8 --dp 8 --tp 1 --routing zipf:0.8`

    `simmoe simulate scenario.yaml --seed 7`

    Exit status 1, after the results, if a rate that goes on is more than can be carried (not with --allow-saturation).
    An overload that ends, of --drain, a trace or stages, is told and exits 0.

    What a scenario file may say (traffic, traces, routers, failures, autoscaling, prefill and decode apart), and how
    everything measured is defined: docs/scenarios.md.
    """
    from simmoe import simulation  # noqa: PLC0415
    from simmoe.report import simulation as simulation_report  # noqa: PLC0415
    from simmoe.specs import flags, load, scenario  # noqa: PLC0415

    layout = {
        "gpus": gpus, "tp": tp, "ep": ep, "dp": dp, "pp": pp, "active_experts": active_experts,
        "total_experts": total_experts, "routing": routing, "speculative": speculative, "engine": engine,
        "engine_version": engine_version, "weight_precision": precision,
    }  # fmt: skip
    traffic: dict[str, Any] = {
        "rate": rate, "concurrency": concurrency, "input_tokens": input_tokens, "output_tokens": output_tokens,
        "replay": replay, "burstiness": burstiness, "goodput": goodput,
    }  # fmt: skip
    path = Path(target)
    if path.suffix in {".yaml", ".yml"} and _is_scenario(path):
        base = scenario.load_scenario(path)
        parts: dict[str, Any] = {"workload": base.workload, "deployment": base.deployment}
        if model is not None:
            parts["model"] = load.load_model(model)
        if deployment is not None or any(value is not None for value in layout.values()):
            parts["deployment"] = flags.deployment_over(base.deployment, deployment, layout)
        if workload is not None or any(value is not None for value in traffic.values()):
            parts["workload"] = flags.workload_over(base.workload, workload, **traffic)
        described = base.vary(**parts)
    else:
        described = scenario.Scenario(
            name="flags",
            hardware=load.load_hardware(target),
            model=load.load_model(model or "deepseek-v2-lite"),
            deployment=flags.deployment_from(deployment, **layout),
            workload=flags.workload_over(None, workload, **traffic),
        )
    limits = {"requests": requests, "duration": duration}
    plan: dict[str, Any] = {
        "warmup": _warmup(warmup), "drain": drain or None, "seed": seed, "replications": replications,
    }  # fmt: skip
    changes = {name: value for name, value in plan.items() if value is not None}
    if requests is not None or duration is not None:
        changes |= limits
    described = described.vary(run=flags.checked(described.run, changes))
    rules = {name: value for name, value in (("router", router), ("policy", policy)) if value is not None}
    if rules:
        described = described.vary(cluster=flags.checked(described.cluster, rules))
    if plot is not None:
        from simmoe.report import plots  # noqa: PLC0415

        plots.check_ending(plot)
    with console.progress() as progress:
        task = progress.add_task("simulating", total=described.run.replications)
        try:
            result = simulation.run_scenario(
                described, lambda n, _: progress.update(task, completed=n), every_step=trace is not None
            )
        except SimmoeError as problem:
            if described.name == "flags" or str(path) in str(problem):
                raise
            raise type(problem)(f"{path}: {problem}") from None
    if trace is not None:
        from simmoe.sim import chrome_trace  # noqa: PLC0415

        chrome_trace.write_trace(result.runs[0], trace)
    if plot is not None:
        plots.over_time(
            result.series,
            plot,
            title=simulation_report.title(result),
            stage_edges_s=result.stage_edges_s,
            scaling=result.runs[0].scaling,
        )
    if json:
        typer.echo(json_module.dumps(simulation_report.to_json(result), indent=2))
    else:
        show(simulation_report.table(result))
    if result.saturated and not (result.ends or allow_saturation):
        where = "" if described.name == "flags" else f"{path}: "
        raise SaturationError(
            f"{where}rate {described.workload.rate:g} request/s: {result.overloads[0]}; lower the rate, raise gpus, or "
            "give --drain (a load that ends) or --allow-saturation"
        )


def mount(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(simulate)


def _is_scenario(path: Path) -> bool:
    """Whether a YAML file describes a whole run: a hardware file has a device."""
    from simmoe.specs import load  # noqa: PLC0415

    if not path.is_file():
        raise SpecError(f"{path}: no such scenario or hardware file")
    return "device" not in load.read_mapping(path)


def _warmup(text: str | None) -> float | str | None:
    if text is None or text == "mser":
        return text
    try:
        return float(text)
    except ValueError:
        raise SpecError(f"--warmup {text!r}: give a share of the requests, e.g. 0.1, or mser") from None
