"""Sections of a report about one deployment: throughput, step, memory, quality, how sure, and where it comes from."""

from __future__ import annotations

from collections.abc import Sequence

from simmoe import quality, units
from simmoe.costs.calibration import load as load_calibration
from simmoe.planning.frontier import frontier, policies
from simmoe.predict import Prediction, default_caps, predict
from simmoe.report import frontier as frontier_report
from simmoe.report import html_figures, plots
from simmoe.report.html_page import Page
from simmoe.specs import load
from simmoe.specs.deployment import Deployment
from simmoe.specs.hardware import Hardware
from simmoe.specs.model import Model
from simmoe.specs.workload import Workload


def deployment_sections(
    page: Page, hardware: Hardware, model: Model, deployment: Deployment, workload: Workload, caps: Sequence[int] = ()
) -> None:
    """What both pages show of one deployment: throughput, step, memory, quality."""
    chosen = list(caps) or list(default_caps(model))
    predictions = [
        predict(hardware, model, deployment.vary(active_experts=cap) if model.experts else deployment, workload)
        for cap in chosen
    ]
    base = next((p for p in predictions if model.experts and p.active_experts == model.experts.top_k), predictions[0])
    closed = workload if workload.concurrency else workload.vary(rate=None, concurrency=_in_flight(base))
    page.heading("Throughput against load")
    page.figure(
        "throughput",
        f"One deployment of {deployment.gpus} devices, by cap on active experts; bands: 90 % from the kernel fits.",
        lambda path: plots.throughput_against_load(hardware, model, deployment, closed, chosen, path),
    )
    page.heading("Where a step's time goes")
    page.figure(
        "step",
        "Mean step by part of the layers, per cap on active experts.",
        lambda path: html_figures.breakdown(predictions, path),
    )
    page.heading("Memory of one device")
    page.figure(
        "memory",
        "What fills the device, native number of active experts.",
        lambda path: html_figures.memory(base, path),
    )
    _quality(page, hardware, model, deployment, closed, chosen)
    page.heading("How sure")
    page.text(
        f"The mean step is off by {100 * base.log_sigma:.0f} % (one standard deviation of its logarithm): residuals of "
        "kernel fits on shapes they never saw; parts that nobody measured (small kernels, host time) count with 50 %. "
        "Not in it: routing unlike the one assumed, an engine unlike the one assumed, failures."
    )
    parameters = base.engine_parameters
    host = (
        f"engine {deployment.engine}: {units.text(parameters.host_time_per_step, 's')} of host time a step, "
        f"{units.text(parameters.host_time_per_sequence, 's')} a request, kernels x {parameters.kernel_slowdown:g} "
        f"({parameters.source})"
    )
    drafts = "no speculative decoding"
    if deployment.speculative is not None:
        drafts = f"speculative decoding: {deployment.speculative.in_words()}"
    page.items([host, f"routing uniform over experts unless the deployment says otherwise; {drafts}"])


def _quality(
    page: Page, hardware: Hardware, model: Model, deployment: Deployment, workload: Workload, caps: Sequence[int]
) -> None:
    if model.experts is None:
        return
    page.heading("What fewer active experts cost in quality")
    if not quality.known(model.name):
        native = model.experts.top_k
        page.items(
            [
                f"k = {cap}: {quality.in_words(model.name, active_experts=cap, native=native)}"
                for cap in caps
                if cap < native
            ]
        )
        return
    assert workload.concurrency is not None
    found = frontier(hardware, model, deployment, workload, policies(model, caps=caps), loads=[workload.concurrency])
    page.figure(
        "frontier",
        f"Predicted throughput against measured {found.benchmarks[0]}; filled: on the front, where scores within "
        f"{quality.NOISE:g} points count as equal. Reasoning falls earlier.",
        lambda path: frontier_report.plot(found, path),
    )
    rows = [
        [point.policy.name, f"{100 * point.gain:+.1f} %", *(_score(point.score(name)) for name in found.benchmarks)]
        for point in found.points
    ]
    page.table(("policy", "gain", *found.benchmarks), rows)
    sources = dict.fromkeys(score.curve.source for point in found.points for score in point.scores)
    page.text(f"Per cent correct. ~: between measured points; -: not measured. {'; '.join(sources)}")


def _score(score: quality.Score | None) -> str:
    return "-" if score is None else f"{score.score:.1f}{'' if score.measured else '~'}"


def _in_flight(prediction: Prediction) -> int:
    return max(1, round(prediction.metrics.mean_running)) if prediction.metrics else 64


def traffic(w: Workload) -> list[str]:
    """The load and the lengths, in words."""
    closed = f"{w.concurrency} requests in flight (closed loop)"
    load_words = f"{w.rate:g} requests/s (open loop)" if w.rate else closed
    lengths = f"{w.input.mean:g} input ({w.input.kind}) and {w.output.mean:g} output ({w.output.kind}) tokens"
    return [f"traffic: {load_words}; {lengths}"]


def sources(hardware: Hardware, model: Model) -> list[str]:
    """Where data sheet, shapes and calibrations come from."""
    found = [f"device {hardware.device.name}: {hardware.device.source}", f"model {model.name}: {model.source}"]
    for role, name in (("calibration", hardware.calibration), ("borrowed calibration", hardware.nearest_calibration)):
        if name is not None and (path := load.calibration_path(name)).exists():
            calibration = load_calibration(path)
            found.append(f"{role} {name} (digest {calibration.digest}): {'; '.join(calibration.sources)}")
    return found
