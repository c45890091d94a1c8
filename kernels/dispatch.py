"""Where an op runs, and how it joins PyTorch.

Every op is one file: `reference()` in plain PyTorch, Triton kernels, and a `torch.library` op `kinora::<name>` whose
one implementation launches the kernels. The public function decides with `fused(...)`:

- tensors on a GPU, or on the CPU under `TRITON_INTERPRET=1`: the registered op;
- otherwise the reference, which is plain PyTorch with its own autograd;
- inside `using(True)` the registered op always (a tracer then sees one node an op; on a CPU without the interpreter the
  op computes the reference), inside `using(False)` never (the plain graph, for comparisons).
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_choice: ContextVar[bool | None] = ContextVar("kinora_registered_ops", default=None)  # of each thread


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_runs(*tensors: Tensor | None) -> bool:
    """Whether Triton kernels can run on these tensors, None entries ignored."""
    if torch.version.cuda is None and not interpreting():
        return False
    on_gpu = all(t.is_cuda for t in tensors if t is not None)
    return on_gpu or interpreting()


def fused(*tensors: Tensor | None) -> bool:
    """Whether the public function of an op should call its registered op for these tensors."""
    choice = _choice.get()
    return triton_runs(*tensors) if choice is None else choice


def tracing() -> bool:
    """Whether registered ops are wanted everywhere, as a tracer wants them: plain functions then are one node too."""
    return _choice.get() is True


@contextmanager
def using(registered: bool) -> Iterator[None]:
    """Force the registered ops (True) or the plain references (False) in this thread, for example while tracing."""
    token = _choice.set(registered)
    try:
        yield
    finally:
        _choice.reset(token)


def autograd_by_reference(op: Any, reference: Callable[..., Any]) -> None:
    """Give `op` the gradients of `reference` (same arguments), by running it again in the backward pass.

    For ops without a backward kernel of their own. Gradients flow to floating-point tensor arguments, and to those in
    lists that hold only such tensors; the result is a tensor or a tuple of tensors.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        flat, ctx.rebuild = _flatten(inputs)
        ctx.plain = [None if isinstance(value, Tensor) else value for value in flat]
        ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in flat))

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        flat = [plain if t is None else t for t, plain in zip(saved, ctx.plain, strict=True)]
        live = [i for i, value in enumerate(flat) if isinstance(value, Tensor) and value.is_floating_point()]

        def run(*values: Tensor) -> Any:
            full = list(flat)
            for i, value in zip(live, values, strict=True):
                full[i] = value
            return reference(*ctx.rebuild(full))

        result, pull = torch.func.vjp(run, *(flat[i] for i in live))[:2]
        if isinstance(result, tuple):
            cotangent: Any = tuple(torch.zeros_like(r) if g is None else g for r, g in zip(result, grads, strict=True))
        else:
            cotangent = grads[0]
        out: list[Any] = [None] * len(flat)
        for i, grad in zip(live, pull(cotangent), strict=True):
            out[i] = grad
        # PyTorch wants one None for a list that is not all tensors
        return tuple(None if isinstance(part, list) and None in part else part for part in ctx.rebuild(out))

    op.register_autograd(backward, setup_context=setup)


def _flatten(inputs: tuple[Any, ...]) -> tuple[list[Any], Callable[[list[Any]], list[Any]]]:
    """Arguments with lists laid flat, and the function that folds such a list back."""
    sizes = [len(value) if isinstance(value, list | tuple) else -1 for value in inputs]
    flat: list[Any] = []
    for value, size in zip(inputs, sizes, strict=True):
        flat.extend(value) if size >= 0 else flat.append(value)

    def rebuild(values: list[Any]) -> list[Any]:
        it = iter(values)
        return [next(it) if size < 0 else [next(it) for _ in range(size)] for size in sizes]

    return flat, rebuild
