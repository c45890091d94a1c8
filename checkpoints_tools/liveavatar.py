"""The published LiveAvatar's transformer: Wan2.2-S2V-14B with the distilled LoRA merged (liveavatar.md, 1.3-1.4)."""

from pathlib import Path

import torch

from ..graphs.models.liveavatar import LiveAvatar, LiveAvatarConfig
from .keymaps import SameNames
from .keymaps_dit import WAN_DIFFUSERS
from .load import Fp8, load_lora, load_module
from .lora import LORA_TARGETS, Scaling
from .sources import open_weights

LORA_ALPHA = 64.0
TABLE = SameNames("LiveAvatar transformer")


class LoraMismatch(ValueError):
    """The LoRA is not one of this transformer."""


def load_liveavatar(
    weights: Path,
    lora: Path,
    config: LiveAvatarConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    fp8: Fp8 | None = None,
) -> LiveAvatar:
    """From the file or index `weights` and the file `lora`, which is merged in the dtype of the weights.

    Then floating tensors are cast to `dtype`, and layers quantised as `fp8` says. Raises UnreadableFile, LoraMismatch
    and KeyMismatch; the last two before the transformer is read.
    """
    with torch.device("meta"):
        dit = LiveAvatar(config)
    shapes = {name: value.shape for name, value in dit.state_dict().items()}
    with open_weights(weights) as base, open_weights(lora) as file:
        try:
            scaling = Scaling(LORA_ALPHA)
            adapters = load_lora(
                file, shapes, device=device, scaling=scaling, keymap=WAN_DIFFUSERS, targets=LORA_TARGETS
            )
            adapters.check(shapes)
        except (KeyError, ValueError) as error:
            raise LoraMismatch(f"{lora} does not fit {weights}: {error.args[0]}") from error
        load_module(dit, base, TABLE, dtype=dtype, device=device, lora=adapters, fp8=fp8)
    return dit
