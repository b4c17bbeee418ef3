"""Engine parameters of vLLM from the shared showdown runs: one set, and one per model left out.

`python -m simmoe.validation.showdown.fit validate/vllm_showdown` writes them anew (after kernels were recalibrated).

Method: the runs are predicted at a start and with each parameter moved; around it, ln(predicted) of every stage's mean
ITL and TTFT is taken as linear in the parameters (Gauss-Newton), and the parameters of least absolute residual are
found by reweighted least squares, not below zero. Absolute residuals, since single runs hold stalls nobody explains.
Runs that fell behind their load are left out, and the TTFT of stage 0 of MoE runs (cold start). Only from those that
did and copy KV blocks to host memory comes the time of an entry of that pool, which shows nowhere else: the one of
least absolute error of ln(mean ITL), over a range of times and linear between.
Left out: errors of the kernels' own fits, which the parameters partly absorb.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray

from simmoe.specs.engines import EngineParameters
from simmoe.validation.showdown.compare import KNOWN, measured_figures, predict_run
from simmoe.validation.showdown.runs import Run, read_runs
from simmoe.validation.showdown.writing import write_from_folder

Array = NDArray[np.float64]

#: Parameter -> start and the step it is moved by. [s]
START: dict[str, tuple[float, float]] = {
    "front_end_time": (6.6e-3, 1e-3),
    "front_end_time_per_request": (15e-6, 20e-6),
    "host_time_per_step": (0.05e-3, 0.1e-3),
    "nucleus_time": (0.25e-3, 0.1e-3),
}
#: Times of a pool's entry that are tried. [s]
ENTRY_TIMES = np.geomspace(15e-9, 60e-9, 10)
Key = tuple[str, str, str]

#: Named in the file it writes; ``__name__`` is __main__ there.
_MODULE = "simmoe.validation.showdown.fit"


def estimate(folder: Path, rounds: int = 1) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Parameters on all shared runs of a folder, and for each of its models on the runs of the others. [s]"""
    runs = [run for run in read_runs(folder)[0] if not run.overloaded]
    measured = _targets(runs, measured_figures(folder))
    model_of = {run.name: run.model.name for run in runs}
    keys = sorted(measured)
    target = np.array([measured[key] for key in keys])
    values = {name: start for name, (start, _) in START.items()}
    without: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        base = _predicted(runs, values, keys)
        columns = []
        for name, (_, step) in START.items():
            columns.append((_predicted(runs, values | {name: values[name] + step}, keys) - base) / step)
        jacobian = np.stack(columns, axis=1)
        residual = target - base
        centre = np.array(list(values.values()))
        for model in sorted(set(model_of.values())):
            rows = np.array([model_of[key[0]] != model for key in keys])
            without[model] = _named(_solve(jacobian[rows], residual[rows], centre))
        values = _named(_solve(jacobian, residual, centre))
    return values, without


def estimate_entry_time(
    folder: Path, values: Mapping[str, float], without: Mapping[str, Mapping[str, float]]
) -> tuple[float, dict[str, float]]:
    """Time of an entry of the KV pool in host memory, on all overloaded runs that have one and without each model. [s]

    Parameters
    ----------
    values, without : what `estimate` found.
    """
    runs = [run for run in read_runs(folder)[0] if run.overloaded and run.deployment.kv_offload]
    measured = _targets(runs, measured_figures(folder))
    fine = np.linspace(ENTRY_TIMES[0], ENTRY_TIMES[-1], 500)
    errors: dict[str, Array] = {}
    for run in runs:
        keys = [key for key in sorted(measured) if key[0] == run.name and key[2] == "itl_mean"]
        mine = without.get(run.model.name, values)
        tried = [_predicted([run], {**mine, "offload_entry_time": float(time)}, keys) for time in ENTRY_TIMES]
        logs = np.array(tried).reshape(len(ENTRY_TIMES), len(keys))
        for key, column in zip(keys, logs.T, strict=True):
            off = np.abs(np.interp(fine, ENTRY_TIMES, column) - measured[key])
            errors[run.model.name] = errors.get(run.model.name, np.zeros(fine.size)) + off

    def best(models: Iterable[str]) -> float:
        chosen = [errors[model] for model in models if model in errors]
        return float(fine[np.argmin(np.sum(chosen, axis=0))]) if chosen else 0.0

    return best(errors), {model: best(other for other in errors if other != model) for model in without}


def _named(vector: Array) -> dict[str, float]:
    return {name: float(value) for name, value in zip(START, vector, strict=True)}


def _targets(runs: Sequence[Run], figures: Mapping[tuple[str, str], Mapping[str, float]]) -> dict[Key, float]:
    targets: dict[Key, float] = {}
    for run in runs:
        stages = [str(n) for n in np.unique(run.stage)]
        for stage in stages:
            found = figures.get((run.name, stage)) or (figures.get((run.name, "all")) if len(stages) == 1 else None)
            for quantity in ("itl_mean", "ttft_mean"):
                cold = run.is_moe and stage == "0" and quantity == "ttft_mean"
                if found and quantity in found and not cold:
                    targets[run.name, stage, quantity] = float(np.log(found[quantity]))
    return targets


def _predicted(runs: Sequence[Run], values: Mapping[str, float], keys: Sequence[Key]) -> Array:
    parameters = EngineParameters.model_validate({"engine": "vllm", "source": "trial", **KNOWN, **values})
    figures = {run.name: predict_run(run, parameters) for run in runs}
    return np.array([np.log(getattr(figures[name][stage], quantity)) for name, stage, quantity in keys])


def _solve(jacobian: Array, residual: Array, centre: Array) -> Array:
    """Parameters of least absolute residual, none below zero, the linear model being right."""
    scale = np.array([step for _, step in START.values()])
    free = np.ones(centre.size, dtype=bool)
    move = np.zeros(centre.size)
    for _ in range(60):
        weight = 1.0 / np.sqrt(np.maximum(np.abs(residual - jacobian @ move), 0.01))
        fixed = jacobian[:, ~free] @ move[~free]
        a = (jacobian[:, free] * scale[free]) * weight[:, None]
        move[free] = np.linalg.lstsq(a, (residual - fixed) * weight, rcond=None)[0] * scale[free]
        below = free & (centre + move < 0)
        if below.any():
            move[below] = -centre[below]
            free &= ~below
    return np.asarray(centre + move)


def write(folder: Path, out: Path) -> None:
    """Estimate and write the parameters file that `showdown` reads."""
    together, without = estimate(folder)
    entry, entry_without = estimate_entry_time(folder, together, without)
    together = {**together, "offload_entry_time": entry}
    without = {model: {**found, "offload_entry_time": entry_without[model]} for model, found in without.items()}
    count = len(read_runs(folder)[0])
    content = {
        "source": f"estimated on the {count} shared runs of the vLLM showdown (vLLM 0.15.1), see {_MODULE}",
        "known": KNOWN,
        "all": {name: _round(value) for name, value in together.items()},
        "without": {model: {n: _round(v) for n, v in values.items()} for model, values in without.items()},
    }
    header = "# Times in seconds. Written by simmoe.validation.showdown.fit.\n"
    out.write_text(header + yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def _round(value: float) -> float:
    return float(f"{value:.3g}")


if __name__ == "__main__":
    write_from_folder(
        _MODULE,
        "Estimates the showdown's engine parameters and writes parameters.yaml; about five minutes.",
        lambda folder: write(folder, Path(__file__).with_name("parameters.yaml")),
    )
