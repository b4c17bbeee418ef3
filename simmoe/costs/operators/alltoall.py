"""Time of expert-parallel dispatch and combine (DeepEP kernels): tokens to the ranks of their experts, results back.

Model: latency plus the slower of two links. Normal (high-throughput) kernels send a token once to each rank that
holds one of its experts, and once to each other node on the way; low-latency kernels send one copy per expert chosen.
Experts are taken as chosen uniformly, or within a token's best groups. Inside a node the rate is bound by NVLink and by
the multiprocessors lent to the kernel; every copy also costs handling. Benchmarks that issue kernels from Python (vLLM,
TensorRT-LLM) take no less time than that: the device works meanwhile. vLLM's combine is issued while the device copies
the receive buffer, and shows only what of the host's time outlasts the copy. Defaults of what a multiprocessor moves
and of handling are what TensorRT-LLM's rows give for DeepEP's default chunks. Kernels and copy rules: DeepEP's README
(deepseek-ai/DeepEP). Multi-node totals hold the exchange of token counts that comes first (``notify``). A network that
the hardware describes (``fabric``) keeps its rate over any number of nodes; one that it does not loses what 8 nodes of
the benchmark lost. Left out: skewed routing, overlap with compute, other congestion. Compared with:
profiles/*/moe_alltoall_*.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from simmoe.costs.operators.base import Array, Features, Operator, Parameter, Parameters, soft_max
from simmoe.errors import CoverageError
from simmoe.routing.groups import nodes_per_token
from simmoe.specs.hardware import Hardware
from simmoe.specs.measurement import Table

DEFAULT_SMS = 20.0  # Buffer.num_sms in DeepEP
#: Bytes an element of fp8 takes on the wire: every 128 elements bring a scale of 32 bits (DeepEP, csrc/deep_ep.cpp).
FP8_BYTES = 1.0 + 4.0 / 128.0
#: The same of every format; nvfp4 sends a scale byte with every 16 elements.
DTYPE_BYTES = {"bfloat16": 2.0, "default": 2.0, "fp8": FP8_BYTES, "nvfp4": 0.5 + 1 / 16}
LOW_LATENCY = ("deepep_low_latency", "deepep_ll", "trtllm_deepep_ll", "deepep_v2_generation")
ROW_BYTES = 16384.0  # a bf16 row 8192 wide

PARAMETERS = (
    Parameter(name="alpha_s", unit="s", default=2e-5, lower=1e-6, upper=1e-3, meaning="fixed time inside a node"),
    Parameter(
        name="row_s", unit="s", default=2e-6, lower=1e-9, upper=1e-4, meaning="passing one row of 16 KiB through"
    ),
    Parameter(name="host_s", unit="s", default=3e-5, lower=1e-7, upper=1e-3, meaning="issuing the call from Python"),
    Parameter(name="expert_s", unit="s", default=1e-9, lower=1e-11, upper=1e-6, meaning="per expert in the model"),
    Parameter(name="link_efficiency", unit="-", default=0.6, lower=0.05, upper=1.0, meaning="of scale-up bandwidth"),
    Parameter(
        name="sm_bytes_per_s", unit="B/s", default=3.4e10, lower=5e8, upper=1e12, meaning="what one lent SM moves"
    ),
    Parameter(
        name="relay_work", unit="-", default=1.8, lower=0.5, upper=10.0, meaning="SM work across nodes over inside one"
    ),
    Parameter(
        name="copy_s", unit="s", default=2.5e-7, lower=1e-11, upper=5e-6, meaning="one SM handling one token copy"
    ),
    Parameter(name="fill_s", unit="s", default=5e-6, lower=1e-9, upper=2e-4, meaning="filling the pipeline of chunks"),
    Parameter(name="node_s", unit="s", default=1e-5, lower=1e-9, upper=1e-3, meaning="added by a second node"),
    Parameter(name="node_growth", unit="-", default=1.5, lower=0.2, upper=20.0, meaning="its ratio, 8 nodes over 2"),
    Parameter(
        name="network_efficiency", unit="-", default=0.85, lower=0.05, upper=1.0, meaning="of scale-out, 2 nodes"
    ),
    Parameter(name="network_gain", unit="-", default=0.8, lower=0.02, upper=2.0, meaning="its ratio, 8 nodes over 2"),
)
LINK_SHARPNESS = 4.0
HOST_SHARPNESS = 4.0
FILL_TOKENS = 64.0
COPY_EFFICIENCY = 0.85  # of memory bandwidth, a plain copy of megabytes; assumption


def seconds(features: Features, parameters: Parameters, hardware: Hardware, cold: bool) -> Array:
    """Predicted time; one rank: 0. [s]

    ``cold``: as an engine runs it, low-latency kernels replayed from a CUDA graph: nobody issues the call from Python.

    Raises
    ------
    CoverageError
        If several nodes are asked for and the hardware describes no network.
    """
    tokens, nodes, ranks = features["tokens"], features["nodes"], features["ranks"]
    row = features["hidden"] * features["bytes_per_element"]
    inside, outside = copies_per_token(features)
    local = np.maximum(ranks / nodes, 1.0 + 1e-9)
    sms = _sms(features, hardware)
    link = tokens * inside * row / (hardware.scale_up.bandwidth * parameters["link_efficiency"])
    # the multiprocessors also write the copies that stay on the rank, and read or write the token itself
    lent = tokens * (inside / (1.0 - 1.0 / local) + 1.0) * row / (sms * parameters["sm_bytes_per_s"])
    lent = lent * np.where((nodes > 1) & (features["low_latency"] == 0), parameters["relay_work"], 1.0)
    handling = tokens * (inside + outside + 1.0) * parameters["copy_s"] / sms
    busy = soft_max(link, lent, LINK_SHARPNESS) + handling
    if (nodes > 1).any():
        span = np.log2(np.maximum(nodes, 2.0) / 2.0) / 2.0
        # what the measured clusters lose over many nodes is theirs, and stands for a network that is not described
        lost = 1.0 if hardware.fabric is not None else parameters["network_gain"] ** span
        rate = _network(hardware) * parameters["network_efficiency"] * lost
        busy = soft_max(busy, tokens * outside * row / rate, LINK_SHARPNESS)
        busy = busy + np.where(nodes > 1, parameters["node_s"] * parameters["node_growth"] ** span, 0.0)
    fixed = parameters["alpha_s"] + parameters["row_s"] * row / ROW_BYTES
    fixed = fixed + parameters["expert_s"] * features["num_experts"]
    fill = parameters["fill_s"] * tokens / (tokens + FILL_TOKENS)
    # the host issues the call while the device still copies what stands before it
    ahead = tokens * features["copied_per_token"] / (COPY_EFFICIENCY * hardware.device.memory_bandwidth)
    replayed = (features["low_latency"] > 0) & cold
    host = np.where(replayed, 0.0, np.maximum(parameters["host_s"] - ahead, 0.0))
    time = soft_max(fixed + fill + busy, host, HOST_SHARPNESS)
    return np.where(ranks > 1, time, 0.0)


def roofline(features: Features, hardware: Hardware) -> Array:
    """Bytes over the data sheets' bandwidths, the links at work side by side, no latency. [s]"""
    row = features["hidden"] * features["bytes_per_element"] * features["tokens"]
    inside, outside = copies_per_token(features)
    time = inside * row / hardware.scale_up.bandwidth
    if (features["nodes"] > 1).any():
        time = np.maximum(time, outside * row / _network(hardware))
    return np.where(features["ranks"] > 1, time, 0.0)


def _sms(features: Features, hardware: Hardware) -> Array:
    """Multiprocessors at work: low-latency kernels give each whole experts, normal ones are lent some. [-]"""
    # one group of warps an expert, spread over the SMs: DeepEP, internode_ll.cu, launch of dispatch and combine
    device = max(hardware.device.sms, 1)
    experts = features["num_experts"]
    groups = np.ceil(experts / device)
    return np.where(
        features["sms"] > 0, features["sms"], np.where(features["low_latency"] > 0, experts / groups, device)
    )


def copies_per_token(features: Features) -> tuple[Array, Array]:
    """Mean copies of a token that cross the node's own links, and that leave the node. [-]

    Low latency: k copies, spread evenly over the ranks. Normal: one copy per rank hit (over the node's links, also
    where it arrives from another node), one per other node hit.
    """
    ranks, nodes, top_k = features["ranks"], features["nodes"], features["top_k"]
    local = ranks / nodes
    experts = features["num_experts"]
    per_expert_in, per_expert_out = top_k * (local - 1.0) / ranks, top_k * (ranks - local) / ranks
    ranks_hit = ranks * _chance_hit(experts, experts / ranks, top_k)
    once_in = ranks_hit * features["rank_share"] * (local - 1.0) / local
    once_out = (nodes - 1.0) * _chance_hit(experts, experts / nodes, top_k) * features["node_share"]
    quick = features["low_latency"] > 0
    return np.where(quick, per_expert_in, once_in), np.where(quick, per_expert_out, once_out)


def _chance_hit(experts: Array, held: Array, top_k: Array) -> Array:
    """Chance that k distinct experts drawn uniformly include one of ``held``: hypergeometric. [-]

    A k between two whole numbers is that mixture of them.
    """
    missed = np.ones(np.shape(experts))
    for draw in range(int(np.ceil(np.max(top_k, initial=0)))):
        left = np.maximum(experts - draw, 1.0)
        drawn = np.clip(top_k - draw, 0.0, 1.0)
        missed = missed * (1.0 - drawn + drawn * np.clip((left - held) / left, 0.0, 1.0))
    return np.asarray(1.0 - missed, dtype=np.float64)


def _network(hardware: Hardware) -> float:
    if hardware.scale_out is None:
        raise CoverageError(
            f"{hardware.name}: expert parallelism over several nodes, but no scale_out link is described"
        )
    # ranks talk to those of their own index on other nodes: few flows, which share the core of an oversubscribed tree
    return hardware.scale_out.bandwidth / (hardware.fabric.oversubscription if hardware.fabric else 1.0)


def features_of(
    *,
    kernel: str,
    phase: str,
    tokens_per_rank: ArrayLike,
    hidden: ArrayLike,
    top_k: ArrayLike,
    num_experts: ArrayLike,
    ranks: ArrayLike,
    nodes: ArrayLike = 1.0,
    bytes_per_element: ArrayLike | None = None,
    sms: ArrayLike | None = None,
    node_share: ArrayLike = 1.0,
    rank_share: ArrayLike = 1.0,
    copied_per_token: ArrayLike = 0.0,
) -> Features:
    """Features of one exchange; everything broadcasts.

    Parameters
    ----------
    kernel : str
        A kernel of ``LOW_LATENCY``, or any other name for the normal, deduplicating kind.
    phase : str
        ``dispatch`` or ``combine``; sets the default width only: 1 byte out (fp8), 2 bytes back (bf16).
    tokens_per_rank, hidden, top_k, num_experts, ranks, nodes : array_like
        Tokens each rank holds before dispatch, model width, experts per token, experts in all, group size, nodes.
    bytes_per_element : array_like, optional
        On the wire. [B]
    sms : array_like, optional
        Multiprocessors lent to the kernel; 0: all. Default 20 for normal kernels, 0 for low latency.
    node_share : array_like
        Other nodes a token goes to, over those in the benchmark. DeepEP's takes the best 4 nodes: combines measured
        over 8 nodes would pass the network's rate if tokens went to all they could. [-]
    rank_share : array_like
        Ranks a token goes to, over those it would reach if it could choose any expert. [-]
    copied_per_token : array_like
        What the device still copies while the call is issued, read and written; benchmarks only. [B]
    """
    quick = kernel in LOW_LATENCY
    width = bytes_per_element if bytes_per_element is not None else (FP8_BYTES if phase == "dispatch" else 2.0)
    lent = sms if sms is not None else (0.0 if quick else DEFAULT_SMS)
    return _build(
        tokens_per_rank, hidden, top_k, num_experts, ranks, nodes, width, lent, 1.0 if quick else 0.0, node_share,
        rank_share, copied_per_token,
    )  # fmt: skip


def _build(*columns: ArrayLike) -> Features:
    names = (
        "tokens", "hidden", "top_k", "num_experts", "ranks", "nodes", "bytes_per_element", "sms", "low_latency",
        "node_share", "rank_share", "copied_per_token",
    )  # fmt: skip
    values = np.broadcast_arrays(*columns)
    return {name: np.array(value, dtype=np.float64) for name, value in zip(names, values, strict=True)}


def features(table: Table) -> Features:
    """Features of measured rows; tables without ``comm_dtype`` (DeepEP's README) are fp8 out, bf16 back.

    TensorRT-LLM's rows need their benchmark's code (aiconfigurator, collector/wideep/trtllm) to be read: its combine is
    bf16 whatever ``comm_dtype`` says, its bulk kernels are lent DeepEP's default of multiprocessors, and its router is
    the model's own, so that DeepSeek-V3's tokens go to four of eight groups. vLLM's draws experts freely.
    """
    phase = table.text("phase")
    if "comm_dtype" in table.columns:
        width = np.array([DTYPE_BYTES.get(str(name), np.nan) for name in table.text("comm_dtype")], dtype=np.float64)
    else:
        width = np.where(phase == "dispatch", FP8_BYTES, 2.0)
    framework = table.text("framework") if "framework" in table.columns else np.full(table.rows, "")
    trtllm = framework == "trtllm"
    quick = np.isin(table.text("kernel"), LOW_LATENCY)
    ranks, experts, top_k = (table.number(name) for name in ("num_ranks", "num_experts", "top_k"))
    hidden = table.number("hidden_size")
    sms = table.number("num_sms") if "num_sms" in table.columns else np.zeros(table.rows)
    grouped = trtllm & (hidden == 7168) & (experts == 256) & (top_k == 8)
    found = _build(
        table.number("num_tokens_per_rank"),
        hidden,
        top_k,
        experts,
        ranks,
        table.number("num_nodes") if "num_nodes" in table.columns else np.ceil(ranks / 8.0),
        np.where(trtllm & (phase == "combine"), 2.0, width),
        np.where(~quick & (sms == 0), DEFAULT_SMS, sms),
        np.where(quick, 1.0, 0.0),
        1.0,
        np.where(grouped, [group_rank_share(256, 8, int(count), 8, 4) for count in ranks], 1.0),
        0.0,
    )
    copied = np.where((framework == "vllm") & (phase == "combine"), _buffer_copy(found), 0.0)
    return {**found, "copied_per_token": copied}


def _buffer_copy(features: Features) -> Array:
    """Read and written by a copy of the receive buffer, per token a rank sends. [B]"""
    ranks = features["ranks"]
    hit = ranks * _chance_hit(features["num_experts"], features["num_experts"] / ranks, features["top_k"])
    # low-latency buffers have room for every rank's tokens at each local expert
    rows = np.where(features["low_latency"] > 0, features["num_experts"], hit)
    return 2.0 * rows * features["hidden"] * 2.0


def group_rank_share(num_experts: int, top_k: int, ranks: int, num_groups: int, top_groups: int) -> float:
    """Ranks reached by a token held to its best groups, over those reached by a free one. [-]"""
    if top_groups >= num_groups or ranks <= 1 or num_experts % ranks:
        return 1.0
    held = nodes_per_token(num_experts, top_k, ranks, num_groups, top_groups)
    return held / nodes_per_token(num_experts, top_k, ranks)


def measured(table: Table) -> Array:
    """The kernel and, between nodes, the exchange of counts before it. [s]"""
    total = table.number("latency_us")
    if "notify_us" in table.columns:
        total = total + table.number("notify_us")
    return np.asarray(total * 1e-6, dtype=np.float64)


OPERATOR = Operator(
    name="moe_alltoall",
    parameters=PARAMETERS,
    seconds=seconds,
    roofline=roofline,
    features=features,
    variant_columns=("framework", "kernel", "phase"),
    group_columns=("num_ranks", "hidden_size", "top_k", "num_experts", "num_sms"),
    range_features=("tokens", "hidden", "ranks"),
    measured=measured,
    sweep="tokens",
)
