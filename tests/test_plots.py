"""The parity picture: what is on which panel, told apart without colour."""

import pytest
from matplotlib.figure import Figure

from simmoe.errors import SpecError
from simmoe.report import plots
from simmoe.validation.summary import Comparison


def figure(group, quantity, measured=10.0, predicted=12.0):
    return Comparison(group, "f", 2, "", quantity, measured, predicted, predicted / 2, predicted * 2)


def drawn(figures, path, monkeypatch):
    """The figure as it was when it was saved."""
    kept = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (kept.append(self), save(self, *a, **k)))
    plots.parity(figures, path)
    assert path.stat().st_size > 1000
    return kept[0]


def test_kernels_get_a_panel_per_operator_and_runs_one_per_kind_of_figure(tmp_path, monkeypatch):
    figures = [
        figure("gemm/h100_sxm/vllm/bfloat16", "latency_us"),
        figure("moe/h100_sxm/vllm/bfloat16", "latency_us"),
        figure("moe/a100_sxm/vllm/bfloat16", "latency_us"),
        figure("chat/m/h/vllm", "ttft_mean"),
        figure("chat/m/h/vllm", "ttft_p99"),
        figure("chat/m/h/vllm", "output_tokens_per_s"),
    ]
    picture = drawn(figures, tmp_path / "p.png", monkeypatch)
    titles = [axes.get_title().split("\n")[0] for axes in picture.axes if axes.get_visible()]
    assert titles == ["gemm: 1 figures", "moe: 2 figures", "TTFT: 2 figures", "output tokens: 1 figures"]
    assert [axes.get_xlabel() for axes in picture.axes][1:4] == ["measured [us]", "measured [ms]", "measured [1/s]"]
    for axes in picture.axes:
        assert axes.get_xlim() == axes.get_ylim()  # equality is the diagonal
        assert axes.get_xlim()[0] < 10
        assert axes.get_xlim()[1] > 12


def test_sources_differ_by_marker_or_filling_not_colour_alone():
    looks = [plots._source_marker(i) for i in range(12)]
    shapes = {(look["marker"], look["markerfacecolor"] == "white") for look in looks}
    assert len(shapes) == len(looks)


def test_an_empty_comparison_and_a_strange_ending_are_errors(tmp_path):
    with pytest.raises(SpecError, match="nothing was compared"):
        plots.parity([], tmp_path / "p.png")
    with pytest.raises(SpecError, match=r"end the name in .png"):
        plots.parity([figure("gemm/a/b/c", "latency_us")], tmp_path / "p.txt")
