"""What an engine's limits were in a published run: flags quoted with the row, else the release's own defaults.

A release not named is the newest on the day the row was measured. Left out: flags that simmoe has no counterpart for.
Checked against: tests/test_validation_serving.py.
"""

from __future__ import annotations

import re

from simmoe.specs.deployment import Deployment
from simmoe.specs.engines import version_numbers
from simmoe.specs.hardware import Device
from simmoe.specs.model import Model

#: What engines default to. Sources: vLLM's EngineArgs.get_default_args (0.8 on: by device memory and kind of server),
#: SGLang's server_args.py, TensorRT-LLM's max_num_tokens and max_batch_size.
LIMITS: dict[str, dict[str, float]] = {
    "vllm": {"max_num_batched_tokens": 8192, "max_num_seqs": 1024, "memory_fraction": 0.9},
    "sglang": {"max_num_batched_tokens": 8192, "max_num_seqs": 2048, "memory_fraction": 0.88},
    "trtllm": {"max_num_batched_tokens": 8192, "max_num_seqs": 2048, "memory_fraction": 0.9},
}
#: vLLM gives a smaller budget to devices below this, and to every A100 (same function: ``"a100" not in device_name``).
_LARGE_BYTES = 70 * 2**30
_LARGE_SGLANG_BYTES = 160e9
_SMALL_VLLM = {"max_num_batched_tokens": 2048, "max_num_seqs": 256}
#: Before this release (the V1 engine) vLLM computed whole prompts, as many as fit ``max_model_len`` tokens, before any
#: decode; MLA models kept that in 0.7, others with long contexts, and all with prefix caching, chunked at 2048.
V1 = (0, 8)
_V0_SEQS, _V0_CHUNK, _V0_CONTEXT = 256, 2048, 32768

#: engine -> (first month, release): enough to place a run described by its date alone.
_RELEASES: dict[str, tuple[tuple[str, str], ...]] = {
    "vllm": (
        ("2024-01", "0.3"), ("2024-06", "0.5"), ("2024-09", "0.6"), ("2025-01", "0.7"), ("2025-04", "0.8"),
        ("2025-06", "0.9"), ("2025-08", "0.10"), ("2025-10", "0.11"), ("2025-12", "0.12"), ("2026-01", "0.14"),
        ("2026-02", "0.16"), ("2026-04", "0.19"),
    ),
    "sglang": (
        ("2024-02", "0.1"), ("2024-09", "0.3"), ("2024-12", "0.4"), ("2025-02", "0.4.3"), ("2025-03", "0.4.4"),
        ("2025-05", "0.4.6"), ("2025-07", "0.4.9"), ("2025-09", "0.5.2"), ("2025-11", "0.5.5"), ("2026-01", "0.5.7"),
    ),
    "trtllm": (("2025-01", "0.17"), ("2025-06", "0.20"), ("2025-09", "1.0"), ("2025-12", "1.1")),
}  # fmt: skip
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")

#: field of the deployment <- names of the flags that set it, dashes and underscores alike
_FLAGS: dict[str, tuple[str, ...]] = {
    "max_num_batched_tokens": ("max-num-batched-tokens", "chunked-prefill-size", "max-num-tokens"),
    "max_num_seqs": ("max-num-seqs", "max-running-requests", "max-batch-size"),
    "memory_fraction": ("gpu-memory-utilization", "mem-fraction-static", "kv-cache-free-gpu-memory-fraction"),
}


def release(engine: str, version: str, measured: str) -> str:
    """The version, or with no release number in it the newest release of its date, or of the date of measuring."""
    if version_numbers(version) is not None:
        return version
    month = _month(version) or _month(measured)
    known = [number for first, number in _RELEASES.get(engine, ()) if month and first <= month]
    return f"{known[-1]} (by date)" if known else version


def _month(words: str) -> str | None:
    """First "2025-02", "202502.." or "Feb 2025" of a text as "2025-02"."""
    if found := re.search(r"\b(20\d\d)[-./]?(0[1-9]|1[0-2])", words):
        return f"{found.group(1)}-{found.group(2)}"
    if found := re.search(rf"\b({'|'.join(_MONTHS)})[a-z]* (20\d\d)", words.lower()):
        return f"{found.group(2)}-{_MONTHS.index(found.group(1)) + 1:02d}"
    return None


def limits(
    engine: str, version: str, device: Device, model: Model, *, offline: bool, words: str, dp: int = 1
) -> dict[str, float]:
    """``max_num_batched_tokens``, ``max_num_seqs`` and ``memory_fraction`` of a run.

    Parameters
    ----------
    offline : whether requests went to the engine without a server (vLLM's LLM class has larger defaults).
    words : notes that may quote the command.
    dp : data-parallel attention ranks.
    """
    values = dict(LIMITS[engine])
    if engine == "vllm":
        values |= _vllm(version, device, model, offline=offline, chunked="prefix caching on" in words)
    if engine == "sglang" and device.memory >= _LARGE_SGLANG_BYTES and (version_numbers(version) or (0,)) >= (0, 5):
        values["max_num_batched_tokens"] = 16384
    values |= _quoted(words)
    if engine == "sglang" and dp > 1:  # its limits are of all attention ranks together
        for name in ("max_num_batched_tokens", "max_num_seqs"):
            values[name] = max(values[name] // dp, 1)
    return values | {"max_num_seqs": min(values["max_num_seqs"], values["max_num_batched_tokens"])}


def _vllm(version: str, device: Device, model: Model, *, offline: bool, chunked: bool) -> dict[str, float]:
    numbers = version_numbers(version)
    if numbers is not None and numbers < V1:
        context = model.max_context or _V0_CONTEXT
        whole = not chunked and (model.attention.kind == "mla" or context <= _V0_CONTEXT)
        return {"max_num_batched_tokens": context if whole else _V0_CHUNK, "max_num_seqs": _V0_SEQS}
    small = device.memory < _LARGE_BYTES or "a100" in device.name.lower()
    values: dict[str, float] = dict(_SMALL_VLLM) if small else {}
    if offline:
        values["max_num_batched_tokens"] = 2 * LIMITS["vllm"]["max_num_batched_tokens"] if not small else 8192
    return values


def _quoted(words: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for field, names in _FLAGS.items():
        for name in names:
            pattern = name.replace("-", "[-_]")
            if hit := re.search(rf"{pattern}[ =]+(\d+(?:\.\d+)?)\b", words):
                found[field] = float(hit.group(1))
    return found


def policy(deployment: Deployment) -> str | None:
    """Name of the scheduling policy where it is not the engine's usual one."""
    numbers = version_numbers(deployment.engine_version)
    old = deployment.engine == "vllm" and numbers is not None and numbers < V1
    return "vllm_v0" if old and deployment.max_num_batched_tokens > _V0_CHUNK else None
