"""Sessions on the time-steps of consecutive blocks (placement "batched"): the frames of "captured", only later."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kinora.runtime import Avatar, load
from kinora.runtime.errors import InputError
from kinora.runtime.placement.batched_steps import BatchedSteps
from kinora.runtime.placement.engines import CapturedPlacement
from kinora.runtime.placement.single import SingleDevice
from kinora.runtime.placement.static_stream import BlockShape
from kinora.runtime.systems.liveavatar import BlockStream, Denoiser
from kinora.runtime.systems.liveavatar_conditions import PoseTrack
from kinora.runtime.systems.liveavatar_draws import SeededDraws
from kinora.runtime.systems.liveavatar_mode import Decoding, Resink
from small_model import SIDE, SPEECH, same_frames, sound, write_model

STEPS = 4  # so a block comes three blocks later
PIECE = 12 * 640  # samples of a block


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def captured(folder: Path) -> Avatar:
    return load(folder, device="cpu", placement="captured")


@pytest.fixture(scope="module")
def batched(folder: Path) -> Avatar:
    return load(folder, device="cpu", placement="batched")


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (80, 70, 3), np.uint8)


MODES: list[dict[str, Any]] = [
    {"resink": Resink.REFERENCE},  # at block 4, when block 0 has just come out
    {"resink": Resink.REFERENCE, "clip_blocks": 2},  # at block 2, which must wait for block 0
    {"resink": Resink.REFERENCE_AND_MOTION, "decoding": Decoding.CLIP, "clip_blocks": 2},
    {"cache_latents": 6},
]


@pytest.mark.parametrize("changes", MODES, ids=str)
def test_frames_are_the_captured_ones(
    batched: Avatar, captured: Avatar, picture: np.ndarray, changes: dict[str, Any]
) -> None:
    """Over a re-sink, and to an end with blocks on their way."""
    voice = sound(2.6)
    found, wanted = (
        avatar.configured(**changes).generate(picture, voice, seed=3, steps=STEPS) for avatar in (batched, captured)
    )
    assert same_frames(found.frames, wanted.frames) and len(found.frames) == 65
    assert np.array_equal(found.audio, wanted.audio)


@pytest.mark.parametrize("samples", [1, PIECE - 3 * 640, PIECE, 3 * PIECE])
def test_short_videos_are_complete(batched: Avatar, picture: np.ndarray, samples: int) -> None:
    """Shorter than it takes a block to come out."""
    assert len(batched.generate(picture, sound(2.0)[:samples], steps=STEPS).frames) == -(-samples // 640)


def by_feed(avatar: Avatar, picture: np.ndarray, blocks: int) -> list[np.ndarray]:
    """Frames of each block of sound, and of the end."""
    voice = sound(blocks * PIECE / 16_000).reshape(blocks, PIECE)
    with avatar.stream(picture, seed=2, steps=STEPS) as session:
        made = []
        for piece in voice:
            made.append(session.feed(piece))
            assert (session.stats.time_to_first_frame is None) == (session.stats.frames == 0)
        return [*made, session.finish()]


def test_a_block_comes_three_blocks_later(batched: Avatar, captured: Avatar, picture: np.ndarray) -> None:
    """In order, each as soon as its last step is done; a re-sink at block 4 stops nothing."""
    late, prompt = (by_feed(avatar.configured(resink=Resink.REFERENCE), picture, 6) for avatar in (batched, captured))
    assert [len(frames) for frames in late[:3]] == [0, 0, 0] and len(prompt[1]) > 0
    for found, wanted in zip(late[3:-1], prompt[:-4], strict=True):
        assert same_frames(found, wanted) if len(wanted) else not len(found)
    assert same_frames(late[-1], np.concatenate(prompt[-4:]))


def test_a_session_begins_afresh_where_another_was_left(
    batched: Avatar, captured: Avatar, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left with blocks and a condition on their way; nothing is compiled again, and nothing of it is seen."""
    avatars = [avatar.configured(resink=Resink.REFERENCE) for avatar in (batched, captured)]
    with avatars[0].stream(picture, steps=STEPS) as session:
        for seed in range(6):
            session.feed(sound(PIECE / 16_000, seed))
    placement = batched.placement
    assert isinstance(placement, CapturedPlacement) and len(placement.engines) == 1
    monkeypatch.setattr(placement.engines, "build", lambda key: pytest.fail("an engine was idle"))
    found, wanted = (avatar.generate(picture[::-1], sound(1.4), seed=5, steps=STEPS).frames for avatar in avatars)
    assert same_frames(found, wanted)


def test_sessions_side_by_side_do_not_meet(batched: Avatar, picture: np.ndarray) -> None:
    voice = sound(1.5)
    wanted = [batched.generate(picture, voice, seed=seed, steps=2).frames for seed in (1, 2)]
    sessions = [batched.stream(picture, seed=seed, steps=2) for seed in (1, 2)]
    made: list[list[np.ndarray]] = [[], []]
    for piece in np.split(voice, 6):
        for session, frames in zip(sessions, made, strict=True):
            frames.append(session.feed(piece))
    for session, frames, whole in zip(sessions, made, wanted, strict=True):
        frames.append(session.finish())
        session.close()
        assert np.array_equal(np.concatenate(frames), whole)
        with pytest.raises(InputError, match="ended"):
            session.feed(voice)


def test_warming_up_makes_a_session_ready(folder: Path, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    avatar = load(folder, device="cpu", placement="batched")
    assert avatar.warm_up(steps=2) > 0
    assert isinstance(avatar.placement, CapturedPlacement)
    monkeypatch.setattr(avatar.placement.engines, "build", lambda key: pytest.fail("an engine was idle"))
    with avatar.stream(picture, steps=2) as session:
        assert not len(session.feed(sound(0.1)))


def test_actors_and_poses_reach_their_blocks(batched: Avatar) -> None:
    """A pose video of two clips, two voices with a mask; latents and frames of the plain steps."""
    system, actors = batched.system, 2
    mode = replace(system.mode, resink=Resink.REFERENCE, clip_blocks=2, steps=2)
    torch.manual_seed(0)
    pixels, size = torch.rand(3, SIDE, SIDE) * 2 - 1, (SIDE, SIDE)
    audio = torch.randn(3, actors, SPEECH.layers, SPEECH.channels, mode.block_frames)
    mask = torch.rand(actors, 12, SIDE // 16, SIDE // 16, 1)
    moves = torch.randint(0, 256, (40, SIDE, SIDE, 3), dtype=torch.uint8)
    shape = BlockShape(actors, masked=True, pose=True)

    def steps(grid: tuple[int, int]) -> Denoiser:
        return BatchedSteps(system.dit, torch.zeros(2, 8), mode, grid, shape=shape)

    def plain(grid: tuple[int, int]) -> Denoiser:
        return SingleDevice(system.dit, torch.zeros(2, 8), mode, grid)

    made = []
    for place in (steps, plain):
        with torch.inference_mode():
            pose = PoseTrack(system.vae, moves, mode, size)
            draws = SeededDraws(5, mode, torch.float32, torch.device("cpu"))
            stream = BlockStream(system.vae, mode, pixels, place, draws, actor_mask=mask, pose=pose)
            parts = [*(stream.next(features) for features in audio), stream.finish()]
        made.append([torch.cat(things, dim) for things, dim in zip(zip(*parts, strict=True), (2, 1), strict=True)])
    assert made[0][0].shape[2] == 9 and made[0][1].shape[1] == 33  # of the first block 3 frames are not shown
    for found, wanted in zip(*made, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_fp8_is_close_to_the_captured_one(folder: Path, captured: Avatar, picture: np.ndarray) -> None:
    voice = sound(1.0)
    made = [
        load(folder, device="cpu", precision="fp8", placement=name).generate(picture, voice, steps=2).frames
        for name in ("batched", "captured")
    ]
    plain = captured.generate(picture, voice, steps=2).frames
    apart = [np.abs(frames.astype(float) - other).mean() for frames, other in (made, (made[1], plain))]
    assert apart[0] < 0.5 * apart[1]


def test_a_windowed_model_is_refused(folder: Path, tmp_path: Path) -> None:
    config = (folder / "config.json").read_text()
    (tmp_path / "tiny.safetensors").symlink_to(folder / "tiny.safetensors")
    assert '"local_attn_size": -1' in config
    (tmp_path / "config.json").write_text(config.replace('"local_attn_size": -1', '"local_attn_size": 12'))
    with pytest.raises(InputError, match=r"local attention window.*placement='single'"):
        load(tmp_path, device="cpu", placement="batched")
