"""Plain Wan 2.1 / 2.2: text or a picture to video, one expert or two (wan.md, 3.5 to 3.8).

Shapes: latents [16, F, h, w] with F = 1 + (T - 1) / 4 and h, w = H / 8, W / 8; videos [3, T, H, W] in [-1, 1].
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ...graphs.models.wan_vae import WanVae
from ..encoders.clip import ClipVision
from ..encoders.text import TextEncoder
from ..errors import InputError
from ..samplers import DPMSolver, UniPC, unipc_schedule, wan_dpm_schedule
from ..samplers.schedules import TRAIN_STEPS

Denoiser = Callable[..., list[Tensor]]
"""A `WanModel`, or anything called like one: `partial(sequence_parallel.forward, model, mesh)` on several ranks."""


@dataclass(frozen=True)
class WanSettings:
    """How a video is sampled. `guidance` is (low-noise expert, high-noise expert); with one model the first counts.

    `boundary`: times from boundary * 1000 on belong to the high-noise expert; None where there is one model.
    """

    steps: int = 50
    shift: float = 5.0
    guidance: tuple[float, float] = (5.0, 5.0)
    solver: str = "unipc"
    boundary: float | None = None

    def new_solver(self) -> UniPC | DPMSolver:
        """A solver at the start of its trajectory."""
        if self.solver == "unipc":
            return UniPC(unipc_schedule(self.steps, self.shift))
        if self.solver == "dpm++":
            return DPMSolver(wan_dpm_schedule(self.steps, self.shift))
        raise InputError(f"unknown solver {self.solver!r}; choose 'unipc' or 'dpm++'")


WAN21_T2V = WanSettings()
WAN21_I2V_720P = WanSettings(steps=40)
WAN21_I2V_480P = WanSettings(steps=40, shift=3.0)
WAN22_T2V_A14B = WanSettings(steps=40, shift=12.0, guidance=(3.0, 4.0), boundary=0.875)
WAN22_I2V_A14B = WanSettings(steps=40, guidance=(3.5, 3.5), boundary=0.900)


class ImageCondition(NamedTuple):
    """What a picture gives the model: `y` [4 mask + 16 latent channels, F, h, w], CLIP features [1, I, D] in 2.1."""

    y: Tensor
    clip_features: Tensor | None


class WanVideo:
    """Generates videos with loaded parts; they stay on the devices and in the precision in which they are given.

    `model` is the only model, or the low-noise expert when `high_noise` is given. `text` turns prompts into
    embeddings (without it prompts must be embeddings [n, text_dim]); `clip` is needed by Wan 2.1 image to video.
    `device` is where noise is drawn and the model runs: seeds give other noise on another kind of device.
    """

    def __init__(
        self,
        model: Denoiser,
        vae: WanVae,
        *,
        high_noise: Denoiser | None = None,
        text: TextEncoder | None = None,
        clip: ClipVision | None = None,
        device: torch.device | str = "cpu",
    ):
        self.model = model
        self.high_noise = high_noise
        self.vae = vae
        self.text = text
        self.clip = clip
        self.device = torch.device(device)

    @torch.no_grad()
    def text_to_video(
        self,
        prompt: str | Tensor,
        negative_prompt: str | Tensor = "",
        *,
        size: tuple[int, int] = (1280, 720),
        frames: int = 81,
        settings: WanSettings = WAN21_T2V,
        seed: int = -1,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Video [3, frames, H, W] for `size` = (width, height) in pixels.

        Published systems put their own text in place of an empty negative prompt; here it is taken as it is.
        `noise` [16, F, h, w] replaces the draw from `seed` (negative: a random one). Raises InputError for a size
        that is not a multiple of 16 or frames that are not 4 n + 1.
        """
        width, height = size
        shape = self._latent_shape(frames, height, width)
        contexts = self.encode_prompts(prompt, negative_prompt)
        latent = self.sample(self._start(shape, seed, noise), contexts, settings)
        return self.vae.decode(latent[None])[0]

    @torch.no_grad()
    def image_to_video(
        self,
        image: Image.Image | np.ndarray,
        prompt: str | Tensor,
        negative_prompt: str | Tensor = "",
        *,
        max_area: int = 1280 * 720,
        frames: int = 81,
        settings: WanSettings = WAN21_I2V_720P,
        seed: int = -1,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Video [3, frames, H, W] that begins with `image` (PIL, or uint8 RGB [h, w, 3]) in about `max_area` pixels."""
        pixels = image_to_unit_range(image)
        height, width = size_for_image(pixels.shape[1], pixels.shape[2], max_area)
        shape = self._latent_shape(frames, height, width)
        condition = self.image_condition(pixels, frames, height, width)
        contexts = self.encode_prompts(prompt, negative_prompt)
        latent = self.sample(self._start(shape, seed, noise), contexts, settings, condition)
        return self.vae.decode(latent[None])[0]

    def encode_prompts(self, prompt: str | Tensor, negative_prompt: str | Tensor) -> tuple[Tensor, Tensor]:
        """Text embeddings [n, text_dim] of both prompts on the device."""
        if isinstance(prompt, Tensor) and isinstance(negative_prompt, Tensor):
            return prompt.to(self.device), negative_prompt.to(self.device)
        if isinstance(prompt, Tensor) or isinstance(negative_prompt, Tensor):
            raise InputError("pass both prompts as text or both as embeddings")
        if self.text is None:
            raise InputError("no text encoder is loaded: pass prompts as embeddings, or load one")
        positive, negative = self.text([prompt, negative_prompt])
        return positive.to(self.device), negative.to(self.device)

    @torch.no_grad()
    def image_condition(self, pixels: Tensor, frames: int, height: int, width: int) -> ImageCondition:
        """Mask and latent of a clip whose first frame is the picture [3, h, w] and whose others are grey."""
        clip = torch.zeros(1, 3, frames, height, width)
        clip[:, :, 0] = F.interpolate(pixels[None], (height, width), mode="bicubic")
        latent = self.vae.encode(clip.to(self.device))[0]  # [16, F, h, w]
        mask = torch.zeros(4, *latent.shape[1:], device=latent.device)
        mask[:, 0] = 1.0  # the four frames of the first latent: the given one, repeated
        features = None if self.clip is None else self.clip([pixels[:, None].to(self.device)]).to(latent.dtype)
        return ImageCondition(torch.cat((mask, latent)), features)

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        contexts: tuple[Tensor, Tensor],
        settings: WanSettings,
        condition: ImageCondition | None = None,
    ) -> Tensor:
        """Denoise [16, F, h, w] with classifier-free guidance between the two contexts."""
        inputs: dict[str, Any] = {}
        if condition is not None:
            inputs = {"y": [condition.y], "clip_features": condition.clip_features}
        solver, x = settings.new_solver(), noise
        for index, time in enumerate(solver.schedule.timesteps):
            model, scale = self._expert(float(time), settings)
            t = time[None].to(self.device)
            positive = model([x], t, [contexts[0]], **inputs)[0]
            negative = model([x], t, [contexts[1]], **inputs)[0]
            x = solver.step(negative + scale * (positive - negative), index, x)
        return x

    def _expert(self, time: float, settings: WanSettings) -> tuple[Denoiser, float]:
        low, high = settings.guidance
        if (self.high_noise is None) != (settings.boundary is None):
            raise InputError("two experts need settings with a boundary, and one model needs settings without")
        if self.high_noise is not None and settings.boundary is not None and time >= settings.boundary * TRAIN_STEPS:
            return self.high_noise, high
        return self.model, low

    def _latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        config = self.vae.config
        if frames < 1 or (frames - 1) % config.temporal_factor:
            raise InputError(f"{frames} frames: the number must be a multiple of {config.temporal_factor}, plus 1")
        step = 2 * config.spatial_factor  # a patch of the model is two latent pixels wide
        if height % step or width % step or not height or not width:
            raise InputError(f"size {width}x{height}: width and height must be multiples of {step}")
        rows, columns = height // config.spatial_factor, width // config.spatial_factor
        return config.z_dim, config.latent_frames(frames), rows, columns

    def _start(self, shape: tuple[int, int, int, int], seed: int, noise: Tensor | None) -> Tensor:
        if noise is not None:
            if tuple(noise.shape) != shape:
                raise InputError(f"noise has shape {tuple(noise.shape)}; this video needs {shape}")
            return noise.to(self.device)
        generator = torch.Generator(self.device)
        generator.manual_seed(seed if seed >= 0 else int(np.random.default_rng().integers(sys.maxsize)))
        return torch.randn(shape, generator=generator, device=self.device)


def image_to_unit_range(image: Image.Image | np.ndarray) -> Tensor:
    """Picture -> [3, h, w] float32 in [-1, 1]."""
    array = np.array(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise InputError(f"picture {array.dtype} {array.shape}: uint8 RGB [h, w, 3] is needed")
    return (torch.from_numpy(array).permute(2, 0, 1).float() / 255 - 0.5) / 0.5


def size_for_image(rows: int, columns: int, max_area: int) -> tuple[int, int]:
    """(height, width) in pixels, multiples of 16, near `max_area` in the aspect of a picture of rows x columns."""
    aspect = rows / columns
    latent = [round(math.sqrt(area) // 8 // 2 * 2) for area in (max_area * aspect, max_area / aspect)]
    if not all(latent):
        raise InputError(f"a picture of {columns}x{rows} is too narrow for {max_area} pixels: crop it or allow more")
    return latent[0] * 8, latent[1] * 8
