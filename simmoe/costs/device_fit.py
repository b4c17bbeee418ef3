"""Whether a deployment fits its devices, and the smallest one that does.

What is held is counted in `costs.memory`. A no comes as one line with the shortfall and what would fit.
Checked in tests/test_memory.py.
"""

from __future__ import annotations

from simmoe.costs.layout import check_layout
from simmoe.costs.memory import MemoryFootprint, counted, model_bytes, weights_per_device_bytes
from simmoe.costs.precision import precision_of
from simmoe.costs.speculation import drafter
from simmoe.errors import CapacityError, SpecError
from simmoe.specs.deployment import Deployment
from simmoe.specs.hardware import Hardware
from simmoe.specs.model import Model
from simmoe.units import text


def footprint(
    model: Model, deployment: Deployment, hardware: Hardware, *, context_tokens: float | None = None
) -> MemoryFootprint:
    """Memory of a deployment on a device.

    Parameters
    ----------
    model, deployment, hardware : what is laid out on what.
    context_tokens : typical tokens of a request in cache; with it, windowed layers are counted at their window.
        None: every layer keeps every token.

    Raises
    ------
    CapacityError
        If weights and workspace leave no room for one KV block (with ``context_tokens``: for one such request), in
        one line with the smallest count of this device that does fit.
    SpecError
        If the layout cannot be cut.
    """
    check_layout(model, deployment)
    result = counted(model, deployment, hardware, context_tokens)
    if result.kv_tokens_per_rank < max(1.0, context_tokens or 0.0):
        raise CapacityError(_does_not_fit(model, deployment, hardware, result, context_tokens))
    return result


def smallest_that_fits(
    model: Model, deployment: Deployment, hardware: Hardware, *, context_tokens: float | None = None
) -> Deployment | None:
    """The fewest devices (1, 2, 4 ... 1024) that hold the model with room for KV, formats and limits unchanged.

    Within a scale-up domain tensor parallelism is tried first; beyond it MoE models go wide (data-parallel attention,
    experts over all devices) and dense ones into pipeline stages. None if nothing fits.
    """
    for gpus in (2**n for n in range(11)):
        layouts = (
            {"tp": tp, **spread}
            for tp in (2**n for n in range(7, -1, -1))
            if tp <= min(gpus, hardware.devices_per_node) and gpus % tp == 0
            for spread in _spreads(model, gpus, gpus // tp)
            if deployment.speculative is None or spread["pp"] == 1
        )
        for layout in layouts:
            candidate = deployment.vary(gpus=gpus, **layout)
            try:
                check_layout(model, candidate)
            except SpecError:
                continue
            if counted(model, candidate, hardware, context_tokens).kv_tokens_per_rank >= max(1, context_tokens or 0):
                return candidate
    return None


def _spreads(model: Model, gpus: int, groups: int) -> tuple[dict[str, int], ...]:
    if groups == 1:
        return ({"ep": 1, "dp": 1, "pp": 1},)
    wide = {"ep": gpus, "dp": groups, "pp": 1}
    staged = {"ep": 1, "dp": 1, "pp": groups}
    return (wide, staged) if model.experts else (staged,)


def _does_not_fit(
    model: Model, deployment: Deployment, hardware: Hardware, found: MemoryFootprint, context_tokens: float | None
) -> str:
    d, device = deployment, hardware.name
    precision = d.weight_precision or model.native_precision
    short = found.weights + found.workspace - found.usable
    n = d.devices_per_replica
    fullest = f", {text(found.weights, 'B')} of them on the fullest of {n} devices" if n > 1 else ""
    if drafter(model, d) is not None:
        fullest += (
            f", {text(found.weights - weights_per_device_bytes(model, d.vary(speculative=None)), 'B')} there to draft"
        )
    copies = f" with {d.routing.redundant_experts} redundant experts" if d.routing.redundant_experts else ""
    problem = (
        f"{model.name} in {precision}{copies} needs {text(model_bytes(model, d), 'B')} of weights{fullest}; with "
        f"{text(found.workspace, 'B')} of workspace, {'each' if n > 1 else '1 x'} {device} holds "
        f"{text(found.usable, 'B')}"
    )
    if short > 0:
        problem += f" ({text(short, 'B')} short)"
    elif context_tokens:
        if d.kv_blocks is not None:
            return (
                f"kv_blocks {d.kv_blocks} of {d.kv_block_size} tokens hold {found.kv_tokens_per_rank} where "
                f"{context_tokens:.0f} are asked for; raise kv_blocks, or leave it out for what memory leaves"
            )
        problem += f", leaving KV cache for {found.kv_tokens_per_rank} tokens where {context_tokens:.0f} are asked for"
    narrow = _narrower_that_fits(model, d, hardware, context_tokens)
    best = smallest_that_fits(model, d, hardware, context_tokens=context_tokens)
    if best is None:
        remedy = f"as laid out it fits in {narrow}" if narrow else "try a narrower weight_precision"
        return f"{problem}. No layout of up to 1024 of them fits; {remedy}"
    options = [f"--gpus {best.gpus}", f"--tp {best.tp_size}"]
    options += [f"--{name} {value}" for name in ("dp", "ep", "pp") if (value := getattr(best, name)) > 1]
    else_narrow = f"; as laid out, --precision {narrow}" if narrow else ""
    return f"{problem}. Smallest that fits: {best.gpus} x {device} ({' '.join(options)}){else_narrow}"


def _narrower_that_fits(
    model: Model, deployment: Deployment, hardware: Hardware, context_tokens: float | None
) -> str | None:
    """The widest of the usual quantised formats in which the deployment fits as it is laid out; None: none does."""
    now = precision_of(model, deployment).experts.weight_bytes
    for name in ("fp8" if hardware.device.peak.fp8 else "int8", "int4"):
        candidate = deployment.vary(weight_precision=name)
        if precision_of(model, candidate).experts.weight_bytes < now:
            tokens = counted(model, candidate, hardware, context_tokens).kv_tokens_per_rank
            if tokens >= max(1.0, context_tokens or 0.0):
                return name
    return None
