"""Time of the routed experts of all MoE layers and of the exchange around them, mechanism by mechanism.

Model: for each kind of layer (`routing.layers`) the load of the busiest rank goes through the measured expert block;
the exchange through the measured DeepEP kernels, or a closed form where the deployment asks for one. A rank that gets
more than its even share receives and sends back that much longer (incast). Fixed capacity, naive dispatch and experts
in host memory add their parts. Left out: what follows for quality; that the node of a hot rank is less hot than it.
Checked in tests/test_mechanisms_*.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from simmoe.costs import collectives, exchange, offload, padding
from simmoe.costs.operators import alltoall, experts, experts_deepgemm, nccl, tuned_tiles
from simmoe.costs.operators.base import Features
from simmoe.costs.overlap import LOW_LATENCY_HELD
from simmoe.costs.precision import Precision
from simmoe.costs.timing import KernelTimes
from simmoe.routing.capacity import dropped_share, padded_load, slots_per_expert, waste_factor
from simmoe.routing.expert_load import ExpertLoad, with_shared
from simmoe.routing.groups import nodes_per_token
from simmoe.routing.layers import LayerKind, layer_kinds
from simmoe.routing.popularity import cap_inclusion
from simmoe.specs.deployment import Deployment
from simmoe.specs.engines import exchange_algorithm
from simmoe.specs.mechanisms import ExchangeAlgorithm
from simmoe.specs.model import Experts, Model

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
class MoeLayers:
    """The MoE layers of one deployment.

    Parameters
    ----------
    model, deployment, times, precision : what runs where, and how kernels are timed.
    top_k, pool : experts per token after the cap, experts after pruning.
    inclusion : native inclusion of each expert, shape (pool,); overrides the deployment's popularity. [-]
    shared_fused : whether the shared expert runs in the routed experts' kernel, as one more expert of every token.

    Attributes
    ----------
    sigma : part -> log spread of its time, once timed. [-]
    """

    model: Model
    deployment: Deployment
    times: KernelTimes
    precision: Precision
    top_k: int
    pool: int
    inclusion: Array | None = None
    shared_fused: bool = False
    sigma: dict[str, float | Array] = field(default_factory=dict)

    @cached_property
    def experts(self) -> Experts:
        """The model's experts."""
        assert self.model.experts is not None
        return self.model.experts

    @cached_property
    def kinds(self) -> tuple[LayerKind, ...]:
        """Kinds of MoE layer."""
        d, m = self.deployment, self.model
        kinds = layer_kinds(
            d.routing, self.experts, m.moe_layers, pool=self.pool, top_k=self.top_k, ep=d.ep, vocab=m.vocab
        )
        if self.inclusion is None:
            return kinds
        given = cap_inclusion(self.inclusion, self.top_k)
        first = kinds[0]
        return (
            LayerKind(
                float(m.moe_layers), float(self.top_k), float(self.top_k), self.pool, d.ep, given, None,
                first.num_groups, first.top_groups, first.independence,
            ),
        )  # fmt: skip

    @property
    def exchanges_tokens(self) -> bool:
        """Whether experts are spread over data-parallel ranks, so that tokens travel."""
        return self.deployment.exchanges_tokens

    @property
    def _algorithm(self) -> ExchangeAlgorithm:
        return exchange_algorithm(self.deployment)

    @property
    def gathers(self) -> bool:
        """Whether every rank gets all ranks' tokens."""
        fabric = self.times.hardware.fabric
        on_torus = fabric is not None and fabric.torus is not None and self.deployment.exchange.algorithm == "auto"
        return self._algorithm in ("gather", "broadcast") and not on_torus

    @property
    def nodes(self) -> int:
        """Nodes the expert-parallel group spans."""
        return max(1, math.ceil(self._ranks / self.times.hardware.devices_per_node))

    @property
    def _ranks(self) -> int:
        """Devices that exchange tokens: all slices of all expert-parallel ranks."""
        return self.deployment.ep * self.deployment.expert_slices

    def parts(self, local: Array) -> dict[str, Array]:
        """Seconds over all MoE layers: routed_experts, dispatch, combine, expert_fetch where there are such.

        ``local``: tokens of one data-parallel rank, shape (n,). [tokens]
        """
        d = self.deployment
        group = local * d.dp if self.exchanges_tokens else local
        parts: dict[str, Array] = {}
        if d.dispatch.capped:
            few, many = (100 * self.dropped_share(t) for t in (group.min(), group.max()))
            self.times.notes[
                f"capacity factor {d.dispatch.capacity_factor:g} drops {few:.2g} % of pairs at {group.min():.0f} "
                f"tokens, {many:.2g} % at {group.max():.0f}"
            ] = None

        def add(name: str, seconds: Array) -> None:
            parts[name] = parts.get(name, np.zeros_like(local)) + seconds

        for kind in self.kinds:
            load = kind.load(group)
            rows = load
            if d.dispatch.capped:
                rows = padded_load(load, self.pool, kind.top_k, d.dispatch.capacity_factor)
            compute = self._experts(kind, rows, local)
            add("routed_experts", kind.layers * compute)
            if self.exchanges_tokens:
                sent = self._rows_sent(kind, group, load)
                per_rank = np.maximum(local / d.tp_size, 1.0)
                for phase in ("dispatch", "combine"):
                    seconds = self._exchange(kind, phase, per_rank, *sent) + self._between_slices(phase, rows)
                    add(phase, kind.layers * seconds)
            if d.offload is not None:
                held = self._expert_elements * self.precision.experts.weight_bytes
                fetch = offload.fetch_s(
                    d.offload, kind, group, rows.active_experts, held, self.times.hardware, under_s=compute
                )
                add("expert_fetch", kind.layers * fetch)
        return parts

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

    def dropped_share(self, tokens: float) -> float:
        """Share of (token, expert) pairs that fixed capacity drops in a step of ``tokens`` of the whole group. [-]"""
        how = self.deployment.dispatch
        if not how.capped:
            return 0.0
        lost = 0.0
        for kind in self.kinds:
            p = kind.inclusion if kind.inclusion is not None else np.full(kind.slots, kind.woken_by / kind.slots)
            slots = float(slots_per_expert(tokens, self.pool, kind.top_k, how.capacity_factor))
            second = how.overflow == "second_choice"
            # tokens that route alike come in clusters, as large as there are tokens to an unlike one
            unlike = float(kind.unlike_tokens(np.array(tokens)))
            slots *= unlike / max(tokens, 1.0)
            lost += kind.layers * dropped_share(p, unlike, slots, second_choice=second)
        return lost / self.model.moe_layers

    @property
    def _inter(self) -> float:
        e, d = self.experts, self.deployment
        return e.inter_size / (d.expert_slices if d.ep > 1 else d.tp_size)

    @property
    def _expert_elements(self) -> float:
        return self.experts.matrices * self.model.hidden * self._inter

    def _rows_sent(self, kind: LayerKind, group: Array, load: ExpertLoad) -> tuple[Array, Array]:
        """Copies the busiest rank exchanges over those of even, unpadded routing: one a pair, one a token. [-]"""
        if self.deployment.dispatch.capped:
            padded = waste_factor(group, self.pool, kind.top_k, self.deployment.dispatch.capacity_factor)
            return padded, padded
        return kind.receiver_skew(group, load)

    def _experts(self, kind: LayerKind, load: ExpertLoad, local: Array) -> Array:
        """Expert block of one layer on the busiest rank. [s]"""
        d, e, p = self.deployment, self.experts, self.precision.experts
        if d.dispatch.kind == "loop":
            self.sigma["routed_experts"] = 0.5
            return padding.loop_s(
                self.times, load, self.model.hidden, self._inter, e.matrices, p, d.dispatch.launch_time
            )
        shared = int(self.shared_fused)
        features = experts.features_of(
            with_shared(load) if shared else load,
            hidden=self.model.hidden,
            inter=self._inter,
            top_k=kind.top_k + shared,
            num_experts=kind.slots + shared,
            matrices=e.matrices,
            weight_bytes=p.weight_bytes,
            activation_bytes=p.activation_bytes,
            compute_bits=p.compute_bits,
            dispatched=self.exchanges_tokens and not self.gathers,
        )
        seconds, self.sigma["routed_experts"] = self._block(features, local)
        if d.dispatch.kind == "einsum":
            slots = load.busiest_expert_tokens * self.pool / (d.dp if self.exchanges_tokens else 1)
            seconds = seconds + padding.einsum_s(self.times, local, slots, self.model.hidden)
        return seconds

    def _block(self, features: Features, local: Array) -> tuple[Array, Array]:
        d, p = self.deployment, self.precision.experts
        told = d.exchange.algorithm.startswith("deepep")
        wide = told or (self._algorithm == "deepep" and self.nodes > 1)
        if self.exchanges_tokens and wide and d.engine == "sglang" and p.dtype == "fp8_block":
            # DeepEP's layouts go through DeepGEMM: masked rows in low-latency buffers, contiguous ones in bulk
            timed = {
                phase: self.times.seconds(experts_deepgemm.MOE_WIDEEP, features, dtype=p.dtype, phase=phase)
                for phase in ("generation", "context")
            }
            quick = self._low_latency(np.maximum(local / d.tp_size, 1.0))
            few, many = timed["generation"], timed["context"]
            return np.where(quick, few[0], many[0]), np.where(quick, few[1], many[1])
        source = experts.preferred_kernel(d.engine, p.dtype, expert_parallel=d.ep > 1)
        asked = {"dtype": p.dtype, "kernel_source": source} if source else {"dtype": p.dtype}
        fit = self.times.choose(experts.MOE, asked)
        bound = tuned_tiles.list_number(fit.variant.get("kernel_source"), p.dtype) if fit else 0.0
        older = tuned_tiles.older_kernel(d.engine, d.engine_version, p.dtype)
        if fit and not bound and older is not None:
            bound, variant = self._untuned(features, *older)
            asked |= variant
        features = {**features, "tile_list": np.full_like(local, bound)}
        return self.times.seconds(experts.MOE, features, cold=True, **asked)

    def _untuned(
        self, features: Features, number: float, stand_in: Mapping[str, str]
    ) -> tuple[float, Mapping[str, str]]:
        """List and variant of an older engine's kernel, if it shipped no tiles for this shape; else 0 and nothing."""
        names = (features[name].ravel()[:1] for name in ("tokens", "local_experts", "inter"))
        device = self.times.hardware.device.name
        if not tuned_tiles.fixed_rows(np.array([number]), device, *names).any():
            return 0.0, {}
        fit = self.times.choose(experts.MOE, {"dtype": self.precision.experts.dtype, **stand_in})
        if fit is None or fit.variant.get("kernel_source") != stand_in["kernel_source"]:
            return 0.0, {}
        version = f"{self.deployment.engine} {self.deployment.engine_version}"
        self.times.notes[
            f"moe: {version} has no tiles for this shape; {stand_in['framework']}'s kernel, with the same default ones"
        ] = None
        return number, stand_in

    def _low_latency(self, per_rank: Array) -> NDArray[np.bool_]:
        if self._algorithm == "deepep":
            return np.asarray(per_rank <= self.deployment.exchange.low_latency_tokens)
        return np.full(per_rank.shape, self._algorithm == "deepep_low_latency")

    def held_share(self, local: Array) -> tuple[Array, NDArray[np.bool_]]:
        """Share of the device that exchange kernels hold over their time [-]; whether always the same multiprocessors.

        Bulk kernels hold some multiprocessors throughout, low-latency ones all of them while sending and receiving.
        Each of the shape of ``local``.
        """
        # a device with no multiprocessors to lend counts as one that lends half
        bulk = min(alltoall.DEFAULT_SMS / max(self.times.hardware.device.sms, 1), 0.5)
        quick = self._low_latency(np.maximum(local / self.deployment.tp_size, 1.0))
        return np.where(quick, LOW_LATENCY_HELD, bulk), ~quick

    def _exchange(self, kind: LayerKind, phase: str, per_rank: Array, of_pairs: Array, of_tokens: Array) -> Array:
        """One exchange of one layer; the busiest rank's copies over the even share: one a pair, one a token. [s]"""
        d, hardware = self.deployment, self.times.hardware
        width = self._wire_bytes(phase)
        algorithm = self._algorithm
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
        quick = self._low_latency(per_rank)
        self.sigma[phase] = np.where(quick, *(sigma for _, sigma in chosen))
        return np.where(quick, *(seconds for seconds, _ in chosen))

    def _gathered(self, phase: str, per_rank: Array) -> Array:
        """All-gather of every rank's tokens, or reduce-scatter of what they became, in 16 bits. [s]

        ``broadcast``: the ranks send in turn, so that an exchange's fixed time comes once a rank, and all get all sums.
        """
        message = per_rank * self._ranks * self.model.hidden * 2.0
        if self._algorithm == "gather":
            return self._collective(phase, "all_gather" if phase == "dispatch" else "reduce_scatter", message)
        if phase == "combine":
            return self._collective(phase, "all_reduce", message)
        fixed = self._collective(phase, "all_gather", np.ones_like(message))
        return self._collective(phase, "all_gather", message) + (self._ranks - 1) * fixed

    def _collective(self, phase: str, operation: str, message: Array) -> Array:
        features = nccl.features_of(operation, message, self._ranks)
        seconds, self.sigma[phase] = self.times.seconds(nccl.OPERATOR, features, operation=operation)
        return seconds
