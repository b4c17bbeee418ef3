"""Time of what every token goes through beside attention and routed experts: matrix products, norms, sums over ranks.

The products' shapes are in `matrices`. Left out: what a fused kernel saves of reading a norm's result again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from simmoe.costs.operators import allreduce, elementwise, gemm, host_glue, nccl
from simmoe.costs.operators.host import is_host
from simmoe.costs.precision import Precision
from simmoe.costs.timing import KernelTimes
from simmoe.engine.matrices import Matrix
from simmoe.engine.step import UNFITTED_LOG_SIGMA
from simmoe.specs.deployment import Deployment
from simmoe.specs.engines import EngineParameters
from simmoe.specs.hardware import Hardware
from simmoe.specs.model import Model

Array = NDArray[np.float64]

#: Gathers larger than any measured take as long as their pieces. [B]
_LARGEST_GATHER_BYTES = 2.0**29


@dataclass
class DenseLayers:
    """The dense part of a model's layers, and its head.

    Attributes
    ----------
    sigma : part -> log spread of its time, once timed. [-]
    """

    hardware: Hardware
    model: Model
    deployment: Deployment
    times: KernelTimes
    precision: Precision
    parameters: EngineParameters
    sigma: dict[str, float | Array] = field(default_factory=dict)

    def products(self, shapes: list[Matrix], tokens: Array) -> dict[str, Array]:
        """Products of ``tokens`` a rank, shape (n,), by part of the breakdown; one call per precision. [s]"""
        parts: dict[str, Array] = {}
        spreads: dict[str, Array] = {}
        for quantised in (True, False):
            chosen = [shape for shape in shapes if shape.quantised == quantised]
            if not chosen:
                continue
            p = self.precision.dense if quantised else self.precision.plain
            n = np.array([shape.n for shape in chosen])[:, None]
            k = np.array([shape.k for shape in chosen])[:, None]
            features = gemm.features_of(
                np.broadcast_to(tokens, (len(chosen), tokens.size)).ravel(),
                np.broadcast_to(n, (len(chosen), tokens.size)).ravel(),
                np.broadcast_to(k, (len(chosen), tokens.size)).ravel(),
                weight_bytes=p.weight_bytes,
                activation_bytes=p.activation_bytes,
                compute_bits=p.compute_bits,
                quantise=float(p.quantises),
            )
            seconds, sigma = self.times.seconds(gemm.OPERATOR, features, dtype=p.dtype)
            rows = zip(chosen, seconds.reshape(len(chosen), -1), sigma.reshape(len(chosen), -1), strict=True)
            for shape, row, spread_of_row in rows:
                parts[shape.part] = parts.get(shape.part, np.zeros_like(row)) + shape.times * row
                spreads[shape.part] = np.maximum(spreads.get(shape.part, 0.0), spread_of_row)
        self.sigma |= spreads
        return parts

    def all_reduce(self, message_bytes: Array) -> Array:
        """Sum of one message over the tensor-parallel ranks. [s]

        Engines' own all-reduces write to their peers' memory and end at the node; over several it is NCCL's.
        """
        ranks = self.deployment.tp_size
        if ranks <= self.hardware.devices_per_node:
            features = allreduce.features_of(message_bytes, ranks)
            seconds, self.sigma["all_reduce"] = self.times.seconds(allreduce.OPERATOR, features)
        else:
            features = nccl.features_of("all_reduce", message_bytes, ranks)
            seconds, self.sigma["all_reduce"] = self.times.seconds(nccl.OPERATOR, features, operation="all_reduce")
        return seconds

    def elementwise(self, local: Array) -> Array:
        """Norms, rotary embedding, cache writes and activations of all layers, ``local`` tokens a rank. [s]"""
        m, a, tp = self.model, self.model.attention, self.deployment.tp_size
        if is_host(self.hardware):
            p = self.precision.plain
            glue = host_glue.layer_features(local, m.hidden, a.heads / tp, p.activation_bytes)
            seconds, self.sigma["elementwise"] = self.times.seconds(
                host_glue.HOST_GLUE, glue, part="layer", dtype=p.dtype
            )
            return m.layers * seconds
        # two residual-add-norms (read two, write two) and one rotary-plus-cache-write a layer; activation where dense
        norm = 2 * 4 * m.hidden * 2.0
        rotary = 2 * 2.0 * (a.heads / tp * a.head_dim + a.kv_elements_per_token)
        dense = 3 * 2.0 * (m.dense_inter_size / tp) if m.dense_layers else 0.0
        kernels = 3 * m.layers + m.dense_layers
        self.sigma["elementwise"] = UNFITTED_LOG_SIGMA
        return elementwise.seconds(
            kernels, local * (m.layers * (norm + rotary) + m.dense_layers * dense), self.hardware
        )

    def head(self, sequences: Array) -> Array:
        """Vocabulary projection of the sequences that sample, gathered from all ranks, and drawing their tokens. [s]"""
        d, m, p = self.deployment, self.model, self.precision.plain
        count = np.asarray(sequences, dtype=np.float64)
        local = np.maximum(np.ceil(count / (d.dp * d.pp)), 1.0)
        features = gemm.features_of(
            local, m.vocab / d.tp_size, m.hidden, weight_bytes=p.weight_bytes, activation_bytes=p.activation_bytes,
            compute_bits=p.compute_bits,
        )  # fmt: skip
        seconds, sigma = self.times.seconds(gemm.OPERATOR, features, dtype=p.dtype)
        self.sigma["head"] = float(sigma[0])  # grows with the vocabulary's shape, which all rows share
        seconds = seconds * self.parameters.kernel_slowdown + self._nucleus(local)
        if d.tp_size > 1:
            seconds = seconds + self._logits_gathered(local)
        if is_host(self.hardware):
            glue = host_glue.step_features(local, m.vocab / d.tp_size)
            seconds = seconds + self.times.seconds(host_glue.HOST_GLUE, glue, part="step", dtype=p.dtype)[0]
        return np.where(count > 0, seconds, 0.0)

    def _logits_gathered(self, sequences: Array) -> Array:
        """All-gather of the ranks' parts of the vocabulary, 16 bits, as vLLM, SGLang and TensorRT-LLM do. [s]"""
        message = sequences * self.model.vocab * 2.0
        piece = np.minimum(message, _LARGEST_GATHER_BYTES)
        features = nccl.features_of("all_gather", piece, self.deployment.tp_size)
        seconds, _ = self.times.seconds(nccl.OPERATOR, features, framework="nccl", operation="all_gather")
        return seconds * message / piece

    def _nucleus(self, sequences: Array) -> Array:
        """Sorting and summing the whole vocabulary of every sequence, where top-p or top-k sampling needs it. [s]"""
        p = self.parameters
        if not self.deployment.nucleus_sampling:
            return np.zeros_like(sequences)
        moved = sequences * self.model.vocab * p.nucleus_bytes_per_logit
        return np.asarray(p.nucleus_time + moved / self.hardware.device.memory_bandwidth)
