"""The Wan 2.1 causal video VAE: whole clips, and streams of any length with an explicit, copyable state.

Pixels [B, 3, T, H, W] in [-1, 1]; latents [B, z, F, H/8, W/8] with F = 1 + (T - 1) // 4, normalised per channel.
The first frame of a clip becomes one latent frame, every further four become one. Both networks carry their history
in slots (`wan_vae_blocks`), so that a clip may be cut anywhere; whole clips run as a stream of chunks, in memory that
does not grow with their length. Module and parameter names are the published ones (wan.md, 1.4).
Source: wan.md, 2.1.
"""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from .wan_vae_blocks import CausalConv3d, ChannelRmsNorm, Decoder, Encoder, SlotCursor

DEFAULT_CHUNK = 3
"""Latent frames in one pass through a network; more need more memory, the result is the same."""


@dataclass(frozen=True)
class VaeConfig:
    """Sizes of a VAE. `num_res_blocks` counts per encoder level; the decoder has one more per level.

    `temporal_downsample` has one flag per transition between encoder levels (the decoder's are reversed);
    `latent_mean` and `latent_std` normalise the latents, one value a channel.
    """

    dim: int
    z_dim: int
    dim_mult: tuple[int, ...]
    num_res_blocks: int
    temporal_downsample: tuple[bool, ...]
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(
                f"{len(self.dim_mult)} levels have {len(self.dim_mult) - 1} transitions, "
                f"temporal_downsample has {len(self.temporal_downsample)} flags"
            )
        if not len(self.latent_mean) == len(self.latent_std) == self.z_dim:
            raise ValueError(
                f"latent_mean ({len(self.latent_mean)}) and latent_std ({len(self.latent_std)}) need one value "
                f"for each of the {self.z_dim} latent channels"
            )
        if min(self.latent_std) <= 0:
            raise ValueError(f"latent_std must be positive, it is {self.latent_std}")

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent row or column."""
        return 2 ** len(self.temporal_downsample)

    @property
    def temporal_factor(self) -> int:
        """Pixel frames per latent frame after the first."""
        return 2 ** sum(self.temporal_downsample)

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a clip: 1 + (T - 1) // 4."""
        return 1 + (frames - 1) // self.temporal_factor

    def pixel_frames(self, latents: int) -> int:
        """Frames of a decoded clip: 1 + 4 (F - 1)."""
        return 1 + (latents - 1) * self.temporal_factor


WAN21_VAE = VaeConfig(
    dim=96,
    z_dim=16,
    dim_mult=(1, 2, 4, 4),
    num_res_blocks=2,
    temporal_downsample=(False, True, True),
    latent_mean=(
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    ),
    latent_std=(
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    ),
)
"""The published `Wan2.1_VAE.pth`: 126,892,531 parameters."""


@dataclass(frozen=True)
class VaePrecision:
    """Where the networks round (wan.md, 2.1.12).

    dtype: parameters, convolutions, attention and residual sums.
    wide_norm: norm, gamma and SiLU stay float32 up to the next convolution.
    latents: dtype in which latents enter `decode`.
    std: the standard deviation is rounded to it and inverted there.
    scale: the mean and that inverse are rounded to it.
    """

    dtype: torch.dtype = torch.float32
    wide_norm: bool = False
    latents: torch.dtype = torch.float32
    std: torch.dtype = torch.float32
    scale: torch.dtype = torch.float32


FLOAT32 = VaePrecision()
BF16 = VaePrecision(dtype=torch.bfloat16, wide_norm=True)
"""bf16 networks with float32 norms and constants: the one to use for speed."""
BF16_AUTOCAST = replace(BF16, std=torch.bfloat16, scale=torch.bfloat16)
"""LiveAvatar's flow: autocast, and constants that were rounded before they were inverted."""
BF16_MODULE = VaePrecision(dtype=torch.bfloat16, latents=torch.bfloat16, scale=torch.bfloat16)
"""OmniAvatar's flow: everything in bf16, no autocast."""


@dataclass
class DecoderState:
    """What a decoded stream carries from call to call; a new one starts a new clip, `clone` forks the stream."""

    slots: list[Tensor] = field(default_factory=list)

    def clone(self) -> "DecoderState":
        return DecoderState([slot.clone() for slot in self.slots])


@dataclass
class EncoderState:
    """What an encoded stream carries; `pending` are frames that wait until a latent frame is complete."""

    slots: list[Tensor] = field(default_factory=list)
    pending: Tensor | None = None

    def clone(self) -> "EncoderState":
        pending = None if self.pending is None else self.pending.clone()
        return EncoderState([slot.clone() for slot in self.slots], pending)


class WanVae(nn.Module):
    """Encoder and decoder with their streams. Trainable as it stands: `encode_moments` gives the log-variance."""

    def __init__(self, config: VaeConfig = WAN21_VAE, precision: VaePrecision = FLOAT32):
        super().__init__()
        self.config = config
        sizes = (config.dim, config.z_dim, config.dim_mult, config.num_res_blocks, config.temporal_downsample)
        self.encoder = Encoder(*sizes)
        self.conv1 = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(*sizes)
        self.set_precision(precision)

    def set_precision(self, precision: VaePrecision) -> "WanVae":
        """Cast the parameters and choose the rounding points; returns self."""
        self.precision = precision
        for module in self.modules():
            if isinstance(module, ChannelRmsNorm):
                module.wide = precision.wide_norm
        return self.to(precision.dtype)

    # Normalisation of the latents

    def latent_scale(self, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Mean and inverse standard deviation [z, 1, 1, 1] as used, in `precision.scale`; made once a device."""
        return _latent_scale(self.config, self.precision, device)

    def normalise(self, mean: Tensor) -> Tensor:
        """Moments' mean [B, z, F, h, w] -> latents: (mean - MU) * (1 / SIGMA)."""
        mu, inverse = self.latent_scale(mean.device)
        return (mean - mu) * inverse

    def denormalise(self, latents: Tensor) -> Tensor:
        """Latents -> what the decoder reads: latents / (1 / SIGMA) + MU."""
        mu, inverse = self.latent_scale(latents.device)
        return latents / inverse + mu

    # Pixels to latents

    def encode(self, video: Tensor, *, normalised: bool = True, chunk: int | None = DEFAULT_CHUNK) -> Tensor:
        """Clip [B, 3, T, H, W] -> mean latents [B, z, F, H/8, W/8], float32.

        The last (T - 1) % 4 frames have no latent frame and are dropped, with a warning. `chunk`: latent frames a
        pass, None for all at once. ValueError for a wrong shape.
        """
        mean, _ = self.encode_moments(video, chunk=chunk)
        return (self.normalise(mean) if normalised else mean).float().contiguous()

    def encode_moments(self, video: Tensor, *, chunk: int | None = None) -> tuple[Tensor, Tensor]:
        """Clip [B, 3, T, H, W] -> mean and log-variance, both [B, z, F, H/8, W/8], not normalised."""
        self._check_video(video)
        frames = video.shape[2]
        latents = self.config.latent_frames(frames)
        if dropped := frames - self.config.pixel_frames(latents):
            warnings.warn(
                f"{frames} frames are not 1 + a multiple of {self.config.temporal_factor}: the last {dropped} "
                "have no latent frame and are dropped; cut or pad the clip to choose which",
                stacklevel=2,
            )
        state, pieces = EncoderState(), []
        for start in range(0, latents, chunk or latents):
            stop = min(start + (chunk or latents), latents)
            begin = self.config.pixel_frames(start) if start else 0
            pieces.append(self._encode_chunk(video[:, :, begin : self.config.pixel_frames(stop)], state))
        moments = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)
        mean, log_variance = moments.chunk(2, 1)
        return mean, log_variance

    def encode_stream(self, video: Tensor, state: EncoderState, *, normalised: bool = True) -> Tensor:
        """The next frames of a stream, any number >= 1 -> the latents that they complete (perhaps none), float32.

        The result over all calls is that of `encode` of all frames, however they are cut. Advances `state`.
        """
        self._check_video(video)
        if state.pending is not None:
            self._check_state(video, state.pending)
            video = torch.cat((state.pending.to(video.dtype), video), 2)
        frames, factor = video.shape[2], self.config.temporal_factor
        usable = frames // factor * factor if state.slots else 1 + (frames - 1) // factor * factor
        if usable:
            moments = self._encode_chunk(video[:, :, :usable], state)
        else:
            rows, columns = (size // self.config.spatial_factor for size in video.shape[3:])
            moments = video.new_empty(video.shape[0], 2 * self.config.z_dim, 0, rows, columns)
        state.pending = video[:, :, usable:].clone() if usable < frames else None
        mean = moments.chunk(2, 1)[0]
        return (self.normalise(mean) if normalised else mean).float().contiguous()

    def stream_moments(self, video: Tensor, state: EncoderState) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the next frames of a stream, differentiable; for training in pieces.

        The first call takes 1 + 4 n frames, later ones 4 n. Advances `state`; detach its slots between the pieces.
        """
        self._check_video(video)
        further = video.shape[2] - (0 if state.slots else 1)
        if further % self.config.temporal_factor:
            raise ValueError(
                f"{video.shape[2]} frames do not complete a latent frame; a stream starts with 1 + a multiple of "
                f"{self.config.temporal_factor} frames and goes on with multiples"
            )
        mean, log_variance = self._encode_chunk(video, state).chunk(2, 1)
        return mean, log_variance

    def _encode_chunk(self, video: Tensor, state: EncoderState) -> Tensor:
        self._check_state(video, *state.slots[:1])
        cursor = SlotCursor(state.slots)
        moments = self.conv1(self.encoder(video, cursor))
        state.slots = cursor.slots
        return moments

    # Latents to pixels

    def decode(
        self,
        latents: Tensor,
        *,
        clamp: bool = True,
        chunk: int | None = DEFAULT_CHUNK,
        out: Tensor | None = None,
    ) -> Tensor:
        """Latents [B, z, F, h, w] -> clip [B, 3, 1 + 4 (F - 1), 8 h, 8 w], float32.

        `clamp`: to [-1, 1]. `chunk`: latent frames a pass, None for all at once. `out`: written chunk by chunk, may
        lie on another device (a pinned host tensor). ValueError for a wrong shape.
        """
        self._check_latents(latents)
        if out is None and (chunk is None or chunk >= latents.shape[2]):
            return self.decode_stream(latents, DecoderState(), clamp=clamp)
        batch, _, count, rows, columns = latents.shape
        factor = self.config.spatial_factor
        shape = (batch, 3, self.config.pixel_frames(count), rows * factor, columns * factor)
        if out is None:
            out = torch.empty(shape, device=latents.device)
        elif tuple(out.shape) != shape:
            raise ValueError(f"out has shape {tuple(out.shape)}, the decoded clip has {shape}")
        start = 0
        for frames in self.decode_frames(latents, clamp=clamp, chunk=chunk):
            out[:, :, start : start + frames.shape[2]] = frames
            start += frames.shape[2]
        return out

    def decode_frames(
        self,
        latents: Tensor,
        state: DecoderState | None = None,
        *,
        clamp: bool = True,
        chunk: int | None = DEFAULT_CHUNK,
    ) -> Iterator[Tensor]:
        """Decode lazily: yields [B, 3, t, H, W] float32 for every `chunk` latent frames; continues `state` if given."""
        self._check_latents(latents)
        state = DecoderState() if state is None else state
        return (self.decode_stream(part, state, clamp=clamp) for part in latents.split(chunk or latents.shape[2], 2))

    def decode_stream(self, latents: Tensor, state: DecoderState, *, clamp: bool = True) -> Tensor:
        """The next latent frames of a stream -> their frames [B, 3, t, H, W], float32; advances `state`.

        The first latent frame of a stream gives one frame, every other four. All given latents go through in one pass.
        """
        self._check_latents(latents)
        self._check_state(latents, *state.slots[:1])
        cursor = SlotCursor(state.slots)
        x = self.conv2(self.denormalise(latents.to(self.precision.latents)))
        frames = self.decoder(x, cursor).float().contiguous()
        state.slots = cursor.slots
        return frames.clamp(-1, 1) if clamp else frames

    # Checks

    def _check_video(self, video: Tensor) -> None:
        _check_clip("video", video, 3)
        factor = self.config.spatial_factor
        if video.shape[3] % factor or video.shape[4] % factor:
            raise ValueError(
                f"video has {video.shape[3]} rows and {video.shape[4]} columns; both must be multiples of {factor}: "
                "resize or crop it first"
            )

    def _check_latents(self, latents: Tensor) -> None:
        _check_clip("latents", latents, self.config.z_dim)

    def _check_state(self, clip: Tensor, *carried: Tensor) -> None:
        for slot in carried:
            if slot.shape[:1] + slot.shape[3:] != clip.shape[:1] + clip.shape[3:]:
                raise ValueError(
                    f"this stream's state holds a batch of {slot.shape[0]} with {slot.shape[3]}x{slot.shape[4]}, "
                    f"the chunk has {clip.shape[0]} with {clip.shape[3]}x{clip.shape[4]}; start a new state"
                )


@lru_cache(maxsize=64)
def _latent_scale(config: VaeConfig, precision: VaePrecision, device: torch.device | None) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # kept for ever, so usable in training too
        mean = torch.tensor(config.latent_mean, device=device)
        inverse = 1.0 / torch.tensor(config.latent_std, device=device).to(precision.std)
        shape = (-1, 1, 1, 1)
        return mean.to(precision.scale).view(shape), inverse.to(precision.scale).view(shape)


def _check_clip(what: str, clip: Tensor, channels: int) -> None:
    if clip.dim() != 5 or clip.shape[1] != channels or 0 in clip.shape:
        raise ValueError(f"{what} has shape {tuple(clip.shape)}; [batch, {channels}, frames, rows, columns] is needed")
    if not clip.is_floating_point():
        raise ValueError(f"{what} has dtype {clip.dtype}; floating point is needed (pixels scaled to [-1, 1])")


def infer_config(
    state_dict: Mapping[str, Tensor],
    latent_mean: tuple[float, ...] = WAN21_VAE.latent_mean,
    latent_std: tuple[float, ...] = WAN21_VAE.latent_std,
) -> VaeConfig:
    """Sizes of a VAE from its weights, which are published without a configuration; KeyError when they are no VAE's.

    The weights do not hold the normalisation of the latents: it is the published one unless given.
    """
    level_ends, index = [], 0
    widths: list[int] = []
    while (f"encoder.downsamples.{index}.residual.2.weight" in state_dict) or (
        f"encoder.downsamples.{index}.resample.1.weight" in state_dict
    ):
        if f"encoder.downsamples.{index}.resample.1.weight" in state_dict:
            level_ends.append(index)
        else:
            widths.append(state_dict[f"encoder.downsamples.{index}.residual.2.weight"].shape[0])
        index += 1
    blocks = level_ends[0] if level_ends else index
    dim = state_dict["encoder.conv1.weight"].shape[0]
    return VaeConfig(
        dim=dim,
        z_dim=state_dict["conv2.weight"].shape[0],
        dim_mult=tuple(width // dim for width in widths[::blocks]),
        num_res_blocks=blocks,
        temporal_downsample=tuple(f"encoder.downsamples.{end}.time_conv.weight" in state_dict for end in level_ends),
        latent_mean=latent_mean,
        latent_std=latent_std,
    )
