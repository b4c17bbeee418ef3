"""Claims with a second in them: gains of capping and refill, wide expert parallelism, exchanges.

Left out: systems of before 2023 (`historic`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial

import numpy as np

from simmoe.costs.exchange import exchange_s
from simmoe.costs.operators import alltoall
from simmoe.costs.timing import kernel_times
from simmoe.engine.engine import Engine
from simmoe.engine.step import Batch
from simmoe.predict import predict
from simmoe.routing.groups import nodes_per_token
from simmoe.specs.deployment import Deployment
from simmoe.specs.load import load_hardware, load_model
from simmoe.specs.workload import Lengths, Workload
from simmoe.validation.claims.claim import Claim
from simmoe.validation.serving.phases import CASES, R1_FAVOURITES

_YANG = "Faster MoE LLM Inference, arXiv 2505.03531"
_REFILL = "Opportunistic Expert Activation, arXiv 2511.02237"
_REPORT = "SGLang team, May 2025"


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
    alone = "at the paper's six other loads this cap gained 0.6 to 5.1 %: one load stands out, not the mechanism"
    few = (
        "half a point beyond the five allowed: what a cap leaves alone (attention, dense products, the front end in a "
        "client's cycle) weighs a little more here than there"
    )
    full = (
        "above 190 in flight the engine changes strategy, and from there the measured gain grows again where ours, of "
        "experts that are all awake, stays"
    )
    pruned = (
        "experts woken fall by a quarter (35 to 26 of even routing), which at the weight of experts seen in the capped "
        "rows is 17 %; a model with half of its experts gone at random answers at guess level, and alike tokens would "
        "wake fewer"
    )
    # model, concurrency, cap, pool, published gain [%], what, where, why if it differs
    rows = (
        (big, 32, 6, None, 10.5, "8 to 6 experts", "table 9", alone),
        (big, 32, 4, None, 16.4, "8 to 4 experts", "table 9", alone),
        (big, 128, 4, None, 8.5, "8 to 4 experts", "table 9", alone),
        (lite, 8, 2, None, 52, "6 to 2 experts", "table 8", few),
        (lite, 32, 2, None, 31, "6 to 2 experts", "table 8", few),
        (lite, 128, 2, None, 10, "6 to 2 experts", "table 8", full),
        (lite, 512, 2, None, 17, "6 to 2 experts", "table 8", full),
        (lite, 8, None, 32, 29, "64 to 32 experts in the pool", "table 12", pruned),
        (lite, 64, None, 32, 34, "64 to 32 experts in the pool", "table 12", pruned),
        (lite, 512, None, 32, 5, "64 to 32 experts in the pool", "table 12", pruned),
    )
    found = [
        Claim(f"gain of {what} at concurrency {c}, {load_model(model).name}", gain, "%",
              partial(_gain, model, c, cap, pool), kind="points",
              inputs="1024 in, 1024 out; SGLang 0.4.4.post1; 2 x A800 PCIe or 8 x H200", source=f"{_YANG}, {table}",
              because=why)
        for model, c, cap, pool, gain, what, table, why in rows
    ]  # fmt: skip
    found.append(
        Claim("2048 tokens of which 1792 are prompt run at 2.05 times the rate of 256", 13040 / 6368, "x",
              lambda: _total_tokens_per_s(lite, 512, prompt=1792) / _total_tokens_per_s(lite, 512, prompt=256),
              kind="system", inputs="DeepSeek-V2-Lite, concurrency 512, total tokens/s", source=f"{_YANG}, table 3")
    )  # fmt: skip
    return found


# ---- refill, one layer at a time ------------------------------------------------------------------------------------

#: Zipf exponent at which 16 tokens wake the 48.8 experts of the paper's plain top-8. The law was chosen knowing what
#: smaller picks wake: a batch in which tokens agree (independence 0.43) falls 18 % short at a pick of 3, this one 8 %.
FAVOURITES = 1.265


@lru_cache(maxsize=32)
def _moe_layer_us(model: str, gpus: int, picked: int) -> float:
    """One MoE layer in a decode step of 16 tokens: router, experts, and the layer's all-reduce where there is one."""
    routing: dict[str, object] = {"popularity": "zipf", "exponent": FAVOURITES}
    if picked < 8:
        routing["refill_to"] = 8
    layout = Deployment.model_validate({"gpus": gpus, "engine": "sglang", "active_experts": picked, "routing": routing})
    shapes = load_model(model)
    parts = Engine(load_hardware("h100"), shapes, layout).step(Batch(16, 16 * 1000)).parts
    # an all-reduce after attention and one after the experts
    return (parts["router"] + parts["routed_experts"] + parts["all_reduce"] / 2) / shapes.layers * 1e6


def _refilled() -> list[Claim]:
    small, big = "qwen3-30b-a3b", "qwen3-235b-a22b"
    inputs = f"SGLang, H100, 16 tokens; experts Zipf, exponent {FAVOURITES:g}, which makes the plain top-8 wake 48.8"
    why = "few picks wake more experts than favourites alone say: 25 where 23 are expected of 3"
    layers = ((small, 1, {8: 175.7, 5: 136.0, 3: 106.8}), (big, 8, {8: 119.4, 5: 101.4, 3: 87.7}))
    cuts = ((small, 1, 3, 39), (big, 8, 5, 15))
    return [
        *(Claim(f"a MoE layer of {load_model(model).name}, {picked} of 8 picked{' and refilled' * (picked < 8)}",
                us, "us", partial(_moe_layer_us, model, gpus, picked), kind="operator", inputs=inputs,
                source=f"{_REFILL}, tables 3 and 4", because=why)
          for model, gpus, times in layers for picked, us in times.items()),
        *(Claim(f"refill from {picked} cuts the latency of {load_model(model).name}'s MoE layers by {cut} %", cut, "%",
                partial(_cut, model, gpus, picked), kind="points", inputs=inputs, source=f"{_REFILL}, abstract",
                because=why)
          for model, gpus, picked, cut in cuts),
    ]  # fmt: skip


def _cut(model: str, gpus: int, picked: int) -> float:
    return 100 * (1 - _moe_layer_us(model, gpus, picked) / _moe_layer_us(model, gpus, 8))


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


def _balanced_gain() -> float:
    """Prefill throughput with EPLB over that with the same experts in order. [-]"""
    case = CASES[0]
    in_order = replace(case, routing=R1_FAVOURITES)
    return case.predicted_tokens_per_s_per_device() / in_order.predicted_tokens_per_s_per_device()


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
def _deepep_s(kernel: str, phase: str, ranks: int, tokens: float) -> float:
    """One exchange of DeepSeek-V3's shapes on H800. [s]"""
    times = kernel_times(load_hardware("h800"), "sglang")
    features = alltoall.features_of(
        kernel=kernel,
        phase=phase,
        tokens_per_rank=[tokens],
        hidden=7168,
        top_k=8,
        num_experts=256,
        ranks=ranks,
        nodes=max(1, ranks // 8),
        bytes_per_element=_ROW_BYTES[phase] / 7168,
    )
    seconds, _ = times.seconds(alltoall.OPERATOR, features, kernel=kernel, phase=phase)
    return float(seconds[0])


#: A token's row on the wire: fp8 with a scale for every 128, bf16. [B]
_ROW_BYTES = {"dispatch": 7168 + 7168 / 128 * 4, "combine": 2.0 * 7168}


def _bulk_gb_per_s(phase: str, ranks: int) -> float:
    """Rate of the bulk kernels as DeepEP's tests count it: a copy for each rank (one node) or node that is met."""
    places = max(1, ranks // 8) if ranks > 8 else ranks
    limits = (places, min(places, 4)) if ranks > 8 else (1, 1)
    copies = nodes_per_token(256, 8, places, *limits)
    return 4096 * copies * _ROW_BYTES[phase] / _deepep_s("deepep_normal", phase, ranks, 4096.0) / 1e9


def _low_latency_us(phase: str, ranks: int) -> float:
    return _deepep_s("deepep_low_latency", phase, ranks, 128.0) * 1e6


def _staged_from() -> float:
    """Ranks from which 2DH beats the flat exchange of the layer in Tutel's benchmark, doubling from 16."""
    hardware, rank_bytes = load_hardware("a100"), 16 * 512 * 2 * 2048 * 2.0
    for ranks in (2**n for n in range(4, 13)):
        flat, staged = (float(exchange_s(a, rank_bytes, ranks, hardware)) for a in ("flat", "two_dh"))
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
    rates = (("dispatch", 8, 153), ("dispatch", 16, 43), ("dispatch", 32, 58), ("dispatch", 64, 51),
             ("combine", 8, 158), ("combine", 16, 43), ("combine", 32, 57), ("combine", 64, 50))  # fmt: skip
    earlier = (("dispatch", 32, 44), ("dispatch", 64, 46), ("combine", 32, 47), ("combine", 64, 45))
    shapes = "H800, 4096 tokens a rank, 7168 wide, top-8 of 256 in 4 groups; efficiencies fitted on H100"
    across = (
        "the H100 rows behind the fit, waits counted, show 54 to 65 GB/s over 2 nodes and 19 over 8: another network"
    )
    found += [
        Claim(f"DeepEP bulk {phase} over {ranks} ranks", rate, "GB/s", partial(_bulk_gb_per_s, phase, ranks),
              kind="operator", inputs=f"{shapes}; a copy for each {'node' if ranks > 8 else 'rank'} a token goes to",
              source="DeepEP, table of normal kernels",
              because=across if ranks > 8 else "fitted on H100, whose NVLink is twice as fast")
        for phase, ranks, rate in rates
    ]  # fmt: skip
    found += [
        Claim(f"DeepEP bulk {phase} over {ranks} ranks until April 2025", rate, "GB/s",
              partial(_bulk_gb_per_s, phase, ranks), kind="operator",
              inputs=f"{shapes}; a copy for each node a token goes to",
              source="DeepEP, pull request 130 (several queue pairs a peer)", because=across)
        for phase, ranks, rate in earlier
    ]  # fmt: skip
    return [
        *found,
        Claim("EPLB with 32 copies gives 1.49 times the prefill", 1.49, "x", _balanced_gain, kind="operator",
              inputs="EP32, 1k prompts; experts as uneven as TensorRT-LLM's EPLB example counted for DeepSeek-R1, in "
                     "order or placed with copies", source=_REPORT,
              because="the report's own experts are less uneven than those: a Zipf exponent of 0.59 would give 1.49"),
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
              kind="historic",
              inputs="A100, the layer of microsoft/tutel's helloworld.py (16 x 512 tokens of 2048, top-2) in 16 bits, "
                     "doubling ranks from 16; 512 in 32 bits, 32 at 1 MiB a rank",
              source="Tutel, arXiv 2206.03382, table 6", because="the crossing moves with the message"),
        Claim("a MoE layer takes 2.91 us more for each expert woken", 2.91, "us", _slope_us, kind="operator",
              inputs="Qwen3-30B, H100, SGLang, 4 to 32 tokens",
              source="Opportunistic Expert Activation, arXiv 2511.02237, fitted from its table 4"),
    ]  # fmt: skip


def claims() -> list[Claim]:
    """All of them."""
    return [*_capping(), *_refilled(), *_phases(), *_wide()]
