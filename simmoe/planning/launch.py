"""Command lines that start a planned layout in vLLM and in SGLang.

Flags as in vLLM 0.10+ (docs: "Engine arguments", "Expert parallel deployment") and SGLang 0.5+ (docs: "Server
arguments"). In vLLM the experts of an expert-parallel engine spread over tp x dp ranks; SGLang counts all devices of
an engine as tp and splits attention into dp groups, and its limits are over all groups. Weights of 8 bits are quantised
on loading where the checkpoint has others; any other number format needs a checkpoint in it, which is said. Left out:
network addresses, which every node has to be given, and the replicas' router. Prefill and decode apart: vLLM hands the
cache over with its NIXL connector (docs: "Disaggregated prefilling"), where the proxy before them tells producer from
consumer; SGLang with ``--disaggregation-mode`` (docs: "PD disaggregation"). Not run here.
"""

from __future__ import annotations

import json
import re
import shlex

from simmoe.specs.deployment import Deployment
from simmoe.specs.engines import exchange_algorithm
from simmoe.specs.hardware import Hardware
from simmoe.specs.model import Model

#: number formats that both engines can quantise to while they load a checkpoint
_ON_LOADING = {"fp8": "fp8"}
_SGLANG_ALGORITHMS = {"mtp": "EAGLE", "draft": "STANDALONE", "ngram": "NGRAM"}


def vllm(model: Model, replica: Deployment, hardware: Hardware, role: str = "serve") -> str:
    """Command that starts one replica in vLLM; on several nodes, what each node is given beside it is in a comment.

    ``role``: "serve", or "prefill" and "decode" apart.
    """
    d = replica
    words: list[str | int] = ["vllm", "serve", model_id(model), "--tensor-parallel-size", d.tp_size]
    if d.pp > 1:
        words += ["--pipeline-parallel-size", d.pp]
    if d.dp > 1:
        words += ["--data-parallel-size", d.dp]
        if d.devices_per_replica > hardware.devices_per_node:
            words += ["--data-parallel-size-local", max(1, hardware.devices_per_node // d.tp_size)]
    elif (nodes := _nodes(d, hardware)) > 1:
        words += ["--nnodes", nodes]
    if d.ep > 1:
        words += ["--enable-expert-parallel"]
        if d.dp > 1 and (way := exchange_algorithm(d)).startswith("deepep"):
            bulk = way == "deepep_normal" or (way == "deepep" and role == "prefill")
            words += ["--all2all-backend", "deepep_high_throughput" if bulk else "deepep_low_latency"]
    words += ["--max-num-seqs", d.max_num_seqs, "--max-num-batched-tokens", d.max_num_batched_tokens]
    words += ["--gpu-memory-utilization", f"{d.memory_fraction:g}", "--block-size", d.kv_block_size]
    words += _quantised(model, d)
    if d.kv_precision == "fp8":
        words += ["--kv-cache-dtype", "fp8"]
    if (chosen := d.speculative) is not None:
        config: dict[str, str | int] = {"num_speculative_tokens": chosen.draft_tokens}
        config |= {"model": chosen.draft_model} if chosen.draft_model else {"method": chosen.method}
        words += ["--speculative-config", json.dumps(config)]
    if (changed := _overrides(model, d)) is not None:
        words += ["--hf-overrides", changed]
    if role != "serve":
        words += ["--kv-transfer-config", json.dumps({"kv_connector": "NixlConnector", "kv_role": "kv_both"})]
    rank, address = (
        ("--data-parallel-start-rank", "--data-parallel-address") if d.dp > 1 else ("--node-rank", "--master-addr")
    )
    beside = f"{address} and {rank}, all but the first --headless"
    return _line(words) + _remarks(model, d, hardware, beside)


def sglang(model: Model, replica: Deployment, hardware: Hardware, role: str = "serve") -> str:
    """Command that starts one replica in SGLang; ``role`` as for vLLM."""
    d = replica
    words: list[str | int] = [
        "python",
        "-m",
        "sglang.launch_server",
        "--model-path",
        model_id(model),
        "--tp-size",
        d.tp_size * d.dp,
    ]
    if d.pp > 1:
        words += ["--pp-size", d.pp]
    if d.dp > 1:
        words += ["--dp-size", d.dp, "--enable-dp-attention"]
    if d.ep > 1:
        words += ["--ep-size", d.ep]
        if d.dp > 1:
            words += ["--moe-a2a-backend", "deepep"]
    words += [
        "--max-running-requests",
        d.requests_per_replica,
        "--chunked-prefill-size",
        d.max_num_batched_tokens * d.dp,
    ]
    words += ["--mem-fraction-static", f"{d.memory_fraction:g}"]
    words += _quantised(model, d)
    if d.kv_precision == "fp8":
        words += ["--kv-cache-dtype", "fp8_e4m3"]
    if (chosen := d.speculative) is not None:
        words += ["--speculative-algorithm", _SGLANG_ALGORITHMS[chosen.method]]
        words += ["--speculative-num-draft-tokens", chosen.draft_tokens + (chosen.method != "ngram")]
        if chosen.method != "ngram":
            words += ["--speculative-num-steps", chosen.draft_tokens, "--speculative-eagle-topk", 1]
        if chosen.draft_model:
            words += ["--speculative-draft-model-path", chosen.draft_model]
    if (changed := _overrides(model, d)) is not None:
        words += ["--json-model-override-args", changed]
    if role != "serve":
        words += ["--disaggregation-mode", role]
    if (nodes := _nodes(d, hardware)) > 1:
        words += ["--nnodes", nodes]
    return _line(words) + _remarks(model, d, hardware, "--dist-init-addr and --node-rank")


def model_id(model: Model) -> str:
    """The repository its shapes were read from, where the preset says; else its name."""
    stated = re.search(r"config\.json of ([\w.-]+/[\w.-]+)", model.source)
    return stated.group(1) if stated else model.name


def _overrides(model: Model, deployment: Deployment) -> str | None:
    if model.experts is None or deployment.active_experts in (None, model.experts.top_k):
        return None
    return json.dumps({"num_experts_per_tok": deployment.active_experts})


def _nodes(deployment: Deployment, hardware: Hardware) -> int:
    return -(-deployment.devices_per_replica // hardware.devices_per_node)


def _format(model: Model, deployment: Deployment) -> str | None:
    """Number format of the weights where it is not the checkpoint's."""
    wanted = deployment.weight_precision
    return wanted if wanted not in (None, model.native_precision) else None


def _quantised(model: Model, deployment: Deployment) -> list[str | int]:
    wanted = _format(model, deployment)
    return ["--quantization", _ON_LOADING[wanted]] if wanted in _ON_LOADING else []


def _remarks(model: Model, deployment: Deployment, hardware: Hardware, beside: str) -> str:
    wanted, nodes = _format(model, deployment), _nodes(deployment, hardware)
    said = [f"needs a checkpoint in {wanted}"] if wanted is not None and wanted not in _ON_LOADING else []
    said += [f"on each of {nodes} nodes, with {beside}"] if nodes > 1 else []
    return f"   # {'; '.join(said)}" if said else ""


def _line(words: list[str | int]) -> str:
    return shlex.join(str(word) for word in words)
