"""`kinora generate`: a picture and a voice -> a talking video, written while it is made."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from .options import Debug, Overwrite, check_no_input, check_overwrite, parse_size
from .progress import FrameProgress

STOPPED = 130  # exit code after Ctrl-C


def generate(
    image: Annotated[Path, typer.Option("--image", "-i", help="The person: a picture (jpg, png, webp, ...).")],
    audio: Annotated[Path, typer.Option("--audio", "-a", help="The voice: any sound file, or a video with sound.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The video to write; ends with .mp4.")],
    model: Annotated[
        str,
        typer.Option(help="[bold]tiny[/] (embedded), [bold]liveavatar-14b[/], or a folder: trained, or a bundle."),
    ] = "tiny",
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="For models that are not embedded: folder of the published files, or owner/name on the Hub."),
    ] = None,
    prompt: Annotated[str, typer.Option(help="What the scene shows; tiny takes no words.")] = "",
    seed: Annotated[int, typer.Option(help="Same seed, same video.")] = 0,
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT of the video, or one number for a square.")] = "",
    steps: Annotated[int | None, typer.Option(help="Denoising steps; by default what the model was made for.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, float32, bfloat16, or fp8.")] = "auto",
    placement: Annotated[
        str,
        typer.Option(
            help="single: plain steps; captured: compiled, on a GPU as CUDA graphs; batched: captured, several blocks "
            "at once; auto."
        ),
    ] = "auto",
    allow_silence: Annotated[bool, typer.Option("--allow-silence", help="Go on when the sound is silent.")] = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Make a talking video of one picture and one voice.

    [bold]tiny[/] is embedded: it needs no download and runs on any laptop, and it animates pictures in the drawn
    style of [bold]kinora face[/] (and of examples/faces). For photographs, use a published model:
    [bold]liveavatar-14b[/] with the folder of its files.

    [bold]Examples[/]

    kinora face --seed 7 -o face.png

    kinora generate --image face.png --audio voice.wav -o talk.mp4

    kinora generate -i me.jpg -a talk.m4a -o me.mp4 --model liveavatar-14b --checkpoint Wan2.2-S2V-14B

    The file is playable while it is written. Ctrl-C finishes it with what was made so far; twice, it stops at once.
    """
    from ..media.audio import SILENCE_DBFS, is_silent, read_audio  # PyAV: no other command needs it
    from ..media.images import read_image
    from ..media.writer import check_output
    from .record import MODEL_RATE, record

    check_output(output)
    check_no_input(output, image, audio)
    check_overwrite(output, overwrite)
    chosen_size = parse_size(size)
    picture = read_image(image)
    samples = read_audio(audio, MODEL_RATE)
    if is_silent(samples) and not allow_silence:
        raise InputError(
            f"{audio} is silent (nothing above {SILENCE_DBFS:.0f} dB of full scale); "
            "give a voice that can be heard, or pass --allow-silence"
        )
    from ... import runtime  # the models are imported only once the input is known to be good

    with FrameProgress(f"loading {model}") as progress:
        try:
            avatar = runtime.load(model, checkpoint=checkpoint, precision=precision, placement=placement, device=device)
            progress.say("reading the picture")
            session = avatar.stream(picture, prompt=prompt, seed=seed, steps=steps, size=chosen_size)
        except KeyboardInterrupt:
            stopped, told = True, "nothing was written"
        else:
            with session:
                stopped, told = record(session, samples, audio, output, progress)
    print(f"stopped: {told}" if stopped else told)
    if stopped:
        raise typer.Exit(STOPPED)
