"""What the compiler is to do, as one frozen value, and doing it."""

from dataclasses import dataclass

from torch import Tensor

from ..quantize import LIVEAVATAR_IGNORE
from . import passes
from .cost import measure
from .program import Program, Report


@dataclass(frozen=True)
class Recipe:
    """Which passes run, and their data. `fp8`: linear layers in e4m3 except those named in `ignore`
    (a model whose layers are `Fp8Linear` already needs no such pass).

    `expect`: passes that must match something; one that does not is an error, because a model that changed its
    writing would silently lose its speed.
    """

    fold: bool = True
    concatenate: bool = True
    fuse: bool = True
    fp8: bool = False
    emit: bool = True
    ignore: tuple[str, ...] = LIVEAVATAR_IGNORE
    expect: tuple[str, ...] = ()


class NothingMatched(RuntimeError):
    """A pass found nothing in a graph where something was expected."""


def apply(program: Program, recipe: Recipe, packed: dict[str, tuple[Tensor, Tensor]] | None = None) -> Program:
    """Run the passes of `recipe` on `program`, in place; returns it. `packed`: quantised weights to share by name."""
    program.traced = program.traced or measure(program.graph)
    steps = [
        (True, lambda: passes.clean(program)),
        (recipe.fold, lambda: passes.fold(program)),
        (True, lambda: passes.share(program)),
        (recipe.concatenate, lambda: passes.concatenate(program)),
        (recipe.fuse, lambda: passes.fuse(program)),
        (recipe.fp8, lambda: passes.quantise(program, recipe.ignore, {} if packed is None else packed)),
        (recipe.emit, lambda: passes.emit(program)),
    ]
    for wanted, run in steps:
        if not wanted:
            continue
        report: Report = run()
        program.reports.append(report)
        if report.name in recipe.expect and not report.matches:
            raise NothingMatched(
                f"pass {report.name} matched nothing; is the model written over the ops of kernels/? "
                "Take it out of `expect` if it need not"
            )
    return program
