"""Time-step pipeline: one denoising step per rank, latents handed from rank to rank (liveavatar.md, 5.1).

Here the ranks run one after the other in one process, each with its own text, audio and condition state, as each
has on its own device. The result is that of `SingleDevice`, exactly in float32.
"""

from torch import Tensor

from ...graphs.models.liveavatar import LiveAvatar
from ..systems.liveavatar import ImmediateDenoiser
from ..systems.liveavatar_mode import GenerationMode
from ..systems.liveavatar_step import BlockInputs, Observer
from .single import SingleDevice


class SequentialPipeline(ImmediateDenoiser):
    """The denoising ranks in rank order, with the interface of `SingleDevice`; `ranks[k]` owns step k."""

    def __init__(
        self,
        dit: LiveAvatar,
        context: Tensor,
        mode: GenerationMode,
        grid: tuple[int, int],
        observe: Observer | None = None,
    ):
        self.ranks = [SingleDevice(dit, context, mode, grid, [k], observe) for k in range(mode.steps)]

    def condition(self, reference: Tensor, motion: Tensor) -> None:
        """What the decoding rank broadcasts: every rank prefills its own condition cache."""
        for rank in self.ranks:
            rank.condition(reference, motion)

    def denoise(self, x: Tensor, block: BlockInputs) -> Tensor:
        """Noise [1, 16, block latents, h, w] enters rank 0; the latents that the decoding rank receives."""
        for rank in self.ranks:
            x = rank.denoise(x, block)
        return x
