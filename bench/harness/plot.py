"""The roofline plot of a report: what each call reaches, below what this machine could do."""

from pathlib import Path

from ...runtime.errors import InputError, OutputError
from .report import Report

MARKERS = "os^Dvp*X"


def plot_roofline(report: Report, path: Path) -> bool:
    """Write a PNG; False when nothing in the report has FLOPs, bytes and a time.

    InputError without matplotlib, OutputError when the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise InputError("the plot needs matplotlib: pip install 'kinora[bench]', or pass --no-plot") from error
    shown = [r for r in report.results if r.seconds and r.flops and r.bytes]
    if not shown or report.roofline is None:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    copy, rates = report.roofline.bytes_per_second, report.roofline.flops_per_second
    figure, axis = pyplot.subplots(figsize=(10, 6.5))
    ridges = [rate / copy for rate in rates.values()]
    intensities = [result.flops / result.bytes for result in shown]
    low, high = min(*intensities, *ridges) / 3, max(*intensities, *ridges) * 3
    for name, rate in rates.items():
        axis.plot([low, rate / copy, high], [low * copy / 1e12, rate / 1e12, rate / 1e12], "--", label=f"limit, {name}")
    variants = sorted({result.variant for result in shown})
    for variant, marker in zip(variants, MARKERS * len(variants), strict=False):
        own = [result for result in shown if result.variant == variant]
        x = [result.flops / result.bytes for result in own]
        y = [result.flops / result.seconds / 1e12 for result in own if result.seconds]
        axis.plot(x, y, marker, label=variant)
    for name in {result.name for result in shown}:
        best = min((r for r in shown if r.name == name), key=lambda r: r.seconds or 0.0)
        place = best.flops / best.bytes, best.flops / (best.seconds or 1.0) / 1e12
        axis.annotate(name, place, xytext=(4, 4), textcoords="offset points", fontsize=6)
    axis.set(xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="TFLOP/s", xlim=(low, high))
    axis.set_title(f"{report.device['name']}, {report.date}")
    axis.legend(fontsize=8)
    axis.grid(True, which="both", alpha=0.2)
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        pyplot.close(figure)
    return True
