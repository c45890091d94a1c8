"""`kinora bench`: hands over to the floor above, by name: imports go down only, and measuring is no part of running."""

from importlib import import_module

import typer

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""Every argument goes to `kinora.bench.commands`, --help too."""


def bench(context: typer.Context) -> None:
    """Measure ops and models beside the limits of this machine; see [bold]kinora bench --help[/]."""
    commands = import_module("kinora.bench.commands")
    code = commands.app(context.args or ["--help"], prog_name=commands.PROGRAM, standalone_mode=False)
    raise typer.Exit(code or 0)
