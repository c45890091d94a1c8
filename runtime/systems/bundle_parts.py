"""A loaded system as the parts of a bundle, and what the manifest says of them; `bundle.py` goes the other way.

Parts: `dit`, `vae`, `speech`, `text`. Weights have the names under which their modules know them: the published ones
for the transformer and the VAE, those of `transformers` for the encoders.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoints_tools.bundle.layout import execution_order
from ...graphs.models.wan_vae import BF16_AUTOCAST, FLOAT32
from ...graphs.quantize import Fp8Linear
from ..errors import CheckpointError
from .config_values import to_json
from .front_ends import FixedPrompt, SmallSpeech
from .liveavatar import LiveAvatarSystem

TOKENIZER = "tokenizer"
VAE_PRECISIONS = {"float32": FLOAT32, "bfloat16": BF16_AUTOCAST}


@dataclass(frozen=True)
class SystemParts:
    """Part -> key -> tensor in execution order; sections of the manifest; files to copy by their path in the bundle."""

    tensors: dict[str, dict[str, Tensor]]
    manifest: dict[str, Any]
    copies: dict[str, Path] = field(default_factory=dict)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """All persistent tensors of a module, one name for a tensor that has several, in the module's order."""
    first = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    return {name: value for name, value in module.state_dict().items() if name in first}


def parts_of(system: LiveAvatarSystem) -> SystemParts:
    """Everything that a bundle holds of a system. CheckpointError for front ends that no bundle can hold."""
    dit, vae = system.dit, system.vae
    layers = {name: module for name, module in dit.named_modules() if isinstance(module, Fp8Linear)}
    granularities = {layer.granularity for layer in layers.values()}
    if len(granularities) > 1:
        raise CheckpointError(f"a bundle has one kind of FP8 layers, this model has {', '.join(granularities)}")
    weights = weights_of(dit)
    tensors = {
        "dit": {name: weights[name] for name in execution_order(weights, dit.config.audio_inject_layers)},
        "vae": weights_of(vae),
    }
    named = {precision: name for name, precision in VAE_PRECISIONS.items()}
    if vae.precision not in named:
        raise CheckpointError(f"a bundle holds no VAE that rounds as {vae.precision}")
    sections: dict[str, Any] = {
        "dit": {
            "config": to_json(dit.config),
            "dtype": _name(dit.dtype),
            "fp8": {"granularity": granularities.pop(), "layers": list(layers)} if layers else None,
        },
        "vae": {"config": to_json(vae.config), "precision": named[vae.precision]},
    }
    copies: dict[str, Path] = {}
    tensors["speech"], sections["speech"] = _speech(system)
    tensors["text"], sections["text"] = _text(system, copies)
    manifest = {
        "architecture": "liveavatar",
        "precision": "fp8" if layers else _name(dit.dtype),
        "parts": sections,
        "mode": to_json(system.mode),
        "size": None if system.size is None else list(system.size),
        "max_area": system.max_area,
    }
    return SystemParts(tensors, manifest, copies)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _speech(system: LiveAvatarSystem) -> tuple[dict[str, Tensor], dict[str, Any]]:
    front = system.audio_features
    if isinstance(front, SmallSpeech):
        dtype = front.front_end.project.weight.dtype
        section = {"kind": "small", "config": to_json(front.front_end.config), "dtype": _name(dtype)}
        return weights_of(front.front_end), section
    from .encoder_front_ends import Wav2Vec2Speech

    if isinstance(front, Wav2Vec2Speech):
        dtype = front.encoder.model.masked_spec_embed.dtype
        section = {"kind": "wav2vec2", "config": to_json(front.encoder.size), "dtype": _name(dtype)}
        return weights_of(front.encoder.model), section
    raise CheckpointError("a bundle cannot hold the audio front end of this system; load it with kinora.runtime.load")


def _text(system: LiveAvatarSystem, copies: dict[str, Path]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    prompt = system.encode_prompt
    if isinstance(prompt, FixedPrompt):
        return {"rows": prompt.rows}, {"kind": "fixed", "prompt": prompt.words}
    from .encoder_front_ends import EncodedPrompt

    if isinstance(prompt, EncodedPrompt):
        encoder, folder = prompt.encoder.encoder, Path(prompt.encoder.tokenizer.tokenizer.name_or_path)
        copies.update({f"{TOKENIZER}/{path.name}": path for path in sorted(folder.iterdir()) if path.is_file()})
        dtype = encoder.model.shared.weight.dtype
        return weights_of(encoder.model), {"kind": "umt5", "config": to_json(encoder.size), "dtype": _name(dtype)}
    raise CheckpointError("a bundle cannot hold the text encoder of this system; load it with kinora.runtime.load")
