"""LiveAvatar end to end: the released pipelines, rerun through `BlockStream` (liveavatar.md, 3 and 5; section 9)."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....graphs.models.liveavatar import LiveAvatar, LiveAvatarConfig
from ....graphs.models.wan_vae import WanVae, infer_config
from ....runtime.encoders.audio_windows import AudioClips, join_speakers, liveavatar_windows, s2v_features
from ....runtime.placement.single import SingleDevice
from ....runtime.placement.timestep_pipeline import SequentialPipeline
from ....runtime.preprocess import actor_masks, image_pixels
from ....runtime.systems.liveavatar import BlockStream
from ....runtime.systems.liveavatar_conditions import PoseTrack
from ....runtime.systems.liveavatar_mode import (
    PIPELINE,
    PIPELINE_BLOCKWISE,
    SINGLE,
    SINGLE_ONLINE,
    GenerationMode,
)
from ....runtime.systems.liveavatar_step import BlockInputs
from ..case import Case
from ..registry import handles

Placement = type[SingleDevice] | type[SequentialPipeline]


def _mode(case: Case, released: GenerationMode) -> GenerationMode:
    """A released mode with the parameters of the case."""
    p = case.json
    block_frames = released.frames_per_latent * p["frames_per_block"]
    return replace(
        released,
        steps=p["sampling_steps"],
        sample_shift=p["shift"],
        block_latents=p["frames_per_block"],
        clip_blocks=p["infer_frames"] // block_frames,
        reference_frames=p["ref_image_frames"],
        reference_index=p["ref_latent_index"],
        motion_frames=p["motion_video_frames"],
        warm_latents=p.get("stream_warm_latents", released.warm_latents),
        slide_frames=p.get("slide_frames", released.slide_frames),
        drop_first_frames=p["drop_first_frames"],
    )


class RecordedDraws:
    """The noise and the reference distances that the golden holds, in either of its layouts."""

    def __init__(self, case: Case, steps: int):
        self.case = case
        self.steps = steps

    def noise(self, clip: int, shape: tuple[int, ...]) -> Tensor:
        noise = self.case[f"in.noise.{clip}"]
        assert tuple(noise.shape) == shape, f"recorded noise is {tuple(noise.shape)}, the stream asks for {shape}"
        return noise

    def distance(self, block: int, step: int) -> int:
        if "in.relative_dist" in self.case:
            return int(self.case["in.relative_dist"][self.steps * block + step])
        return int(self.case[f"in.relative_dist.rank{step}"][block])


class Recorder:
    """A denoiser that notes under golden names what enters and leaves it."""

    def __init__(self, placement: Placement, dit: LiveAvatar, context: Tensor, mode: GenerationMode, grid):
        self.sinks = 0
        self.seen: dict[str, Tensor] = {}
        self.denoiser = placement(dit, context, mode, grid, observe=self.observe)

    def observe(self, block: int, step: int, x: Tensor, flow: Tensor) -> None:
        self.seen[f"mid.b{block}.s{step}.x"] = x[0]
        self.seen[f"mid.b{block}.s{step}.flow"] = flow[0]

    def condition(self, reference: Tensor, motion: Tensor) -> None:
        self.seen[f"mid.ref_latents.r{self.sinks}"] = reference
        self.seen[f"mid.motion_latents_last19.r{self.sinks}"] = motion[:, :, -19:]
        self.seen["mid.motion_latents"] = motion
        self.sinks += 1
        self.denoiser.condition(reference, motion)

    def denoise(self, x: Tensor, block: BlockInputs) -> Tensor:
        return self.denoiser.denoise(x, block)

    def drain(self) -> list[Tensor]:
        return self.denoiser.drain()

    def caches(self) -> dict[str, Tensor]:
        """Rings at the end of the run: by step (single device) or by rank (pipeline)."""
        if isinstance(self.denoiser, SingleDevice):
            places = {f"step{k}": step.cache for k, step in enumerate(self.denoiser.steps)}
        else:
            places = {f"rank{k}": rank.steps[0].cache for k, rank in enumerate(self.denoiser.ranks)}
        found: dict[str, Tensor] = {}
        for place, cache in places.items():
            for name, tensor in (("k", cache.k), ("v", cache.v)):
                named = {f"layer{i}": tensor[i] for i in range(len(tensor))} | {"last": tensor[-1]}
                found |= {f"mid.final_cache.{place}.{layer}.{name}": value for layer, value in named.items()}
        return found


def _dit(case: Case) -> LiveAvatar:
    p = case.json
    weights = case.weights(p["weights_file"])
    config = LiveAvatarConfig.from_published(
        p["config"],
        audio_layers=weights["casual_audio_encoder.weights"].shape[1],
        num_frames_per_block=p["frames_per_block"],
        cache_frames=p["cache_frames"],
    )
    with torch.device("meta"):
        model = LiveAvatar(config)
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


def _vae(case: Case) -> WanVae:
    weights = case.weights(case.json["vae_weights_file"])
    vae = WanVae(infer_config(weights))
    vae.load_state_dict(weights, strict=True)
    return vae.eval()


def _windows(case: Case, features: Tensor, batch_frames: int) -> AudioClips:
    """[K, T50, C] at 50 Hz -> windows at the video's rate."""
    p = case.json
    at_rate = s2v_features([state[None] for state in features], p["interpolated_rate"])
    return liveavatar_windows(at_rate, p["fps"], batch_frames, p["m"], p["interpolated_rate"])


def _speech(case: Case) -> AudioClips:
    names = case.names("in.audio_feat50")
    order = sorted(names, key=lambda name: int(name.rpartition(".")[2]) if name.count(".") > 1 else 0)
    return join_speakers([_windows(case, case[name], case.json["batch_frames"]) for name in order])


def _live_speech(case: Case, mode: GenerationMode) -> Iterator[Tensor]:
    """Audio of the block-wise generator: recorded noise, then chunks that were encoded on their own."""
    block = 0
    while f"in.audio_block.{block}" in case:
        yield case[f"in.audio_block.{block}"]
        block += 1
    chunk = 0
    while f"in.audio_chunk_feat50.{chunk}" in case:
        windows = _windows(case, case[f"in.audio_chunk_feat50.{chunk}"], case.json["chunk_batch_frames"])
        yield windows.features[..., : mode.block_frames]
        chunk += 1


@torch.inference_mode()
def _run(case: Case, released: GenerationMode, placement: Placement, audio: Iterator[Tensor] | None = None):
    p = case.json
    mode = _mode(case, released)
    dit, vae = _dit(case), _vae(case)
    size = p["H"], p["W"]
    pixels = image_pixels(np.array(case["in.image"]), *size)
    result: dict[str, Any] = {"json.timesteps": mode.schedule().timesteps.tolist()}
    if audio is None:
        speech = _speech(case)
        assert speech.clips >= p["clips"]
        audio = iter(speech.features[..., : p["clips"] * mode.clip_frames].split(mode.block_frames, -1))
    mask = None
    if p["actors"] > 1:
        faces = [case[f"in.actor{i + 1}"] for i in range(p["actors"])]
        m = p["mask"]
        rules = {"patch_pixels": m["patch_pixels"], "dilation_ratio": m["ratio"], "dilation_offset": m["radius_offset"]}
        mask = actor_masks(faces, *size, m["frames"], **rules).routing
        result["mid.mask"] = mask
    pose = PoseTrack(vae, case["in.pose_frames"], mode, size) if "in.pose_frames" in case else None
    if pose:
        result |= {f"mid.cond_latents.{clip}": pose.clip(clip) for clip in range(p["clips"])}
    place = partial(Recorder, placement, dit, case["in.context"], mode)
    draws = RecordedDraws(case, mode.steps)
    stream = BlockStream(vae, mode, pixels, place, draws, actor_mask=mask, pose=pose)
    latents, frames = [], []
    for block, features in enumerate(islice(audio, p.get("blocks"))):
        result[f"mid.audio_block{block}"] = result[f"mid.audio_block.{block}"] = features
        made, shown = stream.next(features)
        latents.append(made)
        frames.append(shown)
    video = torch.cat(frames, 1)
    recorder = stream.denoiser
    assert isinstance(recorder, Recorder)
    result |= recorder.seen | recorder.caches()
    result["out.latents"] = torch.cat(latents, 2)
    result["out.video_strided"] = video[:, :: p["video_stride"]]
    known = {name: value for name, value in result.items() if name in case.tensors or name.startswith("json.")}
    return known | {"json.video_shape": list(video.shape)}


@handles("liveavatar", "e2e_*", "e2e_single*")
def single(case: Case):
    return _run(case, SINGLE_ONLINE if case.json["online_decode"] else SINGLE, SingleDevice)


@handles("liveavatar", "e2e_tpp*")
def pipeline(case: Case):
    return _run(case, PIPELINE, SequentialPipeline)


@handles("liveavatar", "e2e_tpp_blockwise*")
def pipeline_blockwise(case: Case):
    return _run(case, PIPELINE_BLOCKWISE, SequentialPipeline, _live_speech(case, _mode(case, PIPELINE_BLOCKWISE)))
