"""Check and time the row-wise kernels and the FP8 products on a GPU.

    python -m kinora.bench.rowwise               # under five minutes on an H200
    python -m kinora.bench.rowwise --no-sweep    # the defaults only
    python -m kinora.bench.rowwise --only-sweep  # the tiles of rows and values only, under a minute

Every op first computes each of its real cases beside its reference, from fresh inputs, into memory poisoned with NaN;
gradients likewise. Then a CUDA graph calls it on several sets of inputs in turn, so that the L2 cache does not hold
them, and the median replay is the time. `floor` is the time of a device copy of the same bytes in the same run.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from ..kernels import (
    adaln,
    audio_residual,
    fp8_linear,
    fp8_matmul,
    fp8_values,
    gated_residual,
    quantize_rows,
    residual_norm,
)
from ..kernels.cases import Case, Op
from ..kernels.row_norm import Norm, forward
from ..kernels.row_norm_backward import backward_tile
from ..kernels.row_norm_backward import launch as backward
from ..kernels.rows import Tile, tile
from .fp8_gemm import products_table
from .harness.check import gradients, in_float32, poisoned, relative_l2
from .harness.timing import replayed
from .ops import check_case

OPS = (
    adaln.OP,
    adaln.FP8_OP,
    residual_norm.OP,
    residual_norm.FP8_OP,
    gated_residual.OP,
    audio_residual.OP,
    quantize_rows.OP,
    quantize_rows.GELU_OP,
    fp8_values.OP,
    fp8_matmul.OP,
    fp8_linear.OP,
)
GRADIENTS = (adaln.OP, residual_norm.OP)
GRADIENT_TOLERANCE = 2e-2
SETS = 4  # of inputs: four times the smallest case outgrow the L2 cache
DEVICE = torch.device("cuda")


def microseconds(calls: Sequence[Callable[[], Any]], replays: int = 30) -> float:
    """Median time of one call in a CUDA graph of all of them."""
    return 1e6 * replayed(calls, replays)


def check(op: Op, case: Case) -> tuple[float, bool]:
    """Error of the results, and whether they, and the gradients where the op has a backward kernel, are right."""
    found = check_case(op, case, DEVICE)
    right = found.passed
    if op in GRADIENTS:
        inputs = dict(case.inputs(DEVICE, torch.Generator().manual_seed(0)))
        # in half precision autograd sums too coarsely to compare with
        exact = gradients(op.reference, in_float32(inputs))
        with poisoned():
            grads = gradients(op.run, inputs)
        off = {name: relative_l2(grad, exact[name]) for name, grad in grads.items()}
        if max(off.values()) > GRADIENT_TOLERANCE:
            print(f"FAILED gradients of {op.name}, {case.name}: {off}")
            right = False
    return found.error, right


def copy_rate() -> float:
    """Bytes a microsecond, read plus written, of a large device copy."""
    source, target = torch.empty(2, 2**29, dtype=torch.uint8, device=DEVICE)
    source.random_(0, 255)
    return 2 * source.numel() / microseconds([lambda: target.copy_(source)] * 4)


def rows_table(rate: float) -> int:
    """Check and time every case; the number of failures."""
    generator = torch.Generator().manual_seed(0)
    failures = 0
    numbers = f"{'error':>8s} {'us':>8s} {'floor':>8s} {'TB/s':>6s} {'TFLOP/s':>8s} {'eager us':>9s}"
    print(f"{'op':20s} {'case':30s} {numbers}")
    big = [(op, case) for op in OPS for case in op.cases() if not case.small]
    for op, case in big:
        worst, good = check(op, case)
        failures += not good
        heavy = op in (fp8_matmul.OP, fp8_linear.OP)
        sets = [dict(case.inputs(DEVICE, generator)) for _ in range(SETS)]
        time = microseconds([partial(op.run, **inputs) for inputs in sets])
        plain = 0.0 if heavy else microseconds([partial(op.reference, **inputs) for inputs in sets], 5)
        print(
            f"{op.name:20s} {case.name:30s} {worst:8.1e} {time:8.1f} {case.bytes / rate:8.1f} "
            f"{case.bytes / time / 1e6:6.2f} {case.flops / time / 1e6 if heavy else 0:8.0f} {plain:9.1f}"
            f"{'' if good else '  FAILED'}",
            flush=True,
        )
        del sets
        torch.cuda.empty_cache()
    return failures


def draw_norm(affine: bool, stream: torch.dtype, norm: torch.dtype, fp8: bool) -> dict[str, Any]:
    half, full = torch.bfloat16, torch.float32

    def draw(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, device=DEVICE).to(dtype)

    table = draw(1, 3, 6, 5120, dtype=full)
    shift, scale = draw(2, 5120, dtype=half) if affine else (table[:, :, 0], table[:, :, 1])
    return {
        "x": draw(1, 3168, 5120, dtype=half if affine else full),
        "y": draw(1, 3168, 5120, dtype=half),
        "gate": table[:, :, 2],
        "rows": None,
        "norm": Norm(shift, scale, affine, 1e-6, norm, half, fp8),
        "stream_dtype": stream,
    }


def norm_call(
    affine: bool, stream: torch.dtype, norm: torch.dtype, fp8: bool, gated: bool = True
) -> Callable[..., Any]:
    given = draw_norm(affine, stream, norm, fp8)
    return partial(forward, **(given if gated else given | {"gate": None}))


def gelu_call() -> Callable[..., Any]:
    return partial(quantize_rows.launch, torch.randn(3168, 13824, device=DEVICE, dtype=torch.bfloat16), True)


def backward_call() -> Callable[..., Any]:
    half = torch.bfloat16
    given = draw_norm(False, half, half, False)
    norm, stream, d_out = given["norm"], given["x"].to(half), torch.randn_like(given["y"])
    tables = given["gate"], norm.shift, norm.scale
    return partial(backward, stream, given["y"], *tables, None, 1e-6, False, half, stream, d_out, torch.float32)


def sweep() -> None:
    """Time of the row kernels at other shapes of program: block x warps."""
    half, full = torch.bfloat16, torch.float32
    norm = tile(5120)
    subjects: dict[str, tuple[Tile, Callable[[], Callable[..., Any]]]] = {
        "after self attention": (norm, partial(norm_call, True, full, half, False)),
        "after self attention, e4m3": (norm, partial(norm_call, True, full, half, True)),
        "after cross attention, e4m3": (norm, partial(norm_call, False, full, full, True, False)),
        "after the feed-forward": (norm, partial(norm_call, False, half, half, False)),
        "after the feed-forward, e4m3": (norm, partial(norm_call, False, half, half, True)),
        "GELU, e4m3": (tile(13824), gelu_call),
        "backward after the feed-forward": (backward_tile(5120), backward_call),
    }
    for name, (default, build) in subjects.items():
        runs = [build() for _ in range(SETS)]
        times = {}
        for tiling in itertools.starmap(Tile, itertools.product((512, 1024, 2048), (2, 4, 8, 16))):
            if default.num_warps / 2 <= tiling.num_warps <= default.num_warps * 4:
                times[tiling] = microseconds([partial(run, tiling=tiling) for run in runs], 20)
        best = ", ".join(f"{t.block}x{t.num_warps} {times[t]:.1f}" for t in sorted(times, key=lambda t: times[t])[:4])
        print(
            f"{name:32s} default {default.block}x{default.num_warps} {times[default]:.1f} us; best {best}", flush=True
        )
        del runs
        torch.cuda.empty_cache()


def sweep_values(rate: float) -> None:
    """Values to e4m3 at several tiles; what memory must move at least is 48.7 MB."""
    generator = torch.Generator().manual_seed(0)
    case = next(case for case in fp8_values.cases() if not case.small)
    sets = [dict(case.inputs(DEVICE, generator)) for _ in range(SETS)]
    first = sets[0]
    expected = first["v8"].clone(), first["descale"].clone()
    fp8_values.reference(first["v"], expected[0], expected[1], first["slots"], first["write"])

    def launches(block: int, num_warps: int, **given: Any) -> None:
        fp8_values.launch(given["v"], given["v8"], given["descale"], given["write"], given["slots"], block, num_warps)

    ways: dict[str, Callable[..., Any]] = {
        f"two launches, {rows} rows, {warps} warps": partial(launches, rows, warps)
        for rows, warps in ((128, 4), (128, 8), (128, 16), (64, 4), (64, 8))
    }
    print(f"values to e4m3: floor {case.bytes / rate:.1f} us")
    for name, way in ways.items():
        way(**first)
        pairs = zip((first["v8"], first["descale"]), expected, strict=True)
        # a GPU divides otherwise than PyTorch: a few values round to the other neighbour
        told = "" if max(relative_l2(a, b) for a, b in pairs) < 1e-3 else "  WRONG"
        time = microseconds([partial(way, **given) for given in sets])
        print(f"  {name:32s} {time:8.1f} us {case.bytes / time / 1e6:6.2f} TB/s{told}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-sweep", action="store_true", help="only check and time the defaults")
    parser.add_argument("--only-sweep", action="store_true", help="only try the tiles of rows and values")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: these kernels are timed on a GPU only", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    rate = copy_rate()
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, triton {triton.__version__}, copy {rate / 1e6:.2f} TB/s")
    failures = 0 if arguments.only_sweep else rows_table(rate)
    if not arguments.no_sweep:
        sweep()
        sweep_values(rate)
    if not arguments.no_sweep and not arguments.only_sweep:
        failures += products_table(microseconds)
    print(f"{failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
