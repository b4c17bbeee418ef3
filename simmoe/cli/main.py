"""The command line: parse, call, print. Logic lives in the library; heavy imports wait until a command needs them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from simmoe import __version__
from simmoe.cli import measure as cli_measure
from simmoe.cli import plan as cli_plan
from simmoe.cli import profile as cli_profile
from simmoe.cli import simulate as cli_simulate
from simmoe.cli import weigh as cli_weigh
from simmoe.console import show, show_json
from simmoe.errors import SimmoeError, SpecError

app = typer.Typer(
    name="simmoe",
    help="Predict how fast a fine-grained Mixture-of-Experts model serves, and how sure the prediction is.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def main() -> None:
    """Run the command line; input errors become one line on stderr and exit status 1."""
    try:
        app()
    except SimmoeError as problem:
        sys.stderr.write(f"simmoe: {problem}\n")
        raise SystemExit(1) from None
    except BrokenPipeError:
        raise SystemExit(0) from None
    except OSError as problem:  # what is read is checked where it is read; this is a file that cannot be written
        sys.stderr.write(f"simmoe: {problem.filename or 'output'}: {problem.strerror or problem}\n")
        raise SystemExit(1) from None


def _version(value: bool) -> None:
    if value:
        typer.echo(f"simmoe {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


def _caps(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        caps = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise SpecError(f"--active-experts {text!r}: give whole numbers with commas, e.g. 8,6,4,2") from None
    if not caps or min(caps) < 1:
        raise SpecError(f"--active-experts {text!r}: every cap must be at least 1")
    return caps


HardwareArgument = Annotated[
    str, typer.Argument(help="Hardware file or shipped name, e.g. hardware/h100.yaml or h100.")
]
ModelOption = Annotated[str, typer.Option(help="Preset name, YAML file or Hugging Face config.json.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]


@app.command()
def predict(
    hardware: HardwareArgument,
    model: ModelOption = "deepseek-v2-lite",
    gpus: Annotated[int | None, typer.Option(help="Devices in total. [default: 1]")] = None,
    tp: Annotated[int | None, typer.Option(help="Tensor-parallel size; default: all devices of a replica.")] = None,
    ep: Annotated[int | None, typer.Option(help="Expert-parallel size; 1 slices experts by tp. [default: 1]")] = None,
    dp: Annotated[int | None, typer.Option(help="Data-parallel attention ranks in one engine. [default: 1]")] = None,
    pp: Annotated[int | None, typer.Option(help="Pipeline stages. [default: 1]")] = None,
    rate: Annotated[float | None, typer.Option(help="Open loop: requests per second offered.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Closed loop: requests kept in flight. [default: 64]")] = None,
    input_tokens: Annotated[float | None, typer.Option("--input", help="Mean input tokens. [default: 1024]")] = None,
    output_tokens: Annotated[float | None, typer.Option("--output", help="Mean output tokens. [default: 256]")] = None,
    active_experts: Annotated[
        str | None,
        typer.Option(help="Caps on active experts beside the native, e.g. 8,6,4,2. [default: 3/4, 1/2, 1/4 of it]"),
    ] = None,
    total_experts: Annotated[int | None, typer.Option(help="Pruned expert pool.")] = None,
    routing: Annotated[
        str | None, typer.Option(help="Popularity and more, e.g. zipf:0.8 or zipf:1,independence=0.7,placement=eplb.")
    ] = None,
    speculative: Annotated[
        str | None,
        typer.Option(help="Drafted tokens and their acceptance: mtp:1,length=1.85, ngram:3,rate=0.4 or none."),
    ] = None,
    engine: Annotated[str | None, typer.Option(help="vllm, sglang, trtllm or generic.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="Weights: bfloat16, fp8, fp8_block, int8, int4, mxfp4, nvfp4.")
    ] = None,
    deployment: Annotated[Path | None, typer.Option(help="Deployment YAML; flags override it.")] = None,
    workload: Annotated[Path | None, typer.Option(help="Workload YAML; flags override it.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw throughput against load for each cap to this file.")] = None,
    json: JsonOption = False,
) -> None:
    """Predict throughput, latency and memory, with a row per cap on active experts.

    For example:

    `simmoe predict h100`

    `simmoe predict h200 --model deepseek-v3 --gpus 8 --rate 4 --input 2000 --output 500 --active-experts 8,6,4`

    `simmoe predict h200 --model deepseek-v3 --gpus 8 --speculative mtp:1,length=1.85`

    `simmoe predict hardware/h100.yaml --model path/to/config.json --concurrency 128 --plot caps.png --json`
    """
    from simmoe import predict as predicting  # noqa: PLC0415
    from simmoe.report import text as report  # noqa: PLC0415
    from simmoe.specs import flags, load  # noqa: PLC0415

    described = load.load_hardware(hardware)
    shapes = load.load_model(model)
    layout = flags.deployment_from(
        deployment, gpus=gpus, tp=tp, ep=ep, dp=dp, pp=pp, total_experts=total_experts, engine=engine, routing=routing,
        weight_precision=precision, speculative=speculative,
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
    if json:
        show_json(report.prediction_json(predictions))
    else:
        show(report.prediction_table(predictions))


@app.command()
def alternatives(
    hardware: HardwareArgument,
    model: ModelOption = "deepseek-v2-lite",
    gpus: Annotated[int | None, typer.Option(help="Devices in total. [default: 1]")] = None,
    small: Annotated[str | None, typer.Option(help="A smaller model to compare with, e.g. a distilled one.")] = None,
    rate: Annotated[float | None, typer.Option(help="Open loop: requests per second offered.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Closed loop: requests kept in flight. [default: 64]")] = None,
    deployment: Annotated[Path | None, typer.Option(help="Deployment YAML; flags override it.")] = None,
    workload: Annotated[Path | None, typer.Option(help="Workload YAML; flags override it.")] = None,
    json: JsonOption = False,
) -> None:
    """Compare a MoE with dense models of equal size, one task's experts and a smaller model.

    Example: `simmoe alternatives h100 --model mixtral-8x7b --gpus 2 --small llama-3.1-8b`
    """
    from simmoe.planning import alternatives as others  # noqa: PLC0415
    from simmoe.specs import flags, load  # noqa: PLC0415

    traffic = flags.workload_from(workload, rate=rate, concurrency=concurrency, input_tokens=None, output_tokens=None)
    layout = flags.deployment_from(deployment, gpus=gpus)
    smaller = load.load_model(small) if small else None
    found = others.compare(load.load_hardware(hardware), load.load_model(model), layout, traffic, smaller)
    if json:
        show_json(others.to_json(found))
    else:
        show(others.table(found))


@app.command("list")
def list_command(
    kind: Annotated[str, typer.Argument(help="models, hardware or profiles")],
    json: JsonOption = False,
) -> None:
    """List what is shipped.

    Example: `simmoe list models`
    """
    from simmoe.specs import load  # noqa: PLC0415

    if kind not in ("models", "hardware", "profiles"):
        raise SpecError(f"list {kind!r}: give models, hardware or profiles")
    names = {"models": load.model_names, "hardware": load.hardware_names, "profiles": load.profile_names}[kind]()
    if json:
        show_json({name: str(path) for name, path in names.items()})
    else:
        typer.echo("\n".join(names))


# mounted last, so that --help lists prediction first
cli_simulate.mount(app)
cli_plan.mount(app)
cli_weigh.mount(app)
app.command()(cli_profile.profile)
cli_measure.mount(app)
