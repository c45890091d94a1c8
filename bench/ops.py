"""`kinora bench op`: every op of `kernels.registry` on the shapes of its own `cases()`, against PyTorch and libraries.

The FLOPs and bytes are those that the case states. A variant is timed only if its result is within the case's tolerance
of the reference computed in float32 from the same inputs.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..kernels.cases import Case, Inputs, Op
from ..kernels.dispatch import triton_runs, using
from ..kernels.registry import registry
from ..runtime.errors import InputError
from .harness.check import Check, poisoned, relative_l2, tensors
from .harness.run import Bench, Expected, Ready, Work
from .peers import library_calls

VARIANTS = ("kinora", "eager", "compiled", "library")
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
HALF = (torch.bfloat16, torch.float16)
CACHE_MULTIPLE = 3  # the inputs of one sample are at least this many L2 caches
MOST_COPIES = 16
COPY_SHARE = 0.25  # of the free memory, at most, for copies of the inputs
SEED = 4

Function = Callable[..., Any]


def bench_ops(bench: Bench, names: Sequence[str], variants: Sequence[str], small: bool) -> None:
    """Measure the ops in `names` (all of them if empty), on their `small` cases or on the real shapes."""
    for op in chosen(names):
        cases = [case for case in op.cases() if case.small == small]
        if not cases:
            bench.say(f"{op.name} has no {'small' if small else 'real'} cases")
        for case in cases:
            _bench_case(bench, op, case, variants)


def chosen(names: Sequence[str]) -> list[Op]:
    """The ops called `names`, all if empty; InputError for an unknown one."""
    known = registry()
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"there is no op {', '.join(unknown)}; there are {', '.join(known) or 'none with cases yet'}")
    return [known[name] for name in names or known]


def _bench_case(bench: Bench, op: Op, case: Case, variants: Sequence[str]) -> None:
    name = f"{op.name}/{case.name}"
    made = bench.attempt(name, "reference", lambda: _reference(op, case, bench.device))
    if made is None:
        return
    inputs, expected = made
    torch._dynamo.reset()  # PyTorch stops compiling a function after eight shapes
    measure = partial(bench.measure, name, work=work_of(case, inputs), queue_ahead=True)
    functions: dict[str, Function] = {
        "kinora": op.run,
        "eager": op.reference,
        "compiled": torch.compile(op.reference, dynamic=False),
    }
    for variant in variants:
        if variant in functions:
            unfused = variant == "kinora" and not triton_runs(*tensors(inputs))
            note = "Triton does not run here: this is the reference" if unfused else ""
            way = partial(_ready, functions[variant], variant != "kinora", op, inputs, bench.device)
            measure(variant, way, expected=expected, note=note)
    if "library" in variants:
        peers = bench.attempt(name, "library", lambda: library_calls(op.name, inputs)) or {}
        for peer, call in peers.items():
            measure(peer, partial(_library, call), note="a library's call on prepared inputs; not checked")


def check_case(op: Op, case: Case, device: torch.device) -> Check:
    """The op on fresh inputs, in memory that held NaN, against its reference in float32."""
    inputs, expected = _reference(op, case, device)
    with torch.no_grad(), poisoned():
        result = _outcome(op.run, op, inputs)
    return Check(relative_l2(result, expected.result), expected.tolerance)


def _reference(op: Op, case: Case, device: torch.device) -> tuple[Inputs, Expected]:
    """Fresh inputs of a case, and what its reference makes of them in float32."""
    inputs = case.inputs(device, torch.Generator().manual_seed(SEED))
    with torch.no_grad():
        result = _outcome(partial(_in_float32, op.reference), op, widened(inputs))
    return inputs, Expected(result, case.tolerance)


@contextmanager
def _ready(function: Function, plain: bool, op: Op, inputs: Inputs, device: torch.device) -> Iterator[Ready]:
    calls = [partial(function, **clone(inputs)) for _ in range(copies_for(inputs, device))]
    with using(False) if plain else nullcontext():
        yield Ready(calls, lambda: _outcome(function, op, inputs))


@contextmanager
def _library(call: Callable[[], Tensor]) -> Iterator[Ready]:
    yield Ready([call], call)


def _outcome(function: Function, op: Op, inputs: Inputs) -> Any:
    """The result, and the arguments that the op writes, of a call on its own copy of the inputs."""
    own = clone(inputs)
    result = function(**own)
    return result, [own[name] for name in op.mutates]


def _in_float32(reference: Function, **inputs: Any) -> Any:
    """The reference without the lower-precision float32 products and convolutions that PyTorch may choose."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with using(False):
            return reference(**inputs)
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def clone(inputs: Inputs) -> dict[str, Any]:
    """The inputs in memory of their own; views of one storage stay views of one storage, strides are kept."""
    return copy.deepcopy(dict(inputs))


def widened(inputs: Inputs) -> Inputs:
    """Half-precision tensors as float32; FP8 ones stay, since references dequantise them with their scales."""
    return tree_map_only(Tensor, lambda t: t.float() if t.dtype in HALF else t, dict(inputs))


def input_bytes(inputs: Mapping[str, Any]) -> int:
    """Bytes of the memory behind all tensors, each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(inputs)}.values())


def copies_for(inputs: Inputs, device: torch.device) -> int:
    """How many copies of the inputs a sample walks over, so that none is still in the L2 cache."""
    if device.type != "cuda":
        return 2
    size = max(input_bytes(inputs), 1)
    wanted = math.ceil(CACHE_MULTIPLE * torch.cuda.get_device_properties(device).L2_cache_size / size) + 1
    affordable = int(COPY_SHARE * torch.cuda.mem_get_info(device)[0] / size)
    return max(min(wanted, affordable, MOST_COPIES), 1)


def work_of(case: Case, inputs: Inputs) -> Work:
    """FP8 where an input is FP8, else half where one is, else float32."""
    dtypes = {t.dtype for t in tensors(inputs)}
    precision = "fp8" if dtypes & set(FLOAT8) else "bf16" if dtypes & set(HALF) else "float32"
    return Work(case.flops, case.bytes, precision)
