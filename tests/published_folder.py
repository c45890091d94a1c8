"""The published folder layout of LiveAvatar, with small random networks in every file."""

import json
from pathlib import Path

import pytest
import torch
from kinora.checkpoints_tools.keymaps import UMT5
from kinora.checkpoints_tools.lora import is_target
from kinora.graphs.models.liveavatar import LiveAvatar, LiveAvatarConfig
from kinora.graphs.models.wan_vae import VaeConfig, WanVae
from kinora.runtime.encoders.umt5 import Umt5Encoder, Umt5Size
from kinora.runtime.encoders.wav2vec import Wav2Vec2Encoder
from kinora.runtime.systems import liveavatar_checkpoint as published
from safetensors.torch import save_file
from small_speech import TINY_SPEECH
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

TEXT = Umt5Size(vocab=40, dim=16, heads=2, head_dim=8, ffn=24, layers=2)
DIT = {
    "model_type": "s2v", "dim": 32, "ffn_dim": 48, "num_heads": 2, "num_layers": 2, "freq_dim": 16, "text_dim": 16,
    "text_len": 512, "audio_dim": 16, "num_audio_token": 2, "audio_inject_layers": [0, 1],
}  # fmt: skip
RANK = 4


def write_tokenizer(folder: Path) -> None:
    vocabulary = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", "a", "person"))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special}))


def write_speech(folder: Path) -> None:
    folder.mkdir()
    encoder = Wav2Vec2Encoder(TINY_SPEECH)
    (folder / "config.json").write_text(json.dumps(TINY_SPEECH.to_transformers().to_dict()))
    save_file(
        {f"wav2vec2.{k}": v.contiguous() for k, v in encoder.model.state_dict().items()}, folder / "model.safetensors"
    )


def lora_of(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    modules = [key.removesuffix(".weight") for key in weights if key.endswith(".weight")]
    found = {}
    for module in filter(is_target, modules):
        rows, columns = weights[f"{module}.weight"].shape
        found[f"{module}.lora_A.default.weight"] = torch.randn(RANK, columns).bfloat16()
        found[f"{module}.lora_B.default.weight"] = 0.05 * torch.randn(rows, RANK).bfloat16()
    return found


def write_published(root: Path) -> Path:
    """Wan2.2-S2V-14B and, beside it, the LoRA; load it with `make_text_small`."""
    base = root / published.BASE
    base.mkdir()
    torch.manual_seed(0)
    dit = LiveAvatar(LiveAvatarConfig.from_published(DIT, audio_layers=TINY_SPEECH.states))
    weights = {key: (0.2 * torch.randn_like(value)).bfloat16() for key, value in dit.state_dict().items()}
    keys, index = sorted(weights), {}
    for part in range(2):
        name = f"diffusion_pytorch_model-0000{part + 1}-of-00002.safetensors"
        save_file({key: weights[key] for key in keys[part::2]}, base / name)
        index |= dict.fromkeys(keys[part::2], name)
    (base / published.DIT_INDEX).write_text(json.dumps({"weight_map": index}))
    (base / "config.json").write_text(json.dumps(DIT))
    (root / "Live-Avatar").mkdir()
    save_file(lora_of(weights), root / "Live-Avatar" / published.LORA)
    vae = WanVae(VaeConfig(4, 16, (1, 2, 2, 2), 1, (False, True, True), (0.0,) * 16, (1.0,) * 16))
    torch.save(vae.state_dict(), base / published.VAE_WEIGHTS)
    torch.save(UMT5.invert(dict(Umt5Encoder(TEXT).model.named_parameters())), base / published.TEXT_WEIGHTS)
    write_tokenizer(base / published.TOKENIZER)
    write_speech(base / published.SPEECH)
    return root


def make_text_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one size that is not read from the files."""
    monkeypatch.setattr(published, "UMT5_XXL", TEXT)
