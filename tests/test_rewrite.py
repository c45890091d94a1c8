"""The compiler pass by pass: results stay, reports count, and what a pass must not touch is left alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinora.graphs.joined_weights import join_layers
from kinora.graphs.models.wan import WanModel
from kinora.graphs.models.wan_configs import WanConfig
from kinora.graphs.rewrite import passes
from kinora.graphs.rewrite.cost import measure
from kinora.graphs.rewrite.explain import explain
from kinora.graphs.rewrite.program import Argument, Program, trace
from kinora.graphs.rewrite.recipe import NothingMatched, Recipe, apply
from kinora.graphs.rewrite.work import Ceilings
from kinora.kernels import ops
from torch import Tensor, nn

LENGTH, WIDTH = 6, 32


def program(model: nn.Module, *inputs: Tensor, function: Callable[..., Any] | None = None) -> Program:
    arguments = {f"x{i}": Argument(value, "step") for i, value in enumerate(inputs)}
    call = function or model
    return trace(lambda **given: call(*given.values()), arguments, model)


def run(made: Program, *inputs: Tensor) -> Any:
    with torch.no_grad():
        return made(**{f"x{i}": value for i, value in enumerate(inputs)})


def close(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    assert float((found - wanted).norm()) <= 1e-5 * float(wanted.norm())


def count(made: Program, target: Any) -> int:
    return sum(node.target is target for node in made.graph.nodes)


def tokens(*shape: int) -> Tensor:
    return torch.randn(shape or (2, LENGTH, WIDTH))


class Projections(nn.Module):
    """q, k and v of one input, concatenated; `extra`: k is read on its own too."""

    def __init__(self, widths: tuple[int, ...], extra: bool = False, bias: bool = True):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(WIDTH, width, bias=bias) for width in widths)
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        made = [ops.linear(x, part.weight, part.bias) for part in self.parts]  # type: ignore[arg-type]
        joined = torch.cat(made, -1)
        return joined * made[0].sum() if self.extra else joined


class Seam(nn.Module):
    """A gated residual, a norm, and a use of the sum behind it; `again`: a second norm reads the sum."""

    def __init__(self, affine: bool = False, again: bool = False):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH) if affine else None
        self.table = nn.Parameter(torch.randn(3, 1, 1, WIDTH))
        self.again = again

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale, gate = self.table.unbind()
        total = ops.gated_residual(x, y, gate)
        if self.norm is None:
            h = ops.adaln(total, shift, scale)
        else:
            h = ops.layer_norm(total, self.norm.weight, self.norm.bias)
        if self.again:
            h = h + ops.adaln(total, scale, shift)
        return total + 2 * h


@pytest.mark.parametrize("extra", [False, True])
def test_concatenate_makes_one_product(extra: bool) -> None:
    model, x = Projections((8, 24, 8), extra), tokens()
    made = program(model, x)
    passes.clean(made)
    report = passes.concatenate(made)
    assert report.matches == 1 and "(40, 32)" in report.lines[0]
    assert count(made, torch.ops.kinora.linear.default) == 1
    close(run(made, x), model(x).detach())


@settings(max_examples=15, deadline=None)
@given(widths=st.lists(st.integers(1, 9), min_size=2, max_size=4), extra=st.booleans(), bias=st.booleans())
def test_concatenate_of_any_widths(widths: list[int], extra: bool, bias: bool) -> None:
    model, x = Projections(tuple(widths), extra, bias), tokens(1, 3, WIDTH)
    made = program(model, x)
    passes.clean(made)
    assert passes.concatenate(made).matches == 1
    close(run(made, x), model(x).detach())


def test_parts_in_another_order_and_twice() -> None:
    model, x = Projections((8, 24)), tokens()

    def reversed_twice(x: Tensor) -> Tensor:
        a, b = (ops.linear(x, part.weight, part.bias) for part in model.parts)  # type: ignore[arg-type]
        early = a.sum()
        return torch.cat((b, a, b), -1) * early

    made = program(model, x, function=reversed_twice)
    passes.clean(made)
    assert passes.concatenate(made).matches == 1
    close(run(made, x), reversed_twice(x).detach())


def test_other_inputs_are_not_concatenated() -> None:
    model, x = Projections((8, 8)), tokens()

    def apart(x: Tensor) -> Tensor:
        a, b = model.parts
        made = ops.linear(x, a.weight, a.bias), ops.linear(2 * x, b.weight, b.bias)  # type: ignore[arg-type]
        return torch.cat(made, -1)

    made = program(model, x, function=apart)
    assert passes.concatenate(made).matches == 0
    close(run(made, x), apart(x).detach())


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_weights_side_by_side_are_one_product_without_a_copy(order: tuple[int, ...]) -> None:
    """Nothing concatenates the results; a fourth layer of the same input lies elsewhere and stays alone."""
    model, x = Projections((8, 24, 8, 16)), tokens()
    wanted = [model.parts[i](x).detach() for i in range(4)]
    join_layers(list(model.parts)[:3])

    def apart(x: Tensor) -> tuple[Tensor, ...]:
        made = {i: ops.linear(x, model.parts[i].weight, model.parts[i].bias) for i in (*order, 3)}  # type: ignore[arg-type]
        return tuple(made[i] for i in range(4))

    made = program(model, x, function=apart)
    passes.clean(made)
    report = passes.concatenate(made)
    assert report.matches == 1 and "(40, 32)" in report.lines[0]
    assert count(made, torch.ops.kinora.linear.default) == 2
    own = {t.untyped_storage().data_ptr() for t in model.parameters()}
    assert all(t.untyped_storage().data_ptr() in own for t in (*made.module.parameters(), *made.module.buffers()))
    for found, value in zip(run(made, x), wanted, strict=True):
        close(found, value)


def test_replaced_weights_leave_the_module() -> None:
    model, x = Projections((8, 24, 8)), tokens()
    made = program(model, x)
    passes.clean(made)
    passes.concatenate(made)
    held = [*made.module.parameters(), *made.module.buffers()]
    assert sorted(t.numel() for t in held) == [40, 40 * WIDTH]


@pytest.mark.parametrize("affine", [False, True])
def test_fuse_joins_sum_and_norm(affine: bool) -> None:
    model, x, y = Seam(affine), tokens(), tokens()
    made = program(model, x, y)
    passes.clean(made)
    assert passes.fuse(made).matches == 1
    assert count(made, torch.ops.kinora.residual_norm.default) == 1
    assert count(made, torch.ops.kinora.gated_residual.default) == 0
    close(run(made, x, y), model(x, y).detach())


def test_a_sum_with_two_norms_is_fused_with_one() -> None:
    model, x, y = Seam(again=True), tokens(), tokens()
    made = program(model, x, y)
    passes.clean(made)
    assert passes.fuse(made).matches == 1
    assert count(made, torch.ops.kinora.adaln.default) == 1
    close(run(made, x, y), model(x, y).detach())


def test_fuse_leaves_tables_that_come_after_the_sum() -> None:
    x, y = tokens(), tokens()

    def late(x: Tensor, y: Tensor) -> Tensor:
        total = x + y
        scale = total.mean(1, keepdim=True)
        return ops.adaln(total, scale, scale)

    made = program(nn.Module(), x, y, function=late)
    assert passes.fuse(made).matches == 0
    close(run(made, x, y), late(x, y))


@pytest.mark.parametrize(("gates", "rows"), [(LENGTH, 3), (LENGTH, 1), (1, 3), (3, 3)])
def test_fuse_leaves_tables_of_other_rows(gates: int, rows: int) -> None:
    """Gates of every token and a modulation of every frame are no `residual_norm`, which has one R."""
    x, y, gate, table = tokens(), tokens(), tokens(2, gates, WIDTH), tokens(2, rows, WIDTH)

    def modulated(x: Tensor, y: Tensor, gate: Tensor, table: Tensor) -> Tensor:
        total = ops.gated_residual(x, y, gate)
        return total + ops.adaln(total, table, table)

    made = program(nn.Module(), x, y, gate, table, function=modulated)
    assert passes.fuse(made).matches == (1 in (gates, rows) or gates == rows)
    close(run(made, x, y, gate, table), modulated(x, y, gate, table))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.complex64])
def test_lift_leaves_dtypes_that_kernels_have_not(dtype: torch.dtype) -> None:
    x, weight = (10 * tokens()).to(dtype), (10 * tokens(8, WIDTH)).to(dtype)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        total = x + x * x[:, :1]
        if dtype is torch.float64:
            ones = weight[0] ** 0
            total = torch.nn.functional.layer_norm(total, (WIDTH,), ones, ones)
        return torch.nn.functional.linear(total, weight)

    made = program(nn.Module(), x, weight, function=plain)
    assert passes.lift(made).matches == 0
    assert torch.equal(run(made, x, weight), plain(x, weight))


class Counter(nn.Module):
    """Writes into its own buffers at every call."""

    seen: Tensor
    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(WIDTH))
        self.register_buffer("table", torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.seen[:4].add_(1)
        return x * self.seen.exp() + self.table.exp()


def test_buffers_that_are_written_are_not_folded() -> None:
    model, plain, x = Counter(), Counter(), tokens()
    plain.load_state_dict(model.state_dict())
    made = program(model, x)
    passes.clean(made)
    report = passes.fold(made)
    assert report.matches == 1 and "weights alone" in report.lines[0]
    for _ in range(3):
        close(run(made, x), plain(x))
    assert model.seen[0] == 3 and model.seen[4] == 0


def test_clean_removes_what_changes_nothing() -> None:
    x = tokens()

    def idle(x: Tensor) -> Tensor:
        return torch.cat([x.float()[0:2]]) + x.double().float()

    made = program(nn.Module(), x, function=idle)
    assert passes.clean(made).matches == 3
    close(run(made, x), idle(x))


def written_through_a_view(x: Tensor) -> Tensor:
    y = torch.cat([x])
    y.view(-1).add_(1)
    return x * y


def source_written_later(x: Tensor) -> Tensor:
    y = torch.cat([x[:1]])
    x.add_(1)
    return x * y


def repeat_of_what_is_written(x: Tensor) -> Tensor:
    y = torch.repeat_interleave(x, 1, dim=0)
    x.reshape(-1).add_(1)
    return x * y


@pytest.mark.parametrize("function", [written_through_a_view, source_written_later, repeat_of_what_is_written])
def test_clean_keeps_copies_of_what_is_written(function: Callable[[Tensor], Tensor]) -> None:
    x = tokens()
    made, wanted = program(nn.Module(), x, function=function), function(x.clone())
    assert passes.clean(made).matches == 0
    close(run(made, x), wanted)


def test_clean_gives_callers_tensors_of_their_own() -> None:
    """They may write to a result; one that nobody else holds needs no copy."""
    x = tokens()

    def copies(x: Tensor) -> tuple[Tensor, ...]:
        y = x + 1
        return torch.cat([x]).view(-1), torch.cat([y]), torch.cat([y])

    made = program(nn.Module(), x, function=copies)
    assert passes.clean(made).matches == 1
    owned = {t.untyped_storage().data_ptr() for t in (x, *run(made, x))}
    assert len(owned) == 4


def test_quantise_and_emit() -> None:
    torch.manual_seed(0)
    first, second, x = nn.Linear(WIDTH, 64).bfloat16(), nn.Linear(64, WIDTH).bfloat16(), tokens().bfloat16()

    def feed_forward(x: Tensor) -> Tensor:
        h = torch.nn.functional.gelu(ops.linear(x, first.weight, first.bias), approximate="tanh")
        return ops.linear(h, second.weight, second.bias)

    wanted = feed_forward(x).detach().float()
    made = program(nn.ModuleList([first, second]), x, function=feed_forward)
    packed: dict[str, tuple[Tensor, Tensor]] = {}
    passes.clean(made)
    report = passes.quantise(made, (), packed)
    assert report.matches == 2 and report.lines[0].endswith("dB") and set(packed) == {"0.weight", "1.weight"}
    assert passes.emit(made).matches == 1
    assert count(made, torch.ops.kinora.gelu_quantize_rows.default) == 1
    assert 0 < (run(made, x).float() - wanted).norm() / wanted.norm() < 6e-2
    other = program(nn.ModuleList([first, second]), x, function=feed_forward)
    assert passes.quantise(other, ("1.weight",), packed).matches == 1


def test_folded_casts_of_weights_keep_their_names() -> None:
    """Recipes leave layers alone, and programs share quantised weights, by these names."""
    model, x = Projections((16, 16)), tokens()
    first, second = (part.weight for part in model.parts)

    def half(x: Tensor) -> Tensor:
        x = x.bfloat16()
        a, b = (ops.linear(x, weight.bfloat16(), None) for weight in (first, second))  # type: ignore[operator, arg-type]
        return a * b.sum()

    packed: dict[str, tuple[Tensor, Tensor]] = {}
    made = apply(program(model, x, function=half), Recipe(fp8=True, ignore=("parts.1",)), packed)
    assert list(packed) == ["parts.0.weight"]
    assert count(made, torch.ops.kinora.fp8_matmul.default) == count(made, torch.ops.kinora.linear.default) == 1


def test_share_quantises_an_input_once() -> None:
    model, x = Projections((16, 16)).bfloat16(), tokens().bfloat16()

    def apart(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(ops.linear(x, part.weight, part.bias) for part in model.parts)  # type: ignore[arg-type]

    made = program(model, x, function=apart)
    passes.clean(made)
    passes.quantise(made, (), {})
    before = run(made, x)
    assert passes.share(made).matches == 1
    assert count(made, torch.ops.kinora.quantize_rows.default) == 1
    assert all(torch.equal(a, b) for a, b in zip(run(made, x), before, strict=True))


WAN = WanConfig(dim=96, ffn_dim=128, num_heads=4, num_layers=2, text_dim=16, text_len=8, image_dim=24)


def test_wan_model_is_unchanged() -> None:
    """The plain bidirectional transformer, its time as an argument that changes once a step of the schedule."""
    torch.manual_seed(0)
    model = WanModel(WAN).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.1)
    x, t, clip = [tokens(16, 2, 8, 4)], torch.tensor([300.0]), tokens(1, 7, 24)
    context = [tokens(5, 16)]
    arguments = {
        "x": Argument(x, "step"),
        "t": Argument(t, "schedule"),
        "context": Argument(context, "prompt"),
        "clip_features": Argument(clip, "prompt"),
    }
    made = trace(model.forward, arguments, model)
    apply(made, Recipe(expect=("fold", "fuse")))
    fused = next(report for report in made.reports if report.name == "fuse")
    assert fused.matches == 3 * WAN.num_layers  # every residual sum has a norm behind it
    for time in (torch.tensor([300.0]), torch.tensor([20.0])):
        found = made(x=x, t=made.prepare("t", time), context=context, clip_features=clip)
        close(found[0], model(x, time, context, clip_features=clip)[0])


def test_a_pass_that_must_match_and_does_not_is_an_error() -> None:
    made = program(Projections((8, 8)), tokens())
    with pytest.raises(NothingMatched, match="fuse matched nothing"):
        apply(made, Recipe(expect=("fuse",)))


def test_programs_say_what_they_take() -> None:
    made = program(Projections((8, 8)), tokens())
    with pytest.raises(TypeError, match="takes x0"):
        made(y=tokens())
    with pytest.raises(TypeError, match="another structure"):
        made(x0=[tokens()])
    with pytest.raises(ValueError, match="lifetime"):
        Argument(tokens(), "week")


def test_costs_follow_from_shapes() -> None:
    model, x = Projections((8, 24, 8)), tokens()
    made = program(model, x)
    apply(made, Recipe())
    rows, own = 2 * LENGTH, 4 * 2 * LENGTH * WIDTH
    (product,) = measure(made.graph)
    assert product.flops == 2 * rows * WIDTH * 40
    assert product.bytes == own + 4 * (40 * WIDTH + 40 + rows * 40)
    assert sum(call.flops for call in made.traced) == product.flops
    fast = Ceilings(bf16=1e6, memory=1e-6)
    assert product.seconds(fast) == pytest.approx(product.bytes / 1e6)
    with pytest.raises(ValueError, match="more than 0"):
        Ceilings(memory=0)


def test_explain_names_layers_and_changes() -> None:
    model, x = Projections((8, 8)), tokens()
    blocks = nn.ModuleDict({"blocks": nn.ModuleList([model]), "head": Projections((4, 4))})

    def both(x: Tensor) -> Tensor:
        return blocks["head"](x) + blocks["blocks"][0](x).sum()  # type: ignore[index]

    made = program(blocks, x, function=both)
    apply(made, Recipe())
    lines = explain(made).splitlines()
    table = {line.split()[0]: line for line in lines if "->" in line}
    assert {"head", "blocks.0", "all"} <= set(table) and "concatenate 2" in table["all"]
    assert any(line.startswith("(outside)") for line in lines) and "4.3 TB/s" in lines[-1]


def test_meta_models_are_explained_without_weights() -> None:
    with torch.device("meta"):
        model, x = Projections((32, 32)).bfloat16(), tokens().bfloat16()
    made = program(model, x)
    apply(made, Recipe(fp8=True, expect=("concatenate", "quantise")))
    assert "without weights" in "\n".join(line for report in made.reports for line in report.lines)
    assert measure(made.graph)[-1].fp8
