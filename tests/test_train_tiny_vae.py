"""Training of the embedded model: the stage of the VAE."""

import pytest
import torch
from kinora.train.tiny import vae_stage
from kinora.train.tiny.clips import ClipSource
from tiny_training import CPU, bank, small


def test_pieces_open_with_17_frames_and_go_on_with_16() -> None:
    recipe = small(vae_pieces=3, vae_crop=16)
    stream = vae_stage.pieces(ClipSource(bank(2, 6.0), recipe, CPU, 0), recipe)
    drawn = [next(stream) for _ in range(6)]
    assert [opens for opens, _ in drawn] == [True, False, False] * 2
    assert [video.shape[2] for _, video in drawn] == [17, 16, 16] * 2
    assert recipe.vae_frames == 49


def test_the_vaes_loss_counts_motion_and_the_first_frame() -> None:
    video = torch.zeros(1, 3, 5, 32, 32)
    video[:, :, 2, 4, 4] = 1.0
    assert vae_stage.reconstruction_loss(video, video, True) == 0

    def off_by(frame: int, row: int, opens: bool) -> float:
        decoded = video.clone()
        decoded[:, :, frame, row, 4] += 0.5
        return float(vae_stage.reconstruction_loss(decoded, video, opens))

    assert off_by(2, 4, False) > off_by(3, 4, False)  # the pixel that moves, when it moves
    assert off_by(0, 2, True) > off_by(0, 2, False) == pytest.approx(off_by(1, 2, False))


@torch.no_grad()
def test_latents_are_normalised_with_measured_statistics() -> None:
    vae = vae_stage.WanVae(vae_stage.vae_config(small())).eval()
    video = torch.rand(2, 3, 9, 32, 32) * 2 - 1
    latents = vae_stage.with_statistics(vae, video).encode(video)
    assert torch.allclose(latents.mean((0, 2, 3, 4)), torch.zeros(16), atol=1e-3)
    assert torch.allclose(latents.std((0, 2, 3, 4)), torch.ones(16), atol=1e-3)
