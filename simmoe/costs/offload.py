"""Time to fetch experts from host memory: misses of a cache, foreseen ones under compute; or every layer streamed.

Model: a miss moves one expert over the host link; fetches of a layer follow each other without gaps after one latency.
Foreseen misses run under the layer before; what is longer than it shows.
Where all tokens of a task take the same experts, those of the step before are the next step's, as many as the cache
holds. Left out: computing a missed expert on the host, host memory bandwidth below the link's. Hit rates:
`routing.locality`. Checked in tests/test_mechanisms_offload.py.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simmoe.errors import CoverageError
from simmoe.routing.layers import LayerKind
from simmoe.routing.locality import hit_rate
from simmoe.specs.hardware import Hardware
from simmoe.specs.mechanisms import Offload

Array = NDArray[np.float64]


def fetch_s(
    offload: Offload,
    kind: LayerKind,
    tokens: Array,
    active: Array,
    expert_bytes: float,
    hardware: Hardware,
    under_s: ArrayLike = 0.0,
) -> Array:
    """Visible time per layer to bring missing experts to a device, shape of ``tokens``. [s]

    Parameters
    ----------
    offload : what is cached and how.
    kind : the layer's routing.
    tokens : of the whole group. [tokens]
    active : distinct experts the rank needs. [experts]
    expert_bytes : of one expert on this device, its slice under tensor parallelism. [B]
    under_s : compute of a layer under which foreseen fetches run. [s]

    Raises
    ------
    CoverageError
        If the hardware describes no link to the host.
    """
    link = hardware.host_link
    if link is None:
        raise CoverageError(f"{hardware.name}: experts are offloaded but the hardware describes no host_link")
    local = kind.slots / kind.ep
    missing = np.asarray(active, dtype=np.float64) * (1.0 - hit_rates(offload, kind, tokens, active))
    if offload.policy == "stream":
        missing = np.full_like(missing, local)
    seconds = link.latency * np.minimum(missing, 1.0) + missing * expert_bytes / link.bandwidth
    foreseen = seconds * (1.0 if offload.policy == "stream" else offload.prefetch)
    return np.asarray(seconds - foreseen + np.maximum(foreseen - np.asarray(under_s), 0.0), dtype=np.float64)


def hit_rates(offload: Offload, kind: LayerKind, tokens: Array, active: Array) -> Array:
    """Share of the ``active`` experts of a rank that the cache holds, shape of ``tokens``. [-]"""
    if offload.policy == "stream":
        return np.zeros_like(tokens)
    if kind.tasks is not None:
        return np.minimum(offload.cached_experts / np.maximum(active, 1e-12), 1.0)
    inclusion = kind.inclusion if kind.inclusion is not None else np.full(kind.slots, kind.woken_by / kind.slots)
    drawn = kind.unlike_tokens(tokens)
    cached = min(float(offload.cached_experts * kind.ep), float(kind.slots))
    rates = [hit_rate(inclusion, cached, policy=offload.policy, tokens=t, stickiness=offload.stickiness) for t in drawn]
    return np.array(rates)
