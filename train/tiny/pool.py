"""A ring of encoded clips on the training device: each drawn clip serves several steps, and old ones make room."""

import torch
from torch import Tensor

from ...graphs.models.wan_vae import BF16, WanVae
from .clips import ClipSource
from .recipe import Recipe
from .vae_stage import channels_last


def fast_copy(vae: WanVae) -> WanVae:
    """The VAE to encode training clips with: bf16 and channels last on a GPU, as it is on a CPU."""
    if vae.conv1.weight.device.type != "cuda":
        return vae
    copy = WanVae(vae.config).to(vae.conv1.weight.device)
    copy.load_state_dict(vae.state_dict())
    return channels_last(copy.set_precision(BF16)).eval().requires_grad_(False)


class LatentPool:
    """Encoded clips: latents [N, 16, F, h, w], reference [N, 16, 1, h, w], motion [N, 16, M, h, w], features, first."""

    def __init__(self, source: ClipSource, vae: WanVae, recipe: Recipe, left_context: int, lookahead: int):
        self.source, self.vae, self.recipe = source, vae, recipe
        self.context = (left_context, lookahead)
        self.fields: dict[str, Tensor] = {}
        self.filled = 0
        self.next = 0

    @torch.no_grad()
    def encode(self, count: int) -> dict[str, Tensor]:
        """`count` fresh clips, encoded as the runtime does: the still picture, its second latent as the reference."""
        batch = self.source.clips(count, *self.context)
        frames = self.recipe.clip_frames // 4
        motion = self.vae.encode(batch.still.expand(-1, -1, self.recipe.still, -1, -1)).half()
        return {
            "latents": self.vae.encode(batch.video)[:, :, -frames:].half(),
            "reference": motion[:, :, 1:2],
            "motion": motion,
            "features": batch.features.half(),
            "first": batch.first,
        }

    def refill(self, count: int) -> None:
        """Put `count` new clips over the oldest."""
        fresh = self.encode(count)
        size = self.recipe.pool
        if not self.fields:
            self.fields = {name: value.new_zeros(size, *value.shape[1:]) for name, value in fresh.items()}
        at = torch.arange(self.next, self.next + count, device=self.fields["first"].device) % size
        for name, value in fresh.items():
            self.fields[name][at] = value
        self.next = (self.next + count) % size
        self.filled = min(size, self.filled + count)

    def draw(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """A random batch, floats in float32."""
        chosen = torch.randint(0, self.filled, (count,), generator=generator).to(self.fields["first"].device)
        batch = {name: value[chosen] for name, value in self.fields.items()}
        return {name: value.float() if value.is_floating_point() else value for name, value in batch.items()}
