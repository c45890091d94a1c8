"""The models that are measured: LiveAvatar 14B at its published size with random weights, `tiny`, or a trained folder.

Random weights are PyTorch's own start values, drawn on the device: every linear layer then shrinks its input a little,
the norms restore it, and activations stay finite through 40 layers.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from ..graphs.capture import Pool
from ..graphs.models.liveavatar import LIVEAVATAR_14B, LiveAvatar, LiveAvatarConfig
from ..graphs.models.wan_vae import BF16_AUTOCAST, FLOAT32, WAN21_VAE, WanVae
from ..graphs.quantize import quantize_linears
from ..runtime import load
from ..runtime.compile import PUBLISHED, PUBLISHED_SIZE
from ..runtime.encoders.live_audio import LiveAudioFeatures
from ..runtime.encoders.wav2vec import WAV2VEC2_LARGE_XLSR, Wav2Vec2Encoder
from ..runtime.errors import InputError
from ..runtime.systems.encoder_front_ends import CapturedWav2Vec2Speech, Wav2Vec2Speech
from ..runtime.systems.liveavatar import LiveAvatarSystem
from ..runtime.systems.liveavatar_mode import STREAM, GenerationMode

Precision = Literal["float32", "bf16", "fp8"]
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
PUBLISHED_MEMORY_GB = 40  # of the transformer in bf16 with one rolling cache


M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class ModelChoice:
    """Which model, how precise, where: `size` (height, width) in pixels, None for the model's own; `config` of random
    weights."""

    name: str
    precision: Precision
    device: torch.device
    size: tuple[int, int] | None = None
    config: LiveAvatarConfig = LIVEAVATAR_14B

    def __post_init__(self) -> None:
        if self.name == PUBLISHED and self.device.type != "cuda":
            raise InputError(
                f"{PUBLISHED} takes a GPU with more than {PUBLISHED_MEMORY_GB} GB; measure --model tiny on this machine"
            )
        if self.size and any(side % 16 or side <= 0 for side in self.size):
            height, width = self.size
            raise InputError(f"a video cannot be {width}x{height}; both sides must be positive multiples of 16")

    @property
    def dtype(self) -> torch.dtype:
        """Of what is not quantised."""
        return DTYPES[self.precision]

    def build(self) -> LiveAvatarSystem:
        """The whole system in `dtype`; linear layers are not quantised yet (`quantize`)."""
        if self.name != PUBLISHED:
            kept = "float32" if self.precision == "float32" else "bfloat16"
            return load(self.name, precision=kept, device=str(self.device)).system
        with drawn(self.dtype, self.device):
            dit = inference(LiveAvatar(self.config))
        prompt = torch.randn(dit.config.text_len, dit.config.text_dim, device=self.device, dtype=self.dtype)

        speech = DrawnSpeech(self.dtype, self.device)
        return LiveAvatarSystem(dit, self._published_vae(), STREAM, lambda words: prompt, speech, size=PUBLISHED_SIZE)

    def build_vae(self) -> tuple[WanVae, tuple[int, int]]:
        """The VAE alone, and (height, width) of the videos; it has no FP8 form."""
        if self.name == PUBLISHED:
            return self._published_vae(), self.size or PUBLISHED_SIZE
        system = self.build()
        return system.vae, self.video_size(system)

    def _published_vae(self) -> WanVae:
        with drawn(torch.float32, self.device):  # float32 first: it is small, and `set_precision` casts it
            return inference(WanVae(WAN21_VAE, FLOAT32 if self.dtype == torch.float32 else BF16_AUTOCAST))

    def video_size(self, system: LiveAvatarSystem) -> tuple[int, int]:
        """(height, width) in pixels: as chosen, or else the model's own."""
        return self.size or system.size or PUBLISHED_SIZE

    def quantize(self, dit: LiveAvatar) -> None:
        """Swap the linear layers for FP8 ones, one scale a row, if that is the precision."""
        if self.precision == "fp8":
            quantize_linears(dit, granularity="row")


@dataclass(frozen=True)
class DrawnSpeech:
    """The published wav2vec 2.0 with random weights, made when it is first wanted: most benchmarks do without it."""

    dtype: torch.dtype
    device: torch.device

    @cached_property
    def front_end(self) -> Wav2Vec2Speech:
        with drawn(self.dtype, self.device):
            encoder = Wav2Vec2Encoder(WAV2VEC2_LARGE_XLSR)
        return Wav2Vec2Speech(encoder.to(self.device))  # one of its tensors ignores `drawn`

    def __call__(self, mode: GenerationMode) -> LiveAudioFeatures:
        return self.front_end(mode)

    def captured(self, memory: Pool | None, turn: AbstractContextManager[object]) -> CapturedWav2Vec2Speech:
        return self.front_end.captured(memory, turn)


def inference(model: M) -> M:
    """Ready to run: no dropout, no gradients."""
    return model.eval().requires_grad_(False)


@contextmanager
def drawn(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Modules made inside have start values in `dtype`, drawn on `device` from a fixed seed."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    found: list[Tensor] = [*model.parameters(), *model.buffers()]
    return sum(t.nbytes for t in found)
