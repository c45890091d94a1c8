"""Swap the linear layers of a model for FP8 ones (liveavatar.md, 5.4)."""

from typing import cast

import torch
from torch import Tensor, nn

from ..kernels import ops
from ..kernels.fp8_linear import Granularity

# The published recipe of LiveAvatar: embeddings, head and the audio encoder's last layer stay as they are.
LIVEAVATAR_IGNORE = (
    "text_embedding",
    "time_embedding",
    "time_projection",
    "head.head",
    "casual_audio_encoder.encoder.final_linear",
)
FP8_CAPABILITY = (8, 9)  # compute capability of the first GPUs whose tensor cores multiply e4m3
QUANTUM = 16  # FP8 products want both sides of a weight in multiples of it


def takes_fp8(module: nn.Module, name: str) -> bool:
    """Whether a layer of LiveAvatar called `name` is to multiply in FP8: a linear layer that the recipe does not keep.

    For `torchao.quantize_(dit, config, filter_fn=takes_fp8)`, the alternative to `quantize_linears`.
    """
    return _taken(module, name, LIVEAVATAR_IGNORE)


def _taken(module: nn.Module, name: str, ignore: tuple[str, ...]) -> bool:
    kept = any(part in name for part in ignore)
    return isinstance(module, nn.Linear) and not kept and not any(side % QUANTUM for side in module.weight.shape)


class Fp8Linear(nn.Module):
    """A linear layer with e4m3 weights and dynamically quantised input.

    "tensor" is the published recipe: the input is quantised as it comes, the result has its dtype. "row" takes the
    place of the layer to the letter: input and result have the dtype of its weights.
    """

    weight: Tensor
    weight_descale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, granularity: Granularity = "tensor"):
        super().__init__()
        weight, descale = _quantised(linear.weight.detach(), granularity)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_descale", descale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self.granularity = granularity
        self.dtype = linear.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype) if self.granularity == "row" else x
        return ops.fp8_linear(x, self.weight, self.weight_descale, self.bias, self.granularity)


def _quantised(weight: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """`quantize_fp8` of a weight [N, K]; on the meta device shapes alone, which a loader fills."""
    descales = {"row": (weight.shape[0], 1), "tensor": (1,)}
    if weight.is_meta and granularity in descales:  # PyTorch would go through every op in Python: half a second for 14B
        descale = weight.new_empty(descales[granularity], dtype=torch.float32)
        return torch.empty_like(weight, dtype=torch.float8_e4m3fn), descale
    return ops.quantize_fp8(weight, granularity)


def quantizable(model: nn.Module, ignore: tuple[str, ...] = LIVEAVATAR_IGNORE) -> list[str]:
    """Names of the layers that `quantize_linears` replaces: every `nn.Linear` whose name contains none of `ignore` and
    whose sides FP8 products take."""
    return [name for name, module in model.named_modules() if _taken(module, name, ignore)]


@torch.no_grad()
def quantize_linears(
    model: nn.Module, ignore: tuple[str, ...] = LIVEAVATAR_IGNORE, granularity: Granularity = "tensor"
) -> list[str]:
    """Replace the layers that `quantizable` names; returns these names.

    Do this after LoRA is merged and the model has its final dtype. ValueError when nothing is left to quantise.
    """
    names = quantizable(model, ignore)
    if not names:
        raise ValueError(
            f"no linear layer to quantise: the model has none with sides in multiples of {QUANTUM}, or all match "
            f"ignore={ignore}"
        )
    for name in names:
        parent, _, leaf = name.rpartition(".")
        linear = cast(nn.Linear, model.get_submodule(name))
        setattr(model.get_submodule(parent), leaf, Fp8Linear(linear, granularity))
    return names
