"""Every way to lay one replica of a model out on a kind of device: tensor, expert, data and pipeline parallel sizes.

Sizes are powers of two. Tensor parallelism stays inside a node; wide expert parallelism (data-parallel attention,
experts over all ranks) and pipeline stages may cross nodes where the hardware file has a network; there tokens go to
their experts alone (DeepEP, as the launch line then says) unless the base says otherwise. Layouts that cannot
be cut or do not fit are kept with the reason. Left out: uneven stages, expert parallelism inside pipeline stages.
Checked in: tests/test_plan.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from simmoe.costs.device_fit import footprint
from simmoe.costs.layout import check_layout
from simmoe.errors import CapacityError, SpecError
from simmoe.specs.deployment import Deployment
from simmoe.specs.hardware import Hardware
from simmoe.specs.model import Model


@dataclass(frozen=True, slots=True)
class Infeasible:
    """A layout that cannot serve, and why."""

    replica: Deployment
    reason: str


def layouts(
    hardware: Hardware, model: Model, base: Deployment, *, context_tokens: float, most_devices: int = 32
) -> tuple[list[Deployment], list[Infeasible]]:
    """Deployments of one replica that hold the model and one request, and those that do not.

    Parameters
    ----------
    base : precision, engine and its limits; its sizes are replaced.
    context_tokens : tokens of one request that must fit the KV cache. [tokens]
    most_devices : largest replica tried. [devices]
    """
    feasible, refused = [], []
    for sizes in _sizes(hardware, model, most_devices):
        if base.speculative is not None and sizes["pp"] > 1:
            continue  # no engine drafts over stages here
        devices = sizes["tp"] * sizes["dp"] * sizes["pp"]
        replica = base.vary(gpus=devices, **sizes)
        if replica.exchanges_tokens and devices > hardware.devices_per_node and base.exchange.algorithm == "auto":
            replica = replica.vary(exchange=base.exchange.vary(algorithm="deepep"))
        try:
            check_layout(model, replica)
            _check_kv_heads(model, replica)
            tokens = footprint(model, replica, hardware).kv_tokens_per_rank
        except (CapacityError, SpecError) as problem:
            refused.append(Infeasible(replica, str(problem)))
            continue
        if tokens < context_tokens:
            reason = f"KV cache of {tokens} tokens a rank, {context_tokens:.0f} needed by one request"
            refused.append(Infeasible(replica, reason))
        else:
            feasible.append(replica)
    return feasible, refused


def describe(replica: Deployment) -> str:
    """Sizes in words: "tp 8, ep 8"."""
    sizes = [f"tp {replica.tp_size}"]
    sizes += [f"{name} {value}" for name in ("ep", "dp", "pp") if (value := getattr(replica, name)) > 1]
    return ", ".join(sizes)


def _sizes(hardware: Hardware, model: Model, most_devices: int) -> Iterator[dict[str, int]]:
    node = min(hardware.devices_per_node, most_devices)
    # without a network a replica ends at the node
    most = most_devices if hardware.scale_out is not None else node
    for tp in _powers(node):
        yield {"tp": tp, "ep": 1, "dp": 1, "pp": 1}
        if model.experts is not None and tp > 1:
            yield {"tp": tp, "ep": tp, "dp": 1, "pp": 1}
        for pp in _powers(most // tp)[1:]:
            if pp <= 4:  # more stages than that add bubbles and latency before they add anything else
                yield {"tp": tp, "ep": 1, "dp": 1, "pp": pp}
        if model.experts is not None:
            for dp in _powers(most // tp)[1:]:
                yield {"tp": tp, "ep": tp * dp, "dp": dp, "pp": 1}


def _powers(most: int) -> list[int]:
    return [2**n for n in range(max(most, 1).bit_length())]


def _check_kv_heads(model: Model, replica: Deployment) -> None:
    kv_heads, tp = model.attention.kv_heads, replica.tp_size
    if model.attention.kind == "gqa" and tp > kv_heads and tp % kv_heads:
        raise SpecError(f"tp {tp} neither divides nor is divided by the {kv_heads} KV heads of {model.name}")
