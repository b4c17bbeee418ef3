"""Each run of a folder of the showdown's layout as a scenario that `simmoe simulate` plays.

`python -m simmoe.validation.showdown.scenarios validate/vllm_showdown` writes them anew (after `fit`). What is
said of an engine are the parameters estimated without the run's model. Runs without a trace come with their load.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from simmoe.specs.deployment import Deployment
from simmoe.specs.engines import EngineParameters
from simmoe.units import text
from simmoe.validation.showdown.compare import parameters_for
from simmoe.validation.showdown.runs import PROMPTS, PROMPTS_PER_GROUP, Run, pause_s, read_runs
from simmoe.validation.showdown.writing import write_from_folder

_ALWAYS = (
    "gpus", "tp", "dp", "ep", "weight_precision", "max_num_seqs", "max_num_batched_tokens", "memory_fraction",
    "kv_block_size", "engine", "engine_version",
)  # fmt: skip
_IF_SAID = ("pp", "kv_blocks", "prefix_caching", "wide_attention", "nucleus_sampling")


def scenario_of(run: Run) -> dict[str, Any]:
    """A run as the contents of a scenario file in the folder ``scenarios`` beside its tables."""
    return {
        "name": f"vllm_showdown {run.name}",
        "hardware": run.hardware.name,
        "model": run.model.name,
        "deployment": _deployment(run.deployment, parameters_for(run)),
        "workload": _workload(run),
        **({} if run.deployment.replicas == 1 else {"cluster": {"router": "round_robin"}}),
        "run": {
            **({} if run.trace else {"requests": len(run.arrival_s)}),
            "warmup": 0.0,
            "drain": True,
        },
    }


def write(folder: Path) -> None:
    """Write ``scenarios/<run>.yaml`` of every run of a folder."""
    for run in read_runs(folder)[0]:
        where = f"{run.model.name} on {run.hardware.name}, {run.workload}: run {run.name} of ../experiments.csv"
        contents = yaml.safe_dump(scenario_of(run), sort_keys=False)
        (folder / "scenarios" / f"{run.name}.yaml").write_text(f"# {where}\n{contents}", encoding="utf-8")


def _deployment(deployment: Deployment, p: EngineParameters) -> dict[str, Any]:
    default = Deployment()
    said = {name: getattr(deployment, name) for name in _ALWAYS}
    said |= {name: value for name in _IF_SAID if (value := getattr(deployment, name)) != getattr(default, name)}
    if deployment.ep > 1:
        said["exchange"] = {"algorithm": deployment.exchange.algorithm}
    overrides: dict[str, Any] = {
        name: text(getattr(p, name), "s")
        for name in ("front_end_time", "front_end_time_per_request", "front_end_time_per_token", "nucleus_time")
    }
    if deployment.kv_offload is not None:
        said["kv_offload"] = {"host_memory": f"{deployment.kv_offload.host_memory:.0f} B", "copies": "filled"}
        overrides["offload_entry_time"] = text(p.offload_entry_time, "s")
    overrides |= {"steps_ahead": p.steps_ahead, "shared_beside_tokens": p.shared_beside_tokens}
    return said | {"host_time_per_step": text(p.host_time_per_step, "s"), "engine_overrides": overrides}


def _workload(run: Run) -> dict[str, Any]:
    prompt, groups = float(run.input_tokens.mean()), PROMPTS // PROMPTS_PER_GROUP
    if run.trace:
        trace = {"path": f"../traces/{run.trace}", "group_prompts": PROMPTS_PER_GROUP}
        return {
            "trace": trace | {"shared_tokens": run.shared_tokens},
            "input": {"kind": "trace", "mean": round(prompt, 2)},
            "output": {"mean": run.output_tokens},
        }
    stages: list[dict[str, str]] = []
    for rate, seconds in run.load:
        if stages:
            pause = round(pause_s(run.output_tokens))
            stages.append({"rate": "0 request/s", "duration": f"{pause} s"})
        stages.append({"rate": f"{rate:g} request/s", "duration": f"{seconds:g} s"})
    return {
        "arrivals": {"kind": "staged", "exact_counts": True, "stages": stages},
        "input": {"mean": round(prompt)},
        "output": {"mean": run.output_tokens},
        "prompts": {"distinct": PROMPTS, "groups": groups, "shared_tokens": run.shared_tokens},
    }


if __name__ == "__main__":
    write_from_folder(
        "simmoe.validation.showdown.scenarios",
        "Writes one scenario a run beside the measurements, for `simmoe simulate`.",
        write,
    )
