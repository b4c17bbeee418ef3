"""Traffic offered to a deployment: when requests come, how long they are, what their prompts share, what is promised.

Left out: lengths that depend on each other or on time (replay a trace for these), conversations whose next turn waits
for the answer to the last one.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, GetJsonSchemaHandler, ValidationError, ValidationInfo, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import core_schema

from simmoe.specs.base import PerSecond, PerSecondFromZero, Seconds, Spec


class Lengths(Spec):
    """Distribution of a token count.

    ``fixed``: always ``mean``. ``uniform``: integers on [low, high]. ``lognormal``: arithmetic ``mean`` and
    coefficient of variation ``cv``, rounded, clipped to [low, high]. ``empirical``: drawn from ``values``, with
    replacement. ``trace``: each request's own, from the workload's trace; ``mean`` is the trace's.
    The mean of uniform and empirical lengths may be left out. A number stands for fixed lengths: ``input: 1024``.
    """

    kind: Literal["fixed", "uniform", "lognormal", "empirical", "trace"] = "fixed"
    mean: float = Field(ge=1, description="Mean. [tokens]")
    cv: float = Field(default=0.0, ge=0)
    low: int = Field(default=1, ge=1)
    high: int | None = Field(default=None, ge=1)
    values: tuple[int, ...] | None = Field(default=None, description="Observed lengths. [tokens]")

    @model_validator(mode="before")
    @classmethod
    def _with_mean(cls, given: Any) -> Any:
        """The mean of what is listed, where it is left out; anything unfit is left to the fields to refuse."""
        if isinstance(given, (int, float)) and not isinstance(given, bool):
            return {"mean": given}
        if not isinstance(given, (dict, Lengths)):
            raise ValueError(  # noqa: TRY004  (a ValueError is what pydantic turns into a line)
                f"{given!r} will not do: give a number of tokens, e.g. 1024, or a mapping, e.g. "
                "{kind: lognormal, mean: 1024, cv: 0.5}"
            )
        if isinstance(given, Lengths) or "mean" in given:
            return given
        try:
            if given.get("kind") == "uniform":
                return {**given, "mean": (given.get("low", 1) + given["high"]) / 2}
            if given.get("kind") == "empirical":
                return {**given, "mean": sum(given["values"]) / len(given["values"])}
        except (KeyError, TypeError, ZeroDivisionError):
            pass
        return given

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """As files may have it: a number of tokens, or a mapping whose mean or values may be left to a list or file."""
        mapping = handler.resolve_ref_schema(handler(schema))
        mapping.pop("required", None)
        mapping["properties"]["file"] = {
            "type": "string", "description": "Observed lengths: a file with one token count a line, beside this one.",
        }  # fmt: skip
        return {"anyOf": [{"type": "number", "minimum": 1, "description": "Always so many tokens."}, mapping]}

    @model_validator(mode="after")
    def _consistent(self) -> Lengths:
        if self.high is not None and self.high < self.low:
            raise ValueError(f"high {self.high} is below low {self.low}")
        if self.kind == "lognormal" and self.cv <= 0:
            raise ValueError("lognormal lengths need cv > 0")
        if self.kind == "uniform":
            if self.high is None:
                raise ValueError("uniform lengths need low and high")
            if abs(self.mean - (self.low + self.high) / 2) > 0.5:
                raise ValueError(f"mean {self.mean} is not the middle of {self.low}..{self.high}")
        if (self.kind == "empirical") != (self.values is not None):
            raise ValueError("empirical lengths need values, a list of token counts; other kinds have none")
        if self.values is not None:
            if not self.values or min(self.values) < 1:
                raise ValueError("values: give at least one token count, each of 1 or more")
            mean = sum(self.values) / len(self.values)
            if abs(self.mean - mean) > 0.01 * mean:
                raise ValueError(f"mean {self.mean} is not that of values, {mean:.6g}; leave it out")
        return self


class Objective(Spec):
    """Service-level objective. [s]"""

    ttft: Seconds | None = None
    tpot: Seconds | None = None
    e2e: Seconds | None = None


class Stage(Spec):
    """A stretch of constant offered rate; 0 is a pause."""

    rate: PerSecondFromZero = Field(description="Requests per second. [1/s]")
    duration: Seconds = Field(gt=0, description="How long it lasts. [s]")


class Arrivals(Spec):
    """How an open loop's requests are spread in time, around the workload's mean ``rate``.

    ``poisson``: independent. ``gamma``: gaps with coefficient of variation ``cv`` (1 is Poisson, above is bursty;
    ``vllm bench serve`` calls 1 / cv^2 burstiness). ``on_off``: Poisson at ``peak`` times the mean rate for a while
    (exponential, mean ``on_time``), then slower (mean ``off_time``) so that the mean holds; a two-state
    Markov-modulated Poisson process. ``diurnal``: Poisson at rate (1 + amplitude sin(2 pi (t / period - phase))).
    ``staged``: Poisson at each stage's rate in turn, then nothing; with ``exact_counts`` rate times duration requests
    in each stage, at uniform times, as load generators that fix the count do.
    """

    kind: Literal["poisson", "gamma", "on_off", "diurnal", "staged"] = "poisson"
    cv: float = Field(default=1.0, gt=0, le=100, description="gamma: coefficient of variation of gaps. [-]")
    on_time: Seconds = Field(default=30.0, gt=0, description="on_off: mean length of a burst. [s]")
    off_time: Seconds = Field(default=30.0, gt=0, description="on_off: mean length between bursts. [s]")
    peak: float | None = Field(
        default=None, ge=1, description="on_off: rate in a burst over the mean rate; None: all requests come in bursts."
    )
    amplitude: float = Field(default=0.25, ge=0, le=1, description="diurnal: peak rate over the mean rate, less 1. [-]")
    period: Seconds = Field(default=86400.0, gt=0, description="diurnal: length of a day. [s]")
    phase: float = Field(default=0.0, description="diurnal: when the mean is crossed upwards, in periods. [-]")
    stages: tuple[Stage, ...] = ()
    exact_counts: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Arrivals:
        if (self.kind == "staged") != bool(self.stages):
            raise ValueError("staged arrivals need stages, a list of rate and duration; other kinds have none")
        if self.stages and not self.mean_rate:
            raise ValueError("stages: every rate is 0, so that nothing arrives")
        highest = 1 + self.off_time / self.on_time
        if self.peak is not None and self.peak > highest:
            raise ValueError(f"peak {self.peak:g} exceeds 1 + off_time / on_time = {highest:g}, all requests in bursts")
        return self

    @property
    def mean_rate(self) -> float | None:
        """Mean rate of the stages; None where the workload's rate says it. [1/s]"""
        if not self.stages:
            return None
        return sum(s.rate * s.duration for s in self.stages) / sum(s.duration for s in self.stages)


class Prompts(Spec):
    """Which prompts are the same, or begin the same: what a prefix cache can find again.

    ``distinct`` prompts are used again and again, in turn or at random; they form ``groups`` of equal size, and those
    of one group share their first ``shared_tokens``.
    """

    distinct: int = Field(ge=1, description="Number of different prompts.")
    order: Literal["round_robin", "random"] = "round_robin"
    groups: int = Field(default=1, ge=1, description="Number of shared heads (system prompts).")
    shared_tokens: int = Field(default=0, ge=0, description="Tokens the prompts of one group share. [tokens]")

    @model_validator(mode="after")
    def _consistent(self) -> Prompts:
        if self.groups > self.distinct:
            raise ValueError(f"groups {self.groups} exceeds the {self.distinct} distinct prompts")
        return self


class TraceReplay(Spec):
    """Recorded requests to play again; formats are in `simmoe.specs.trace_formats`.

    Arrivals are the trace's, ``speed`` times as fast, unless the workload has a rate or a concurrency of its own:
    then only lengths and prompts are the trace's, used again from the start after the last.
    """

    path: str
    format: str | None = Field(
        default=None, description="Name in simmoe.specs.trace_formats.READERS; None: by its contents."
    )
    speed: float = Field(default=1.0, gt=0, description="Recorded time over replayed time. [-]")
    limit: int | None = Field(default=None, ge=1, description="Only this many first requests.")
    group_prompts: int = Field(default=1, ge=1, description="As many prompt_ids in a row have a head in common.")
    shared_tokens: int = Field(default=0, ge=0, description="Tokens of that head (a system prompt). [tokens]")


class Workload(Spec):
    """Exactly one of ``rate`` (open loop) and ``concurrency`` (closed loop), or the arrivals of a ``trace``.

    In a closed loop each client sends its next request when the last has ended and ``think_time`` has passed.
    The rate of staged arrivals may be left out.
    """

    name: str = "custom"
    rate: PerSecond | None = Field(default=None, description="Offered requests per second, over all replicas. [1/s]")
    arrivals: Arrivals = Arrivals()
    concurrency: int | None = Field(
        default=None, ge=1, le=1_000_000, description="Clients, each with one request at a time."
    )
    think_time: Seconds = Field(default=0.0, description="Mean pause of a client between two requests. [s]")
    think: Literal["exponential", "fixed"] = "exponential"
    input: Lengths
    output: Lengths
    prompts: Prompts | None = None
    trace: TraceReplay | None = None
    objective: Objective | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_rate(cls, given: Any, info: ValidationInfo) -> Any:
        """The rate of staged arrivals, which the stages say."""
        if not isinstance(given, dict) or given.get("rate") is not None:
            return given
        arrivals = given.get("arrivals")
        if isinstance(arrivals, dict):
            try:
                arrivals = Arrivals.model_validate(arrivals, context=info.context) if "stages" in arrivals else None
            except ValidationError:  # told of the field, by its key
                return given
        rate = arrivals.mean_rate if isinstance(arrivals, Arrivals) else None
        return given if rate is None else {**given, "rate": f"{rate!r} request/s"}

    @model_validator(mode="after")
    def _one_loop(self) -> Workload:
        if self.rate is not None and self.concurrency is not None:
            raise ValueError("give exactly one of rate (open loop) and concurrency (closed loop)")
        if self.trace is None:
            if self.rate is None and self.concurrency is None:
                raise ValueError("give exactly one of rate (open loop) and concurrency (closed loop)")
            if "trace" in (self.input.kind, self.output.kind):
                raise ValueError("lengths of kind trace need a trace")
        elif self.prompts is not None:
            raise ValueError("prompts: a trace brings its own")
        if self.concurrency is None and self.think_time:
            raise ValueError("think_time belongs to a closed loop; give concurrency")
        if self.rate is None and self.arrivals != Arrivals():
            raise ValueError("arrivals belong to an open loop; give rate")
        stated = self.arrivals.mean_rate
        if stated is not None and self.rate is not None and abs(self.rate - stated) > 1e-6 * stated:
            raise ValueError(f"rate {self.rate:g} is not the mean of the stages, {stated:g}; leave it out")
        return self

    @property
    def open_loop(self) -> bool:
        """Whether requests come whatever the deployment does."""
        return self.concurrency is None
