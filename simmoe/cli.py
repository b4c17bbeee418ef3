"""The command line: parse, call, print. Logic lives in the library; heavy imports wait until a command needs them."""

from __future__ import annotations

import json as json_module
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from simmoe import __version__, cli_live, cli_plan, cli_profile, cli_simulate, console
from simmoe.console import show
from simmoe.errors import MeasurementError, SimmoeError, SpecError

app = typer.Typer(
    name="simmoe",
    help="Predict how fast a fine-grained Mixture-of-Experts model serves, and how sure the prediction is.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command()(cli_profile.profile)
cli_plan.mount(app)
cli_simulate.mount(app)


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


def _json(data: Any) -> None:
    typer.echo(json_module.dumps(data, indent=2, default=str))


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
    from simmoe import report  # noqa: PLC0415
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
    caps = predicting.with_native(_caps(active_experts) or predicting.default_caps(shapes), shapes, layout)
    predictions = predicting.predict_caps(described, shapes, layout, traffic, caps)
    if plot is not None:
        from simmoe import plots  # noqa: PLC0415

        plots.throughput_against_load(described, shapes, layout, traffic, caps, plot)
    if json:
        _json(report.prediction_json(predictions))
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
        _json(others.to_json(found))
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
        _json({name: str(path) for name, path in names.items()})
    else:
        typer.echo("\n".join(names))


@app.command()
def calibrate(
    paths: Annotated[list[Path], typer.Argument(help="Measured kernel tables, or folders of them.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of `<device>/calibration.yaml`. [default: profiles; a new device's hardware file's]"),
    ] = None,
    hardware: Annotated[
        Path | None, typer.Option(help="Hardware file of a new device. [default: one beside the tables]")
    ] = None,
    operator: Annotated[
        list[str] | None, typer.Option(help="Fit only this operator; may be repeated. [default: all]")
    ] = None,
    show_report: Annotated[bool, typer.Option("--report", help="Print held-out errors; write nothing.")] = False,
    folds: Annotated[int, typer.Option(min=2, help="Folds of shape groups to judge the fits by.")] = 10,
    processes: Annotated[int | None, typer.Option(min=1, help="Processes to fit on. [default: all cores]")] = None,
    json: JsonOption = False,
) -> None:
    """Fit the operator models to measured kernel times, and judge them on shapes they never saw.

    For example:

    `simmoe calibrate profiles/h100_sxm`

    `simmoe calibrate --report profiles --json`

    `simmoe calibrate profiles/h100_sxm --operator moe`

    `simmoe calibrate measured --hardware my-gpu.yaml`
    """
    from simmoe import calibration_report, kernel_calibration  # noqa: PLC0415

    plans, left_out = kernel_calibration.plan(paths, hardware, operator or ())
    calibrations, ready = {}, []
    with console.progress() as progress:
        for entry in plans:
            task = progress.add_task(f"fitting {entry.device}", total=len(entry.jobs))
            folder = entry.folder(out)
            calibrations[entry.device] = kernel_calibration.run(
                entry, folds=folds, processes=processes, done=partial(progress.advance, task),
                keep=None if show_report else folder / ".fits",
            )  # fmt: skip
            if not show_report:
                whole = calibrations[entry.device]
                if operator:
                    whole = kernel_calibration.with_others(whole, folder)
                ready.append(kernel_calibration.write(entry, whole, folder))
    if json:
        _json(calibration_report.to_json(calibrations, left_out))
    else:
        show(calibration_report.table(calibrations, left_out))
        for file in filter(None, ready):
            typer.echo(f"Predict with: simmoe predict {file}")
    if not plans:
        raise MeasurementError(f"calibrate {' '.join(map(str, paths))}: no table of a known operator and device")


@app.command("import")
def import_command(
    source: Annotated[Path, typer.Argument(help="aiconfigurator's *_perf tables, a folder, or a benchmark_moe log.")],
    device: Annotated[str, typer.Option(help="What was measured: ends the tables' names, e.g. h100_sxm.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the tables. [default: `profiles/<device>`]")] = None,
    model: Annotated[str | None, typer.Option(help="What benchmark_moe ran, if its log names no known model.")] = None,
    json: JsonOption = False,
) -> None:
    """Convert kernel times other tools measured to tables that `simmoe calibrate` reads.

    For example:

    `simmoe import systems/data/h100_sxm --device h100_sxm`

    `simmoe import benchmark_moe.log --device my-gpu --model config.json`
    """
    from simmoe import importers  # noqa: PLC0415
    from simmoe.specs import load  # noqa: PLC0415

    shapes = load.load_model(model) if model is not None else None
    done = importers.import_measurements(source, out or Path("profiles") / device, device, shapes)
    if json:
        _json({"written": {str(path): rows for path, rows in done.written.items()}, "left_out": dict(done.left_out)})
        return
    for path, rows in done.written.items():
        typer.echo(f"{path}: {rows} rows")
    for reason, count in done.left_out.most_common():
        typer.echo(f"left out: {count} x {reason}")


@app.command()
def validate(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Measured tables or folders of them; or the word claims.")
    ] = None,
    rows: Annotated[Path | None, typer.Option(help="Write one CSV line per compared figure here.")] = None,
    gains: Annotated[bool, typer.Option("--gains", help="Compare what capping experts gains, load by load.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw predicted against measured to this file.")] = None,
    fail_above: Annotated[float | None, typer.Option(help="Exit 1 if a group's mean error exceeds this. [%]")] = None,
    explain: Annotated[int, typer.Option(min=0, help="Take the worst large misses apart, this many.")] = 0,
    markdown: Annotated[Path | None, typer.Option(help="Write summed-up tables into this page.")] = None,
    hardware: Annotated[str | None, typer.Option(help="What benchmark results ran on; or tables' own device.")] = None,
    model: Annotated[str | None, typer.Option(help="Their model. [default: named in the result]")] = None,
    deployment: Annotated[Path | None, typer.Option(help="Their deployment YAML; flags override it.")] = None,
    gpus: Annotated[int | None, typer.Option(help="Their devices in total.")] = None,
    tp: Annotated[int | None, typer.Option(help="Their tensor-parallel size.")] = None,
    ep: Annotated[int | None, typer.Option(help="Their expert-parallel size.")] = None,
    dp: Annotated[int | None, typer.Option(help="Their data-parallel attention ranks.")] = None,
    pp: Annotated[int | None, typer.Option(help="Their pipeline stages.")] = None,
    active_experts: Annotated[int | None, typer.Option(help="Their cap on active experts.")] = None,
    total_experts: Annotated[int | None, typer.Option(help="Their pruned expert pool.")] = None,
    engine: Annotated[str | None, typer.Option(help="Their engine. [default: from the result]")] = None,
    precision: Annotated[str | None, typer.Option(help="Their weights' number format.")] = None,
    live: Annotated[bool, typer.Option("--live", help="Profile, fit, predict and serve on this device.")] = False,
    device: Annotated[str, typer.Option(help="Live: cpu or cuda.")] = "cpu",
    budget: Annotated[str, typer.Option(help="Live: wall time of the profile.")] = "2min",
    caps: Annotated[str | None, typer.Option(help="Live: caps, e.g. 6,4,2. [default: native, 2/3, 1/3]")] = None,
    loads: Annotated[
        str, typer.Option(help="Live: clients (8), requests a second (2.5/s), share of capacity (60%).")
    ] = "2,6,12,60%",
    duration: Annotated[str, typer.Option(help="Live: time each cell is served.")] = "8s",
    repeats: Annotated[int, typer.Option(min=1, help="Live: times each cell is served.")] = 2,
    threads: Annotated[int | None, typer.Option(min=1, help="Live: threads on a CPU. [default: all]")] = None,
    timer: Annotated[str, typer.Option(help="Live: wall, or cpu: one thread's own run time.")] = "wall",
    out: Annotated[Path | None, typer.Option(help="Live: folder to keep the profile and live.json in.")] = None,
    json: JsonOption = False,
) -> None:
    """Lay predictions beside measurements: kernel by kernel, run by run.

    Reads kernel and serving tables, lists of serving rows to look at (CSV: file, source_id), and the results of
    `vllm bench serve` and `sglang.bench_serving` (JSON).

    For example:

    `simmoe validate profiles/h100_sxm --rows rows.csv`

    `simmoe validate validate/serving --explain 5`

    `simmoe validate validate/serving/recommended_points.csv --json`

    `simmoe validate result.json --hardware h100 --model deepseek-v2-lite --gpus 2 --tp 2 --json`

    `simmoe validate claims --markdown validate/claims/README.md`

    `simmoe validate --gains validate/serving/yang2025_faster_moe_throughput.csv --plot gains.png`

    `simmoe validate --live --budget 2min --json`
    """
    from simmoe import validation  # noqa: PLC0415
    from simmoe.validation import bench_json, listed, misses, run, summary  # noqa: PLC0415

    if live:
        cli_live.validate_live(
            device=device, budget=budget, caps=caps, loads=loads, duration=duration, repeats=repeats, threads=threads,
            timer=timer, out=out, rows=rows, fail_above=fail_above, json=json,
        )  # fmt: skip
        return
    if not paths:
        raise SpecError("validate: give measured tables or folders of them, the word claims, or --live")
    if [str(path) for path in paths] == ["claims"]:
        _claims(markdown, json)
        return
    if gains:
        _gains(paths, plot, json)
        return
    with console.progress() as progress:
        setup = bench_json.setup_from(
            hardware, model, deployment, gpus=gpus, tp=tp, ep=ep, dp=dp, pp=pp, active_experts=active_experts,
            total_experts=total_experts, engine=engine, weight_precision=precision,
        )  # fmt: skip
        outcome = run.compare(paths, progress=progress, setup=setup)
    if markdown is not None:
        from simmoe.validation import markdown as pages  # noqa: PLC0415

        pages.write(outcome, markdown)
    if rows is not None:
        summary.write_rows(outcome, rows)
    if plot is not None:
        from simmoe import plots  # noqa: PLC0415

        plots.parity(outcome.comparisons, plot)
    if json:
        listings = {name: listed.to_json(found) for name, found in outcome.lists.items()}
        shown = summary.to_json(outcome) | ({"lists": listings} if listings else {})
        _json(shown | ({"misses": misses.to_json(outcome, explain)} if explain else {}))
    else:
        show(run.table(outcome))
        if explain:
            typer.echo("\n" + "\n".join(misses.lines(outcome, explain)))
    groups = summary.summarise(outcome.comparisons)
    if not groups:  # a check that compared nothing has not passed
        raise MeasurementError(f"validate {' '.join(map(str, paths))}: no row could be compared")
    if fail_above is not None and any(group.mape_percent > fail_above for group in groups):
        worst = max(groups, key=lambda group: group.mape_percent)
        raise validation.ToleranceError(
            f"{worst.group} {worst.quantity}: mean error {worst.mape_percent:.1f} % is above "
            f"--fail-above {fail_above:g}"
        )


def _claims(markdown: Path | None, json: bool) -> None:
    from simmoe.validation import claims  # noqa: PLC0415

    spoken = [claims.speak(claim) for claim in claims.all_claims()]
    if markdown is not None:
        claims.write_page(spoken, markdown)
    if json:
        _json(claims.to_json(spoken))
    else:
        show(claims.table(spoken))


def _gains(paths: list[Path], plot: Path | None, json: bool) -> None:
    from simmoe.specs.measurement import read_table, table_paths  # noqa: PLC0415
    from simmoe.validation import gains  # noqa: PLC0415

    found = [gain for path in table_paths(paths) for gain in gains.gains(read_table(path))]
    if plot is not None:
        from simmoe import plots  # noqa: PLC0415

        plots.gains(found, plot)
    if json:
        _json(gains.to_json(found))
    else:
        show(gains.table(found))
