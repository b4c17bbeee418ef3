"""Time of the routed experts of all MoE layers and of the exchange around them, mechanism by mechanism.

Model: for each kind of layer (`routing.layers`) the load of the busiest rank goes through the measured expert block and
the exchange (`costs.token_exchange`). Fixed capacity, naive dispatch and experts in host memory add their parts.
Left out: what follows for quality. Checked in tests/test_mechanisms_*.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from simmoe.costs import offload, padding
from simmoe.costs.operators import experts, experts_deepgemm, tuned_tiles
from simmoe.costs.operators.base import Features
from simmoe.costs.operators.host import is_host
from simmoe.costs.precision import Precision
from simmoe.costs.timing import KernelTimes
from simmoe.costs.token_exchange import TokenExchange
from simmoe.routing.capacity import dropped_share, padded_load, slots_per_expert, waste_factor
from simmoe.routing.expert_load import ExpertLoad, with_shared
from simmoe.routing.layers import LayerKind, layer_kinds
from simmoe.routing.popularity import cap_inclusion
from simmoe.specs.deployment import Deployment
from simmoe.specs.model import Experts, Model

Array = NDArray[np.float64]


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
        """Whether data-parallel ranks share the experts, so that tokens travel."""
        return self.deployment.exchanges_tokens

    @cached_property
    def exchange(self) -> TokenExchange:
        """How tokens reach their experts and come back."""
        return TokenExchange(self.model, self.deployment, self.times, self.precision, self.pool)

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
                for phase in ("dispatch", "combine"):
                    add(phase, kind.layers * self.exchange.phase_s(phase, kind, local, rows, sent))
                self.sigma |= self.exchange.sigma
            if d.offload is not None:
                held = self._expert_elements * self.precision.experts.weight_bytes
                fetch = offload.fetch_s(
                    d.offload, kind, group, rows.active_experts, held, self.times.hardware, under_s=compute
                )
                add("expert_fetch", kind.layers * fetch)
        return parts

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
        return e.inter_size / d.expert_shards

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
            narrow_tiles=p.dtype in experts.NARROW_TILES,
            dispatched=self.exchanges_tokens and not self.exchange.gathers,
        )
        seconds, self.sigma["routed_experts"] = self._block(features, local)
        if d.dispatch.kind == "loop":
            self.sigma["routed_experts"] = 0.5
            apart = padding.loop_s(
                self.times, load, self.model.hidden, self._inter, e.matrices, p, d.dispatch.launch_time
            )
            seconds = np.maximum(apart, seconds)  # the same choice, weights and rows, and nothing of it for less
        if d.dispatch.kind == "einsum":
            slots = load.busiest_expert_tokens * self.pool / (d.dp if self.exchanges_tokens else 1)
            seconds = seconds + padding.einsum_s(self.times, local, slots, self.model.hidden)
        return seconds

    def _block(self, features: Features, local: Array) -> tuple[Array, Array]:
        d, p = self.deployment, self.precision.experts
        told = d.exchange.algorithm.startswith("deepep")
        wide = told or (self.exchange.algorithm == "deepep" and self.exchange.nodes > 1)
        if self.exchanges_tokens and wide and d.engine == "sglang" and p.dtype == "fp8_block":
            # DeepEP's layouts go through DeepGEMM: masked rows in low-latency buffers, contiguous ones in bulk
            timed = {
                phase: self.times.seconds(experts_deepgemm.MOE_WIDEEP, features, dtype=p.dtype, phase=phase)
                for phase in ("generation", "context")
            }
            quick = self.exchange.low_latency(np.maximum(local / d.tp_size, 1.0))
            few, many = timed["generation"], timed["context"]
            return np.where(quick, few[0], many[0]), np.where(quick, few[1], many[1])
        if is_host(self.times.hardware):  # none of the engines' kernels
            return self.times.seconds(experts.MOE, features, cold=True, dtype=p.dtype)
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
