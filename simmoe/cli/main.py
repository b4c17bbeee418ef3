"""The command line: parse, call, print. Logic lives in the library; heavy imports wait until a command needs them."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from simmoe import __version__
from simmoe.cli import measure as cli_measure
from simmoe.cli import options
from simmoe.cli import plan as cli_plan
from simmoe.cli import predict as cli_predict
from simmoe.cli import profile as cli_profile
from simmoe.cli import simulate as cli_simulate
from simmoe.cli import weigh as cli_weigh
from simmoe.console import show_json
from simmoe.errors import SimmoeError, SpecError

app = typer.Typer(
    name="simmoe",
    help="Predict how fast a fine-grained Mixture-of-Experts model serves, and how sure the prediction is.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def main() -> None:
    """Run the command line; input errors become one line on stderr and exit status 1."""
    try:
        app()
    except SimmoeError as problem:
        sys.stderr.write(f"simmoe: {problem}\n")
        raise SystemExit(1) from None
    except BrokenPipeError:
        raise SystemExit(0) from None
    except OSError as problem:  # what is read is checked where it is read; this is a file that cannot be written
        sys.stderr.write(f"simmoe: {problem.filename or 'output'}: {problem.strerror or problem}\n")
        raise SystemExit(1) from None


def _version(value: bool) -> None:
    if value:
        typer.echo(f"simmoe {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


def list_command(
    kind: Annotated[str, typer.Argument(help="models, hardware or profiles")],
    json: options.Json = False,
) -> None:
    """List what is shipped.

    Example: `simmoe list models`
    """
    from simmoe.specs import load  # noqa: PLC0415

    if kind not in ("models", "hardware", "profiles"):
        raise SpecError(f"list {kind!r}: give models, hardware or profiles")
    names = {"models": load.model_names, "hardware": load.hardware_names, "profiles": load.profile_names}[kind]()
    if json:
        show_json({name: str(path) for name, path in names.items()})
    else:
        typer.echo("\n".join(names))


# the order in which --help lists them
cli_predict.mount(app)
app.command("list")(list_command)
cli_simulate.mount(app)
cli_plan.mount(app)
cli_weigh.mount(app)
app.command()(cli_profile.profile)
cli_measure.mount(app)
