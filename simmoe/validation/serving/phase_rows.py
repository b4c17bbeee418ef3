"""Rows that measured one phase alone, prefill or decode, predicted as steps of that phase.

The other phase is taken to be free, as such sources do. Where a row is silent: prefill steps hold 16384 prompt tokens a
device (the wide-EP reports' chunk, else the engine's limit), experts over several nodes exchange under a second half
batch (`two_batch`), a pool that the devices do not divide is filled up with copies of popular experts (notes may tell
of others, or of routing forced even), DeepSeek's own engine is timed with SGLang's kernels of today. Left out: rows
without a batch size, or that mix in cache hits.
"""

from __future__ import annotations

import math
import re

from simmoe.engine.step import StepBreakdown
from simmoe.errors import SimmoeError
from simmoe.output_analysis import log_normal_interval
from simmoe.specs.deployment import Deployment
from simmoe.specs.hardware import Hardware
from simmoe.specs.mechanisms import Exchange
from simmoe.specs.model import Model
from simmoe.specs.routing import Routing
from simmoe.validation.cells import Row, Unspoken, number, reason, text
from simmoe.validation.serving.phases import NO_HOST, R1_BALANCED, phase_step
from simmoe.validation.serving.rows import described_parts, speculating, speculation_of
from simmoe.validation.summary import Comparison, Outcome

#: What engines and layouts add to the kernels' spread here; as for rates of whole runs. [-]
_UNSEEN = 0.22
_CHUNK = 16384


def is_phase_row(row: Row) -> bool:
    """Whether a row measured prefill or decode alone."""
    return text(row, "phase") in ("prefill", "decode")


def compare_row(row: Row, file: str, line: int, group: str, outcome: Outcome) -> None:
    """Add a row's figure, or the reason why it is not predicted."""
    try:
        quantity, measured, predicted, sigma = _predict(row)
    except (Unspoken, SimmoeError) as problem:
        outcome.skip(reason(problem), row=text(row, "source_id"))
        return
    band = log_normal_interval(predicted, math.hypot(sigma, _UNSEEN))
    outcome.comparisons.append(
        Comparison(group, file, line, text(row, "source_id"), quantity, measured, predicted, *band)
    )


def _predict(row: Row) -> tuple[str, float, float, float]:
    """(quantity, measured, predicted, log spread) of a row; rates over all its devices. [tokens/s]"""
    drafts = speculation_of(row)
    hardware, model, deployment = described_parts(row, engine=_engine(row))
    deployment = speculating(deployment, drafts).vary(routing=_routing(row, model, deployment))
    if text(row, "engine") != deployment.engine:  # neither a release nor the host's time is another engine's
        deployment = deployment.vary(engine_version=None, **NO_HOST)
    context = number(row, "input_tokens")
    if not context:
        raise Unspoken("one phase measured, at a context that is not said")
    quantity = "input_tokens_per_s" if text(row, "phase") == "prefill" else "output_tokens_per_s"
    measured = number(row, quantity) or (number(row, f"{quantity}_per_gpu") or 0.0) * deployment.gpus
    if not measured:
        raise Unspoken("one phase measured, without a rate")
    if deployment.ep > hardware.devices_per_node:
        deployment = deployment.vary(exchange=Exchange(overlap="two_batch"))
    if quantity == "input_tokens_per_s":
        deployment = deployment.vary(max_num_batched_tokens=max(_CHUNK, deployment.max_num_batched_tokens))
        per_rank = _CHUNK if deployment.ep > 1 else deployment.max_num_batched_tokens
        step = phase_step(hardware, model, deployment, "prefill", per_device=per_rank, context=round(context))
        prompts = max(1, round(per_rank * deployment.dp / round(context)))
        rate = prompts * round(context) / step.total_s
    else:
        rate, step = _decode(row, deployment, hardware, model, round(context))
    return quantity, measured, rate * deployment.replicas, step.log_sigma


def _decode(
    row: Row, deployment: Deployment, hardware: Hardware, model: Model, context: int
) -> tuple[float, StepBreakdown]:
    """Output tokens a second of one engine at the row's batch, and the step. [tokens/s]"""
    batch = number(row, "batch_per_gpu")
    if not batch:
        raise Unspoken("decode alone measured, at a batch that is not said")
    per_rank = max(1, round(batch * deployment.tp_size))
    output = number(row, "output_tokens") or 0.0
    step = phase_step(hardware, model, deployment, "decode", per_device=per_rank, context=round(context + output / 2))
    return per_rank * deployment.dp * float(deployment.tokens_per_decode) / step.total_s, step


def _routing(row: Row, model: Model, deployment: Deployment) -> Routing:
    """What the row's notes tell of routing: forced even, or copies of experts; else the deployment's own.

    Copies that balance DeepSeek-V3 and R1 balance experts as uneven as were counted; others only fill the ranks.
    """
    notes, pool = text(row, "notes"), model.experts.num_experts if model.experts else 0
    if pool and "forced balanced" in notes:
        return Routing(popularity="balanced")
    told = re.search(r"(\d+) redundant experts", notes)
    copies = int(told.group(1)) if told else -pool % deployment.ep
    if not pool or not copies or (pool + copies) % deployment.ep:
        return deployment.routing
    uneven = told is not None and model.name == "DeepSeek-V3"
    return R1_BALANCED.vary(redundant_experts=copies) if uneven else Routing(placement="eplb", redundant_experts=copies)


def _engine(row: Row) -> str:
    return "sglang" if text(row, "engine") == "deepseek internal" else text(row, "engine")
