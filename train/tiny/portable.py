"""Carry a training run between machines: its checkpoints in half precision, cut into parts.

    python -m kinora.train.tiny.portable pack RUN FOLDER      # FOLDER/run.000, run.001, ... of at most 15 MB
    python -m kinora.train.tiny.portable unpack FOLDER RUN

Kept: the averaged weights (which the run goes on from), AdamW's second moments as square roots, step counts, curves.
Left behind: momenta, which a few steps build anew. A fifth of the size of the checkpoints.
"""

import argparse
import io
import sys
from pathlib import Path
from typing import Any

import torch

STAGES = ("vae", "dit")
PART_BYTES = 15_000_000


def shrink(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of `train_vae` or `train_dit` without first moments, tensors in float16."""
    adamw, muon = checkpoint["optimizer"]["adamw"], checkpoint["optimizer"]["muon"]
    kept = {key: value for key, value in checkpoint.items() if key not in ("model", "ema", "optimizer")}
    return kept | {
        "ema": {name: value.half() for name, value in checkpoint["ema"].items()},
        "muon_groups": muon["param_groups"],
        "groups": adamw["param_groups"],
        "roots": {index: state["exp_avg_sq"].sqrt().half() for index, state in adamw["state"].items()},
        "steps": {index: state["step"] for index, state in adamw["state"].items()},
    }


def grow(small: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint that the stages resume from; weights and average both start at the average."""
    small = dict(small)
    average = {name: value.float() for name, value in small.pop("ema").items()}
    groups, roots, steps = small.pop("groups"), small.pop("roots"), small.pop("steps")
    state = {
        index: {"step": steps[index], "exp_avg": torch.zeros_like(root.float()), "exp_avg_sq": root.float().square()}
        for index, root in roots.items()
    }
    muon = {"state": {}, "param_groups": small.pop("muon_groups")}
    optimizer = {"muon": muon, "adamw": {"state": state, "param_groups": groups}}
    return small | {"model": average, "ema": {n: v.clone() for n, v in average.items()}, "optimizer": optimizer}


def pack(run: Path, folder: Path) -> list[Path]:
    """Write the parts of `run` into `folder`; FileNotFoundError when it has no checkpoint."""
    stages = {
        stage: shrink(torch.load(run / f"{stage}.pt", map_location="cpu", weights_only=True))
        for stage in STAGES
        if (run / f"{stage}.pt").is_file()
    }
    if not stages:
        raise FileNotFoundError(f"{run} holds no checkpoint (vae.pt, dit.pt); pass the folder given to --out")
    curves = {path.name: path.read_text() for path in sorted(run.glob("*.jsonl"))}
    buffer = io.BytesIO()
    torch.save({"stages": stages, "curves": curves}, buffer)
    data, parts = buffer.getvalue(), []
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("run.*"):
        old.unlink()
    for index, start in enumerate(range(0, len(data), PART_BYTES)):
        parts.append(folder / f"run.{index:03d}")
        parts[-1].write_bytes(data[start : start + PART_BYTES])
    return parts


def unpack(folder: Path, run: Path) -> None:
    """Make the run folder that the parts were packed from; FileNotFoundError when there are none."""
    parts = sorted(folder.glob("run.*"))
    if not parts:
        raise FileNotFoundError(f"{folder} holds no parts (run.000, ...); pass the folder that `pack` wrote")
    packed = torch.load(io.BytesIO(b"".join(part.read_bytes() for part in parts)), weights_only=True)
    run.mkdir(parents=True, exist_ok=True)
    for stage, small in packed["stages"].items():
        torch.save(grow(small), run / f"{stage}.pt")
    for name, text in packed["curves"].items():
        (run / name).write_text(text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kinora.train.tiny.portable", description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=("pack", "unpack"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args(argv)
    try:
        if args.action == "pack":
            print("\n".join(str(part) for part in pack(args.source, args.target)))
        else:
            unpack(args.source, args.target)
    except FileNotFoundError as error:
        print(f"portable: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
