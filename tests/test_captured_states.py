"""The speech encoder as CUDA graphs, on a CPU as plain calls: the same values, recorded before a session needs them."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kinora.bench import speech as speech_bench
from kinora.graphs.capture import Replay, shared_pool
from kinora.runtime import Avatar, load
from kinora.runtime.encoders import captured_states
from kinora.runtime.encoders.captured_states import CapturedStates
from kinora.runtime.encoders.live_audio import LiveAudioFeatures, LiveWindow
from kinora.runtime.encoders.wav2vec import Wav2Vec2Encoder
from kinora.runtime.placement.engines import CapturedPlacement, SinglePlacement
from kinora.runtime.systems.encoder_front_ends import Wav2Vec2Speech
from kinora.runtime.systems.liveavatar_mode import STREAM
from small_model import SPEECH, sound, write_model
from small_speech import TINY_SPEECH
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MODE = replace(STREAM, motion_frames=9)


def encoder(**changes: Any) -> Wav2Vec2Encoder:
    torch.manual_seed(3)
    return Wav2Vec2Encoder(replace(TINY_SPEECH, **changes))


def noise(samples: int, seed: int = 0) -> Tensor:
    return torch.randn(samples, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def eager_lengths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry a sound that was encoded launch by launch."""
    found: list[int] = []
    stacked = Wav2Vec2Encoder.stacked

    def counted(self: Wav2Vec2Encoder, wave: Tensor) -> Tensor:
        found.append(len(wave))
        return stacked(self, wave)

    monkeypatch.setattr(Wav2Vec2Encoder, "stacked", counted)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recorded_lengths_give_the_values_of_the_encoder(dtype: torch.dtype, eager_lengths: list[int]) -> None:
    speech = encoder().to(dtype)
    states = CapturedStates(speech, None, nullcontext())
    states.record([3_000, 8_000])
    waves = [noise(n, seed) for seed, n in enumerate([8_000, 3_000, 8_000, 3_000])]
    found = [states.stacked(wave) for wave in waves]
    assert not eager_lengths
    for states_found, wave in zip(found, waves, strict=True):  # also those before a later call used the same buffers
        assert states_found.dtype == dtype and torch.equal(states_found.float(), speech.stacked(wave))
    assert torch.equal(states.stacked(noise(5_000)), speech.stacked(noise(5_000)))
    assert eager_lengths[-2:] == [5_000, 5_000]


def test_the_number_of_lengths_is_bounded_and_the_longest_come_first(
    monkeypatch: pytest.MonkeyPatch, eager_lengths: list[int]
) -> None:
    monkeypatch.setattr(captured_states, "MOST_LENGTHS", 3)
    states = CapturedStates(encoder(), None, nullcontext())
    states.record([2_000, 1_000])
    buffers = {window.wave.untyped_storage().data_ptr() for window in states.windows.values()}
    assert len(buffers) == 1, "one waveform for all"
    states.record([1_000, 4_000, 3_000])
    states.record([5_000])
    assert set(states.windows) == {1_000, 2_000, 4_000}
    states.stacked(noise(5_000))
    assert eager_lengths == [5_000]


@pytest.mark.parametrize("context", [0.02, 0.5, 0.96, 4.0])
def test_a_window_knows_its_lengths(context: float) -> None:
    window = LiveWindow(context_seconds=context)
    seen: list[int] = []

    def encode(wave: Tensor) -> Tensor:
        seen.append(len(wave))
        return torch.zeros(1, len(wave) // 320, 1)

    live = LiveAudioFeatures(encode, 1, 1, window)
    live.push(torch.zeros(12 * window.hop + 100))
    live.finish()
    assert tuple(dict.fromkeys(seen)) == window.lengths and len(seen) > len(window.lengths)


def test_a_session_hears_the_same_and_records_nothing_of_its_own(eager_lengths: list[int]) -> None:
    plain = Wav2Vec2Speech(encoder())
    captured = plain.captured(None, nullcontext())
    spoken = 0.1 * noise(16_000 * 6)

    def heard(features: LiveAudioFeatures) -> Tensor:
        return torch.cat([*(features.push(piece) for piece in spoken.split(7_000)), features.finish()], -1)

    extractor, other = captured(MODE), captured(MODE)
    recorded = dict(captured.states.windows)
    assert tuple(sorted(recorded)) == LiveWindow(hop_frames=MODE.block_frames, fps=MODE.fps).lengths
    assert torch.equal(heard(extractor), heard(other))
    assert captured.states.windows == recorded and not eager_lengths
    assert torch.equal(heard(captured(MODE)), heard(plain(MODE)))


class Host(TorchDispatchMode):
    """Notes every operation that reads the host's memory, or copies or reads a value to there; a random number that
    the host draws for itself (layer dropping, which inference ignores) is in no graph."""

    def __init__(self) -> None:
        super().__init__()
        self.touched: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = (
            [leaf for leaf in tree_leaves(some) if isinstance(leaf, Tensor)] for some in ((args, kwargs), result)
        )
        on_host = any(t.device.type == "cpu" for t in (*given, *(made if given else ())))
        if on_host or "_local_scalar_dense" in str(func):
            self.touched.append(str(func))
        return result


def test_a_graph_can_hold_the_encoder() -> None:
    """Nothing in it comes from the host or is read there; on the meta device a read would fail as well."""
    with torch.device("meta"):
        speech = encoder()
    states = CapturedStates(speech.to("meta"), None, nullcontext())
    states.record([4_000])
    with torch.inference_mode(), Host() as host:
        states.windows[4_000].replay()
        assert not host.touched
        states.stacked(noise(4_000))
    assert host.touched, "the waveform comes from the host"
    assert states.windows[4_000].states.shape == (3, TINY_SPEECH.frames(4_000), 16)


def test_graphs_hold_their_turn_while_they_work(monkeypatch: pytest.MonkeyPatch) -> None:
    turn, held = threading.Lock(), list[bool]()
    monkeypatch.setattr(Replay, "record", lambda _: held.append(turn.locked()))
    speech = encoder()
    speech.model.feature_projection.register_forward_hook(lambda *_: held.append(turn.locked()))
    states = CapturedStates(speech, None, turn)
    states.record([3_000])
    assert held == [True]
    states.stacked(noise(3_000))  # asks for the record again, then works
    assert held == [True] * 3 and not turn.locked()
    states.stacked(noise(2_000))
    assert held[-1] is False, "launch by launch it works in memory of its own"


@pytest.fixture(scope="module")
def placed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Avatar, Avatar]:
    """The same small model, captured and plain, hearing with wav2vec 2.0."""
    system = load(write_model(tmp_path_factory.mktemp("model") / "small"), device="cpu").system
    speech = Wav2Vec2Speech(encoder(dim=SPEECH.channels, ffn=12))
    system = replace(system, audio_features=speech)
    return Avatar("captured", system, CapturedPlacement(system)), Avatar("plain", system, SinglePlacement(system))


def test_captured_sessions_record_it_when_they_open(placed: tuple[Avatar, Avatar], eager_lengths: list[int]) -> None:
    captured, plain = placed
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    captured.warm_up(steps=1)
    made = captured.generate(picture, sound(0.9), steps=1).frames.astype(int)
    assert not eager_lengths
    assert np.abs(made - plain.generate(picture, sound(0.9), steps=1).frames).max() <= 1
    assert eager_lengths, "nothing changes for single"


def test_front_ends_that_cannot_be_captured_are_used_as_they_are(tmp_path: Path) -> None:
    system = load(write_model(tmp_path / "small"), device="cpu").system
    made = [placement(system).audio_features(system.mode) for placement in (CapturedPlacement, SinglePlacement)]
    assert type(made[0]) is type(made[1])


def test_the_measurement_of_it_runs_both_ways(eager_lengths: list[int]) -> None:
    told: list[str] = []
    steps = speech_bench.measure(Wav2Vec2Speech(encoder()), MODE, told.append)
    lengths = LiveWindow(hop_frames=MODE.block_frames, fps=MODE.fps).lengths
    assert [round(step.window * 16_000) for step in steps] == list(lengths)
    assert eager_lengths == list(lengths) * speech_bench.REPEATS and told[0].startswith("recorded in")
    assert all(step.eager > 0 and step.captured > 0 and step.error == 0 for step in steps)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_give_the_values_of_the_launches() -> None:
    device = torch.device("cuda")
    speech = encoder().to(device)
    states = CapturedStates(speech, shared_pool(device), nullcontext())
    lengths = [3_000, 8_000, 5_000]
    states.record(lengths)
    assert all(window.replay.graph is not None for window in states.windows.values())
    for seed, samples in enumerate(lengths * 2):
        wave = noise(samples, seed)
        found = states.stacked(wave)
        assert found.is_cuda
        torch.testing.assert_close(found.cpu(), speech.stacked(wave), rtol=1e-4, atol=1e-4)


def test_threads_do_not_mix_their_states() -> None:
    """The states are seen by hooks on layers that all callers share."""
    speech, waves = encoder(), [torch.randn(4000) for _ in range(2)]
    wanted = [speech.stacked(wave) for wave in waves]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda i: speech.stacked(waves[i % 2]), range(16)))
    for i, states in enumerate(found):
        torch.testing.assert_close(states, wanted[i % 2], rtol=0, atol=0)
