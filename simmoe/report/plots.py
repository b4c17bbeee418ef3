"""Pictures: throughput against load per cap, predicted against measured. The home of matplotlib.

Lines differ by marker and dash as well as colour, so that they are told apart in greyscale.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simmoe.errors import SpecError
from simmoe.predict import Prediction, predict
from simmoe.series import Series
from simmoe.specs.deployment import Deployment
from simmoe.specs.hardware import Hardware
from simmoe.specs.model import Model
from simmoe.specs.workload import Workload

if TYPE_CHECKING:
    from simmoe.validation.gains import Gain
    from simmoe.validation.summary import Comparison

_MARKERS = "osD^vPX*"
_DASHES = ("-", "--", "-.", ":")
_COLOURS = ("#0b3c5d", "#d1495b", "#2e8b57", "#8d5a97", "#e09f3e", "#555555")


@contextmanager
def figure(path: Path, width: float = 8.0, height: float = 4.8, **subplots: Any) -> Iterator[Any]:
    """Axes to draw on, saved to ``path`` on leaving; the format follows the ending.

    Raises
    ------
    SpecError
        If the ending is not a picture format or the folder cannot be written.
    """
    import matplotlib as mpl  # noqa: PLC0415  (a fifth of a second, only when a picture is asked for)

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    check_ending(path)
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        drawing, axes = plt.subplots(figsize=(width, height), layout="constrained", **subplots)
        try:
            yield axes
            path.parent.mkdir(parents=True, exist_ok=True)
            drawing.savefig(path, dpi=150)
        except OSError as problem:
            raise SpecError(f"--plot {path}: cannot write ({problem.strerror})") from problem
        finally:
            plt.close(drawing)


def check_ending(path: Path) -> None:
    """SpecError if the name's ending is not a picture format; to ask before the work is done."""
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise SpecError(f"--plot {path}: end the name in .png, .svg or .pdf")


def style(index: int) -> dict[str, Any]:
    """Colour, dash and marker of the index-th line."""
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "linestyle": _DASHES[index % len(_DASHES)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "markersize": 4,
    }


def throughput_against_load(
    hardware: Hardware, model: Model, deployment: Deployment, workload: Workload, caps: Sequence[int], path: Path
) -> None:
    """Output tokens/s and median TPOT against requests in flight, a line per cap on active experts, with 90 % bands."""
    loads = _loads(workload, deployment)
    with figure(path, width=10.0, height=4.6, ncols=2) as (rate, latency):
        for index, cap in enumerate(caps):
            layout = deployment.vary(active_experts=cap) if model.experts else deployment
            found = [predict(hardware, model, layout, workload.vary(concurrency=n, rate=None)) for n in loads]
            _cap_lines(rate, latency, loads, found, index, cap)
        rate.set_yscale("log")
        rate.yaxis.set_major_formatter("{x:,.0f}")
        _load_axis(rate, "output tokens/s")
        _load_axis(latency, "TPOT, median [ms]")
        native = model.experts.top_k if model.experts else None
        where = f"{model.name} on {deployment.gpus} x {hardware.device.name}"
        rate.figure.suptitle(f"{where}, {workload.input.mean:g} in / {workload.output.mean:g} out")
        rate.legend(title=f"active experts (native {native})" if native else None, frameon=False)
        rate.annotate(
            "bands: 90 % from kernel-fit residuals; fewer active experts cost quality",
            (0.0, -0.2), xycoords="axes fraction", fontsize=8,
        )  # fmt: skip


def _loads(workload: Workload, deployment: Deployment) -> list[int]:
    top = max(2 * (workload.concurrency or 1), deployment.requests_per_replica * deployment.replicas)
    return sorted({int(n) for n in np.round(np.geomspace(1, top, 16))})


def _cap_lines(rate: Any, latency: Any, loads: list[int], found: list[Prediction], index: int, cap: int) -> None:
    metrics = [p.metrics for p in found if p.metrics]
    values = [m.output_tokens_per_s for m in metrics]
    look = style(index)
    rate.plot(loads, values, label=str(cap or "dense"), **look)
    rate.fill_between(
        loads, [p.throughput_90[0] for p in found], [p.throughput_90[1] for p in found], color=look["color"], alpha=0.08
    )
    latency.plot(loads, [1e3 * m.tpot.p50 for m in metrics], **look)


def _load_axis(axes: Any, label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlabel("requests in flight")
    axes.set_ylabel(label)
    if axes.get_yscale() == "linear":
        axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.25)


#: Figures of runs, panel by panel: how a quantity's name begins -> title and unit.
_KINDS = {
    "ttft": ("TTFT", "ms"),
    "tpot": ("TPOT", "ms"),
    "itl": ("inter-token latency", "ms"),
    "e2e": ("end to end", "ms"),
    "requests": ("requests", "1/s"),
    "output": ("output tokens", "1/s"),
    "total": ("input and output tokens", "1/s"),
}
_CROWDED = 2000


def parity(comparisons: Iterable[Comparison], path: Path) -> None:
    """Predicted against measured on logarithmic axes: a panel per operator for kernels, per kind of figure for runs.

    Lines mark equality, 10 % and a factor of two either way. Crowds are drawn as densities, sources by marker.
    """
    panels: dict[tuple[str, str], dict[str, list[Comparison]]] = defaultdict(lambda: defaultdict(list))
    for c in comparisons:
        first, *rest = c.group.split("/")
        kind = _KINDS.get(c.quantity.split("_", 1)[0])
        panels[kind or (first, "us")][first if kind else (rest[0] if rest else first)].append(c)
    if not panels:
        raise SpecError("--plot: nothing was compared, so there is nothing to draw")
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    with figure(path, width=3.6 * columns, height=3.8 * rows, ncols=columns, nrows=rows, squeeze=False) as axes:
        flat = axes.ravel()
        runs = [title for title, _ in _KINDS.values()]
        order = sorted(panels.items(), key=lambda item: (item[0][0] in runs, item[0]))
        markers: dict[str, dict[str, Any]] = {}
        for panel, ((title, unit), members) in zip(flat, order, strict=False):
            _parity_panel(panel, title, unit, members, markers if title in runs else None)
        for panel in flat[len(panels) :]:
            panel.set_visible(False)
        if markers:
            from matplotlib.lines import Line2D  # noqa: PLC0415

            handles = [Line2D([], [], linestyle="", label=name, **look) for name, look in markers.items()]
            flat[0].figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def _parity_panel(
    panel: Any, title: str, unit: str, members: dict[str, list[Comparison]], markers: dict[str, dict[str, Any]] | None
) -> None:
    measured, predicted = (
        np.array([getattr(c, name) for group in members.values() for c in group]) for name in ("measured", "predicted")
    )
    shown = (measured > 0) & (predicted > 0)
    low, high = np.min([measured[shown], predicted[shown]]) / 1.3, np.max([measured[shown], predicted[shown]]) * 1.3
    panel.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
    ends = np.array([low, high])
    for factor, dash in ((1.0, "-"), (1.1, ":"), (1 / 1.1, ":"), (2.0, "--"), (0.5, "--")):
        panel.plot(ends, factor * ends, color="black", linewidth=0.9 if factor == 1.0 else 0.5, linestyle=dash)
    if markers is None or shown.sum() > _CROWDED:
        panel.hexbin(
            measured[shown], predicted[shown], xscale="log", yscale="log", gridsize=55, bins="log", cmap="Greys",
            mincnt=1, vmin=0.3, extent=(*np.log10(ends), *np.log10(ends)), linewidths=0.1,
        )  # fmt: skip
    else:
        for name, group in sorted(members.items()):
            look = markers.setdefault(name, _source_marker(len(markers)))
            panel.plot([c.measured for c in group], [c.predicted for c in group], linestyle="", **look)
    off = np.abs(predicted[shown] / measured[shown] - 1)
    panel.set_title(f"{title}: {shown.sum():,} figures\nmedian error {100 * np.median(off):.0f} %", fontsize=9)
    panel.set_xlabel(f"measured [{unit}]")
    panel.set_ylabel(f"predicted [{unit}]")


def _source_marker(index: int) -> dict[str, Any]:
    """Shape, then filling, tell sources apart without colour."""
    dark = _COLOURS[index % len(_COLOURS)]
    filled = (index // len(_MARKERS)) % 2 == 0
    return {
        "marker": _MARKERS[index % len(_MARKERS)],
        "markersize": 4,
        "markeredgecolor": dark,
        "markeredgewidth": 0.6,
        "markerfacecolor": dark if filled else "white",
        "alpha": 0.7,
    }


def gains(found: Sequence[Gain], path: Path) -> None:
    """Gain over the native row against load, measured (marks) and predicted (lines), a panel per setting.

    Raises
    ------
    SpecError
        If no capped or pruned row is among the gains.
    """
    settings: dict[tuple[str, str, str], list[Gain]] = defaultdict(list)
    for gain in found:
        if not gain.native:
            settings[gain.setting, gain.model, gain.device].append(gain)
    if not settings:
        raise SpecError("--plot: no capped or pruned row, so there is no gain to draw")
    with figure(path, width=5.0 * len(settings), height=4.4, ncols=len(settings), squeeze=False) as axes:
        for panel, ((setting, model, device), members) in zip(axes.ravel(), sorted(settings.items()), strict=True):
            _gain_panel(panel, f"{model}, {device}\n{setting}", members)
        axes[0, 0].figure.supxlabel("requests in flight; marks: measured, lines: predicted", fontsize=9)


def _gain_panel(panel: Any, title: str, members: list[Gain]) -> None:
    pruned = any(g.pruned for g in members)
    kinds = sorted({g.total_experts if pruned else g.active_experts for g in members}, reverse=True)
    for index, kind in enumerate(kinds):
        row = sorted(
            (g for g in members if (g.total_experts if pruned else g.active_experts) == kind),
            key=lambda g: g.concurrency,
        )
        loads, look = [g.concurrency for g in row], style(index)
        panel.plot(loads, [100 * g.predicted_gain for g in row], label=f"{kind}", **(look | {"marker": ""}))
        panel.plot(loads, [100 * g.measured_gain for g in row], **(look | {"linestyle": ""}))
    panel.axhline(0.0, color="black", linewidth=0.6)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter("{x:g}")
    panel.set_title(title, fontsize=9)
    panel.set_ylabel("gain in throughput over native [%]")
    panel.legend(title="experts in the pool" if pruned else "active experts per token", frameon=False, fontsize=8)
    panel.grid(alpha=0.25)


def over_time(
    series: Series,
    path: Path,
    *,
    title: str = "",
    stage_edges_s: Sequence[float] = (),
    scaling: Sequence[tuple[float, int]] = (),
) -> None:
    """Queue and batch, KV use and utilisation, throughput and TTFT over the time of a simulated run.

    Parameters
    ----------
    stage_edges_s : where the load changes, drawn as lines. [s]
    scaling : replicas switched on from a time on; a panel of its own if their number changes. (time [s], replicas)
    """
    middle = (series.edges_s[1:] + series.edges_s[:-1]) / 2
    spaced = {"markevery": max(1, len(middle) // 40)}
    changes = len(scaling) > 1
    heights = [3, 3, 3, 1.2][: 3 + changes]
    with figure(
        path, width=9.0, height=7.0 + changes, nrows=3 + changes, sharex=True, gridspec_kw={"height_ratios": heights}
    ) as panels:
        queue, cache, rate = panels[:3]
        queue.plot(middle, series.running, label="running", **style(0), **spaced)
        queue.plot(middle, series.waiting, label="waiting", **style(1), **spaced)
        queue.set_ylabel("requests")
        cache.plot(middle, 100 * series.kv_utilisation, label="KV blocks held", **style(2), **spaced)
        cache.plot(middle, 100 * series.utilisation, label="time in steps", **style(3), **spaced)
        cache.set_ylabel("share [%]")
        rate.plot(middle, series.output_tokens_per_s, label="output tokens/s", **style(0), **spaced)
        rate.set_ylabel("output tokens/s")
        rate.yaxis.set_major_formatter("{x:,.0f}")
        wait = rate.twinx()
        wait.spines["right"].set_visible(True)
        # an interval without arrivals breaks the line, so every marker is drawn
        wait.plot(middle, series.ttft_s, label="mean TTFT of arrivals (right)", **style(1))
        wait.set_ylabel("TTFT [s]")
        for axes in (queue, cache, rate, wait):
            axes.margins(y=0.25)  # room for the legend above the lines
            axes.set_ylim(bottom=0)
        lines = [*rate.get_lines(), *wait.get_lines()]
        rate.legend(lines, [line.get_label() for line in lines], frameon=False, ncols=2, loc="upper left")
        for axes in (queue, cache):
            axes.legend(frameon=False, ncols=2, loc="upper left")
        if changes:
            times, counts = zip(*scaling, (series.edges_s[-1], scaling[-1][1]), strict=True)
            panels[3].step(times, counts, where="post", color=style(0)["color"])
            panels[3].set(ylabel="replicas", ylim=(0, max(counts) + 1))
            panels[3].yaxis.get_major_locator().set_params(integer=True)
        for axes in panels:
            axes.grid(alpha=0.25)
            for edge in stage_edges_s:
                axes.axvline(edge, color="#555555", linewidth=0.8, linestyle=":")
        panels[-1].set_xlabel("time [s]")
        if title:
            queue.set_title(title, loc="left", fontsize=10)
