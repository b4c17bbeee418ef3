"""One phase alone on many devices: steps of prefill or decode at a stated batch, beside published wide-EP figures.

Model: a prefill step computes a stated number of prompt tokens on each device, a decode step one token of each running
request; throughput is tokens over the step's time, as if the other phase were free. Assumptions where the sources are
silent are part of each case and printed. Left out: speculative decoding, cache hits, traffic that varies over a day.
Rows: validate/serving/published_headline_points.csv and the SGLang team's report (May 2025).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from simmoe.engine.engine import Engine
from simmoe.engine.step import Batch, StepBreakdown
from simmoe.specs.deployment import Deployment, EngineOverrides
from simmoe.specs.hardware import Hardware
from simmoe.specs.load import load_hardware, load_model
from simmoe.specs.mechanisms import Exchange
from simmoe.specs.model import Model
from simmoe.specs.routing import Routing

Phase = Literal["prefill", "decode"]


def phase_step(
    hardware: Hardware, model: Model, deployment: Deployment, phase: Phase, *, per_device: int, context: int
) -> StepBreakdown:
    """One step of one phase.

    Parameters
    ----------
    per_device : prompt tokens (prefill) or requests (decode) on each data-parallel rank. [tokens], [requests]
    context : prompt length, or tokens in cache of a decoding request. [tokens]
    """
    engine = Engine(hardware, model, deployment)
    ranks = deployment.dp
    if phase == "decode":
        return engine.step(Batch(per_device * ranks, per_device * ranks * context), 0)
    prompts = max(1, round(per_device * ranks / context))
    return engine.step(Batch(prefill_chunks=((context, 0),) * prompts))


def tokens_per_s_per_device(
    hardware: Hardware, model: Model, deployment: Deployment, phase: Phase, *, per_device: int, context: int
) -> float:
    """Throughput of the phase; arguments as in `phase_step`. [tokens/s/device]"""
    step = phase_step(hardware, model, deployment, phase, per_device=per_device, context=context)
    tokens = per_device * deployment.dp
    if phase == "prefill":
        tokens = max(1, round(tokens / context)) * context
    return tokens / step.total_s / deployment.devices_per_replica


#: Of an engine whose kernels are SGLang's, as far as is known, and whose host is not: a step takes the device's time.
NO_HOST: dict[str, object] = {
    "host_time_per_step": 0.0,
    "engine_overrides": EngineOverrides(host_time_per_sequence=0.0),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A published figure of one phase, and what is assumed to predict it.

    ``own_engine``: it ran in DeepSeek's engine, of which no host time is known; its profile is of the device alone.
    """

    name: str
    hardware: str
    devices: int
    phase: Phase
    per_device: int
    context: int
    published_tokens_per_s_per_device: float
    routing: Routing
    assumed: str
    source: str
    model: str = "deepseek-v3"
    own_engine: bool = False

    def deployment(self) -> Deployment:
        """Attention data-parallel, experts over all devices, two half batches in turn."""
        n = self.devices
        layout = Deployment(
            gpus=n,
            tp=1,
            dp=n,
            ep=n,
            engine="sglang",
            weight_precision="fp8_block",
            max_num_batched_tokens=16384,
            routing=self.routing,
            exchange=Exchange(overlap="two_batch"),
        )
        return layout.vary(**NO_HOST) if self.own_engine else layout

    def predicted_tokens_per_s_per_device(self) -> float:
        """Throughput of the phase. [tokens/s/device]"""
        return tokens_per_s_per_device(
            load_hardware(self.hardware),
            load_model(self.model),
            self.deployment(),
            self.phase,
            per_device=self.per_device,
            context=self.context,
        )


#: Popularity that makes DeepSeek-R1's ranks as uneven as TensorRT-LLM's EPLB example counted, means over layers and
#: steps (NVIDIA/TensorRT-LLM, examples/wide_ep/ep_load_balancer/README.md). The busiest of 32 ranks of 8 experts
#: gets 2.564 times the mean: the exponent. The busiest of 36 that EPLB gave 288 slots by counts of the same data
#: gets 1.115 times: the drift. That 32 ranks scatter by 0.48 of their mean was not used; here they do by 0.46.
R1_FAVOURITES = Routing(popularity="zipf", exponent=0.7, orders=8)
#: The same after EPLB placed them with copies.
R1_BALANCED = R1_FAVOURITES.vary(placement="eplb", redundant_experts=32, drift=0.06)
_REPORT = "SGLang team, large-scale EP on 96 H100, May 2025"
_PROFILE = "deepseek-ai/profile-data, through the SGLang team's report and alibaba/InferSim"
_FAVOURITES = (
    "experts Zipf with exponent 0.7, 6 % of it moved since EPLB placed 32 copies: ranks as uneven as TensorRT-LLM's "
    "EPLB example counted for DeepSeek-R1, for the report does not tell"
)

CASES = (
    Case(
        name="SGLang EP32 prefill, 1k prompts", hardware="h100", devices=32, phase="prefill", per_device=16384,
        context=1024, published_tokens_per_s_per_device=57674 / 8, routing=R1_BALANCED, source=_REPORT,
        assumed=_FAVOURITES,
    ),
    Case(
        name="SGLang EP32 prefill, 2k prompts", hardware="h100", devices=32, phase="prefill", per_device=16384,
        context=2048, published_tokens_per_s_per_device=54543 / 8, routing=R1_BALANCED, source=_REPORT,
        assumed=_FAVOURITES,
    ),
    Case(
        name="SGLang EP32 prefill, 4k prompts, simulated perfect EPLB", hardware="h100", devices=32, phase="prefill",
        per_device=16384, context=4096, published_tokens_per_s_per_device=59337 / 8,
        routing=Routing(popularity="balanced"), source=_REPORT,
        assumed="experts drawn at random, as the report simulated: even over half a million tokens, not held to groups",
    ),
    Case(
        name="SGLang EP72 decode", hardware="h100", devices=72, phase="decode", per_device=256, context=2000,
        published_tokens_per_s_per_device=22282 / 8, routing=R1_BALANCED, assumed=_FAVOURITES, source=_REPORT,
    ),
    Case(
        name="DeepSeek profile EP32 prefill", hardware="h800", devices=32, phase="prefill", per_device=16384,
        context=4096, published_tokens_per_s_per_device=7839, own_engine=True, routing=Routing(popularity="balanced"),
        assumed="routing forced even, as the profile did; no time of the host, which is not in it", source=_PROFILE,
    ),
    Case(
        name="DeepSeek profile EP128 decode", hardware="h800", devices=128, phase="decode", per_device=128,
        context=4096, published_tokens_per_s_per_device=2324, own_engine=True, routing=Routing(popularity="balanced"),
        assumed="routing forced even, as the profile did; no time of the host, which is not in it", source=_PROFILE,
    ),
    Case(
        name="DeepSeek service EP144 decode", hardware="h800", devices=144, phase="decode", per_device=88,
        context=4989, published_tokens_per_s_per_device=14800 / 8, own_engine=True, routing=R1_BALANCED,
        assumed="88 requests a device: 1850 tokens/s at the 20 to 22 tokens/s a user gets; "
        "no time of the host, unknown of that engine; " + _FAVOURITES,
        source="deepseek-ai/open-infra-index, day 6",
    ),
)  # fmt: skip
