"""simmoe from a script: load, vary, predict, simulate, sweep, plan, weigh, plot. `import simmoe.api as sm`.

The names below are what scripts are written against; the modules they come from may move. Everything takes and returns
frozen, typed objects in SI units (`vary` makes a changed, checked copy) and raises a `SimmoeError` whose text says
what is wrong. docs/ has three worked scripts, which run as tests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simmoe import quality
from simmoe.errors import CapacityError, SaturationError, SimmoeError, SpecError
from simmoe.metrics import ServingMetrics
from simmoe.planning.alternatives import Alternative
from simmoe.planning.alternatives import compare as alternatives
from simmoe.planning.frontier import Frontier, frontier, policies
from simmoe.planning.grid import Grid
from simmoe.planning.objective import Limit, limits_from
from simmoe.planning.offers import Offer, offers_from
from simmoe.planning.option import Option
from simmoe.planning.question import Question
from simmoe.planning.search import Plan, plan
from simmoe.planning.sweep import sweep
from simmoe.planning.whatif import Change, changes
from simmoe.predict import Prediction, predict, predict_caps
from simmoe.simulation import DEFAULT_REQUESTS, Simulated, run_scenario
from simmoe.specs.deployment import Deployment
from simmoe.specs.hardware import Hardware
from simmoe.specs.load import hardware_names, load_hardware, load_model, model_names
from simmoe.specs.model import Model
from simmoe.specs.scenario import Run, Scenario
from simmoe.specs.workload import Lengths, Workload

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Alternative", "CapacityError", "Change", "Deployment", "Frontier", "Grid", "Hardware", "Lengths", "Limit",
    "Model", "Offer", "Option", "Plan", "Prediction", "Question", "SaturationError", "Scenario", "ServingMetrics",
    "SimmoeError", "Simulated", "SpecError", "Workload", "alternatives", "changes", "frame", "frontier",
    "hardware_names", "limits_from", "load_hardware", "load_model", "model_names", "offers_from", "plan",
    "plot_frontier", "plot_throughput", "policies", "predict", "predict_caps", "quality", "question", "run_scenario",
    "simulate", "sweep",
]  # fmt: skip


def simulate(
    hardware: Hardware,
    model: Model,
    deployment: Deployment,
    workload: Workload,
    *,
    requests: int = DEFAULT_REQUESTS,
    seed: int = 0,
    replications: int = 1,
) -> Simulated:
    """Play single requests through queues, batches and KV caches; metrics as clients see them.

    Parameters
    ----------
    requests : measured in each run. [requests]
    replications : runs, with seeds from ``seed`` on.

    Raises
    ------
    CapacityError, SpecError
        As `predict`. For clusters, failures and traces build a `Scenario` and call `run_scenario`.
    """
    how = Run(requests=requests, seed=seed, replications=replications)
    return run_scenario(Scenario(hardware=hardware, model=model, deployment=deployment, workload=workload, run=how))


def question(
    models: str | Sequence[Model],
    hardware: str,
    *,
    rate: float,
    input_tokens: float,
    output_tokens: float,
    limits: Mapping[str, str | float],
    prices: Mapping[str, float] | None = None,
    **more: Any,
) -> Question:
    """A question for `plan`, in the words of `simmoe plan`.

    Parameters
    ----------
    models : names with commas, or models.
    hardware : names with commas, with how many there are if few: "h100,h200:64".
    rate : requests per second to carry. [1/s]
    input_tokens, output_tokens : mean lengths. [tokens]
    limits : e.g. ``{"ttft-p99": "2s", "tpot-p99": "50ms"}``; numbers are seconds.
    prices : USD per device-hour by name; where none is given, the middle of the hardware file's range. [USD/h]
    more : further fields of `Question`: base (a `Deployment`), confidence, spares, split ...

    Raises
    ------
    SpecError
        Saying which of them is wrong.
    """
    chosen = [load_model(name.strip()) for name in models.split(",")] if isinstance(models, str) else models
    return Question(
        models=tuple(chosen),
        offers=offers_from(hardware, [f"{name}={usd}" for name, usd in (prices or {}).items()]),
        workload=Workload(rate=rate, input=Lengths(mean=input_tokens), output=Lengths(mean=output_tokens)),
        limits=limits_from(limits),
        **more,
    )


def frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows of a sweep as a pandas DataFrame, a row per point; units in the columns' names.

    Raises
    ------
    SpecError
        If pandas is not installed.
    """
    try:
        import pandas as pd  # noqa: PLC0415  (an extra)
    except ImportError:
        raise SpecError("a DataFrame needs pandas; install it with `pip install simmoe[plan]`") from None
    return pd.DataFrame(list(rows))


def plot_throughput(
    hardware: Hardware, model: Model, deployment: Deployment, workload: Workload, caps: Sequence[int], path: Path
) -> None:
    """Draw throughput and time per output token against load, a line per cap on active experts."""
    from simmoe.report import plots  # noqa: PLC0415  (matplotlib only once something is drawn)

    plots.throughput_against_load(hardware, model, deployment, workload, caps, path)


def plot_frontier(found: Frontier, path: Path, benchmark: str | None = None) -> None:
    """Draw speed against one benchmark's measured score, a line per load.

    Raises
    ------
    MeasurementError
        If nothing is known of the benchmark for this model.
    """
    from simmoe.report import frontier as frontier_report  # noqa: PLC0415

    frontier_report.plot(found, path, benchmark)
