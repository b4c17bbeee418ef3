"""The vLLM showdown: simmoe and every simulator with published predictions, on the same real runs.

A run's requests are played through the engine (`simmoe.sim.cluster`); the server works on after a client's time limit,
as the traces show (nobody succeeds once the queue is that long). Figures are formed as the runs' are:
TTFT and end-to-end time at the client, means over requests that end within the client's limit, ITL as
(mean e2e - mean TTFT) / (mean output length - 1) with the length the client counts, output rate as tokens over the time
from the first request to the last token. Engine parameters were estimated on shared runs; a run of a model among them
is predicted with parameters estimated without that model's runs (`fit`).
Left out: cold starts (compilation in the first seconds of MoE runs), stalls of unknown cause.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from numpy.typing import NDArray

from simmoe.costs.device_fit import footprint
from simmoe.engine.engine import Engine
from simmoe.engine.tabulate import step_table
from simmoe.errors import CapacityError, SimmoeError
from simmoe.metrics import RequestTable
from simmoe.output_analysis import log_normal_interval
from simmoe.sim.arrivals import Recorded
from simmoe.sim.cluster import simulate
from simmoe.sim.offload_books import bookkeeping_of
from simmoe.sim.ticks import to_ticks
from simmoe.specs.engines import EngineParameters
from simmoe.specs.measurement import read_table
from simmoe.specs.workload import Lengths, Workload
from simmoe.steady.front_end import at_client
from simmoe.validation.showdown.runs import PATIENCE_S, PROMPTS_PER_GROUP, Run, find, is_showdown, read_runs
from simmoe.validation.summary import Comparison, Outcome

if TYPE_CHECKING:
    from rich.progress import Progress

GROUP = "vllm_showdown"
OWN = "simmoe"
#: quantity -> the file's name for it
QUANTITIES = {
    "e2e_mean": "e2e_mean",
    "ttft_mean": "ttft_mean",
    "itl_mean": "itl_mean",
    "ttft_p99": "ttft_p99",
    "output_tokens_per_s": "output_throughput",
}
#: What vLLM's code says rather than an estimate. Asynchronous scheduling is on by default since 0.14; batches are
#: padded to captured graphs. A shared expert on a second stream hides nothing here: Scout's shared and routed experts
#: both wait for their weights. Top-p sampling sorts the vocabulary in PyTorch. Its bytes, counted: a radix sort of 4 B
#: keys with 8 B values in four passes and one by row (128), their preparation and unpacking (44), softmax, running sum,
#: mask and scatter (50), temperature, softmax, noise and maximum (42), together 264 B a logit; taken at 80 % of the
#: bandwidth.
KNOWN: dict[str, float | bool] = {"steps_ahead": 1, "pads_to_graphs": True, "nucleus_bytes_per_logit": 330.0}

__all__ = ["compare", "is_showdown", "predict_run"]


@dataclass(frozen=True, slots=True)
class Figures:
    """One stage of a run. Latencies in ms, as the files have them."""

    e2e_mean: float
    ttft_mean: float
    itl_mean: float
    ttft_p99: float
    output_tokens_per_s: float
    succeeded: int
    log_sigma: float


def compare(folder: Path, progress: Progress | None = None, *, peers: bool = True) -> Outcome:
    """Predict every run of a folder of the showdown's layout and lay all simulators beside the measurements.

    Groups are ``vllm_showdown/<simulator>/all`` and ``/moe`` over the runs that kept up with their load, and
    ``/overloaded`` over the others.
    """
    outcome = Outcome()
    runs, refused = read_runs(folder)
    for name, reason in refused.items():
        outcome.skip(f"{folder.name}/{name}: {reason}")
    measured = measured_figures(folder)
    runs = [_completed(run, measured) for run in runs]
    task = progress.add_task("replaying", total=len(runs)) if progress else None
    for i, run in enumerate(runs):
        try:
            predicted = predict_run(run)
        except SimmoeError as problem:
            outcome.skip(f"{folder.name}/{run.name}: {type(problem).__name__}: {problem}")
            continue
        stage = "all" if (run.name, "all") in measured else "0"
        laid = list(_comparisons(run, i, stage, predicted, measured))
        if not laid:
            outcome.skip(f"{folder.name}/{run.name}: no measured figure of the whole run")
        outcome.comparisons += laid
        if progress and task is not None:
            progress.advance(task)
    if peers:
        outcome.comparisons += _peers(folder, {run.name: run for run in runs})
    return outcome


def _completed(run: Run, measured: Mapping[tuple[str, str], Mapping[str, float]]) -> Run:
    """Fill in from a run's figures what experiments.csv leaves unsaid: output length, and whether it fell behind.

    Requests that wait a third of their time for the first token are behind (1 to 2 % in runs that keep up, else 60 %).
    """
    found = measured.get((run.name, "all")) or measured.get((run.name, "0")) or {}
    behind = run.overloaded
    if behind is None:
        behind = found.get("ttft_mean", 0.0) > found.get("e2e_mean", np.inf) / 3
    return replace(run, overloaded=behind, counted_tokens=run.counted_tokens or found.get("output_len_mean"))


def predict_run(run: Run, parameters: EngineParameters | None = None) -> dict[str, Figures]:
    """Figures of a run's stages, and of stage "all".

    Parameters
    ----------
    parameters : what the engine adds around kernels; None: `parameters_for` the run.

    Raises
    ------
    CapacityError
        If the model or a request does not fit.
    """
    parameters = parameters or parameters_for(run)
    seen, served_s = _played(run, parameters)
    everybody = np.ones(run.stage.shape, dtype=bool)
    sigma = _log_sigma(Engine(run.hardware, run.model, run.deployment, parameters=parameters), run)
    stages = {"all": everybody} | {str(n): run.stage == n for n in np.unique(run.stage)}
    return {name: _figures(run, seen.ttft_s, seen.e2e_s, served_s, mask, sigma) for name, mask in stages.items()}


def _played(run: Run, parameters: EngineParameters) -> tuple[RequestTable, NDArray[np.float64]]:
    """A run's requests as their clients see them, and when the engine was done with each. [s]"""
    deployment = run.deployment
    engine = Engine(run.hardware, run.model, deployment, parameters=parameters)
    prompt = float(run.input_tokens.mean())
    table = step_table(engine, mean_context=prompt + run.output_tokens / 2, prompt_tokens=prompt)
    result = simulate(
        table,
        Workload(rate=1.0, input=Lengths(mean=prompt), output=Lengths(mean=run.output_tokens)),
        deployment,
        footprint(run.model, deployment, run.hardware).kv_tokens,
        requests=len(run.arrival_s),
        warmup=0.0,
        keep_load=False,
        router="least_outstanding" if run.is_moe else "round_robin",
        bookkeeping=bookkeeping_of(run.model, deployment, parameters),
        recorded=_recorded(run),
    )
    if result.refused:
        raise CapacityError(f"{result.refused} requests need more KV cache than there is")
    seen = at_client(result.requests, result.steps, parameters, deployment.dp)
    return seen, result.requests.finished_s


def _figures(run: Run, ttft: Any, e2e: Any, finished: Any, mine: Any, sigma: float) -> Figures:
    good = mine & (e2e <= PATIENCE_S)
    if not good.any():
        return Figures(np.nan, np.nan, np.nan, np.nan, 0.0, 0, sigma)
    first, total = ttft[good].mean() * 1e3, e2e[good].mean() * 1e3
    counted = run.counted_tokens or float(run.output_tokens)
    # the load generator waits for every request, until its limit for those that fail
    span = np.minimum(finished[mine], run.arrival_s[mine] + PATIENCE_S).max() - run.arrival_s[mine].min()
    return Figures(
        e2e_mean=total,
        ttft_mean=first,
        itl_mean=(total - first) / max(counted - 1, 1.0),
        ttft_p99=float(np.percentile(ttft[good], 99) * 1e3),
        output_tokens_per_s=float(good.sum() * counted / span),
        succeeded=int(good.sum()),
        log_sigma=sigma,
    )


def _log_sigma(engine: Engine, run: Run) -> float:
    """Spread of ln(measured / predicted) of a typical step, from the kernels' fits. [-]"""
    from simmoe.engine.step import Batch  # noqa: PLC0415

    running = max(1, min(32, run.deployment.requests_per_replica))
    context = int(run.input_tokens.mean() + run.output_tokens / 2)
    return engine.step(Batch(running, running * context)).log_sigma


def _recorded(run: Run) -> Recorded:
    shapes = []
    for prompt, tokens in zip(run.prompt.tolist(), run.input_tokens.tolist(), strict=True):
        shared = min(run.shared_tokens, tokens - 1)
        segments = ((-1 - prompt // PROMPTS_PER_GROUP, shared), (prompt, tokens - shared))
        shapes.append((tokens, run.output_tokens, tuple(s for s in segments if s[1])))
    return Recorded([to_ticks(second) for second in run.arrival_s.tolist()], shapes)


def parameters_for(run: Run) -> EngineParameters:
    """The engine's parameters estimated on all shared runs, or on those of other models if its own were among them."""
    table = _estimates()
    without = table["without"].get(run.model.name)
    return EngineParameters.model_validate(
        {"engine": "vllm", "source": table["source"], **table["known"], **(without or table["all"])}
    )


@lru_cache(maxsize=1)
def _estimates() -> Mapping[str, Any]:
    """What `fit.write` left: parameters ``known`` from code, estimated on ``all``, ``without`` a model."""
    text = resources.files("simmoe.validation.showdown").joinpath("parameters.yaml").read_text(encoding="utf-8")
    table: Mapping[str, Any] = yaml.safe_load(text)
    return table


def measured_figures(folder: Path) -> dict[tuple[str, str], dict[str, float]]:
    table = read_table(find(folder, "measured"))
    figures: dict[tuple[str, str], dict[str, float]] = {}
    names = ("exp_id", "stage", "metric")
    rows = zip(*(table.text(name).tolist() for name in names), table.number("value").tolist(), strict=True)
    for run, stage, metric, value in rows:
        figures.setdefault((run.removesuffix(".0"), stage.removesuffix(".0")), {})[metric] = value
    return figures


def _comparisons(
    run: Run,
    row: int,
    stage: str,
    predicted: Mapping[str, Figures],
    measured: Mapping[tuple[str, str], Mapping[str, float]],
) -> Iterable[Comparison]:
    figures = predicted[stage]
    for quantity, metric in QUANTITIES.items():
        value = measured.get((run.name, stage), {}).get(metric)
        mine = getattr(figures, quantity)
        if value is None or not value > 0 or not np.isfinite(mine):
            continue
        band = log_normal_interval(mine, figures.log_sigma)
        for group in _groups(run, OWN):
            yield Comparison(group, "experiments.csv", row + 2, run.name, quantity, value, mine, *band)


def _groups(run: Run, simulator: str) -> list[str]:
    if run.overloaded:
        return [f"{GROUP}/{simulator}/overloaded"]
    return [f"{GROUP}/{simulator}/all"] + ([f"{GROUP}/{simulator}/moe"] if run.is_moe else [])


def _peers(folder: Path, runs: Mapping[str, Run]) -> list[Comparison]:
    """Published predictions of others: stage "all", or the one stage or head they predicted."""
    try:
        table = read_table(find(folder, "peer_predictions"))
    except SimmoeError:
        return []
    text = {name: table.text(name).tolist() for name in ("simulator", "exp_id", "stage", "metric")}
    predicted, measured = table.number("predicted").tolist(), table.number("measured").tolist()
    wanted = {metric: quantity for quantity, metric in QUANTITIES.items()}
    best: dict[tuple[str, str, str], tuple[int, int]] = {}
    for i in range(table.rows):
        rank = {"all": 2, "head": 1}.get(text["stage"][i].removesuffix(".0"), 0)
        key = text["simulator"][i], text["exp_id"][i], text["metric"][i]
        single = not rank and (runs.get(key[1]) is None or len(np.unique(runs[key[1]].stage)) > 1)
        if key[2] not in wanted or key[1] not in runs or single or not measured[i] > 0 or not predicted[i] > 0:
            continue
        if key not in best or rank > best[key][0]:
            best[key] = rank, i
    return [
        Comparison(
            group, "peer_predictions.csv", i + 2, name, wanted[metric], measured[i], predicted[i], np.nan, np.nan
        )
        for (simulator, name, metric), (_, i) in best.items()
        for group in _groups(runs[name], simulator)
    ]
