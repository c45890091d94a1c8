"""A report as a table for people, and the comparison of two reports.

On a CPU only ratios are shown: its seconds depend on what else the machine does, and nobody should quote them.
"""

import math
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .report import Report, Result

BASELINE = "eager"
LEAST_SPREAD = 0.02  # what may move by itself, even when two runs agreed better than that


def results_table(report: Report) -> Table:
    """One row a result; the ratio is against "eager" of the same name."""
    on_gpu = report.on_gpu
    table = Table(title=f"{report.device['name']}, {report.date}", title_justify="left")
    table.add_column("what", overflow="fold")
    table.add_column("variant")
    if on_gpu:
        table.add_column("time", justify="right")
    for heading in ("±", f"× {BASELINE}"):
        table.add_column(heading, justify="right")
    if on_gpu:
        for heading in ("TFLOP/s", "TB/s", "% roofline", "peak GB"):
            table.add_column(heading, justify="right")
    table.add_column("error", justify="right")
    table.add_column("note", overflow="fold")
    for result in report.results:
        table.add_row(*_row(report, result))
    return table


def _row(report: Report, result: Result) -> list[str]:
    base = report.find(result.name, BASELINE)
    ratio = base.seconds / result.seconds if base and base.seconds and result.seconds else None
    gpu = [
        _number(result.flops_per_second, 1e-12, ".0f"),
        _number(result.bytes_per_second, 1e-12, ".2f"),
        _number(result.roofline_share, 100, ".0f"),
        _number(result.peak_memory, 1e-9, ".1f"),
    ]
    return [
        escape(result.name),
        result.variant,
        *([_time(result.seconds)] if report.on_gpu else []),
        _number(result.spread, 100, ".1f", "%"),
        _number(ratio, 1, ".2f"),
        *(gpu if report.on_gpu else []),
        _number(result.error, 1, ".1e"),
        escape(_note(report, result)),
    ]


def _note(report: Report, result: Result) -> str:
    """What does not fit into a column: why there is no time, throttling, further numbers."""
    parts = [] if result.status == "ok" else [result.status.upper()]
    parts.append(result.note)
    if report.on_gpu:
        parts += [f"{name} {value:.3g}" for name, value in result.metrics.items()]
    if result.load:
        parts.append(f"{result.load.clock_mhz} MHz, {result.load.power_watts:.0f} W")
    if result.throttled:
        parts.append(f"THROTTLED: {result.throttled}")
    return "; ".join(filter(None, parts))


def _number(value: float | None, scale: float, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value * scale:{form}}{unit}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} µs"


def limits_line(report: Report) -> str:
    """What the machine could do in this run, in words."""
    if report.roofline is None or not report.on_gpu:
        return "A CPU: only ratios are shown."
    rates = [f"{name} product {rate / 1e12:.0f} TFLOP/s" for name, rate in report.roofline.flops_per_second.items()]
    unknown = "" if report.device.get("driver") else " NVML does not answer: clocks and throttling are not known."
    return f"Limits in this run: {', '.join(rates)}, copy {report.roofline.bytes_per_second / 1e12:.2f} TB/s.{unknown}"


def print_report(report: Report, console: Console) -> None:
    console.print(results_table(report))
    console.print(limits_line(report))
    for result in report.results:
        if result.profile:
            console.print(profile_table(result))


def profile_table(result: Result, most: int = 15) -> Table:
    """Where the time of one result goes."""
    table = Table("kernel", title=f"{escape(result.name)}: {result.variant}", title_justify="left")
    for heading in ("share", "calls"):
        table.add_column(heading, justify="right")
    for part in result.profile[:most]:
        table.add_row(escape(part.kernel), f"{part.share:.1%}", str(part.calls))
    return table


@dataclass(frozen=True)
class Move:
    """One thing in two reports: `ratio` = new seconds / old seconds; `spread` is what may be chance."""

    name: str
    variant: str
    before: float
    after: float
    spread: float

    @property
    def ratio(self) -> float:
        return self.after / self.before

    @property
    def flagged(self) -> bool:
        """Beyond the run-to-run spread."""
        return abs(math.log(self.ratio)) > math.log1p(self.spread)


def moves(before: Report, after: Report) -> list[Move]:
    """What both reports timed, the largest change first."""
    found = []
    for old in before.results:
        new = after.find(old.name, old.variant)
        if new is not None and old.seconds and new.seconds:
            spread = max(old.spread or 0.0, new.spread or 0.0, LEAST_SPREAD)
            found.append(Move(old.name, old.variant, old.seconds, new.seconds, spread))
    return sorted(found, key=lambda move: -abs(math.log(move.ratio)))


def moves_table(found: list[Move]) -> Table:
    table = Table(title="B against A: below 1 is faster", title_justify="left")
    table.add_column("what", overflow="fold")
    table.add_column("variant")
    for heading in ("B / A", "spread", "verdict"):
        table.add_column(heading, justify="right")
    for move in found:
        verdict = ("[green]faster" if move.ratio < 1 else "[red]slower") if move.flagged else "same"
        table.add_row(escape(move.name), move.variant, f"{move.ratio:.3f}", f"{move.spread:.1%}", verdict)
    return table


def unmatched(before: Report, after: Report) -> list[str]:
    """What only one report timed, as sentences."""
    keys = [{(r.name, r.variant) for r in report.results if r.seconds} for report in (before, after)]
    only = [("A", keys[0] - keys[1]), ("B", keys[1] - keys[0])]
    return [f"only in {side}: {name}, {variant}" for side, missing in only for name, variant in sorted(missing)]
