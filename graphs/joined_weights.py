"""Weights of layers that read the same input, side by side in one tensor without a second copy.

The layers keep their own weights, which become views of the joined tensor; `joined_view` finds that tensor again, so
that the compiler's product of several layers (`rewrite.passes.concatenate`) costs no memory.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .models.liveavatar import LiveAvatar

E4M3 = torch.float8_e4m3fn


def join_projections(dit: LiveAvatar) -> None:
    """Lay q, k and v of every self attention side by side. Names, values and results stay; doing it again is free.

    Later casts (`dit.to(...)`) part them again, which costs nothing but the memory that this saves.
    """
    for block in dit.layers:
        join_layers((block.self_attn.q, block.self_attn.k, block.self_attn.v))


def join_layers(layers: Sequence[nn.Module]) -> None:
    """Lay the parameters and buffers of linear layers (plain or FP8) side by side along their first axis, by name.

    Tensors that have no rows to join (one scale for a whole weight), that differ in dtype or width, or that are of a
    subclass (torchao's), are left alone.
    """
    for name in _tensor_names(layers[0]):
        tensors = [getattr(layer, name, None) for layer in layers]
        if all(isinstance(t, Tensor) and t.dim() for t in tensors):
            _join(cast(list[Tensor], tensors))


def _tensor_names(layer: nn.Module) -> list[str]:
    own = (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))
    return [name for name, _ in own]


@torch.inference_mode(False)
@torch.no_grad()
def _join(tensors: list[Tensor]) -> None:
    alike = len({(t.dtype, t.device, t.shape[1:]) for t in tensors}) == 1
    if any(is_traceable_wrapper_subclass(t) for t in tensors):
        return
    if not alike or not all(t.is_contiguous() for t in tensors) or joined_view(tensors) is not None:
        return
    joined, start = cat_rows(tensors), 0
    for t in tensors:
        t.data = joined[start : start + len(t)]
        start += len(t)


def cat_rows(tensors: Sequence[Tensor]) -> Tensor:
    """Joined along the first axis; e4m3 as bytes, which every PyTorch can join."""
    if tensors[0].dtype != E4M3:
        return torch.cat(list(tensors))
    return torch.cat([t.view(torch.uint8) for t in tensors]).view(E4M3)


def joined_view(tensors: Sequence[Tensor]) -> Tensor | None:
    """The tensors as one tensor, joined along the first axis, where they lie behind one another; None elsewhere."""
    first, end = tensors[0], tensors[0].storage_offset()
    for t in tensors:
        same = t.untyped_storage()._cdata == first.untyped_storage()._cdata and t.dtype == first.dtype
        if not same or not t.is_contiguous() or t.storage_offset() != end or t.shape[1:] != first.shape[1:]:
            return None
        end += t.numel()
    rows = sum(len(t) for t in tensors)
    # a first tensor of one row may have any stride there
    strides = first[0].numel(), *first.stride()[1:]
    return first.detach().as_strided((rows, *first.shape[1:]), strides, first.storage_offset())
