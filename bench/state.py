"""A stream in its steady state: random inputs of real shape, and rolling caches that earlier blocks have filled."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ..graphs.models.liveavatar import AudioState, LiveAvatar, ref_shift
from ..graphs.models.liveavatar_cache import KeyValue
from ..runtime.placement.single import SingleDevice
from ..runtime.systems.liveavatar import Denoiser, LiveAvatarSystem
from ..runtime.systems.liveavatar_mode import GenerationMode
from ..runtime.systems.liveavatar_step import BlockInputs

D = TypeVar("D", bound=Denoiser)
T = TypeVar("T")
INPUTS = 2  # noises that calls rotate over; the weights alone are many L2 caches
DISTANCE = 10  # R: frames by which the reference stays ahead
SEED = 1


@dataclass(frozen=True)
class BlockCase:
    """A system at a video size: what one block of its stream needs.

    `grid` latent (rows, columns); `prompt` [n, text_dim]; `reference` [1, C, 1, h, w] and `motion` [1, C, T, h, w]
    latents; `noises` [1, C, 3, h, w]; `audio` features [1, K, C, frames].
    """

    dit: LiveAvatar
    mode: GenerationMode
    grid: tuple[int, int]
    prompt: Tensor
    reference: Tensor
    motion: Tensor
    noises: tuple[Tensor, ...]
    audio: Tensor

    @classmethod
    def random(cls, dit: LiveAvatar, mode: GenerationMode, grid: tuple[int, int]) -> "BlockCase":
        """On the device and in the dtype of `dit`, with as many motion latents as a stream of `mode` has.

        The values are the same every time, so that a model that is built again sees the same block.
        """
        config, device, dtype = dit.config, dit.device, dit.dtype
        torch.manual_seed(SEED)

        def latents(frames: int) -> Tensor:
            return torch.randn(1, config.in_dim, frames, *grid, device=device, dtype=dtype)

        motion = 1 + (mode.motion_frames - 1) // mode.frames_per_latent
        prompt = torch.randn(config.text_len, config.text_dim, device=device, dtype=dtype)
        audio = torch.randn(1, config.audio_layers, config.audio_dim, mode.block_frames, device=device, dtype=dtype)
        noises = tuple(latents(mode.block_latents) for _ in range(INPUTS))
        return cls(dit, mode, grid, prompt, latents(1), latents(motion), noises, audio)

    @classmethod
    def of(cls, system: LiveAvatarSystem, size: tuple[int, int]) -> "BlockCase":
        """At `size` (height, width) in pixels."""
        factor = system.vae.config.spatial_factor
        return cls.random(system.dit, system.mode, (size[0] // factor, size[1] // factor))

    @property
    def tokens(self) -> int:
        """Video tokens of a block."""
        return self.mode.block_latents * (self.grid[0] // 2) * (self.grid[1] // 2)

    @property
    def index(self) -> int:
        """A block that finds the rolling cache full."""
        return (self.mode.cache_latents or self.dit.config.cache_frames) // self.mode.block_latents

    def inputs(self, index: int) -> BlockInputs:
        return BlockInputs(index, self.audio, (DISTANCE,) * self.mode.steps)

    def open(self, denoiser: D, filled: bool = True) -> D:
        """Give a denoiser its condition and, if `filled`, run the blocks that fill its rolling caches."""
        denoiser.condition(self.reference, self.motion)
        for index in range(self.index if filled else 0):
            denoiser.denoise(self.noises[index % INPUTS], self.inputs(index))
        return denoiser

    def single(self, filled: bool = True) -> SingleDevice:
        """The plain denoiser, opened."""
        return self.open(SingleDevice(self.dit, self.prompt, self.mode, self.grid), filled)


@dataclass(frozen=True)
class StepCall:
    """One `forward_block` at the first noise level, everything that does not change during a block prepared."""

    case: BlockCase
    denoiser: SingleDevice
    audio: AudioState

    @classmethod
    def prepare(cls, case: BlockCase, filled: bool = True) -> "StepCall":
        return cls(case, case.single(filled), case.dit.encode_audio(case.audio))

    def __call__(self, x: Tensor) -> Tensor:
        """Noisy latents -> flow, both [1, C, 3, h, w]."""
        step, frame = self.denoiser.steps[0], self.case.index * self.case.mode.block_latents
        assert self.denoiser.sink is not None
        return self.case.dit.forward_block(
            x,
            step.time,
            self.denoiser.text,
            self.audio,
            self.denoiser.sink,
            step.cache,
            frame,
            ref_shift(frame, DISTANCE),
        )

    def cache_bytes(self) -> int:
        """Bytes of the keys and values that a step reads: ring, condition, text, audio."""
        step, sink = self.denoiser.steps[0], self.denoiser.sink
        assert sink is not None
        pairs: list[KeyValue] = [
            *sink.layers,
            *self.denoiser.text.layers,
            *(layer.context for layer in self.audio.layers),
        ]
        return step.cache.k.nbytes + step.cache.v.nbytes + sum(k.nbytes + v.nbytes for k, v in pairs)


class Kept(Generic[T]):
    """Something large that variants share, freed while another needs the memory, and then made again."""

    def __init__(self, make: Callable[[], T], made: T | None = None):
        self._make = make
        self._made = made

    def get(self) -> T:
        if self._made is None:
            self._made = self._make()
        return self._made

    def free(self) -> None:
        """Give the memory back to the device: the pool of a CUDA graph cannot use what PyTorch only keeps."""
        self._made = None
        release()


def release() -> None:
    """Hand memory that nothing refers to back to the GPU, where there is one."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
