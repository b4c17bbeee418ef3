"""What a person and a script read: the table's rows, units and warnings; JSON that says the same."""

import json

import pytest
from rich.console import Console

from simmoe import units
from simmoe.predict import predict_caps
from simmoe.report import text as report
from simmoe.specs.deployment import Deployment
from simmoe.specs.load import load_hardware, load_model
from simmoe.specs.workload import Lengths, Workload

H100 = load_hardware("h100")
LITE = load_model("deepseek-v2-lite")


def work(**loop):
    return Workload(input=Lengths(mean=1024), output=Lengths(mean=256), **loop)


def printed(renderable):
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(renderable)
    return console.export_text()


CLOSED = predict_caps(H100, LITE, Deployment(), work(concurrency=64), (6, 3))
OPEN = predict_caps(H100, LITE, Deployment(), work(rate=4.0), (6, 3))


def test_the_table_has_a_row_per_cap_with_gain_and_interval():
    text = printed(report.prediction_table(CLOSED))
    native, capped = (line for line in text.splitlines() if line.lstrip().startswith(("6 (native)", "3 ")))
    rate = CLOSED[1].metrics.output_tokens_per_s
    gain = rate / CLOSED[0].metrics.output_tokens_per_s - 1
    assert "+0.0 %" in native
    assert f"{100 * gain:+.1f} %" in capped
    assert f"{rate:,.0f}" in capped
    low, high = CLOSED[1].throughput_90
    assert f"{low:,.0f} .. {high:,.0f}" in capped
    assert units.text(CLOSED[1].metrics.tpot.p50, "s") in capped


def test_what_was_assumed_stands_above_the_numbers():
    text = printed(report.prediction_table(CLOSED))
    head = text[: text.index("6 (native)")]
    for said in ("DeepSeek-V2-Lite", "NVIDIA H100", "64 requests in flight", "1024 input and 256 output", "Assumed:"):
        assert said in head


def test_a_table_that_varies_the_cap_says_what_quality_costs():
    assert "quality falls with k" in printed(report.prediction_table(CLOSED)).replace("\n", " ")
    assert "quality falls with k" not in printed(report.prediction_table(CLOSED[:1])).replace("\n", " ")


def test_coverage_notes_are_printed_once():
    text = printed(report.prediction_table(CLOSED))
    notes = {note for p in CLOSED for note in p.notes}
    assert notes
    for note in notes:
        assert text.replace("\n", " ").count(note[:60]) == 1


def test_the_steps_parts_are_listed_with_their_total():
    text = printed(report.prediction_table(CLOSED))
    step = text[text.index("Mean step") :]
    assert units.text(CLOSED[0].breakdown.routed_experts_s, "s") in step
    assert units.text(CLOSED[0].breakdown.total_s, "s") in step
    assert "dispatch" not in step  # nothing is sent on one device


def test_a_saturated_cap_is_said_in_words():
    edge = OPEN[0].saturation_output_tokens_per_s / 256 * 1.01
    text = printed(report.prediction_table(predict_caps(H100, LITE, Deployment(), work(rate=edge), (6, 2))))
    row = next(line for line in text.splitlines() if "6 (native)" in line)
    assert "saturated" in row
    assert "grows" in row


def test_json_says_what_the_table_says():
    plain = json.loads(json.dumps(report.prediction_json(CLOSED)))
    for row, p in zip(plain["predictions"], CLOSED, strict=True):
        assert row["metrics"]["output_tokens_per_s"] == p.metrics.output_tokens_per_s
        assert row["metrics"]["ttft_s"]["p99"] == p.metrics.ttft.p99
        assert row["output_tokens_per_s_interval_90"] == list(p.throughput_90)
        assert row["notes"] == list(p.notes)
        assert sum(row["mean_step_parts_s"].values()) == pytest.approx(p.breakdown.total_s)
    assert plain["predictions"][0]["gain_over_native"] == 0
    assert plain["hardware"] == "H100-SXM"


def test_in_an_open_loop_the_gain_is_of_the_saturation_throughput():
    """Both deliver the rate offered, so comparing that would say: no gain."""
    capped = report.prediction_json(OPEN)["predictions"][1]
    assert capped["metrics"]["requests_per_s"] == 4.0
    ratio = OPEN[1].saturation_output_tokens_per_s / OPEN[0].saturation_output_tokens_per_s
    assert capped["gain_over_native"] == pytest.approx(ratio - 1)
    assert capped["gain_over_native"] > 0
    assert "gain: of the saturation throughput" in printed(report.prediction_table(OPEN))
