"""CLI: the command `polyak`, checkpoints from a shell.

A command reads its arguments, asks a room of the library and tells what came of it: nothing is
computed here. The answer is on stdout, with `--json` as one object; all else is on stderr. torch
is imported inside the commands, so that `--help` comes at once.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from polyak.cli import averaging, converting, inspecting, plotting, reconstructing
from polyak.cli.program import Commands

__all__ = ["app"]

app = typer.Typer(
    cls=Commands,
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(epilog=averaging.EPILOG)(averaging.average)
app.command(epilog=inspecting.EPILOG)(inspecting.inspect)
app.command(epilog=converting.EPILOG)(converting.convert)
app.command(epilog=reconstructing.EPILOG)(reconstructing.reconstruct)
app.command(epilog=plotting.EPILOG)(plotting.plot)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"polyak {version('polyak')}")
        raise typer.Exit()


@app.callback()
def _polyak(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Say which one it is.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Averages of model weights, from checkpoints of any kind."""
