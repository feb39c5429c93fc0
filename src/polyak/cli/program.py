"""PROGRAM: the commands as one program, and how it tells of errors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from polyak.cli.told import print_json, printable

__all__ = ["Commands", "UnfulfilledError"]


class UnfulfilledError(Exception):
    """What was asked does not hold: exit code 1."""


# What every version of typer has, but each in another module.
_UsageError: Any = typer.BadParameter.__mro__[1]


class Commands(TyperGroup):
    """Tells of errors as the commands tell their answers: in words or JSON, with an exit code."""

    _as_json = False

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read what precedes the command, and its name."""
        self._as_json = "--json" in args
        with self._usage_told():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            with self._usage_told():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            raise self._failed("stopped by Ctrl-C, and nothing was written", 130) from None
        except BrokenPipeError:
            raise  # whoever reads the answer has read enough
        except UnfulfilledError as error:
            raise self._failed(str(error), 1) from error
        except (ImportError, OSError, TypeError, ValueError) as error:
            raise self._failed(str(error), 2) from error

    @contextmanager
    def _usage_told(self) -> Iterator[None]:
        """Tell in JSON of arguments that are not understood; in words typer does."""
        try:
            yield
        except _UsageError as error:
            if not self._as_json:
                raise
            raise self._failed(error.format_message(), error.exit_code) from error

    def _failed(self, message: str, exit_code: int) -> typer.Exit:
        message = re.sub(
            r"\b([Pp]ass|or) (which|at|clock|decay)=", r"\1 --\2 ", message
        )  # of the library's arguments
        if self._as_json:
            print_json({"error": message})
        else:
            typer.echo(printable(f"polyak: {message}"), err=True)
        return typer.Exit(exit_code)
