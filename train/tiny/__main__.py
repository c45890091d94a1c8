"""`python -m kinora.train.tiny --out DIR`: train the embedded model from scratch; a cut-off run resumes in DIR."""

import argparse
import sys
import time
from pathlib import Path

import torch

from ...graphs.models.speech import SpeechConfig
from ..loop import Clock, OutOfTime, save_checkpoint
from ..speech import synthesise
from .clips import ClipSource
from .dit_stage import TinySystem, train_dit
from .export import dit_config, export
from .pool import LatentPool, fast_copy
from .recipe import PRESETS, Recipe
from .vae_stage import train_vae
from .validate import Validation

VALIDATION_CLIPS = 16


def speech_bank(recipe: Recipe, out: Path, seed: int, split: str, count: int) -> torch.Tensor:
    """Synthetic speech [count, samples] int16, made once per run folder."""
    path = out / f"speech-{split}.pt"
    if path.is_file():
        return torch.load(path, weights_only=True)
    bank = synthesise(count, recipe.utterance_seconds, seed=seed, split=split)
    save_checkpoint(path, bank)
    return bank


def train(
    source: ClipSource,
    held_out: torch.Tensor,
    recipe: Recipe,
    out: Path,
    device: torch.device,
    seed: int,
    clock: Clock,
) -> Path:
    """All stages, each resumed where `out` has it; returns the folder of the exported model."""
    vae = train_vae(source, recipe, out, device, clock)
    speech = SpeechConfig()
    context = (speech.left_context, speech.lookahead)
    checks = ClipSource(held_out, recipe, device, seed + 1, held_out=True)
    count = min(VALIDATION_CLIPS, recipe.flow.batch)
    validate = Validation.prepare(checks, vae, count, context, out / "validation.png")
    system = TinySystem(dit_config(recipe, speech), speech).to(device)
    train_dit(system, LatentPool(source, fast_copy(vae), recipe, *context), recipe, out, device, validate, clock)
    return export(system, vae, recipe, out / "tiny")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kinora.train.tiny", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="run folder: checkpoints, curves, the exported model")
    parser.add_argument("--preset", choices=PRESETS, default="full", help="full: one H200; smoke: minutes on a CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, help="stop after so many minutes; the same command goes on from there")
    args = parser.parse_args(argv)
    clock = Clock(args.minutes)
    recipe, device, started = PRESETS[args.preset], torch.device(args.device), time.perf_counter()
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.benchmark = True

    bank = speech_bank(recipe, args.out, args.seed, "train", recipe.utterances)
    held_out = speech_bank(recipe, args.out, args.seed, "test", min(recipe.utterances, VALIDATION_CLIPS))
    source = ClipSource(bank, recipe, device, args.seed)
    print(f"speech: {bank.shape[0]} utterances after {time.perf_counter() - started:.0f} s", flush=True)
    try:
        folder = train(source, held_out, recipe, args.out, device, args.seed, clock)
    except OutOfTime as stop:
        print(f"stopped after {args.minutes:g} minutes ({stop}); run the same command again to go on", flush=True)
        return 0
    print(f"exported to {folder} after {time.perf_counter() - started:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
