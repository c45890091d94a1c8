"""Denoising steps on one device, one after the other."""

from collections.abc import Sequence

from torch import Tensor

from ...graphs.models.liveavatar import ConditionCache, LiveAvatar
from ..systems.liveavatar import ImmediateDenoiser
from ..systems.liveavatar_mode import GenerationMode
from ..systems.liveavatar_step import BlockInputs, DenoisingStep, Observer


class SingleDevice(ImmediateDenoiser):
    """LiveAvatar's steps on the device of the model: what depends on the prompt, the audio or the condition is
    computed once and shared by all steps (liveavatar.md, 6.1).

    `context` [n, text_dim]: prompt rows; `grid`: latent (rows, columns); `steps`: which steps of the mode live here,
    None for all; `observe` sees every step's input and flow.
    """

    def __init__(
        self,
        dit: LiveAvatar,
        context: Tensor,
        mode: GenerationMode,
        grid: tuple[int, int],
        steps: Sequence[int] | None = None,
        observe: Observer | None = None,
    ):
        self.dit = dit
        self.text = dit.embed_text(context.to(device=dit.device, dtype=dit.dtype))
        indices = range(mode.steps) if steps is None else steps
        self.steps = [DenoisingStep(dit, mode, k, grid) for k in indices]
        self.observe = observe
        self.sink: ConditionCache | None = None

    def condition(self, reference: Tensor, motion: Tensor) -> None:
        """Replace the condition: reference latent [1, 16, 1, h, w], motion latents [1, 16, T, h, w]."""
        self.sink = self.dit.prefill(reference.to(self.dit.dtype), motion.to(self.dit.dtype), self.text)

    def denoise(self, x: Tensor, block: BlockInputs) -> Tensor:
        """Latents [1, 16, block latents, h, w] at the first step's noise level -> after the last step."""
        if self.sink is None:
            raise RuntimeError("there is no condition yet; call condition() before the first block")
        audio = self.dit.encode_audio(block.audio.to(self.dit.device))
        for step in self.steps:
            x = step(x, block, self.text, audio, self.sink, self.observe)
        return x
