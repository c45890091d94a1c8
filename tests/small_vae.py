"""A VAE of four narrow levels with random weights, and what counts as the same result of it."""

import torch
from kinora.graphs.models.wan_vae import VaeConfig, WanVae
from torch import Tensor

TINY = VaeConfig(
    dim=4,
    z_dim=3,
    dim_mult=(1, 2, 3, 4),
    num_res_blocks=1,
    temporal_downsample=(False, True, True),
    latent_mean=(0.1, -0.2, 0.3),
    latent_std=(1.5, 0.5, 2.0),
)


def make_vae(config: VaeConfig = TINY, seed: int = 0) -> WanVae:
    """Random weights with lively latents, norms included."""
    torch.manual_seed(seed)
    vae = WanVae(config)
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return vae.eval().requires_grad_(False)


def assert_same(computed: Tensor, expected: Tensor) -> None:
    """Equal but for float32 sums in another order: 5e-6 of the largest value; one lost history slot makes 1e-2."""
    bound = 2e-5 * expected.abs().max().item()
    torch.testing.assert_close(computed, expected, atol=bound, rtol=0)
