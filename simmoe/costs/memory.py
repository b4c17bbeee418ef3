"""Memory of one device: weights, workspace and KV cache. Whether that fits is asked in `costs.device_fit`.

Model: weights follow exactly from shapes, layout and number formats. The engine may use ``memory_fraction`` of the
device; what weights and workspace leave of it is the KV cache. The workspace is an estimate (see `workspace_bytes`).
Left out: fragmentation, prefix sharing, host offload, weights padded to tiles, a drafter's workspace.
Checked in tests/test_memory.py: weights by hand, KV capacity against what vLLM logged (validate/vllm_showdown).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from simmoe.costs.layout import active_and_pool
from simmoe.costs.pipeline import Stage, stages
from simmoe.costs.precision import precision_of
from simmoe.costs.speculation import drafter, projection_parameters
from simmoe.costs.work import kv_elements_per_token, parameters
from simmoe.specs.deployment import BYTES_PER_ELEMENT, Deployment
from simmoe.specs.hardware import Hardware
from simmoe.specs.model import Model

#: Held by the CUDA context and loaded kernels [B]; assumption, as commonly seen in nvidia-smi on an idle process.
CONTEXT_BYTES = 0.5e9
#: Communication buffers of two devices, and of more [B]; source: ai-dynamo/aiconfigurator system files.
NCCL_BYTES = (0.36e9, 0.41e9)
#: Experts that pass through the device while others compute, where experts are offloaded (streaming: two layers of
#: them); assumption.
OFFLOAD_BUFFER_EXPERTS = 2
#: Largest expanded prefix MLA prefill works on at once [tokens]; source: vllm/v1/attention/backends/mla/common.py.
MLA_PREFIX_TOKENS = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFootprint:
    """Memory of the fullest device of a replica.

    Attributes
    ----------
    weights : weights it holds. [B]
    workspace : context, communication buffers, activations. [B]
    kv_bytes_per_token : KV cache of one token there. [B]
    usable : what the engine may use of the device. [B]
    kv_bytes : what is left for the KV cache. [B]
    kv_tokens_per_rank : tokens that one data-parallel rank's cache holds, whole blocks only. [tokens]
    kv_tokens : the same over all data-parallel ranks of a replica. [tokens]
    """

    weights: float
    workspace: float
    kv_bytes_per_token: float
    usable: float
    kv_bytes: float
    kv_tokens_per_rank: int
    kv_tokens: int


def weights_per_device_bytes(model: Model, deployment: Deployment) -> float:
    """Weights of the fullest device. [B]

    Tensor parallelism splits attention by heads (kv heads until one is left), plain FFNs, shared experts and the
    vocabulary; norms, routers and MLA's down-projections are on every rank. Routed experts are spread over ``ep``
    ranks, or sliced over ``tp x dp`` if ep is 1. Data-parallel ranks repeat the rest; with dp and ep above 1 the shared
    experts are whole on every rank. Of pipeline stages (`costs.pipeline.stages`) the fullest
    counts. What drafts tokens is held beside: a prediction layer, which shares embedding and head, or a whole model.
    """
    d = deployment
    total = max(_stage_bytes(model, d, stage) for stage in stages(model, d.pp))
    if (found := drafter(model, d)) is not None:
        small, layout = found
        ends = d.speculative is not None and d.speculative.method == "draft"
        total += _stage_bytes(small, layout, replace(stages(small, 1)[0], embeds=ends, samples=ends))
        total += projection_parameters(model, d) * precision_of(model, d).plain.weight_bytes
    return total


def _stage_bytes(model: Model, d: Deployment, stage: Stage) -> float:
    """Weights of one pipeline stage on one device. [B]"""
    count = parameters(model, total_experts=d.total_experts)
    formats = precision_of(model, d)
    tp = d.tp_size
    layers, moe_layers = stage.layers, stage.moe_layers
    attention = count.attention_layer
    split = attention.by_heads / tp + attention.by_kv_heads / min(tp, model.attention.kv_heads)
    experts_held = (count.num_experts + d.routing.redundant_experts) / (d.ep * d.expert_shards)
    if d.offload is not None:
        passing = 2 * experts_held if d.offload.policy == "stream" else OFFLOAD_BUFFER_EXPERTS
        resident = d.offload.cached_experts / d.expert_shards
        experts_held = min(experts_held, resident + passing / max(moe_layers, 1))
    shared = count.shared_layer / (1 if d.shared_whole else tp)
    norms = layers * count.norms_layer + stage.samples * count.final_norm
    plain_elements = norms + moe_layers * count.router_layer
    # a head that shares the embedding's table needs it in the last stage too
    head = count.head or (0 if stage.embeds else count.embedding)
    table = (stage.embeds * count.embedding + stage.samples * head) / tp
    dense_elements = (
        (0 if d.wide_attention else layers * (split + attention.replicated))
        + stage.dense_layers * count.dense_ffn_layer / tp
        + moe_layers * shared
    )
    before = 0.0
    if (stack := model.encoder_stack) is not None:  # no table of its own, but cross-attention in every decoder layer
        table_bytes = table * formats.plain.weight_bytes
        across = layers * (split + attention.replicated) * formats.dense.weight_bytes
        before = weights_per_device_bytes(stack, d) - table_bytes + across
    return (
        before
        + dense_elements * formats.dense.weight_bytes
        + (layers * (split + attention.replicated) * formats.plain.weight_bytes if d.wide_attention else 0.0)
        + moe_layers * experts_held * count.routed_expert * formats.experts.weight_bytes
        + (plain_elements + table) * formats.plain.weight_bytes
    )


def model_bytes(model: Model, deployment: Deployment) -> float:
    """Weights of one copy of the whole model in the deployment's number formats. [B]"""
    whole = deployment.vary(gpus=1, tp=1, ep=1, dp=1, pp=1, speculative=None)
    return weights_per_device_bytes(model, whole)


def workspace_bytes(model: Model, deployment: Deployment) -> float:
    """Memory beside weights and KV cache on one device. An estimate. [B]

    Context and communication buffers are constants with their sources above. Activations are those of one step of
    ``max_num_batched_tokens``: residual and normalised hidden states, the widest FFN or the (token, expert) rows of
    a MoE layer, and logits (16 and 32 bits, sorted, with their order) of ``max_num_seqs`` samples. MLA engines also
    keep the key and value up-projections a second time in bf16 to absorb them, and expand up to `MLA_PREFIX_TOKENS`
    of a cached prefix (vllm/v1/attention/backends/mla/common.py).
    """
    d, a = deployment, model.attention
    tp, tokens = d.tp_size, d.max_num_batched_tokens
    hidden_rows, mask = 4 * tokens * model.hidden, 0.0
    heads = -(-a.heads // tp)
    attention_rows = 2 * tokens * heads * (a.head_dim + a.v_head_dim)
    ffn_rows = 3 * tokens * model.dense_inter_size / tp
    if (e := model.experts) is not None:
        k, _ = active_and_pool(model, d)
        rows = tokens * k * d.dp / d.ep
        if d.dispatch.capped:
            rows *= d.dispatch.capacity_factor
        if d.dispatch.kind == "einsum":  # gate weights and mask of every token and slot, fp32 and 16 bits
            mask = (4 + 2) * tokens * tokens * k * d.dispatch.capacity_factor
        ffn_rows = max(ffn_rows, rows * (e.matrices * e.inter_size / d.expert_shards + model.hidden))
    activations = 2.0 * (hidden_rows + max(attention_rows, ffn_rows))
    logits = d.max_num_seqs * model.vocab * (2 + 4 + 4 + 8)  # bf16, fp32, sorted fp32, int64 order
    devices = d.devices_per_replica
    fixed = CONTEXT_BYTES + (0.0 if devices == 1 else NCCL_BYTES[devices > 2])
    return fixed + activations + mask + logits + (_mla_extra_bytes(model, d) if a.kind == "mla" else 0.0)


def _mla_extra_bytes(model: Model, deployment: Deployment) -> float:
    a = model.attention
    heads = -(-a.heads // deployment.tp_size)
    widths = heads * (a.qk_nope_head_dim + a.v_head_dim)
    layers = -(-model.layers // deployment.pp)
    absorbed_copy = layers * int(a.kv_lora_rank or 0) * widths
    prefix = min(MLA_PREFIX_TOKENS, 8 * deployment.max_num_batched_tokens) * (widths + a.kv_elements_per_token)
    return 2.0 * (absorbed_copy + prefix)


def kv_bytes_per_token(model: Model, deployment: Deployment) -> float:
    """KV cache of one token on one device, all its layers and the drafter's, before any window is full. [B]

    Behind an encoder, a decoder layer keeps the prompt's keys and values for cross-attention and the answer's own: one
    pair a token all the same.
    """
    layers = -(-model.layers // deployment.pp)
    elements = layers * kv_elements_per_token(model.attention, deployment.tp_size)
    if (found := drafter(model, deployment)) is not None:
        small, layout = found
        elements += small.layers * kv_elements_per_token(small.attention, layout.tp_size)
    return elements * BYTES_PER_ELEMENT[deployment.kv_precision]


def kv_bytes_per_request(model: Model, deployment: Deployment, context_tokens: float) -> float:
    """KV cache of one request on one device: windowed layers keep at most their window. [B]"""
    a = model.attention
    per_token = kv_bytes_per_token(model, deployment)
    if not a.windowed_layers or a.sliding_window is None:
        return per_token * context_tokens
    windowed = a.windowed_layers / model.layers
    return per_token * ((1 - windowed) * context_tokens + windowed * min(context_tokens, float(a.sliding_window)))


def counted(
    model: Model, deployment: Deployment, hardware: Hardware, context_tokens: float | None = None
) -> MemoryFootprint:
    """Memory of a deployment on a device, whether it fits or not: then ``kv_tokens`` is 0.

    ``context_tokens``: typical tokens of a request in cache; with it, windowed layers are counted at their window.
    None: every layer keeps every token.
    """
    d = deployment
    weights, workspace = weights_per_device_bytes(model, d), workspace_bytes(model, d)
    usable = hardware.device.memory * d.memory_fraction
    free = {
        # vllm: what the fraction leaves after weights and a profiled step
        "vllm": usable - weights - workspace,
        # sglang: mem_fraction_static covers weights and cache; activations come out of the rest
        "sglang": min(usable - weights, hardware.device.memory - weights - workspace),
        # trtllm: the fraction is of what weights and activations leave free
        "trtllm": d.memory_fraction * (hardware.device.memory - weights - workspace),
    }.get(d.engine, usable - weights - workspace)
    per_token = kv_bytes_per_token(model, d)
    if context_tokens:
        per_token = kv_bytes_per_request(model, d, context_tokens) / context_tokens
    blocks = max(0, int(free / (per_token * d.kv_block_size)))
    if d.kv_blocks is not None and free > 0:
        blocks = d.kv_blocks
    tokens = blocks * d.kv_block_size
    return MemoryFootprint(
        weights=weights,
        workspace=workspace,
        kv_bytes_per_token=per_token,
        usable=usable,
        kv_bytes=max(0.0, free),
        kv_tokens_per_rank=tokens,
        kv_tokens=tokens * d.dp,
    )
