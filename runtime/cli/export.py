"""`kinora export`: a model for programs that are not Python."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from ..errors import InputError, OutputError
from ..media.images import read_image
from ..outputs import check_folder
from .options import Debug, Overwrite, check_overwrite, parse_size

app = typer.Typer(help="Write a model for programs that are not Python.")

MODEL_RATE = 16_000  # samples per second that a model hears
TONE_SECONDS = 4

Model = Annotated[str, typer.Argument(help="tiny, liveavatar-14b, or the folder of a trained model.")]
Checkpoint = Annotated[
    Path | None, typer.Option(help="Folder of the published files; for models that are not embedded.")
]


class Part(StrEnum):
    """Which packages to write."""

    step = "step"
    decode = "decode"
    all = "all"


class Type(StrEnum):
    """How a GGUF file keeps matrices."""

    bf16 = "bf16"
    q8_0 = "q8_0"


@app.command()
def aoti(
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write into.")],
    model: Model = "tiny",
    part: Annotated[Part, typer.Option(help="The denoising step, the decoder, or both.")] = Part.all,
    device: Annotated[str, typer.Option(help="What the packages run on: auto, cpu or cuda.")] = "auto",
    precision: Annotated[str, typer.Option(help="float32, bfloat16 or fp8; auto is the model's own.")] = "auto",
    checkpoint: Checkpoint = None,
    image: Annotated[Path | None, typer.Option("--image", "-i", help="Picture of the stream; a drawn face.")] = None,
    audio: Annotated[Path | None, typer.Option("--audio", "-a", help="Sound of the stream; a rising tone.")] = None,
    prompt: Annotated[str, typer.Option(help="What the scene shows; tiny takes no words.")] = "",
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT of the video; by default what the model makes of it.")] = "",
    blocks: Annotated[int, typer.Option(help="Blocks of the stream that PyTorch runs for comparison.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of the stream's noise.")] = 0,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Compile a model's denoising step and its decoder into AOTInductor packages, which a C++ program runs with
    libtorch and without Python.

    The folder gets step.pt2, decode.pt2, and stream.pt: the first blocks of one stream, everything that goes in and
    what PyTorch made of it. The packages are run on it before this command says that they are done. They hold for one
    size, device and precision. [bold]examples/cpp[/] is a program that reads the folder.

    [bold]Example[/]

    kinora export aoti tiny -o out/tiny-aoti
    """
    names = ("step", "decode") if part is Part.all else (part.value,)
    for name in ("step", "decode"):  # what is not written now is removed: it does not fit the new stream
        check_overwrite(output / f"{name}.pt2", overwrite)
    check_overwrite(output / "stream.pt", overwrite)
    check_folder(output)
    from ...graphs.host_compiler import sharing_compiler

    try:
        sharing_compiler()  # before minutes of other work
    except RuntimeError as error:
        raise InputError(str(error)) from None
    pixels = parse_size(size)
    picture = None if image is None else read_image(image)
    if audio is None:
        samples = rising_tone()
    else:
        from ..media.audio import read_audio

        samples = read_audio(audio, MODEL_RATE)
    from ..export import export, prepare
    from ..faces import draw_portrait
    from ..load import load

    avatar = load(model, checkpoint=checkpoint, precision=precision, placement="single", device=device)
    picture = np.asarray(draw_portrait(0)) if picture is None else picture
    stream = prepare(
        avatar.system,
        picture,
        samples,
        avatar.video_size(picture, pixels),
        blocks=blocks,
        prompt=prompt,
        seed=seed,
    )
    errors = export(avatar.system, stream, output, names, tell=typer.echo)
    told = ", ".join(f"{name} differs from PyTorch by {error:.1e}" for name, error in errors.items())
    typer.echo(f"wrote {output}: {told}")


def rising_tone() -> np.ndarray:
    """Sound for a model to hear, float32 [n] at 16 kHz."""
    seconds = np.arange(TONE_SECONDS * MODEL_RATE) / MODEL_RATE
    return (0.3 * np.sin(2 * np.pi * (150 + 50 * seconds) * seconds)).astype(np.float32)


@app.command()
def gguf(
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write; ends with .gguf.")],
    model: Model = "tiny",
    kind: Annotated[Type, typer.Option("--type", help="How matrices are kept.")] = Type.bf16,
    checkpoint: Checkpoint = None,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Write a model's diffusion transformer as a GGUF file, with the published names of its tensors.

    [bold]q8_0[/] keeps matrices in 8 bits and a scale for every 32 values; embeddings, convolutions and the layers
    that are sensitive stay bfloat16, vectors float32. Needs the package gguf: pip install "kinora[export]".

    [bold]Example[/]

    kinora export gguf tiny --type q8_0 -o tiny.gguf
    """
    if output.suffix != ".gguf":
        raise OutputError(f"{output} has another ending than .gguf; name the file {output.with_suffix('.gguf').name}")
    check_overwrite(output, overwrite)
    if not output.parent.is_dir():
        raise OutputError(f"there is no folder {output.parent}; make it first")
    try:
        from ...checkpoints_tools.gguf import write_transformer

        precision = "auto" if checkpoint is None else "bfloat16"
        from ..load import load

        dit = load(model, checkpoint=checkpoint, precision=precision, device="cpu").system.dit
        try:
            counts = write_transformer(dit, output, kind.value, model)
        except ValueError as error:
            raise InputError(f"{model}: {error}") from error
        except OSError as error:
            raise OutputError(f"{output} could not be written ({error}); nothing is left of it") from error
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise InputError('the package gguf is missing; install it with pip install "kinora[export]"') from error
    told = ", ".join(f"{count} tensors {name}" for name, count in counts.items())
    typer.echo(f"wrote {output}: {told}, {output.stat().st_size / 1e6:.1f} MB")
