"""What a serving engine adds around kernels: named parameters per engine, version and device, each with its source.

``host_time_per_step``: scheduling, input preparation, sampling, detokenising that the device waits for, per step.
``host_time_per_sequence``: the part of it that grows with the number of running requests.
``front_end_time``: tokenising, HTTP and queue hand-over before a request reaches the scheduler: in TTFT and
end-to-end time, and so in the cycle of a closed loop's clients.
``launch_time_per_layer``: launching one layer's kernels of a step that computes a prompt, which no graph replays;
before the first token, beside ``front_end_time``.
``front_end_time_per_request``, ``_per_token``: the parts of it that grow with the number of requests being served and
with the tokens of the prompt.
``nucleus_time``, ``nucleus_bytes_per_logit``: sorting and summing the vocabulary where top-p or top-k sampling is on:
per step, and bytes moved per sequence and vocabulary entry.
``steps_ahead``: 1 if the next step is scheduled while one runs (asynchronous scheduling): newcomers wait one step more.
``pads_to_graphs``: batches are rounded up to the sizes of captured CUDA graphs.
``offload_entry_time``: walking one entry of a small KV pool in host memory, see `sim.offload_books`.
``fuses_shared_expert``: a shared expert as wide as a routed one runs as one more expert of every token in their kernel,
where experts are sliced by tensor parallelism.
``shared_beside_tokens``: up to so many tokens the shared expert runs on a second stream beside the routed ones.
``kernel_slowdown``: factor on every kernel's time; 1 for an engine of the calibration's age. Routed experts of a shape
in ``tuned_expert_shapes`` are exempt: that kernel was already the measured one, with its tile sizes tuned.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextvars import ContextVar
from functools import lru_cache
from importlib import resources
from types import MappingProxyType
from typing import Any

from pydantic import Field

from simmoe.specs.base import Seconds, Spec, from_yaml
from simmoe.specs.deployment import Deployment
from simmoe.specs.mechanisms import ExchangeAlgorithm


class EngineParameters(Spec):
    """One engine's named parameters and where they come from."""

    engine: str
    version: str | None = Field(default=None, description="Applies to versions starting with this; None: any.")
    before: str | None = Field(default=None, description="Applies to known versions older than this; None: any.")
    device: str | None = Field(default=None, description="Applies to this device name; None: any.")
    host_time_per_step: Seconds = 0.0
    host_time_per_sequence: Seconds = 0.0
    front_end_time: Seconds = 0.0
    launch_time_per_layer: Seconds = 0.0
    front_end_time_per_request: Seconds = 0.0
    front_end_time_per_token: Seconds = 0.0
    nucleus_time: Seconds = 0.0
    nucleus_bytes_per_logit: float = Field(default=0.0, ge=0, description="[B]")
    offload_entry_time: Seconds = 0.0
    steps_ahead: int = Field(default=0, ge=0, le=1, description="Steps decided before the running one ends. [steps]")
    pads_to_graphs: bool = Field(default=False, description="Batches are padded to the sizes of captured graphs.")
    fuses_shared_expert: bool = Field(default=False, description="Shared expert in the routed kernel.")
    shared_beside_tokens: int = Field(default=0, ge=0, description="Most tokens of a second stream's step. [tokens]")
    kernel_slowdown: float = Field(default=1.0, gt=0)
    tuned_expert_shapes: tuple[tuple[int, int], ...] = Field(
        default=(), description="(experts, width on a device) whose kernel the version shipped tuned for this device."
    )
    fitted_to: tuple[str, ...] = Field(default=(), description="Models whose served runs its times were fitted to.")
    source: str

    @property
    def title(self) -> str:
        """What it holds for, in a word or two."""
        return self.engine + (f" before {self.before}" if self.before else "")


class KernelChoice(Spec):
    """Which measured kernel an engine is known to run for an operator, and where it was measured."""

    engine: str
    operator: str
    since: str | None = Field(default=None, description="First version it holds for; None: any before.")
    before: str | None = Field(default=None, description="First version it no longer holds for; None: none.")
    architectures: tuple[str, ...] = Field(default=(), description="Device architectures it holds for; (): any.")
    framework: str = Field(description="Of the measured variant, as is kernel_source.")
    kernel_source: str
    calibration: str = Field(description="Folder under profiles/ to borrow from where the device has no such fit.")
    head_tile: float = Field(default=64.0, gt=0, description="Query heads of one work item.")
    splits: float = Field(default=1.0, gt=0, description="Fixed parts a context is split into; 1: as SMs allow.")
    source: str

    def holds(self, deployment: Deployment, architecture: str) -> bool:
        """Whether a deployment on an architecture runs this kernel; a version not known counts as the newest."""
        version = version_numbers(deployment.engine_version)
        early = self.since is not None and version is not None and version < (version_numbers(self.since) or ())
        late = self.before is not None and (version is None or version >= (version_numbers(self.before) or ()))
        here = not self.architectures or architecture in self.architectures
        return deployment.engine == self.engine and here and not early and not late


def version_numbers(text: str | None) -> tuple[int, ...] | None:
    """Leading release numbers of a version ("v0.4.4.post1 (x)" -> (0, 4, 4), "1" -> (1,)); None if there are none."""
    found = re.match(r"v?(\d+(?:\.\d+)*)", text.strip()) if text else None
    return tuple(int(part) for part in found.group(1).split(".")) if found else None


#: First vLLM whose ranks gather all tokens unless told otherwise; earlier ones broadcast them one rank after another
#: (``VLLM_ALL2ALL_BACKEND`` in vllm/envs.py: "naive" until 0.10, "allgather_reducescatter" from 0.11 on, whatever the
#: number of nodes).
GATHERS_SINCE = (0, 11)


def exchange_algorithm(deployment: Deployment) -> ExchangeAlgorithm:
    """How tokens travel between a deployment's expert-parallel ranks, ``auto`` resolved for its engine and version.

    vLLM's two half batches need DeepEP (its configuration refuses them otherwise), so that asking for them asks for it.
    Without expert parallelism every rank computes its slice for all tokens, so that gathering them is all there is.
    """
    chosen = deployment.exchange
    sliced = deployment.ep == 1
    if chosen.algorithm != "auto" and not (sliced and chosen.algorithm != "broadcast"):
        return chosen.algorithm
    if sliced and deployment.engine != "vllm":
        return "gather"
    if deployment.engine != "vllm" or (chosen.overlap == "two_batch" and not sliced):
        return "deepep"
    numbers = version_numbers(deployment.engine_version)
    return "broadcast" if numbers is not None and numbers < GATHERS_SINCE else "gather"


@lru_cache(maxsize=1)
def _kernels() -> tuple[KernelChoice, ...]:
    return tuple(KernelChoice.model_validate(entry, context={"from_file": True}) for entry in _raw()["kernels"])


def engine_kernels(deployment: Deployment, architecture: str) -> Mapping[str, KernelChoice]:
    """Operator name to the kernel the deployment's engine is known to run; operators not listed: its framework's."""
    return {choice.operator: choice for choice in reversed(_kernels()) if choice.holds(deployment, architecture)}


@lru_cache(maxsize=1)
def _raw() -> Any:
    return from_yaml(resources.files("simmoe.specs").joinpath("engines.yaml").read_text(encoding="utf-8"))


@lru_cache(maxsize=1)
def shipped_entries() -> tuple[EngineParameters, ...]:
    """The entries of engines.yaml."""
    return tuple(EngineParameters.model_validate(entry, context={"from_file": True}) for entry in _raw()["engines"])


#: Entries that answer in place of the shipped ones while set, for judging fits by models they never saw.
ENTRIES: ContextVar[tuple[EngineParameters, ...] | None] = ContextVar("entries", default=None)
#: Values that stand instead of every entry's own while set, for fits that ask what would follow from others.
OVERRIDES: ContextVar[Mapping[str, object]] = ContextVar("overrides", default=MappingProxyType({}))


def engine_parameters(deployment: Deployment, device: str, layers: int = 0) -> EngineParameters:
    """The most specific entry for the deployment's engine, its version and the device, with its overrides applied.

    ``front_end_time`` holds the launches of ``layers`` layers too, unless the deployment says it itself.
    """
    chosen = _entry(deployment, device)
    in_front = chosen.front_end_time + layers * chosen.launch_time_per_layer
    chosen = chosen.vary(front_end_time=in_front, launch_time_per_layer=0.0)
    changes: dict[str, Any] = dict(OVERRIDES.get())
    if changes:
        changes["source"] = "given for this run"
    if deployment.host_time_per_step is not None:
        changes |= {"host_time_per_step": deployment.host_time_per_step, "source": "deployment"}
    if deployment.engine_overrides is not None:
        known = deployment.engine_overrides.model_dump(exclude_none=True)
        changes |= {**known, "source": "deployment"} if known else {}
    if deployment.kernel_slowdown != 1.0:
        changes |= {"kernel_slowdown": deployment.kernel_slowdown, "source": "deployment"}
    return chosen.vary(**changes) if changes else chosen


def release_note(deployment: Deployment, device: str) -> str | None:
    """Which releases' times stand for the version asked for, in words; None: no version is named, or its own do."""
    engine, version = deployment.engine, deployment.engine_version
    if version is None or _entry(deployment, device).version is not None:
        return None
    unread = "" if version_numbers(version) else " (no release number)"
    return f"{engine} {version}{unread}: times around kernels are those of {releases(deployment, device)}"


def releases(deployment: Deployment, device: str) -> str:
    """The releases whose times around kernels a deployment has, in words; without a version, the newest known."""
    entry = _entry(deployment, device)
    if entry.version is not None:
        return entry.version
    if entry.before is not None:
        return f"releases before {entry.before}"
    eras = [
        e.before
        for e in shipped_entries()
        if e.engine == deployment.engine and e.before is not None and e.device is None
    ]
    return f"the newest known ({max(eras, key=lambda era: version_numbers(era) or ())} on)" if eras else "any release"


def _entry(deployment: Deployment, device: str) -> EngineParameters:
    version = deployment.engine_version or ""

    def fits(entry: EngineParameters) -> bool:
        same_version = entry.version is None or re.match(rf"v?{re.escape(entry.version)}(?!\d)", version) is not None
        numbers, limit = version_numbers(version), version_numbers(entry.before)
        early = limit is None or (numbers is not None and numbers < limit)
        return entry.engine == deployment.engine and same_version and early and entry.device in (None, device)

    def specificity(entry: EngineParameters) -> tuple[int, int, int, tuple[int, ...]]:
        oldest = tuple(-number for number in version_numbers(entry.before) or ())
        return (len(entry.version or ""), int(entry.device is not None), int(entry.before is not None), oldest)

    return max((entry for entry in ENTRIES.get() or shipped_entries() if fits(entry)), key=specificity)
