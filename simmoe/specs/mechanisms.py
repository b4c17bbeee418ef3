"""How tokens reach experts and where experts lie in memory: parts of a `Deployment`. Defaults change nothing.

Left out: which kernel multiplies (see `simmoe.specs.engines`). What the fields cost is told in
`simmoe.costs.moe_layers`, `token_exchange`, `exchange`, `padding` and `offload`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from simmoe.specs.base import Bytes, Spec

ExchangeAlgorithm = Literal[
    "auto", "deepep", "deepep_low_latency", "deepep_normal", "flat", "hierarchical", "two_dh", "coordinated", "gather",
    "broadcast",
]  # fmt: skip


class Exchange(Spec):
    """Dispatch and combine between expert-parallel ranks.

    ``auto``: what the engine does unless told otherwise (`specs.engines.exchange_algorithm`). ``deepep``: its measured
    DeepEP kernels, low latency up to ``low_latency_tokens`` a rank, else normal.
    Closed forms on the hardware's links: ``flat`` (every pair of ranks talks), ``hierarchical`` (inside nodes, then
    between; DeepSpeed-MoE), ``two_dh`` (the same with messages gathered first; Tutel), ``coordinated`` (ranks of one
    tensor-parallel index talk, then gather; DeepSpeed-MoE). ``gather``: every rank gathers all ranks' tokens, computes
    what its experts are to do with them, and the results are reduced and scattered, then reduced over tensor-parallel
    ranks: vLLM's default since 0.11 (``allgather_reducescatter``), and what attention data parallelism does in
    SGLang and TensorRT-LLM inside a node. ``broadcast``: the same, with every rank sending to all in turn and results
    reduced everywhere: vLLM's default before (``naive``). Experts that are sliced over data-parallel ranks (ep 1) know
    these two alone.
    """

    algorithm: ExchangeAlgorithm = "auto"
    low_latency_tokens: int = Field(default=128, ge=1, description="Most tokens a low-latency buffer takes. [tokens]")
    overlap: Literal["none", "shared", "two_batch"] = Field(
        default="none", description="What runs under the exchange: the shared expert, or a second half of the batch."
    )


class Dispatch(Spec):
    """What becomes of uneven loads before the expert products.

    ``dynamic``: rows as they come, in one grouped product. ``capacity``: every expert gets the same number of slots,
    empty ones are computed too and tokens beyond are dropped or sent to their next choice. ``einsum``: capacity, with
    tokens moved by one-hot products (GShard). ``loop``: one launch after another per expert.
    """

    kind: Literal["dynamic", "capacity", "einsum", "loop"] = "dynamic"
    capacity_factor: float = Field(default=1.25, gt=0, description="Slots of an expert over its even share. [-]")
    overflow: Literal["drop", "second_choice"] = "drop"
    launch_time: float = Field(default=5e-6, gt=0, description="loop: one kernel's launch. [s]")

    @property
    def capped(self) -> bool:
        """Whether experts have a fixed number of slots."""
        return self.kind in ("capacity", "einsum")


class KvOffload(Spec):
    """Host memory as a second tier of the KV cache.

    Blocks that leave the device's prefix cache go there; found again, they are loaded over the host link instead of
    being computed. With ``swap`` a preempted request's blocks go there too, and come back instead of being computed
    again, while there is room. ``layerwise``: a layer computes as soon as its own part is there, so that a step takes
    the longer of loading and computing (SGLang's HiCache); else it computes after loading.
    ``copies: filled`` is vLLM's offloading connector: blocks are copied as they fill, and keeping the books of the pool
    takes the scheduler time (`simmoe.sim.offload_books`), much once running requests hold more blocks than the pool;
    loads back are left out.
    """

    host_memory: Bytes = Field(gt=0, description="Of one replica, over all its devices. [B]")
    devices_per_link: int = Field(
        default=1, ge=1, description="Devices that share the bandwidth of a host link (2 behind a common PCIe switch)."
    )
    layerwise: bool = True
    swap: bool = False
    copies: Literal["evicted", "filled"] = Field(default="evicted", description="Which blocks go there.")

    @model_validator(mode="after")
    def _one_way(self) -> KvOffload:
        if self.swap and self.copies == "filled":
            raise ValueError("swap is for copies: evicted; with copies: filled preempted requests are computed again")
        return self


class Offload(Spec):
    """Routed experts kept in host memory, with a cache of some on the device; or all of them streamed.

    ``stream``: every step fetches all experts of every layer once (ZeRO-Inference, which streams attention too: a few
    per cent of a MoE), whatever is used.
    """

    cached_experts: int = Field(default=0, ge=0, description="Experts of each MoE layer held by a device.")
    policy: Literal["lru", "lfu", "pinned", "stream"] = "lru"
    stickiness: float = Field(default=0.0, ge=0, le=1, description="Share of picks that repeat the last step's. [-]")
    prefetch: float = Field(
        default=0.0, ge=0, le=1, description="Share of missing experts foreseen a layer ahead; fetched under compute."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Offload:
        if self.policy == "stream" and (self.cached_experts or self.stickiness):
            raise ValueError("policy stream keeps nothing; leave cached_experts and stickiness at 0")
        return self
