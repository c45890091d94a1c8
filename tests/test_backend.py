"""`torch.compile(model, backend="kinora")` on a transformer that is not ours, in plain PyTorch."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kinora.graphs import backend
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

DIM, HEADS, TOKENS = 32, 4, 6


class Block(nn.Module):
    """A diffusion transformer's block: modulated attention, cross attention, modulated feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 6, DIM) / math.sqrt(DIM))
        self.norm1 = nn.LayerNorm(DIM, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(DIM, eps=1e-6, elementwise_affine=False)
        self.norm3 = nn.LayerNorm(DIM, eps=1e-6)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(DIM, DIM) for _ in range(4))
        self.cross_q, self.cross_kv, self.cross_out = nn.Linear(DIM, DIM), nn.Linear(DIM, 2 * DIM), nn.Linear(DIM, DIM)
        self.feed_forward = nn.Sequential(nn.Linear(DIM, 64), nn.GELU("tanh"), nn.Linear(64, DIM))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = (t.view(t.shape[0], t.shape[1], HEADS, -1).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        shift, scale, gate, shift_ff, scale_ff, gate_ff = (self.modulation + time).chunk(6, dim=1)
        h = self.norm1(x) * (1 + scale) + shift
        q, k, v = torch.cat((self.to_q(h), self.to_k(h), self.to_v(h)), dim=-1).chunk(3, dim=-1)
        x = x + self.to_out(self.attend(q, k, v)) * gate
        k, v = self.cross_kv(text).chunk(2, dim=-1)
        x = x + self.cross_out(self.attend(self.cross_q(self.norm3(x)), k, v))
        h = shift_ff + (scale_ff + 1) * self.norm2(x.float()).type_as(x)
        return x + gate_ff * self.feed_forward(h)


class Transformer(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(DIM, 8)

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, time, text)
        return self.head(x)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(2, n, DIM).to(dtype) for n in (TOKENS, 6, 5))  # type: ignore[return-value]


def watched(model: nn.Module, made: list[Any]) -> Callable[..., Any]:
    """`model` through the backend, whose compiled graphs are kept in `made`."""

    def keep(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        made.append(backend.kinora(graph, example))
        return made[-1]

    return torch.compile(model, backend=keep, dynamic=False)


@torch.no_grad()
def test_values_agree_and_every_pass_matches() -> None:
    model, given = Transformer().eval(), inputs()
    made: list[Any] = []
    found, wanted = watched(model, made)(*given), model(*given)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    reports = {report.name: report for report in made[-1].program.reports}
    names = [line.split("kinora::")[1] for line in reports["lift"].lines]
    # a block: 2 modulated norms, 1 affine norm, 2 gated sums, 9 linear layers
    assert {name: names.count(name) for name in set(names)} == {
        "adaln": 4, "layer_norm": 2, "gated_residual": 4, "linear": 19,
    }  # fmt: skip
    assert reports["concatenate"].matches == 2
    assert reports["fuse"].matches == 5  # after both attentions of a block, and between the blocks


@torch.no_grad()
def test_half_precision_keeps_its_rounding_points() -> None:
    model, given = Transformer().eval().bfloat16(), inputs(torch.bfloat16)
    found, wanted = watched(model, [])(*given).float(), model(*given).float()
    assert (found - wanted).norm() <= 1e-2 * wanted.norm()


@torch.no_grad()
def test_changed_weights_are_seen() -> None:
    """Joined weights are copies, so the backend has to notice."""
    model, given = Transformer(1).eval(), inputs()
    compiled = watched(model, [])
    compiled(*given)
    model.blocks[0].to_k.weight.mul_(3)  # type: ignore[operator, union-attr]
    found, wanted = compiled(*given), model(*given)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_gradients_are_left_to_pytorch() -> None:
    model, given = Transformer(1), inputs()
    with pytest.warns(UserWarning, match="for inference"):
        torch.compile(model, backend="kinora")(*given).sum().backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model(*given).sum().backward()
    wanted = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(found) == len(wanted) and all(torch.allclose(a, b) for a, b in zip(found, wanted, strict=True))


@torch.no_grad()
def test_symbolic_shapes_are_left_to_pytorch() -> None:
    with pytest.warns(UserWarning, match="dynamic=False"):
        torch.compile(nn.Linear(DIM, 4), backend="kinora", dynamic=True)(torch.randn(3, DIM))


LINEAR = nn.Linear(DIM, DIM)


def autocast_inside(x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return LINEAR(x)


def gradients_inside(x: Tensor) -> Tensor:
    with torch.enable_grad():
        return x.detach() * 2


def checkpointed(x: Tensor) -> Tensor:
    return checkpoint(LINEAR, x, use_reentrant=False)  # type: ignore[no-any-return]


def by_sample(x: Tensor) -> Tensor:
    return torch.vmap(lambda row: row.sum(0))(x)


def by_value(x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (autocast_inside, "put autocast around the call"),
        (gradients_inside, "turns gradients on"),
        (checkpointed, "tag_activation_checkpoint"),
        (by_sample, "it calls"),
        (by_value, "it calls cond"),
    ],
)
@torch.no_grad()
def test_what_a_trace_does_not_keep_is_left_to_pytorch(function: Callable[..., Tensor], reason: str) -> None:
    x = torch.randn(2, TOKENS, DIM)
    wanted = function(x)
    with pytest.warns(UserWarning, match=reason):
        found = torch.compile(function, backend="kinora", dynamic=False)(x)
    assert type(found) is Tensor and found.dtype == wanted.dtype and torch.equal(found, wanted)


@torch.no_grad()
def test_what_cannot_be_traced_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise KeyError("an operator of somebody's own")

    monkeypatch.setattr(backend, "trace", refuse)
    x = torch.randn(2, DIM)
    with pytest.warns(UserWarning, match="tracing it failed .KeyError: .an operator of somebody's own"):
        assert torch.equal(torch.compile(LINEAR, backend="kinora", dynamic=False)(x), LINEAR(x))


class Counted(nn.Module):
    """Counts its calls in a parameter, through a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = nn.Parameter(torch.zeros(DIM))

    def forward(self, x: Tensor) -> Tensor:
        self.count.reshape(2, -1).add_(1)
        return x + self.count


@torch.no_grad()
def test_graphs_that_write_a_parameter_are_left_to_pytorch() -> None:
    model, x = Counted(), torch.zeros(1, DIM)
    with pytest.warns(UserWarning, match="writes to a parameter"):
        compiled = torch.compile(model, backend="kinora", dynamic=False)
        found = [float(compiled(x)[0, 0]) for _ in range(3)]
    assert found == [1, 2, 3] and model.count[0] == 3


@torch.no_grad()
def test_weights_with_other_memory_are_seen() -> None:
    model, given = Transformer(1).eval(), inputs()
    compiled = watched(model, [])
    compiled(*given)
    weight = model.blocks[0].to_k.weight  # type: ignore[union-attr]
    weight.data = weight.data * 3  # type: ignore[operator, union-attr]
    found, wanted = compiled(*given), model(*given)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@torch.no_grad()
def test_writing_in_place_is_not_reordered() -> None:
    def add_twice(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        product = y * gate
        y.add_(1)
        return x + product

    x, y, gate = torch.randn(1, 3, DIM), torch.randn(1, 3, DIM), torch.randn(1, 1, DIM)
    wanted = x + y * gate
    found = torch.compile(add_twice, backend="kinora", dynamic=False)(x, y, gate)
    assert torch.allclose(found, wanted)


@torch.no_grad()
def test_the_rest_goes_through_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens on a GPU, here with inductor's C++ code."""
    monkeypatch.setattr(backend, "inductor_runs", lambda inputs: True)
    model, given = Transformer(1).eval(), inputs()
    found, wanted = watched(model, [])(*given), model(*given)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()
