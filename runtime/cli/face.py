"""`kinora face`: draw a person that the embedded model can animate."""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from ..errors import InputError
from ..media.images import write_image
from .options import Debug, Overwrite, check_overwrite

SMALLEST, LARGEST = 64, 2048


def face(
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture to write: .png, .jpg or .webp.")],
    seed: Annotated[int, typer.Option(help="Which person: every number is another one.")] = 0,
    size: Annotated[int, typer.Option(help="Width and height in pixels.")] = 512,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Draw a new face in the style that [bold]tiny[/] was trained on.

    [bold]Example[/]

    kinora face --seed 7 -o face.png
    """
    check_overwrite(output, overwrite)
    if not 0 <= seed < 2**63:
        raise InputError(f"the seed is {seed}; pass a whole number from 0 to 2^63 - 1")
    if not SMALLEST <= size <= LARGEST:
        raise InputError(f"the size is {size}; pass {SMALLEST} to {LARGEST} pixels")
    from ..faces import draw_portrait

    write_image(output, np.asarray(draw_portrait(seed, size)))
    print(f"wrote {output}: face {seed}, {size}x{size}")
