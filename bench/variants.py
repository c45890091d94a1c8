"""The ways in which one and the same model is run, so that they can be compared.

eager: the plain graph in PyTorch. compiled: the same with `torch.compile` on its parts. fused: the models over Kinora's
ops, launched one by one. kinora: the fast path as a whole, captured (`captured.py`). diffusers: another library's model
of the same size (`peers.py`).
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch._dynamo
from torch import nn

from ..graphs.models.liveavatar import LiveAvatar
from ..graphs.models.liveavatar_block import Block, CrossAttention
from ..graphs.models.wan_vae import WanVae
from ..graphs.quantize import Fp8Linear
from ..kernels.dispatch import triton_runs, using
from .harness.run import Unavailable
from .peers import ScaledLinear


@contextmanager
def running(variant: str, dit: LiveAvatar | None = None, vae: WanVae | None = None) -> Iterator[None]:
    """Run the given models as eager, compiled or fused; Unavailable where that is impossible."""
    with ExitStack() as stack:
        if variant == "fused":
            if not triton_runs(*_some_parameter(dit, vae)):
                raise Unavailable("Triton kernels do not run on this device; eager is the same graph without them")
        else:
            stack.enter_context(using(False))
            if dit is not None:
                stack.enter_context(plain_fp8(dit))
        if variant == "compiled":
            stack.enter_context(compiled(compiled_parts(dit, vae)))
        yield


def _some_parameter(*models: nn.Module | None) -> list[torch.Tensor]:
    return [next(model.parameters()) for model in models if model is not None]


def compiled_parts(dit: LiveAvatar | None, vae: WanVae | None) -> list[nn.Module]:
    """What `compiled` compiles: transformer blocks with the audio layers' attention, and the VAE's two networks."""
    found: list[nn.Module] = []
    if dit is not None:
        found += [m for m in dit.blocks if isinstance(m, Block)]
        found += [m for m in dit.audio_injector.injector if isinstance(m, CrossAttention)]
    if vae is not None:
        found += [vae.encoder, vae.decoder]
    return found


@contextmanager
def compiled(modules: Iterable[nn.Module]) -> Iterator[None]:
    """`torch.compile` of each module. Equal modules share their code, so that 40 blocks compile as fast as one."""
    changed = list(modules)
    for module in changed:
        module.forward = torch.compile(module.forward)
    try:
        yield
    finally:
        for module in changed:
            del module.forward
        torch._dynamo.reset()  # compiled code keeps what it was compiled for alive


@contextmanager
def plain_fp8(dit: LiveAvatar) -> Iterator[None]:
    """On a GPU: FP8 layers as plain PyTorch would have them, since the op's reference multiplies in float32."""
    swapped = []
    for name, module in list(dit.named_modules()):
        if isinstance(module, Fp8Linear) and module.weight.is_cuda:
            parent, _, leaf = name.rpartition(".")
            owner = dit.get_submodule(parent)
            setattr(owner, leaf, ScaledLinear(module))
            swapped.append((owner, leaf, module))
    try:
        yield
    finally:
        for owner, leaf, module in swapped:
            setattr(owner, leaf, module)
