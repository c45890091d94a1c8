"""`python -m kinora.bench.speech`: a live session's speech features, launch by launch and from CUDA graphs.

wav2vec 2.0 large with random weights. Milliseconds of a step by the wall clock, from sound to features on the host, for
every length of the growing window (the last one is what all later steps encode); the relative L2 difference of the two;
what recording took, in seconds and memory. Without a GPU both ways are the same calls, and take
minutes.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..graphs.capture import shared_pool
from ..runtime.encoders.live_audio import LiveAudioFeatures
from ..runtime.encoders.wav2vec import SAMPLE_RATE
from ..runtime.systems.encoder_front_ends import Wav2Vec2Speech, live_window
from ..runtime.systems.liveavatar_mode import STREAM, GenerationMode
from .harness.check import relative_l2
from .models import DTYPES, DrawnSpeech
from .stream import voice

REPEATS = 7  # whole sounds, the first of which is not timed


@dataclass(frozen=True)
class Step:
    """One step: seconds of sound that it encodes, of time launch by launch and from graphs, and their difference."""

    window: float
    eager: float
    captured: float
    error: float


def measure(speech: Wav2Vec2Speech, mode: GenerationMode, tell: Callable[[str], None] = print) -> list[Step]:
    """The steps of `mode` until the window is full; tells what recording took."""
    device = speech.encoder.model.feature_extractor.conv_layers[0].conv.weight.device
    captured = speech.captured(shared_pool(device), nullcontext())
    free, started = _free(device), time.perf_counter()
    captured(mode)
    tell(f"recorded in {time.perf_counter() - started:.1f} s, {(free - _free(device)) / 1e6:.0f} MB")
    launched, wanted = _steps(speech, mode)
    replayed, made = _steps(captured, mode)
    windows = [samples / SAMPLE_RATE for samples in live_window(mode).lengths]
    errors = map(relative_l2, made, wanted)
    return [Step(*values) for values in zip(windows, launched, replayed, errors, strict=True)]


def _steps(
    front_end: Callable[[GenerationMode], LiveAudioFeatures], mode: GenerationMode
) -> tuple[list[float], list[Tensor]]:
    """Median seconds and features of each step."""
    window = live_window(mode)
    steps = len(window.lengths)
    sound = torch.from_numpy(voice(window.lookahead + steps * window.hop, seed=0))
    pieces = (sound[: window.lookahead + window.hop], *sound[window.lookahead + window.hop :].split(window.hop))
    seconds: list[list[float]] = [[] for _ in pieces]
    made: list[Tensor] = []
    for repeat in range(REPEATS):
        features, made = front_end(mode), []
        for piece, taken in zip(pieces, seconds, strict=True):
            started = time.perf_counter()
            made.append(features.push(piece))
            if repeat:
                taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in seconds], made


def _free(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kinora.bench.speech", description=__doc__.split("\n\n")[0])
    parser.add_argument("--precision", choices=("float32", "bf16"), default="bf16")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.inference_mode():
        steps = measure(DrawnSpeech(DTYPES[args.precision], device).front_end, STREAM)
    print("window s  launched ms  graphs ms  rel. L2")
    for step in steps:
        print(f"{step.window:8.2f} {step.eager * 1e3:12.2f} {step.captured * 1e3:10.2f} {step.error:8.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
