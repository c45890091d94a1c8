"""How good is the embedded `tiny` model: lip motion, identity over a minute, silence.

`python -m kinora.bench.tiny --out docs/tiny` generates talking videos for voices, texts and identities that training
never saw and measures, from pixels alone:

(a) mouth: correlation of the mouth opening with the renderer's own opening for the same sound (and for other
    sounds, as a control), and the lag at which the correlation is best;
(b) identity: PSNR of the region that never moves against the picture, along 60 s, and its drift from second 5;
(c) silence: the opening while nothing is said.

It writes `tiny.json`, a contact sheet and the opening curves. Needs espeak-ng (the held-out voices).
"""

import argparse
import json
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..runtime import Avatar, load
from ..runtime.faces import (
    HELD_OUT_SEED,
    draw_portrait,
    motion_from_audio,
    mouth_opening,
    sample_identities,
    static_region_mask,
)
from ..train.speech import synthesise

RATE = 16_000
FPS = 25
MAX_LAG = 6  # frames searched on both sides

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Clip:
    """One generated clip: the sound, the frames [T, H, W, 3] uint8, and both opening curves [T]."""

    seed: int
    wave: NDArray[np.float32]
    frames: NDArray[np.uint8]
    opening: Floats
    wanted: Floats


def correlation(a: Floats, b: Floats) -> float:
    """Pearson correlation; 0 when either curve is constant."""
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum() / scale) if scale > 0 else 0.0


def best_lag(opening: Floats, wanted: Floats) -> int:
    """Frames by which the mouth is late (positive) where the correlation is best."""
    lags = range(-MAX_LAG, MAX_LAG + 1)
    inner = slice(MAX_LAG, len(wanted) - MAX_LAG)
    return max(lags, key=lambda lag: correlation(np.roll(opening, -lag)[inner], wanted[inner]))


def as_video(frames: NDArray[np.uint8]) -> Tensor:
    """[T, H, W, 3] uint8 -> [3, T, H, W] in [-1, 1]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1.0


def side_of(avatar: Avatar) -> int:
    """Pixels a side of the square videos that the model makes."""
    if avatar.size is None:
        raise ValueError(f"{avatar.name} has no size of its own; this measurement is for the drawn world's models")
    return avatar.size


def generate_clip(avatar: Avatar, seed: int, wave: NDArray[np.float32]) -> Clip:
    picture = draw_portrait(seed, side_of(avatar))
    frames = avatar.generate(picture, wave, seed=seed).frames
    wanted = motion_from_audio(torch.from_numpy(wave)).openness[0].numpy().astype(np.float64)
    opening = mouth_opening(as_video(frames)).numpy().astype(np.float64)
    count = min(len(opening), len(wanted))
    return Clip(seed, wave, frames[:count], opening[:count], wanted[:count])


def mouth_report(clips: list[Clip]) -> dict[str, Any]:
    own = [correlation(c.opening, c.wanted) for c in clips]
    others = [
        correlation(c.opening[:n], o.wanted[:n])
        for i, c in enumerate(clips)
        for o in [clips[(i + 1) % len(clips)]]
        for n in [min(len(c.opening), len(o.wanted))]
    ]
    lags = [best_lag(c.opening, c.wanted) for c in clips]
    return {
        "correlation_mean": float(np.mean(own)),
        "correlation_min": float(np.min(own)),
        "correlation": own,
        "shuffled_mean": float(np.mean(others)),
        "shuffled": others,
        "best_lag_frames": lags,
    }


def identity_report(avatar: Avatar, seed: int, wave: NDArray[np.float32]) -> tuple[dict[str, Any], list[Image.Image]]:
    """PSNR in dB of the static region against the picture, second by second, streamed with flat memory."""
    side = side_of(avatar)
    picture = draw_portrait(seed, side)
    mask = static_region_mask(sample_identities([seed]), side)[0].numpy()
    still = np.asarray(picture, dtype=np.float64)[mask]
    by_second: list[float] = []
    shots: list[Image.Image] = []
    pending = np.zeros((0, side, side, 3), np.uint8)
    with avatar.stream(picture, seed=seed) as session:
        for start in range(0, len(wave), RATE):
            pending = np.concatenate((pending, session.feed(wave[start : start + RATE])))
            while len(pending) >= FPS:
                second, pending = pending[:FPS], pending[FPS:]
                error = np.mean((second[:, mask].astype(np.float64) - still) ** 2)
                if len(by_second) % 10 == 0:
                    shots.append(Image.fromarray(second[FPS // 2]))
                by_second.append(float(10 * np.log10(255.0**2 / error)))
    last = by_second[-1]
    return {
        "psnr_db_at_5s": by_second[5],
        "psnr_db_at_end": last,
        "psnr_db_min": min(by_second),
        "seconds": len(by_second),
        "drift_db": by_second[5] - last,
        "static_share_of_picture": float(mask.mean()),
        "psnr_db_by_second": by_second,
    }, shots


def silence_report(avatar: Avatar, seeds: list[int]) -> dict[str, Any]:
    """Largest opening over 4 s of silence, as a share of what the same measure reads on an open mouth."""
    quiet = np.zeros(4 * RATE, np.float32)
    openings = [float(generate_clip(avatar, seed, quiet).opening.max()) for seed in seeds]
    return {"opening_max": max(openings), "opening": openings}


def contact_sheet(clips: list[Clip], columns: int = 10, every: int = 5) -> Image.Image:
    """One row a clip, `columns` frames `every` frames apart from second 2 on."""
    side = clips[0].frames.shape[1]
    sheet = Image.new("RGB", (columns * side, len(clips) * side))
    for row, clip in enumerate(clips):
        for column in range(columns):
            index = min(2 * FPS + column * every, len(clip.frames) - 1)
            sheet.paste(Image.fromarray(clip.frames[index]), (column * side, row * side))
    return sheet


def plot_openings(clips: list[Clip], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(min(4, len(clips)), 1, figsize=(10, 7), sharex=True)
    for axis, clip in zip(np.atleast_1d(axes), clips, strict=False):
        seconds = np.arange(len(clip.wanted)) / FPS
        axis.plot(seconds, clip.wanted / max(clip.wanted.max(), 1e-6), label="renderer's opening for this sound")
        axis.plot(
            seconds, clip.opening / max(clip.opening.max(), 1e-6), label="opening measured in the generated video"
        )
        axis.set_ylabel(f"r = {correlation(clip.opening, clip.wanted):.2f}")
    np.atleast_1d(axes)[0].legend(loc="upper right", fontsize=8)
    np.atleast_1d(axes)[-1].set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kinora.bench.tiny", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for tiny.json and the pictures")
    parser.add_argument("--model", default="tiny", help="model name or the folder of a trained tiny model")
    parser.add_argument("--precision", default="auto", help="of `load`: float32, bfloat16 or fp8")
    parser.add_argument("--placement", default="auto", help="of `load`: single, or captured, which also has FP8 caches")
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each clip")
    parser.add_argument("--long-seconds", type=int, default=62, help="length of the identity run")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    avatar = load(args.model, precision=args.precision, placement=args.placement)
    bank = synthesise(args.clips, args.seconds, seed=7, split="test").numpy().astype(np.float32) / 32768.0
    seeds = [HELD_OUT_SEED + 1000 + i for i in range(args.clips)]
    clips = [generate_clip(avatar, seed, wave) for seed, wave in zip(seeds, bank, strict=True)]
    long_wave = np.resize(bank.reshape(-1), args.long_seconds * RATE)
    identity, shots = identity_report(avatar, seeds[0], long_wave)
    open_mouth = float(np.median([np.percentile(c.opening, 95) for c in clips]))
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m kinora.bench.tiny " + " ".join(argv if argv is not None else sys.argv[1:]),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "clips": args.clips,
        "seconds_each": args.seconds,
        "mouth": mouth_report(clips),
        "identity": identity,
        "silence": silence_report(avatar, seeds[:3]),
        "open_mouth_opening_p95": open_mouth,
        "wall_seconds": round(time.perf_counter() - started, 1),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "tiny.json").write_text(json.dumps(report, indent=1) + "\n")
    contact_sheet(clips[:6]).save(args.out / "contact-sheet.png", optimize=True)
    row = Image.new("RGB", (sum(s.width for s in shots), shots[0].height))
    for i, shot in enumerate(shots):
        row.paste(shot, (i * shot.width, 0))
    row.save(args.out / "one-minute.png", optimize=True)
    plot_openings(clips, args.out / "openings.png")
    mouth = report["mouth"]
    print(f"mouth correlation {mouth['correlation_mean']:.3f} (min {mouth['correlation_min']:.3f}), ", end="")
    print(f"shuffled {mouth['shuffled_mean']:.3f}, lags {mouth['best_lag_frames']}")
    print(
        f"identity {identity['psnr_db_at_5s']:.1f} dB at 5 s, {identity['psnr_db_at_end']:.1f} dB at the end, ", end=""
    )
    print(f"drift {identity['drift_db']:.2f} dB")
    print(f"silence: opening up to {report['silence']['opening_max']:.3f}; open mouths read {open_mouth:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
