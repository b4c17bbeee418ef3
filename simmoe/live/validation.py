"""Close the loop on this device: profile it, fit it, predict a served model, serve it, and lay both side by side.

A small real DeepSeek-style model is served under real load (`simmoe.profiling.live`) at several caps on active experts.
The prediction is a simulation of the same requests (same seed: same lengths, same arrivals), from a calibration made of
the profile taken just before; nothing measured while serving enters it, but for the host time of a step, which a short
run beforehand tells. Figures are of the same window on both sides: from a quarter of the run to its end.
Left out: what a longer run would show of slow drifts; of these, `pace` tells. Checked in tests/test_live_validation.py;
runs are kept in validate/live.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simmoe.calibrate import kernels as kernel_calibration
from simmoe.costs.calibration import Calibration
from simmoe.errors import SpecError
from simmoe.live.figures import Cell, Figures, LiveOutcome, figures_of
from simmoe.metrics import RequestTable, StepLog
from simmoe.predict import compiled_for, predict
from simmoe.profiling.device import describe
from simmoe.profiling.live import LiveConfig, LiveRun, build, serve
from simmoe.profiling.pace import pace_s
from simmoe.profiling.profiler import check_timer, run_profile
from simmoe.profiling.served_model import LIVE_MODEL, ServedModel
from simmoe.sim.cluster import simulate
from simmoe.specs.hardware import Hardware
from simmoe.specs.load import load_hardware
from simmoe.specs.model import Model
from simmoe.specs.workload import Lengths, Workload

#: Share of a run left out at its start: the first requests come together, to an empty server.
WARM_UP = 0.25
#: Prompts and answers vary, so that a closed loop does not fall into step.
INPUT = Lengths(kind="uniform", mean=96, low=48, high=144)
OUTPUT = Lengths(kind="uniform", mean=24, low=12, high=36)
HOST_RUN_S = 4.0
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class LiveSettings:
    """What is profiled, served and compared.

    Parameters
    ----------
    budget_s : wall time of the profile. [s]
    caps : caps on active experts; the largest is what gains are against. None: the native top-k, two thirds and one.
    loads : closed loops by their concurrency ("8"), Poisson arrivals by their rate ("2.5/s") or by the share of the
        capacity predicted without a cap ("60%").
    duration_s : of each served run, by ``timer``. [s]
    repeats : times each cell is served; the passes over the grid follow one another.
    timer : "wall", or "cpu": one thread's own run time, in profile and server alike.
    """

    model: Model = LIVE_MODEL
    device: str = "cpu"
    budget_s: float = 120.0
    caps: Sequence[int] | None = None
    loads: Sequence[str] = ("2", "6", "12", "60%")
    duration_s: float = 8.0
    repeats: int = 2
    threads: int | None = None
    timer: str = "wall"
    seed: int = 0

    @property
    def dtype(self) -> str:
        """Number format served: without matrix units for 16 bits a CPU needs float32."""
        return "bfloat16" if self.device == "cuda" else "float32"


def validate_live(settings: LiveSettings, out: Path, say: Say = lambda _: None) -> LiveOutcome:
    """Profile, calibrate, predict, serve and compare; the profile and its calibration stay in ``out/<device>``.

    Raises
    ------
    SpecError
        If caps or loads cannot be served, or a run is too short for any request to finish.
    CoverageError
        If there is no such device.
    CalibrationError
        If the profile gave too few rows, or scipy is not installed.
    """
    caps = _caps(settings)
    check_timer(settings.timer, settings.device, settings.threads)
    loads = [(text, _closed_or_rate(text)) for text in settings.loads]
    describe(settings.device, settings.threads)  # sets the threads, for the pace as for everything after
    paces = [pace_s(settings.device, settings.timer)]
    say(f"profiling for {settings.budget_s:.0f} s")
    profile = run_profile(
        device=settings.device, budget_s=settings.budget_s, out=out, models=[settings.model], threads=settings.threads,
        dtype=settings.dtype, timer=settings.timer, seed=settings.seed, quiet=True,
    )  # fmt: skip
    paces.append(pace_s(settings.device, settings.timer))
    say(f"{profile.measured} rows measured, {profile.present} were there; fitting")
    calibration = _calibrate(profile.folder)
    hardware = load_hardware(profile.hardware_file)
    threads = profile.facts.units if settings.device == "cpu" else None
    config = LiveConfig(
        model=settings.model, device=settings.device, dtype=settings.dtype, threads=threads,
        timer=settings.timer, seed=settings.seed,
    )  # fmt: skip
    served = build(config)
    host_s = _host_time(config, served)
    cells = [
        _predict(hardware, config, cap, text, workload, host_s, settings.duration_s)
        for text, workload in _workloads(loads, hardware, config, host_s)
        for cap in caps
    ]
    serving_paces: list[float] = []
    for number in range(settings.repeats):
        for cell in cells:
            say(f"pass {number + 1} of {settings.repeats}: cap {cell.cap}, load {cell.load}")
            serving_paces.append(pace_s(settings.device, settings.timer))
            _serve(cell, config, served, settings.duration_s)
    return LiveOutcome(
        model=settings.model.name,
        device=profile.facts.slug,
        timer=settings.timer,
        threads=config.threads or 1,
        cells=cells,
        host_s_per_step=host_s,
        pace=statistics.median(serving_paces) / statistics.mean(paces),
        held_out_percent={_label(fit): fit.held_out_mape_percent for fit in calibration.fits},
        rows=sum(fit.rows for fit in calibration.fits),
        folder=profile.folder,
        settings=_plain(settings, caps),
    )


def _predict(
    hardware: Hardware, config: LiveConfig, cap: int, load: str, workload: Workload, host_s: float, duration_s: float
) -> Cell:
    """The simulated run, and the closed form, of one cell."""
    deployment = config.deployment(cap, host_s)
    parts = compiled_for(hardware, config.model, deployment, workload)
    run = simulate(
        parts.table, workload, deployment, int(parts.memory.kv_tokens), duration_s=duration_s, seed=config.seed,
        keep_load=False,
    )  # fmt: skip
    closed_form = predict(hardware, config.model, deployment, workload)
    metrics = closed_form.metrics
    return Cell(
        cap=cap,
        load=load,
        closed_loop=workload.concurrency is not None,
        workload=workload,
        table=parts.table,
        predicted=_window(run.requests, run.steps, duration_s),
        closed_form=None
        if metrics is None
        else Figures(
            output_tokens_per_s=metrics.output_tokens_per_s,
            ttft_mean_s=metrics.ttft.mean,
            tpot_mean_s=metrics.tpot.mean,
        ),
        log_sigma=closed_form.log_sigma,
        notes=closed_form.notes,
    )


def _serve(cell: Cell, config: LiveConfig, served: ServedModel, duration_s: float) -> None:
    run = serve(config, cell.workload, duration_s=duration_s, active_experts=cell.cap, served=served)
    cell.measured.append(_window(run.requests, run.log, duration_s))
    cell.step_ratios.append(_step_ratio(cell, run))


def _window(requests: RequestTable, steps: StepLog, duration_s: float) -> Figures:
    return figures_of(requests, steps, WARM_UP * duration_s, duration_s)


def _step_ratio(cell: Cell, run: LiveRun) -> float:
    """Predicted over measured time of the very steps that were served: the error without the queue's. [-]"""
    predicted = sum(cell.table.step_s(step.batch, step.finishing) for step in run.steps)
    return predicted / sum(step.wall_s for step in run.steps)


def _host_time(config: LiveConfig, served: ServedModel) -> float:
    """Median host time of a step, from a short run that is not compared, or a longer one if none ended. [s]"""
    load = Workload(concurrency=max(1, config.max_num_seqs // 2), input=INPUT, output=OUTPUT)
    for longer in (1, 3):
        try:
            return serve(config, load, duration_s=longer * HOST_RUN_S, active_experts=1, served=served).host_s_per_step
        except SpecError:
            continue
    return serve(config, load, duration_s=9 * HOST_RUN_S, active_experts=1, served=served).host_s_per_step


def _calibrate(folder: Path) -> Calibration:
    plans, _ = kernel_calibration.plan([folder])
    (entry,) = plans
    calibration = kernel_calibration.run(entry, processes=1)
    kernel_calibration.write(entry, calibration, entry.folder(None))
    return calibration


def _caps(settings: LiveSettings) -> list[int]:
    experts = settings.model.experts
    if experts is None:
        raise SpecError(f"{settings.model.name} is dense: it has no active experts to cap")
    k = experts.top_k
    caps = sorted(set(settings.caps or (k, max(1, 2 * k // 3), max(1, k // 3))), reverse=True)
    if not all(1 <= cap <= k for cap in caps):
        raise SpecError(f"--caps {','.join(map(str, caps))}: give 1..{k}, the top-{k} routing of {settings.model.name}")
    return caps


def _closed_or_rate(text: str) -> Workload | float:
    """A load as it was written: a workload, or the share of the predicted capacity to offer."""
    try:
        if text.endswith("%"):
            share = float(text[:-1]) / 100
            if not 0 < share < 1:
                raise SpecError(f"--loads {text}: a share of the capacity is above 0% and below 100%")
            return share
        if text.endswith("/s"):
            return Workload(rate=float(text[:-2]), input=INPUT, output=OUTPUT)
        return Workload(concurrency=int(text), input=INPUT, output=OUTPUT)
    except ValueError:
        raise SpecError(f"--loads {text!r}: give clients (8), requests a second (2.5/s) or a share (60%)") from None


def _workloads(
    loads: Sequence[tuple[str, Workload | float]], hardware: Hardware, config: LiveConfig, host_s: float
) -> list[tuple[str, Workload]]:
    """Loads with every share made a rate, the same for all caps: that share of what is predicted without a cap."""
    busy = Workload(concurrency=config.max_num_seqs, input=INPUT, output=OUTPUT)
    found = []
    for text, load in loads:
        if isinstance(load, Workload):
            found.append((text, load))
            continue
        most = predict(hardware, config.model, config.deployment(None, host_s), busy)
        rate = float(f"{load * most.saturation_output_tokens_per_s / OUTPUT.mean:.3g}")
        found.append((f"{rate:g}/s", Workload(rate=rate, input=INPUT, output=OUTPUT)))
    return found


def _label(fit: Any) -> str:
    return f"{fit.operator} {'/'.join(fit.variant.values())}"


def _plain(settings: LiveSettings, caps: Sequence[int]) -> dict[str, Any]:
    return {
        "budget_s": settings.budget_s,
        "caps": list(caps),
        "loads": list(settings.loads),
        "duration_s": settings.duration_s,
        "repeats": settings.repeats,
        "seed": settings.seed,
        "warm_up_share": WARM_UP,
        "dtype": settings.dtype,
        "input_tokens": [INPUT.low, INPUT.high],
        "output_tokens": [OUTPUT.low, OUTPUT.high],
    }
