"""Claims with a second in them: gains of capping, wide expert parallelism, exchanges, and systems of before 2023.

Historic systems are described as far as their papers do; what they leave open is assumed and said under ``inputs``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, partial

import numpy as np

from simmoe.costs.exchange import exchange_s
from simmoe.costs.memory import weights_per_device_bytes
from simmoe.costs.operators import alltoall
from simmoe.costs.timing import kernel_times
from simmoe.engine.engine import Engine
from simmoe.engine.step import Batch
from simmoe.predict import predict
from simmoe.specs.deployment import Deployment
from simmoe.specs.load import load_hardware, load_model
from simmoe.specs.variants import dense_equivalent
from simmoe.specs.workload import Lengths, Workload
from simmoe.validation.claims import Claim
from simmoe.validation.phases import CASES

_DEEPSPEED = "DeepSpeed-MoE, arXiv 2201.05596"
_HUANG = "Towards MoE Deployment, arXiv 2303.06182"
_YANG = "Faster MoE LLM Inference, arXiv 2505.03531"
_REPORT = "SGLang team, May 2025"
_TEPID = "host time and kernel launches of that software are not modelled"


# ---- capping and pruning, measured in serving -----------------------------------------------------------------------

_SETTINGS = {
    "deepseek-v2-lite": ("a800-pcie", Deployment(gpus=2, tp=2, engine="sglang", engine_version="0.4.4.post1")),
    "deepseek-v3": ("h200", Deployment(gpus=8, tp=8, engine="sglang", engine_version="0.4.4.post1")),
}


@lru_cache(maxsize=256)
def _total_tokens_per_s(
    model: str, concurrency: int, cap: int | None = None, pool: int | None = None, prompt: int = 1024
) -> float:
    """Total tokens/s of the paper's closed loop of 2048 tokens in all."""
    hardware, layout = _SETTINGS[model]
    limits = layout.vary(active_experts=cap, total_experts=pool, max_num_seqs=2048, memory_fraction=0.88)
    lengths = {"input": Lengths(mean=prompt), "output": Lengths(mean=2048 - prompt)}
    found = predict(load_hardware(hardware), load_model(model), limits, Workload(concurrency=concurrency, **lengths))
    assert found.metrics is not None
    return found.metrics.total_tokens_per_s


def _gain(model: str, concurrency: int, cap: int | None = None, pool: int | None = None) -> float:
    """Throughput gained by a cap or a smaller pool. [%]"""
    return 100 * (_total_tokens_per_s(model, concurrency, cap, pool) / _total_tokens_per_s(model, concurrency) - 1)


def _capping() -> list[Claim]:
    lite, big = "deepseek-v2-lite", "deepseek-v3"
    # model, concurrency, cap, pool, published gain [%], what, where
    rows = (
        (big, 32, 6, None, 10.5, "8 to 6 experts", "table 9"),
        (big, 32, 4, None, 16.4, "8 to 4 experts", "table 9"),
        (big, 128, 4, None, 8.5, "8 to 4 experts", "table 9"),
        (lite, 8, 2, None, 52, "6 to 2 experts", "table 8"),
        (lite, 32, 2, None, 31, "6 to 2 experts", "table 8"),
        (lite, 128, 2, None, 10, "6 to 2 experts", "table 8"),
        (lite, 512, 2, None, 17, "6 to 2 experts", "table 8"),
        (lite, 8, None, 32, 29, "64 to 32 experts in the pool", "table 12"),
        (lite, 64, None, 32, 34, "64 to 32 experts in the pool", "table 12"),
        (lite, 512, None, 32, 5, "64 to 32 experts in the pool", "table 12"),
    )
    found = [
        Claim(f"gain of {what} at concurrency {c}, {load_model(model).name}", gain, "%",
              partial(_gain, model, c, cap, pool), kind="points",
              inputs="1024 in, 1024 out; SGLang 0.4.4.post1; 2 x A800 PCIe or 8 x H200", source=f"{_YANG}, {table}",
              because="routing is taken as even and independent, and the engine's changes with load are not modelled")
        for model, c, cap, pool, gain, what, table in rows
    ]  # fmt: skip
    found.append(
        Claim("2048 tokens of which 1792 are prompt run at 2.05 times the rate of 256", 13040 / 6368, "x",
              lambda: _total_tokens_per_s(lite, 512, prompt=1792) / _total_tokens_per_s(lite, 512, prompt=256),
              kind="system", inputs="DeepSeek-V2-Lite, concurrency 512, total tokens/s", source=f"{_YANG}, table 3")
    )  # fmt: skip
    return found


# ---- wide expert parallelism ----------------------------------------------------------------------------------------


def _phases() -> list[Claim]:
    return [
        Claim(f"{case.name}: tokens/s per device", case.published_tokens_per_s_per_device, "tokens/s",
              case.predicted_tokens_per_s_per_device, kind="operator",
              inputs=f"{case.devices} x {case.hardware}, {case.per_device} a device, context {case.context}, "
                     f"two half batches; {case.assumed}",
              source=case.source,
              because="the imbalance EPLB left is not published, and kernels ran slower beside an exchange than alone")
        for case in CASES
    ]  # fmt: skip


def _two_batch_gain(phase: str, per_device: int, context: int) -> float:
    """Throughput gained by two half batches. [%]"""
    case = next(c for c in CASES if c.name == ("SGLang EP72 decode" if phase == "decode" else CASES[2].name))
    layout, hardware, model = case.deployment(), load_hardware(case.hardware), load_model(case.model)
    ranks = case.devices
    batch = (
        Batch(per_device * ranks, per_device * ranks * context)
        if phase == "decode"
        else Batch(prefill_chunks=((context, 0),) * (per_device * ranks // context))
    )
    # one buffer of 256 tokens holds an undivided batch
    longer = layout.exchange.vary(low_latency_tokens=256)
    times = [
        Engine(hardware, model, layout.vary(exchange=longer.vary(overlap=how))).step(batch).total_s
        for how in ("none", "two_batch")
    ]
    return 100 * (times[0] / times[1] - 1)


@lru_cache(maxsize=64)
def _low_latency_us(phase: str, ranks: int) -> float:
    hardware = load_hardware("h800")
    times = kernel_times(hardware, "sglang")
    features = alltoall.features_of(
        kernel="deepep_low_latency",
        phase=phase,
        tokens_per_rank=[128.0],
        hidden=7168,
        top_k=8,
        num_experts=256,
        ranks=ranks,
        nodes=max(1, ranks // 8),
        bytes_per_element=7392 / 7168 if phase == "dispatch" else 2.0,
    )
    seconds, _ = times.seconds(alltoall.OPERATOR, features, kernel="deepep_low_latency", phase=phase)
    return float(seconds[0]) * 1e6


def _staged_from() -> float:
    """Ranks from which 2DH beats the flat exchange of 1 MiB a rank, doubling from 8."""
    hardware = load_hardware("a100")
    for ranks in (2**n for n in range(4, 13)):
        flat, staged = (float(exchange_s(a, 2.0**20, ranks, hardware)) for a in ("flat", "two_dh"))
        if staged < flat:
            return float(ranks)
    return float("inf")


def _slope_us() -> float:
    """Seconds of one MoE layer per distinct expert woken, between 4 and 32 tokens. [us]"""
    engine = Engine(load_hardware("h100"), load_model("qwen3-30b-a3b"), Deployment(engine="sglang"))
    assert engine.moe is not None
    tokens = np.array([4.0, 32.0])
    seconds = engine.moe.parts(tokens)["routed_experts"] / 48
    woken = engine.moe.kinds[0].load(tokens).active_experts
    return float((seconds[1] - seconds[0]) / (woken[1] - woken[0])) * 1e6


def _wide() -> list[Claim]:
    report = "DeepEP README (deepseek-ai/DeepEP, revision 3b1045d)"
    published = (("dispatch", 8, 77), ("dispatch", 32, 155), ("dispatch", 64, 173), ("dispatch", 128, 192),
                 ("combine", 8, 114), ("combine", 32, 273), ("combine", 64, 314), ("combine", 128, 369))  # fmt: skip
    found = [
        Claim(f"DeepEP low-latency {phase} over {ranks} ranks", us, "us", partial(_low_latency_us, phase, ranks),
              kind="operator", inputs="H800, 128 tokens a rank, 7168 wide, top-8; efficiencies fitted on H100",
              source=report,
              because="fitted on H100 over 1, 2 and 8 nodes, with NVLink twice as fast and kernels a year newer")
        for phase, ranks, us in published
    ]  # fmt: skip
    return [
        *found,
        Claim("two half batches gain 25.5 % in decode at 256 requests a device", 25.5, "%",
              lambda: _two_batch_gain("decode", 256, 2000), kind="points", inputs="EP72, context 2000",
              source=_REPORT, because="stretches overlap ideally here"),
        Claim("two half batches lose 27 % in decode at 32 requests a device", -27, "%",
              lambda: _two_batch_gain("decode", 32, 2000), kind="points", inputs="EP72, context 2000", source=_REPORT,
              because="small kernels that double in number are timed by what they move, not by their launches"),
        Claim("two half batches gain 27 to 35 % in prefill", 31, "%", lambda: _two_batch_gain("prefill", 8192, 4096),
              kind="points", inputs="EP32, 8192 tokens a device, 4k prompts", source=_REPORT,
              because="neither noisy neighbours nor blocked launches are modelled"),
        Claim("2D-hierarchical exchange overtakes the flat one at 256 GPUs or more", 256, "GPUs", _staged_from,
              kind="historic", inputs="A100, 1 MiB a rank, doubling ranks from 16",
              source="Tutel, arXiv 2206.03382, table 6",
              because="the crossing moves with the message, whose size the table leaves open, and with the time "
                      "a message takes to start, assumed 1 us"),
        Claim("a MoE layer takes 2.91 us more for each expert woken", 2.91, "us", _slope_us, kind="operator",
              inputs="Qwen3-30B, H100, SGLang, 4 to 32 tokens",
              source="Opportunistic Expert Activation, arXiv 2511.02237, fitted from its table 4"),
    ]  # fmt: skip


# ---- systems of before 2023 -----------------------------------------------------------------------------------------


def _deepspeed_step(ranks: int, batch_a_rank: int, **how: object) -> float:
    """Decode step of 1.3B+MoE-128, experts over all ranks, context 128. [s]"""
    layout = Deployment.model_validate(
        {"gpus": ranks, "tp": 1, "dp": ranks, "ep": ranks, "engine": "generic", "weight_precision": "float16", **how}
    )
    requests = ranks * batch_a_rank
    engine = Engine(load_hardware("a100-40gb"), load_model("ds-moe-1.3b-128e"), layout)
    return engine.step(Batch(requests, requests * 128)).total_s


def _trillion_ms() -> float:
    """Decode step of 24B+MoE-128 on 256 A100: tensor parallelism 8, experts in two slices over 128 groups of two."""
    layout = Deployment(
        gpus=256,
        tp=8,
        dp=32,
        ep=128,
        expert_slices=2,
        engine="generic",
        weight_precision="float16",
        memory_fraction=0.95,
        exchange={"algorithm": "coordinated"},
    )
    engine = Engine(load_hardware("a100-40gb"), load_model("ds-moe-24b-128e"), layout)
    return engine.step(Batch(256, 256 * 128)).total_s * 1e3


_STATIC = {"dispatch": {"kind": "einsum", "capacity_factor": 0.05 * 512 / 2}, "exchange": {"algorithm": "flat"}}
_ONE_HOT = {"dispatch": {"kind": "einsum", "capacity_factor": 2.0}, "exchange": {"algorithm": "flat"}}
_STAGED = {"algorithm": "hierarchical"}
_DYNAMIC = {"exchange": {"algorithm": "flat"}}


def _huang_step(how: Mapping[str, object] | None) -> float:
    """Prefill of 8 sequences of 1024 tokens over 8 V100; None: the dense model of equal FLOPs. [s]"""
    hardware, moe = load_hardware("v100"), load_model("meta-lm-moe-52b")
    base = {"gpus": 8, "tp": 1, "dp": 8, "engine": "generic", "weight_precision": "float16"}
    batch = Batch(prefill_chunks=((1024, 0),) * 8)
    if how is None:
        return Engine(hardware, dense_equivalent(moe), Deployment.model_validate(base)).step(batch).total_s
    return Engine(hardware, moe, Deployment.model_validate({**base, "ep": 8, **how})).step(batch).total_s


def _huang_weights() -> float:
    """Weights a device holds, MoE over dense, GB ratio. [-]"""
    moe = load_model("meta-lm-moe-52b")
    layout = Deployment(gpus=8, tp=1, dp=8, ep=8, engine="generic", weight_precision="float16")
    dense = weights_per_device_bytes(dense_equivalent(moe), layout.vary(ep=1))
    return weights_per_device_bytes(moe, layout) / dense


def _historic() -> list[Claim]:
    return [
        Claim("a 52 B MoE is 15 times slower than the dense model of equal FLOPs", 15, "x",
              lambda: _huang_step(_STATIC) / _huang_step(None), kind="historic",
              inputs="8 x V100, 8 sequences (1024 tokens each, assumed), static gating", source=f"{_HUANG}, sec. III",
              because=_TEPID),
        Claim("dynamic gating serves 6.21 times as much on one node", 6.21, "x",
              lambda: _huang_step(_STATIC) / _huang_step(_DYNAMIC), kind="historic", inputs="the same at equal batch",
              source=f"{_HUANG}, sec. V", because=_TEPID),
        Claim("a 52 B MoE takes 8.58 times the memory of that dense model (2.2 to 18.88 GB)", 8.58, "x",
              _huang_weights, kind="historic", inputs="weights of one of 8 devices alone",
              source=f"{_HUANG}, sec. III", because="their figure holds activations and the framework on both sides"),
        Claim("throughput per GPU grows with GPUs: 52 B from 8 to 64", 1.0, "x",
              lambda: _deepspeed_step(8, 8) / _deepspeed_step(64, 8), kind="at least",
              inputs="A100, batch 8 a GPU, context 128; 16 to 2 experts a GPU", source=f"{_DEEPSPEED}, sec. 5.5.1"),
        Claim("up to 7.3 times lower latency than the baseline", 7.3, "x",
              lambda: _deepspeed_step(128, 8, **_ONE_HOT) / _deepspeed_step(128, 8, exchange=_STAGED),
              kind="historic", inputs="52 B on 128 A100; baseline: one-hot dispatch at capacity 2, flat exchange",
              source=f"{_DEEPSPEED}, sec. 5.5", because=_TEPID),
        Claim("a trillion parameters under 25 ms a token", 25, "ms", _trillion_ms, kind="at most",
              inputs="24B+MoE-128 on 256 A100, tensor parallelism 8, one request a device, context 128",
              source=f"{_DEEPSPEED}, sec. 5.5"),
    ]  # fmt: skip


def claims() -> list[Claim]:
    """All of them."""
    return [*_capping(), *_phases(), *_wide(), *_historic()]
