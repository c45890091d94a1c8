"""The program `kinora`: one file per command, and one place where errors become a line and an exit code.

Exit codes: 0 done, 1 internal error, 2 input that cannot be used, 130 stopped with Ctrl-C.
"""

import logging
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer

from ..errors import KinoraError
from .bench import PASS_ON, bench
from .bundle import bundle
from .compile import compile
from .export import app as export
from .face import face
from .generate import generate
from .info import info
from .inspect import inspect

QUIET = ("torchao", "torch.utils._pytree")
"""Loggers of what transformers import on the way: they warn of parts of torchao that nothing here uses."""

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
app.command()(generate)
app.command()(face)
app.command()(info)
app.command()(inspect)
app.command()(compile)
app.add_typer(export, name="export")
app.command(context_settings=PASS_ON)(bench)
app.add_typer(bundle, name="bundle")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"kinora {version('kinora')}")
        raise typer.Exit


@app.callback(epilog="Start here: [bold]kinora face -o face.png[/], then [bold]kinora generate --help[/].")
def kinora(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """One picture and one voice in, an endless talking video out."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code; a traceback is printed only with --debug."""
    return run(app, list(sys.argv[1:] if arguments is None else arguments), "kinora")


def run(app: typer.Typer, arguments: list[str], name: str) -> int:
    """`main` for any Typer program called `name` whose errors are to be told in the same way."""
    arguments = arguments or ["--help"]
    if "--debug" not in arguments:
        for logger in QUIET:
            logging.getLogger(logger).setLevel(logging.ERROR)
    try:
        return app(arguments, prog_name=name, standalone_mode=False) or 0
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        message, code = _explain(error)
        print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
        return code


def _explain(error: Exception) -> tuple[str, int]:
    if isinstance(error, KinoraError):
        return str(error), 2
    if hasattr(error, "format_message"):  # a wrong option: click's UsageError, which typer carries in some versions
        return f"{error.format_message()} See kinora --help.", 2
    told = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"internal error: {told}; run again with --debug for the traceback", 1
