"""`load`: the name of a model -> an `Avatar` that is ready to talk.

Models, media and PyTorch are imported when one is loaded: the package imports this file at once (a function named
like its module must be bound first), training needs no media, and `kinora --help` needs nothing at all.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import CheckpointError, InputError

if TYPE_CHECKING:
    import torch

    from .avatar import Avatar
    from .systems.liveavatar import LiveAvatarSystem

TINY_FOLDER = Path(__file__).parent / "assets" / "tiny"
MODELS = {
    "tiny": "the embedded model: drawn faces, no download, no prompt",
    "liveavatar-14b": "LiveAvatar on Wan2.2-S2V-14B; pass checkpoint=FOLDER",
}
PRECISIONS = ("float32", "bfloat16", "fp8")
PLACEMENTS = ("auto", "single", "captured", "batched")


def load(
    name_or_path: str | os.PathLike[str] = "tiny",
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    precision: str = "auto",
    placement: str = "auto",
    device: str = "auto",
) -> "Avatar":
    """Load a model by its name (`MODELS`), or a folder: a bundle (docs/bundles.md), which has a precision of its own,
    or what `python -m kinora.train.tiny` wrote.

    - `checkpoint`: the folder of the published files, for models that are not embedded.
    - `precision`: "float32", "bfloat16", or "fp8": bfloat16 with the transformer's linear layers in e4m3, a scale a
      token and an output channel (`graphs.quantize` says which stay). "auto" is float32 for small models and bfloat16
      for the published ones.
    - `placement`: "single" (the plain steps on one device), "captured" (compiled, on a GPU as CUDA graphs; the first
      session of a size pays for that, see `Avatar.warm_up`), or "batched" (captured, the time-steps of consecutive
      blocks in one forward: the same video up to rounding, `steps - 1` blocks later; faster only on a GPU that its
      power limit does not hold back, see docs/performance.md);
      "auto" is captured on CUDA and single elsewhere.
    - `device`: "cpu" or "cuda" (the current device); "auto" takes CUDA where there is one.

    Errors: InputError for an unknown name or option (with what there is), CheckpointError for missing files or
    weights that do not fit.
    """
    _check_choice("precision", precision, ("auto", *PRECISIONS))
    _check_choice("placement", placement, PLACEMENTS)
    import torch

    from ..checkpoints_tools.bundle.read import is_bundle
    from .systems.embedded import CONFIG_FILE, load_embedded

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.bfloat16}
    dtype = dtypes.get(precision)
    target, name = pick_device(device), os.fspath(name_or_path)
    if name == "liveavatar-14b":
        if checkpoint is None:
            raise CheckpointError(
                f"{name} is not embedded; pass checkpoint=, the folder of Wan2.2-S2V-14B or Wan-AI/Wan2.2-S2V-14B"
            )
        from ..checkpoints_tools.load import Fp8
        from .systems.liveavatar_checkpoint import load_published

        fp8 = Fp8() if precision == "fp8" else None  # on the way, so that the device never holds all of bfloat16
        return _avatar(name, load_published(checkpoint, dtype or torch.bfloat16, target, fp8), "auto", placement)
    if checkpoint is not None:
        raise InputError(f"{name} takes no checkpoint; pass the folder itself as the name, or a model of: {_names()}")
    folder = TINY_FOLDER if name == "tiny" else Path(name)
    if is_bundle(folder):
        from .systems.bundle import load_bundle

        return _avatar(folder.resolve().name, load_bundle(folder, precision, target), "auto", placement)
    if name != "tiny" and not (folder / CONFIG_FILE).is_file():
        raise InputError(
            f"there is no model {name!r}; known are {_names()}, a bundle, or a folder with a {CONFIG_FILE}"
        )
    return _avatar(folder.name, load_embedded(folder, dtype or torch.float32, target), precision, placement)


def _avatar(name: str, system: "LiveAvatarSystem", precision: str, placement: str) -> "Avatar":
    """Quantise, and choose where the sessions run."""
    import torch

    from ..graphs.quantize import quantize_linears
    from .avatar import Avatar
    from .placement.batched_steps import BatchedSteps
    from .placement.captured import CapturedBlock
    from .placement.engines import CapturedPlacement, SinglePlacement

    dit, on_gpu = system.dit, system.dit.device.type == "cuda"
    if precision == "fp8":
        quantize_linears(dit, granularity="row")
        if on_gpu:
            torch.cuda.empty_cache()  # the bfloat16 weights' memory
    windowed = dit.config.local_attn_size != -1  # which a static ring does not have
    if placement in ("captured", "batched") and windowed:
        raise InputError(f"{name} has a local attention window, which cannot be captured; use placement='single'")
    if placement == "auto":
        placement = "captured" if on_gpu and not windowed else "single"
    if placement == "single":
        return Avatar(name, system, SinglePlacement(system))
    return Avatar(name, system, CapturedPlacement(system, BatchedSteps if placement == "batched" else CapturedBlock))


def _names() -> str:
    return ", ".join(MODELS)


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{what} {value!r} is not known; choose one of {', '.join(choices)}")


def pick_device(device: str) -> "torch.device":
    """ "auto": CUDA where there is one, else the CPU; or a name of either. InputError for another or absent one."""
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    unknown = f"{device!r} is no device that models run on; use 'auto', 'cpu' or 'cuda'"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InputError(unknown) from error
    if chosen.type not in ("cpu", "cuda"):
        raise InputError(unknown)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no CUDA device here; use device='cpu' or 'auto'")
    if chosen.type == "cuda" and chosen.index not in (None, torch.cuda.current_device()):
        raise InputError(
            f"{device!r} is not the current CUDA device; choose one with CUDA_VISIBLE_DEVICES={chosen.index}, or call "
            "torch.cuda.set_device before loading"
        )
    return chosen
