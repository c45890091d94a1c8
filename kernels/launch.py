"""How an op launches a Triton kernel: at once, or, while an exporter traces, as a node of its graph.

    launched(kernel)[grid](*arguments, num_warps=...)

PyTorch traces launches of Triton kernels whose arguments are tensors and plain numbers. Ours take tuples too, and
leave arguments out (None). So a traced launch goes through a small kernel made for it (`flattened`), which takes the
tensors and whole numbers one by one, and calls the real one with the rest written into its source:

    def rows_kernel_3(t0, t1, t2, n0): _rows_kernel((t0, t1), (t2, None), ..., n0, 1e-06, ..., HEADS=8)

Numbers that a launch passes at run time stay so: as constants they would make another kernel, with other loops.
"""

import itertools
import linecache
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled

_traced = False
_numbers = itertools.count()
_known: dict[tuple[Any, str], Any] = {}


@contextmanager
def traced_launches() -> Iterator[None]:
    """Launches in here are recorded by the tracer that is at work instead of run."""
    global _traced
    before, _traced = _traced, True
    try:
        with set_wrap_triton_enabled(True):
            yield
    finally:
        _traced = before


def launched(kernel: Any) -> Any:
    """The kernel itself, or what records its launches inside `traced_launches`."""
    return _Traced(kernel) if _traced else kernel


class _Traced:
    def __init__(self, kernel: Any):
        self.kernel = kernel

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            options = {name: kwargs.pop(name) for name in list(kwargs) if name not in self.kernel.arg_names}
            flat, values = flattened(self.kernel, dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs)
            torch.library.wrap_triton(flat)[tuple(grid)](**values, **options)

        return launch


def flattened(kernel: Any, arguments: Mapping[str, Any]) -> tuple[Any, dict[str, Tensor | int]]:
    """A kernel that takes the tensors and numbers among `arguments` (by the kernel's names), and these by its own.

    Launches that differ in them alone share one kernel. TypeError for an argument that is neither a tensor, a number, a
    dtype, None, nor a tuple of such.
    """
    values: dict[str, Tensor | int] = {}
    constant = {name for name, kind in kernel.fn.__annotations__.items() if kind is tl.constexpr}
    call = ", ".join(f"{name}={_written(name, value, values, name in constant)}" for name, value in arguments.items())
    key = (kernel, call)
    if key not in _known:
        _known[key] = _kernel(kernel, list(values), call)
    return _known[key], values


def _written(name: str, value: Any, values: dict[str, Tensor | int], constant: bool) -> str:
    """`value` as Triton source; tensors, and numbers that are not constant, become parameters."""
    if isinstance(value, tuple | torch.Size):
        return "(" + "".join(f"{_written(name, part, values, constant)}, " for part in value) + ")"
    if isinstance(value, tl.dtype):
        return "tl." + repr(value).rpartition(".")[2]
    if value is None or isinstance(value, bool | float | str) or (isinstance(value, int) and (constant or value == 1)):
        return repr(value)  # Triton makes a constant of 1 in any launch
    if not isinstance(value, Tensor | int):
        raise TypeError(f"argument {name} is {value!r}, which no traced launch can take; it takes tensors and numbers")
    parameter = f"{'t' if isinstance(value, Tensor) else 'n'}{len(values)}"
    values[parameter] = value
    return parameter


def _kernel(kernel: Any, parameters: Sequence[str], call: str) -> Any:
    inner = kernel.fn.__name__
    name = f"{inner.strip('_')}_{next(_numbers)}"
    source = f"def {name}({', '.join(parameters)}):\n    {inner}({call})\n"
    file = f"<kinora {name}>"
    # both Triton and PyTorch read a kernel's source through `inspect`, which asks this cache
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    scope: dict[str, Any] = {"__name__": __name__, "tl": tl, "triton": triton, inner: kernel}
    exec(compile(source, file, "exec"), scope)
    return triton.jit(scope[name])
