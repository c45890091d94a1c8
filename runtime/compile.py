"""The compiled programs of a model that `load` knows, for looking at them: nothing is denoised.

`liveavatar-14b` is built on the meta device, without weights, memory or a GPU.
"""

from typing import Literal

import torch

from ..graphs.models.liveavatar import LIVEAVATAR_14B, LiveAvatar
from ..graphs.models.liveavatar_memory import RingFormat
from ..graphs.rewrite.program import Program
from ..graphs.rewrite.recipe import Recipe
from .errors import InputError
from .load import load
from .placement.captured import CapturedBlock
from .systems.liveavatar_mode import STREAM, GenerationMode

PRECISIONS = ("float32", "bf16", "fp8")
PARTS = ("step", "prefill")
CACHES: dict[str, Literal["fp8", "joined"]] = {"slots": "fp8", "joined": "joined"}
"""Formats of FP8 caches: in slots, as any GPU has them; in one buffer, where cuDNN attends them."""
PUBLISHED = "liveavatar-14b"
PUBLISHED_SIZE = (704, 384)  # (height, width) in pixels that both published presets come to for a 9:16 picture
PIXELS = 16  # a token's side: 8 of the VAE times a patch of 2


def compiled(
    name: str, precision: str, size: tuple[int, int] | None = None, part: str = "step", caches: str = "slots"
) -> Program:
    """The denoising step of model `name`, or the prefill of its condition, at `size` (height, width) in pixels, None
    for the model's own. `caches`: how FP8 keeps them, one of `CACHES`.

    Errors: InputError for an unknown name, precision, part or cache, and for sides that are not multiples of 16.
    """
    known = {"part": (part, PARTS), "precision": (precision, PRECISIONS), "caches": (caches, CACHES)}
    for word, (given, choices) in known.items():
        if given not in choices:
            raise InputError(f"{word} {given!r} is not known; choose one of {', '.join(choices)}")
    if caches == "joined" and precision != "fp8":
        raise InputError(f"joined caches are FP8, precision {precision} has others; leave caches out or take fp8")
    dit, mode, own = _model(name, precision)
    height, width = size or own
    if height % PIXELS or width % PIXELS or height <= 0 or width <= 0:
        raise InputError(f"a video cannot be {width}x{height}; both sides must be positive multiples of {PIXELS}")
    grid = height // 8, width // 8
    fp8 = precision == "fp8"
    recipe = Recipe(fp8=fp8, expect=("concatenate", "fuse", "quantise", "emit") if fp8 else ("concatenate", "fuse"))
    with torch.inference_mode():
        ring = RingFormat(dit.dtype, CACHES[caches] if fp8 else None)
        prompt = torch.zeros(1, dit.config.text_dim, dtype=dit.dtype, device=dit.device)
        block = CapturedBlock(dit, prompt, mode, grid, recipe, ring)
        return block.compile() if part == "step" else block.prefill.compile()


def _model(name: str, precision: str) -> tuple[LiveAvatar, GenerationMode, tuple[int, int]]:
    """Transformer, mode, and (height, width) in pixels."""
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    if name == PUBLISHED:
        with torch.device("meta"):
            dit = LiveAvatar(LIVEAVATAR_14B)
        return dit.to(dtype).eval().requires_grad_(False), STREAM, PUBLISHED_SIZE
    system = load(name, precision=str(dtype).removeprefix("torch."), device="cpu").system
    if system.size is None:
        raise InputError(f"{name} has no size of its own; pass --size")
    return system.dit, system.mode, system.size
