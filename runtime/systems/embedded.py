"""A small model in one folder: `config.json` and one safetensors file with keys `dit.*`, `vae.*`, `speech.*`.

`config.json` holds `size` [height, width], the sizes of the three networks, and `mode`: what differs from the default
`GenerationMode`. Such a model knows no words: its prompt is a constant of zeros.
"""

import json
from pathlib import Path
from typing import Any

import torch

from ...graphs.models.liveavatar import LiveAvatar, LiveAvatarConfig
from ...graphs.models.speech import SpeechConfig, SpeechFrontEnd
from ...graphs.models.wan_vae import BF16_AUTOCAST, FLOAT32, VaeConfig, WanVae
from ..errors import CheckpointError, InputError
from .config_values import from_json
from .front_ends import FixedPrompt, SmallSpeech
from .liveavatar import LiveAvatarSystem
from .liveavatar_mode import GenerationMode
from .weights import assign_weights, read_weights

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "tiny.safetensors"


def load_embedded(folder: Path, dtype: torch.dtype, device: torch.device) -> LiveAvatarSystem:
    """The model of a folder. Raises CheckpointError for missing files, wrong keys or a configuration that is none."""
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {', '.join(missing)}; train with `python -m kinora.train.tiny` or reinstall"
        )
    config, dit, vae, speech = read_config(folder / CONFIG_FILE)
    try:
        mode = from_json(GenerationMode, config["mode"])
        height, width = config["size"]
    except (ValueError, TypeError, KeyError, AttributeError, InputError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} is no configuration of this model: {error!r}") from error
    state = read_weights(folder / WEIGHTS_FILE)
    parts = {"dit": dit, "vae": vae, "speech": speech}
    for prefix, module in parts.items():
        own = {k.removeprefix(f"{prefix}."): state.pop(k) for k in list(state) if k.startswith(f"{prefix}.")}
        kept = torch.float32 if module is speech else dtype
        assign_weights(module, own, folder / WEIGHTS_FILE, f"{prefix} network", kept, device)
    if state:
        raise CheckpointError(f"{folder / WEIGHTS_FILE} holds keys of no network: {', '.join(sorted(state)[:12])}")
    vae.set_precision(FLOAT32 if dtype == torch.float32 else BF16_AUTOCAST)
    prompt = torch.zeros(dit.config.text_len, dit.config.text_dim)
    return LiveAvatarSystem(
        dit,
        vae,
        mode,
        encode_prompt=FixedPrompt(prompt),
        audio_features=SmallSpeech(speech, device),
        size=(height, width),
    )


def read_config(path: Path) -> tuple[dict[str, Any], LiveAvatar, WanVae, SpeechFrontEnd]:
    """A model's `config.json`, and its networks on the meta device. Raises CheckpointError for another file."""
    try:
        config = json.loads(path.read_text())
        with torch.device("meta"):
            dit = LiveAvatar(from_json(LiveAvatarConfig, config["dit"]))
            vae = WanVae(from_json(VaeConfig, config["vae"]))
            speech = SpeechFrontEnd(from_json(SpeechConfig, config["speech"]))
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise CheckpointError(f"{path} is no configuration of this model: {error!r}") from error
    return config, dit, vae, speech
