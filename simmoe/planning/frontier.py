"""Throughput, or cost, against measured quality: what each cap, pool and refill rule buys, and what it gives away.

Every policy is predicted at each load; its quality is looked up (`simmoe.quality`), benchmark by benchmark, and left
blank where nobody measured it. A policy is on the front of a benchmark at a load if no other is at least as fast and
as good, and better in one. Scores closer than the noise count as equal.
Left out: policies trained for; quality of a cap and a pool at once (never measured together).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from simmoe import quality
from simmoe.errors import SpecError
from simmoe.predict import Prediction, default_caps, predict
from simmoe.provenance import Provenance, stamp
from simmoe.specs.deployment import Deployment
from simmoe.specs.hardware import Hardware
from simmoe.specs.load import calibration_of
from simmoe.specs.model import Model
from simmoe.specs.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How many experts a token gets: a cap, a cap that the batch refills, or a smaller pool.

    Attributes
    ----------
    active_experts : picked by each token.
    refill_to : experts a token takes in the end, from those the batch woke anyway; None: no refill.
    total_experts : size of the pool; None: all.
    """

    active_experts: int
    refill_to: int | None = None
    total_experts: int | None = None

    @property
    def name(self) -> str:
        """In words: "k=4", "k=4 refilled to 8", "k=6 of 32"."""
        text = f"k={self.active_experts}"
        text += f" refilled to {self.refill_to}" if self.refill_to else ""
        return text + (f" of {self.total_experts}" if self.total_experts else "")

    def applied(self, deployment: Deployment) -> Deployment:
        """The deployment with this policy."""
        routing = deployment.routing.vary(refill_to=self.refill_to)
        return deployment.vary(active_experts=self.active_experts, total_experts=self.total_experts, routing=routing)

    def scores(self, model: Model) -> tuple[quality.Score, ...]:
        """What was measured for it."""
        refilled = self.refill_to is not None
        return quality.scores(
            model.name,
            active_experts=None if refilled else self.active_experts,
            refill_from=self.active_experts if refilled else None,
            total_experts=self.total_experts,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A policy at a load.

    Attributes
    ----------
    load : concurrency [requests] or rate [1/s], as the workload's loop has it.
    gain : throughput over that of the model as trained at this load, less 1. [-]
    usd_per_million_output_tokens : None without a price. [USD]
    on_front : benchmarks on whose front it lies.
    """

    policy: Policy
    load: float
    prediction: Prediction
    tokens_per_s: float
    gain: float
    usd_per_million_output_tokens: float | None
    scores: tuple[quality.Score, ...]
    on_front: tuple[str, ...] = ()

    def score(self, benchmark: str) -> quality.Score | None:
        """The best known score on a benchmark (pools are cut in several ways)."""
        found = [score for score in self.scores if score.curve.benchmark == benchmark]
        return max(found, key=lambda score: score.score, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Frontier:
    """All points, load by load, and the benchmarks that anything is known on."""

    hardware: Hardware
    model: Model
    deployment: Deployment
    workload: Workload
    points: tuple[Point, ...]
    benchmarks: tuple[str, ...]
    usd_per_device_hour: float | None

    @property
    def notes(self) -> tuple[str, ...]:
        """Substitutions, borrowed calibrations and extrapolation of all points."""
        return tuple(dict.fromkeys(note for point in self.points for note in point.prediction.notes))

    @property
    def provenance(self) -> Provenance:
        """Version and digests of what made the predictions."""
        inputs = {name: getattr(self, name) for name in ("hardware", "model", "deployment", "workload")}
        return stamp(inputs, calibration=calibration_of(self.hardware))


def policies(
    model: Model, *, caps: Sequence[int] | None = None, pools: Sequence[int] = (), refill: bool = False
) -> list[Policy]:
    """The model as trained first, then caps, refilled caps and pools.

    Raises
    ------
    SpecError
        If the model has no experts.
    """
    if model.experts is None:
        raise SpecError(f"{model.name} is dense: there are no experts to vary; choose an MoE model")
    native = model.experts.top_k
    chosen = sorted({native, *(default_caps(model) if caps is None else caps)}, reverse=True)
    found = [Policy(active_experts=cap) for cap in chosen]
    if refill:
        found += [Policy(active_experts=cap, refill_to=native) for cap in chosen if cap < native]
    found += [Policy(active_experts=min(native, pool), total_experts=pool) for pool in pools]
    return found


def frontier(
    hardware: Hardware,
    model: Model,
    deployment: Deployment,
    workload: Workload,
    chosen: Sequence[Policy],
    *,
    loads: Sequence[float],
    usd_per_device_hour: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> Frontier:
    """Predict every policy at every load and mark the front of each benchmark.

    Parameters
    ----------
    workload : its lengths and kind of loop; ``loads`` replace its concurrency or rate.
    chosen : the first is the model as trained, against which gains are given.
    loads : concurrency [requests] of a closed loop, or rate [1/s] of an open one, where the highest throughput
        (saturation) stands for a policy's speed.
    """
    open_loop = workload.concurrency is None
    points: list[Point] = []
    for load in loads:
        at = workload.vary(rate=load) if open_loop else workload.vary(concurrency=round(load))
        here: list[Point] = []
        for policy in chosen:
            if progress:
                progress(f"load {load:g}, {policy.name}")
            prediction = predict(hardware, model, policy.applied(deployment), at)
            speed = prediction.saturation_output_tokens_per_s
            if prediction.metrics is not None and not open_loop:
                speed = prediction.metrics.output_tokens_per_s
            cost = None
            if usd_per_device_hour is not None:
                cost = deployment.gpus * usd_per_device_hour / 3600 / speed * 1e6
            here.append(
                Point(
                    policy=policy,
                    load=load,
                    prediction=prediction,
                    tokens_per_s=speed,
                    gain=speed / (here[0].tokens_per_s if here else speed) - 1,
                    usd_per_million_output_tokens=cost,
                    scores=policy.scores(model),
                )
            )
        points += here
    benchmarks = tuple(dict.fromkeys(score.curve.benchmark for point in points for score in point.scores))
    return Frontier(
        hardware=hardware,
        model=model,
        deployment=deployment,
        workload=workload,
        points=tuple(_marked(points, benchmarks)),
        benchmarks=benchmarks,
        usd_per_device_hour=usd_per_device_hour,
    )


def front(points: Sequence[tuple[float, float]], noise: float = 0.0) -> list[bool]:
    """Which (speed, score) pairs no other pair dominates: at least as fast and as good, and better in one.

    Scores are better only by more than ``noise``, and as good if no worse than by ``noise``.
    """

    def beats(other: tuple[float, float], one: tuple[float, float]) -> bool:
        faster, better = other[0] > one[0], other[1] > one[1] + noise
        return other[0] >= one[0] and other[1] >= one[1] - noise and (faster or better)

    return [not any(beats(other, one) for other in points) for one in points]


def _marked(points: Sequence[Point], benchmarks: Sequence[str]) -> list[Point]:
    on: dict[int, list[str]] = {}
    for load in {point.load for point in points}:
        for benchmark in benchmarks:
            known = [
                (i, point.tokens_per_s, score.score)
                for i, point in enumerate(points)
                if point.load == load and (score := point.score(benchmark)) is not None
            ]
            flags = front([(speed, score) for _, speed, score in known], quality.NOISE)
            for (i, _, _), flag in zip(known, flags, strict=True):
                if flag:
                    on.setdefault(i, []).append(benchmark)
    return [replace(point, on_front=tuple(on.get(i, ()))) for i, point in enumerate(points)]
