"""What drafting tokens costs: the drafter's shapes and layout, and the time of its passes in a step.

Model (vLLM's proposer, ``vllm/v1/spec_decode``; SGLang's EAGLE worker alike): the drafter first passes over all tokens
of the step, verified rows and prompts, to write its own KV cache, and drafts one token of each request; every further
draft is a pass over one token of each. A pass is the drafter's layers, attention over the request's context and a
head. A multi-token-prediction layer is one more layer of the model, after a projection of embedding and hidden state
together (2 h to h, arXiv 2412.19437, sec. 2.2; vLLM keeps it whole and in 16 bit on every rank), with the model's own
embedding and head; a draft model brings everything of its own and is cut by the same tp. Looking up n-grams is free.
Left out: host time between passes, heads of prompts that end in the step, verifying with a sampler of its own, slots
of drafts not yet accepted. Checked in: tests/test_speculation.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from simmoe.costs.attention_layers import AttentionLayers
from simmoe.costs.operators import gemm
from simmoe.costs.precision import Precision
from simmoe.costs.timing import KernelTimes
from simmoe.errors import SpecError
from simmoe.specs.deployment import Deployment
from simmoe.specs.load import load_model
from simmoe.specs.mechanisms import Dispatch, Exchange
from simmoe.specs.model import Model
from simmoe.specs.routing import Routing

Array = NDArray[np.float64]


def drafter(model: Model, deployment: Deployment) -> tuple[Model, Deployment] | None:
    """Shapes and layout of what drafts; None: nothing on the device does.

    Raises
    ------
    SpecError
        If the model has no multi-token-prediction layer, or the draft model is not known.
    """
    chosen = deployment.speculative
    if chosen is None or chosen.method == "ngram":
        return None
    plain = {
        "speculative": None, "exchange": deployment.exchange.vary(overlap="none"), "offload": None,
        "nucleus_sampling": False,
    }  # fmt: skip
    if chosen.method == "mtp":
        if not model.mtp_layers:
            raise SpecError(
                f"speculative.method mtp: {model.name} has no multi-token-prediction layer; use ngram, or draft with a "
                "draft_model"
            )
        # what is told layer by layer says nothing of this one
        r = deployment.routing
        if r.counts_file is not None:
            r = r.vary(popularity="uniform", counts_file=None)
        return _mtp_layer(model), deployment.vary(**plain, routing=r.vary(top_k_per_layer=None))
    assert chosen.draft_model is not None
    try:
        small = load_model(chosen.draft_model)
    except SpecError as problem:
        raise SpecError(f"speculative.draft_model: {problem}") from None
    own = {
        "ep": 1, "expert_slices": 1, "active_experts": None, "total_experts": None, "routing": Routing(),
        "exchange": Exchange(), "dispatch": Dispatch(), "weight_precision": None, "activation_precision": None,
        "wide_attention": False,
    }  # fmt: skip
    return small, deployment.vary(**{**plain, **own})


def _mtp_layer(model: Model) -> Model:
    """The prediction layer as a model of one layer, like the last ones of its model."""
    windowed = {"sliding_window": None, "windowed_layers": 0}
    moe = bool(model.moe_layers)
    return model.vary(
        name=f"{model.name} MTP layer",
        layers=1,
        moe_layers=int(moe),
        dense_inter_size=0 if moe else model.dense_inter_size,
        attention=model.attention.vary(**windowed),
        mtp_layers=0,
    )


def projection_parameters(model: Model, deployment: Deployment) -> int:
    """Parameters of a prediction layer beside the layer: projection and the norms of what it joins. [parameters]"""
    chosen = deployment.speculative
    return 2 * model.hidden * (model.hidden + 1) if chosen is not None and chosen.method == "mtp" else 0


class Stack(Protocol):
    """What is needed of the drafter's engine."""

    model: Model
    deployment: Deployment
    times: KernelTimes
    precision: Precision
    sigma: dict[str, float | Array]

    @property
    def attention(self) -> AttentionLayers:
        """Its attention layers."""

    def token_parts(self, tokens: Array) -> dict[str, Array]:
        """As `simmoe.engine.engine.Engine.token_parts`. [s]"""

    def head(self, sequences: Array) -> Array:
        """As `simmoe.engine.engine.Engine.head`. [s]"""

    def prefill_attention(self, new: Array, cached: Array) -> Array:
        """As `simmoe.engine.engine.Engine.prefill_attention`. [s]"""


@dataclass
class Drafts:
    """Times of a drafter beside the model it drafts for.

    Parameters
    ----------
    stack : the drafter's engine.
    drafts : drafts a step, a request. [tokens]
    projects : whether embedding and hidden state are joined before the layers (MTP).
    slowdown : factor on kernels that `stack` does not know of.
    """

    stack: Stack
    drafts: int
    projects: bool
    slowdown: float

    def tokens_s(self, tokens: Array) -> Array:
        """Layers of one pass over ``tokens`` of the replica, attention apart. [s]"""
        parts = self.stack.token_parts(tokens)
        seconds = sum((value for name, value in parts.items() if name != "host"), np.zeros(np.shape(tokens)))
        if not self.projects:
            return np.asarray(seconds)
        m, p = self.stack.model, self.stack.precision.plain
        local = np.maximum(np.ceil(tokens / self.stack.deployment.dp), 1.0)
        features = gemm.features_of(
            local, m.hidden, 2.0 * m.hidden, weight_bytes=p.weight_bytes, activation_bytes=p.activation_bytes,
            compute_bits=p.compute_bits,
        )  # fmt: skip
        return np.asarray(seconds + self.slowdown * self.stack.times.seconds(gemm.OPERATOR, features, dtype=p.dtype)[0])

    def requests_s(self, requests: Array) -> Array:
        """Heads of all passes, and the layers of those after the first, attention apart. [s]"""
        return self.drafts * self.stack.head(requests) + (self.drafts - 1) * self.tokens_s(requests)

    def attention_s(self, requests: Array, context: Array) -> Array:
        """Attention of all passes: the first with the verified rows, the others with one row a request. [s]"""
        layers = self.stack.attention
        first = replace(layers, queries=self.drafts + 1).mixed(requests, context)
        return self.slowdown * (first + (self.drafts - 1) * layers.decode(requests, context))

    def prompt_attention_s(self, new: Array, cached: Array) -> Array:
        """Attention of the first pass over a prompt chunk, on the rank that has it. [s]"""
        return self.stack.prefill_attention(new, cached)

    @property
    def sigma(self) -> float:
        """Log spread: that of the worst fitted part. [-]"""
        fitted = {
            name: float(np.max(value))
            for name, value in self.stack.sigma.items()
            if name not in ("host", "elementwise")
        }
        return max(fitted.values(), default=0.5)
