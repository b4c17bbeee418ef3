"""How many requests a replica's KV cache holds at once, by scheduling policy.

Model: a request in the engine holds its prompt and what it has generated. Long answers stay longer, so who is there has
an answer of O (1 + cv^2) tokens on average, half of it generated (renewal theory: a spell met at random is
length-biased; Feller, vol. 2, sec. VI.7). A policy keeps more than that free, see `simmoe.sim.policies`:

- vLLM admits a prompt as soon as it fits, so half of the next prompt is free on average. What then grows takes blocks
  back from the newest: per request as many tokens as it generates are computed a second time, and O / I requests that
  hold I each are sent back until the next answer ends. Ends come by chance, so that many are away on average.
- SGLang admits where a share of what is still to come fits too; as answers grow into it, half of it is free.
- TensorRT-LLM reserves a request's last block when it admits it; half of what the next one needs is free.

Left out: equal answers end in bunches all the same, and who is sent back waits longer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from simmoe.specs.cluster import NEW_TOKEN_RATIO
from simmoe.specs.deployment import Deployment
from simmoe.specs.workload import Lengths, Workload


@dataclass(frozen=True, slots=True)
class KvSeats:
    """What one replica's KV cache holds.

    Attributes
    ----------
    most : requests, while others wait. [requests]
    at_ends : of them, those that fit if all are at their ends. [requests]
    again : prompt tokens computed a second time per request while others wait. [tokens]
    sent_back : requests that wait for blocks although they have begun, while others wait. [requests]
    """

    most: float
    at_ends: float
    again: float
    sent_back: float


def kv_seats(policy: str, workload: Workload, deployment: Deployment, kv_tokens: float) -> KvSeats:
    """Requests that fit ``kv_tokens``, the KV cache of one replica, under a scheduling policy."""
    dp, block = deployment.dp, deployment.kv_block_size
    each = kv_tokens / dp  # one rank's
    prompt, output = workload.input.mean, workload.output.mean
    seen = output * (1.0 + cv2(workload.output))
    varied = cv2(workload.output) + cv2(workload.input) > 0
    at_end = prompt + output - 1 if not varied else prompt + seen
    blocks = math.ceil(at_end / block - 1e-9)
    at_ends = math.floor(each / block + 1e-9) // blocks if not varied else each / (at_end + block / 2) - 0.5
    again = sent_back = 0.0
    if policy == "trtllm":
        most = float(at_ends)
    else:
        kept_back = NEW_TOKEN_RATIO * seen / 4 if policy == "sglang" else 0.0
        most = (each - prompt / 2) / (prompt + seen / 2 + block / 2 + kept_back)
        if policy != "sglang":
            again, sent_back = output, output / (prompt + block / 2)
    return KvSeats(
        most=dp * max(most, 1.0), at_ends=dp * max(float(at_ends), 1.0), again=again, sent_back=dp * sent_back
    )


def cv2(lengths: Lengths) -> float:
    """Squared coefficient of variation of a length. [-]"""
    if lengths.kind == "lognormal":
        return lengths.cv**2
    if lengths.kind == "uniform" and lengths.high is not None:
        return (lengths.high - lengths.low) ** 2 / 12 / lengths.mean**2
    if lengths.kind == "empirical" and lengths.values:
        return float(np.var(lengths.values)) / lengths.mean**2
    return 0.0
