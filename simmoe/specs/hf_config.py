"""A model from the config.json that Hugging Face checkpoints carry.

One reader per family of keys: DeepSeek-V2/V3 (also Kimi-K2), Mixtral, Qwen2/Qwen3-MoE, OLMoE, gpt-oss, GLM-4.x-MoE,
MiniMax-M2, Llama 4 (text part), and dense Llama, Mistral, Qwen2, Qwen3. Defaults for absent keys are those of the
architecture's configuration class in `transformers`. Left out: vision encoders, multi-token prediction layers, and
architectures whose attention is not full, windowed or latent (state-space, linear, sparse-index).
Checked in tests/test_hf_config.py: each family's config gives the shipped preset.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from simmoe.errors import SpecError
from simmoe.specs.deployment import BYTES_PER_ELEMENT
from simmoe.specs.model import Model

Config = Mapping[str, Any]
Shapes = dict[str, Any]


_LINEARLY = "linearly in most layers (Gated DeltaNet)"
_BY_INDEX = "to tokens an index picks (DeepSeek sparse attention)"
#: Architectures known for attention that has no counterpart here.
_UNLIKE = {
    "Qwen3NextForCausalLM": _LINEARLY,
    "Qwen3_5MoeForCausalLM": _LINEARLY,
    "Qwen3_5MoeForConditionalGeneration": _LINEARLY,
    "DeepseekV32ForCausalLM": _BY_INDEX,
    "GlmMoeDsaForCausalLM": _BY_INDEX,
}


#: Keys that count something of which there is at least one.
_COUNTS = (
    "hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "moe_intermediate_size", "num_local_experts", "n_routed_experts", "num_experts",
    "num_experts_per_tok", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "moe_layer_freq",
    "decoder_sparse_step", "interleave_moe_layer_step",
)  # fmt: skip


def model_from_hf(config: Config, name: str) -> Model:
    """Build a Model from the contents of a config.json.

    Parameters
    ----------
    config : the parsed file.
    name : what to call the model.

    Raises
    ------
    SpecError
        If the architecture is unknown, or a key that fixes a shape is missing.
    """
    architecture = (config.get("architectures") or [str(config.get("model_type"))])[0]
    reader = READERS.get(architecture) or _BY_TYPE.get(str(config.get("model_type")))
    if reader is None:
        attends = f" (it attends {_UNLIKE[architecture]})" if architecture in _UNLIKE else ""
        raise SpecError(f"architectures: {architecture!r} is not supported{attends}; supported: {', '.join(READERS)}")
    text = {**config, **config["text_config"]} if isinstance(config.get("text_config"), Mapping) else config
    for key in _COUNTS:
        value = text.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise SpecError(f"{key}: {value!r} will not do: a config.json states a whole number of 1 or more")
    precision = _native_precision(config if "quantization_config" in config else text)
    return Model.model_validate(
        {
            "name": name,
            "hidden": _need(text, "hidden_size"),
            "layers": _need(text, "num_hidden_layers"),
            "vocab": _need(text, "vocab_size"),
            "tied_embeddings": bool(text.get("tie_word_embeddings", False)),
            "native_precision": precision,
            "mtp_layers": text.get("num_nextn_predict_layers") or 0,
            "max_context": text.get("max_position_embeddings"),
            "source": f"config.json ({architecture})",
            **reader(text),
        }
    )


def _need(config: Config, key: str) -> Any:
    value = config.get(key)
    if value is None:
        raise SpecError(f"{key}: missing; a config.json of this architecture states it")
    return value


def _gqa(c: Config, **changes: Any) -> Shapes:
    heads = _need(c, "num_attention_heads")
    width = c.get("head_dim") or _need(c, "hidden_size") // heads
    bias = bool(c.get("attention_bias", False))
    window, windowed = _windows(c)
    return {
        "kind": "gqa",
        "heads": heads,
        "kv_heads": c.get("num_key_value_heads") or heads,
        "head_dim": width,
        "v_head_dim": width,
        "qkv_bias": bias,
        "output_bias": bias,
        "sliding_window": window,
        "windowed_layers": windowed,
        **changes,
    }


def _windows(c: Config) -> tuple[int | None, int]:
    window, layers = c.get("sliding_window"), _need(c, "num_hidden_layers")
    if not window or c.get("use_sliding_window") is False:
        return None, 0
    kinds = c.get("layer_types")
    if kinds:
        return window, sum(kind == "sliding_attention" for kind in kinds)
    if c.get("use_sliding_window"):  # Qwen: the layers from max_window_layers on
        return window, max(0, layers - c.get("max_window_layers", layers))
    return window, layers


def _dense(**attention: Any) -> Callable[[Config], Shapes]:
    def read(c: Config) -> Shapes:
        return {"attention": _gqa(c, **attention), "dense_inter_size": _need(c, "intermediate_size")}

    return read


def _deepseek(c: Config) -> Shapes:
    rope, rank = _need(c, "qk_rope_head_dim"), c.get("q_lora_rank")
    v3 = c.get("scoring_func", "softmax") == "sigmoid" or c.get("model_type") in {"deepseek_v3", "kimi_k2"}
    attention = {
        "kind": "mla",
        "heads": _need(c, "num_attention_heads"),
        "kv_heads": _need(c, "num_attention_heads"),
        "head_dim": _need(c, "qk_nope_head_dim") + rope,
        "v_head_dim": _need(c, "v_head_dim"),
        "q_lora_rank": rank,
        "kv_lora_rank": _need(c, "kv_lora_rank"),
        "qk_rope_head_dim": rope,
    }
    return {"attention": attention, **_deepseek_experts(c, sigmoid=v3)}


def _deepseek_experts(c: Config, *, sigmoid: bool) -> Shapes:
    layers, first = _need(c, "num_hidden_layers"), c.get("first_k_dense_replace", 0)
    every = c.get("moe_layer_freq", 1)
    inter, shared = _need(c, "moe_intermediate_size"), c.get("n_shared_experts") or 0
    greedy = c.get("topk_method") == "greedy"  # plain top-k, whatever n_group says
    return {
        "dense_inter_size": _need(c, "intermediate_size"),
        "moe_layers": sum(i >= first and i % every == 0 for i in range(layers)),
        "experts": {
            "num_experts": _need(c, "n_routed_experts"),
            "top_k": _need(c, "num_experts_per_tok"),
            "inter_size": inter,
            "num_shared": shared,
            "shared_inter_size": shared * inter,
            "router_bias": sigmoid,
            "score": "sigmoid" if sigmoid else "softmax",
            "renormalise": bool(c.get("norm_topk_prob", sigmoid)),
            "num_groups": 1 if greedy else c.get("n_group") or 1,
            "top_groups": 1 if greedy else c.get("topk_group") or 1,
            "routed_scaling": c.get("routed_scaling_factor", 1.0),
        },
    }


def _deepseek_v1(c: Config) -> Shapes:
    return {"attention": _gqa(c), **_deepseek_experts(c, sigmoid=False)}


def _glm(c: Config) -> Shapes:
    attention = _gqa(c, output_bias=False, qk_norm=bool(c.get("use_qk_norm", False)))
    return {"attention": attention, **_deepseek_experts(c, sigmoid=True)}


def _mixtral(c: Config) -> Shapes:
    return {
        "attention": _gqa(c),
        "moe_layers": _need(c, "num_hidden_layers"),
        "experts": {
            "num_experts": _need(c, "num_local_experts"),
            "top_k": _need(c, "num_experts_per_tok"),
            "inter_size": _need(c, "intermediate_size"),
            "renormalise": True,
        },
    }


def _minimax_m2(c: Config) -> Shapes:
    whole = c.get("qk_norm_type", "per_layer") == "per_layer"
    norm = bool(c.get("use_qk_norm", True))
    shapes = _mixtral(c)
    shapes["attention"].update(qk_norm=norm, qk_norm_whole=norm and whole)
    shapes["experts"].update(score="sigmoid", router_bias=bool(c.get("use_routing_bias", True)))
    return shapes


def _qwen_moe(*, qkv_bias: bool, qk_norm: bool) -> Callable[[Config], Shapes]:
    def read(c: Config) -> Shapes:
        layers = _need(c, "num_hidden_layers")
        every, plain = c.get("decoder_sparse_step", 1), set(c.get("mlp_only_layers") or ())
        moe = sum(i not in plain and (i + 1) % every == 0 for i in range(layers))
        inter, shared = _need(c, "moe_intermediate_size"), c.get("shared_expert_intermediate_size") or 0
        shared = shared if qkv_bias else 0  # only Qwen2-MoE builds it; Qwen3-MoE has none
        attention = _gqa(c, qkv_bias=qkv_bias or bool(c.get("attention_bias")), output_bias=False, qk_norm=qk_norm)
        return {
            "attention": attention,
            "dense_inter_size": c.get("intermediate_size", 0) if moe < layers else 0,
            "moe_layers": moe,
            "experts": {
                "num_experts": _need(c, "num_experts"),
                "top_k": _need(c, "num_experts_per_tok"),
                "inter_size": inter,
                "num_shared": shared // inter,
                "shared_inter_size": shared,
                "shared_gate": bool(shared),
                "renormalise": bool(c.get("norm_topk_prob", False)),
            },
        }

    return read


def _olmoe(c: Config) -> Shapes:
    return {
        "attention": _gqa(c, qk_norm=True, qk_norm_whole=True),
        "moe_layers": _need(c, "num_hidden_layers"),
        "experts": {
            "num_experts": _need(c, "num_experts"),
            "top_k": _need(c, "num_experts_per_tok"),
            "inter_size": _need(c, "intermediate_size"),
            "renormalise": bool(c.get("norm_topk_prob", False)),
        },
    }


def _gpt_oss(c: Config) -> Shapes:
    shapes = _mixtral(c)
    shapes["experts"].update(bias=True, router_bias=True)
    if not c.get("layer_types"):  # every second layer, the first among them
        shapes["attention"]["windowed_layers"] = -(-_need(c, "num_hidden_layers") // 2)
    shapes["attention"].update(qkv_bias=True, output_bias=True)
    return shapes


def _llama4(c: Config) -> Shapes:
    layers, every = _need(c, "num_hidden_layers"), c.get("interleave_moe_layer_step", 1)
    listed = c.get("moe_layers")
    moe = len(listed) if listed else sum((i + 1) % every == 0 for i in range(layers))
    inter = _need(c, "intermediate_size")
    chunk = c.get("attention_chunk_size")
    rope_layers = c.get("no_rope_layers") or [int((i + 1) % 4 != 0) for i in range(layers)]
    return {
        # layers with rotary positions attend within chunks, described as a window
        "attention": _gqa(c, sliding_window=chunk, windowed_layers=sum(rope_layers) if chunk else 0),
        "dense_inter_size": _need(c, "intermediate_size_mlp") if moe < layers else 0,
        "moe_layers": moe,
        "experts": {
            "num_experts": _need(c, "num_local_experts"),
            "top_k": _need(c, "num_experts_per_tok"),
            "inter_size": inter,
            "num_shared": 1,
            "shared_inter_size": inter,
            "score": "sigmoid",
        },
    }


#: architecture -> reader of its keys
READERS: dict[str, Callable[[Config], Shapes]] = {
    "DeepseekForCausalLM": _deepseek_v1,
    "DeepseekV2ForCausalLM": _deepseek,
    "DeepseekV3ForCausalLM": _deepseek,
    "KimiK25ForConditionalGeneration": lambda c: _deepseek({"scoring_func": "sigmoid", **c}),
    "MixtralForCausalLM": _mixtral,
    "Qwen2MoeForCausalLM": _qwen_moe(qkv_bias=True, qk_norm=False),
    "Qwen3MoeForCausalLM": _qwen_moe(qkv_bias=False, qk_norm=True),
    "OlmoeForCausalLM": _olmoe,
    "GptOssForCausalLM": _gpt_oss,
    "Glm4MoeForCausalLM": _glm,
    "MiniMaxM2ForCausalLM": _minimax_m2,
    "Llama4ForConditionalGeneration": _llama4,
    "Llama4ForCausalLM": _llama4,
    "LlamaForCausalLM": _dense(),
    "MistralForCausalLM": _dense(),
    "Phi3ForCausalLM": _dense(),
    "Qwen2ForCausalLM": _dense(qkv_bias=True, output_bias=False),
    "Qwen3ForCausalLM": _dense(qk_norm=True),
}
_BY_TYPE = {
    "deepseek": _deepseek_v1,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "kimi_k2": _deepseek,
    "mixtral": _mixtral,
    "qwen2_moe": READERS["Qwen2MoeForCausalLM"],
    "qwen3_moe": READERS["Qwen3MoeForCausalLM"],
    "olmoe": _olmoe,
    "gpt_oss": _gpt_oss,
    "glm4_moe": _glm,
    "llama4": _llama4,
    "llama4_text": _llama4,
    "llama": READERS["LlamaForCausalLM"],
    "mistral": READERS["MistralForCausalLM"],
    "phi3": READERS["Phi3ForCausalLM"],
    "qwen2": READERS["Qwen2ForCausalLM"],
    "qwen3": READERS["Qwen3ForCausalLM"],
}


def _native_precision(c: Config) -> str:
    quantised = c.get("quantization_config")
    if not isinstance(quantised, Mapping):
        stated = str(c.get("torch_dtype") or c.get("dtype") or "bfloat16")
        return stated if stated in BYTES_PER_ELEMENT else "bfloat16"
    method = str(quantised.get("quant_method", "")).lower()
    if method == "fp8":
        return "fp8_block" if quantised.get("weight_block_size") else "fp8"
    if method == "mxfp4":
        return "mxfp4"
    if method in {"awq", "gptq"} and quantised.get("bits") in {4, None}:
        return "int4_g32" if quantised.get("group_size") == 32 else "int4"
    if method == "compressed-tensors":
        groups = quantised.get("config_groups") or {}
        weights: Config = next((g["weights"] for g in groups.values() if isinstance(g.get("weights"), Mapping)), {})
        kind = (weights.get("type"), weights.get("num_bits"))
        blocks = weights.get("strategy") == "block"
        four = "int4_g32" if weights.get("group_size") == 32 else "int4"
        known = {("float", 8): "fp8_block" if blocks else "fp8", ("int", 8): "int8", ("int", 4): four}
        if kind in known:
            return known[kind]
    if method == "modelopt" and "FP4" in str(quantised.get("quant_algo", "")).upper():
        return "nvfp4"
    if method == "modelopt" and "FP8" in str(quantised.get("quant_algo", "")).upper():
        return "fp8"
    raise SpecError(
        f"quantization_config: quant_method {method!r} is not known; give the weight precision in a model YAML, "
        f"one of {', '.join(BYTES_PER_ELEMENT)}"
    )
