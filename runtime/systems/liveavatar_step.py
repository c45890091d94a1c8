"""One denoising step of LiveAvatar with its own rolling cache (liveavatar.md, 2.6 and 3.4).

Step k of a block reads only what step k of earlier blocks wrote: the history stands at the same noise level. So a step
is the unit of placement: all of them on one device, or one per device.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from ...graphs.models.liveavatar import AudioState, ConditionCache, LiveAvatar, RollingCache, TextState, ref_shift
from ..samplers import euler_step
from .liveavatar_mode import GenerationMode

Observer = Callable[[int, int, Tensor, Tensor], None]  # block, step, latents before, flow


@dataclass(frozen=True)
class BlockInputs:
    """What a block needs beside its noise; A actors.

    `index`: number of the block since the start of the video; `audio` [A, K, C, frames]: features of its window;
    `distances`: R of every step; `pose` [1, 16, block latents, h, w]; `actor_mask` [A, 12, h/2, w/2, 1].
    """

    index: int
    audio: Tensor
    distances: tuple[int, ...]
    pose: Tensor | None = None
    actor_mask: Tensor | None = None


class DenoisingStep:
    """Step `index` of the mode's schedule: its time embedding, computed once, and its rolling cache.

    `grid` is (latent rows, latent columns).
    """

    def __init__(self, dit: LiveAvatar, mode: GenerationMode, index: int, grid: tuple[int, int]):
        schedule = mode.schedule()
        self.dit = dit
        self.index = index
        self.sigma, self.sigma_next = schedule.sigmas[index], schedule.sigmas[index + 1]
        self.time = dit.embed_time(schedule.timesteps[index].float().reshape(1, 1).to(dit.device))
        tokens = (grid[0] // 2) * (grid[1] // 2)
        window = replace(dit.config, cache_frames=mode.cache_latents or dit.config.cache_frames)
        self.cache = RollingCache.allocate(window, tokens, dtype=dit.dtype, device=dit.device)

    def __call__(
        self,
        x: Tensor,
        block: BlockInputs,
        text: TextState,
        audio: AudioState,
        condition: ConditionCache,
        observe: Observer | None = None,
    ) -> Tensor:
        """Latents [1, 16, block latents, h, w] at this step's noise level -> at the next one's."""
        frame = block.index * x.shape[2]
        flow = self.dit.forward_block(
            x,
            self.time,
            text,
            audio,
            condition,
            self.cache,
            frame,
            ref_shift(frame, block.distances[self.index]),
            cond_states=block.pose,
            actor_mask=block.actor_mask,
        )
        if observe:
            observe(block.index, self.index, x, flow)
        return euler_step(x, flow, self.sigma, self.sigma_next)
