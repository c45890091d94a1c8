"""`torch.compile(model, backend="kinora")` on a plain diffusion transformer, beside eager and inductor, on a GPU.

    python -m kinora.bench.backend [--layers 4] [--tokens 3168] [--width 5120]

Prints what the passes matched, then for each of the three the relative error against float32 and milliseconds a call.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..graphs.backend import CompiledGraph, kinora
from .harness.check import relative_l2
from .harness.timing import Timer

HEAD = 128


class PlainBlock(nn.Module):
    """Modulated self attention, cross attention, modulated feed-forward, on PyTorch's own calls alone."""

    def __init__(self, dim: int):
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.norm3 = nn.LayerNorm(dim, eps=1e-6)
        self.q, self.k, self.v, self.o, self.cross_q, self.cross_o = (nn.Linear(dim, dim) for _ in range(6))
        self.cross_kv = nn.Linear(dim, 2 * dim)
        self.ffn = nn.Sequential(nn.Linear(dim, dim * 27 // 10), nn.GELU("tanh"), nn.Linear(dim * 27 // 10, dim))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (-1, HEAD)).transpose(1, 2) for t in (q, k, v))  # [B, H, L, d]
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = (self.modulation + time).chunk(6, dim=1)
        h = self.norm1(x) * (1 + scale) + shift
        q, k, v = torch.cat((self.q(h), self.k(h), self.v(h)), -1).chunk(3, -1)
        x = x + self.o(self.attend(q, k, v)) * gate
        k, v = self.cross_kv(text).chunk(2, -1)
        x = x + self.cross_o(self.attend(self.cross_q(self.norm3(x)), k, v))
        h = self.norm2(x) * (1 + scale_ffn) + shift_ffn
        return x + self.ffn(h) * gate_ffn


class PlainTransformer(nn.Module):
    def __init__(self, layers: int, dim: int):
        super().__init__()
        self.blocks = nn.ModuleList(PlainBlock(dim) for _ in range(layers))

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, time, text)
        return x


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=3168)
    parser.add_argument("--width", type=int, default=5120, help="a multiple of 128")
    chosen = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    with device:
        model = PlainTransformer(chosen.layers, chosen.width).eval()
        x, time, text = (torch.randn(1, n, chosen.width) for n in (chosen.tokens, 6, 512))
    exact = model(x, time, text)
    model.bfloat16()
    given = [t.bfloat16() for t in (x, time, text)]
    made: list[CompiledGraph] = []

    def watched(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        compiled = kinora(graph, inputs)
        made.extend([compiled] if isinstance(compiled, CompiledGraph) else [])
        return compiled

    variants: dict[str, Callable[..., Any]] = {
        "eager": model,
        "inductor": torch.compile(model, dynamic=False),
        "kinora": torch.compile(model, backend=watched, dynamic=False),
    }
    timer = Timer(device)
    for name, call in variants.items():
        error = relative_l2(call(*given).float(), exact)
        print(f"{name:9} error {error:.2e}  {timer([partial(call, *given)]).seconds * 1e3:9.3f} ms")
    for report in made[0].program.reports:
        print(f"{report.name:12} {report.matches}")


if __name__ == "__main__":
    main()
