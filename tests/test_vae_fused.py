"""The streams of fused kernels: equal to the plain VAE however a clip is cut, on the references and on the kernels."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from kinora.graphs.models.wan_vae import VaeConfig
from kinora.graphs.rewrite.wan_vae import StreamingDecoder, StreamingEncoder
from kinora.graphs.rewrite.wan_vae_stages import Scratch
from kinora.kernels.dispatch import using
from small_vae import TINY, make_vae
from torch import Tensor

FLAT = replace(TINY, dim_mult=(2,), temporal_downsample=())
CUTS = [[1, 1, 1, 1, 1], [5], [3, 2], [2, 3], [1, 3, 1]]


def relative(computed: Tensor, expected: Tensor) -> float:
    return ((computed - expected).norm() / expected.norm()).item()


@pytest.fixture(params=[False, True], ids=["references", "ops"])
def registered(request: pytest.FixtureRequest) -> Iterator[None]:
    with using(request.param):
        yield


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("config", [TINY, FLAT, replace(TINY, temporal_downsample=(True, False, True))], ids=repr)
def test_any_cut_decodes_like_the_plain_vae(config: VaeConfig, cut: list[int]) -> None:
    vae, latents = make_vae(config), torch.randn(2, 3, sum(cut), 2, 3)
    expected = vae.decode(latents, clamp=False)
    decoder = StreamingDecoder(vae, 2, 3, latents=max(cut), batch=2, bound=None)
    for _ in range(2):  # a second stream finds nothing of the first
        parts = [decoder.step(part).clone() for part in latents.split(cut, 2)]
        assert relative(torch.cat(parts, 2), expected) < 1e-5
        decoder.reset()


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("config", [TINY, FLAT, replace(TINY, temporal_downsample=(True, False, True))], ids=repr)
def test_any_cut_encodes_like_the_plain_vae(config: VaeConfig, cut: list[int]) -> None:
    vae = make_vae(config)
    factor = config.spatial_factor
    clip = torch.rand(2, 3, config.pixel_frames(sum(cut)), 2 * factor, 3 * factor) * 2 - 1
    expected = vae.encode(clip)
    encoder = StreamingEncoder(vae, 2 * factor, 3 * factor, latents=max(cut), batch=2)
    sizes = [config.temporal_factor * n for n in cut]
    sizes[0] -= config.temporal_factor - 1
    for _ in range(2):
        parts = [encoder.step(part).clone() for part in clip.split(sizes, 2)]
        assert relative(torch.cat(parts, 2), expected) < 1e-5
        encoder.reset()


@pytest.mark.parametrize("batch", [1, 2])
def test_streams_that_take_turns_share_their_scratch(batch: int) -> None:
    """Two decoders and an encoder of fewer frames, step by step in turn: bit for bit what each gives alone."""
    vae, factor = make_vae(TINY), TINY.spatial_factor
    latents = torch.randn(2, batch, 3, 6, 2, 3)
    clip = torch.rand(batch, 3, 1 + 5 * TINY.temporal_factor, 2 * factor, 3 * factor) * 2 - 1
    sizes = [1] + [TINY.temporal_factor] * 5

    def streams(scratch: Scratch | None) -> tuple[StreamingDecoder, StreamingDecoder, StreamingEncoder]:
        first, second = (StreamingDecoder(vae, 2, 3, latents=2, batch=batch, scratch=scratch) for _ in range(2))
        return first, second, StreamingEncoder(vae, 2 * factor, 3 * factor, 1, batch, scratch)

    def run(*made: StreamingDecoder | StreamingEncoder) -> list[Tensor]:
        given = [*(part.split((1, 2, 2, 1), 2) for part in latents), clip.split(sizes, 2)]
        parts: list[list[Tensor]] = [[], [], []]
        for turn in range(len(sizes)):
            for stream, pieces, found in zip(made, given, parts, strict=True):
                if turn < len(pieces):
                    found.append(stream.step(pieces[turn]).clone())
        return [torch.cat(found, 2) for found in parts]

    scratch = Scratch()
    together, alone = run(*streams(scratch)), run(*streams(None))
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))
    if batch == 1:
        count = len(scratch.buffers)
        streams(scratch)
        assert len(scratch.buffers) == count  # further streams take no more


SMALL = VaeConfig(16, 3, (1, 2), 1, (True,), (0.1, -0.2, 0.3), (1.5, 0.5, 2.0))


def test_streams_on_the_kernels(kernel_device: torch.device) -> None:
    vae = make_vae(SMALL).to(kernel_device)
    latents = torch.randn(1, 3, 3, 3, 2, device=kernel_device)
    clip = torch.rand(1, 3, 5, 6, 4, device=kernel_device) * 2 - 1
    decoder, encoder = StreamingDecoder(vae, 3, 2, latents=2), StreamingEncoder(vae, 6, 4, latents=2)
    frames = torch.cat([decoder.step(part).clone() for part in latents.split([1, 2], 2)], 2)
    encoded = torch.cat([encoder.step(part).clone() for part in clip.split([1, 4], 2)], 2)
    with using(False):
        assert relative(frames, vae.decode(latents)) < 1e-5
        assert relative(encoded, vae.encode(clip)) < 1e-5


def test_bf16_stays_near_float32(kernel_device: torch.device) -> None:
    vae = make_vae(SMALL).to(kernel_device)
    latents = torch.randn(1, 3, 2, 3, 2, device=kernel_device)
    with using(False):
        expected = vae.decode(latents)
    frames = StreamingDecoder(vae.bfloat16(), 3, 2, latents=2).step(latents)
    assert frames.dtype == torch.float32
    # the whole network, in an interpreter that truncates
    assert 1e-4 < relative(frames, expected) < 5e-2


def test_wrong_chunks_are_refused() -> None:
    vae = make_vae(TINY)
    decoder, encoder = StreamingDecoder(vae, 2, 3, latents=2), StreamingEncoder(vae, 16, 24, latents=2)
    for shape in ((1, 3, 3, 2, 3), (2, 3, 1, 2, 3), (1, 3, 1, 3, 3), (3, 1, 2, 3)):
        with pytest.raises(ValueError, match=r"this decoder takes \(1, 3, 2, 2, 3\), or fewer frames"):
            decoder.step(torch.zeros(shape))
    with pytest.raises(ValueError, match="this encoder takes"):
        encoder.step(torch.zeros(1, 3, 9, 16, 24))
    with pytest.raises(ValueError, match="4 frames do not complete a latent frame"):
        encoder.step(torch.zeros(1, 3, 4, 16, 24))
    encoder.step(torch.zeros(1, 3, 5, 16, 24))
    with pytest.raises(ValueError, match="goes on with multiples"):
        encoder.step(torch.zeros(1, 3, 5, 16, 24))
    with pytest.raises(ValueError, match="multiples of 8"):
        StreamingEncoder(vae, 20, 24)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU captures")
def test_capture_needs_a_gpu() -> None:
    with pytest.raises(RuntimeError, match="CUDA graphs need a GPU"):
        StreamingDecoder(make_vae(TINY), 2, 3).capture()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_captured_stream_equals_the_eager_one() -> None:
    vae = make_vae(SMALL).cuda().bfloat16()
    latents = torch.randn(1, 3, 6, 3, 2, device="cuda")
    clip = torch.rand(1, 3, 11, 6, 4, device="cuda") * 2 - 1
    for stream, parts in (
        (StreamingDecoder(vae, 3, 2, latents=2), latents.split(2, 2)),
        (StreamingEncoder(vae, 6, 4, latents=2), clip.split([3, 4, 4], 2)),
    ):
        eager = [stream.step(part).clone() for part in parts]
        stream.capture()
        for part, expected in zip(parts, eager, strict=True):
            assert torch.equal(stream.step(part), expected)
