"""What the benchmarks of `bench.attention` print: each kernel is checked first and timed only if it is right."""

import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import triton.testing

from .rowwise import microseconds as replayed

NAN = float("nan")


@dataclass
class Row:
    """A line of the table."""

    name: str
    error: float = NAN
    bound: float = NAN
    microseconds: float = NAN
    rate: str = ""
    beside: str = ""
    """Other times to compare with."""
    note: str = ""
    """Why there is no time."""


class Report:
    def __init__(self) -> None:
        self.rows: list[Row] = []

    def run(
        self, name: str, bound: float, check: Callable[[], float], time: Callable[[], Any] | None, work: float
    ) -> None:
        """Check, then time with a launch a call. `work`: FLOPs, or minus the bytes moved."""
        row = self._checked(name, bound, check)
        if time is not None and not row.note:
            self._guarded(row, lambda: microseconds(time), work)
        print(line(row), flush=True)

    def run_replayed(
        self,
        name: str,
        bound: float,
        check: Callable[[], float],
        calls: Sequence[Callable[[], Any]],
        moved: float,
        copy_rate: float,
    ) -> None:
        """Check, then time as a stream runs it: replays of a CUDA graph of `calls`, each on memory of its own.

        Beside it: the time of a device copy of as many bytes (`copy_rate`: bytes a microsecond), and that of a call
        launched from Python with the L2 cache full of unwritten lines.
        """
        row = self._checked(name, bound, check)
        if not row.note:
            row.beside = f"copy {moved / copy_rate:6.1f} us"
            self._guarded(row, lambda: replayed(calls), -moved)
        if not row.note:
            row.beside += f", launched {microseconds(calls[0]):6.1f} us"
        print(line(row), flush=True)

    def _checked(self, name: str, bound: float, check: Callable[[], float]) -> Row:
        row = Row(name, bound=bound)
        self.rows.append(row)

        def compare() -> None:
            row.error = check()
            if not row.error <= bound:  # NaN fails
                row.note = "FAIL"

        attempt(row, compare)
        return row

    def _guarded(self, row: Row, time: Callable[[], float], work: float) -> None:
        def read() -> None:
            row.microseconds = time()
            row.rate = rate(work, row.microseconds)

        attempt(row, read)

    def table(self) -> str:
        return "\n".join(line(row) for row in self.rows)


def attempt(row: Row, do: Callable[[], None]) -> None:
    """An exception becomes the note of its row, so that the other rows are still measured."""
    try:
        do()
    except Exception as error:
        print(traceback.format_exc(limit=-4)[-1500:])
        row.note = f"{type(error).__name__}: {str(error).splitlines()[0][:60] if str(error) else ''}"


def line(row: Row) -> str:
    error = "" if math.isnan(row.error) else f"{row.error:.2e}"
    time = "" if math.isnan(row.microseconds) else f"{row.microseconds:9.1f} us"
    return f"{row.name:44s} {error:>9s} {time:>13s} {row.rate:>14s}  {row.beside}{row.note}"


def rate(work: float, time: float) -> str:
    """`work`: FLOPs, or minus the bytes moved."""
    return f"{work / time / 1e6:7.1f} TFLOP/s" if work > 0 else f"{-work / time / 1e6:7.2f} TB/s"


def microseconds(run: Callable[[], Any]) -> float:
    return 1e3 * float(triton.testing.do_bench(run, warmup=30, rep=150, return_mode="median"))
