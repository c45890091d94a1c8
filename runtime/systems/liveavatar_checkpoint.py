"""The published LiveAvatar: the folder of Wan2.2-S2V-14B and the distilled LoRA (liveavatar.md, 1)."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ...checkpoints_tools.assign import KeyMismatch
from ...checkpoints_tools.keymaps import SameNames
from ...checkpoints_tools.liveavatar import LoraMismatch, load_liveavatar
from ...checkpoints_tools.load import Fp8, load_module
from ...checkpoints_tools.locate import NotFound, locate
from ...checkpoints_tools.read import UnreadableFile
from ...graphs.models.liveavatar import LiveAvatar, LiveAvatarConfig
from ...graphs.models.wan_vae import BF16_AUTOCAST, FLOAT32, WanVae, infer_config
from ..encoders.loading import open_checkpoint
from ..encoders.text import TextEncoder
from ..encoders.umt5 import UMT5_XXL
from ..encoders.wav2vec import Wav2Vec2Encoder
from ..errors import CheckpointError
from .encoder_front_ends import EncodedPrompt, Wav2Vec2Speech
from .liveavatar import LiveAvatarSystem
from .liveavatar_mode import STREAM

BASE = "Wan2.2-S2V-14B"
BASE_REPOSITORY = f"Wan-AI/{BASE}"
LORA_REPOSITORY = "Quark-Vision/Live-Avatar"
TEXT_WEIGHTS = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER = "google/umt5-xxl"
VAE_WEIGHTS = "Wan2.1_VAE.pth"
SPEECH = "wav2vec2-large-xlsr-53-english"
DIT_INDEX = "diffusion_pytorch_model.safetensors.index.json"
LORA = "liveavatar.safetensors"
LORA_FOLDERS = (".", "..", "Live-Avatar", "../Live-Avatar", "LiveAvatar", "../LiveAvatar")
SIZE_AREA = 704 * 384
NEEDED = ("config.json", DIT_INDEX, TEXT_WEIGHTS, TOKENIZER, VAE_WEIGHTS, SPEECH)
PATTERNS = ("config.json", "diffusion_pytorch_model*", TEXT_WEIGHTS, f"{TOKENIZER}/*", VAE_WEIGHTS, f"{SPEECH}/*")
"""What is downloaded of the repository."""


@dataclass(frozen=True)
class PublishedFiles:
    """Where the files of a published LiveAvatar lie, and the names of those that are not there."""

    base: Path
    lora: Path | None
    missing: tuple[str, ...]


def find_files(checkpoint: Path) -> PublishedFiles:
    """Look for the files in a folder laid out as `load_published` takes it; nothing is opened or downloaded."""
    base = checkpoint / BASE if (checkpoint / BASE).is_dir() else checkpoint
    lora = next((base / place / LORA for place in LORA_FOLDERS if (base / place / LORA).is_file()), None)
    lora = lora or _lora_of_hub(download=False)
    missing = [name for name in NEEDED if not (base / name).exists()] + ([] if lora else [LORA])
    return PublishedFiles(base, lora, tuple(missing))


def locate_files(checkpoint: str | os.PathLike[str]) -> PublishedFiles:
    """The files that `checkpoint` means: a folder, or a repository of the Hub with this layout (`locate`).

    What a repository needs is downloaded, the LoRA's own repository included; into a folder of yours nothing is.
    Raises CheckpointError when it is neither.
    """
    try:
        folder = locate(checkpoint, PATTERNS)
    except NotFound as error:
        raise CheckpointError(f"{error}; liveavatar-14b takes the folder of {BASE}, or {BASE_REPOSITORY}") from error
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; pass the folder of {BASE}, which holds {', '.join(NEEDED)}")
    files = find_files(folder)
    if files.lora is None and not Path(checkpoint).expanduser().exists():
        files = PublishedFiles(files.base, _lora_of_hub(download=True), tuple(n for n in files.missing if n != LORA))
    return files


def _lora_of_hub(download: bool) -> Path | None:
    """The LoRA in the Hub's cache, or downloaded into it."""
    try:
        file = locate(LORA_REPOSITORY, [LORA], download=download) / LORA
    except NotFound as error:
        if download:
            raise CheckpointError(f"the LoRA of LiveAvatar cannot be had: {error}") from error
        return None
    return file if file.is_file() else None


def load_published(
    checkpoint: str | os.PathLike[str], dtype: torch.dtype, device: torch.device, fp8: Fp8 | None = None
) -> LiveAvatarSystem:
    """The system of a folder laid out like `Wan-AI/Wan2.2-S2V-14B`, or of a folder that holds it under that name.

    `checkpoint` is such a folder or a repository of the Hub (`locate_files`). `liveavatar.safetensors` (of
    `Quark-Vision/Live-Avatar`) lies in it, beside it, in a folder `Live-Avatar` or `LiveAvatar` there, or in the Hub's
    cache. `fp8`: which linear layers of the transformer are quantised while it is read, None for none.
    Raises CheckpointError that lists everything that is missing, or the file and keys that do not fit.
    """
    files = locate_files(checkpoint)
    base, lora, missing = files.base, files.lora, files.missing
    if missing or lora is None:
        raise CheckpointError(
            f"{base} lacks {', '.join(missing)}; download {BASE_REPOSITORY}, and {LORA} of {LORA_REPOSITORY} into it"
        )
    speech = Wav2Vec2Encoder.load(base / SPEECH, dtype=dtype, device=device)
    dit = _load_transformer(base, lora, speech.size.states, dtype, device, fp8)
    vae = _load_vae(base / VAE_WEIGHTS, dtype, device)
    text = TextEncoder.load(base / TEXT_WEIGHTS, base / TOKENIZER, UMT5_XXL, dtype=torch.bfloat16, device=device)

    return LiveAvatarSystem(
        dit, vae, STREAM, EncodedPrompt(text), Wav2Vec2Speech(speech), size=None, max_area=SIZE_AREA
    )


def _load_vae(path: Path, dtype: torch.dtype, device: torch.device) -> WanVae:
    with open_checkpoint(path) as weights:
        try:
            config = infer_config(weights.meta())
        except (KeyError, ValueError, ZeroDivisionError) as error:
            raise CheckpointError(f"{path} holds no Wan 2.1 VAE ({error!r}); check which file this is") from error
        with torch.device("meta"):
            vae = WanVae(config)
        load_module(vae, weights, SameNames("Wan 2.1 VAE"), dtype=dtype, device=device)
    return vae.set_precision(FLOAT32 if dtype == torch.float32 else BF16_AUTOCAST)


def _load_transformer(
    base: Path, lora: Path, states: int, dtype: torch.dtype, device: torch.device, fp8: Fp8 | None = None
) -> LiveAvatar:
    """The transformer in folder `base`, the LoRA merged into its weights in their own dtype, before cast and `fp8`.

    `states`: hidden states of the speech encoder. Raises CheckpointError.
    """
    try:
        config = LiveAvatarConfig.from_published(json.loads((base / "config.json").read_text()), audio_layers=states)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{base / 'config.json'}: {error}") from error
    index = base / DIT_INDEX
    try:
        return load_liveavatar(index, lora, config, dtype=dtype, device=device, fp8=fp8)
    except KeyMismatch as error:
        raise CheckpointError(f"{index}: {error}") from error
    except (UnreadableFile, LoraMismatch) as error:
        raise CheckpointError(str(error)) from error
