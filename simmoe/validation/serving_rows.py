"""From a row of the serving schema (validate/serving/README.md) to simmoe's specs: hardware, model, layout, traffic.

What a row leaves unsaid is filled by the defaults below, the same for every row of an engine; nothing is adjusted to a
row. Rows the model cannot speak to raise `Unspoken` with the reason. Left out: prefill and decode on separate devices,
prefix caching. Checked against: tests/test_validation_serving.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from simmoe.errors import SimmoeError
from simmoe.specs.deployment import Deployment
from simmoe.specs.engines import version_numbers
from simmoe.specs.hardware import Hardware
from simmoe.specs.load import load_hardware, load_model
from simmoe.specs.model import Model
from simmoe.specs.speculative import Speculative
from simmoe.specs.workload import Lengths, Workload
from simmoe.validation.speculative_rows import speculation

Row = Mapping[str, object]

#: What engines default to where a row does not say. Sources: vLLM 0.8+ defaults of the API server on 80 GB Hopper and
#: later (8192 tokens, 1024 sequences), SGLang's chunked_prefill_size on the same, TensorRT-LLM's max_num_tokens and
#: max_batch_size. Where memory binds first the value does not matter.
LIMITS: dict[str, dict[str, float]] = {
    "vllm": {"max_num_batched_tokens": 8192, "max_num_seqs": 1024, "memory_fraction": 0.9},
    "sglang": {"max_num_batched_tokens": 8192, "max_num_seqs": 2048, "memory_fraction": 0.88},
    "trtllm": {"max_num_batched_tokens": 8192, "max_num_seqs": 2048, "memory_fraction": 0.9},
}
#: Requests of a closed-loop run per client, where a row gives no number: InferenceX scripts send ten; assumed of all.
ROUNDS = 10
#: Spread of ShareGPT's lengths (log-normal), and the longest prompt and answer that vLLM's sampling of it lets through.
SHAREGPT_CV, SHAREGPT_LONGEST = 1.1, 1024


class Unspoken(Exception):  # noqa: N818  (a reason, not an error)
    """Why a row is not predicted."""


@dataclass(frozen=True)
class Run:
    """One measured run, described in simmoe's terms.

    Attributes
    ----------
    requests : how many were sent in all, over a finite closed loop or all at once; None: a steady state.
    """

    hardware: Hardware
    model: Model
    deployment: Deployment
    workload: Workload
    requests: int | None = None

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
    if text(row, "disaggregated") == "yes":
        raise Unspoken("prefill and decode disaggregated")
    if text(row, "phase") not in ("", "mixed", "nan"):
        raise Unspoken("only one phase (prefill or decode) measured")
    hardware, model, deployment = described_parts(row, engine=text(row, "engine"))
    workload, requests = _traffic(row)
    return Run(hardware, model, speculating(deployment, drafts), workload, requests)


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
        raise Unspoken(f"layout not modelled: {short(str(problem))}") from None


def group_of(row: Row) -> str:
    """Ends the name of a row's group where it speculated: how its acceptance is known."""
    found = speculation(*(text(row, name) for name in ("spec_decoding", "source", "notes")))
    return f"/speculative, acceptance {found[1]}" if found and found[1] else ""


def described_parts(row: Row, *, engine: str) -> tuple[Hardware, Model, Deployment]:
    """Hardware, model and deployment of a row, timed as ``engine``; `Unspoken` where one is unknown."""
    if engine not in LIMITS:
        raise Unspoken(f"engine {engine!r} is not modelled")
    hardware = _hardware(text(row, "gpu"))
    model = _model(text(row, "model"))
    gpus = _int(row, "num_gpus")
    if gpus is None:
        raise Unspoken("number of GPUs unknown")
    return hardware, model, _deployment(row, model, engine, gpus)


@lru_cache(maxsize=256)
def _hardware(name: str) -> Hardware:
    try:
        return load_hardware(name)
    except SimmoeError:
        raise Unspoken(f"no hardware file for {name}") from None


@lru_cache(maxsize=256)
def _model(name: str) -> Model:
    try:
        return load_model(re.sub(r"\s*\(.*\)$", "", name))
    except SimmoeError:
        raise Unspoken(f"no model preset for {name}") from None


def _traffic(row: Row) -> tuple[Workload, int | None]:
    input_tokens, output_tokens = number(row, "input_tokens"), number(row, "output_tokens")
    if not input_tokens or not output_tokens:
        raise Unspoken("input or output length unknown")
    words = text(row, "length_distribution")
    lengths = {"input": _lengths(input_tokens, words), "output": _lengths(output_tokens, words)}
    concurrency, sent = _int(row, "concurrency"), _int(row, "num_requests")
    rate = text(row, "request_rate")
    if concurrency:
        return Workload(concurrency=concurrency, **lengths), max(sent or ROUNDS * concurrency, concurrency)
    if rate.startswith("inf"):
        if not sent:
            raise Unspoken("all requests at once, but how many is not said")
        return Workload(concurrency=sent, **lengths), sent
    found = re.search(r"measured ([\d.]+)", rate) or re.match(r"([\d.]+)", rate)
    if not found:
        raise Unspoken("neither concurrency nor request rate known")
    return Workload(rate=float(found.group(1)), **lengths), None


def _lengths(tokens: float, words: str) -> Lengths:
    """Distribution of a length from its (nominal, or for ShareGPT mean) value and what the row says in words."""
    if "[0.8,1.0]" in words:
        low, high = max(1, round(0.8 * tokens)), max(1, round(tokens))
        return Lengths(kind="uniform", mean=(low + high) / 2, low=low, high=high)
    if "ShareGPT" in words and tokens < SHAREGPT_LONGEST:
        return Lengths(kind="lognormal", mean=tokens, cv=SHAREGPT_CV, high=SHAREGPT_LONGEST)
    return Lengths(mean=tokens)


def _deployment(row: Row, model: Model, engine: str, gpus: int) -> Deployment:
    tp, pp = _int(row, "tp"), _int(row, "pp") or 1
    dp, ep = _int(row, "dp") or 1, _int(row, "ep") or 1
    version = text(row, "engine_version")
    if tp is None:
        tp = max(1, gpus // (dp * pp))
    attention_dp = text(row, "dp_attention") == "yes" or "enable-dp-attention" in version
    offline = text(row, "request_rate").startswith("inf (all queued)")
    if offline and (version_numbers(version) or (0,)) >= _BENCH_ATTENTION_DP:
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
    precision, kv = _precision(text(row, "precision"), model)
    if engine == "trtllm" and (precision or "") in _MODELOPT:
        kv = "fp8"
    total, active = _int(row, "total_experts"), _int(row, "active_experts")
    cap: dict[str, int] = {}
    if model.experts is not None:
        if active and active != model.experts.top_k:
            cap["active_experts"] = active
        if total and total != model.experts.num_experts:
            cap["total_experts"] = total
    values = {
        "gpus": gpus, "tp": tp, "ep": ep, "dp": dp, "pp": pp, "engine": engine, "engine_version": version or None,
        "weight_precision": precision, "kv_precision": kv, **LIMITS[engine], **cap,
    }  # fmt: skip
    try:
        return Deployment.model_validate(values)
    except ValueError as problem:
        raise Unspoken(f"layout not modelled: {short(str(problem))}") from None


#: Formats whose TensorRT-LLM checkpoints (NVIDIA's ModelOpt) ask for an fp8 KV cache, as InferenceX's recipes do.
_MODELOPT = frozenset({"fp8", "fp8_block", "nvfp4", "mxfp4"})
#: From this release on, TensorRT-LLM's published maximum-load runs of MoE models use attention data parallelism
#: (perf-overview.md, "Reproducing Benchmarked Results").
_BENCH_ATTENTION_DP = (0, 19)
#: words of a row's precision -> weight precision, first match wins
_PRECISIONS = (
    ("nvfp4", "nvfp4"), ("mxfp4", "mxfp4"), ("int4", "int4"), ("int8", "int8"), ("fp8", "fp8"), ("bf16", "bfloat16"),
    ("fp16", "float16"),
)  # fmt: skip


def _precision(words: str, model: Model) -> tuple[str | None, str]:
    """Weight and KV precision from a row's words; None: the checkpoint's."""
    lowered = words.lower()
    kv = "fp8" if "fp8 (weights and kv)" in lowered or "fp8 kv" in lowered else "bfloat16"
    if "unstated" in lowered or lowered in {"", "nan"} or "checkpoint" in lowered:
        return None, kv
    for word, name in _PRECISIONS:
        if word in lowered:
            # DeepSeek-style checkpoints are block-scaled; dense ones are quantised per tensor
            block = name == "fp8" and (model.native_precision == "fp8_block" or model.experts is not None)
            return ("fp8_block" if block else name), kv
    raise Unspoken(f"precision {words!r} not understood")


def text(row: Row, name: str) -> str:
    """A cell as text, empty if it is missing."""
    value = row.get(name, "")
    if isinstance(value, float | np.floating):
        return "" if math.isnan(value) else f"{value:g}"
    return str(value)


def number(row: Row, name: str) -> float | None:
    """A cell as a number, None if it is missing or not one."""
    try:
        value = float(row.get(name))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return None if math.isnan(value) else value


def _int(row: Row, name: str) -> int | None:
    value = number(row, name)
    return None if value is None else round(value)


def short(words: str) -> str:
    """One line of at most 120 characters."""
    return " ".join(words.split())[:120]
