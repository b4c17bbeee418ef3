"""What else could serve the same traffic: dense models of equal size, one task's experts, a small model for a part.

Model: each alternative is predicted like any other deployment; the MoE as laid out, the others on as many devices, cut
by the tensor parallelism inside a node that serves the traffic best; on the fewest devices that hold it where it fits
in none. Mixed service splits devices between two models in whole replicas: a distilled model
answers the interactive part of the requests, the MoE the rest.
Left out: quality; look at `simmoe.quality` before choosing. Checked in tests/test_alternatives.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from simmoe.costs.device_fit import smallest_that_fits
from simmoe.errors import CapacityError, SaturationError, SpecError
from simmoe.planning.layouts import describe
from simmoe.predict import Prediction, predict
from simmoe.specs.deployment import Deployment
from simmoe.specs.hardware import Hardware
from simmoe.specs.model import Model
from simmoe.specs.variants import dense_equivalent, task_submodel
from simmoe.specs.workload import Workload
from simmoe.units import text


@dataclass(frozen=True)
class Alternative:
    """One way to serve the traffic; ``prediction`` is None where it cannot, ``why`` says so."""

    name: str
    prediction: Prediction | None
    why: str = ""

    @property
    def output_tokens_per_s_per_device(self) -> float | None:
        """Output rate at the workload over devices, None where it saturates or does not fit. [tokens/s]"""
        if self.prediction is None or self.prediction.metrics is None:
            return None
        return self.prediction.metrics.output_tokens_per_s / self.prediction.deployment.gpus


def compare(
    hardware: Hardware,
    model: Model,
    deployment: Deployment,
    workload: Workload,
    small: Model | None = None,
    interactive: float | None = None,
) -> list[Alternative]:
    """The MoE beside what could stand for it under the same workload.

    Dense of equal active and of equal total parameters, the experts of one task alone (no exchange of tokens), requests
    one after another instead of together, and ``small``, a distilled model, if given: for everything, and with
    ``interactive``, a share of the requests, for these alone beside the MoE (`split_service`). [-]

    Raises
    ------
    SpecError
        If the model has no experts, or ``interactive`` comes without ``small``, without a rate or is no share.
    """
    if model.experts is None:
        raise SpecError(f"{model.name} has no experts; alternatives are those of a MoE")
    if interactive is not None and (small is None or workload.rate is None or not 0.0 < interactive < 1.0):
        raise SpecError(
            f"interactive {interactive:g}: give a share of the requests between 0 and 1, with a small model that takes "
            "them (--small) and an open loop (--rate)"
        )
    plain = deployment.vary(ep=1, active_experts=None, total_experts=None, dp=1, tp=None, routing={}, offload=None)
    found = [
        _predicted(model.name, hardware, model, deployment, workload),
        _best("dense, equal active", hardware, dense_equivalent(model), plain, workload),
        _best("dense, equal total", hardware, dense_equivalent(model, "total"), plain, workload),
        _best("one task's experts", hardware, task_submodel(model), plain, workload),
        _predicted(
            "one request at a time", hardware, model, deployment.vary(max_num_seqs=1),
            workload.vary(concurrency=deployment.replicas * deployment.dp, rate=None),
        ),
    ]  # fmt: skip
    if small is not None:
        found.append(_best(small.name, hardware, small, plain, workload))
        if interactive is not None:
            found += _split(hardware, model, small, deployment, workload, interactive)
    return found


def _split(
    hardware: Hardware, moe: Model, small: Model, deployment: Deployment, workload: Workload, interactive: float
) -> list[Alternative]:
    assert workload.rate is not None
    few, rest = (workload.vary(rate=share * workload.rate) for share in (interactive, 1.0 - interactive))
    names = (f"{small.name} for {interactive:.0%} of them,", f"... and {moe.name} for the rest")
    try:
        first, second, _ = split_service(hardware, moe, small, deployment, few, rest)
    except SaturationError as problem:
        return [Alternative(" ".join(names), None, str(problem))]
    return [replace(one, name=name) for one, name in zip((first, second), names, strict=True)]


def _best(name: str, hardware: Hardware, model: Model, deployment: Deployment, workload: Workload) -> Alternative:
    """The layout that serves most, then with the shortest TPOT: tp of 1, 2, 4 ... in a node, the rest replicas."""
    unit, limit = deployment.gpus // deployment.pp, hardware.devices_per_node
    sizes = [2**n for n in range(11) if 2**n <= limit and unit % 2**n == 0]
    laid_out = [_predicted(name, hardware, model, deployment.vary(tp=tp), workload) for tp in sizes]
    fitting = [one for one in laid_out if one.output_tokens_per_s_per_device is not None and not one.why]
    return max(fitting, key=_served_and_fast, default=laid_out[-1])


def _served_and_fast(one: Alternative) -> tuple[float, float]:
    rate = one.output_tokens_per_s_per_device
    assert rate is not None
    assert one.prediction is not None
    assert one.prediction.metrics is not None
    return float(f"{rate:.3g}"), -one.prediction.metrics.tpot.p50


def _predicted(name: str, hardware: Hardware, model: Model, deployment: Deployment, workload: Workload) -> Alternative:
    try:
        return Alternative(name, predict(hardware, model, deployment, workload))
    except (CapacityError, SaturationError, SpecError) as problem:
        fits = smallest_that_fits(model, deployment, hardware)
        if isinstance(problem, CapacityError) and fits is not None:
            return Alternative(name, predict(hardware, model, fits, workload), f"on {fits.gpus} devices")
        return Alternative(name, None, str(problem))


def split_service(
    hardware: Hardware, moe: Model, small: Model, deployment: Deployment, interactive: Workload, batch: Workload
) -> tuple[Alternative, Alternative, int]:
    """Interactive traffic on the fewest devices of a small model that carry it, batch traffic on the MoE on the rest.

    Both workloads have a rate. Returns the interactive and the batch alternative, and devices given to the first.

    Raises
    ------
    SaturationError
        If no split of the deployment's devices carries both.
    """
    unit = deployment.devices_per_replica
    alone = Deployment(engine=deployment.engine)
    held = smallest_that_fits(small, alone, hardware) or alone
    for given in range(held.gpus, deployment.gpus, held.gpus):
        rest = (deployment.gpus - given) // unit * unit
        if not rest:
            break
        layout = held.vary(gpus=given, tp=held.tp_size)
        first = _predicted(small.name, hardware, small, layout, interactive)
        second = _predicted(moe.name, hardware, moe, deployment.vary(gpus=rest), batch)
        served = all(one.output_tokens_per_s_per_device is not None and not one.why for one in (first, second))
        if served:
            return first, second, given
    raise SaturationError(
        f"{deployment.gpus} x {hardware.name}, {unit} to a replica of {moe.name}, do not carry {interactive.rate:g} "
        f"requests/s on {small.name} and {batch.rate:g} on {moe.name}; raise --gpus, set --tp or lower the rates"
    )


def table(found: list[Alternative]) -> Any:
    """A rich table of alternatives."""
    from rich.table import Table  # noqa: PLC0415

    shown = Table(title="alternatives under the same workload")
    for column in ("what", "devices", "layout", "output tokens/s per device", "TPOT p50", "what bounds it"):
        shown.add_column(column)
    for one in found:
        rate, p = one.output_tokens_per_s_per_device, one.prediction
        if p is None or p.metrics is None or rate is None:
            shown.add_row(one.name, "", "", "", "", one.why or (p.bound if p else ""))
            continue
        bound = f"{p.bound} ({one.why})" if one.why else p.bound
        shown.add_row(
            one.name,
            str(p.deployment.gpus),
            describe(p.deployment),
            f"{rate:,.0f}",
            text(p.metrics.tpot.p50, "s"),
            bound,
        )
    return shown


def to_json(found: list[Alternative]) -> list[dict[str, Any]]:
    """Alternatives as plain data; rates in tokens/s per device, times in seconds."""
    return [
        {
            "name": one.name,
            "gpus": one.prediction.deployment.gpus if one.prediction else None,
            "layout": describe(one.prediction.deployment) if one.prediction else None,
            "output_tokens_per_s_per_device": one.output_tokens_per_s_per_device,
            "tpot_p50_s": one.prediction.metrics.tpot.p50 if one.prediction and one.prediction.metrics else None,
            "note": one.why,
            "provenance": one.prediction.provenance.to_dict() if one.prediction else None,
        }
        for one in found
    ]
