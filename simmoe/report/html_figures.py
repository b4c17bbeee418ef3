"""Figures of the HTML report: step and memory by part, latency and confidence against load.

Bars differ by hatching as well as colour and lines by dash and marker, so that they are told apart in greyscale.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist

import numpy as np

from simmoe.planning.objective import Limit
from simmoe.planning.screen import LoadGrid
from simmoe.predict import Prediction
from simmoe.report import plots

_HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--", "**", "||", "/.", "x.")
_TINTS = ("#0b3c5d", "#d9d9d9", "#d1495b", "#f3e3c3", "#2e8b57", "#b8c9d9", "#8d5a97", "#f7d4d8", "#e09f3e", "#cfe8d9")


def breakdown(predictions: Sequence[Prediction], path: Path) -> None:
    """Mean step by part, a bar per cap."""
    names = [name for name in predictions[0].breakdown.parts if any(p.breakdown.parts[name] > 0 for p in predictions)]
    total = max(p.breakdown.total_s for p in predictions)
    small = [name for name in names if all(p.breakdown.parts[name] < 0.02 * total for p in predictions)]
    shown = [name for name in names if name not in small]
    with plots.figure(path, width=8.0, height=1.4 + 0.5 * len(predictions)) as axes:
        labels = [f"k = {p.active_experts}" if p.active_experts else "dense" for p in predictions]
        left = np.zeros(len(predictions))
        for index, name in enumerate([*shown, *(["other"] if small else [])]):
            members = small if name == "other" else [name]
            width = np.array([1e3 * sum(p.breakdown.parts[m] for m in members) for p in predictions])
            axes.barh(
                labels, width, left=left, label=name.replace("_", " "), color=_TINTS[index % len(_TINTS)],
                hatch=_HATCHES[index % len(_HATCHES)], edgecolor="black", linewidth=0.5,
            )  # fmt: skip
            left += width
        axes.invert_yaxis()
        axes.set_xlabel("mean step [ms]")
        axes.legend(frameon=False, fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.3))


def memory(prediction: Prediction, path: Path) -> None:
    """Device memory by what fills it."""
    m, device = prediction.memory, prediction.hardware.device
    share = prediction.metrics.kv_utilisation if prediction.metrics else 1.0
    parts = {
        "weights": m.weights,
        "workspace": m.workspace,
        "KV cache in use": share * m.kv_bytes,
        "KV cache free": (1 - share) * m.kv_bytes,
        "left to others": max(0.0, device.memory - m.weights - m.workspace - m.kv_bytes),
    }
    with plots.figure(path, width=8.0, height=2.0) as axes:
        left = 0.0
        for index, (name, size) in enumerate(parts.items()):
            axes.barh(
                [""], [size / 1e9], left=left, label=f"{name} {size / 1e9:.1f}", color=_TINTS[index],
                hatch=_HATCHES[index], edgecolor="black", linewidth=0.5,
            )  # fmt: skip
            left += size / 1e9
        axes.set_xlabel(f"memory of one {device.name} [GB]")
        axes.figure.legend(frameon=False, fontsize=8, ncols=5, loc="outside lower center")


def latency(
    grid: LoadGrid, replicas: int, rate: float, limits: Sequence[Limit], path: Path, how: str = "screened"
) -> None:
    """TTFT and TPOT at the 99th percentile, and the chance that the objective holds, against the load."""
    rates = grid.requests_per_s * replicas
    sigma = NormalDist().inv_cdf(0.95) * grid.log_sigma
    with plots.figure(path, width=10.0, height=3.6, ncols=3) as (ttft, tpot, chance):
        for index, (axes, metric) in enumerate(((ttft, "ttft"), (tpot, "tpot"))):
            values = 1e3 * grid.latency_s[metric, "p99"]
            look = plots.style(index)
            axes.plot(rates, values, **look)
            axes.fill_between(rates, values * np.exp(-sigma), values * np.exp(sigma), color=look["color"], alpha=0.12)
            for limit in limits:
                if limit.metric == metric:
                    axes.axhline(1e3 * limit.seconds, color="black", linestyle=":", linewidth=1)
                    axes.set_ylim(0, max(1.3e3 * limit.seconds, 1.2 * float(np.interp(rate, rates, values))))
            axes.set_ylabel(f"{metric.upper()} p99 [ms], {how}")
        # a simulated grid ends before saturation: no chance is told where slower steps would lead beyond it
        told = grid.requests_per_s * np.exp(3 * grid.log_sigma) <= grid.requests_per_s[-1]
        told |= how == "screened"
        odds = [100 * grid.probability(float(r), limits) for r in grid.requests_per_s[told]]
        chance.plot(rates[told], odds, **plots.style(2))
        chance.set_ylim(-5, 105)
        chance.set_ylabel("objective holds [% chance]")
        for axes in (ttft, tpot, chance):
            axes.axvline(rate, color="black", linestyle="--", linewidth=1)
            axes.set_xlabel("requests/s")
            axes.grid(alpha=0.25)
