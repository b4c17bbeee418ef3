"""Counting: FLOPs and bytes by hand, by brute force, and against torch's tensors."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simmoe.costs import work
from simmoe.costs.work import Work, attended_pairs, attention_work, experts_work, gemm_work, parameters
from simmoe.specs.load import load_model
from simmoe.specs.model import Attention, Experts, Model

GQA = Attention(kind="gqa", heads=32, kv_heads=4, head_dim=128, v_head_dim=128)
MLA = load_model("deepseek-v3").attention


@given(st.integers(1, 40), st.integers(0, 40), st.none() | st.integers(1, 50))
def test_attended_pairs_equal_a_count_of_the_causal_mask(new, cached, window):
    pairs = sum(
        1 for query in range(cached, cached + new) for key in range(query + 1) if window is None or query - key < window
    )
    assert attended_pairs(new, cached, window) == pairs


def test_gemm_by_hand():
    assert gemm_work(4, 8, 16, weight_bytes=2, activation_bytes=2) == Work(1024, 2 * (8 * 16 + 4 * 16 + 4 * 8))


def test_experts_by_hand():
    # Qwen3-30B-A3B: 100 tokens, 8 experts each, 90 experts awake; an expert is 3 x 2048 x 768 = 4,718,592 elements
    experts = load_model("qwen3-30b-a3b").experts
    done = experts_work(experts, 2048, routed_pairs=800, active_experts=90, weight_bytes=2, activation_bytes=2)
    assert done.flop == 2 * 800 * 4_718_592
    assert done.bytes == 90 * 4_718_592 * 2 + 800 * (2 * 2048 + 3 * 768) * 2


def test_tensor_slices_of_experts_add_up_to_the_whole_but_for_activations():
    experts = Experts(num_experts=8, top_k=2, inter_size=64)
    args = {"routed_pairs": 10, "active_experts": 4, "weight_bytes": 2, "activation_bytes": 0}
    whole, slice_ = experts_work(experts, 32, **args), experts_work(experts, 32, shards=4, **args)
    assert slice_.flop * 4 == whole.flop
    assert slice_.bytes * 4 == whole.bytes


def test_gqa_decode_by_hand():
    # one new token on 999 cached: 1000 pairs of 256 elements in 32 heads; 4 kv heads of 256 elements cached
    done = attention_work(GQA, new_tokens=1, cached_tokens=999, kv_bytes=2, activation_bytes=2)
    assert done.flop == 2 * 1000 * 32 * 256
    assert done.bytes == 32 * 256 * 2 + (1000 + 1) * 4 * 256 * 2


def test_absorbed_mla_decode_reads_the_latent_once_for_all_heads():
    done = attention_work(MLA, new_tokens=1, cached_tokens=999, absorbed=True, kv_bytes=2, activation_bytes=2)
    assert done.flop == 2 * 1000 * 128 * (576 + 512)
    assert done.bytes == (1000 + 1) * 576 * 2 + 128 * (576 + 512) * 2


def test_absorbing_costs_prefill_3_4_times_the_flops():
    args = {"new_tokens": 2048, "kv_bytes": 2, "activation_bytes": 2}
    ratio = attention_work(MLA, absorbed=True, **args).flop / attention_work(MLA, **args).flop
    assert ratio == (576 + 512) / (192 + 128)


def test_chunked_prefill_does_the_flops_of_the_whole():
    whole = attention_work(GQA, new_tokens=100, kv_bytes=2, activation_bytes=2)
    chunks = [
        attention_work(GQA, new_tokens=25, cached_tokens=25 * i, kv_bytes=2, activation_bytes=2) for i in range(4)
    ]
    assert sum(chunk.flop for chunk in chunks) == whole.flop
    assert sum(chunk.bytes for chunk in chunks) > whole.bytes  # earlier keys and values are read again


def test_a_windowed_layer_reads_no_more_than_its_window():
    windowed = GQA.vary(sliding_window=128, windowed_layers=1)
    done = attention_work(windowed, new_tokens=1, cached_tokens=9999, windowed=True, kv_bytes=2, activation_bytes=0)
    assert done.flop == 2 * 128 * 32 * 256
    assert done.bytes == (128 + 1) * 4 * 256 * 2


@given(st.sampled_from([1, 2, 4, 8, 16, 32]))
def test_kv_heads_split_until_one_is_left_and_a_latent_never(tp):
    assert work.kv_elements_per_token(GQA, tp) == max(1, 4 // tp) * 256
    assert work.kv_elements_per_token(MLA, tp) == 576


@pytest.mark.parametrize(
    ("name", "bytes_per_token"),
    [
        ("deepseek-v2-lite", 31_104),
        ("deepseek-v2", 69_120),
        ("deepseek-v3", 70_272),
        ("mixtral-8x7b", 131_072),
        ("qwen3-30b-a3b", 98_304),
        ("gpt-oss-120b", 73_728),
        ("llama-3.1-70b", 327_680),
    ],
)
def test_kv_bytes_per_token_in_bf16(name, bytes_per_token):
    model = load_model(name)
    assert model.layers * work.kv_elements_per_token(model.attention) * 2 == bytes_per_token


@given(st.integers(1, 64), st.integers(1, 500), st.integers(1, 500))
def test_work_grows_with_every_dimension(m, n, k):
    small = gemm_work(m, n, k, weight_bytes=2, activation_bytes=2)
    for grown in ((m + 1, n, k), (m, n + 1, k), (m, n, k + 1)):
        large = gemm_work(*grown, weight_bytes=2, activation_bytes=2)
        assert large.flop > small.flop
        assert large.bytes > small.bytes


def test_dense_forward_flops_are_twice_the_parameters_but_for_the_table():
    model = load_model("llama-2-7b")
    count = parameters(model)
    heads, width = model.attention.heads * 128, model.hidden
    products = [(3 * heads, width), (width, heads), (2 * 11008, width), (width, 11008)]
    layer = sum((gemm_work(1, n, k, weight_bytes=2, activation_bytes=0) for n, k in products), Work(0, 0))
    head = gemm_work(1, model.vocab, width, weight_bytes=2, activation_bytes=0)
    matrices = count.total - count.embedding - count.final_norm - 32 * count.norms_layer
    assert 32 * layer.flop + head.flop == 2 * matrices
    assert 32 * layer.bytes + head.bytes == 2 * matrices


SMALL = {"hidden": st.integers(8, 64), "layers": st.integers(1, 3), "vocab": st.integers(10, 200)}


@settings(deadline=None, max_examples=20)
@given(
    **SMALL,
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    head_dim=st.sampled_from([4, 8]),
    experts=st.integers(2, 5),
    tied=st.booleans(),
)
def test_counts_equal_the_tensors_of_a_transformer_built_in_torch(
    hidden, layers, vocab, kv_heads, groups, head_dim, experts, tied
):
    nn = pytest.importorskip("torch").nn
    heads = kv_heads * groups
    model = Model(
        name="small",
        hidden=hidden,
        layers=layers,
        vocab=vocab,
        attention=Attention(
            kind="gqa", heads=heads, kv_heads=kv_heads, head_dim=head_dim, v_head_dim=head_dim, qkv_bias=True
        ),
        moe_layers=layers,
        experts=Experts(
            num_experts=experts, top_k=2, inter_size=12, num_shared=1, shared_inter_size=16, shared_gate=True
        ),
        tied_embeddings=tied,
    )

    def linear(inputs, outputs, bias=False):
        return nn.Linear(inputs, outputs, bias=bias, device="meta")

    def ffn(width):
        return nn.ModuleList([linear(hidden, width), linear(hidden, width), linear(width, hidden)])

    def layer():
        return nn.ModuleList(
            [
                linear(hidden, heads * head_dim, bias=True),
                linear(hidden, kv_heads * head_dim, bias=True),
                linear(hidden, kv_heads * head_dim, bias=True),
                linear(heads * head_dim, hidden),
                linear(hidden, experts),
                *[ffn(12) for _ in range(experts)],
                ffn(16),
                linear(hidden, 1),
                nn.RMSNorm(hidden, device="meta"),
                nn.RMSNorm(hidden, device="meta"),
            ]
        )

    parts = [nn.Embedding(vocab, hidden, device="meta"), nn.RMSNorm(hidden, device="meta")]
    parts += [layer() for _ in range(layers)] + ([] if tied else [linear(hidden, vocab)])
    assert parameters(model).total == sum(p.numel() for p in nn.ModuleList(parts).parameters())
