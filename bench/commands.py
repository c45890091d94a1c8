"""The commands of `kinora bench`: options in, a measured report out. PyTorch is imported inside, once options are good.

Exit codes as `kinora`: 0 done, 1 something was refused or failed (the report says what), 2 options that cannot be used.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..runtime.cli.options import Debug, parse_size
from ..runtime.errors import InputError

if TYPE_CHECKING:
    from .harness.report import Report
    from .harness.run import Bench
    from .models import ModelChoice

PROGRAM = "kinora bench"
REFUSED = 1
LOG_WIDTH = 180  # columns where the table goes to a file
PRECISIONS = ("auto", "float32", "bf16", "fp8")
FOLDER = Path("out/bench")

Out = Annotated[Path | None, typer.Option("--out", "-o", help=f"The JSON to write; default {FOLDER}/COMMAND.json.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Seconds = Annotated[float, typer.Option(help="How long each of the two runs of a measurement takes, about.")]
Profile = Annotated[bool, typer.Option("--profile", help="Also break each time down by kernel.")]
Plot = Annotated[bool, typer.Option(help="Write the roofline plot beside the JSON.")]
Variants = Annotated[str, typer.Option("--variant", help="Comma-separated; by default all that exist.")]
Model = Annotated[str, typer.Option(help="liveavatar-14b (random weights), tiny, or the folder of a trained model.")]
Chosen = Annotated[
    str, typer.Option("--precision", help="float32, bf16 or fp8; auto: bf16 on a GPU, float32 on a CPU.")
]
Size = Annotated[str, typer.Option(help="WIDTHxHEIGHT of the video; by default the model's own.")]

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Measure ops and models beside the limits of this machine, and write JSON, a table and a roofline plot.",
    no_args_is_help=True,
)


@app.command("op")
def op_command(
    ops: Annotated[list[str] | None, typer.Argument(help="Names of ops; none for all of them.")] = None,
    variant: Variants = "",
    small: Annotated[
        bool | None, typer.Option("--small/--real", help="Test-sized or real shapes; by default real on a GPU.")
    ] = None,
    device: Device = "auto",
    seconds: Seconds = 0.3,
    profile: Profile = False,
    plot: Plot = True,
    out: Out = None,
    debug: Debug = False,
) -> None:
    """Every op of kernels/ on its own cases, against plain PyTorch, torch.compile and libraries.

    [bold]Example[/]

    kinora bench op adaln rope_attention --profile -o out/bench/ops.json
    """
    from .ops import VARIANTS, bench_ops, chosen

    chosen(ops or [])
    variants = _variants(variant, VARIANTS)
    bench = _begin("op", device, seconds, profile, out)
    bench_ops(bench, ops or [], variants, bench.device.type != "cuda" if small is None else small)
    _finish(bench, plot)


@app.command("step")
def step_command(
    model: Model = "liveavatar-14b",
    precision: Chosen = "auto",
    variant: Variants = "",
    size: Size = "",
    device: Device = "auto",
    seconds: Seconds = 2.0,
    profile: Profile = False,
    plot: Plot = True,
    out: Out = None,
    debug: Debug = False,
) -> None:
    """One denoising step of one block, with a full rolling cache.

    [bold]Example[/]

    kinora bench step --precision fp8 --variant compiled,kinora --profile
    """
    from .step import VARIANTS, bench_step

    _bench_model("step", bench_step, VARIANTS, model, precision, variant, size, device, seconds, profile, plot, out)


@app.command("block")
def block_command(
    model: Model = "liveavatar-14b",
    precision: Chosen = "auto",
    variant: Variants = "",
    size: Size = "",
    device: Device = "auto",
    seconds: Seconds = 4.0,
    profile: Profile = False,
    plot: Plot = True,
    out: Out = None,
    debug: Debug = False,
) -> None:
    """One block on one GPU: all denoising steps and the VAE's decode; frames per second."""
    from .block import VARIANTS, bench_block

    _bench_model("block", bench_block, VARIANTS, model, precision, variant, size, device, seconds, profile, plot, out)


@app.command("vae")
def vae_command(
    model: Model = "liveavatar-14b",
    precision: Chosen = "auto",
    variant: Variants = "",
    size: Size = "",
    device: Device = "auto",
    seconds: Seconds = 1.0,
    profile: Profile = False,
    plot: Plot = True,
    out: Out = None,
    debug: Debug = False,
) -> None:
    """The VAE in the middle of a stream: decode of a block, encode of as many frames."""
    from .vae import VARIANTS, bench_vae

    _bench_model("vae", bench_vae, VARIANTS, model, precision, variant, size, device, seconds, profile, plot, out)


@app.command("stream")
def stream_command(
    model: Model = "liveavatar-14b",
    precision: Chosen = "auto",
    variant: Variants = "",
    size: Size = "",
    device: Device = "auto",
    out: Out = None,
    debug: Debug = False,
) -> None:
    """A session end to end, cold and warm: opening, time to the first frame, steady frames per second."""
    from .stream import VARIANTS, bench_stream

    _bench_model("stream", bench_stream, VARIANTS, model, precision, variant, size, device, 0.5, False, False, out)


@app.command("show")
def show_command(
    report: Annotated[Path, typer.Argument(metavar="REPORT.json", help="What a benchmark wrote, finished or not.")],
    plot: Plot = False,
    debug: Debug = False,
) -> None:
    """The table of a report again, also of a run that was cut off: each result is saved as soon as it exists."""
    from .harness.report import Report

    _show(Report.load(report), report, plot)


@app.command("compare")
def compare_command(
    before: Annotated[Path, typer.Argument(metavar="A.json", help="The older report.")],
    after: Annotated[Path, typer.Argument(metavar="B.json", help="The newer report.")],
    debug: Debug = False,
) -> None:
    """What moved between two reports, the largest change first; changes within the spread of the runs are "same"."""
    from rich.console import Console

    from .harness.report import Report
    from .harness.table import moves, moves_table, unmatched

    a, b = Report.load(before), Report.load(after)
    console, found = Console(), moves(a, b)
    if a.device["name"] != b.device["name"]:
        console.print(f"[yellow]Different machines: A {a.device['name']}, B {b.device['name']}.[/]")
    if not found:
        raise InputError(f"{before} and {after} have no timed result in common; compare reports of the same command")
    console.print(moves_table(found))
    for line in unmatched(a, b):
        console.print(line)


def main(arguments: Sequence[str] | None = None) -> int:
    """The program on its own, `python -m kinora.bench`; returns its exit code."""
    from ..runtime.cli import run

    return run(app, list(sys.argv[1:] if arguments is None else arguments), PROGRAM)


def _bench_model(
    command: str,
    measure: Callable[["Bench", "ModelChoice", Sequence[str]], None],
    known: Sequence[str],
    model: str,
    precision: str,
    variant: str,
    size: str,
    device: str,
    seconds: float,
    profile: bool,
    plot: bool,
    out: Path | None,
) -> None:
    """What the commands that measure a model have in common."""
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r} is not known; choose one of {', '.join(PRECISIONS)}")
    variants, sides = _variants(variant, known), parse_size(size)
    from ..runtime.load import pick_device
    from .models import ModelChoice

    target = pick_device(device)
    chosen = ("bf16" if target.type == "cuda" else "float32") if precision == "auto" else precision
    choice = ModelChoice(model, chosen, target, sides)  # type: ignore[arg-type]  # checked above
    bench = _begin(command, device, seconds, profile, out)
    measure(bench, choice, variants)
    _finish(bench, plot)


def _variants(text: str, known: Sequence[str]) -> list[str]:
    """ "eager,kinora" -> its names; all known ones for nothing."""
    asked = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in asked if name not in known]:
        raise InputError(f"there is no variant {', '.join(unknown)}; choose from {', '.join(known)}")
    return asked or list(known)


def _show(report: "Report", path: Path, plot: bool) -> None:
    """Print the report that lies at `path`, and draw it beside."""
    from rich.console import Console

    from .harness.plot import plot_roofline
    from .harness.table import print_report

    console = Console()
    print_report(report, console if console.is_terminal else Console(width=LOG_WIDTH))
    picture = path.with_suffix(".png")
    if plot and plot_roofline(report, picture):
        print(f"wrote {picture}")


def _begin(command: str, device: str, seconds: float, profile: bool, out: Path | None) -> "Bench":
    if not 0 < seconds <= 600:
        raise InputError(f"--seconds is {seconds:g}; pass a number above 0, up to 600")
    from ..runtime.load import pick_device
    from .harness.run import Bench

    words = " ".join((PROGRAM, command, *_arguments_after(command)))
    path = out or FOLDER / f"{command}.json"
    return Bench.begin(words, pick_device(device), path, run_seconds=seconds, profiling=profile, say=_say)


def _arguments_after(command: str) -> list[str]:
    """What was typed after the command's name, for the report."""
    return sys.argv[sys.argv.index(command) + 1 :] if command in sys.argv else []


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _finish(bench: "Bench", plot: bool) -> None:
    """Show the report, draw it, and leave with 1 when a result was refused or failed."""
    _show(bench.report, bench.out, plot)
    print(f"wrote {bench.out}")
    bad = [result for result in bench.report.results if result.status in ("refused", "failed")]
    if bad:
        _say(f"{PROGRAM}: {len(bad)} of {len(bench.report.results)} results have no time; their notes say why")
        raise typer.Exit(REFUSED)
