"""Weight files into a module on its device, tensor by tensor: LoRA merged and linear layers quantised on the way.

Names and shapes are compared first, from the headers alone, so that a file of another model is refused before anything
is read. Then each tensor is merged in its own dtype, cast, quantised and put in its place while the next one is on its
way: the host holds reading buffers, the device the finished model, two tensors and the float32 work on one of them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ..graphs.quantize import LIVEAVATAR_IGNORE, Fp8Linear, quantize_linears
from ..kernels.fp8_linear import Granularity
from ..kernels.quantize_rows import quantize_fp8
from .assign import map_names
from .keymaps import KeyMap
from .lora import Lora, Scaling, read_lora
from .sources import Weights
from .stream import stream_tensors


@dataclass(frozen=True)
class Fp8:
    """Linear layers become `Fp8Linear`, except those whose name contains one of `ignore`."""

    granularity: Granularity = "row"
    ignore: tuple[str, ...] = LIVEAVATAR_IGNORE


@torch.no_grad()
def load_module(
    module: nn.Module,
    weights: Weights,
    keymap: KeyMap,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    lora: Lora | None = None,
    fp8: Fp8 | None = None,
) -> None:
    """Give `module`, built on the meta device, its tensors of `weights`; it is then in eval mode without gradients.

    Floating tensors are cast to `dtype` (None: as stored), after `lora` is merged into them in their own dtype and
    before they are quantised: the same bits as merging, casting and quantising the whole model. On the CPU a tensor
    that nothing changes stays mapped to its file. Raises KeyMismatch before anything is read.
    """
    target = torch.device(device)
    wanted = _tensors(module)
    map_names(wanted, weights.meta(), keymap)
    if dtype is not None:
        module.to(dtype)  # costs nothing on the meta device
    quantised = {f"{name}.weight" for name in quantize_linears(module, fp8.ignore, fp8.granularity)} if fp8 else set()
    changed = quantised | (lora.changed if lora else set())

    def finish(name: str, value: Tensor) -> None:
        """Put our tensor `name`, given as stored, in its place."""
        stored = value
        if lora:
            value = lora.apply(name, value)
        if dtype is not None and value.is_floating_point():
            value = value.to(dtype)
        if fp8 and name in quantised:
            layer = cast(Fp8Linear, module.get_submodule(name.removesuffix(".weight")))
            layer.dtype = value.dtype  # that of the layer whose place it takes
            value, descale = quantize_fp8(value, fp8.granularity)
            _place(module, f"{name}_descale", descale)
        elif target.type == "cuda" and value.data_ptr() == stored.data_ptr():
            value = value.clone()  # what was stored is the reader's memory
        _place(module, name, value)

    found = set()
    as_stored, streamed = _divide(weights, keymap, target, dtype, changed)
    for name in as_stored:
        for ours, value in keymap.apply({name: weights.map(name)})[0].items():
            _place(module, ours, value)
            found.add(ours)
    for name, value in stream_tensors(weights, streamed, target):
        for ours, part in keymap.apply({name: value})[0].items():
            finish(ours, part)
            found.add(ours)
    for name in wanted.keys() - found:  # optional ones: `map_names` found all others
        finish(name, torch.zeros(wanted[name].shape, device=target))
    module.requires_grad_(False).eval()


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers; one that is tied under several names counts once."""
    saved = module.state_dict()
    buffers = {name: value for name, value in module.named_buffers() if name in saved}
    return dict(module.named_parameters()) | buffers


def _place(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    layer = module.get_submodule(owner)
    parameter = leaf in dict(layer.named_parameters(recurse=False))
    setattr(layer, leaf, nn.Parameter(value, requires_grad=False) if parameter else value)


def _divide(
    weights: Weights, keymap: KeyMap, target: torch.device, dtype: torch.dtype | None, changed: set[str]
) -> tuple[list[str], list[str]]:
    """The names that are read, as (can stay mapped to the file, have to be read), in the order of the files."""
    as_stored: list[str] = []
    streamed: list[str] = []
    for name in weights.in_file_order():
        if keymap.is_unused(name):
            continue
        stored = weights[name].dtype
        converted = dtype not in (None, stored) and stored.is_floating_point
        stays = target.type == "cpu" and not converted and not changed.intersection(keymap.rename(name))
        (as_stored if stays else streamed).append(name)
    return as_stored, streamed


def load_lora(
    weights: Weights,
    parameters: Iterable[str],
    *,
    device: torch.device | str = "cpu",
    scaling: Scaling | None = None,
    keymap: KeyMap | None = None,
    targets: Sequence[str] = (),
) -> Lora:
    """An adapter file on the device where it will be merged; arguments and errors as `read_lora`."""
    target = torch.device(device)
    if target.type == "cpu":
        state = {name: weights.map(name) for name in weights}
    else:
        state = {name: value.clone() for name, value in stream_tensors(weights, weights.in_file_order(), target)}
    return read_lora(state, parameters, scaling, keymap, targets)
