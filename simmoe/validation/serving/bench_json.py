"""Result files of ``vllm bench serve`` (JSON) and ``sglang.bench_serving`` (JSON lines) as runs to compare with.

A result says traffic and latencies but not the hardware, and rarely the layout; those come with a `Setup`. Lengths
are the totals over the requests completed, their spread from the per-request lists where the file has them.
Left out: speculative decoding (SGLang says so by ``accept_length``), multi-turn and trace replays.
Sources of the keys: vllm-project/vllm, vllm/benchmarks/serve.py; sgl-project/sglang, python/sglang/bench_serving.py.
Checked in tests/test_bench_json.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simmoe.errors import MeasurementError, SpecError
from simmoe.specs import flags
from simmoe.specs.hardware import Hardware
from simmoe.specs.load import load_hardware, load_model
from simmoe.specs.model import Model
from simmoe.specs.workload import Lengths, Workload
from simmoe.validation.serving.engine_limits import LIMITS
from simmoe.validation.serving.rows import Run, Unspoken

Result = Mapping[str, Any]

#: Keys every result of either tool has.
_NEEDED = frozenset({"duration", "completed", "total_input_tokens", "total_output_tokens", "output_throughput"})
#: Result key -> column of the serving schema, for each statistic.
_LATENCIES = {"ttft_ms": "ttft", "tpot_ms": "tpot", "itl_ms": "itl", "e2el_ms": "e2e", "e2e_latency_ms": "e2e"}
_RATES = {
    "output_throughput": "output_tokens_per_s",
    "total_token_throughput": "total_tokens_per_s",
    "total_throughput": "total_tokens_per_s",
    "request_throughput": "requests_per_s",
}
#: A finite request rate with a client limit is a closed loop once this share of the limit is in flight. Assumption.
_LIMIT_BINDS = 0.9
_ENGINES = {"vllm": "vllm", "sglang": "sglang", "tensorrt-llm": "trtllm", "trt": "trtllm"}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What results do not say: where and how the engine ran. None: taken from the result if it says, else a default."""

    hardware: Hardware
    hardware_name: str
    model: Model | None = None
    deployment: Path | None = None
    layout: Mapping[str, Any] | None = None


def setup_from(hardware: str | None, model: str | None, deployment: Path | None, **layout: Any) -> Setup | None:
    """A setup from the command line; None if no hardware is given.

    Raises
    ------
    SpecError
        If something but not the hardware is given, or it is unknown.
    """
    if hardware is None:
        given = {"model": model, "deployment": deployment, **layout}
        name = next((name for name, value in given.items() if value is not None), None)
        if name is not None:
            raise SpecError(f"--{name.replace('_', '-')}: describes a benchmark result's engine; give --hardware too")
        return None
    return Setup(
        hardware=load_hardware(hardware),
        hardware_name=hardware,
        model=load_model(model) if model is not None else None,
        deployment=deployment,
        layout=layout,
    )


def result_paths(paths: Sequence[Path]) -> list[Path]:
    """JSON and JSON-lines files among the paths and inside the folders given, in name order."""
    found: list[Path] = []
    for path in paths:
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        found += [file for file in inside if file.suffix in (".json", ".jsonl")]
    return found


def read_results(path: Path) -> list[tuple[int, Result]]:
    """Results in a file with their line numbers; empty if it holds something else.

    Raises
    ------
    MeasurementError
        If the file is not JSON.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise MeasurementError(f"{path}: cannot be read ({problem})") from problem
    try:
        entries = [(1, json.loads(text))]
    except json.JSONDecodeError:
        try:
            entries = [(i, json.loads(line)) for i, line in enumerate(text.splitlines(), start=1) if line.strip()]
        except json.JSONDecodeError as problem:
            raise MeasurementError(f"{path}: neither JSON nor JSON lines ({problem.msg})") from problem
    if len(entries) == 1 and isinstance(entries[0][1], list):
        entries = list(enumerate(entries[0][1], start=1))
    return [(line, entry) for line, entry in entries if isinstance(entry, dict) and set(entry) >= _NEEDED]


def engine_of(result: Result) -> str:
    """The engine that answered: what the client was told, else the tool's own."""
    theirs = "sglang" if "mean_e2e_latency_ms" in result or "total_output_tokens_retokenized" in result else "vllm"
    named = str(result.get("backend") or result.get("endpoint_type") or theirs).lower()
    # an OpenAI-style client says nothing about the server
    return next((engine for word, engine in _ENGINES.items() if named.startswith(word)), theirs)


def describe(result: Result, setup: Setup) -> Run:
    """A result in simmoe's terms.

    Raises
    ------
    Unspoken
        If the run is of a kind simmoe does not predict.
    SpecError
        If the model or the layout is unknown or contradicts itself.
    """
    if (_number(result, "accept_length") or 1.0) > 1.0:
        raise Unspoken("speculative decoding")
    completed = round(_number(result, "completed") or 0)
    if not completed:
        raise Unspoken("no request completed")
    model = setup.model or _model(result)
    layout = {**_server_layout(result), **{k: v for k, v in (setup.layout or {}).items() if v is not None}}
    engine = layout.setdefault("engine", engine_of(result))
    if setup.deployment is None:
        layout = {**LIMITS.get(engine, {}), **layout}
        deployment = flags.deployment_from(None, **layout)
    else:
        deployment = flags.deployment_from(setup.deployment, **(setup.layout or {}))
    workload, requests = _traffic(result, completed)
    return Run(setup.hardware, model, deployment, workload, requests)


def figures_of(result: Result) -> dict[str, object]:
    """Measured figures under the columns of the serving schema: rates per second, latencies in milliseconds."""
    row: dict[str, object] = {column: value for key, column in _RATES.items() if (value := _number(result, key))}
    for key, metric in _LATENCIES.items():
        for statistic in ("mean", "median", "p99"):
            value = _number(result, f"{statistic}_{key}")
            if value:
                row[f"{metric}_ms_{statistic}"] = value
    return row


def _model(result: Result) -> Model:
    server = result.get("server_info")
    named = result.get("model_id") or (server.get("model_path") if isinstance(server, dict) else None)
    if not named:
        raise SpecError("the result does not name its model; give --model")
    return load_model(str(named))


def _server_layout(result: Result) -> dict[str, Any]:
    """Layout from what SGLang's server says of itself: its tp group is cut into dp ranks under attention DP."""
    server = result.get("server_info")
    if not isinstance(server, dict) or "tp_size" not in server:
        return {}
    tp, dp, pp = (int(server.get(f"{name}_size") or 1) for name in ("tp", "dp", "pp"))
    if server.get("enable_dp_attention"):
        return {"gpus": tp * pp, "tp": tp // dp, "dp": dp, "ep": tp, "pp": pp}
    ep = tp if int(server.get("ep_size") or 1) > 1 else 1
    return {"gpus": tp * dp * pp, "tp": tp, "ep": ep, "pp": pp}


def _traffic(result: Result, completed: int) -> tuple[Workload, int | None]:
    lengths = {
        "input": _lengths(result, "input", completed),
        "output": _lengths(result, "output", completed),
    }
    limit, rate = _number(result, "max_concurrency"), result.get("request_rate")
    sent = round(_number(result, "num_prompts") or completed)
    if isinstance(rate, str) and rate not in ("inf", "Infinity"):
        raise Unspoken(f"request rate {rate!r}")
    offered = math.inf if rate is None or isinstance(rate, str) else float(rate)
    if math.isinf(offered):
        in_flight = min(round(limit), sent) if limit else sent
        return Workload(concurrency=in_flight, **lengths), sent
    if limit and (_in_flight(result) or 0.0) > _LIMIT_BINDS * limit:
        return Workload(concurrency=round(limit), **lengths), sent
    return Workload(rate=offered, **lengths), None


def _in_flight(result: Result) -> float | None:
    """Mean requests in flight: stated by SGLang, else Little's law."""
    stated = _number(result, "concurrency")
    end_to_end = _number(result, "mean_e2el_ms") or _number(result, "mean_e2e_latency_ms")
    served = _number(result, "request_throughput")
    return stated or (1e-3 * end_to_end * served if end_to_end and served else None)


def _lengths(result: Result, side: str, completed: int) -> Lengths:
    """Mean from the total; spread from the list of lengths, else from the range that random prompts were drawn in."""
    mean = (_number(result, f"total_{side}_tokens") or 0.0) / completed
    if mean <= 0:
        raise Unspoken(f"no {side} tokens")
    listed = [value for value in result.get(f"{side}_lens") or () if value]
    ratio, nominal = _number(result, "random_range_ratio"), _number(result, f"random_{side}_len")
    random = str(result.get("dataset_name", "")).startswith("random")
    if len(listed) > 1 and max(listed) > min(listed):
        cv = float(np.std(listed) / np.mean(listed))
        return Lengths(kind="lognormal", mean=mean, cv=max(cv, 1e-3), high=int(max(listed)))
    if not listed and random and ratio is not None and nominal and ratio < 1:
        low, high = max(1, round(ratio * nominal)), round(nominal)
        middle = (low + high) / 2
        if abs(middle - mean) < 0.1 * mean:  # the prompts drawn are about what was asked for
            return Lengths(kind="uniform", mean=middle, low=low, high=high)
    return Lengths(mean=max(mean, 1.0))


def _number(result: Result, key: str) -> float | None:
    value = result.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return None
    return float(value)


def rows(path: Path, setup: Setup | None) -> Iterator[tuple[int, dict[str, object], Result]]:
    """Results of a file as rows of the serving schema; SpecError if there are some but no setup says the hardware."""
    for line, result in read_results(path):
        if setup is None:
            raise SpecError(
                f"{path}: a benchmark result does not say what it ran on; give --hardware (and --model ...)"
            )
        yield line, figures_of(result), result


def names(result: Result, setup: Setup) -> tuple[str, str, str]:
    """Model, hardware and engine as a group's name has them."""
    server = result.get("server_info")
    said = result.get("model_id") or (server.get("model_path") if isinstance(server, dict) else "") or "unstated"
    model = setup.model.name if setup.model else str(said).rstrip("/").rsplit("/", 1)[-1]
    layout = setup.layout or {}
    return model, setup.hardware.name, str(layout.get("engine") or engine_of(result))
