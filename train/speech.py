"""A corpus of synthetic speech: many voices, languages and texts, spoken by espeak-ng.

The program is found as `espeak-ng` on the PATH or through the environment: `ESPEAK_BINARY` (the program) and
`ESPEAK_DATA_PATH` (the folder that holds `espeak-ng-data`). `train/fetch_espeak.sh FOLDER` makes a folder that
carries both to a machine without network.

Training and test share no voice (variants of the synthesiser are split) and no text (`speech_texts.text_split`).
"""

import math
import os
import random
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from xml.sax.saxutils import escape

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .speech_texts import LANGUAGES, sentences

SAMPLE_RATE = 16_000
ESPEAK_RATE = 22_050
SPLITS = ("train", "test")
VARIANTS = {
    "train": (
        "m1", "m2", "m3", "m5", "m7", "f1", "f2", "f4", "Alex", "Andy", "Annie", "Denis", "Diogo", "Gene", "Henrique",
        "Hugo", "Jacky", "Lee", "Marco", "Michael", "Mike", "pablo", "paul", "pedro", "quincy", "rob", "robert",
        "steph", "steph2", "Storm", "belinda", "benjamin", "boris", "caleb", "david", "edward", "iven", "iven2", "john",
        "kaukovalta", "klatt", "klatt2", "klatt4", "linda", "marcelo", "max", "miguel", "sandro", "shelby", "travis",
        "zac", "aunty", "grandma", "croak", "whisper",
    ),
    "test": (
        "m4", "m6", "m8", "f3", "f5", "Alicia", "Andrea", "gustave", "Nguyen", "Mr serious", "adam", "antonio", "ed",
        "iven3", "iven4", "klatt3", "Mario", "michel", "victor", "anika", "grandpa", "whisperf",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Voice:
    """How espeak-ng speaks: `name` such as `en-us+f3`, pitch 0 ... 99, speed in words a minute."""

    name: str
    pitch: int = 50
    speed: int = 165


def espeak_binary() -> str:
    """The program to run: `ESPEAK_BINARY` or `espeak-ng` on the PATH."""
    binary = os.environ.get("ESPEAK_BINARY") or shutil.which("espeak-ng")
    if not binary or not shutil.which(binary):
        raise FileNotFoundError(
            f"speech is made by espeak-ng, which was not found ({binary or 'not on the PATH'}): install Debian's "
            "package espeak-ng, or run train/fetch_espeak.sh FOLDER and set ESPEAK_BINARY=FOLDER/bin/espeak-ng"
        )
    return binary


def speak(ssml: str, voice: Voice) -> np.ndarray:
    """SSML text -> int16 samples at 22.05 kHz."""
    command = [espeak_binary(), "-v", voice.name, "-p", str(voice.pitch), "-s", str(voice.speed)]
    command += ["-m", "-b", "1", "--stdin", "--stdout"]
    done = subprocess.run(command, input=f"<speak>{ssml}</speak>".encode(), capture_output=True)
    start = done.stdout.find(b"data")
    if done.returncode or start < 0:
        raise RuntimeError(f"espeak-ng failed for voice {voice.name}: {done.stderr.decode(errors='replace').strip()}")
    sound = done.stdout[start + 8 :]
    return np.frombuffer(sound[: len(sound) // 2 * 2], dtype="<i2")


@lru_cache(maxsize=4)
def _resampling_filters(up: int, down: int, zeros: int = 24) -> Tensor:
    """Windowed-sinc filters [up, 1, taps], one for each phase of the output within `down` input samples."""
    cutoff = min(1.0, up / down) * 0.96
    reach = math.ceil(zeros / cutoff)
    taps = torch.arange(-reach, down + reach, dtype=torch.float64)
    offset = taps[None] - (torch.arange(up, dtype=torch.float64) * (down / up))[:, None]
    window = torch.cos(math.pi * 0.5 * (offset / reach).clamp(-1.0, 1.0)).square()
    return (cutoff * torch.sinc(cutoff * offset) * window).float()[:, None]


def resample(wave: Tensor, rate_in: int, rate_out: int) -> Tensor:
    """Band-limited rate change: [B, n] float32 -> [B, floor(n * rate_out / rate_in)]."""
    common = math.gcd(rate_in, rate_out)
    up, down = rate_out // common, rate_in // common
    filters = _resampling_filters(up, down).to(wave.device)
    reach = (filters.shape[-1] - down) // 2
    wanted = wave.shape[-1] * up // down
    padded = F.pad(wave, (reach, reach + down))
    phases = F.conv1d(padded[:, None], filters, stride=down)  # [B, up, n / down + 1]
    return phases.transpose(1, 2).flatten(1)[:, :wanted]


def sample_voice(split: str, rng: random.Random) -> tuple[str, Voice]:
    """A random language and a voice of the split."""
    language = rng.choice(("en", "en", *LANGUAGES))
    name = f"{rng.choice(LANGUAGES[language].voices)}+{rng.choice(VARIANTS[split])}"
    voice = Voice(name, rng.randrange(20, 85), rng.randrange(125, 215))
    return language, voice


def _clip(index: int, samples: int, seed: int, split: str) -> np.ndarray:
    """One clip of `samples` at 22.05 kHz: silence, sentences with pauses between them; whispering made audible."""
    rng = random.Random(f"{seed}/{split}/{index}")
    language, voice = sample_voice(split, rng)
    draw = sentences(language, split, rng)
    pieces = [np.zeros(int(rng.uniform(0.0, 0.6) * ESPEAK_RATE), dtype=np.int16)]
    length = len(pieces[0])
    while length < samples:
        count = 1 + int((samples - length) / ESPEAK_RATE / 3.2)
        parts = []
        for _ in range(count):
            pause = int(rng.uniform(50, 350) if rng.random() < 0.6 else rng.uniform(400, 1300))
            parts.append(f'{escape(draw())}<break time="{pause}ms"/>')
        piece = speak(" ".join(parts), voice)
        if not piece.any():
            raise RuntimeError(f"espeak-ng said nothing as {voice.name}; is its data folder complete?")
        pieces.append(piece)
        length += len(piece)
    return np.concatenate(pieces)[:samples]


def synthesise(clips: int, seconds: float, seed: int = 0, split: str = "train", workers: int | None = None) -> Tensor:
    """Speech of one split: int16 [clips, seconds * 16000] at 16 kHz, one voice and language a clip.

    The same arguments give the same sound. `workers` espeak-ng processes run at a time (default: one a core).
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    if clips < 1 or seconds <= 0:
        raise ValueError(f"need at least one clip of positive length, got {clips} of {seconds} s")
    espeak_binary()
    samples = round(seconds * SAMPLE_RATE)
    needed = -(-samples * ESPEAK_RATE // SAMPLE_RATE) + 1
    out = torch.empty(clips, samples, dtype=torch.int16)
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:  # the work is in the processes that the threads await
        waves = pool.map(lambda index: _clip(index, needed, seed, split), range(clips))
        for index, wave in enumerate(waves):
            slow = resample(torch.from_numpy(wave.astype(np.float32))[None], ESPEAK_RATE, SAMPLE_RATE)[0, :samples]
            out[index] = slow.round().clamp(-32768, 32767).short()
    return out
