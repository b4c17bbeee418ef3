"""Prompts computed by one pool, outputs by another; the KV cache moves between them over a link.

Model (Zhong et al., "DistServe", OSDI 2024; Patel et al., "Splitwise", ISCA 2024): a prompt's first token is sampled
where it was computed and counts then. Its KV cache queues for the link of its prefill rank (first come, first served),
and the request joins the decode pool's router when it has arrived; there it needs no prompt step, unless it is
preempted. Layer by layer, a share of the cache leaves while later layers are computed: what is left after the prompt is
at least one layer's share.
Left out: blocks held by the prefill side during the transfer, contention at the receiver, waiting for decode blocks
before a transfer starts. Checked in: tests/test_cluster.py, against the step-by-step twin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from simmoe.costs.memory import kv_bytes_per_token
from simmoe.sim.clock import At, Clock
from simmoe.sim.pool import Pool, PoolSetup
from simmoe.sim.request import Request
from simmoe.sim.ticks import to_ticks
from simmoe.specs.cluster import Disaggregation
from simmoe.specs.deployment import Deployment
from simmoe.specs.hardware import Hardware, Link
from simmoe.specs.model import Model

ARRIVAL = 1
"""SimPy's priority of an arrival: before step ends of the same instant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """Time to move a prompt's cache: latency + tokens * seconds_per_token, of which layers may leave early.

    Attributes
    ----------
    layers : parts that leave one by one as they are computed; 1: all at the end.
    """

    latency_s: float
    seconds_per_token: float
    layers: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """The decode pool and the way to it."""

    decode: PoolSetup
    transfer: Transfer


def transfer_of(model: Model, prefill: Deployment, rule: Disaggregation, hardware: Hardware) -> Transfer:
    """Transfer between two layouts: the side whose devices hold more of a token each takes longest.

    DeepSeek-V3: 70 kB a token, so that 4096 tokens take 5.8 ms at 50 GB/s.
    """
    link: Link = rule.link or hardware.scale_out or hardware.scale_up
    most_bytes = max(kv_bytes_per_token(model, prefill), kv_bytes_per_token(model, rule.decode))
    return Transfer(
        latency_s=link.latency,
        seconds_per_token=most_bytes / link.bandwidth,
        layers=model.layers if rule.layerwise else 1,
    )


class Mover:
    """Takes finished prompts to the decode pool.

    Parameters
    ----------
    done : called with rank and request for requests whose only token was the first.
    """

    def __init__(
        self,
        clock: Clock,
        decode: Pool,
        transfer: Transfer,
        *,
        prefill_ranks: int,
        done: Callable[[int, Request], None],
    ) -> None:
        self._clock = clock
        self._decode = decode
        self._transfer = transfer
        self._free_at = [0] * prefill_ranks
        self._done = done
        self._wanted: dict[int, int] = {}

    def prompt_of(self, request: Request) -> Request:
        """The part of a request that the prefill pool serves: its prompt and one token."""
        self._wanted[request.index] = request.output_tokens
        return Request(request.index, request.arrival, request.input_tokens, 1, request.prompt)

    def prompt_done(self, rank: int, request: Request) -> None:
        """Send a prompt's cache on its way."""
        wanted = self._wanted.pop(request.index)
        if wanted == 1:
            self._done(rank, request)
            return
        now = self._clock.now
        moved = Request(request.index, request.arrival, request.input_tokens, wanted, request.prompt)
        moved.admitted, moved.first_token, moved.last_token = request.admitted, request.first_token, now
        moved.preemptions = request.preemptions
        moved.generated = 1
        moved.loaded = request.input_tokens
        moved.target = request.input_tokens + 1
        whole = to_ticks(self._transfer.seconds_per_token * request.input_tokens)
        if self._transfer.layers > 1:
            whole = max(whole // self._transfer.layers, whole - (now - request.admitted))
        self._free_at[rank] = arrived = max(now, self._free_at[rank]) + whole
        delay = arrived - now + to_ticks(self._transfer.latency_s)
        At(self._clock, delay, ARRIVAL, lambda _: self._decode.send(moved))
