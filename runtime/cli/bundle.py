"""`kinora bundle`: weights to take elsewhere, as a folder that C programs map."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import CheckpointError, InputError
from .options import Debug, Overwrite

if TYPE_CHECKING:
    from ...checkpoints_tools.bundle.read import Bundle

bundle = typer.Typer(
    no_args_is_help=True, rich_markup_mode="rich", help="Weights to take elsewhere: export, check, look."
)
PRECISIONS = {"float32": "float32", "bf16": "bfloat16", "bfloat16": "bfloat16", "fp8": "fp8"}
SHOWN = 5

Folder = Annotated[Path, typer.Argument(help="The folder of a bundle.")]
Checkpoint = Annotated[Path | None, typer.Option(help="Folder of the published files; for models that need one.")]
Device = Annotated[str, typer.Option(help="Where the model is loaded: auto, cpu, cuda, ...")]


@bundle.command()
def export(
    model: Annotated[str, typer.Argument(help="tiny, liveavatar-14b, or the folder of a trained model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to make.")],
    checkpoint: Checkpoint = None,
    precision: Annotated[str, typer.Option(help="float32, bf16 or fp8.")] = "bf16",
    prompt: Annotated[
        str | None, typer.Option(help="Keep the rows of this one prompt, and leave the text encoder (11 GB) out.")
    ] = None,
    tables: Annotated[
        bool, typer.Option("--tables", help="Add the modulations of every noise level, for programs of your own.")
    ] = False,
    device: Device = "auto",
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Write a model as a bundle: safetensors files, a binary index, and kinora_bundle.h, which reads them from C.

    kinora bundle export tiny --precision float32 -o tiny-bundle

    kinora bundle export liveavatar-14b --checkpoint Wan2.2-S2V-14B --precision fp8 -o liveavatar-fp8

    kinora generate --model liveavatar-fp8 ... then loads it without converting anything.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r} is not known; choose float32, bf16 or fp8")
    from ..bundles import export_bundle

    made = export_bundle(
        model,
        output,
        checkpoint=checkpoint,
        precision=PRECISIONS[precision],
        prompt=prompt,
        tables=tables,
        device=device,
        overwrite=overwrite,
    )
    size = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
    typer.echo(f"wrote {made}: {size / 1e9:.3f} GB")


@bundle.command()
def verify(
    folder: Folder,
    source: Annotated[str, typer.Option(help="The model that it was made of: also compare the weights with it.")] = "",
    checkpoint: Checkpoint = None,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Read every byte of a bundle: hashes, checksums, index against weight files, finite values; with --source also
    that the weights are the source's, what quantisation cost, as signal to noise (SQNR) in dB, that the source
    computes the rows of a fixed prompt and the folded tables, and that the manifest describes the source.

    kinora bundle verify tiny-bundle --source tiny
    """
    from ..bundles import verify_bundle

    found = verify_bundle(folder, source=source or None, checkpoint=checkpoint, device=device)
    if found.problems:
        told = "; ".join(found.problems[:SHOWN])
        more = len(found.problems) - SHOWN
        raise CheckpointError(f"{folder}: {told}{f'; and {more} more' if more > 0 else ''}")
    typer.echo(f"{folder} is sound: {found.tensors} tensors, {found.size / 1e9:.3f} GB")
    if found.equal:
        typer.echo(f"{', '.join(found.equal)}: every tensor that is not quantised is equal to the source's")
    for part, error in found.recomputed.items():
        typer.echo(f"{part}: " + (f"within {error:.1e} of" if error else "equal to") + " what the source computes here")
    if found.uncompared:
        typer.echo(f"not compared, because the source has nothing like it: {', '.join(found.uncompared)}")
    if found.sqnr:
        table = Table("quantised", "SQNR, dB", title="Furthest from the source", title_justify="left")
        for name, noise in sorted(found.sqnr.items(), key=lambda item: item[1])[:SHOWN]:
            table.add_row(escape(name), f"{noise:.1f}")
        middle = sorted(found.sqnr.values())[len(found.sqnr) // 2]
        table.add_row(f"median of {len(found.sqnr)}", f"{middle:.1f}")
        Console().print(table)


@bundle.command()
def inspect(
    folder: Folder,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    debug: Debug = False,
) -> None:
    """Show what a bundle holds, from its index and manifest alone.

    kinora bundle inspect tiny-bundle --tensors
    """
    opened = show(folder)
    if tensors:
        for record in opened.index.tensors:
            shape, scale = list(record.shape), "" if record.scale is None else "  scaled"
            typer.echo(f"{record.name}  {record.dtype.name} {shape}  at {record.offset}{scale}")


def show(folder: Path) -> "Bundle":
    """Print the model and the files of a bundle; returns it. CheckpointError for a folder that is none."""
    from ..bundles import open_bundle

    opened, console = open_bundle(folder), Console()
    said = opened.manifest
    console.print(escape(f"{said.get('model')} ({said.get('architecture')}), {said.get('precision')}"), highlight=False)
    parts = Table("file", "MB", "tensors", "numbers", "dtypes")
    for file in opened.index.files:
        records = opened.records(file.part).values()
        kinds = Counter(record.dtype.name for record in records)
        numbers = sum(record.size // record.dtype.itemsize for record in records)
        kept = ", ".join(f"{name} {count}" for name, count in kinds.most_common())
        parts.add_row(file.name, f"{file.size / 1e6:.1f}", str(len(records)), f"{numbers:,}", kept)
    console.print(parts)
    return opened
