"""What tests share: the command line as typed; hypothesis looks for new examples on people's machines only.

In CI it repeats the same ones: a green run stays green.
"""

import os
import sys

import pytest
from hypothesis import settings

from simmoe.cli import main as cli

settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture
def simmoe(monkeypatch, capsys, tmp_path):
    """Run a command in an empty folder; returns (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["simmoe", *map(str, words)])
        try:
            cli.main()
            status = 0
        except SystemExit as leaving:
            status = leaving.code or 0
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run
