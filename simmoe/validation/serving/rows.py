"""From a row of the serving schema (validate/serving/README.md) to simmoe's specs: hardware, model, layout, traffic.

What a row leaves unsaid is filled by the defaults below, the same for every row of an engine; nothing is adjusted to a
row. Rows the model cannot speak to raise `Unspoken` with the reason. Checked against:
tests/test_validation_serving.py and _rows.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from simmoe.errors import SimmoeError
from simmoe.specs.deployment import Deployment
from simmoe.specs.engines import version_numbers
from simmoe.specs.hardware import Hardware
from simmoe.specs.load import load_hardware, load_model
from simmoe.specs.model import Model
from simmoe.specs.speculative import Speculative
from simmoe.specs.workload import Workload
from simmoe.validation.cells import Row, Unspoken, integer, text, why
from simmoe.validation.serving.engine_limits import LIMITS, limits, policy, release
from simmoe.validation.serving.known_settings import device_of, limits_of, through_chat
from simmoe.validation.serving.row_traffic import traffic
from simmoe.validation.serving.speculative_rows import speculation

__all__ = ["Run", "Unspoken", "describe", "described_parts", "model_named"]

#: Tokens per streamed message of InferenceX's SGLang recipes (``--stream-interval``), where a row gives no number.
STREAM_INTERVAL = 10.0


@dataclass(frozen=True)
class Run:
    """One measured run, described in simmoe's terms.

    Attributes
    ----------
    requests : how many were sent in all, over a finite loop or all at once; None: a steady state.
    tokens_per_chunk : tokens a streamed message holds; gaps "between tokens" are then between messages. [tokens]
    decode : the pool that decodes, where ``deployment`` computes prompts only.
    chat : requests went through the chat API and its template.
    """

    hardware: Hardware
    model: Model
    deployment: Deployment
    workload: Workload
    requests: int | None = None
    tokens_per_chunk: float = 1.0
    decode: Deployment | None = None
    chat: bool = False

    @property
    def gpus(self) -> int:
        """Devices of all pools."""
        return self.deployment.gpus + (self.decode.gpus if self.decode else 0)

    @property
    def policy(self) -> str | None:
        """Scheduling policy, None: the engine's usual one."""
        return policy(self.deployment)

    @property
    def native(self) -> bool:
        """Whether the model runs with its own top-k and full pool."""
        return self.deployment.active_experts is None and self.deployment.total_experts is None


def describe(row: Row) -> Run:
    """Turn a row into specs.

    Raises
    ------
    Unspoken
        If the row is of a kind simmoe does not predict yet, or lacks what a prediction needs.
    """
    drafts = speculation_of(row)
    if text(row, "phase") not in ("", "mixed", "nan"):
        raise Unspoken("only one phase (prefill or decode) measured")
    engine, decode = text(row, "engine"), None
    if text(row, "disaggregated") == "yes":
        hardware, model, decode = described_parts(_pool(row, "decode"), engine=engine)
        row = _pool(row, "prefill")
    hardware, model, deployment = described_parts(row, engine=engine)
    if decode is None:
        deployment = speculating(deployment, drafts)
    else:
        decode = speculating(decode, drafts)
    workload, requests = traffic(row)
    chunk = _tokens_per_chunk(text(row, "notes"))
    # gpt-oss has a format of its own (Harmony), for which vLLM goes through no template
    chat = through_chat(row) and not model.name.startswith("gpt-oss")
    return Run(hardware, model, deployment, workload, requests, chunk, decode, chat)


def _pool(row: Row, side: str) -> Row:
    """The row as if one pool, prefill or decode, were all there is; a worker has tp x attention ranks devices."""
    workers, tp = integer(row, f"{side}_workers"), integer(row, f"{side}_tp")
    if workers is None or tp is None:
        raise Unspoken("prefill and decode disaggregated, workers of either not said")
    ranks = integer(row, f"{side}_dp_attention") or 1
    cells = {
        "num_gpus": workers * tp * ranks, "tp": tp, "dp": ranks, "dp_attention": "yes" if ranks > 1 else "no",
        "ep": integer(row, f"{side}_ep") or 1, "pp": 1,
    }  # fmt: skip
    return {**row, **cells}


def speculation_of(row: Row) -> tuple[Speculative | None, str]:
    """What a row drafted and what is told of its acceptance; `Unspoken` where it may have speculated somehow."""
    found = speculation(*(text(row, name) for name in ("spec_decoding", "source", "notes")))
    if found is None:
        raise Unspoken("speculative decoding of unknown drafts, or not known to be without it")
    return found


def speculating(deployment: Deployment, drafts: tuple[Speculative | None, str]) -> Deployment:
    """The deployment with what a row drafted; `Unspoken` where the two do not go together."""
    try:
        return deployment.vary(speculative=drafts[0])
    except ValueError as problem:
        raise Unspoken(f"layout not modelled: {why(problem, Deployment)}") from None


def group_of(row: Row) -> str:
    """Ends the name of a row's group where it speculated: how its acceptance is known."""
    found = speculation(*(text(row, name) for name in ("spec_decoding", "source", "notes")))
    return f"/speculative, acceptance {found[1]}" if found and found[1] else ""


def described_parts(row: Row, *, engine: str) -> tuple[Hardware, Model, Deployment]:
    """Hardware, model and deployment of a row, timed as ``engine``; `Unspoken` where one is unknown."""
    if engine not in LIMITS:
        raise Unspoken(f"engine {engine!r} is not modelled")
    hardware = _hardware(device_of(row))
    model = model_named(text(row, "model"))
    gpus = integer(row, "num_gpus")
    if gpus is None:
        raise Unspoken("number of GPUs unknown")
    return hardware, model, _deployment(row, hardware, model, engine, gpus)


@lru_cache(maxsize=256)
def _hardware(name: str) -> Hardware:
    try:
        return load_hardware(name)
    except SimmoeError:
        raise Unspoken(f"no hardware file for {name}") from None


@lru_cache(maxsize=256)
def model_named(name: str) -> Model:
    """The preset of a name as tables write it; `Unspoken` where there is none."""
    try:
        return load_model(re.sub(r"\s*\(.*\)$", "", name))
    except SimmoeError:
        raise Unspoken(f"no model preset for {name}") from None


def _tokens_per_chunk(notes: str) -> float:
    """Tokens of a streamed message where the row's ITL is told to be between messages."""
    if "per streamed chunk" not in notes:
        return 1.0
    found = re.search(r"about (\d+) tokens", notes)
    return float(found.group(1)) if found else STREAM_INTERVAL


def _deployment(row: Row, hardware: Hardware, model: Model, engine: str, gpus: int) -> Deployment:
    tp, pp = integer(row, "tp"), integer(row, "pp") or 1
    dp, ep = integer(row, "dp") or 1, integer(row, "ep") or 1
    version = release(engine, text(row, "engine_version"), text(row, "measured_date"))
    if tp is None:
        tp = max(1, gpus // (dp * pp))
    attention_dp = text(row, "dp_attention") == "yes" or "enable-dp-attention" in version
    rate = text(row, "request_rate")
    if rate.startswith("inf (all queued)") and (version_numbers(version) or (0,)) >= _BENCH_ATTENTION_DP:
        attention_dp = True
    if model.experts is None:
        ep, dp = 1, 1  # data-parallel dense models are independent replicas
    elif attention_dp:
        if dp == 1:
            dp, tp = tp, 1
        elif tp * dp * pp > gpus:
            tp = max(1, tp // dp)  # SGLang and TensorRT-LLM count the tp group before it is cut into dp ranks
        # experts sliced over the group are gathered and reduced over it: as much traffic as sending tokens to experts
        ep = tp * dp
    elif ep > 1:
        ep = tp * dp
    all_queued = engine == "trtllm" and rate.startswith("inf (all queued)")
    precision, kv = _precision(text(row, "precision"), model, per_tensor=all_queued)
    if (engine == "trtllm" and (precision or "") in _MODELOPT) or (engine == "vllm" and precision == "nvfp4"):
        kv = "fp8"
    total, active = integer(row, "total_experts"), integer(row, "active_experts")
    cap: dict[str, int] = {}
    if model.experts is not None:
        if active and active != model.experts.top_k:
            cap["active_experts"] = active
        if total and total != model.experts.num_experts:
            cap["total_experts"] = total
    words = f"{version} {text(row, 'notes')}"
    bounds = limits(engine, version, hardware.device, model, offline="offline" in rate, words=words, dp=dp)
    gathers = dp > 1 and ep > 1 and ep <= min(hardware.devices_per_node, _GATHERING_RANKS)
    if engine == "trtllm" and hardware.scale_up.bandwidth < _NVLINK_BYTES_PER_S:
        gathers = False
    values = {
        "gpus": gpus, "tp": tp, "ep": ep, "dp": dp, "pp": pp, "engine": engine, "engine_version": version or None,
        "weight_precision": precision, "kv_precision": kv, **bounds, **limits_of(row), **cap,
        "exchange": _exchange(engine, ep, gathers=gathers) if dp > 1 else {},
    }  # fmt: skip
    try:
        return Deployment.model_validate(values)
    except ValueError as problem:
        raise Unspoken(f"layout not modelled: {why(problem, Deployment)}") from None


def _exchange(engine: str, ep: int, *, gathers: bool) -> dict[str, str]:
    """How ranks exchange tokens: vLLM as its release does, others gather inside a node; wider groups use DeepEP."""
    if engine == "vllm":
        return {} if ep <= _GATHERING_RANKS else {"algorithm": "deepep"}
    return {"algorithm": "gather"} if gathers else {}


#: Largest group whose ranks all gather all tokens; beyond, the published runs send tokens to the experts' ranks.
_GATHERING_RANKS = 8
#: Below this, over PCIe, TensorRT-LLM scales as if little were exchanged; what it does was not found out. [B/s]
_NVLINK_BYTES_PER_S = 100e9
#: Formats whose TensorRT-LLM checkpoints (NVIDIA's ModelOpt) ask for an fp8 KV cache, as InferenceX's recipes do. vLLM
#: reads ``kv_cache_quant_algo`` of such a checkpoint too (``resolve_kv_cache_dtype_string``); nvfp4 comes in no other.
_MODELOPT = frozenset({"fp8", "fp8_block", "nvfp4", "mxfp4"})
#: From this release on, TensorRT-LLM's published maximum-load runs of MoE models use attention data parallelism
#: (perf-overview.md, "Reproducing Benchmarked Results").
_BENCH_ATTENTION_DP = (0, 19)
#: words of a row's precision -> weight precision, first match wins
_PRECISIONS = (
    ("nvfp4", "nvfp4"), ("mxfp4", "mxfp4"), ("int4", "int4"), ("int8", "int8"), ("fp8", "fp8"), ("bf16", "bfloat16"),
    ("fp16", "float16"),
)  # fmt: skip


def _precision(words: str, model: Model, *, per_tensor: bool = False) -> tuple[str | None, str]:
    """Weight and KV precision from a row's words; None: the checkpoint's.

    ``per_tensor``: fp8 of NVIDIA's own checkpoints (ModelOpt), one scale a tensor, unless the model is native fp8.
    """
    lowered = words.lower()
    kv = "fp8" if "fp8 (weights and kv)" in lowered or "fp8 kv" in lowered else "bfloat16"
    if "unstated" in lowered or lowered in {"", "nan"} or "checkpoint" in lowered:
        return None, kv
    for word, name in _PRECISIONS:
        if word in lowered:
            # DeepSeek-style checkpoints are block-scaled; dense ones are quantised per tensor
            block = name == "fp8" and (
                model.native_precision == "fp8_block" or (model.experts is not None and not per_tensor)
            )
            return ("fp8_block" if block else name), kv
    raise Unspoken(f"precision {words!r} not understood")
