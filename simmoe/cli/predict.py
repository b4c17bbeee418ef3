"""The commands `simmoe predict` and `simmoe alternatives`. Mounted on the command line's app by `simmoe.cli.main`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simmoe.cli import options
from simmoe.console import show, show_json
from simmoe.errors import SpecError


def _caps(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        caps = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise SpecError(f"--active-experts {text!r}: give whole numbers with commas, e.g. 8,6,4,2") from None
    if not caps or min(caps) < 1:
        raise SpecError(f"--active-experts {text!r}: every cap must be at least 1")
    return caps


def predict(
    hardware: options.Hardware,
    model: options.Model = "deepseek-v2-lite",
    gpus: options.Gpus = None,
    tp: options.Tp = None,
    ep: options.Ep = None,
    dp: options.Dp = None,
    pp: options.Pp = None,
    rate: options.Rate = None,
    concurrency: options.Concurrency = None,
    input_tokens: options.Input = None,
    output_tokens: options.Output = None,
    active_experts: Annotated[
        str | None,
        typer.Option(help="Caps on active experts beside the native, e.g. 8,6,4,2. [default: 3/4, 1/2, 1/4 of it]"),
    ] = None,
    total_experts: options.Pool = None,
    routing: options.Routing = None,
    speculative: options.Speculative = None,
    engine: options.Engine = None,
    engine_version: options.EngineVersion = None,
    precision: options.Precision = None,
    deployment: options.Deployment = None,
    workload: options.Workload = None,
    plot: Annotated[Path | None, typer.Option(help="Draw throughput against load for each cap to this file.")] = None,
    json: options.Json = False,
) -> None:
    """Predict throughput, latency and memory, with a row per cap on active experts.

    For example:

    `simmoe predict h100`

    `simmoe predict h200 --model deepseek-v3 --gpus 8 --rate 4 --input 2000 --output 500 --active-experts 8,6,4`

    `simmoe predict h200 --model deepseek-v3 --gpus 8 --speculative mtp:1,length=1.85`

    `simmoe predict h100 --engine vllm --engine-version 0.15.1`

    `simmoe predict hardware/h100.yaml --model path/to/config.json --concurrency 128 --plot caps.png --json`
    """
    from simmoe import predict as predicting  # noqa: PLC0415
    from simmoe.report import text as report  # noqa: PLC0415
    from simmoe.specs import flags, load  # noqa: PLC0415

    described = load.load_hardware(hardware)
    shapes = load.load_model(model)
    layout = flags.deployment_from(
        deployment, gpus=gpus, tp=tp, ep=ep, dp=dp, pp=pp, total_experts=total_experts, engine=engine, routing=routing,
        engine_version=engine_version, weight_precision=precision, speculative=speculative,
    )  # fmt: skip
    traffic = flags.workload_from(
        workload, rate=rate, concurrency=concurrency, input_tokens=input_tokens, output_tokens=output_tokens
    )
    caps = predicting.with_native(
        _caps(active_experts) or predicting.default_caps(shapes, layout.total_experts), shapes, layout
    )
    predictions = predicting.predict_caps(described, shapes, layout, traffic, caps)
    if plot is not None:
        from simmoe.report import plots  # noqa: PLC0415

        plots.throughput_against_load(described, shapes, layout, traffic, caps, plot)
    newest = predicting.of_newest_version(predictions[0])
    if json:
        show_json(report.prediction_json(predictions, newest))
    else:
        show(report.prediction_table(predictions, newest))


def alternatives(
    hardware: options.Hardware,
    model: options.Model = "deepseek-v2-lite",
    gpus: options.Gpus = None,
    tp: options.Tp = None,
    ep: options.Ep = None,
    dp: options.Dp = None,
    small: Annotated[str | None, typer.Option(help="A smaller model to compare with, e.g. a distilled one.")] = None,
    interactive: Annotated[
        float | None, typer.Option(help="Share of the requests that --small takes beside the MoE, e.g. 0.3.")
    ] = None,
    rate: options.Rate = None,
    concurrency: options.Concurrency = None,
    input_tokens: options.Input = None,
    output_tokens: options.Output = None,
    engine: options.Engine = None,
    engine_version: options.EngineVersion = None,
    precision: options.Precision = None,
    deployment: options.Deployment = None,
    workload: options.Workload = None,
    json: options.Json = False,
) -> None:
    """Compare a MoE with dense models of equal size, one task's experts, requests one by one and a smaller model.

    For example:

    `simmoe alternatives h100 --model mixtral-8x7b --gpus 2 --small llama-3.1-8b`

    `simmoe alternatives h100 --model qwen3-30b-a3b --gpus 4 --tp 1 --small qwen3-8b --rate 10 --interactive 0.3`
    """
    from simmoe.planning import alternatives as others  # noqa: PLC0415
    from simmoe.specs import flags, load  # noqa: PLC0415

    traffic = flags.workload_from(
        workload, rate=rate, concurrency=concurrency, input_tokens=input_tokens, output_tokens=output_tokens
    )
    layout = flags.deployment_from(
        deployment,
        gpus=gpus,
        tp=tp,
        ep=ep,
        dp=dp,
        engine=engine,
        engine_version=engine_version,
        weight_precision=precision,
    )
    smaller = load.load_model(small) if small else None
    found = others.compare(load.load_hardware(hardware), load.load_model(model), layout, traffic, smaller, interactive)
    if json:
        show_json(others.to_json(found))
    else:
        show(others.table(found))
    if all(one.prediction is None for one in found):
        raise SpecError(f"none of the alternatives can be served; the first: {found[0].why}")


def mount(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command()(predict)
    app.command()(alternatives)
