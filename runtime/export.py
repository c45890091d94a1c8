"""A model's denoising step and decoder as packages for C++, with a stream to run them on and the proof that they fit.

`export` writes into a folder: `step.pt2`, `decode.pt2` (`graphs.export`) and `stream.pt`, everything that a program
needs to continue a stream of one picture and one voice, with what PyTorch made of it. `examples/cpp` reads all three.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..graphs.export import Part, named, package, trace_decode, trace_step
from ..graphs.models.liveavatar import ConditionCache, LiveAvatar, TextState
from ..graphs.models.liveavatar_cache import KeyValue
from ..graphs.models.wan_vae import DecoderState
from ..graphs.quantize import Fp8Linear
from .errors import InputError, OutputError
from .inputs import ImageInput, as_picture, as_samples, as_seed
from .outputs import check_folder
from .placement.single import SingleDevice
from .preprocess import image_pixels
from .samplers import euler_step
from .systems.liveavatar import LiveAvatarSystem
from .systems.liveavatar_conditions import motion_latents, reference_latent
from .systems.liveavatar_draws import SeededDraws
from .systems.liveavatar_mode import Decoding
from .systems.liveavatar_step import BlockInputs

PARTS = ("step", "decode")
STREAM_FILE = "stream.pt"


@dataclass(frozen=True)
class PreparedStream:
    """The first N blocks of a stream as tensors; S steps, F latent frames of a block.

    noise [N, 1, 16, F, h, w], audio [N, 1, K, C, 4F], timesteps float32 [S], sigmas float32 [S + 1], distances int64
    [N, S]: what changes. `text`, `condition` and `slots`: what the prompt, the picture and the decoder's warm-up left.
    latents [N, 1, 16, F, h, w] and frames float32 [N, 1, 3, 4F, H, W] in [-1, 1]: the results.
    """

    noise: Tensor
    audio: Tensor
    timesteps: Tensor
    sigmas: Tensor
    distances: Tensor
    text: TextState
    condition: ConditionCache
    slots: list[Tensor]
    ring_rows: int
    latents: Tensor
    frames: Tensor

    def rings(self, dit: LiveAvatar) -> tuple[KeyValue, ...]:
        """Empty rings of one step: k and v [1, rows, H, d] of every layer."""
        shape = (1, self.ring_rows, dit.config.num_heads, dit.config.head_dim)
        return tuple(
            KeyValue(*(torch.zeros(shape, dtype=dit.dtype, device=dit.device) for _ in range(2))) for _ in dit.layers
        )

    def save(self, path: Path) -> None:
        """Write every tensor by its name ("noise", "text.0.k", "slots.3"), contiguous and on the CPU."""
        tensors = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "ring_rows"}
        tensors |= {"text": self.text.layers, "condition": self.condition.layers}
        found = dict(pair for name, value in tensors.items() for pair in named(name, value))
        torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}, path)


@torch.no_grad()
def prepare(
    system: LiveAvatarSystem,
    image: ImageInput,
    samples: np.ndarray,
    size: tuple[int, int],
    *,
    blocks: int = 2,
    prompt: str = "",
    seed: int = 0,
) -> PreparedStream:
    """Run the first `blocks` blocks of the video of a picture and a sound (float32 [n] at 16 kHz) at `size` (height,
    width) and keep all that went in and came out.

    Errors: InputError for a picture, sound or seed that cannot be used, for more blocks than a clip has, and for a mode
    that decodes whole clips.
    """
    seed = as_seed(seed)
    dit, vae, mode = system.dit, system.vae, system.mode
    if not 1 <= blocks <= mode.clip_blocks:
        raise InputError(f"{blocks} blocks are no part of a clip; pass 1 to {mode.clip_blocks}")
    if mode.decoding is not Decoding.STREAM:
        raise InputError("this mode decodes whole clips, a package decodes a stream; use a mode that streams")
    pixels = image_pixels(as_picture(image), *size).to(dit.device)
    reference, motion = reference_latent(vae, pixels, mode), motion_latents(vae, pixels, mode)
    grid = reference.shape[3], reference.shape[4]
    context = system.encode_prompt(prompt)
    placed = SingleDevice(dit, context, mode, grid)
    placed.condition(reference, motion)
    assert placed.sink is not None

    state = DecoderState()
    vae.decode_stream(motion[:, :, : mode.warm_latents], state)
    slots = [slot.clone() for slot in state.slots]

    draws = SeededDraws(seed, mode, dit.dtype, dit.device)
    noise = draws.noise(0, (reference.shape[1], mode.block_latents * mode.clip_blocks, *grid))[None]
    noises = noise.split(mode.block_latents, 2)[:blocks]
    distances = [tuple(draws.distance(block, step) for step in range(mode.steps)) for block in range(blocks)]
    audio = _features(system, samples, blocks)
    latents = [
        placed.denoise(noises[index], BlockInputs(index, audio[index], distances[index])) for index in range(blocks)
    ]
    frames = [vae.decode_stream(block, state) for block in latents]
    schedule = mode.schedule()
    return PreparedStream(
        noise=torch.stack(noises),
        audio=audio,
        timesteps=schedule.timesteps[: mode.steps].float(),
        sigmas=schedule.sigmas[: mode.steps + 1].float(),
        distances=torch.tensor(distances),
        text=placed.text,
        condition=placed.sink,
        slots=slots,
        ring_rows=placed.steps[0].cache.k.shape[2],
        latents=torch.stack(latents),
        frames=torch.stack(frames),
    )


def _features(system: LiveAvatarSystem, samples: np.ndarray, blocks: int) -> Tensor:
    """Speech features [blocks, 1, K, C, block frames] of a sound, followed by silence where it is too short."""
    mode = system.mode
    wanted = blocks * mode.block_frames
    sound = torch.zeros(max(wanted * mode.samples_per_frame, mode.lead_frames * mode.samples_per_frame + len(samples)))
    start = mode.lead_frames * mode.samples_per_frame
    sound[start : start + len(samples)] = torch.from_numpy(as_samples(samples).copy())
    extractor = system.audio_features(mode)
    features = torch.cat((extractor.push(sound), extractor.finish()), -1)[..., :wanted]  # [K, C, frames]
    return torch.stack(features.split(mode.block_frames, -1))[:, None].to(system.dit.device)


def traced(system: LiveAvatarSystem, stream: PreparedStream, part: str) -> Part:
    """The part "step" or "decode" for the shapes of a stream."""
    with torch.no_grad():
        if part == "step":
            state = stream.text, stream.condition, stream.rings(system.dit)
            return trace_step(system.dit, stream.noise[0], stream.audio[0], *state)
        return trace_decode(system.vae, stream.latents[0], DecoderState(list(stream.slots)))


def export(
    system: LiveAvatarSystem,
    stream: PreparedStream,
    folder: Path,
    parts: tuple[str, ...] = PARTS,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, float]:
    """Write the packages and the stream into `folder` and run them; the relative L2 error of each part.

    A package takes its name `<part>.pt2` when it has passed its check; until then it is `<part>.unchecked.pt2`, and one
    that fails stays as `<part>.failed.pt2`. Packages that were there before, also of parts that are not written now,
    are removed first: they need not fit the new stream. Errors: OutputError when a package does not run, or does not
    compute what PyTorch does, within `tolerance`; torch.OutOfMemoryError, which says nothing against the package, as
    it comes: `<part>.unchecked.pt2` stays. OutputError also when the folder cannot be written into.
    """
    check_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in PARTS:
            for state in ("", ".unchecked", ".failed"):
                (folder / f"{name}{state}.pt2").unlink(missing_ok=True)
        stream.save(folder / STREAM_FILE)
    except OSError as error:
        raise OutputError(f"cannot write into {folder}: {error.strerror or error}") from error
    errors = {}
    for name in parts:
        tell(f"compiling {name}")
        unchecked = package(traced(system, stream, name), folder / f"{name}.unchecked.pt2")
        tell(f"checking {name}")
        errors[name] = _check(system, stream, name, unchecked)
        unchecked.rename(folder / f"{name}.pt2")
    return errors


def _check(system: LiveAvatarSystem, stream: PreparedStream, part: str, path: Path) -> float:
    """The error of a package; one that fails is renamed, and an OutputError says where it is."""
    limit, failed = tolerance(system), path.with_name(f"{part}.failed.pt2")
    try:
        error = verify(system, stream, part, path)
    except torch.OutOfMemoryError:  # a RuntimeError too
        raise
    except RuntimeError as raised:
        path.replace(failed)
        raise OutputError(f"{failed} does not run ({raised}); do not use it") from raised
    if not error <= limit:  # nor NaN
        path.replace(failed)
        raise OutputError(f"{failed} differs from PyTorch by {error:.1e} (limit {limit:.0e}); do not use it")
    return error


def tolerance(system: LiveAvatarSystem) -> float:
    """Largest relative L2 error of a package against PyTorch after several blocks of a stream.

    Convolutions of float32 may run in TF32 on a GPU, and another layout then rounds elsewhere; in FP8 a value that
    differs by one rounding may be quantised to the next step.
    """
    if any(isinstance(module, Fp8Linear) for module in system.dit.modules()):
        return 1e-1
    if system.dit.dtype != torch.float32:
        return 5e-2
    return 1e-5 if system.dit.device.type == "cpu" else 5e-3


@torch.no_grad()
def verify(system: LiveAvatarSystem, stream: PreparedStream, part: str, path: Path) -> float:
    """Relative L2 error of what the package `path` makes of a stream: the latents of "step", the frames of "decode"."""
    run = torch._inductor.aoti_load_package(str(path))
    if part == "decode":
        slots, made = [slot.contiguous() for slot in stream.slots], []
        for latents in stream.latents:
            frames, *slots = run(latents.contiguous(), *slots)
            made.append(frames)
        return _error(torch.stack(made), stream.frames)
    fixed = [t for state in (stream.text.layers, stream.condition.layers) for pair in state for t in pair]
    rings = [[t for pair in stream.rings(system.dit) for t in pair] for _ in stream.timesteps]
    made = []
    for index, (noise, audio) in enumerate(zip(stream.noise, stream.audio, strict=True)):
        x, block = noise.contiguous(), torch.tensor([index], device=noise.device)
        for step, timestep in enumerate(stream.timesteps.to(noise.device)):
            distance = stream.distances[index, step].reshape(1).to(noise.device)
            found = run(x, timestep.reshape(1).clone(), audio, block, distance, *fixed, *rings[step])
            flow = found[0] if isinstance(found, list | tuple) else found
            x = euler_step(x, flow, stream.sigmas[step], stream.sigmas[step + 1])
        made.append(x)
    return _error(torch.stack(made), stream.latents)


def _error(found: Tensor, wanted: Tensor) -> float:
    difference = (found.double() - wanted.double()).norm() / wanted.double().norm()
    return float(difference)
