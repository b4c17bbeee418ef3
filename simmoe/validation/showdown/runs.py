"""Runs of the vLLM showdown as simmoe describes them: from experiments.csv and traces/ to specs and requests.

What a row leaves unsaid is assumed here: 100 prompts used round robin, ten sharing a system prompt each (as the traced
runs show), prompts 30 tokens above nominal after re-tokenising, experts sliced by tensor parallelism unless
data-parallel and then exchanged as vLLM does by default (``all2all_backend: allgather_reducescatter``), three seconds
between load stages beyond the drain, Poisson arrivals where a trace is not there. Every request generates the nominal
number of tokens: in the traces the time a stream takes does not depend on the length its text has once tokenised again.
KV offload to host memory has a pool of 8 GiB a device where its blocks are not given (all the given ones are).
Left out: prompts loaded back from it (it holds fewer blocks than pass between two uses of a prompt).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simmoe.costs.layout import check_layout
from simmoe.costs.memory import kv_bytes_per_token
from simmoe.errors import MeasurementError, SimmoeError
from simmoe.specs.deployment import Deployment
from simmoe.specs.hardware import Hardware
from simmoe.specs.load import load_hardware, load_model
from simmoe.specs.measurement import Table, read_table
from simmoe.specs.mechanisms import Exchange, KvOffload
from simmoe.specs.model import Model

Array = NDArray[np.float64]

PROMPTS, PROMPTS_PER_GROUP = 100, 10
MAX_NUM_SEQS = 128
RETOKENISED = 30.0
"""Tokens a prompt has beyond the nominal ones where it was not measured; 25 to 45 in the traces. [tokens]"""
PAUSE_S = 3.0
"""Between the end of a stage and the next one's first request: 2.5 to 2.8 in the traces. [s]"""
PATIENCE_S = 300.0
"""The load generator's time limit per request. [s]"""
HOST_POOL_BYTES = 8 * 2**30
"""Host memory of one device's share of the KV offload. [B]"""

_PRECISIONS = {"FP16": "bfloat16", "BF16": "bfloat16", "FP8": "fp8", "INT8": "int8", "INT4": "int4", "W4A16": "int4"}

#: Checkpoints (start of the name, lower case) whose published generation_config.json asks for top-p or top-k sampling,
#: which vLLM applies where a request says nothing. The others named there draw from the whole distribution.
NUCLEUS = ("llama-2", "llama-3", "llama-4", "meta-llama", "qwen", "yi-", "deepseek", "glm", "kimi")

#: Quantised checkpoints that keep self-attention in 16 bit. Assumption from the makers' usual recipe for these models
#: (its list of ignored layers has self_attn); the experiments do not say.
WIDE_ATTENTION = ("llama-4-scout-17b-16e-instruct-fp8", "llama-4-maverick-17b-128e-instruct-fp8")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One experiment: what ran on what, and the requests it got.

    Attributes
    ----------
    overloaded : whether it fell behind its load; None: not said.
    trace : name of the file in traces/ its requests are from; None: there is none.
    load : else rate and duration of each stage. [1/s], [s]
    arrival_s, stage, prompt, input_tokens : per request, in order of arrival. [s], [-], [-], [tokens]
    output_tokens : generated per request. [tokens]
    counted_tokens : output length as the client counts it, for ITL and throughput; None: not said. [tokens]
    shared_tokens : head that the prompts of a group have in common. [tokens]
    """

    name: str
    is_moe: bool
    overloaded: bool | None
    series: str
    workload: str
    model: Model
    hardware: Hardware
    deployment: Deployment
    trace: str | None
    load: tuple[tuple[float, float], ...]
    arrival_s: Array
    stage: NDArray[np.int64]
    prompt: NDArray[np.int64]
    input_tokens: NDArray[np.int64]
    output_tokens: int
    counted_tokens: float | None
    shared_tokens: int


def read_runs(folder: Path, seed: int = 0) -> tuple[list[Run], dict[str, str]]:
    """All experiments of a folder, and for those that cannot be described the reason.

    Raises
    ------
    MeasurementError
        If the folder has no readable experiments.csv.
    """
    table = read_table(find(folder, "experiments"))
    columns = {name: table.text(name).tolist() for name in table.columns}
    runs, refused = [], {}
    for i in range(table.rows):
        row = {name: _clean(cells[i]) for name, cells in columns.items()}
        try:
            runs.append(_run(row, folder, seed + i))
        except SimmoeError as problem:
            refused[row["exp_id"] or f"row {i + 2}"] = f"{type(problem).__name__}: {problem}"
    return runs, refused


def find(folder: Path, name: str) -> Path:
    """The table called ``name`` in a folder, plain or compressed."""
    for ending in (".csv", ".csv.gz"):
        if (folder / f"{name}{ending}").is_file():
            return folder / f"{name}{ending}"
    raise MeasurementError(f"{folder}: no {name}.csv or {name}.csv.gz")


def is_showdown(folder: Path) -> bool:
    """Whether a folder has the showdown's layout."""
    try:
        columns = read_table(find(folder, "experiments")).columns
        find(folder, "measured")
    except MeasurementError:
        return False
    return {"exp_id", "model", "gpu", "stages"} <= set(columns)


def _clean(cell: str) -> str:
    text = str(cell).strip()
    return "" if text == "nan" else text.removesuffix(".0")


def _number(row: Mapping[str, str], name: str, default: float) -> float:
    """A cell's leading number, "0.9 (assumed)" included."""
    text = row.get(name, "").split(" ")[0]
    try:
        return float(text)
    except ValueError:
        return default


def _run(row: Mapping[str, str], folder: Path, seed: int) -> Run:
    model = _model(row)
    deployment = _deployment(row, model)
    place = _trace(folder, row.get("trace_file", ""))
    arrival, stage, prompt, length = _requests(row, place, np.random.default_rng(seed))
    marked = row.get("saturated")
    return Run(
        name=row["exp_id"],
        is_moe=model.experts is not None,
        overloaded=None if marked is None else _said(marked),
        series=row.get("series", ""),
        workload=row.get("workload", ""),
        model=model,
        hardware=load_hardware(row["gpu"]),
        deployment=deployment,
        load=() if place else tuple(_load(row["stages"])),
        trace=None if place is None else place.name,
        arrival_s=arrival,
        stage=stage,
        prompt=prompt,
        input_tokens=length,
        output_tokens=_output_tokens(row),
        counted_tokens=_number(row, "output_tokens_measured_mean", 0) or None,
        shared_tokens=int(_number(row, "system_prompt_tokens_nominal", 0)),
    )


def _model(row: Mapping[str, str]) -> Model:
    try:
        return load_model(row["model"])
    except SimmoeError:
        if not row.get("hf_id"):
            raise
        return load_model(row["hf_id"])


def _said(cell: str) -> bool:
    return cell.lower() not in ("", "0", "false", "no")


def _deployment(row: Mapping[str, str], model: Model) -> Deployment:
    """A run's layout. A dense model's data-parallel ranks are engines of their own (vLLM's ``run_engine_core``)."""
    dp, pp = (int(_number(row, name, 1)) for name in ("dp", "pp"))
    tp = int(_number(row, "tp", 0) or _number(row, "n_gpus", 1) // (dp * pp))
    ep = _experts_over(row, model, tp, dp)
    checkpoint = row.get("hf_id", row["model"]).rsplit("/", 1)[-1].lower()
    deployment = Deployment(
        gpus=tp * dp * pp,
        tp=tp,
        dp=dp if model.experts is not None else 1,
        pp=pp,
        ep=ep,
        weight_precision=_PRECISIONS.get(row.get("precision_label", "").upper()),
        max_num_seqs=int(_number(row, "max_num_seqs", MAX_NUM_SEQS)),
        max_num_batched_tokens=int(_number(row, "max_num_batched_tokens", 2048)),
        memory_fraction=_number(row, "gpu_memory_utilization", 0.9),
        kv_block_size=int(_number(row, "kv_block_size", 16)),
        kv_blocks=int(_number(row, "gpu_kv_blocks", 0)) or None,
        prefix_caching=row.get("prefix_caching", "1") != "0",
        wide_attention=checkpoint.startswith(WIDE_ATTENTION),
        nucleus_sampling=checkpoint.startswith(NUCLEUS),
        exchange=Exchange(algorithm="gather" if ep > 1 else "auto"),
        engine="vllm",
        engine_version=row.get("engine_version", "").split(" ")[0] or None,
    )
    check_layout(model, deployment)
    return deployment.vary(kv_offload=_offload(row, model, deployment))


def _output_tokens(row: Mapping[str, str]) -> int:
    tokens = int(_number(row, "output_tokens_nominal", 0) or _number(row, "output_tokens_measured_mean", 0))
    if tokens < 1:
        raise MeasurementError("no output_tokens_nominal")
    return tokens


def _offload(row: Mapping[str, str], model: Model, deployment: Deployment) -> KvOffload | None:
    """The KV pool in host memory, of as many blocks as were logged or its memory holds."""
    if not _said(row.get("cpu_offload", "")):
        return None
    per_block = kv_bytes_per_token(model, deployment) * deployment.kv_block_size
    each = int(_number(row, "cpu_kv_blocks", 0)) * per_block or HOST_POOL_BYTES
    return KvOffload(host_memory=each * deployment.devices_per_replica, copies="filled")


def _experts_over(row: Mapping[str, str], model: Model, tp: int, dp: int) -> int:
    """Ranks the experts are spread over: as stated, else all of a data-parallel engine's, else one."""
    stated = int(_number(row, "ep", 0))
    if model.experts is None:
        return 1
    if stated > 1:
        return stated
    return tp * dp if dp > 1 else 1


Requests = tuple[Array, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def _requests(row: Mapping[str, str], trace: Path | None, rng: np.random.Generator) -> Requests:
    if trace is not None:
        return _from_trace(read_table(trace), row)
    output = _output_tokens(row)
    times, stages = [], []
    start = 0.0
    for number, (rate, seconds) in enumerate(_load(row["stages"])):
        count = round(rate * seconds)
        times.append(start + np.sort(rng.uniform(0.0, seconds, count)))
        stages.append(np.full(count, number))
        start += seconds + pause_s(output)
    arrival = np.concatenate(times)
    if not arrival.size:
        raise MeasurementError(f"stages {row['stages']!r} hold no request")
    prompt = np.arange(arrival.size) % int(_number(row, "unique_prompts", PROMPTS))
    return arrival, np.concatenate(stages), prompt, np.full(arrival.size, _prompt_tokens(row))


def pause_s(output_tokens: int) -> float:
    """From the end of a stage to the next: the last requests' drain, about 20 ms a token, and more. [s]"""
    return PAUSE_S + 0.02 * output_tokens


def _prompt_tokens(row: Mapping[str, str]) -> int:
    nominal = _number(row, "system_prompt_tokens_nominal", 0) + _number(row, "question_tokens_nominal", 0)
    tokens = _number(row, "prompt_tokens_measured_mean", 0) or (nominal + RETOKENISED if nominal else 0)
    if tokens < 1:
        raise MeasurementError("no prompt length: prompt_tokens_measured_mean or question_tokens_nominal")
    return round(tokens)


def _load(stages: str) -> list[tuple[float, float]]:
    """Stages "8rps*600s;20rps*600s" as rates and durations. [1/s], [s]"""
    load = []
    for part in stages.split(";"):
        found = re.fullmatch(r"(\d+\.?\d*)rps\*(\d+\.?\d*)s", part.strip())
        if not found:
            raise MeasurementError(f"stages {stages!r}: not like 8rps*600s;20rps*600s")
        load.append((float(found[1]), float(found[2])))
    return load


def _trace(folder: Path, name: str) -> Path | None:
    """A run's trace as named, in traces/, compressed or not; None: it is not there."""
    stem = Path(name).name.removesuffix(".gz")
    places = (folder / name, *(folder / "traces" / f"{stem}{ending}" for ending in ("", ".gz"))) if name else ()
    return next((place for place in places if place.is_file()), None)


def _from_trace(table: Table, row: Mapping[str, str]) -> Requests:
    arrival = table.number("arrival_s")
    order = np.argsort(arrival, kind="stable")

    def column(name: str, otherwise: NDArray[np.int64]) -> NDArray[np.int64]:
        """A column in order of arrival; where it or a cell is missing, something else."""
        if name not in table.columns:
            return otherwise
        values = table.number(name)[order]
        return np.where(np.isfinite(values), np.nan_to_num(values), otherwise).astype(np.int64)

    rank = np.arange(arrival.size)
    prompt = column("prompt_id", rank % int(_number(row, "unique_prompts", PROMPTS)))
    lengths = table.number("input_tokens")[order] if "input_tokens" in table.columns else np.array([np.nan])
    known = lengths[np.isfinite(lengths)]
    usual = round(float(known.mean())) if known.size else _prompt_tokens(row)
    return (
        arrival[order] - arrival.min(),
        column("stage", np.zeros_like(rank)),
        prompt,
        column("input_tokens", np.full_like(rank, usual)),
    )
