"""The README's commands are real: those of simmoe run, and the test command is what continuous integration runs."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from simmoe.cli import main as cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(?:console|bash|sh|shell)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
LINES = [
    part.strip()
    for block in BLOCKS
    for line in block.splitlines()
    for part in line.removeprefix("$ ").split("  #")[0].split("&&")
]
COMMANDS = sorted({line for line in LINES if line.startswith("simmoe ")})
INLINE = sorted({" ".join(span.split()) for span in re.findall(r"`(simmoe [^`<]+)`", README)})
QUICK = [line for line in COMMANDS if line.split()[1] in ("predict", "list") or "--help" in line]


@pytest.mark.parametrize("command", QUICK)
def test_a_quick_command_of_the_readme_runs(command, monkeypatch, tmp_path, capsys):
    """In a folder that holds what a checkout holds, so that relative paths work and nothing is written to it."""
    for name in ("hardware", "profiles", "validate"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    status = 0
    try:
        cli.main()
    except SystemExit as leaving:
        status = leaving.code
    captured = capsys.readouterr()
    assert not status, captured.err
    assert captured.out


def test_the_answer_shown_is_the_answer_given(monkeypatch, capsys):
    shown = re.search(r"^```text\n(.*?)^\[then", README, flags=re.DOTALL | re.MULTILINE)
    assert shown
    monkeypatch.setenv("COLUMNS", "145")
    monkeypatch.setattr(sys, "argv", ["simmoe", "predict", "h100"])
    with pytest.raises(SystemExit):
        cli.main()
    given = " ".join(capsys.readouterr().out.split())
    assert given.startswith(" ".join(shown[1].split()))


@pytest.mark.parametrize("command", COMMANDS + INLINE)
def test_every_command_and_option_of_the_readme_exists(command):
    words = shlex.split(command)
    known = get_command(cli.app).commands
    assert words[1] in known or words[1].startswith("--"), command
    if words[1] in known:
        options = {option for parameter in known[words[1]].params for option in parameter.opts} | {"--help"}
        used = {word.split("=")[0] for word in words[2:] if word.startswith("--")}
        assert used <= options, used - options


def test_every_command_has_help_with_an_example():
    for name, command in get_command(cli.app).commands.items():
        assert command.help, name
        assert f"`simmoe {name}" in command.help, name


def test_ci_installs_and_tests_as_the_readme_says():
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    installs = [line for line in LINES if "pip install" in line and "test" in line]
    for line in installs:
        extra = re.search(r"\[[\w,]+\]", line)
        assert extra
        assert extra.group() in script
    assert "check pytest\n" in script


def test_no_file_of_the_package_reads_outside_it():
    """The repository stands alone: no absolute path in its code."""
    for path in [*ROOT.glob("simmoe/**/*.py"), *ROOT.glob("tests/**/*.py")]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"[\"'](?:\.\./shared|/(?:work|home|root|tmp)/)", text), path
