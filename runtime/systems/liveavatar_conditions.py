"""Pictures and pose videos -> condition latents of LiveAvatar (liveavatar.md, 3.2 and 3.9)."""

from torch import Tensor

from ..preprocess.pose import pose_clip
from .codec import VideoCodec
from .liveavatar_mode import GenerationMode


def still_video(pixels: Tensor, frames: int) -> Tensor:
    """A picture [3, H, W] as a video [1, 3, frames, H, W] (a view)."""
    return pixels[None, :, None].expand(1, 3, frames, *pixels.shape[1:])


def reference_latent(vae: VideoCodec, pixels: Tensor, mode: GenerationMode) -> Tensor:
    """The one latent frame [1, 16, 1, h, w] of the picture [3, H, W] that conditions the model."""
    latents = vae.encode(still_video(pixels, mode.reference_frames))
    return latents[:, :, mode.reference_index : mode.reference_index + 1]


def motion_latents(vae: VideoCodec, pixels: Tensor, mode: GenerationMode) -> Tensor:
    """Latents [1, 16, T, h, w] of the picture standing still for `mode.motion_frames`."""
    return vae.encode(still_video(pixels, mode.motion_frames))


class PoseTrack:
    """Pose latents, clip by clip, of pose frames uint8 [N, h, w, 3] that were picked at the video's rate."""

    def __init__(self, vae: VideoCodec, frames: Tensor, mode: GenerationMode, size: tuple[int, int]):
        self.vae = vae
        self.frames = frames
        self.mode = mode
        self.size = size

    def clip(self, clip: int) -> Tensor:
        """Latents [1, 16, clip latents, h, w]; frames that the video does not have are -1."""
        pixels = pose_clip(self.frames, clip, self.mode.clip_frames, *self.size)
        return self.vae.encode(pixels)[:, :, 1:]
