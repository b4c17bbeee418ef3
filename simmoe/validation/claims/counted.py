"""Claims that follow from shapes and probabilities alone: sizes, distinct experts, padding, hops, bytes.

Left out: anything with a second in it (`timed`).
"""

from __future__ import annotations

from simmoe.costs.exchange import exchange_s, messages
from simmoe.costs.memory import kv_bytes_per_token
from simmoe.costs.work import parameters
from simmoe.routing.capacity import dropped_share, slots_per_expert, waste_factor
from simmoe.routing.occupancy import distinct_experts
from simmoe.routing.popularity import inclusion_from_weights, uniform_inclusion, zipf_weights
from simmoe.scaling_law import routing_stops_helping
from simmoe.specs.deployment import Deployment
from simmoe.specs.hardware import Fabric
from simmoe.specs.load import load_hardware, load_model
from simmoe.specs.model import Experts
from simmoe.validation.claims.claim import Claim
from simmoe.validation.claims.timed import FAVOURITES

_DEEPSPEED = "DeepSpeed-MoE, arXiv 2201.05596"
_HUANG = "Towards MoE Deployment, arXiv 2303.06182"
_YANG = "Faster MoE LLM Inference, arXiv 2505.03531"
_REFILL = "Opportunistic Expert Activation, arXiv 2511.02237"


def _billions(name: str, which: str = "total") -> float:
    return float(getattr(parameters(load_model(name)), which)) / 1e9


def _distinct(experts: int, top_k: int, tokens: float) -> float:
    return float(distinct_experts(uniform_inclusion(experts, top_k), tokens))


def _read_less(name: str, cap: int, tokens: float) -> float:
    """Share of the routed and other weights a step of ``tokens`` no longer reads under a cap. [%]"""
    model, count = load_model(name), parameters(load_model(name))
    e = model.experts
    assert e is not None

    def read(top_k: int) -> float:
        routed = model.moe_layers * _distinct(e.num_experts, top_k, tokens) * count.routed_expert
        return count.besides_experts - count.embedding + routed

    return 100 * (read(cap) / read(e.top_k) - 1)


def _lost(tokens: int, experts: int, factor: float) -> float:
    slots = float(slots_per_expert(tokens, experts, 1, factor))
    return 100 * dropped_share(uniform_inclusion(experts, 1), tokens, slots)


def _gpt_moe_growth(experts: int) -> float:
    """Parameters of a GPT model with experts in every other layer over those without, embeddings aside."""
    dense = load_model("gpt3-6.7b")
    sparse = dense.vary(
        moe_layers=dense.layers // 2,
        experts=Experts(num_experts=experts, top_k=1, inter_size=dense.dense_inter_size, matrices=2),
    )
    sizes = [parameters(m) for m in (sparse, dense)]
    return (sizes[0].total - sizes[0].embedding) / (sizes[1].total - sizes[1].embedding)


def _ridge_tokens() -> float:
    device = load_hardware("h100").device
    rows = device.flop_per_s("bfloat16") / device.memory_bandwidth  # 2 n / 2 B = ridge, whatever the format
    return rows * 256 / 8


def _torus_s() -> float:
    tpu = load_hardware("tpu-v5e")
    ideal = tpu.vary(fabric=Fabric(torus=(16, 16)), scale_up=tpu.scale_up.vary(bandwidth=50e9, latency=0.0))
    return float(exchange_s("flat", 1e6, 256, ideal)) * 1e6


def claims() -> list[Claim]:
    """All of them."""
    return [
        Claim("DeepSpeed 1.3B+MoE-128 holds 52 B parameters", 52, "B", lambda: _billions("ds-moe-1.3b-128e"),
              inputs="24 layers of 2048, experts in half of them", source=f"{_DEEPSPEED}, table 1"),
        Claim("1.3B+MoE-128's critical path is about 5 times shorter than a dense 6.7 B model's", 5.0, "x",
              lambda: _billions("gpt3-6.7b") / _billions("ds-moe-1.3b-128e", "active"), kind="operator",
              inputs="active parameters", source=f"{_DEEPSPEED}, sec. 5"),
        Claim("24B+MoE-128 holds a trillion parameters", 1064.9, "B", lambda: _billions("ds-moe-24b-128e"),
              inputs="30 layers of 8192 (the printed counts of 8B and 24B are swapped)",
              source=f"{_DEEPSPEED}, table 6"),
        Claim("GLaM holds 1.2 T parameters", 1200, "B", lambda: _billions("glam-64b-64e"), kind="operator",
              inputs="64 layers of 8192, 64 experts in half", source="GLaM, arXiv 2112.06905",
              because="the published figure is rounded"),
        Claim("GLaM activates 96.6 B", 96.6, "B", lambda: _billions("glam-64b-64e", "active"),
              inputs="2 of 64 experts", source="GLaM, arXiv 2112.06905"),
        Claim("GLaM needs about half of GPT-3's FLOPs a token", 0.5, "x",
              lambda: _billions("glam-64b-64e", "active") / _billions("gpt3-175b"), kind="operator",
              inputs="active parameters over 175 B", source="GLaM, arXiv 2112.06905"),
        Claim("Mixtral 8x7B holds 47 B", 46.7, "B", lambda: _billions("mixtral-8x7b"),
              inputs="32 layers, 8 experts of 14336", source="Mixtral, arXiv 2401.04088"),
        Claim("Mixtral 8x7B uses 13 B a token", 12.9, "B", lambda: _billions("mixtral-8x7b", "active"),
              inputs="2 of 8 experts", source="Mixtral, arXiv 2401.04088"),
        Claim("a dense 70 B model computes 5.5 times as much a token as Mixtral", 5.5, "x",
              lambda: _billions("llama-2-70b", "active") / _billions("mixtral-8x7b", "active"),
              inputs="active parameters", source="from both model cards", because="the dense model counts 69 B"),
        Claim("Switch-C holds 1.6 T parameters", 1571, "B", lambda: _billions("switch-c"),
              inputs="15 encoder and 15 decoder layers of 2080, 2048 experts in each",
              source="Switch, arXiv 2101.03961, table 9"),
        Claim("Switch-XXL holds 395 B parameters", 395, "B", lambda: _billions("switch-xxl"),
              inputs="24 and 24 layers of 4096, 128 experts in every other (the table prints 64, which make 201 B)",
              source="Switch, arXiv 2101.03961, table 9", by_definition=True),
        Claim("NLLB-MoE holds 54.5 B parameters", 54.5, "B", lambda: _billions("nllb-moe-54b"),
              inputs="24 and 24 layers of 2048, 128 experts in every fourth", source="NLLB, arXiv 2207.04672"),
        Claim("M6-T holds a trillion parameters", 1002.7, "B", lambda: _billions("m6-t-1t"),
              inputs="24 layers of 1024, 960 experts; shapes remembered", source="M6-T, arXiv 2105.15082"),
        Claim("M6 reaches 10 trillion parameters", 10000, "B", lambda: _billions("m6-10t"),
              inputs="48 layers of 1024, 10240 experts; shapes remembered", source="M6-10T, arXiv 2110.03888"),
        Claim("DeepSeek-V3 caches 70 KB a token", 70.272, "KB",
              lambda: kv_bytes_per_token(load_model("deepseek-v3"), Deployment()) / 1e3,
              inputs="61 layers of 576 in bf16", source="arXiv 2505.09343, table 1"),
        Claim("Llama-3.1 405B caches 516 KB a token", 516.096, "KB",
              lambda: kv_bytes_per_token(load_model("llama-3.1-405b"), Deployment()) / 1e3,
              inputs="126 layers, 8 kv heads of 128", source="arXiv 2505.09343, table 1"),
        Claim("a MoE with 8 experts in every other layer is 3.33 times its dense base", 10 / 3, "x",
              lambda: _gpt_moe_growth(8), inputs="GPT-3 6.7B shape",
              source="Toward Inference-optimal MoE, arXiv 2404.02852", because="norms and routers are small"),
        Claim("experts stop helping a model of 937 B parameters", 937, "B", lambda: routing_stops_helping() / 1e9,
              kind="operator", inputs="S-BASE, its coefficients as printed: 10^(-b/c)",
              source="Unified Scaling Laws for Routed Language Models, arXiv 2202.01169"),
        Claim("static gating allocates 12.8 times the slots needed (language model)", 12.8, "x",
              lambda: float(waste_factor(1e6, 512, 2, 0.05 * 512 / 2)),
              inputs="512 experts, top-2, capacity 0.05 of all tokens", source=f"{_HUANG}, sec. III-B",
              by_definition=True),
        Claim("static gating allocates 64 times the slots needed (machine translation)", 64, "x",
              lambda: float(waste_factor(1e6, 128, 2, 1.0 * 128 / 2)),
              inputs="128 experts, top-2, capacity 1.0 of all tokens", source=f"{_HUANG}, sec. III-B",
              by_definition=True),
        Claim("less than 1 % of tokens is dropped at capacity factor 1.25", 1.0, "%", lambda: _lost(4096, 128, 1.25),
              kind="at most",
              inputs="top-1, 4096 tokens over 128 experts, even popularity; with 256 tokens it is 11 %",
              source="Switch, arXiv 2101.03961, sec. 2.2"),
        Claim("hierarchical all-to-all takes G + p/G hops where flat takes p", 24, "hops",
              lambda: messages("hierarchical", 128, 8), kind="operator", inputs="p = 128, G = 8: 7 + 15",
              source=f"{_DEEPSPEED}, sec. 5.3", by_definition=True),
        Claim("coordinated communication needs 16 C1 + C2 instead of 128 C1 + C2", 16, "hops of C1",
              lambda: messages("coordinated", 128, 8, 8) - (8 - 1), kind="operator",
              inputs="128 devices, tensor parallelism 8; 15 peers, 7 to gather", source=f"{_DEEPSPEED}, sec. 5.3",
              by_definition=True),
        Claim("top-1 of 64 experts at batch 1 leaves 63 idle", 63, "experts", lambda: 64 - _distinct(64, 1, 1.0),
              inputs="1 token", source="accounting", by_definition=True),
        Claim("a batch of 32 wakes nearly all of DeepSeek-V2-Lite's experts", 61.3, "experts",
              lambda: _distinct(64, 6, 32.0), inputs="top-6 of 64, independent tokens", source="occupancy, exact",
              by_definition=True),
        Claim("independent tokens would wake 82.4 of 128 experts at batch 16", 82.4, "experts",
              lambda: _distinct(128, 8, 16.0), inputs="top-8 of 128", source=f"{_REFILL}, footnote 1",
              by_definition=True),
        Claim("refill from a pick of 4 wakes 29.9 experts where plain top-8 wakes 48.8", 29.9, "experts",
              lambda: float(distinct_experts(inclusion_from_weights(zipf_weights(128, FAVOURITES), 4), 16.0)),
              kind="operator", inputs=f"16 tokens, Zipf with exponent {FAVOURITES:g}, which makes the 48.8",
              source=f"{_REFILL}, table 4", because="favourites say fewer than were woken"),
        Claim("capping 6 to 4 experts reads over 15 % less at small batch", -15, "%",
              lambda: _read_less("deepseek-v2-lite", 4, 8.0), kind="at most",
              inputs="DeepSeek-V2-Lite, 8 tokens, all weights but the embedding; true up to about 16 tokens",
              source=f"{_YANG}, as summarised elsewhere"),
        Claim("capping 6 to 4 experts reads hardly less at large batch", -1, "%",
              lambda: _read_less("deepseek-v2-lite", 4, 128.0), kind="at least",
              inputs="DeepSeek-V2-Lite, 128 tokens", source="occupancy", by_definition=True),
        Claim("top-1 instead of top-2 halves Mixtral's expert weight traffic", 0.5, "x",
              lambda: _distinct(8, 1, 1.0) / _distinct(8, 2, 1.0), inputs="1 token: exact; 0.89 at 16 tokens",
              source="general statement", by_definition=True),
        Claim("expert parallelism moves 28 % of what tensor parallelism does", 0.28, "x",
              lambda: 2 * 2 / (2 * messages("flat", 8, 8)),
              inputs="2 active of 8 devices: 2 k / 2 (n - 1) hidden vectors a layer", source=f"{_YANG}, sec. 4.2",
              by_definition=True),
        Claim("the hottest 3 of 64 experts taking half of the tokens is Zipf with exponent 1.2", 0.5, "share",
              lambda: float((zipf_weights(64, 1.2) / zipf_weights(64, 1.2).sum())[:3].sum()), inputs="top-1",
              source="survey illustration", by_definition=True),
        Claim("an expert turns compute-bound at about 295 rows: 9.4 k tokens for DeepSeek-V3", 9440, "tokens",
              _ridge_tokens, inputs="H100 data sheet, top-8 of 256", source="roofline", by_definition=True),
        Claim("a TPU v3 core has 16 GiB", 16, "GiB",
              lambda: load_hardware("tpu-v3").device.memory / load_hardware("tpu-v3").device.sms / 2**30,
              inputs="hardware/tpu-v3.yaml, two cores a chip", source="Jouppi et al., CACM 63(7), 2020",
              by_definition=True),
        Claim("an all-to-all of 1 MB a chip on 16 x 16 TPU v5e takes 40 us", 40, "us", _torus_s,
              inputs="links of 50 GB/s, no latency", source="torus bisection bound", by_definition=True),
    ]  # fmt: skip
