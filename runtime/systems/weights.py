"""Small weight files, read as a whole, -> modules, with errors that name the file and what does not fit."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ...checkpoints_tools.assign import KeyMismatch, misfit
from ...checkpoints_tools.read import UnreadableFile, read_state
from ..errors import CheckpointError


def read_weights(path: Path) -> dict[str, Tensor]:
    """Every tensor of a weight file or of the shards that an index names; CheckpointError when it cannot be read."""
    try:
        return read_state(path)
    except UnreadableFile as error:
        raise CheckpointError(str(error)) from error


def assign_weights(
    module: nn.Module, state: Mapping[str, Tensor], source: Path, what: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Replace the parameters of `module` (possibly on the meta device) by the tensors of their own names.

    Raises CheckpointError that names `source` and every tensor that is missing, too many, or of another shape or type.
    """
    wanted = module.state_dict()
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted]
    both = ((key, state[key], value) for key, value in wanted.items() if key in state)
    misshaped = [f"{key} {wrong}" for key, given, value in both if (wrong := misfit(given, value))]
    if missing or unexpected or misshaped:
        raise CheckpointError(f"{source}: {KeyMismatch(what, missing, unexpected, misshaped)}")
    module.load_state_dict({k: v.to(device=device, dtype=dtype) for k, v in state.items()}, strict=True, assign=True)
    module.requires_grad_(False).eval()
