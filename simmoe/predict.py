"""The answer for one deployment under one workload: metrics, what bounds them, memory, breakdown, and how sure.

Puts the engine's step table into the closed-form steady state (`simmoe.steady.state`). The interval comes from the
residual spread of the kernel fits, part by part, weighted by each part's share of the mean step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import numpy as np

from simmoe.costs.device_fit import footprint
from simmoe.costs.memory import MemoryFootprint
from simmoe.engine.engine import Engine
from simmoe.engine.step import Batch, StepBreakdown, StepTable
from simmoe.engine.tabulate import step_table
from simmoe.errors import SaturationError, SpecError
from simmoe.metrics import Quantiles, ServingMetrics
from simmoe.output_analysis import log_normal_interval
from simmoe.provenance import Provenance, stamp
from simmoe.routing.imbalance import BusiestRank, busiest_of
from simmoe.specs.cluster import POLICY_OF_ENGINE
from simmoe.specs.deployment import Deployment
from simmoe.specs.engines import EngineParameters, release_note
from simmoe.specs.hardware import Hardware
from simmoe.specs.load import calibration_of
from simmoe.specs.model import Model
from simmoe.specs.workload import Lengths, Workload
from simmoe.steady.front_end import delayed
from simmoe.steady.load_curve import Curve, load_curve, saturation_requests_per_s
from simmoe.steady.prefill_first import prompts_first
from simmoe.steady.state import steady_state

#: Share of saturation from which the closed form's tail of TTFT is too low where prompts go first. DeepSeek-V2-Lite on
#: an H100 under SGLang, 8000 input and 64 output tokens, p99 without the front end and as simulated: 1.0 and 1.1 s at
#: 70 % of saturation, 1.3 and 1.5 s at 80 %, 1.7 and 1.9 s at 85 %, 2.2 and 3.6 s at 90 %. [-]
QUEUED_FROM = 0.85

#: FLOP a Hopper tile of 64 rows works off for every 16-bit number it reads: its matrix instructions take no fewer rows
#: (wgmma, PTX ISA 9.7.15), nor does FlashAttention 3, however few tokens decode (hopper/tile_size.h). [FLOP/B]
SMALLEST_TILE_FLOP_PER_BYTE = 64.0


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What was predicted, from what, and how sure it is.

    Attributes
    ----------
    metrics : None if the offered rate saturates the deployment.
    bound : what limits throughput: the load offered, a limit of the engine or memory, and the largest step part.
    breakdown : the mean step, part by part. [s]
    saturation_output_tokens_per_s : highest output rate over all replicas, at any load. [tokens/s]
    throughput_90 : 90 % interval of the output rate. [tokens/s]
    notes : substitutions, borrowed calibrations, extrapolation.
    """

    hardware: Hardware
    model: Model
    deployment: Deployment
    workload: Workload
    metrics: ServingMetrics | None
    bound: str
    memory: MemoryFootprint
    breakdown: StepBreakdown
    saturation_output_tokens_per_s: float
    throughput_90: tuple[float, float]
    active_experts: int
    engine_parameters: EngineParameters
    notes: tuple[str, ...]

    @property
    def log_sigma(self) -> float:
        """Spread of ln(measured / predicted) of the mean step. [-]"""
        return self.breakdown.log_sigma

    @property
    def memory_used_bytes(self) -> float:
        """Per device: weights, workspace and the KV cache that running requests fill. [B]"""
        share = self.metrics.kv_utilisation if self.metrics else 1.0
        return self.memory.weights + self.memory.workspace + share * self.memory.kv_bytes

    @cached_property
    def busiest_rank(self) -> BusiestRank | None:
        """Pairs of the busiest expert-parallel rank over the mean rank's, in a decode step; None without such ranks."""
        moe = engine_of(self.hardware, self.model, self.deployment).moe
        d, m = self.deployment, self.metrics
        if moe is None or d.ep == 1 or m is None:
            return None
        requests = m.mean_running / d.replicas / (1 if moe.exchanges_tokens else d.dp)
        return busiest_of(moe.kinds, max(1.0, requests * d.rows_per_decode))

    @cached_property
    def provenance(self) -> Provenance:
        """Version and digests of what made this prediction."""
        return stamp(
            {
                "hardware": self.hardware,
                "model": self.model,
                "deployment": self.deployment,
                "workload": self.workload,
            },
            calibration=calibration_of(self.hardware),
        )


@dataclass(frozen=True)
class Compiled:
    """Everything about a deployment that does not depend on the load."""

    engine: Engine
    table: StepTable
    memory: MemoryFootprint
    _curves: dict[tuple[Lengths, Lengths], Curve] = field(default_factory=dict, repr=False, compare=False)

    def curve(self, workload: Workload) -> Curve:
        """Throughput against requests held; of open loops one curve is kept per lengths, whatever their rate."""
        lengths = workload.input, workload.output
        curve = self._curves.get(lengths) if workload.open_loop else None
        if curve is None:
            curve = load_curve(self.table, self.engine.deployment, workload, self.memory.kv_tokens)
            if workload.open_loop:
                self._curves.clear()
                self._curves[lengths] = curve
        return curve


@lru_cache(maxsize=128)  # a table takes up to some MB
def compiled(hardware: Hardware, model: Model, deployment: Deployment, mean_context: float, prompt: float) -> Compiled:
    """Engine, step table and memory of a deployment; kept, so that another load costs only the steady state."""
    memory = footprint(model, deployment, hardware, context_tokens=mean_context)
    engine = engine_of(hardware, model, deployment)
    return Compiled(engine, step_table(engine, mean_context=mean_context, prompt_tokens=prompt), memory)


@lru_cache(maxsize=512)
def engine_of(hardware: Hardware, model: Model, deployment: Deployment) -> Engine:
    """The engine of a deployment; kept."""
    return Engine(hardware, model, deployment)


def compiled_for(hardware: Hardware, model: Model, deployment: Deployment, workload: Workload) -> Compiled:
    """As `compiled`, with the step table linearised around the workload's mean context and prompt."""
    i, o = workload.input.mean, workload.output.mean
    return compiled(hardware, model, deployment, i + o / 2, i)


def predict(hardware: Hardware, model: Model, deployment: Deployment, workload: Workload) -> Prediction:
    """Predict the steady state of a deployment under a workload.

    Raises
    ------
    CapacityError
        If weights, or one request's KV cache, do not fit.
    SpecError
        If the specs contradict each other.
    """
    longest = workload.input.mean + workload.output.mean
    if model.max_context is not None and longest > model.max_context:
        raise SpecError(
            f"{longest:.7g} tokens (input and output) exceed the {model.max_context} tokens of context {model.name} has"
        )
    parts = compiled_for(hardware, model, deployment, workload)
    curve = parts.curve(workload)
    saturation = saturation_requests_per_s(curve) * deployment.replicas * workload.output.mean
    metrics: ServingMetrics | None
    try:
        parameters = parts.engine.parameters
        metrics, bound = steady_state(curve, deployment, workload, parts.memory.kv_tokens, parameters)
        metrics = delayed(metrics, parameters, workload.input.mean, deployment.replicas)
        if workload.output.mean == 1:  # a gap takes two tokens
            nothing = Quantiles.of(np.empty(0))
            metrics = replace(metrics, tpot=nothing, itl=nothing)
    except SaturationError:
        metrics, bound = None, f"saturated ({curve.limit})"
    breakdown = mean_step(parts.table, curve, metrics, deployment, workload)
    if bound != "offered rate":
        largest, seconds = max(breakdown.parts.items(), key=lambda part: part[1])
        bound = f"{bound}; {largest.replace('_', ' ')} {100 * seconds / breakdown.total_s:.0f} % of step"
    low, high = log_normal_interval(saturation, breakdown.log_sigma)
    if metrics is not None:
        rate = metrics.output_tokens_per_s
        if workload.concurrency is not None:
            low, high = log_normal_interval(rate, breakdown.log_sigma)
        else:  # below saturation an open loop delivers what is offered, unless the true capacity is lower still
            low, high = min(rate, low), rate
    return Prediction(
        hardware=hardware,
        model=model,
        deployment=deployment,
        workload=workload,
        metrics=metrics,
        bound=bound,
        memory=parts.memory,
        breakdown=breakdown,
        saturation_output_tokens_per_s=saturation,
        throughput_90=(low, high),
        active_experts=parts.engine.top_k,
        engine_parameters=parts.engine.parameters,
        notes=(
            *_told(deployment, hardware),
            *_arrivals_told(workload),
            *(_queued_prompts(metrics, deployment, workload, saturation) if metrics else ()),
            *parts.engine.times.notes,
        ),
    )


def _told(deployment: Deployment, hardware: Hardware) -> tuple[str, ...]:
    """What the deployment says and the closed form does not know, or knows only of other releases."""
    release = release_note(deployment, hardware.device.name)
    offload = "kv_offload changes nothing here: prompts found again and preemptions are what `simmoe simulate` knows"
    return (
        *((offload,) if deployment.kv_offload is not None else ()),
        *((release,) if release else ()),
        *_matrix_units_told(hardware),
    )


def _matrix_units_told(hardware: Hardware) -> tuple[str, ...]:
    """A note for a Hopper whose matrix units are slower than its memory even on tiles of few tokens."""
    device = hardware.device
    ridge = device.flop_per_s("bfloat16") / device.memory_bandwidth
    if device.architecture != "Hopper" or ridge >= SMALLEST_TILE_FLOP_PER_BYTE:
        return ()
    note = (
        f"{device.name}: its matrix units do {ridge:.0f} FLOP in the time of a byte read (bf16), fewer than the "
        f"{SMALLEST_TILE_FLOP_PER_BYTE:.0f} of the smallest tile, padded rows included: decoding over more than a few "
        "requests is bound by them, not by its memory bandwidth"
    )
    return (note,)


def _arrivals_told(workload: Workload) -> tuple[str, ...]:
    """What a workload says of its traffic and the closed form does not know."""
    found = []
    if workload.open_loop and workload.arrivals.kind != "poisson":
        found.append(f"arrivals {workload.arrivals.kind}: taken as Poisson at their mean rate here")
    if workload.prompts is not None:
        found.append("prompts that repeat or share heads: each is taken to be computed whole here")
    if workload.trace is not None:
        found.append("trace: taken as Poisson with the lengths given here")
    return tuple(f"{what}; `simmoe simulate` plays them as they are" for what in found)


def _queued_prompts(
    metrics: ServingMetrics, deployment: Deployment, workload: Workload, saturation_tokens_per_s: float
) -> tuple[str, ...]:
    """A note where prompts that go first queue behind each other more than the closed form knows."""
    first = prompts_first(POLICY_OF_ENGINE[deployment.engine])
    if not first or workload.rate is None or metrics.output_tokens_per_s < QUEUED_FROM * saturation_tokens_per_s:
        return ()
    note = (
        f"{deployment.engine} computes prompts before it decodes: where they take most of the time, TTFT p99 of this "
        "closed form is up to 40 % too low near 90 % of saturation; `simmoe simulate` plays their queue"
    )
    return (note,)


def predict_caps(
    hardware: Hardware, model: Model, deployment: Deployment, workload: Workload, caps: Sequence[int]
) -> list[Prediction]:
    """One prediction per cap on active experts, everything else equal.

    Raises
    ------
    SaturationError
        If the offered rate saturates the deployment at every cap.
    """
    if model.experts is None and any(caps):
        raise SpecError(f"{model.name} is dense: it has no active experts to cap; leave --active-experts out")
    varied = [deployment.vary(active_experts=cap) if model.experts else deployment for cap in caps]
    results = [predict(hardware, model, one, workload) for one in varied]
    if results and all(result.metrics is None for result in results):
        most = [result.saturation_output_tokens_per_s / workload.output.mean for result in results]
        by_cap = ", ".join(f"{best:.4g} with {cap}" for best, cap in zip(most, caps, strict=True))
        raise SaturationError(
            f"--rate {workload.rate:g}: the deployment saturates at {most[0]:.4g} requests/s"
            + (f" ({by_cap} active experts)" if len(most) > 1 else "")
            + "; lower --rate, or raise --gpus"
        )
    return results


def of_newest_version(p: Prediction) -> Prediction | None:
    """The same prediction with the newest known version of the engine; None: that is what it was made with."""
    if p.deployment.engine_version is None:
        return None
    return predict(p.hardware, p.model, p.deployment.vary(engine_version=None), p.workload)


def default_caps(model: Model, pool: int | None = None) -> tuple[int, ...]:
    """The native top-k, or all of a smaller ``pool``, and about three quarters, a half and a quarter of it."""
    if model.experts is None:
        return (0,)
    k = min(model.experts.top_k, pool or model.experts.top_k)
    return tuple(sorted({k, max(1, int(0.75 * k)), max(1, k // 2), max(1, round(k / 4))}, reverse=True))


def with_native(caps: Sequence[int], model: Model, deployment: Deployment) -> tuple[int, ...]:
    """The caps, after the native top-k that gains are told over, unless it is among them or the pool is too small."""
    if model.experts is None or model.experts.top_k in caps:
        return tuple(caps)
    pool = deployment.total_experts or model.experts.num_experts
    return (model.experts.top_k, *caps) if model.experts.top_k <= pool else tuple(caps)


def mean_step(
    table: StepTable, curve: Curve, metrics: ServingMetrics | None, deployment: Deployment, workload: Workload
) -> StepBreakdown:
    """Breakdown of the mean step: decode steps and steps with a prompt chunk, in their proportion."""
    running = metrics.mean_running / deployment.replicas if metrics else float(curve.in_flight[-1])
    at = float(np.clip(running, curve.in_flight[0], curve.in_flight[-1]))
    decoding, beside, chunk, share = (
        float(np.interp(at, curve.in_flight, column))
        for column in (curve.decoding, curve.beside, curve.chunk, curve.mixed_share)
    )
    mean_context = workload.input.mean + workload.output.mean / 2
    prompts = max(1, round(chunk / workload.input.mean))
    running = round(beside) if workload.output.mean > 1 else 0
    room = table.max_tokens - running * table.rows_per_decode
    each = max(1, min(round(chunk / prompts), room // prompts))
    mixed = table.breakdown(Batch(running, round(running * mean_context), ((each, 0),) * prompts), prompts)
    if workload.output.mean <= 1:
        return mixed
    decoding_now = max(1, round(decoding))
    return table.breakdown(Batch(decoding_now, round(decoding_now * mean_context))).mixed_with(mixed, share)
