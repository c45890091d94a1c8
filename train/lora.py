"""Low-rank adapters inside the graph (liveavatar.md, 1.4): y = W x + b + (alpha / rank) B A x.

An adapted layer keeps its own keys and adds `lora_A.default.weight` and `lora_B.default.weight`, so that
`lora_state_dict` writes the published form, which `checkpoints_tools.lora.merge_lora` reads.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..checkpoints_tools.lora import LORA_TARGETS, is_target, split_lora_key
from ..graphs.models.layers import Linear


class LoraLinear(Linear):
    """A linear layer with its adapter; A starts Kaiming-uniform, B at zero, so that it starts as the plain layer."""

    def __init__(self, base: Linear, rank: int, alpha: float):
        with torch.device("meta"):
            super().__init__(base.in_features, base.out_features, base.bias is not None, island=base.island)
        self.weight, self.bias, self.compute_dtype = base.weight, base.bias, base.compute_dtype
        down, up = Linear(base.in_features, rank, bias=False), Linear(rank, base.out_features, bias=False)
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        nn.init.zeros_(up.weight)
        down.compute_dtype = up.compute_dtype = base.compute_dtype
        self.lora_A = nn.ModuleDict({"default": down.to(base.weight.device)})
        self.lora_B = nn.ModuleDict({"default": up.to(base.weight.device)})
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + self.scale * self.lora_B["default"](self.lora_A["default"](x)).to(y.dtype)


def add_lora(model: nn.Module, rank: int, alpha: float, targets: Sequence[str] = LORA_TARGETS) -> list[str]:
    """Adapt every `Linear` whose path ends in one of `targets`; returns their names. Freezing is the caller's."""
    if rank < 1:
        raise ValueError(f"LoRA rank is {rank}; it must be at least 1")
    adapted = []
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear) and is_target(name, targets):
            if isinstance(module, LoraLinear):
                raise ValueError(f"{name} already has an adapter; merge it before adding another")
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, LoraLinear(module, rank, alpha))
            adapted.append(name)
    if not adapted:
        raise ValueError(f"no linear layer ends in one of {tuple(targets)}")
    return adapted


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters alone, under the published keys."""
    return {name: value for name, value in model.state_dict().items() if split_lora_key(name)}
