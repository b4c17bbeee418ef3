"""config.json to Model: each family gives the shipped preset; unknown ones are refused by name."""

import json

import pytest

from simmoe.errors import SpecError
from simmoe.specs.hf_config import READERS, model_from_hf
from simmoe.specs.load import load_model


def config(architecture, hidden, layers, vocab, heads, kv=None, context=None, **keys):
    return {
        "architectures": [architecture],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "num_attention_heads": heads,
        "num_key_value_heads": kv or heads,
        "max_position_embeddings": context,
        "torch_dtype": "bfloat16",
        **keys,
    }


def mla(**keys):
    return {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 512, **keys}


FP8_BLOCK = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
V3_KEYS = {
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "quantization_config": FP8_BLOCK,
}

CONFIGS = {
    "deepseek-v2-lite": config(
        "DeepseekV2ForCausalLM", 2048, 27, 102400, 16, context=163840, **mla(q_lora_rank=None),
        intermediate_size=10944, moe_intermediate_size=1408, n_routed_experts=64, n_shared_experts=2,
        num_experts_per_tok=6, first_k_dense_replace=1, moe_layer_freq=1, n_group=1, topk_group=1,
        topk_method="greedy", scoring_func="softmax", norm_topk_prob=False, routed_scaling_factor=1.0,
    ),
    "deepseek-v2": config(
        "DeepseekV2ForCausalLM", 5120, 60, 102400, 128, context=163840, **mla(q_lora_rank=1536),
        intermediate_size=12288, moe_intermediate_size=1536, n_routed_experts=160, n_shared_experts=2,
        num_experts_per_tok=6, first_k_dense_replace=1, moe_layer_freq=1, n_group=8, topk_group=3,
        topk_method="group_limited_greedy", scoring_func="softmax", norm_topk_prob=False, routed_scaling_factor=16.0,
    ),
    "deepseek-v3": config(
        "DeepseekV3ForCausalLM", 7168, 61, 129280, 128, context=163840, **mla(q_lora_rank=1536), **V3_KEYS,
        num_nextn_predict_layers=1,
    ),
    "kimi-k2": config(
        "DeepseekV3ForCausalLM", 7168, 61, 163840, 64, context=131072, **mla(q_lora_rank=1536),
        **V3_KEYS | {"n_routed_experts": 384, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
                     "routed_scaling_factor": 2.827},
    ),
    "deepseek-moe-16b": config(
        "DeepseekForCausalLM", 2048, 28, 102400, 16, context=4096, intermediate_size=10944,
        moe_intermediate_size=1408, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6,
        first_k_dense_replace=1, moe_layer_freq=1, norm_topk_prob=False, scoring_func="softmax",
    ),
    "mixtral-8x7b": config(
        "MixtralForCausalLM", 4096, 32, 32000, 32, 8, 32768, intermediate_size=14336, num_local_experts=8,
        num_experts_per_tok=2, sliding_window=None,
    ),
    "qwen1.5-moe-a2.7b": config(
        "Qwen2MoeForCausalLM", 2048, 24, 151936, 16, 16, 8192, intermediate_size=5632, moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632, num_experts=60, num_experts_per_tok=4, decoder_sparse_step=1,
        norm_topk_prob=False, use_sliding_window=False, sliding_window=32768, max_window_layers=21,
    ),
    "qwen3-30b-a3b": config(
        "Qwen3MoeForCausalLM", 2048, 48, 151936, 32, 4, 40960, head_dim=128, intermediate_size=6144,
        moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, decoder_sparse_step=1, mlp_only_layers=[],
        norm_topk_prob=True, attention_bias=False, sliding_window=None, use_sliding_window=False,
    ),
    "olmoe-1b-7b": config(
        "OlmoeForCausalLM", 2048, 16, 50304, 16, 16, 4096, intermediate_size=1024, num_experts=64,
        num_experts_per_tok=8, norm_topk_prob=False, attention_bias=False,
    ),
    "gpt-oss-20b": config(
        "GptOssForCausalLM", 2880, 24, 201088, 64, 8, 131072, head_dim=64, intermediate_size=2880,
        num_local_experts=32, num_experts_per_tok=4, attention_bias=True, sliding_window=128,
        layer_types=["sliding_attention", "full_attention"] * 12, quantization_config={"quant_method": "mxfp4"},
    ),
    "glm-4.5": config(
        "Glm4MoeForCausalLM", 5120, 92, 151552, 96, 8, 131072, head_dim=128, intermediate_size=12288,
        moe_intermediate_size=1536, n_routed_experts=160, n_shared_experts=1, num_experts_per_tok=8,
        first_k_dense_replace=3, n_group=1, topk_group=1, norm_topk_prob=True, routed_scaling_factor=2.5,
        attention_bias=True, use_qk_norm=True, num_nextn_predict_layers=1,
    ),
    "minimax-m2": config(
        "MiniMaxM2ForCausalLM", 3072, 62, 200064, 48, 8, 196608, head_dim=128, intermediate_size=1536,
        num_local_experts=256, num_experts_per_tok=8, scoring_func="sigmoid", use_routing_bias=True,
        use_qk_norm=True, qk_norm_type="per_layer", quantization_config=FP8_BLOCK,
    ),
    "llama-3.1-8b": config(
        "LlamaForCausalLM", 4096, 32, 128256, 32, 8, 131072, intermediate_size=14336, attention_bias=False,
        mlp_bias=False, tie_word_embeddings=False,
    ),
    "qwen2.5-7b": config(
        "Qwen2ForCausalLM", 3584, 28, 152064, 28, 4, 32768, intermediate_size=18944, use_sliding_window=False,
        sliding_window=131072, max_window_layers=28,
    ),
    "qwen3-14b": config(
        "Qwen3ForCausalLM", 5120, 40, 151936, 40, 8, 40960, head_dim=128, intermediate_size=17408,
        attention_bias=False, sliding_window=None, use_sliding_window=False, max_window_layers=40,
    ),
    "mistral-nemo-12b": config(
        "MistralForCausalLM", 5120, 40, 131072, 32, 8, 131072, head_dim=128, intermediate_size=14336,
        sliding_window=None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_config_gives_the_shipped_preset(name):
    preset = load_model(name)
    same = {"source": preset.source, "published": preset.published}
    assert model_from_hf(CONFIGS[name], preset.name).vary(**same) == preset


@pytest.mark.parametrize("name", ["llama-4-scout", "llama-4-maverick"])
def test_llama_4_is_read_from_the_text_part_of_a_multimodal_config(name):
    experts, step = (16, 1) if name == "llama-4-scout" else (128, 2)
    text = config(
        "", 5120, 48, 202048, 40, 8, 10485760 if step == 1 else 1048576, head_dim=128, intermediate_size=8192,
        intermediate_size_mlp=16384, num_local_experts=experts, num_experts_per_tok=1, interleave_moe_layer_step=step,
        attention_chunk_size=8192, attention_bias=False,
    )  # fmt: skip
    del text["architectures"]
    whole = {"architectures": ["Llama4ForConditionalGeneration"], "torch_dtype": "bfloat16", "text_config": text}
    preset = load_model(name)
    same = {"source": preset.source, "published": preset.published}
    assert model_from_hf(whole, preset.name).vary(**same) == preset


def test_head_width_is_read_and_not_derived():
    assert model_from_hf(CONFIGS["qwen3-30b-a3b"], "x").attention.head_dim == 128  # 2048 / 32 would be 64


def test_sparse_steps_and_listed_dense_layers_are_honoured():
    changed = {**CONFIGS["qwen3-30b-a3b"], "decoder_sparse_step": 2, "mlp_only_layers": [1, 3]}
    model = model_from_hf(changed, "x")
    assert model.moe_layers == 22
    assert model.dense_inter_size == 6144


def test_layer_frequency_counts_from_the_first_layer():
    changed = {**CONFIGS["deepseek-v3"], "moe_layer_freq": 2}
    assert model_from_hf(changed, "x").moe_layers == 29  # layers 4, 6 ... 60


def test_tied_tables_and_windows_are_honoured():
    tied = model_from_hf({**CONFIGS["llama-3.1-8b"], "tie_word_embeddings": True}, "x")
    assert tied.tied_embeddings
    windowed = model_from_hf({**CONFIGS["mistral-nemo-12b"], "sliding_window": 4096}, "x").attention
    assert (windowed.sliding_window, windowed.windowed_layers) == (4096, 40)
    qwen = {**CONFIGS["qwen2.5-7b"], "use_sliding_window": True, "max_window_layers": 20}
    assert model_from_hf(qwen, "x").attention.windowed_layers == 8


@pytest.mark.parametrize(
    ("quantised", "precision"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8_block"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "awq", "bits": 4}, "int4"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "group_size": 32}}},
            },
            "int4_g32",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}},
            },
            "fp8",
        ),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
    ],
)
def test_quantisation_of_the_checkpoint_becomes_its_native_precision(quantised, precision):
    assert (
        model_from_hf({**CONFIGS["llama-3.1-8b"], "quantization_config": quantised}, "x").native_precision == precision
    )


def test_an_unknown_quantisation_is_refused():
    with pytest.raises(SpecError, match=r"quant_method 'aqlm' is not known.*fp8_block"):
        model_from_hf({**CONFIGS["llama-3.1-8b"], "quantization_config": {"quant_method": "aqlm"}}, "x")


@pytest.mark.parametrize("architecture", ["MambaForCausalLM", "Qwen3NextForCausalLM", "DeepseekV32ForCausalLM"])
def test_an_unsupported_architecture_is_refused_with_the_supported_ones(architecture):
    with pytest.raises(SpecError) as caught:
        model_from_hf({"architectures": [architecture]}, "x")
    assert architecture in str(caught.value)
    assert all(known in str(caught.value) for known in READERS)


def test_a_missing_shape_is_named():
    broken = {key: value for key, value in CONFIGS["deepseek-v3"].items() if key != "moe_intermediate_size"}
    with pytest.raises(SpecError, match="moe_intermediate_size: missing"):
        model_from_hf(broken, "x")


@pytest.mark.parametrize(
    ("architecture", "attends"),
    [("GlmMoeDsaForCausalLM", "DeepSeek sparse attention"), ("Qwen3_5MoeForConditionalGeneration", "Gated DeltaNet")],
)
def test_attention_that_is_not_modelled_is_named(simmoe, tmp_path, architecture, attends):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture], "hidden_size": 6144}))
    status, out, err = simmoe("predict", "h100", "--model", "config.json")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert f"config.json: architectures: {architecture!r} is not supported (it attends " in err
    assert attends in err
