"""Live speech features: any cut of the sound gives the same features, in time with it, in flat memory."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinora.runtime.encoders.live_audio import LiveAudioFeatures, LiveWindow
from kinora.runtime.encoders.wav2vec import Wav2Vec2Encoder, normalise_waveform
from kinora.runtime.errors import InputError
from small_speech import TINY_SPEECH
from torch import Tensor


def pull(live: LiveAudioFeatures, sound: Tensor, cuts: list[int]) -> Tensor:
    """Push `sound` in pieces that end at `cuts`, then finish."""
    pieces = torch.tensor_split(sound, sorted(cuts))
    return torch.cat([*(live.push(piece) for piece in pieces), live.finish()], -1)


TINY_WINDOW = LiveWindow(context_seconds=0.5, lookahead_seconds=0.1, hop_frames=5)


@pytest.fixture(scope="module")
def speech() -> Wav2Vec2Encoder:
    torch.manual_seed(3)
    return Wav2Vec2Encoder(TINY_SPEECH)


@settings(max_examples=15, deadline=None)
@given(samples=st.integers(0, 24_000), data=st.data())
def test_live_features_do_not_depend_on_the_pieces(speech: Wav2Vec2Encoder, samples: int, data: st.DataObject) -> None:
    sound = torch.randn(samples, generator=torch.Generator().manual_seed(samples)) * 0.1
    cuts = data.draw(st.lists(st.integers(0, samples), max_size=12))
    whole = pull(LiveAudioFeatures.of_wav2vec2(speech, TINY_WINDOW), sound, [])
    pieces = pull(LiveAudioFeatures.of_wav2vec2(speech, TINY_WINDOW), sound, cuts)
    assert whole.shape == (3, 16, math.ceil(samples / 640))
    assert torch.equal(whole, pieces)


def heard(wave: Tensor) -> Tensor:
    """A frame encoder that gives the mean of each 320 samples: [1, T, 1]."""
    return wave.unfold(0, 320, 320).mean(-1).view(1, -1, 1)


@pytest.mark.parametrize("lookahead", [0.02, 0.2, 0.7])
@pytest.mark.parametrize("context", [0.02, 0.3, 9.0])
def test_live_features_are_in_time_with_the_sound(context: float, lookahead: float) -> None:
    window = LiveWindow(context_seconds=context, lookahead_seconds=lookahead)
    clock = torch.arange(5 * 16_000) / 16_000
    features = pull(LiveAudioFeatures(heard, 1, 1, window, normalise=False), clock, [7, 30_000])[0, 0]
    wanted = torch.round(torch.arange(125, dtype=torch.float64) / 25 * 30) / 30 + 159.5 / 16_000
    torch.testing.assert_close(features[:124].double(), wanted[:124], rtol=0, atol=1e-5)


def test_live_features_are_those_of_the_whole_sound_when_all_of_it_is_context(speech: Wav2Vec2Encoder) -> None:
    sound = torch.randn(16_320) * 0.2  # one step and its lookahead
    window = LiveWindow(context_seconds=0.02, lookahead_seconds=0.02, hop_frames=25)
    features = LiveAudioFeatures.of_wav2vec2(speech, window).push(sound)
    states = speech.stacked(normalise_waveform(sound))
    places = np.round(np.arange(25) / 25 * 30) * 5 / 3
    wanted = np.stack([[np.interp(places, np.arange(states.shape[1]), c.numpy()) for c in state.T] for state in states])
    torch.testing.assert_close(features, torch.from_numpy(wanted).float(), rtol=1e-4, atol=1e-4)


def test_live_memory_is_flat_and_steps_come_when_their_lookahead_is_complete() -> None:
    window = LiveWindow(context_seconds=1.0, lookahead_seconds=0.2)
    live = LiveAudioFeatures(heard, 1, 1, window)
    bound = window.context + window.hop + window.lookahead
    assert live.push(torch.zeros(window.hop + window.lookahead - 1)).shape == (1, 1, 0)
    assert live.push(torch.zeros(1)).shape == (1, 1, 12)
    for _ in range(300):
        live.push(torch.randn(1000))
        assert len(live.buffer) <= bound and live.buffer.untyped_storage().nbytes() <= 4 * (bound + 1000)


def test_live_normalisation_uses_all_that_was_heard() -> None:
    levels: list[Tensor] = []

    def keep(wave: Tensor) -> Tensor:
        levels.append(wave)
        return heard(wave)

    sound = torch.randn(32_000) * 0.3 + 0.1
    window = LiveWindow(context_seconds=0.2, lookahead_seconds=0.1)
    pull(LiveAudioFeatures(keep, 1, 1, window), sound, [100, 9000])
    for step, wave in enumerate(levels[:-1]):
        end = (step + 1) * window.hop + window.lookahead
        start = max(0, step * window.hop - window.context)
        wanted = normalise_waveform(sound[: min(end, 32_000)])[start:]
        torch.testing.assert_close(wave[: len(wanted)], wanted, rtol=1e-4, atol=1e-4)


def test_live_errors() -> None:
    live = LiveAudioFeatures(heard, 1, 1, TINY_WINDOW)
    with pytest.raises(InputError, match="int16"):
        live.push(torch.zeros(4, dtype=torch.int16))
    with pytest.raises(InputError, match="NaN"):
        live.push(torch.tensor([math.nan]))
    assert live.finish().shape == (1, 1, 0)
    with pytest.raises(InputError, match="start a new one"):
        live.push(torch.zeros(4))
    with pytest.raises(ValueError, match="hop_frames"):
        LiveWindow(fps=24, hop_frames=1)
    with pytest.raises(ValueError, match=r"at least 0\.02"):
        LiveWindow(context_seconds=0.0)
    with pytest.raises(ValueError, match="positive"):
        LiveWindow(hop_frames=0)
    with pytest.raises(ValueError, match="expected"):
        LiveAudioFeatures(heard, 2, 1, TINY_WINDOW).push(torch.zeros(16_000))
