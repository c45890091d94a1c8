"""`kinora inspect`: what a checkpoint is, and whether anything is missing."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .bundle import show
from .options import Debug

if TYPE_CHECKING:
    from ...checkpoints_tools.inspect import FileReport

INCOMPLETE = 2
SHOWN = 12


def inspect(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="A weight file, a folder of them, a bundle, or a repository in the Hub's cache (owner/name)."
        ),
    ],
    full: Annotated[bool, typer.Option("--full", help="List every name, not only the first.")] = False,
    debug: Debug = False,
) -> None:
    """Show of each weight file what it is, its size and precision, and the tensors that are missing or too many.

    Reads headers alone and downloads nothing. Exit code 2 when a file is damaged, unknown, incomplete, or has nothing
    to be compared with.

    [bold]Examples[/]

    kinora inspect Wan2.2-S2V-14B

    kinora inspect liveavatar.safetensors
    """
    from ...checkpoints_tools.bundle.read import is_bundle
    from ..inspection import inspect_checkpoint

    if is_bundle(Path(checkpoint)):
        typer.echo("a bundle; `kinora bundle verify` reads all of it")
        show(Path(checkpoint))
        return
    report, console = inspect_checkpoint(checkpoint), Console()
    table = Table("file", "what it is")
    for title in ("size", "precision", "state"):
        table.add_column(title, overflow="fold")
    for file in report.files:
        shards = f"\n{file.shards} files" if file.shards > 1 else ""
        size = f"{file.parameters / 1e9:.3f} B\n{file.bytes / 1e9:.2f} GB\n{file.tensors} tensors"
        what = file.what or ("" if file.trouble else "no checkpoint that is known")
        table.add_row(
            escape(file.name + shards), escape(what), "" if file.trouble else size, file.precision, _state(file)
        )
    console.print(table)
    for file in report.files:
        if file.trouble:
            typer.echo(file.trouble)
        elif not file.compared:
            typer.echo(f"{file.name}: nothing says which tensors it should have; put the bundle's bundle.idx beside it")
        for wrong, names in file.differences.items():
            shown = names if full else names[:SHOWN]
            more = "" if len(shown) == len(names) else " ... (--full lists all)"
            typer.echo(f"{file.name}: {len(names)} {wrong}: {', '.join(shown)}{more}")
    for system, absent in report.systems.items():
        typer.echo(f"{system}: " + (f"lacks {', '.join(absent)}" if absent else "every part is here"))
    if not report.complete:
        raise typer.Exit(INCOMPLETE)


def _state(file: "FileReport") -> str:
    if file.trouble:
        return "[red]cannot be read[/]"
    if not file.what:
        return "[yellow]unknown[/]"
    wrong = ", ".join(f"{len(names)} {wrong}" for wrong, names in file.differences.items())
    if wrong:
        return f"[red]{wrong}[/]"
    return "[green]complete[/]" if file.compared else "[yellow]not compared[/]"
