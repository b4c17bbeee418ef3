"""Every Python block in docs/ runs, page by page, in a folder of its own."""

import re
from pathlib import Path

import pytest
import yaml

from simmoe.simulation import run_scenario
from simmoe.specs.scenario import load_scenario

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(path for path in DOCS.glob("*.md") if "```python" in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_the_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    exec(compile("\n".join(blocks), page.name, "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out


SCENARIOS = re.findall(r"```yaml\n(.*?)```", (DOCS / "scenarios.md").read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("fragment", SCENARIOS)
def test_every_fragment_of_a_scenario_is_one_that_runs(fragment, tmp_path):
    whole = yaml.safe_load(SCENARIOS[0]) | yaml.safe_load(fragment)
    path = tmp_path / "scenario.yaml"
    path.write_text(yaml.safe_dump(whole), encoding="utf-8")
    result = run_scenario(load_scenario(path))
    assert result.metrics.requests


def test_there_are_examples():
    assert {"how_many_gpus", "predict_and_simulate", "sweep_and_plot"} <= {page.stem for page in PAGES}
