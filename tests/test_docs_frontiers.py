"""The figures of docs/frontiers.md are what its commands print."""

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from simmoe import cli

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "frontiers.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(block.replace("\\\n", " "))[1:] for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[3])
def test_the_table_is_what_the_command_prints(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    asked = words[: words.index("--plot")]
    data = json.loads(CliRunner().invoke(cli.app, [*asked, "--json"]).stdout)
    assert len({point["load"] for point in data["points"]}) == 3
    for point in data["points"]:
        seen, gain = point["measured_output_tokens_per_s"], point["measured_gain_over_native"]
        row = (
            f"| {point['load']:g} | {point['policy']} | {point['output_tokens_per_s']:,.0f} "
            f"| {'' if seen is None else f'{seen:,.0f}'} | {100 * point['gain_over_native']:+.1f} % "
            f"| {'' if gain is None else f'{100 * gain:+.1f} %'} |"
        )
        assert row in PAGE
    assert sum(point["measured_output_tokens_per_s"] is not None for point in data["points"]) >= 6
