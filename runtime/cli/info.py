"""`kinora info`: this machine, its models, and what would run."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .options import Debug


def info(
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Folder of the files of liveavatar-14b, or owner/name in the Hub's cache; see below."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Show what this machine has, which models are found, and what would run.

    The published model [bold]liveavatar-14b[/] is two downloads from the Hugging Face Hub, the second into the
    folder of the first or beside it:

    hf download Wan-AI/Wan2.2-S2V-14B --local-dir Wan2.2-S2V-14B

    hf download Quark-Vision/Live-Avatar --local-dir Live-Avatar

    It is looked for in ./Wan2.2-S2V-14B, ./checkpoints/Wan2.2-S2V-14B and the Hub's cache, or in --checkpoint.
    """
    from ..info import collect

    found, console = collect(checkpoint), Console()
    memory = f", {found.memory_gib:.1f} GiB memory" if found.memory_gib else ""
    machine = Table.grid(padding=(0, 2))
    machine.add_row("[bold]machine", escape(f"{found.system}, {found.cores} cores{memory}"))
    machine.add_row("[bold]Python", found.python)
    machine.add_row("[bold]packages", ", ".join(f"{name} {number}" for name, number in found.packages.items()))
    machine.add_row("[bold]FFmpeg", f"{found.ffmpeg} (inside PyAV)")
    for gpu in found.gpus:
        driver = f"driver {gpu.driver}" if gpu.driver else "driver unknown: pip install nvidia-ml-py"
        machine.add_row("[bold]GPU", escape(f"{gpu.name}, {gpu.memory_gib:.0f} GiB, {driver}"))
    if not found.gpus:
        machine.add_row("[bold]GPU", "none that PyTorch can use")
    machine.add_row("[bold]runs on", found.device)
    console.print(machine)

    models = Table("model", "size", title="Models", title_justify="left")
    models.add_column("would run here", overflow="fold")
    for model in found.models:
        models.add_row(f"[bold]{model.name}[/]\n{escape(model.about)}", model.size, escape(model.would_run))
    console.print("\n", models)

    ops = Table("op", "computed by", title="Ops", title_justify="left")
    for op in found.ops:
        ops.add_row(op.name, op.backend)
    console.print("\n", ops)
