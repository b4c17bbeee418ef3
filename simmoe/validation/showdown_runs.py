"""Runs of the vLLM showdown as simmoe describes them: from experiments.csv and traces/ to specs and requests.

What a row leaves unsaid is assumed here: 100 prompts used round robin, ten sharing a system prompt each (as the traced
runs show), prompts 30 tokens above nominal after re-tokenising, experts sliced by tensor parallelism unless
data-parallel, three seconds between load stages beyond the drain. Every request generates the nominal number of tokens:
in the traces the time a stream takes does not depend on the length its text has once tokenised again.
KV offload to host memory has a pool of 8 GiB a device where its blocks are not given (all the given ones are).
Left out: prompts loaded back from it (it holds fewer blocks than pass between two uses of a prompt).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simmoe.costs.memory import kv_bytes_per_token
from simmoe.errors import MeasurementError, SimmoeError
from simmoe.specs.deployment import Deployment
from simmoe.specs.hardware import Hardware
from simmoe.specs.load import load_hardware, load_model
from simmoe.specs.measurement import Table, read_table
from simmoe.specs.model import Model

Array = NDArray[np.float64]

PROMPTS, PROMPTS_PER_GROUP = 100, 10
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
    kv_blocks : blocks of one data-parallel rank as the server logged them; None: not known.
    host_blocks : blocks of its pool in host memory; 0: no KV offload.
    arrival_s, stage, prompt, input_tokens : per request, in order of arrival. [s], [-], [-], [tokens]
    output_tokens : generated per request. [tokens]
    counted_tokens : output length as the client counts it, for ITL and throughput. [tokens]
    shared_tokens : head that the prompts of a group have in common. [tokens]
    """

    name: str
    is_moe: bool
    overloaded: bool
    series: str
    workload: str
    model: Model
    hardware: Hardware
    deployment: Deployment
    kv_blocks: int | None
    host_blocks: int
    arrival_s: Array
    stage: NDArray[np.int64]
    prompt: NDArray[np.int64]
    input_tokens: NDArray[np.int64]
    output_tokens: int
    counted_tokens: float
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
        except (SimmoeError, ValueError, KeyError) as problem:
            refused[row.get("exp_id", f"row {i + 2}")] = f"{type(problem).__name__}: {problem}"
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
    tp, dp, pp = (int(_number(row, name, 1)) for name in ("tp", "dp", "pp"))
    checkpoint = row.get("hf_id", row["model"]).rsplit("/", 1)[-1].lower()
    label = row.get("precision_label", "").upper()
    deployment = Deployment(
        gpus=tp * dp * pp,
        tp=tp,
        dp=dp,
        pp=pp,
        ep=_experts_over(row, model, tp, dp),
        weight_precision=_PRECISIONS.get(label),
        max_num_seqs=int(_number(row, "max_num_seqs", 256)),
        max_num_batched_tokens=int(_number(row, "max_num_batched_tokens", 2048)),
        memory_fraction=_number(row, "gpu_memory_utilization", 0.9),
        kv_block_size=int(_number(row, "kv_block_size", 16)),
        prefix_caching=row.get("prefix_caching", "1") != "0",
        wide_attention=checkpoint.startswith(WIDE_ATTENTION),
        nucleus_sampling=checkpoint.startswith(NUCLEUS),
        engine="vllm",
        engine_version=row.get("engine_version", "").split(" ")[0] or None,
    )
    arrival, stage, prompt, length = _requests(row, folder, np.random.default_rng(seed))
    nominal = int(_number(row, "output_tokens_nominal", 0) or _number(row, "output_tokens_measured_mean", 0))
    if nominal < 1:
        raise MeasurementError("no output length")
    blocks = int(_number(row, "gpu_kv_blocks", 0))
    return Run(
        name=row["exp_id"],
        is_moe=row.get("is_moe", "0") in ("1", "True", "true"),
        overloaded=bool(row.get("saturated")),
        series=row.get("series", ""),
        workload=row.get("workload", ""),
        model=model,
        hardware=load_hardware(row["gpu"]),
        deployment=deployment,
        kv_blocks=blocks or None,
        host_blocks=_host_blocks(row, model, deployment),
        arrival_s=arrival,
        stage=stage,
        prompt=prompt,
        input_tokens=length,
        output_tokens=nominal,
        counted_tokens=_number(row, "output_tokens_measured_mean", nominal),
        shared_tokens=int(_number(row, "system_prompt_tokens_nominal", 0)),
    )


def _model(row: Mapping[str, str]) -> Model:
    try:
        return load_model(row["model"])
    except SimmoeError:
        if not row.get("hf_id"):
            raise
        return load_model(row["hf_id"])


def _host_blocks(row: Mapping[str, str], model: Model, deployment: Deployment) -> int:
    """Blocks of a rank's KV pool in host memory: as logged, else what its memory holds."""
    if row.get("cpu_offload", "0") in ("", "0"):
        return 0
    per_block = kv_bytes_per_token(model, deployment) * deployment.kv_block_size
    return int(_number(row, "cpu_kv_blocks", 0)) or int(HOST_POOL_BYTES // per_block)


def _experts_over(row: Mapping[str, str], model: Model, tp: int, dp: int) -> int:
    """Ranks the experts are spread over: as stated, else all of a data-parallel engine's, else one."""
    stated = int(_number(row, "ep", 0))
    if model.experts is None:
        return 1
    if stated > 1:
        return stated
    return tp * dp if dp > 1 else 1


Requests = tuple[Array, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def _requests(row: Mapping[str, str], folder: Path, rng: np.random.Generator) -> Requests:
    if row.get("trace_file"):
        path = folder / row["trace_file"]
        if not path.is_file():
            path = folder / "traces" / Path(row["trace_file"]).name
        return _from_trace(read_table(path))
    nominal = _number(row, "system_prompt_tokens_nominal", 0) + _number(row, "question_tokens_nominal", 0)
    tokens = _number(row, "prompt_tokens_measured_mean", 0) or nominal + RETOKENISED
    output = _number(row, "output_tokens_nominal", 1)
    times, stages = [], []
    start = 0.0
    for number, part in enumerate(row["stages"].split(";")):
        rate, duration = part.split("rps*")
        seconds = float(duration.removesuffix("s"))
        count = round(float(rate) * seconds)
        times.append(start + np.sort(rng.uniform(0.0, seconds, count)))
        stages.append(np.full(count, number))
        start += seconds + PAUSE_S + 0.02 * output  # drain: about 20 ms a token
    arrival = np.concatenate(times)
    prompt = np.arange(arrival.size) % int(_number(row, "unique_prompts", PROMPTS))
    return arrival, np.concatenate(stages), prompt, np.full(arrival.size, round(tokens))


def _from_trace(table: Table) -> Requests:
    arrival = table.number("arrival_s")
    order = np.argsort(arrival, kind="stable")
    columns = [table.number(name)[order].astype(np.int64) for name in ("stage", "prompt_id", "input_tokens")]
    return arrival[order] - arrival.min(), columns[0], columns[1], columns[2]
