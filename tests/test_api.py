"""What scripts are written against: complete, typed, documented, and quiet until it is used."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

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


def test_rows_become_a_frame():
    frame = sm.frame([{"rate": 1.0, "status": "ok"}, {"rate": 2.0, "status": "saturated"}])
    assert list(frame.columns) == ["rate", "status"]
    assert frame.shape == (2, 2)
