"""Options that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError

Overwrite = Annotated[bool, typer.Option("--overwrite", "-y", help="Replace the output if it exists.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]  # read by `main`


def check_overwrite(path: Path, overwrite: bool) -> None:
    """Raises InputError when the file exists and may not be replaced."""
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; pass --overwrite to replace it, or another name")


def check_no_input(output: Path, *inputs: Path) -> None:
    """Raises InputError when the output is one of the inputs, under whatever name: writing would destroy it."""
    for path in inputs:
        if output.exists() and path.exists() and output.samefile(path):
            raise InputError(f"{output} is an input as well; give the output another name")


def parse_size(text: str) -> tuple[int, int] | None:
    """ "704x384" (width x height) or "256" -> (height, width); None for nothing. InputError for other words."""
    if not text:
        return None
    sides = text.lower().replace("*", "x").split("x")
    if len(sides) > 2 or not all(side.strip().isdecimal() for side in sides):
        raise InputError(f"{text!r} is no size; write WIDTHxHEIGHT such as 704x384, or one number for a square")
    return int(sides[-1]), int(sides[0])
