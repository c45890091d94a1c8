"""Muon for weight matrices and convolution kernels, AdamW for the rest.

Muon steps along the orthogonalised momentum: all singular values of the update are about 1, so that directions with
small gradients move as fast as those with large ones. For the video VAE it reaches in 500 steps what AdamW does not in
several thousand. Source: K. Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024), and for
matching AdamW's step size J. Liu et al., "Muon is scalable for LLM training" (2025).
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
ITERATION = (3.4445, -4.7750, 2.0315)  # odd quintic that pulls singular values towards 1
ITERATIONS = 5
ADAMW_STEP = 0.2  # root mean square of AdamW's usual update


def orthogonalised(matrices: Tensor) -> Tensor:
    """Matrices [N, rows, columns] with rows <= columns -> the nearest semi-orthogonal ones, roughly; float32.

    Newton-Schulz iteration, in bf16 on a GPU.
    """
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = ITERATION
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.float()


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum on parameters of two or more axes, each flattened to [first axis, rest].

    Steps are scaled to AdamW's usual size, so both take the same learning rate `lr` (a float or a 0-dim tensor).
    Capturable in a CUDA graph once every parameter had its first step.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float | Tensor, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim < 2:
                    raise ValueError(f"Muon needs matrices; a parameter of shape {tuple(p.shape)} goes to AdamW")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # the types that torch's overloads ask for
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[tuple[nn.Parameter, Tensor, bool]]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - MOMENTUM)
                update = p.grad.lerp(state["momentum"], MOMENTUM).flatten(1)
                tall = update.shape[0] > update.shape[1]
                update = update.mT if tall else update
                alike[tuple(update.shape)].append((p, update, tall))
            for shape, entries in alike.items():
                directions = orthogonalised(torch.stack([update for _, update, _ in entries]))
                directions *= ADAMW_STEP * max(shape) ** 0.5 * group["lr"]
                for (p, _, tall), direction in zip(entries, directions.unbind(), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_((direction.mT if tall else direction).reshape(p.shape))


class MuonAdamW:
    """Both optimisers as one: `matrices` by Muon, `others` by AdamW, at one learning rate.

    The learning rate is a tensor on the parameters' device, so that a captured step follows it.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        *,
        betas: tuple[float, float],
        weight_decay: float,
    ):
        others = list(others)
        self.lr = torch.zeros((), device=others[0].device)
        self.muon = Muon(matrices, self.lr, weight_decay)
        on_gpu = self.lr.is_cuda
        self.adamw = torch.optim.AdamW(
            others, lr=self.lr, betas=betas, weight_decay=weight_decay, fused=on_gpu or None, capturable=on_gpu
        )

    def set_learning_rate(self, rate: float) -> None:
        self.lr.fill_(rate)

    def zero_grad(self) -> None:
        self.muon.zero_grad(set_to_none=True)
        self.adamw.zero_grad(set_to_none=True)

    def step(self) -> None:
        self.muon.step()
        self.adamw.step()

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for optimizer, saved in ((self.muon, state["muon"]), (self.adamw, state["adamw"])):
            optimizer.load_state_dict(saved)
            for group in optimizer.param_groups:
                group["lr"] = self.lr


def split_parameters(module: nn.Module, apart: tuple[str, ...] = ()) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters as (weights of linear layers and convolutions outside of the modules in `apart`, all others)."""
    matrices: list[nn.Parameter] = []
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and not name.startswith(apart or "\0"):
            matrices.append(part.get_parameter("weight"))
    chosen = {id(p) for p in matrices}
    return matrices, [p for p in module.parameters() if id(p) not in chosen]
