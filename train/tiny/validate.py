"""Held-out clips, generated in few steps as the runtime does: how well mouth, picture and latents are met."""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ...graphs.models.wan_vae import WanVae
from ...runtime.faces import mouth_opening
from .clips import ClipBatch, ClipSource
from .dit_stage import STEPS, Place, TinySystem, roll_out
from .vae_stage import psnr


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson correlation of two curves, 0 when one is constant."""
    a, b = a - a.mean(), b - b.mean()
    scale = a.norm() * b.norm()
    return float((a * b).sum() / scale) if scale > 0 else 0.0


@dataclass
class Validation:
    """Fixed held-out clips with their encoding; call it with a system to get values for the training curve."""

    clips: ClipBatch
    encoded: dict[str, Tensor]
    vae: WanVae
    pictures: Path
    vae_psnr: float  # of encoding and decoding alone: what the transformer can reach at best

    @classmethod
    def prepare(cls, source: ClipSource, vae: WanVae, count: int, context: tuple[int, int], out: Path) -> "Validation":
        clips = source.clips(count, *context)
        frames = source.recipe.clip_frames // 4
        with torch.no_grad():
            motion = vae.encode(clips.still.expand(-1, -1, source.recipe.still, -1, -1))
            encoded = {
                "latents": vae.encode(clips.video),
                "reference": motion[:, :, 1:2],
                "motion": motion,
                "features": clips.features,
                "first": clips.first,
            }
            vae_psnr = float(psnr(vae.decode(encoded["latents"]), clips.video))
        encoded["warm"] = encoded["latents"][:, :, :-frames]
        encoded["latents"] = encoded["latents"][:, :, -frames:]
        return cls(clips, encoded, vae, out, vae_psnr)

    @torch.no_grad()
    def __call__(self, system: TinySystem, sigmas: Tensor) -> dict[str, float]:
        frames = 4 * self.encoded["latents"].shape[2]
        place = Place.draw(self.encoded["first"], torch.Generator().manual_seed(1))
        latents = roll_out(system, self.encoded, place, sigmas, STEPS)
        decoded = self.vae.decode(torch.cat((self.encoded["warm"], latents), 2))[:, :, -frames:]
        wanted = self.clips.video[:, :, -frames:]
        opening = torch.stack([mouth_opening(v) for v in decoded])
        drawn = self.clips.motion.openness[:, -frames:]
        self.save_pictures(decoded, wanted)
        return {
            "latent_mse": float((latents - self.encoded["latents"]).square().mean()),
            "psnr": float(psnr(decoded, wanted)),
            "vae_psnr": self.vae_psnr,
            "mouth_correlation": correlation(opening.flatten(), drawn.flatten()),
        }

    def save_pictures(self, decoded: Tensor, wanted: Tensor, rows: int = 4, columns: int = 8) -> None:
        """Generated above drawn, `columns` frames of `rows` clips."""
        at = torch.linspace(0, decoded.shape[2] - 1, columns).long()
        strips = [
            video[row][:, at].permute(2, 1, 3, 0).flatten(1, 2)  # [H, columns * W, 3]
            for row in range(min(rows, len(decoded)))
            for video in (decoded, wanted)
        ]
        sheet = torch.cat(strips)
        pixels = ((sheet + 1.0) * 127.5).round().clamp(0, 255).byte()
        Image.fromarray(pixels.cpu().numpy()).save(self.pictures)
