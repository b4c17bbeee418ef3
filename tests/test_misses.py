"""Taking large misses apart: sums, implied times, the factor that closes the gap, and tables in a page."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmoe.costs.operators import gemm
from simmoe.errors import SpecError
from simmoe.predict import predict
from simmoe.specs.deployment import Deployment
from simmoe.specs.load import load_hardware, load_model
from simmoe.specs.workload import Lengths, Workload
from simmoe.validation import markdown, misses
from simmoe.validation.misses import implied_s, is_large, of_kernel, of_step, suspects
from simmoe.validation.serving.rows import Run
from simmoe.validation.summary import Comparison, Explanation, Outcome

RUN = Run(
    load_hardware("h100"),
    load_model("deepseek-v2-lite"),
    Deployment(),
    Workload(concurrency=32, input=Lengths(mean=2000), output=Lengths(mean=200)),
)
seconds = st.floats(1e-5, 1e-2)


def figure(measured, predicted, quantity="tpot_mean", width=1.1, file="f", row=2, group="f/m/h/e"):
    return Comparison(group, file, row, "", quantity, measured, predicted, predicted / width, predicted * width)


def test_large_is_beyond_both_the_band_and_a_fifth():
    assert is_large(figure(10, 13))
    assert not is_large(figure(10, 11.5))  # outside the band, 15 % off
    assert not is_large(figure(10, 13, width=2))  # 30 % off, inside the band


@given(st.lists(seconds, min_size=2, max_size=6), st.floats(0.3, 3.0), st.booleans())
def test_a_suspects_factor_closes_the_gap(parts, ratio, rate):
    explanation = Explanation(
        what="x", total_s=sum(parts), parts_s={str(i): s for i, s in enumerate(parts)}, log_sigma={}
    )
    c = figure(1.0, ratio if rate else 1 / ratio, "output_tokens_per_s" if rate else "tpot_mean")
    target = implied_s(c, explanation)
    assert target == pytest.approx(explanation.total_s * ratio)  # too high a rate: the step really took longer
    for suspect in suspects(c, explanation):
        others = explanation.total_s - suspect.predicted_s
        assert others + suspect.factor * suspect.predicted_s == pytest.approx(target)
        assert suspect.factor > 0


def test_the_least_certain_large_part_is_blamed_before_a_certain_one():
    parts = {"sure": 1.0, "vague": 1.0, "small": 0.01}
    spreads = {"sure": 0.05, "vague": 0.5, "small": 0.5}
    explanation = Explanation(what="x", total_s=2.01, parts_s=parts, log_sigma=spreads)
    assert [s.part for s in suspects(figure(2.0, 1.0), explanation)] == ["vague", "small", "sure"]


def test_a_part_too_small_to_save_enough_is_no_suspect():
    explanation = Explanation(what="x", total_s=1.0, parts_s={"big": 0.9, "small": 0.1}, log_sigma={})
    assert [s.part for s in suspects(figure(0.5, 1.0), explanation)] == ["big"]


def test_parts_of_a_step_are_those_of_the_prediction():
    explanation = of_step(RUN, "tpot_mean", 10.0)
    breakdown = predict(RUN.hardware, RUN.model, RUN.deployment, RUN.workload).breakdown
    assert explanation.parts_s == breakdown.parts
    assert explanation.total_s == pytest.approx(sum(explanation.parts_s.values()))


def test_time_to_first_token_is_the_prompts_steps_and_waiting():
    # 2000 tokens in two chunks
    run = Run(RUN.hardware, RUN.model, Deployment(max_num_batched_tokens=1500), RUN.workload)
    explanation = of_step(run, "ttft_median", 500.0)
    assert explanation.total_s == pytest.approx(0.5)
    assert 0 < explanation.parts_s["waiting"] < 0.5
    assert explanation.parts_s["routed_experts"] > 0
    one_chunk = of_step(RUN, "ttft_median", 500.0)
    assert one_chunk.parts_s["waiting"] > explanation.parts_s["waiting"]  # fewer steps, less of them


def test_shares_of_a_kernel_follow_from_what_binds_it():
    hardware, parameters = load_hardware("h100"), gemm.OPERATOR.defaults
    tiny, huge = (
        of_kernel(gemm.OPERATOR, gemm.features_of([float(size)], size, size), parameters, hardware, 0.1)
        for size in (64, 8192)
    )
    assert max(tiny.parts_s, key=tiny.parts_s.get) == "launch_s"
    assert huge.parts_s["launch_s"] < 0.05 * huge.total_s
    assert "compute" in max(huge.parts_s, key=huge.parts_s.get)


def outcome(*figures):
    parts = {"host": 0.4, "head": 0.6}
    explanation = Explanation(what="mean step", total_s=1.0, parts_s=parts, log_sigma={"host": 1.0})
    return Outcome(list(figures), explainers={"f": lambda *_: explanation})


def test_worst_misses_come_first_whichever_way_they_are_off():
    found = outcome(figure(10, 14), figure(10, 2), figure(10, 10), figure(10, 30))
    assert [c.predicted for c in misses.misses(found)] == [2, 30, 14]
    lines = misses.lines(found, 1)
    assert "measured 10, predicted 2 (-80 %)" in lines[0]
    assert "host" in lines[2]
    assert [entry["predicted"] for entry in misses.to_json(found, 2)] == [2, 30]


def test_misses_are_counted_by_the_part_blamed_and_kernels_left_out():
    found = outcome(figure(10, 7), figure(10, 7), figure(10, 4, "latency_us"), figure(10, 9))
    assert misses.by_part(found) == {"f/m/h/e": {"host": 2}}


def test_a_figure_whose_file_keeps_no_parts_is_listed_without_them():
    assert len(misses.lines(Outcome([figure(10, 2)]), 5)) == 1


def test_tables_replace_what_stands_between_the_marks_and_nothing_else(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"before\n\n{markdown.BEGIN}\nold\n{markdown.END}\n\nafter\n")
    kernel = figure(10, 11, "latency_us", group="gemm/h100/vllm/bf16")
    for _ in range(2):
        markdown.write(outcome(figure(10, 4), figure(10, 9), kernel), page)
        text = page.read_text()
        assert text.startswith("before\n\n")
        assert text.endswith(f"{markdown.END}\n\nafter\n")
        assert "old" not in text
        assert text.count("| gemm / h100 | time | 1 | 10.0 |") == 1
        assert text.count("| f | TPOT | 2 | 35.0 |") == 1
        assert text.count("| f | 1 | 2 | host 1 |") == 1
    page.write_text("no marks")
    with pytest.raises(SpecError, match="mark where the tables go"):
        markdown.write(outcome(kernel), page)
