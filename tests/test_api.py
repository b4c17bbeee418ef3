"""What scripts are written against: complete, typed, documented, and quiet until it is used."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from simmoe import api as sm
from simmoe.errors import SpecError

DOCS = Path(__file__).parents[1] / "docs"


def test_what_is_promised_is_there_and_documented():
    assert sorted(sm.__all__) == sorted(set(sm.__all__))
    for name in sm.__all__:
        assert inspect.getdoc(getattr(sm, name)), name


def test_everything_public_is_promised():
    tree = ast.parse(inspect.getsource(sm))
    imported = {alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom)
                for alias in node.names}  # fmt: skip
    made = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    internal = {"annotations", "Mapping", "Sequence", "Path", "TYPE_CHECKING", "Any", "DEFAULT_REQUESTS", "Run"}
    assert set(sm.__all__) == (imported | made) - internal


def test_the_worked_scripts_use_nothing_else():
    for page in DOCS.glob("*.md"):
        for block in page.read_text(encoding="utf-8").split("```python")[1:]:
            for node in ast.walk(ast.parse(block.split("```")[0])):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("simmoe"):
                    assert [(node.module, alias.name) for alias in node.names] == [("simmoe", "api")]


def test_importing_loads_no_library_that_only_some_need():
    code = (
        "import sys, simmoe.api; print({'torch', 'scipy', 'matplotlib', 'pandas', 'ray', 'pyarrow'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
    bare = "import sys, simmoe; print({'simpy', 'numpy', 'pydantic'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", bare], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_a_question_reads_as_on_the_command_line():
    asked = sm.question(
        "deepseek-v2-lite", "h100,l40s:4", rate=3, input_tokens=100, output_tokens=10,
        limits={"tpot-p99": "50ms"}, prices={"h100": 2.5}, spares=1,
    )  # fmt: skip
    assert asked.offers[0].usd_per_device_hour == 2.5
    assert asked.offers[1].available == 4
    assert asked.limits == (sm.Limit("tpot", "p99", 0.05),)
    assert asked.spares == 1
    with pytest.raises(SpecError, match="h200"):
        sm.question("deepseek-v2-lite", "h100", rate=1, input_tokens=1, output_tokens=1, limits={}, prices={"h200": 1})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sm.Deployment(gpus=3, tp=2), "gpus 3 is not a multiple of tp 2"),
        (lambda: sm.Deployment(active_expert=3), "active_expert: unknown key; did you mean 'active_experts'"),
        (lambda: sm.Deployment().vary(active_experts=0), "active_experts: 0 will not do"),
        (lambda: sm.Deployment(routing={"exponent": -1}), r"routing\.exponent: -1 will not do"),
        (lambda: sm.Lengths(mean=0), "mean: 0 will not do"),
        (lambda: sm.load_hardware("h100").device.vary(memory_bandwidth="3 TB"), "memory_bandwidth: .3 TB. has no unit"),
        (lambda: sm.policies(sm.load_model("qwen3-8b")), "dense"),
    ],
)
def test_what_cannot_be_is_refused_in_the_librarys_own_words_as_soon_as_it_is_made(make, message):
    with pytest.raises(sm.SimmoeError, match=message):
        make()


def test_numbers_may_come_from_numpy():
    h100, model, deployment = sm.load_hardware("h100"), sm.load_model("deepseek-v2-lite"), sm.Deployment()
    lengths = sm.Lengths(mean=np.int64(128))
    asked = sm.Workload(rate=np.int64(2), input=lengths, output=sm.Lengths(kind="empirical", values=np.array([8, 16])))
    plain = sm.Workload(rate=2, input=sm.Lengths(mean=128), output=sm.Lengths(kind="empirical", values=(8, 16)))
    assert asked == plain
    caps = np.array([6, 3])
    few = sm.predict_caps(h100, model, deployment, asked, caps)
    assert few[1] == sm.predict(h100, model, deployment.vary(active_experts=3), plain)
    assert sm.predict_caps(h100, model, deployment, asked, []) == []
    assert sm.policies(model, caps=caps) == sm.policies(model, caps=[6, 3])
    question = sm.question(
        "deepseek-v2-lite", "h100", rate=np.int64(3), input_tokens=np.int64(100), output_tokens=10,
        limits={"ttft-p99": 2, "tpot-p99": np.float64(0.05)},
    )  # fmt: skip
    assert question.limits == (sm.Limit("ttft", "p99", 2.0), sm.Limit("tpot", "p99", 0.05))


def test_rows_become_a_frame():
    frame = sm.frame([{"rate": 1.0, "status": "ok"}, {"rate": 2.0, "status": "saturated"}])
    assert list(frame.columns) == ["rate", "status"]
    assert frame.shape == (2, 2)
