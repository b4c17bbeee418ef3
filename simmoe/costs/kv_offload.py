"""KV cache in host memory: how much fits there, and how long it takes to come back.

Model: every device loads its own part of a token over its host link at the link's bandwidth, all devices of a rank at
the same time. Left out: contention with other traffic of the link, host memory's own bandwidth, small transfers below
the link's full rate. Checked in: tests/test_host_memory.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from simmoe.costs.memory import kv_bytes_per_token
from simmoe.errors import SpecError
from simmoe.specs.deployment import Deployment
from simmoe.specs.hardware import Hardware
from simmoe.specs.model import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class HostTier:
    """Size and speed of a rank's host memory.

    Attributes
    ----------
    tokens : room for KV entries. [tokens]
    seconds_per_token, latency_s : time to load: latency + tokens * seconds_per_token, each device its own part. [s]
    layerwise, swap : see `specs.mechanisms.KvOffload`.
    """

    tokens: int
    seconds_per_token: float
    latency_s: float = 0.0
    layerwise: bool = True
    swap: bool = False


def host_tier_of(model: Model, deployment: Deployment, hardware: Hardware) -> HostTier | None:
    """The deployment's tier; None if it has none, or one whose loads are not modelled (``copies: filled``).

    A device of 128 kB a token (Llama-3.1-8B in bf16) reads 4096 tokens over 64 GB/s in 8.4 ms.

    Raises
    ------
    SpecError
        If the hardware describes no host link.
    """
    rule = deployment.kv_offload
    if rule is None or rule.copies == "filled":
        return None
    if hardware.host_link is None:
        raise SpecError(f"{hardware.name}: kv_offload needs host_link in the hardware, e.g. {{bandwidth: 64 GB/s}}")
    each = kv_bytes_per_token(model, deployment)
    shared = min(rule.devices_per_link, deployment.devices_per_replica)
    return HostTier(
        tokens=int(rule.host_memory / (deployment.devices_per_replica * each)),
        seconds_per_token=each * shared / hardware.host_link.bandwidth,
        latency_s=hardware.host_link.latency,
        layerwise=rule.layerwise,
        swap=rule.swap,
    )
