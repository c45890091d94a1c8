"""The placements on one device: plain steps, and captured ones from a pool of compiled engines."""

import gc
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ...graphs.capture import shared_pool
from ...graphs.rewrite.wan_vae_stages import Scratch
from ..systems.audio_features import AudioFeatures, CapturableSpeech
from ..systems.codec import VideoCodec
from ..systems.liveavatar import Denoiser, LiveAvatarSystem
from ..systems.liveavatar_mode import GenerationMode
from .captured import CapturedBlock
from .captured_vae import CapturedDecoder, CapturedEncoder, CapturedVae
from .pool import IdlePool
from .single import SingleDevice
from .static_stream import StaticStream

IDLE_ENGINES = (
    1  # kept after their session; of LiveAvatar 14B at 704x384 in FP8 each takes 24.5 GB or more (docs/performance.md)
)


@dataclass
class PlainEngine:
    """The models themselves, with the state of one session."""

    vae: VideoCodec
    denoiser: Denoiser
    turn: AbstractContextManager[object]

    def release(self) -> None:
        """Nothing is kept."""


class SinglePlacement:
    """Step after step on the device of the models, launch by launch."""

    def __init__(self, system: LiveAvatarSystem):
        self.system = system
        self.turn: AbstractContextManager[object] = nullcontext()

    def open(self, context: Tensor, mode: GenerationMode, grid: tuple[int, int]) -> PlainEngine:
        return PlainEngine(self.system.vae, SingleDevice(self.system.dit, context, mode, grid), self.turn)

    def audio_features(self, mode: GenerationMode) -> AudioFeatures:
        return self.system.audio_features(mode)

    def keep(self, sessions: int) -> None:
        """There is nothing to keep."""


@dataclass(frozen=True)
class EngineKey:
    """What an engine is compiled for: latent (rows, columns), and what of the mode is in its graph or buffers."""

    grid: tuple[int, int]
    steps: int
    sample_shift: float
    cache_latents: int | None

    @classmethod
    def of(cls, mode: GenerationMode, grid: tuple[int, int]) -> "EngineKey":
        return cls(grid, mode.steps, mode.sample_shift, mode.cache_latents)


@dataclass
class CapturedEngine:
    """Captured steps and decoder with their static buffers, lent to one session at a time."""

    vae: CapturedVae
    denoiser: StaticStream
    turn: AbstractContextManager[object]
    key: EngineKey
    pool: IdlePool[EngineKey, "CapturedEngine"]

    def release(self) -> None:
        with self.turn:
            self.pool.give(self.key, self)


class CapturedPlacement:
    """A block's steps as one CUDA graph, the VAE's streams and a `CapturableSpeech` as others; on a CPU the same
    programs, call by call. `kind`: `CapturedBlock` or `BatchedSteps`.

    Engines are compiled once for each `EngineKey` and used again; a session with another key than the idle ones has its
    own compiled when it opens. Sessions that are open at the same time have an engine each. At most `IDLE_ENGINES` (or
    what `keep` says) wait for later sessions; a new engine is built after what is idle has made room. All graphs share
    their working memory, and the VAE's streams their buffers, so they run one after another, on one CUDA stream: `turn`
    is a lock that a session holds while it works.
    """

    def __init__(self, system: LiveAvatarSystem, kind: type[StaticStream] = CapturedBlock):
        self.system = system
        self.kind = kind
        self.turn: AbstractContextManager[object] = threading.RLock()
        self.memory = shared_pool(system.dit.device)
        self.engines: IdlePool[EngineKey, CapturedEngine] = IdlePool(self._build, IDLE_ENGINES)
        self.encoders: IdlePool[tuple[int, int], CapturedEncoder] = IdlePool(self._build_encoder, 1)
        self._scratch_of = (0, 0), Scratch()
        speech = system.audio_features
        self._speech = speech.captured(self.memory, self.turn) if isinstance(speech, CapturableSpeech) else speech
        self._rehearsed = False

    def open(self, context: Tensor, mode: GenerationMode, grid: tuple[int, int]) -> CapturedEngine:
        with self.turn:
            if not self._rehearsed:
                self._rehearse_audio(mode)
            engine = self.engines.take(EngineKey.of(mode, grid))
            try:
                engine.denoiser.begin(context)
            except BaseException:
                engine.release()
                raise
            return engine

    def audio_features(self, mode: GenerationMode) -> AudioFeatures:
        return self._speech(mode)

    def keep(self, sessions: int) -> None:
        with self.turn:
            self.engines.bound = max(self.engines.bound, sessions)

    def _build(self, key: EngineKey) -> CapturedEngine:
        dit, vae = self.system.dit, self.system.vae
        gc.collect()  # graphs of programs, and with them weights that they packed, refer to themselves
        if dit.device.type == "cuda":
            torch.cuda.empty_cache()
        mode = GenerationMode(
            steps=key.steps,
            sample_shift=key.sample_shift,
            block_latents=dit.config.num_frames_per_block,
            cache_latents=key.cache_latents,
        )
        blank = torch.zeros(1, dit.config.text_dim)
        steps = self.kind(dit, blank, mode, key.grid, pool=self.memory)
        steps.record()
        latents, scratch = dit.config.num_frames_per_block, self._scratch(key.grid)
        decoder = CapturedDecoder(vae, key.grid, latents, self.memory, scratch)
        if dit.device.type == "cuda":
            torch.cuda.empty_cache()  # what the warm-up took on a stream of its own
        return CapturedEngine(CapturedVae(vae.config, decoder, self._encode), steps, self.turn, key, self.engines)

    def _encode(self, video: Tensor) -> Tensor:
        """`WanVae.encode` on an encoder that the sessions share."""
        size = video.shape[3], video.shape[4]
        with self.turn:
            encoder = self.encoders.take(size)
            try:
                return encoder.encode(video)
            finally:
                self.encoders.give(size, encoder)

    def _build_encoder(self, size: tuple[int, int]) -> CapturedEncoder:
        factor = self.system.vae.config.spatial_factor
        scratch = self._scratch((size[0] // factor, size[1] // factor))
        return CapturedEncoder(self.system.vae, size, pool=self.memory, scratch=scratch)

    def _scratch(self, grid: tuple[int, int]) -> Scratch:
        """What the VAE's streams of a size share, which take turns; that of another size lives as long as they do."""
        if self._scratch_of[0] != grid:
            self._scratch_of = grid, Scratch()
        return self._scratch_of[1]

    def _rehearse_audio(self, mode: GenerationMode) -> None:
        """The first call of an audio encoder loads its kernels; here, where no one waits for a frame yet."""
        features = self.audio_features(mode)
        features.push(torch.zeros(mode.block_frames * mode.samples_per_frame))
        features.finish()
        self._rehearsed = True
