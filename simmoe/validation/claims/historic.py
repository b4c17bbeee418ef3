"""Claims about systems of before 2023, whose software the papers describe in outline only.

What they leave open is assumed and said under ``inputs``.
"""

from __future__ import annotations

from simmoe.costs.memory import weights_per_device_bytes, workspace_bytes
from simmoe.engine.engine import Engine
from simmoe.engine.step import Batch
from simmoe.specs.deployment import Deployment
from simmoe.specs.load import load_hardware, load_model
from simmoe.specs.variants import dense_equivalent
from simmoe.validation.claims.claim import Claim

_DEEPSPEED = "DeepSpeed-MoE, arXiv 2201.05596"
_HUANG = "Towards MoE Deployment, arXiv 2303.06182"
_TEPID = "host time and kernel launches of that software are not modelled"


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


_ONE_HOT = {"dispatch": {"kind": "einsum", "capacity_factor": 2.0}, "exchange": {"algorithm": "flat"}}
_STAGED = {"algorithm": "hierarchical"}


# ---- "Towards MoE Deployment": static against dynamic gating on a node of eight V100 --------------------------------

#: How the two models are run: preset, and capacity as a factor over the even share (0.05 of all tokens an expert, and
#: 1.0 of them).
_LANGUAGE, _TRANSLATION = ("meta-lm-moe-52b", 0.05 * 512 / 2), ("nllb-moe-54b", 1.0 * 128 / 2)
#: 8 sequences of a language model; 48 sentences, whose length the paper leaves open.
_PROMPTS = Batch(prefill_chunks=((1024, 0),) * 8)
_SENTENCES = Batch(prefill_chunks=((32, 0),) * 48)
_DECODING = Batch(48, 48 * 32)
_STATIC, _DYNAMIC = True, False


def _huang_layout(how: bool | None, capacity: float) -> Deployment:
    """Static or dynamic gating over eight ranks; None: what the dense model of equal FLOPs is run with."""
    given: dict[str, object] = {"gpus": 8, "tp": 1, "dp": 8, "engine": "generic", "weight_precision": "float16"}
    if how is not None:
        given |= {"ep": 8, "exchange": {"algorithm": "flat"}}
    if how:
        given["dispatch"] = {"kind": "einsum", "capacity_factor": capacity}
    return Deployment.model_validate(given)


def _slower(setting: tuple[str, float], batch: Batch, how: bool | None, than: bool | None) -> float:
    """Time of a step over another way to run it. [-]"""

    def seconds(how: bool | None) -> float:
        name, capacity = setting
        model = load_model(name) if how is not None else dense_equivalent(load_model(name))
        return Engine(load_hardware("v100"), model, _huang_layout(how, capacity)).step(batch).total_s

    return seconds(how) / seconds(than)


def _memory_ratio(setting: tuple[str, float], tokens: int) -> float:
    """Weights and workspace of a device under static gating, over those of the dense model. [-]"""
    name, capacity = setting
    held = []
    for how, model in ((_STATIC, load_model(name)), (None, dense_equivalent(load_model(name)))):
        layout = _huang_layout(how, capacity).vary(max_num_batched_tokens=tokens, max_num_seqs=1)
        held.append(weights_per_device_bytes(model, layout) + workspace_bytes(model, layout))
    return held[0] / held[1]


def _buffered_gb() -> float:
    """Memory saved where 10 of the 16 experts of a device and decoder layer stay, and two pass through. [GB]"""
    decoder = load_model("nllb-moe-54b").vary(encoder=None)
    layout = _huang_layout(_DYNAMIC, 1.0)
    buffered = layout.vary(offload={"cached_experts": 10})
    return (weights_per_device_bytes(decoder, layout) - weights_per_device_bytes(decoder, buffered)) / 1e9


def _huang() -> list[Claim]:
    grown = "their figure may be at the larger batch that the freed memory allows; here the batch stays"
    sentences = "8 x V100, 48 sentences (32 tokens each, assumed)"
    return [
        Claim("a 52 B MoE is 15 times slower than the dense model of equal FLOPs", 15, "x",
              lambda: _slower(_LANGUAGE, _PROMPTS, _STATIC, None), kind="historic",
              inputs="8 x V100, 8 sequences (1024 tokens each, assumed), static gating", source=f"{_HUANG}, sec. III",
              because=_TEPID),
        Claim("MoE translation is 22 times slower than dense (encoder)", 22, "x",
              lambda: _slower(_TRANSLATION, _SENTENCES, _STATIC, None), kind="historic",
              inputs=f"{sentences}, static gating", source=f"{_HUANG}, sec. III", because=_TEPID),
        Claim("MoE translation is 3 times slower than dense (decoder: 32 to 90 ms)", 90 / 32, "x",
              lambda: _slower(_TRANSLATION, _DECODING, _STATIC, None), kind="historic",
              inputs="8 x V100, 48 sentences decoding, static gating", source=f"{_HUANG}, sec. III", because=_TEPID),
        Claim("dynamic gating serves 6.21 times as much on one node", 6.21, "x",
              lambda: _slower(_LANGUAGE, _PROMPTS, _STATIC, _DYNAMIC), kind="historic",
              inputs="the language model at equal batch", source=f"{_HUANG}, sec. V", because=_TEPID),
        Claim("dynamic gating encodes 5.75 times as much", 5.75, "x",
              lambda: _slower(_TRANSLATION, _SENTENCES, _STATIC, _DYNAMIC), kind="historic",
              inputs=f"{sentences}, equal batch", source=f"{_HUANG}, sec. V", because=_TEPID),
        Claim("dynamic gating decodes 2.58 times as much", 2.58, "x",
              lambda: _slower(_TRANSLATION, _DECODING, _STATIC, _DYNAMIC), kind="historic",
              inputs="8 x V100, 48 sentences decoding, equal batch", source=f"{_HUANG}, sec. V", because=grown),
        Claim("a 52 B MoE takes 8.58 times the memory of that dense model (2.2 to 18.88 GB)", 8.58, "x",
              lambda: _memory_ratio(_LANGUAGE, 1024), kind="historic",
              inputs="weights and workspace of one of 8 devices, one sequence of 1024 tokens each",
              source=f"{_HUANG}, sec. III", because="the framework's own memory is not known"),
        Claim("translation takes 3.01 times the memory (7.02 to 21.16 GB)", 3.01, "x",
              lambda: _memory_ratio(_TRANSLATION, 6 * 32), kind="historic",
              inputs="weights and workspace of one of 8 devices, six sentences of 32 tokens each",
              source=f"{_HUANG}, sec. III", because="the framework's own memory is not known"),
        Claim("expert buffering saves 2.25 GB of static memory", 2.25, "GB", _buffered_gb, kind="operator",
              inputs="translation decoder on 8 devices, 10 of 16 experts kept in each of its 6 MoE layers",
              source=f"{_HUANG}, sec. VI"),
    ]  # fmt: skip


def claims() -> list[Claim]:
    """All of them."""
    return [
        *_huang(),
        Claim("throughput per GPU grows with GPUs: 52 B from 8 to 64", 1.0, "x",
              lambda: _deepspeed_step(8, 8) / _deepspeed_step(64, 8), kind="at least",
              inputs="A100, batch 8 a GPU, context 128; 16 to 2 experts a GPU", source=f"{_DEEPSPEED}, sec. 5.5.1"),
        Claim("up to 7.3 times lower latency than the baseline", 7.3, "x",
              lambda: _deepspeed_step(128, 8, **_ONE_HOT) / _deepspeed_step(128, 8, exchange=_STAGED),
              kind="historic", inputs="52 B on 128 A100; baseline: one-hot dispatch at capacity 2, flat exchange",
              source=f"{_DEEPSPEED}, sec. 5.5",
              because="kernels and messages of the baseline take 10 ms a step here; 7.3 would need 47, which launches "
                      "from eager PyTorch may explain and the paper does not tell"),
        Claim("a trillion parameters under 25 ms a token", 25, "ms", _trillion_ms, kind="at most",
              inputs="24B+MoE-128 on 256 A100, tensor parallelism 8, one request a device, context 128",
              source=f"{_DEEPSPEED}, sec. 5.5"),
    ]  # fmt: skip
