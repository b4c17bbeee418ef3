"""The page of a result: complete, self-contained, escaped, with the numbers it was given."""

import html
import json
import re
from functools import cache
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from simmoe.cli import main as cli
from simmoe.errors import SimmoeError, SpecError
from simmoe.report import html as html_report
from simmoe.report.html_page import Page
from simmoe.report.plan import chance

PLAN = ["plan", "--model", "deepseek-v2-lite", "--hardware", "h100", "--rate", "20", "--tpot-p99", "20ms",
        "--replica-gpus", "1",
        "--requests", "200", "--processes", "1", "--json"]  # fmt: skip
SPLIT = [*PLAN, "--input", "6000", "--output", "100", "--ttft-p99", "1s"]
SPLIT[SPLIT.index("20ms")] = "12ms"


@cache
def result(*words):
    return CliRunner().invoke(cli.app, list(words)).stdout


def page_of(tmp_path, text, **options):
    (tmp_path / "result.json").write_text(text)
    html_report.write(tmp_path / "result.json", tmp_path / "page.html", **options)
    return (tmp_path / "page.html").read_text()


class Balanced(HTMLParser):
    """Every opened element is closed; ids are unique."""

    VOID = frozenset({"meta", "link", "br", "img"})

    def __init__(self):
        super().__init__()
        self.open, self.ids = [], []

    def handle_starttag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize(
    "words",
    [tuple(PLAN), tuple(SPLIT), ("predict", "h100", "--json"), ("predict", "h100", "--model", "qwen3-8b", "--json")],
)
def test_a_page_is_whole_and_asks_nobody_for_anything(tmp_path, words):
    page = page_of(tmp_path, result(*words))
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids))
    assert "<script" not in page
    addresses = re.findall(r'(?:src|href)="([^"]*)"', page) + re.findall(r"url\(([^)]*)\)", page)
    assert all(address.startswith(("#", "data:")) for address in addresses)
    assert 'name="viewport"' in page and "@media print" in page


def test_a_plan_says_what_to_buy_how_surely_and_from_what_sources(tmp_path):
    data = json.loads(result(*PLAN))
    page = page_of(tmp_path, result(*PLAN))
    answer = data["answer"]
    said = ("vllm serve", "What would change the answer", "Memory of one device", "2505.03531", "calibration h100_sxm")
    for words in (f"{answer['usd_per_hour']:,.2f} USD/h", html.escape(chance(answer["probability"])), *said):
        assert words in page
    assert page.count("<figure>") == 5


def test_a_split_answer_says_how_many_of_each_and_how_to_start_them(tmp_path):
    data = json.loads(result(*SPLIT))
    page = page_of(tmp_path, result(*SPLIT))
    prefill, decode = data["answer"]["sides"]
    assert f"{prefill['replicas']} prefill x (tp 1), {decode['replicas']} decode x (tp 1)" in page
    assert "--disaggregation-mode prefill" in page and "--disaggregation-mode decode" in page
    assert page.count("<figure>") == 5
    assert "a short simulated run a point" in page


def test_a_plan_without_an_answer_says_so(tmp_path):
    words = [*PLAN[:-1], "--json"]
    words[words.index("20ms")] = "0.1ms"
    page = page_of(tmp_path, result(*words))
    assert "No answer." in page and "does NOT hold" in page


def test_answers_of_one_token_have_a_page_with_a_dash_for_their_tpot(tmp_path):
    page = page_of(
        tmp_path, result("predict", "h100", "--rate", "4", "--output", "1", "--active-experts", "6", "--json")
    )
    assert "<td>-</td>" in page.replace(' class="n"', "")


def test_pictures_are_written_beside(tmp_path):
    (tmp_path / "r.json").write_text(result("predict", "h100", "--json"))
    written = html_report.write(tmp_path / "r.json", tmp_path / "r.html", pictures=tmp_path / "png")
    assert {path.suffix for path in written[1:]} == {".png"} and len(written) == 5
    assert all(path.stat().st_size > 5000 for path in written[1:])


def test_what_is_given_is_escaped():
    page = Page("<b>title</b>")
    page.text("<i>")
    page.table(("a", "b"), [["<u>", "&"]])
    text = page.render()
    assert "<b>title" not in text and "<i>" not in text and "<u>" not in text and "&amp;" in text


def test_nothing_is_certain():
    assert [chance(p) for p in (1.0, 0.9, 0.0)] == ["> 99 %", "90 %", "< 1 %"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["simulate", "h100", "--model", "olmoe-1b-7b", "--rate", "5", "--requests", "100"], ["ttft", "99", "seed"]),
        (["frontier", "h100", "--model", "deepseek-v2-lite", "--caps", "6,4", "--concurrency", "4"], ["k=4", "RTE"]),
    ],
)
def test_results_without_a_page_of_their_own_are_shown_as_tables(tmp_path, words, said):
    result = CliRunner().invoke(cli.app, [*words, "--json"])
    text = page_of(tmp_path, result.stdout)
    assert "<table>" in text and "http" not in text.replace("http://www.w3.org", "")
    for word in said:
        assert word in text
    rate = json.loads(result.stdout)
    shown = rate["metrics"]["output_tokens_per_s"] if "metrics" in rate else rate["points"][0]["output_tokens_per_s"]
    assert f"{shown:,.4g}" in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "not a result"),
        ("x", "JSON"),
        ("[1]", "not a result"),
        ('{"question": {}}', "not a whole result .'models' is missing"),
        ('{"predictions": 1}', "not a whole result"),
    ],
)
def test_what_is_not_a_result_is_refused_in_one_line(tmp_path, text, words):
    with pytest.raises(SpecError, match=words):
        page_of(tmp_path, text)


def test_a_sweeps_table_and_its_json_are_pages_too(tmp_path):
    grid = (
        "{model: deepseek-v2-lite, hardware: [h100, a100], deployment: {}, workload: {rate: 8, input: 500, output: 90}}"
    )
    (tmp_path / "grid.yaml").write_text(grid)
    words = ["sweep", str(tmp_path / "grid.yaml"), "--out", str(tmp_path / "grid.csv"), "--processes", "1", "--json"]
    rows = json.loads(CliRunner().invoke(cli.app, words).stdout)
    html_report.write(tmp_path / "grid.csv", tmp_path / "page.html")
    pages = ((tmp_path / "page.html").read_text(), page_of(tmp_path, json.dumps(rows)))
    for page in pages:
        assert "<li>workload.input: 500</li>" in page
        assert all(f"{row['output_tokens_per_s']:,.4g}" in page for row in rows)
        assert page.count("<tr>") == 3
    for name, text in (("none.csv", None), ("other.csv", b"a,b\n1,2\n"), ("bytes.csv", b"\xff\xfe\x00")):
        if text is not None:
            (tmp_path / name).write_bytes(text)
        with pytest.raises(SimmoeError, match=f"{name}: (there is no|not a|cannot be read as a) table"):
            html_report.write(tmp_path / name, tmp_path / "page.html")


@pytest.mark.parametrize(
    "words",
    [tuple(PLAN), ("predict", "h100"), ("frontier", "h100"), ("scaling",), ("simulate", "h100", "--requests", "50")],
)
def test_json_says_what_made_it_the_calibration_too(words):
    stamped = json.loads(result(*words, "--json"))["provenance"]
    assert any(name.startswith("hardware") for name in stamped["inputs"])
    assert stamped["calibration"] is not None
