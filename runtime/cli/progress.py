"""The progress bar of a generation: frames, frames a second, time left."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn


class FrameProgress:
    """A bar on standard error; nothing is drawn where that is no terminal. A context manager."""

    def __init__(self, description: str) -> None:
        console = Console(stderr=True)
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(description, total=None, speed="")

    def say(self, description: str) -> None:
        self._bar.update(self._task, description=description)

    def start(self, frames: int) -> None:
        """From now on count towards `frames`; until the first of them the time left is unknown."""
        self._bar.reset(self._task, total=frames, description="generating", speed="")

    def advance(self, frames: int, fps: float) -> None:
        """`frames` are done in all, at `fps` frames a second."""
        self._bar.update(self._task, completed=frames, speed=f"{fps:.1f} frames/s")

    def __enter__(self) -> "FrameProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
