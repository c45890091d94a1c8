"""Avatar, Session and load: streaming equals whole files, seeds, counts, flat memory, errors."""

import gc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kinora.graphs.models.speech import SpeechFrontEnd
from kinora.runtime import Avatar, load
from kinora.runtime.errors import CheckpointError, InputError
from kinora.runtime.load import PRECISIONS
from kinora.runtime.placement.single import SingleDevice
from kinora.runtime.placement.timestep_pipeline import SequentialPipeline
from kinora.runtime.systems.audio_features import SpeechFeatures
from kinora.runtime.systems.liveavatar import BlockStream, frames_to_bytes
from kinora.runtime.systems.liveavatar_draws import SeededDraws
from kinora.runtime.systems.liveavatar_mode import (
    PIPELINE,
    SINGLE,
    Decoding,
    GenerationMode,
    Resink,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from small_model import MODE, RATE, SIDE, SPEECH, sound, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def avatar(folder: Path) -> Avatar:
    return load(folder, device="cpu")


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (80, 70, 3), np.uint8)


@pytest.fixture(scope="module")
def whole(avatar: Avatar, picture: np.ndarray) -> np.ndarray:
    return avatar.generate(picture, sound(1.3), seed=3).frames


@settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 9000), min_size=1, max_size=8))
def test_frames_do_not_depend_on_how_the_sound_is_cut(avatar, picture, whole, cuts: list[int]) -> None:
    samples, start, frames = sound(1.3), 0, []
    with avatar.stream(picture, seed=3) as session:
        for cut in [*cuts, len(samples)]:
            frames.append(session.feed(samples[start : start + cut]))
            start += cut
        frames.append(session.finish())
    assert np.array_equal(np.concatenate(frames), whole)


@settings(deadline=None, max_examples=12)
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=8), st.integers(1, 12_000))
def test_speech_features_are_those_of_the_whole_sound(cuts: list[int], length: int) -> None:
    torch.manual_seed(0)
    front_end = SpeechFrontEnd(SPEECH).eval()
    samples, start = torch.randn(length), 0

    def extract(pieces: list[torch.Tensor]) -> torch.Tensor:
        features = SpeechFeatures(front_end, 12, torch.device("cpu"))
        return torch.cat([*(features.push(piece) for piece in pieces), features.finish()], -1)

    pieces = []
    for cut in [*cuts, length]:
        pieces.append(samples[start : start + cut])
        start += cut
    assert extract(pieces).shape[-1] == -(-length // 640)
    assert torch.equal(extract(pieces), extract([samples]))


def test_seeds_reproduce_bytes_and_matter(avatar: Avatar, picture: np.ndarray, whole: np.ndarray) -> None:
    assert np.array_equal(avatar.generate(picture, sound(1.3), seed=3).frames, whole)
    assert not np.array_equal(avatar.generate(picture, sound(1.3), seed=4).frames, whole)
    assert not np.array_equal(avatar.generate(picture, sound(1.3, seed=2), seed=3).frames, whole)


def test_seeds_may_be_numpy_s(avatar: Avatar, picture: np.ndarray, whole: np.ndarray) -> None:
    with avatar.stream(picture, seed=np.int64(3)) as session:
        frames = session.feed(sound(1.3))
    assert np.array_equal(frames, whole[: len(frames)])


@pytest.mark.parametrize("samples", [1, 640, 641, 5760, 7680, 16_000])
def test_frames_cover_the_sound_exactly(avatar: Avatar, picture: np.ndarray, samples: int) -> None:
    seen: list[tuple[int, int]] = []
    video = avatar.generate(picture, sound(1.0)[:samples], on_progress=lambda *now: seen.append(now))
    wanted = -(-samples // 640)
    assert video.frames.shape == (wanted, SIDE, SIDE, 3) and video.frames.dtype == np.uint8
    assert seen[-1] == (wanted, wanted) and seen == sorted(seen)


def test_bytes_are_laid_out_as_pictures(avatar: Avatar, picture: np.ndarray) -> None:
    """Strides of the decoder's layout would have the host reorder every byte; a fed block is passed on uncopied."""
    frames = torch.rand(3, 2, 4, 5) * 2.4 - 1.2
    shown = frames_to_bytes(frames)
    wanted = ((frames.numpy().clip(-1, 1) + 1) / 2 * 255).astype(np.uint8).transpose(1, 2, 3, 0)
    assert shown.is_contiguous() and np.array_equal(shown.numpy(), wanted)
    with avatar.stream(picture) as session:
        assert session.feed(sound(0.2)).shape == (0, SIDE, SIDE, 3)
        made = session.feed(sound(0.6))
        assert len(made) and made.flags.c_contiguous and made.base is not None, "the tensor's own memory"


def test_frames_come_as_soon_as_a_block_is_heard(avatar: Avatar, picture: np.ndarray) -> None:
    """A block needs 12 frames of sound less the 3 of silence in front, and the front end's lookahead."""
    with avatar.stream(picture) as session:
        assert session.stats.time_to_first_frame is None
        needed = 9 * 640 + SPEECH.lookahead * 320 + 640
        assert len(session.feed(sound(1.0)[:needed])) == 9
        stats = session.stats
        assert stats.frames == 9 and stats.fps > 0 and stats.audio_seconds == needed / RATE
        assert stats.time_to_first_frame is not None and stats.time_to_first_frame > stats.opening > 0
        rest = session.finish()
        assert len(rest) == -(-needed // 640) - 9
        assert session.stats.frames == -(-needed // 640)


def test_a_long_sound_is_heard_block_by_block(
    avatar: Avatar, picture: np.ndarray, whole: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    with avatar.stream(picture, seed=3) as session:
        push, heard = session._features.push, []
        monkeypatch.setattr(session._features, "push", lambda samples: heard.append(len(samples)) or push(samples))
        frames = session.feed(sound(1.3))
        assert max(heard) == 12 * 640 and sum(heard) == round(1.3 * RATE)
        assert np.array_equal(np.concatenate((frames, session.finish())), whole)


def test_shown_frame_belongs_to_the_sound_at_its_time(avatar: Avatar, picture: np.ndarray) -> None:
    """A change of the sound at second 1 changes no block that ended before it, and the frame at second 1."""
    quiet, changed = sound(2.0), sound(2.0)
    changed[RATE:] += 0.5 * np.sin(np.arange(RATE) * 0.3).astype(np.float32)
    a, b = avatar.generate(picture, quiet).frames, avatar.generate(picture, changed).frames
    differs = (a != b).reshape(len(a), -1).any(1)
    assert not differs[: 21 - 12].any()  # frames 21..32 form the block that holds second 1
    assert differs[25]


def test_upstream_alignment_leads_by_the_dropped_frames(avatar: Avatar, picture: np.ndarray) -> None:
    """Without the silence in front, the same picture-sound pairs appear 3 frames earlier."""
    upstream = avatar.configured(aligned=False)
    silence = np.zeros(3 * 640, np.float32)
    late = upstream.generate(picture, np.concatenate((silence, sound(1.0)))).frames
    ours = avatar.generate(picture, sound(1.0)).frames
    assert np.array_equal(late[: len(ours)], ours)


def tensor_bytes() -> int:
    gc.collect()
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        if issubclass(type(tensor), torch.Tensor)  # isinstance would ask proxies
    }
    return sum(storages.values())


def test_memory_is_flat_over_30_blocks(avatar: Avatar, picture: np.ndarray) -> None:
    with avatar.stream(picture, steps=1) as session:
        sizes = []
        for block in range(31):
            session.feed(sound(0.48, seed=block))
            if block in (7, 8, 19, 30):  # the ring is full after 4 blocks, clip 1 has begun
                sizes.append(tensor_bytes())
        assert session.stats.frames > 28 * 12
    assert len(set(sizes)) == 1


def test_video_saves_with_sound(avatar: Avatar, picture: np.ndarray, tmp_path: Path) -> None:
    pytest.importorskip("av")
    from kinora.runtime.media import read_video

    avatar.generate(picture, sound(1.0), steps=1).save(tmp_path / "talk.mp4")
    clip = read_video(tmp_path / "talk.mp4")
    assert clip.frames.shape == (25, SIDE, SIDE, 3) and clip.fps == 25
    assert clip.audio is not None and abs(len(clip.audio) - RATE) < 0.1 * RATE


def test_pictures_of_every_kind_give_the_same_frames(avatar: Avatar, picture: np.ndarray, tmp_path: Path) -> None:
    file = tmp_path / "face.png"
    Image.fromarray(picture).save(file)
    frames = [
        avatar.generate(kind, sound(0.3), steps=1).frames for kind in (picture, file, str(file), Image.open(file))
    ]
    assert all(np.array_equal(frames[0], other) for other in frames[1:])


def test_size_and_steps_are_configuration(avatar: Avatar, picture: np.ndarray) -> None:
    assert avatar.size == SIDE
    assert avatar.generate(picture, sound(0.2), steps=2, size=(64, 96)).frames.shape == (5, 64, 96, 3)
    window = avatar.configured(cache_latents=6)
    long, short = avatar.generate(picture, sound(2.0)).frames, window.generate(picture, sound(2.0)).frames
    same = (long == short).reshape(len(long), -1).all(1)
    assert same[:21].all() and not same[21:33].all()  # the third block is the first that a window of two blocks cuts


@pytest.mark.parametrize("resink", list(Resink))
def test_every_mode_generates(avatar: Avatar, picture: np.ndarray, resink: Resink) -> None:
    video = avatar.configured(resink=resink, decoding=Decoding.CLIP, clip_blocks=2).generate(
        picture, sound(1.2), steps=1
    )
    assert len(video.frames) == 30


def test_resink_changes_the_second_clip_only(avatar: Avatar, picture: np.ndarray) -> None:
    never = avatar.configured(clip_blocks=2).generate(picture, sound(1.4)).frames
    once = avatar.configured(clip_blocks=2, resink=Resink.REFERENCE).generate(picture, sound(1.4)).frames
    assert np.array_equal(never[:21], once[:21]) and not np.array_equal(never[21:], once[21:])


@pytest.mark.parametrize("mode", [replace(PIPELINE, **MODE), replace(SINGLE, **MODE, resink=Resink.REFERENCE)])
def test_pipeline_of_ranks_equals_the_sequential_loop(avatar: Avatar, mode: GenerationMode) -> None:
    dit, mode = avatar.system.dit, replace(mode, clip_blocks=2, decoding=Decoding.STREAM)
    pixels = torch.rand(3, SIDE, SIDE) * 2 - 1
    audio = torch.randn(5, 1, SPEECH.layers, SPEECH.channels, mode.block_frames)
    draws = SeededDraws(5, mode, torch.float32, torch.device("cpu"))
    made = []
    for placement in (SingleDevice, SequentialPipeline):
        with torch.inference_mode():
            place = lambda grid, build=placement: build(dit, torch.zeros(2, 8), mode, grid)  # noqa: E731
            stream = BlockStream(avatar.system.vae, mode, pixels, place, draws)
            made.append(torch.cat([stream.next(features)[0] for features in audio], 2))
    assert torch.equal(*made)


@settings(deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(0, 10**6), st.integers(0, 40))
def test_reference_distances_stay_in_their_range_and_repeat(seed: int, block: int, step: int) -> None:
    draws = SeededDraws(seed, PIPELINE, torch.float32, torch.device("cpu"))
    assert 4 <= draws.distance(block, step) <= 30
    assert draws.distance(block, step) == draws.distance(block, step)


def test_reference_distances_use_their_whole_range() -> None:
    draws = SeededDraws(0, PIPELINE, torch.float32, torch.device("cpu"))
    seen = {draws.distance(block, step) for block in range(200) for step in range(4)}
    assert seen == set(range(4, 31))


BAD_SOUNDS = {
    "NaN": np.array([0.0, np.nan], np.float32),
    "int16": np.zeros(100, np.int16),
    "mono": np.zeros((100, 2), np.float32),
    "list": [0.0, 0.1],
}


@pytest.mark.parametrize("named", list(BAD_SOUNDS))
def test_bad_sounds_are_refused(avatar: Avatar, picture: np.ndarray, named: str) -> None:
    with avatar.stream(picture) as session, pytest.raises(InputError, match=named):
        session.feed(BAD_SOUNDS[named])
    with pytest.raises(InputError, match=named):
        avatar.generate(picture, BAD_SOUNDS[named])


def test_empty_sound_is_refused_by_generate_and_harmless_in_a_session(avatar: Avatar, picture: np.ndarray) -> None:
    with pytest.raises(InputError, match="empty"):
        avatar.generate(picture, np.zeros(0, np.float32))
    with avatar.stream(picture) as session:
        assert session.feed(np.zeros(0, np.float32)).shape == (0, SIDE, SIDE, 3)
        assert session.finish().shape == (0, SIDE, SIDE, 3)


@pytest.mark.filterwarnings("error")
def test_sound_that_cannot_be_written_to_is_taken(avatar: Avatar, picture: np.ndarray, whole: np.ndarray) -> None:
    """As `np.frombuffer` gives it; PyTorch would warn, by default once a process."""
    torch.set_warn_always(True)
    try:
        with avatar.stream(picture, seed=3) as session:
            frames = session.feed(np.frombuffer(sound(1.3).tobytes(), np.float32))
    finally:
        torch.set_warn_always(False)
    assert np.array_equal(frames, whole[: len(frames)]) and len(frames)


def test_ended_sessions_say_so(avatar: Avatar, picture: np.ndarray) -> None:
    session = avatar.stream(picture)
    session.finish()
    for call in (session.finish, lambda: session.feed(sound(0.1))):
        with pytest.raises(InputError, match="has ended"):
            call()
    closed = avatar.stream(picture)
    closed.close()
    closed.close()
    with pytest.raises(InputError, match="has ended"):
        closed.feed(sound(0.1))


@pytest.mark.parametrize(
    "options, told",
    [
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"steps": 0}, "steps"),
        ({"size": (60, 64)}, "multiples of 16"),
        ({"size": (64, 1 << 20)}, "from 64 to 2048"),
        ({"size": (64,)}, "height x width"),
        ({"size": 192}, "cannot be 192 pixels"),
        ({"size": (64.0, 64.0)}, "multiples of 16"),
        ({"size": "64x64"}, "cannot be '64x64' pixels"),
        ({"steps": "4"}, "steps is '4'; it must be a whole number"),
        ({"steps": 2.0}, "whole number"),
    ],
)
def test_bad_options_are_refused(avatar: Avatar, picture: np.ndarray, options: dict, told: str) -> None:
    with pytest.raises(InputError, match=told):
        avatar.stream(picture, **options)


@pytest.mark.parametrize(
    "image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32), np.zeros((0, 8, 3), np.uint8), 7]
)
def test_bad_pictures_are_refused(avatar: Avatar, image: object) -> None:
    with pytest.raises(InputError, match="picture"):
        avatar.stream(image)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"colour": 1},
        {"cache_latents": 7},
        {"cache_latents": "6"},
        {"block_latents": 6, "cache_latents": None},
        {"drop_first_frames": 12},
        {"reference_index": 3},
        {"near_distance": 31},
        {"resink": Resink.REFERENCE_AND_MOTION},
    ],
)
def test_modes_that_do_not_fit_are_refused(avatar: Avatar, changes: dict) -> None:
    with pytest.raises(InputError):
        avatar.configured(**changes)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"known are tiny, liveavatar-14b"):
        load("liveavatar-15b")
    with pytest.raises(InputError, match="float32, bfloat16, fp8"):
        load("tiny", precision="int3")
    with pytest.raises(InputError, match="single, captured"):
        load("tiny", placement="moon")
    for device in ("abacus", "mps", "meta", "xpu"):
        with pytest.raises(InputError, match="use 'auto', 'cpu' or 'cuda'"):
            load("tiny", device=device)


def test_missing_files_are_listed(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(CheckpointError, match="checkpoint="):
        load("liveavatar-14b")
    (tmp_path / "Wan2.1_VAE.pth").touch()
    with pytest.raises(CheckpointError) as caught:
        load("liveavatar-14b", checkpoint=tmp_path)
    told = str(caught.value).split("; download")[0]
    for name in (
        "config.json",
        "models_t5_umt5-xxl-enc-bf16.pth",
        "google/umt5-xxl",
        "wav2vec2-large",
        "liveavatar.saf",
    ):
        assert name in told
    assert "Wan2.1_VAE.pth" not in told
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"lacks tiny\.safetensors"):
        load(tmp_path)


def test_wrong_keys_are_named(tmp_path: Path) -> None:
    broken = write_model(tmp_path / "broken")
    state = load_file(broken / "tiny.safetensors")
    state["dit.blocks.0.norm9.weight"] = torch.zeros(1)
    del state["vae.conv2.weight"]
    save_file(state, broken / "tiny.safetensors")
    with pytest.raises(CheckpointError, match=r"blocks\.0\.norm9\.weight"):
        load(broken)
    del state["dit.blocks.0.norm9.weight"]
    save_file(state, broken / "tiny.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: conv2\.weight"):
        load(broken)
    (broken / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no configuration"):
        load(broken)


def test_bfloat16_stays_near_float32(folder: Path, picture: np.ndarray) -> None:
    frames = [load(folder, precision=name, device="cpu").generate(picture, sound(0.6)).frames for name in PRECISIONS]
    difference = np.abs(frames[0].astype(float) - frames[1]).mean()
    assert 0 < difference < 4.0
