"""Commands around measurements: calibrate, import, validate. Mounted on the command line's app by `simmoe.cli.main`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from simmoe import console
from simmoe.cli import live as cli_live
from simmoe.cli import options
from simmoe.console import show, show_json
from simmoe.errors import MeasurementError, SpecError


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
    beyond: Annotated[
        bool, typer.Option("--beyond", help="Put fits to other devices and outside their ranges; write nothing.")
    ] = False,
    folds: Annotated[int, typer.Option(min=2, help="Folds of shape groups to judge the fits by.")] = 10,
    processes: options.Processes = None,
    json: options.Json = False,
) -> None:
    """Fit the operator models to measured kernel times, and judge them on shapes they never saw.

    For example:

    `simmoe calibrate profiles/h100_sxm`

    `simmoe calibrate --report profiles --json`

    `simmoe calibrate profiles/h100_sxm --operator moe`

    `simmoe calibrate --beyond profiles`

    `simmoe calibrate measured --hardware my-gpu.yaml`
    """
    from simmoe.calibrate import kernels as kernel_calibration  # noqa: PLC0415
    from simmoe.calibrate.repeats import repeat_errors  # noqa: PLC0415
    from simmoe.report import calibration as calibration_report  # noqa: PLC0415

    if beyond:
        _beyond(paths, json)
        return
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
    repeats = repeat_errors(plans)
    if json:
        show_json(calibration_report.to_json(calibrations, left_out, repeats))
    else:
        show(calibration_report.table(calibrations, left_out, repeats))
        for file in filter(None, ready):
            typer.echo(f"Predict with: simmoe predict {file}")
    if not plans:
        raise MeasurementError(f"calibrate {' '.join(map(str, paths))}: no table of a known operator and device")


def _beyond(paths: list[Path], json: bool) -> None:
    from simmoe.calibrate import beyond as beyond_fit  # noqa: PLC0415
    from simmoe.report import calibration as calibration_report  # noqa: PLC0415

    with console.progress() as progress:
        task = progress.add_task("fitting without the ends of each range", total=None)
        found = beyond_fit.experiments(paths, done=lambda what: progress.update(task, description=what))
    if json:
        show_json(calibration_report.beyond_json(found))
    else:
        show(calibration_report.beyond_table(found))


def import_command(
    source: Annotated[Path, typer.Argument(help="aiconfigurator's *_perf tables, a folder, or a benchmark_moe log.")],
    device: Annotated[str, typer.Option(help="What was measured: ends the tables' names, e.g. h100_sxm.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the tables. [default: `profiles/<device>`]")] = None,
    model: Annotated[str | None, typer.Option(help="What benchmark_moe ran, if its log names no known model.")] = None,
    json: options.Json = False,
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
        show_json(
            {"written": {str(path): rows for path, rows in done.written.items()}, "left_out": dict(done.left_out)}
        )
        return
    for path, rows in done.written.items():
        typer.echo(f"{path}: {rows} rows")
    for reason, count in done.left_out.most_common():
        typer.echo(f"left out: {count} x {reason}")


def validate(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Tables or folders of them; or the word claims, or skew and tables.")
    ] = None,
    rows: Annotated[Path | None, typer.Option(help="Write one CSV line per compared figure here.")] = None,
    gains: Annotated[bool, typer.Option("--gains", help="Compare what capping experts gains, load by load.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw predicted against measured to this file.")] = None,
    fail_above: Annotated[float | None, typer.Option(help="Exit 1 if a group's mean error exceeds this. [%]")] = None,
    unseen: Annotated[
        bool, typer.Option("--unseen", help="Judge serving rows again, their model left out of the engine times.")
    ] = False,
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
    json: options.Json = False,
) -> None:
    """Lay predictions beside measurements: kernel by kernel, run by run.

    Reads kernel and serving tables, lists of serving rows to look at (CSV: file, source_id), and the results of
    `vllm bench serve` and `sglang.bench_serving` (JSON).

    For example:

    `simmoe validate profiles/h100_sxm --rows rows.csv`

    `simmoe validate validate/serving --explain 5`

    `simmoe validate validate/serving/recommended_points.csv --unseen --json`

    `simmoe validate result.json --hardware h100 --model deepseek-v2-lite --gpus 2 --tp 2 --json`

    `simmoe validate claims --markdown validate/claims/README.md`

    `simmoe validate skew profiles/h200_sxm/moe_h200_sxm.csv.gz`

    `simmoe validate --gains validate/serving/yang2025_faster_moe_throughput.csv --plot gains.png`

    `simmoe validate --live --budget 2min --json`
    """
    from simmoe import validation  # noqa: PLC0415
    from simmoe.validation import misses, run, summary  # noqa: PLC0415
    from simmoe.validation.serving import bench_json, listed  # noqa: PLC0415

    if fail_above is not None and not fail_above >= 0:  # a nan is above nothing, so nothing would fail
        raise SpecError(f"--fail-above {fail_above:g}: give a percentage of 0 or more")
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
    if str(paths[0]) == "skew":
        _skew(paths[1:], json)
        return
    if gains:
        _gains(paths, plot, json)
        return
    with console.progress() as progress:
        setup = bench_json.setup_from(
            hardware, model, deployment, gpus=gpus, tp=tp, ep=ep, dp=dp, pp=pp, active_experts=active_experts,
            total_experts=total_experts, engine=engine, weight_precision=precision,
        )  # fmt: skip
        outcome = run.compare(paths, progress=progress, setup=setup, unseen=unseen)
    if markdown is not None:
        from simmoe.validation import markdown as pages  # noqa: PLC0415

        pages.write(outcome, markdown)
    if rows is not None:
        summary.write_rows(outcome, rows)
    if plot is not None:
        from simmoe.report import plots  # noqa: PLC0415

        plots.parity(outcome.comparisons, plot)
    if json:
        listings = {name: listed.to_json(found) for name, found in outcome.lists.items()}
        shown = summary.to_json(outcome) | ({"lists": listings} if listings else {})
        show_json(shown | ({"misses": misses.to_json(outcome, explain)} if explain else {}))
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
    from simmoe.validation.claims import page as claims  # noqa: PLC0415
    from simmoe.validation.claims.claim import speak  # noqa: PLC0415

    spoken = [speak(claim) for claim in claims.all_claims()]
    if markdown is not None:
        claims.write_page(spoken, markdown)
    if json:
        show_json(claims.to_json(spoken))
    else:
        show(claims.table(spoken))


def _skew(paths: list[Path], json: bool) -> None:
    from simmoe.calibrate import skew  # noqa: PLC0415
    from simmoe.specs.load import data_folder  # noqa: PLC0415

    folder = Path(str(data_folder("profiles")))
    errors, gains = skew.compare(paths or [folder / f"{d}_sxm" / f"moe_{d}_sxm.csv.gz" for d in ("h100", "h200")])
    if json:
        show_json(skew.to_json(errors, gains))
    else:
        show(skew.show_table(errors, gains))


def _gains(paths: list[Path], plot: Path | None, json: bool) -> None:
    from simmoe.specs.measurement import read_table, table_paths  # noqa: PLC0415
    from simmoe.validation import gains  # noqa: PLC0415

    found = [gain for path in table_paths(paths) for gain in gains.gains(read_table(path))]
    if plot is not None:
        from simmoe.report import plots  # noqa: PLC0415

        plots.gains(found, plot)
    if json:
        show_json(gains.to_json(found))
    else:
        show(gains.table(found))


def mount(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command()(calibrate)
    app.command("import")(import_command)
    app.command()(validate)
