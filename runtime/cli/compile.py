"""`kinora compile`: what the compiler makes of a model's denoising step, or of its condition's prefill."""

from typing import Annotated

import typer

from ..errors import InputError
from .options import Debug, parse_size


def compile(
    model: Annotated[str, typer.Argument(help="tiny, liveavatar-14b, or a folder that was trained.")] = "tiny",
    explain: Annotated[bool, typer.Option("--explain", help="Show every layer, not only the passes.")] = False,
    part: Annotated[
        str, typer.Option(help="step, or prefill: the condition, when a stream opens and once later.")
    ] = "step",
    precision: Annotated[str, typer.Option(help="float32, bf16 or fp8.")] = "fp8",
    caches: Annotated[
        str, typer.Option(help="FP8 caches: slots, as on any GPU, or joined, as with nvidia-cudnn-frontend on Hopper.")
    ] = "slots",
    size: Annotated[str, typer.Option(help="Size of the video, WIDTHxHEIGHT; the model's own if left out.")] = "",
    bf16: Annotated[float, typer.Option(help="Ceiling of bf16 products in TFLOP/s; of an H200 by default.")] = 700.0,
    fp8: Annotated[float, typer.Option(help="Ceiling of FP8 products in TFLOP/s.")] = 1300.0,
    memory: Annotated[float, typer.Option(help="Ceiling of the memory in TB/s.")] = 4.3,
    debug: Debug = False,
) -> None:
    """Show what the compiler does to one denoising step (with --part prefill: to the condition): matches of its
    passes, FLOPs, bytes, and the time that a GPU with such ceilings cannot go below.

    Needs no GPU, and for [bold]liveavatar-14b[/] no weights:

    kinora compile --explain liveavatar-14b

    kinora compile --explain tiny --precision bf16

    kinora compile --explain tiny --part prefill
    """
    if min(bf16, fp8, memory) <= 0:
        raise InputError("ceilings must be more than 0; pass TFLOP/s with --bf16 and --fp8, TB/s with --memory")
    pixels = parse_size(size)
    from ...graphs.rewrite import explain as explaining
    from ...graphs.rewrite.work import Ceilings
    from ..compile import compiled

    program = compiled(model, precision, pixels, part, caches)
    if explain:
        typer.echo(explaining.explain(program, Ceilings(bf16, fp8, memory)))
    else:
        typer.echo("\n".join(explaining.summary(program)))
