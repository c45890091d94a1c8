"""Training clips made on the fly: speech -> motion -> drawn video, in batches on the training device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...graphs.models.speech_features import levelled_log_mel
from ...runtime.faces import HELD_OUT_SEED, Identity, Motion, motion_from_audio, render, rest_motion, sample_identities
from ...runtime.faces.render import draw_frames
from .recipe import Recipe

SAMPLES_PER_FRAME = 640  # 16 kHz sound, 25 fps video
LEAD_IN = 50  # frames of silence before a clip that starts a video: 2 s
SILENT_START = 3  # frames of silence that a video starts with (the runtime drops these frames)


@dataclass(frozen=True)
class ClipBatch:
    """Drawn clips with what a model is told about them.

    video [B, 3, preroll + T, S, S] in [-1, 1]; still [B, 3, 1, S, S] the picture; features [B, 2 T + context, mels]
    the levelled log-mel frames of the T clip frames with the front end's context; first [B] bool: the clip starts
    its video; motion: the curves of all frames.
    """

    video: Tensor
    still: Tensor
    features: Tensor
    first: Tensor
    motion: Motion


class ClipSource:
    """Draws random clips from a bank of speech [N, samples] (int16, 16 kHz)."""

    def __init__(self, bank: Tensor, recipe: Recipe, device: torch.device, seed: int, *, held_out: bool = False):
        frames = bank.shape[1] // SAMPLES_PER_FRAME
        needed = LEAD_IN + max(recipe.preroll + recipe.clip_frames, recipe.vae_frames)
        if frames < needed + 2:
            raise ValueError(f"utterances of {frames} video frames are too short: clips need {needed + 2}")
        self.bank = bank.to(device)
        self.recipe = recipe
        self.device = device
        self.first_seed = HELD_OUT_SEED if held_out else 0
        self.generator = torch.Generator().manual_seed(seed)
        self.draw = torch.compile(draw_frames, dynamic=False) if device.type == "cuda" else draw_frames

    def fork(self, seed: int) -> "ClipSource":
        """A source of other random clips of the same bank."""
        held_out = self.first_seed == HELD_OUT_SEED
        return ClipSource(self.bank, self.recipe, self.device, seed, held_out=held_out)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator).to(self.device)

    def _integers(self, low: int, high: int, count: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=self.generator)

    def identities(self, count: int) -> Identity:
        """Random identities of this source's side of the train / held-out split."""
        seeds = self._integers(self.first_seed, self.first_seed + HELD_OUT_SEED, count).tolist()
        return sample_identities(seeds).to(self.device)

    def _with_pauses(self, wave: Tensor) -> Tensor:
        """Silence one random stretch of up to 2 s in a third of the waves."""
        batch, samples = wave.shape
        start = self._uniform(batch, 1) * samples
        length = 16_000 * (0.3 + 1.7 * self._uniform(batch, 1)) * (self._uniform(batch, 1) < 0.35)
        at = torch.arange(samples, device=self.device)
        return wave * ~((at >= start) & (at < start + length))

    def sound(self, count: int, total: int) -> tuple[Tensor, Tensor]:
        """Waves [B, n] of `total` frames, the first `LEAD_IN` before a clip; which clips start a video [B] bool."""
        frames = self.bank.shape[1] // SAMPLES_PER_FRAME
        chosen = self._integers(0, len(self.bank), count).to(self.device)
        offset = self._integers(0, frames - total, count).to(self.device)
        at = offset[:, None] * SAMPLES_PER_FRAME + torch.arange(total * SAMPLES_PER_FRAME, device=self.device)
        wave = self.bank[chosen[:, None], at].float() / 32768.0
        wave = self._with_pauses(wave * 10.0 ** (0.9 * self._uniform(count, 1) - 0.7))  # -14 ... +4 dB
        first = self._uniform(count) < 0.35
        lead = (LEAD_IN + self.recipe.preroll + SILENT_START) * SAMPLES_PER_FRAME
        silent = first[:, None] & (torch.arange(wave.shape[1], device=self.device) < lead)
        return wave.masked_fill(silent, 0.0), first

    def videos(self, count: int, frames: int) -> Tensor:
        """`count` short clips [B, 3, frames, S, S], as the VAE is trained on."""
        wave, _ = self.sound(count, LEAD_IN + frames)
        return self.render(self.identities(count), motion_from_audio(wave)[:, LEAD_IN:])

    def crops(self, count: int, frames: int, side: int) -> Tensor:
        """`count` short clips [B, 3, frames, side, side], the same random window of each."""
        video = self.videos(count, frames)
        top, left = self._integers(0, self.recipe.size - side + 1, 2).tolist()
        return video[..., top : top + side, left : left + side].contiguous()

    def render(self, identity: Identity, motion: Motion) -> Tensor:
        """Video [B, 3, T, S, S] of the recipe's size."""
        return render(identity, motion, self.recipe.size, draw=self.draw)

    def clips(self, count: int, left_context: int, lookahead: int) -> ClipBatch:
        """`count` clips; the context counts 20 ms feature frames before and after the clip."""
        recipe = self.recipe
        wave, first = self.sound(count, LEAD_IN + recipe.preroll + recipe.clip_frames)
        motion = motion_from_audio(wave)[:, LEAD_IN:]
        noise = torch.randn(wave.shape, generator=self.generator).to(self.device)
        heard = wave + noise * 10.0 ** (-4.5 + 1.5 * self._uniform(count, 1)) * (self._uniform(count, 1) < 0.4)
        features, _ = levelled_log_mel(heard)  # [B, T50, mels]
        low = 2 * (LEAD_IN + recipe.preroll) - left_context
        high = wave.shape[1] // 320 + lookahead
        missing = high - features.shape[1]
        if missing > 0:
            features = torch.cat((features, features.new_full((count, missing, features.shape[2]), -1.0)), 1)
        identity = self.identities(count)
        still = render(identity, rest_motion(count, 1, self.device), recipe.size)  # one shape less to compile
        return ClipBatch(self.render(identity, motion), still, features[:, low:high], first, motion)
