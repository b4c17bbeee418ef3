"""The tables of docs/frontiers.md are what its commands print, within what a new calibration may move."""

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from simmoe.cli import main as cli

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "frontiers.md").read_text(encoding="utf-8")
SECTIONS = re.findall(r"```bash\n(.*?)```\n\n(\|.*?)\n\n!", PAGE, flags=re.DOTALL)


@pytest.mark.parametrize(("command", "table"), SECTIONS, ids=lambda text: text.split()[4])
def test_the_table_is_what_the_command_prints(command, table, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command.replace("\\\n", " "))[1:]
    data = json.loads(CliRunner().invoke(cli.app, [*words[: words.index("--plot")], "--json"]).stdout)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert len({point["load"] for point in data["points"]}) == 3
    for point, row in zip(data["points"], rows, strict=True):
        load, policy, speed, seen, gain, seen_gain = row[:6]
        assert (float(load), policy) == (point["load"], point["policy"])
        assert float(speed.replace(",", "")) == pytest.approx(point["output_tokens_per_s"], rel=0.1)
        assert float(gain.rstrip(" %")) == pytest.approx(100 * point["gain_over_native"], abs=10)
        measured, measured_gain = point["measured_output_tokens_per_s"], point["measured_gain_over_native"]
        assert seen == ("" if measured is None else f"{measured:,.0f}")
        assert seen_gain == ("" if measured_gain is None else f"{100 * measured_gain:+.1f} %")
    assert sum(point["measured_output_tokens_per_s"] is not None for point in data["points"]) >= 6
