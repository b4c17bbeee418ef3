"""Pipeline stages: which layers each holds, what a step waits for when they are unequal or not filled, the hand-over.

Model: a step's batch is cut into ``b`` equal micro-batches that pass ``p`` stages one behind another: one for each
request, or in steps that compute prompts each prompt's chunk or each full batch of tokens, at most as many as stages. A
continuous step has a budget of tokens for every stage, as its batches are scheduled one by one: so successive prompts
fill the stages. A prompt of one batch alone runs through all stages as through one device, and gains nothing.

- *continuous*: steps follow each other without draining, as the batches of vLLM's queue do (``step_with_batch_queue``
  of ``vllm/v1/engine/core.py``: as many in flight as stages) and those of SGLang's ring. A micro-batch returns to the
  first stage when it leaves the last: a step takes ``max(sum_i s_i, b max_i s_i)`` of the stages' times s_i. Equal
  stages leave no bubble once they are filled; with fewer micro-batches they idle (p - b) / p of the time.
- *drained*: every step starts and ends with empty stages: ``sum_i s_i + (b - 1) max_i s_i`` (flow shop), which with
  equal stages is GPipe's ``(b + p - 1) / b`` of a step without bubble (Huang et al., arXiv 1811.06965, sec. 2.3).

The first is the default. Nine published maximum-load runs on four stages (validate/serving, TensorRT-LLM's Qwen3-235B
on RTX PRO 6000) are met within 9 % on average with it, within 44 % (all too low) if every step drains.

Stages are cut as vLLM cuts them. Between stages go the hidden state and the residual of each token (vLLM's
``IntermediateTensors``), each tensor-parallel rank sending its share, over the network where the next stage is in
another node: alpha-beta as in `collectives`. Left out: sampled tokens on their way back, micro-batches of unequal size
(vLLM's queue does not even them out), how stages fill and drain around a prompt of some batches alone, dense layers
elsewhere than in front. Checked in: tests/test_pipeline.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simmoe.errors import CoverageError
from simmoe.specs.deployment import Deployment
from simmoe.specs.hardware import Hardware
from simmoe.specs.model import Model

Array = NDArray[np.float64]

_IN_EVERY_LAYER = ("attention", "projections", "elementwise", "all_reduce")
_IN_MOE_LAYERS = ("router", "dispatch", "expert_fetch", "routed_experts", "shared_experts", "combine")
#: Numbers a token hands over, per hidden unit: the hidden state and the residual, in 16 bit.
_HANDED_OVER_BYTES = 2 * 2.0


@dataclass(frozen=True, slots=True)
class Stage:
    """Layers of one stage, and whether it looks tokens up or draws them."""

    dense_layers: int
    moe_layers: int
    embeds: bool
    samples: bool

    @property
    def layers(self) -> int:
        """All its layers."""
        return self.dense_layers + self.moe_layers


def stages(model: Model, count: int) -> tuple[Stage, ...]:
    """Cut a model into stages as vLLM does (``get_pp_indices``): layers that do not divide go to the last but one.

    And to those before it, one each: the last has the head. Layers with a plain FFN come first.
    """
    each, over = divmod(model.layers, count)
    sizes = [each + (count - 1 - over <= i < count - 1) for i in range(count)]
    cut, start = [], 0
    for i, size in enumerate(sizes):
        dense = max(0, min(model.dense_layers, start + size) - start)
        cut.append(Stage(dense, size - dense, i == 0, i == count - 1))
        start += size
    return tuple(cut)


def hand_over_s(model: Model, deployment: Deployment, hardware: Hardware, tokens: Array) -> Array:
    """Time each stage waits for the activations of a micro-batch, shape (stages, n); the first: 0. [s]

    Parameters
    ----------
    tokens : of the micro-batch on one data-parallel rank, shape (n,). [tokens]

    Raises
    ------
    CoverageError
        If stages are in different nodes and the hardware describes no network between nodes.
    """
    d = deployment
    held = d.tp_size * d.dp
    message = np.asarray(tokens, dtype=np.float64) * model.hidden * _HANDED_OVER_BYTES / d.tp_size
    waits = [np.zeros_like(message)]
    for stage in range(1, d.pp):
        link = hardware.scale_up
        if (stage * held) // hardware.devices_per_node != (stage * held - 1) // hardware.devices_per_node:
            if hardware.scale_out is None:
                raise CoverageError(
                    f"{hardware.name}: pipeline stages lie in different nodes but the hardware has no scale_out link; "
                    f"keep them to {hardware.devices_per_node} devices or describe scale_out"
                )
            link = hardware.scale_out
        waits.append(link.latency + message / link.bandwidth)
    return np.stack(waits)


def stage_times(parts: Mapping[str, Array], model: Model, count: int) -> Array:
    """Time of each stage on one micro-batch, shape (stages, n), from parts over all layers. [s]

    The host's time is no stage's.
    """
    held = stages(model, count)
    total = np.zeros((count, np.size(next(iter(parts.values())))))
    for i, stage in enumerate(held):
        shares = dict.fromkeys(_IN_EVERY_LAYER, stage.layers / model.layers)
        shares |= dict.fromkeys(_IN_MOE_LAYERS, stage.moe_layers / max(model.moe_layers, 1))
        shares |= {"dense_ffn": stage.dense_layers / max(model.dense_layers, 1), "head": float(stage.samples)}
        for name, seconds in parts.items():
            if name != "host":
                total[i] += shares[name] * seconds
    return total


def step_s(stage_s: Array, micro_batches: Array | float, *, drained: bool = False) -> Array:
    """Time of a step in equal micro-batches, more of which than stages are in flight only if it drains. [s]

    ``stage_s``: time of each stage on one micro-batch, shape (stages, n).
    """
    through, fullest = stage_s.sum(axis=0), stage_s.max(axis=0)
    if drained:
        return np.asarray(through + (micro_batches - 1) * fullest)
    return np.asarray(np.maximum(through, np.minimum(micro_batches, len(stage_s)) * fullest))


def prompt_share(micro_batches: Array, count: int, *, drained: bool = False) -> Array:
    """Share that shows of what prompts in equal micro-batches cost all layers, one after another, at equal stages. [-]

    ``micro_batches``: 1 to ``count``, shape (n,).
    """
    even = np.full((count, len(micro_batches)), 1.0 / count)
    return step_s(even, micro_batches, drained=drained) / micro_batches
