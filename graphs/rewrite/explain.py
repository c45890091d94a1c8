"""What the compiler did to a program, layer by layer, as text."""

from collections import Counter
from collections.abc import Iterable, Sequence

from .cost import measure
from .program import Program
from .work import Ceilings, Cost, Work

OUTSIDE = "(outside)"  # calls of the traced function itself
HEADINGS = ("layer", "passes", "calls", "GFLOP", "MB", "roofline ms")
DEFAULT = Ceilings()


def explain(program: Program, ceilings: Ceilings = DEFAULT) -> str:
    """A summary of the passes, then a table with what each did in each layer, and calls, FLOPs, bytes and the time
    that the ceilings allow, before -> after. Meant for a program after `apply`."""
    after = measure(program.graph)
    before = program.traced
    rows = [
        _row(layer or OUTSIDE, _done(program, layer), _in(before, layer), _in(after, layer), ceilings)
        for layer in _layers(before, after)
    ]
    everything = Counter({report.name: report.matches for report in program.reports if report.matches})
    rows.append(_row("all", everything, before, after, ceilings))
    note = (
        f"roofline: {ceilings.bf16:g} TFLOP/s bf16, {ceilings.fp8:g} TFLOP/s FP8, {ceilings.memory:g} TB/s; "
        "every call alone, inputs read once, outputs written once"
    )
    return "\n".join([*summary(program), "", *_table([HEADINGS, *rows]), "", note])


def summary(program: Program) -> list[str]:
    """A line a pass: how much it matched, and its first match."""
    width = max((len(report.name) for report in program.reports), default=0)
    return [
        f"{report.name:{width}}  {report.matches:5}  {report.lines[0] if report.lines else 'nothing matched'}"
        for report in program.reports
    ]


def _layers(*works: Sequence[Work]) -> list[str]:
    """Every layer once, in the order in which they run."""
    return list(dict.fromkeys(call.layer for work in works for call in work))


def _in(work: Iterable[Work], layer: str) -> list[Work]:
    return [call for call in work if call.layer == layer]


def _done(program: Program, layer: str) -> Counter[str]:
    return Counter(report.name for report in program.reports for place in report.layers if place == layer)


def _row(
    name: str, done: Counter[str], before: Sequence[Work], after: Sequence[Work], ceilings: Ceilings
) -> tuple[str, ...]:
    old, new = (Cost.of(work, ceilings) for work in (before, after))
    return (
        name,
        ", ".join(f"{what} {count}" for what, count in done.items()),
        _change(f"{old.calls}", f"{new.calls}"),
        _change(f"{old.flops / 1e9:,.1f}", f"{new.flops / 1e9:,.1f}"),
        _change(f"{old.bytes / 1e6:,.1f}", f"{new.bytes / 1e6:,.1f}"),
        _change(f"{old.seconds * 1e3:.3f}", f"{new.seconds * 1e3:.3f}"),
    )


def _change(old: str, new: str) -> str:
    return old if old == new else f"{old} -> {new}"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    aligned = [
        "  ".join(
            f"{cell:<{w}}" if i < 2 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return [aligned[0].rstrip(), *(line.rstrip() for line in aligned[1:])]
