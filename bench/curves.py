"""`python -m kinora.bench.curves RUN --out training.png`: plot the curves (`*.jsonl`) of a training run."""

import argparse
import json
import sys
from pathlib import Path


def read_curves(run: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Values by curve file and name: {"vae": {"loss": [(step, value), ...]}}."""
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for path in sorted(run.glob("*.jsonl")):
        values = curves.setdefault(path.stem, {})
        for line in path.read_text().splitlines():
            row = json.loads(line)
            for name, value in row.items():
                if name not in ("step", "seconds", "pool"):
                    values.setdefault(name, []).append((row["step"], value))
    return curves


def plot(curves: dict[str, dict[str, list[tuple[int, float]]]], picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [(file, name, points) for file, values in curves.items() for name, points in values.items()]
    columns = 4
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(3.2 * columns, 2.4 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (file, name, points) in zip(axes.flat, panels, strict=False):
        steps, values = zip(*points, strict=True)
        axis.plot(steps, values)
        axis.set_title(f"{file}: {name}", fontsize=9)
        if "loss" in name or name in ("flow", "rollout", "latent_mse"):
            axis.set_yscale("log")
        axis.tick_params(labelsize=7)
    figure.supxlabel("optimiser step", fontsize=9)
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=80)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kinora.bench.curves", description=__doc__)
    parser.add_argument("run", type=Path, help="the run folder, with vae.jsonl and dit.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="the picture to write")
    args = parser.parse_args(argv)
    curves = read_curves(args.run)
    if not curves:
        print(f"curves: no .jsonl below {args.run}; pass the folder given to training as --out", file=sys.stderr)
        return 2
    plot(curves, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
