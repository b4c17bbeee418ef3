"""Time of the exchange around routed experts: how tokens reach the ranks that hold their experts, and come back.

Model: the measured DeepEP kernels, or a closed form where the deployment asks for one (`costs.exchange`), or gathering
all tokens everywhere (`operators.nccl`). A rank that gets more than its even share receives and sends back that much
longer (incast). Left out: that the node of a hot rank is less hot than it.
Checked in tests/test_mechanisms_exchange.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from simmoe.costs import collectives, exchange
from simmoe.costs.operators import alltoall, nccl
from simmoe.costs.overlap import LOW_LATENCY_HELD
from simmoe.costs.precision import Precision
from simmoe.costs.timing import KernelTimes
from simmoe.routing.expert_load import ExpertLoad
from simmoe.routing.groups import nodes_per_token
from simmoe.routing.layers import LayerKind
from simmoe.specs.deployment import Deployment
from simmoe.specs.engines import exchange_algorithm
from simmoe.specs.mechanisms import ExchangeAlgorithm
from simmoe.specs.model import Model

Array = NDArray[np.float64]

#: (low-latency, bulk) dispatch and combine kernels by engine, as the measured tables name them.
EXCHANGE_KERNELS = {
    "sglang": ("deepep_low_latency", "deepep_normal"),
    "vllm": ("deepep_ll", "deepep_ht"),
    "trtllm": ("trtllm_deepep_ll", "trtllm_deepep_ht"),
}
#: Nodes a token may go to in DeepEP's benchmark of normal kernels (tests/test_internode.py, num_topk_groups).
BENCHMARK_NODES = 4


@dataclass
class TokenExchange:
    """Dispatch and combine of one deployment.

    Parameters
    ----------
    model, deployment, times, precision : what runs where, and how kernels are timed.
    pool : experts after pruning.

    Attributes
    ----------
    sigma : phase -> log spread of its time, once timed. [-]
    """

    model: Model
    deployment: Deployment
    times: KernelTimes
    precision: Precision
    pool: int
    sigma: dict[str, float | Array] = field(default_factory=dict)

    @property
    def algorithm(self) -> ExchangeAlgorithm:
        """How tokens travel."""
        return exchange_algorithm(self.deployment)

    @property
    def gathers(self) -> bool:
        """Whether every rank gets all ranks' tokens."""
        fabric, d = self.times.hardware.fabric, self.deployment
        on_torus = fabric is not None and fabric.torus is not None and d.exchange.algorithm == "auto" and d.ep > 1
        return self.algorithm in ("gather", "broadcast") and not on_torus

    @property
    def nodes(self) -> int:
        """Nodes the expert-parallel group spans."""
        return max(1, math.ceil(self._ranks / self.times.hardware.devices_per_node))

    @property
    def _ranks(self) -> int:
        """Devices that exchange tokens: all slices of all expert-parallel ranks.

        Without expert parallelism those of one tensor-parallel index, each with all tokens of its data-parallel rank.
        """
        d = self.deployment
        return d.ep * d.expert_slices if d.ep > 1 else d.dp

    def phase_s(
        self, phase: str, kind: LayerKind, local: Array, load: ExpertLoad, copies: tuple[Array, Array]
    ) -> Array:
        """``dispatch`` or ``combine`` of one layer. [s]

        Parameters
        ----------
        local : tokens of one data-parallel rank, shape (n,). [tokens]
        load : what the busiest rank's experts get, as the others below of that shape.
        copies : what it exchanges over the even share, counted one a pair and one a token. [-]
        """
        d = self.deployment
        per_rank = np.maximum(local / (d.tp_size if d.ep > 1 else 1), 1.0)
        return self._exchange(kind, phase, per_rank, *copies) + self._between_slices(phase, load)

    def _between_slices(self, phase: str, load: ExpertLoad) -> Array | float:
        """Slices of an expert gather the rows that came to either, and add up what they made of them. [s]"""
        slices, hardware = self.deployment.expert_slices, self.times.hardware
        if slices == 1:
            return 0.0
        row_bytes = self.model.hidden * self._wire_bytes(phase)
        if phase == "dispatch":
            return collectives.ring_all_gather_s(load.routed_pairs * row_bytes, slices, hardware.scale_up)
        return collectives.all_reduce_s(load.routed_pairs * row_bytes, slices, hardware)

    def _node_share(self, kind: LayerKind) -> float:
        """Other nodes a token goes to, over those of the benchmark, which takes the best few nodes. [-]"""
        nodes, k = self.nodes, max(1, round(kind.top_k))
        if k == 1 or nodes == 1 or self.pool % nodes or self.pool // nodes * BENCHMARK_NODES < k:
            return 1.0
        limited = kind.placement is None and not kind.balanced
        groups = (kind.num_groups, kind.top_groups) if limited else (1, 1)
        ours = nodes_per_token(self.pool, k, nodes, *groups)
        measured = nodes_per_token(self.pool, k, nodes, nodes, min(nodes, BENCHMARK_NODES))
        return (ours - 1.0) / (measured - 1.0)

    def _rank_share(self, kind: LayerKind) -> float:
        """Ranks of one node a token goes to, over those it would reach if it could choose any expert. [-]"""
        if self.nodes > 1 or kind.placement is not None or kind.balanced or kind.top_k < 1:
            return 1.0
        k = max(1, round(kind.top_k))
        return alltoall.group_rank_share(self.pool, k, self._ranks, kind.num_groups, kind.top_groups)

    def _wire_bytes(self, phase: str) -> float:
        """Bytes per element on the wire: activations of 8-bit products go out in fp8, results come back in 16 bits."""
        return alltoall.FP8_BYTES if phase == "dispatch" and self.precision.experts.compute_bits == 8 else 2.0

    def low_latency(self, per_rank: Array) -> NDArray[np.bool_]:
        """Whether low-latency kernels serve so many tokens a rank."""
        if self.algorithm == "deepep":
            return np.asarray(per_rank <= self.deployment.exchange.low_latency_tokens)
        return np.full(per_rank.shape, self.algorithm == "deepep_low_latency")

    def held_share(self, local: Array) -> tuple[Array, NDArray[np.bool_]]:
        """Share of the device that exchange kernels hold over their time [-]; whether always the same multiprocessors.

        Bulk kernels hold some multiprocessors throughout, low-latency ones all of them while sending and receiving.
        Each of the shape of ``local``.
        """
        # a device with no multiprocessors to lend counts as one that lends half
        bulk = min(alltoall.DEFAULT_SMS / max(self.times.hardware.device.sms, 1), 0.5)
        quick = self.low_latency(np.maximum(local / self.deployment.tp_size, 1.0))
        return np.where(quick, LOW_LATENCY_HELD, bulk), ~quick

    def _exchange(self, kind: LayerKind, phase: str, per_rank: Array, of_pairs: Array, of_tokens: Array) -> Array:
        """One exchange of one layer; the busiest rank's copies over the even share: one a pair, one a token. [s]"""
        d, hardware = self.deployment, self.times.hardware
        width = self._wire_bytes(phase)
        algorithm = self.algorithm
        if self.gathers:
            return self._gathered(phase, per_rank)
        if hardware.fabric is not None and hardware.fabric.torus and not algorithm.startswith("flat"):
            algorithm = "flat"  # on a torus there is one way
        if algorithm in ("flat", "hierarchical", "two_dh", "coordinated"):
            self.sigma[phase] = 0.5
            together = d.tp_size if algorithm == "coordinated" else 1
            volume = per_rank * together * of_pairs * kind.top_k * self.model.hidden * width
            return exchange.exchange_s(algorithm, volume, self._ranks, hardware, tensor_parallel=together)
        # exchanges between nodes were measured with SGLang's kernels only
        framework = d.engine if self.nodes == 1 and d.engine in EXCHANGE_KERNELS else "sglang"
        chosen = []
        kinds = (("deepep_low_latency", of_pairs), ("deepep_normal", of_tokens))
        for (kernel, skew), name in zip(kinds, EXCHANGE_KERNELS[framework], strict=True):
            features = alltoall.features_of(
                kernel=kernel,
                phase=phase,
                tokens_per_rank=np.maximum(per_rank * skew, 1.0),
                hidden=self.model.hidden,
                top_k=kind.top_k,
                num_experts=self.pool,
                ranks=self._ranks,
                nodes=self.nodes,
                bytes_per_element=width,
                node_share=self._node_share(kind),
                rank_share=self._rank_share(kind),
            )
            chosen.append(
                self.times.seconds(alltoall.OPERATOR, features, framework=framework, kernel=name, phase=phase)
            )
        # low-latency buffers hold up to 128 tokens a rank in production (DeepEP's README)
        quick = self.low_latency(per_rank)
        self.sigma[phase] = np.where(quick, *(sigma for _, sigma in chosen))
        return np.where(quick, *(seconds for seconds, _ in chosen))

    def _gathered(self, phase: str, per_rank: Array) -> Array:
        """All-gather of every rank's tokens, or reduce-scatter of what they became, in 16 bits. [s]

        ``broadcast``: the ranks send in turn, so that an exchange's fixed time comes once a rank, and all get all sums.
        """
        message = per_rank * self._ranks * self.model.hidden * 2.0
        if self.algorithm == "gather":
            return self._collective(phase, "all_gather" if phase == "dispatch" else "reduce_scatter", message)
        if phase == "combine":
            return self._collective(phase, "all_reduce", message)
        fixed = self._collective(phase, "all_gather", np.ones_like(message))
        return self._collective(phase, "all_gather", message) + (self._ranks - 1) * fixed

    def _collective(self, phase: str, operation: str, message: Array) -> Array:
        d, hardware = self.deployment, self.times.hardware
        inside = self._ranks
        if d.ep == 1 and d.tp_size * d.dp > hardware.devices_per_node:  # of an index, a node has but a few
            inside = max(1, hardware.devices_per_node // d.tp_size)
        features = nccl.features_of(operation, message, inside)
        seconds, self.sigma[phase] = self.times.seconds(nccl.OPERATOR, features, operation=operation)
        if inside == self._ranks:
            return seconds
        across = collectives.between_nodes_gather_s(message / inside, math.ceil(self._ranks / inside), hardware)
        return seconds + nccl.PASSES[operation] * across
