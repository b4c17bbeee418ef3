"""Deployments and workloads from command-line flags, over a file where one is given; errors name the flag."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from simmoe.errors import SpecError
from simmoe.specs import load, problems
from simmoe.specs.base import Spec
from simmoe.specs.deployment import Deployment
from simmoe.specs.routing import routing_values
from simmoe.specs.speculative import speculative_values
from simmoe.specs.traces import offered_per_s, workload_of
from simmoe.specs.workload import Arrivals, Lengths, Objective, TraceReplay, Workload

AnySpec = TypeVar("AnySpec", bound=Spec)

#: What a question without a load is answered for.
DEFAULT_CONCURRENCY = 64
DEFAULT_INPUT_TOKENS = 1024.0
DEFAULT_OUTPUT_TOKENS = 256.0

_FLAGS = {"weight_precision": "precision", "mean": "input/--output"}


def deployment_from(path: Path | None, **flags: Any) -> Deployment:
    """A deployment: the file's (or the defaults), with the flags that are not None.

    Raises
    ------
    SpecError
        Naming the flag that is wrong, or the file and key.
    """
    base = load.load_deployment(path) if path else None
    return _over(base.model_dump() if base else {}, flags)


def deployment_over(base: Deployment, path: Path | None, values: dict[str, Any]) -> Deployment:
    """A deployment read before, or the file's, with the flags that are not None."""
    if path is not None:
        return deployment_from(path, **values)
    return _over(base.model_dump(), values)


def _over(base: dict[str, Any], flags: dict[str, Any]) -> Deployment:
    """A deployment's fields with the flags that are not None, some of which are a line of several fields."""
    given = _given(flags)
    try:
        if "routing" in given:
            given["routing"] = {**(base.get("routing") or {}), **routing_values(given["routing"])}
        if "speculative" in given:
            line = given["speculative"]
            given["speculative"] = None if line == "none" else speculative_values(line)
    except ValueError as problem:
        raise SpecError(str(problem)) from None
    return _build(Deployment, {**base, **given})


def workload_from(
    path: Path | None,
    *,
    rate: float | None,
    concurrency: int | None,
    input_tokens: float | None,
    output_tokens: float | None,
) -> Workload:
    """A workload with a steady state: the file's (or 64 in flight, 1024 in, 256 out), with the flags that are not None.

    A trace is taken at its mean rate and lengths.
    """
    found = workload_over(
        None, path, rate=rate, concurrency=concurrency, input_tokens=input_tokens, output_tokens=output_tokens
    )
    if found.think_time:
        raise SpecError(f"{path}: think_time: clients that think have no closed form here; use simmoe simulate")
    if found.rate is None and found.open_loop:
        if (offered := offered_per_s(found)) is None:
            raise SpecError(f"{path}: trace: a single request has no rate; give --rate or --concurrency")
        return found.vary(rate=offered)
    return found


def workload_over(
    base: Workload | None,
    path: Path | None,
    *,
    rate: float | None,
    concurrency: int | None,
    input_tokens: float | None,
    output_tokens: float | None,
    replay: Path | None = None,
    burstiness: float | None = None,
    goodput: str | None = None,
) -> Workload:
    """The workload given, the file's or the default one, with the flags that are not None.

    A trace takes the place of lengths and arrivals, unless a rate or concurrency is given beside it. ``burstiness`` is
    the shape of gamma distributed gaps, ``goodput`` a line of limits, see `objective_of`.
    """
    own: dict[str, Any] = {}
    if burstiness is not None:
        if not 0 < burstiness < math.inf:
            raise SpecError(f"--burstiness: {burstiness:g} will not do: it should be above 0; 1 is Poisson")
        own["arrivals"] = Arrivals(kind="gamma", cv=burstiness**-0.5)
    if goodput is not None:
        own["objective"] = objective_of(goodput)
    if rate is not None and concurrency is not None:
        raise SpecError("give --rate (open loop) or --concurrency (closed loop), not both")
    if replay is not None:
        if input_tokens is not None or output_tokens is not None:
            raise SpecError("--replay brings its own lengths; leave --input and --output out")
        load_given = _given({"rate": rate, "concurrency": concurrency})
        played = workload_of(TraceReplay(path=str(replay)), **load_given)
        if burstiness is not None and played.rate is None:
            raise SpecError("--burstiness is of an open loop's arrivals at a rate; give --rate beside --replay")
        return played.vary(**own)
    if path is not None:
        base = load.load_workload(path)
    if base is None:
        base = Workload(
            concurrency=DEFAULT_CONCURRENCY,
            input=Lengths(mean=DEFAULT_INPUT_TOKENS),
            output=Lengths(mean=DEFAULT_OUTPUT_TOKENS),
        )
    values: dict[str, Any] = {name: getattr(base, name) for name in Workload.model_fields}
    if rate is not None:
        arrivals = Arrivals() if base.arrivals.stages else base.arrivals
        values |= {"rate": rate, "concurrency": None, "think_time": 0.0, "arrivals": arrivals}
    if concurrency is not None:
        values |= {"concurrency": concurrency, "rate": None, "arrivals": Arrivals()}
    for name, mean in (("input", input_tokens), ("output", output_tokens)):
        if mean is not None:
            values[name] = _build(Lengths, {"mean": mean}, flag=name)
    if burstiness is not None and values["concurrency"] is not None:
        raise SpecError("--burstiness is of an open loop's arrivals; give --rate")
    return _build(Workload, values | own)


def objective_of(line: str) -> Objective:
    """Limits on a request's latencies from one line: ``ttft=500ms,tpot=30ms``.

    Raises
    ------
    SpecError
        If a part is not one of ttft, tpot and e2e with a time.
    """
    limits: dict[str, str] = {}
    for part in line.split(","):
        name, equals, limit = part.partition("=")
        if not equals or name.strip() not in Objective.model_fields:
            raise SpecError(
                f"--goodput {line!r}: {part!r} is not one of ttft=, tpot=, e2e= with a time, e.g. ttft=500ms"
            )
        limits[name.strip()] = limit.strip()
    try:
        return Objective.model_validate(limits, context={"from_file": True})
    except ValidationError as problem:
        raise SpecError(f"--goodput {line!r}: {problems.describe(problem, Objective)}") from None


def checked(base: AnySpec, changes: dict[str, Any]) -> AnySpec:
    """A spec with some fields changed by flags of their names."""
    return _build(type(base), {**{name: getattr(base, name) for name in type(base).model_fields}, **changes})


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if value is not None}


def _build(kind: type[AnySpec], values: dict[str, Any], flag: str | None = None) -> AnySpec:
    try:
        return kind.model_validate(values)
    except ValidationError as problem:
        text = problems.describe(problem, kind)
        name, _, rest = text.partition(": ")
        if flag is not None:
            raise SpecError(f"--{flag}: {rest or text}") from None
        name, _, below = name.partition(".")
        if rest and name.replace("_", "").isalpha():
            inside = f"{below}: " if below else ""
            raise SpecError(f"--{_FLAGS.get(name, name).replace('_', '-')}: {inside}{rest}") from None
        raise SpecError(text) from None
