"""A whole run in one file: hardware, model, deployment, workload, what stands around the replicas, and how to measure.

``hardware`` and ``model`` are names or paths, ``deployment``, ``workload`` and ``cluster`` mappings or paths of files;
any of them may also be written out in place. Paths are relative to the scenario's folder.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from simmoe.errors import SpecError
from simmoe.specs import load, problems
from simmoe.specs.base import Seconds, Spec
from simmoe.specs.cluster import Cluster
from simmoe.specs.deployment import Deployment
from simmoe.specs.hardware import Hardware
from simmoe.specs.model import Model
from simmoe.specs.workload import Workload


class Run(Spec):
    """How much is simulated and measured.

    With ``drain`` traffic stops after the last measured request and rates are over the whole run, as in a benchmark
    with a fixed number of prompts; without, load goes on to the end, as in a steady state.
    """

    requests: int | None = Field(default=None, ge=1, le=100_000_000, description="Requests measured.")
    duration: Seconds | None = Field(default=None, gt=0, description="Measure who arrives within this time. [s]")
    warmup: float | Literal["mser"] | None = Field(default=None, description="Share of requests dropped, or mser.")
    drain: bool = False
    seed: int = Field(default=0, ge=0)
    replications: int = Field(
        default=1, ge=1, le=100_000, description="Runs with seeds of their own; intervals are across them."
    )
    interval: Seconds | None = Field(default=None, gt=0, description="Length of the intervals of the series. [s]")

    @field_validator("warmup", mode="before")
    @classmethod
    def _share_or_rule(cls, given: Any) -> Any:
        if isinstance(given, str) and given != "mser":
            raise ValueError(f"{given!r} is neither a share of the requests, e.g. 0.1, nor mser")
        return given

    @model_validator(mode="after")
    def _one_end(self) -> Run:
        if self.requests is not None and self.duration is not None:
            raise ValueError("give requests or duration, not both")
        if isinstance(self.warmup, float) and not 0 <= self.warmup < 1:
            raise ValueError(f"warmup {self.warmup:g} is a share of the requests, from 0 to below 1")
        return self


class Scenario(Spec):
    """Everything that decides a run."""

    name: str = "scenario"
    hardware: Hardware
    model: Model
    deployment: Deployment = Deployment()
    workload: Workload
    cluster: Cluster = Cluster()
    run: Run = Run()

    @model_validator(mode="after")
    def _starts_within(self) -> Scenario:
        rule, d = self.cluster.autoscaling, self.deployment
        if rule is None or rule.minimum <= d.replicas <= rule.maximum:
            return self
        serve = (
            f"the {d.replicas} replica{'s' * (d.replicas > 1)} that the deployment's gpus {d.gpus} make at the start"
        )
        if rule.minimum > d.replicas:
            raise ValueError(
                f"cluster.autoscaling.minimum: {rule.minimum} exceeds {serve}; lower it, or give gpus "
                f"{rule.minimum * d.devices_per_replica} (and tp {d.tp_size})"
            )
        raise ValueError(
            f"cluster.autoscaling.maximum: {rule.maximum} is below {serve}; raise it, or give gpus "
            f"{rule.maximum * d.devices_per_replica}"
        )


def load_scenario(path: Path) -> Scenario:
    """Read a scenario from a YAML file.

    Raises
    ------
    SpecError
        If it, or a file it names, is missing or wrong: file, key, what is wrong, what would be right.
    """
    if not path.is_file():
        raise SpecError(f"{path}: no such scenario file")
    contents = load.read_mapping(path)
    values = dict(contents)
    for name in ("hardware", "model"):
        if isinstance(ref := values.get(name), str):
            beside = path.parent / ref
            found = beside if beside.exists() else ref
            values[name] = load.load_hardware(found) if name == "hardware" else load.load_model(found)
    if isinstance(ref := values.get("deployment"), str):
        values["deployment"] = load.load_deployment(path.parent / ref)
    workload = values.get("workload")
    if isinstance(workload, str):
        values["workload"] = load.load_workload(path.parent / workload)
    elif isinstance(workload, dict):
        values["workload"] = _under("workload", path, lambda: load.workload_from(workload, path))
    if isinstance(ref := values.get("cluster"), str):
        values["cluster"] = load.read_mapping(path.parent / ref)
    values.setdefault("name", path.stem)
    try:
        return Scenario.model_validate(values, context={"from_file": True})
    except ValidationError as problem:
        raise SpecError(f"{path}: {problems.describe(problem, Scenario)}") from None


def _under(key: str, path: Path, read: Any) -> Any:
    """Read a part of a file; an error names its key."""
    try:
        return read()
    except SpecError as problem:
        text = str(problem)
        if text.startswith(f"{path}: "):
            rest = text.removeprefix(f"{path}: ")
            below = re.match(r"[\w.]+: ", rest) is not None  # else it is about the whole part
            raise SpecError(f"{path}: {key}{'.' if below else ': '}{rest}") from None
        raise
