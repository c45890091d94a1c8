"""Start values of LiveAvatar for training from scratch (liveavatar.md, 2.10)."""

import torch
from torch import nn

from .liveavatar import LiveAvatar
from .liveavatar_block import Block, Head


@torch.no_grad()
def init_weights(dit: LiveAvatar) -> None:
    """Draw all weights of `dit`, in place."""
    for module in dit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv1d | nn.Conv3d | nn.Embedding):
            module.reset_parameters()
        elif isinstance(module, Block | Head):
            nn.init.normal_(module.modulation, std=dit.config.dim**-0.5)
    nn.init.xavier_uniform_(dit.patch_embedding.weight.flatten(1))
    for module in (*dit.text_embedding, *dit.time_embedding):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
    nn.init.zeros_(dit.head.head.weight)
    nn.init.constant_(dit.casual_audio_encoder.weights, 0.01)
    nn.init.zeros_(dit.casual_audio_encoder.encoder.padding_tokens)
    if dit.config.zero_init:
        injector = dit.audio_injector
        zeroed: list[nn.Module] = [dit.trainable_cond_mask, dit.cond_encoder]
        zeroed += [layer.get_submodule("o") for layer in injector.injector]
        if dit.config.enable_adain:
            zeroed += list(injector.injector_adain_layers)
        for parameter in (p for part in zeroed for p in part.parameters()):
            nn.init.zeros_(parameter)
