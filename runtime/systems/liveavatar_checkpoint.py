"""The published LiveAvatar: the folder of Wan2.2-S2V-14B and the distilled LoRA (liveavatar.md, 1)."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from ...checkpoints_tools.lora import merge_lora
from ...graphs.models.liveavatar import LiveAvatar, LiveAvatarConfig
from ...graphs.models.wan_vae import BF16_AUTOCAST, FLOAT32, WanVae, infer_config
from ..encoders.text import TextEncoder
from ..encoders.umt5 import UMT5_XXL
from ..encoders.wav2vec import Wav2Vec2Encoder
from ..errors import CheckpointError
from .encoder_front_ends import EncodedPrompt, Wav2Vec2Speech
from .liveavatar import LiveAvatarSystem
from .liveavatar_mode import STREAM
from .weights import assign_weights, read_weights

BASE = "Wan2.2-S2V-14B"
TEXT_WEIGHTS = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER = "google/umt5-xxl"
VAE_WEIGHTS = "Wan2.1_VAE.pth"
SPEECH = "wav2vec2-large-xlsr-53-english"
DIT_INDEX = "diffusion_pytorch_model.safetensors.index.json"
LORA = "liveavatar.safetensors"
LORA_FOLDERS = (".", "..", "Live-Avatar", "../Live-Avatar")
LORA_ALPHA = 64.0
SIZE_AREA = 704 * 384


@dataclass(frozen=True)
class PublishedFiles:
    """Where the files of a published LiveAvatar lie, and the names of those that are not there."""

    base: Path
    lora: Path | None
    missing: tuple[str, ...]


def find_files(checkpoint: Path) -> PublishedFiles:
    """Look for the files in a folder laid out as `load_published` takes it; nothing is opened."""
    base = checkpoint / BASE if (checkpoint / BASE).is_dir() else checkpoint
    lora = next((base / place / LORA for place in LORA_FOLDERS if (base / place / LORA).is_file()), None)
    needed = ["config.json", DIT_INDEX, TEXT_WEIGHTS, TOKENIZER, VAE_WEIGHTS, SPEECH]
    missing = [name for name in needed if not (base / name).exists()] + ([] if lora else [LORA])
    return PublishedFiles(base, lora, tuple(missing))


def load_published(checkpoint: Path, dtype: torch.dtype, device: torch.device) -> LiveAvatarSystem:
    """The system of a folder laid out like `Wan-AI/Wan2.2-S2V-14B`, or of a folder that holds it under that name.

    `liveavatar.safetensors` (of `Quark-Vision/Live-Avatar`) lies in it, beside it, or in a folder `Live-Avatar` there.
    Raises CheckpointError that lists everything that is missing, or the file and keys that do not fit.
    """
    files = find_files(checkpoint)
    base, lora, missing = files.base, files.lora, files.missing
    if missing or lora is None:
        raise CheckpointError(
            f"{base} lacks {', '.join(missing)}; download Wan-AI/{BASE}, and {LORA} of Quark-Vision/Live-Avatar into it"
        )
    speech = Wav2Vec2Encoder.load(base / SPEECH, dtype=dtype, device=device)
    dit = _load_dit(base, lora, speech.size.states, dtype, device)
    vae = _load_vae(base / VAE_WEIGHTS, dtype, device)
    text = TextEncoder.load(base / TEXT_WEIGHTS, base / TOKENIZER, UMT5_XXL, dtype=torch.bfloat16, device=device)

    return LiveAvatarSystem(
        dit, vae, STREAM, EncodedPrompt(text), Wav2Vec2Speech(speech), size=None, max_area=SIZE_AREA
    )


def _load_vae(path: Path, dtype: torch.dtype, device: torch.device) -> WanVae:
    weights = read_weights(path)
    try:
        config = infer_config(weights)
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path} holds no Wan 2.1 VAE ({error!r}); check which file this is") from error
    with torch.device("meta"):
        vae = WanVae(config)
    assign_weights(vae, weights, path, "Wan 2.1 VAE", dtype, device)
    return vae.set_precision(FLOAT32 if dtype == torch.float32 else BF16_AUTOCAST)


def _load_dit(base: Path, lora: Path, states: int, dtype: torch.dtype, device: torch.device) -> LiveAvatar:
    """The transformer with the LoRA merged into its weights, in their own dtype, before any cast."""
    try:
        config = LiveAvatarConfig.from_published(json.loads((base / "config.json").read_text()), audio_layers=states)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{base / 'config.json'}: {error}") from error
    with torch.device("meta"):
        dit = LiveAvatar(config)
    weights = read_weights(base / DIT_INDEX)
    try:
        merge_lora(weights, read_weights(lora), LORA_ALPHA)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{lora} does not fit {base}: {error.args[0]}") from error
    assign_weights(dit, weights, base / DIT_INDEX, "LiveAvatar transformer", dtype, device)
    return dit
