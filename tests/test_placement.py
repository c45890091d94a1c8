"""Captured sessions against plain ones, the pool that lends them engines, warming up, FP8 at load."""

import gc
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from kinora.graphs.models.wan_vae import DecoderState, EncoderState
from kinora.graphs.quantize import Fp8Linear
from kinora.runtime import Avatar, load
from kinora.runtime.errors import InputError
from kinora.runtime.placement import engines as placement_engines
from kinora.runtime.placement import static_stream
from kinora.runtime.placement.captured_vae import CapturedDecoder, CapturedEncoder
from kinora.runtime.placement.engines import CapturedPlacement, SinglePlacement
from kinora.runtime.placement.pool import IdlePool
from kinora.runtime.systems.liveavatar_mode import Decoding, Resink
from small_model import same_frames, sound, write_model
from small_vae import TINY, make_vae

LOUD = sound(0.9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Avatar:
    return load(folder, device="cpu", placement="single")


@pytest.fixture
def captured(folder: Path) -> Avatar:
    return load(folder, device="cpu", placement="captured")


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (80, 70, 3), np.uint8)


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """One entry a program that is rewritten."""
    made: list[object] = []
    apply = static_stream.apply
    monkeypatch.setattr(static_stream, "apply", lambda *args: made.append(args) or apply(*args))
    return made


def engines(avatar: Avatar) -> CapturedPlacement:
    assert isinstance(avatar.placement, CapturedPlacement)
    return avatar.placement


def tensor_bytes() -> int:
    """Bytes of all tensors that are alive; shapes without memory in traced graphs do not count."""
    gc.collect()
    real = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in real if t.device.type == "cpu"}.values()
    )


def test_auto_is_captured_on_cuda_and_plain_elsewhere(folder: Path, plain: Avatar) -> None:
    chosen = load(folder, device="cpu").placement
    assert isinstance(chosen, SinglePlacement) and isinstance(plain.placement, SinglePlacement)
    if torch.cuda.is_available():
        assert isinstance(load(folder, device="cuda").placement, CapturedPlacement)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cache_latents": 6},
        {"resink": Resink.REFERENCE, "clip_blocks": 2},
        {"resink": Resink.REFERENCE_AND_MOTION, "decoding": Decoding.CLIP, "clip_blocks": 2},
    ],
    ids=str,
)
def test_captured_frames_are_the_plain_ones(
    plain: Avatar, captured: Avatar, picture: np.ndarray, changes: dict
) -> None:
    made = [a.configured(**changes).generate(picture, LOUD, seed=3, steps=2).frames for a in (captured, plain)]
    assert same_frames(*made)


def test_tiny_is_the_same_captured() -> None:
    face = np.random.default_rng(1).integers(0, 256, (96, 96, 3), np.uint8)
    made = [
        load("tiny", device="cpu", placement=name).generate(face, sound(0.3), steps=2, size=(96, 96)).frames
        for name in ("captured", "single")
    ]
    assert same_frames(*made)


def test_a_second_session_compiles_nothing(
    plain: Avatar, captured: Avatar, picture: np.ndarray, compilations: list[object]
) -> None:
    """Another picture, seed and sound in the buffers of the first session; what a session left cannot be seen."""
    captured.generate(picture, sound(0.6, seed=2), steps=1)
    assert len(compilations) == 1 and len(engines(captured).engines) == 1
    found = captured.generate(picture[::-1], LOUD, seed=3, steps=1).frames
    assert same_frames(found, plain.generate(picture[::-1], LOUD, seed=3, steps=1).frames)
    assert len(compilations) == 1 and len(engines(captured).engines) == 1


def test_another_size_has_an_engine_of_its_own_and_idle_ones_are_bounded(
    captured: Avatar, picture: np.ndarray, compilations: list[object]
) -> None:
    pool = engines(captured).engines
    captured.generate(picture, sound(0.2), steps=1)
    with captured.stream(picture, steps=1, size=(64, 96)) as wide:
        assert len(pool) == 0  # the idle one made room
        with captured.stream(picture, steps=1):
            assert len(compilations) == 3
        assert len(pool) == 1
        assert len(wide.feed(sound(1.0))) > 0
    assert len(pool) == placement_engines.IDLE_ENGINES == 1
    with captured.stream(picture, steps=1, size=(64, 96)):
        assert len(compilations) == 3


def test_sessions_side_by_side_do_not_meet(plain: Avatar, captured: Avatar, picture: np.ndarray) -> None:
    """Piece by piece in turn, then in two threads."""
    wanted = [plain.generate(picture, LOUD, seed=seed, steps=1).frames for seed in (1, 2)]
    sessions = [captured.stream(picture, seed=seed, steps=1) for seed in (1, 2)]
    made: list[list[np.ndarray]] = [[], []]
    for start in range(0, len(LOUD), 4000):
        for session, frames in zip(sessions, made, strict=True):
            frames.append(session.feed(LOUD[start : start + 4000]))
    for i, session in enumerate(sessions):
        made[i].append(session.finish())
        session.close()
        assert same_frames(np.concatenate(made[i]), wanted[i])
    found: dict[int, np.ndarray] = {}

    def talk(seed: int) -> None:
        found[seed] = captured.generate(picture, LOUD, seed=seed, steps=1).frames

    threads = [threading.Thread(target=talk, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same_frames(found[seed], wanted[seed - 1]) for seed in (1, 2))


def test_a_session_closed_while_it_waits_leaves_its_engine_to_the_next(
    captured: Avatar, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = captured.generate(picture, LOUD, seed=5, steps=1).frames
    left = captured.stream(picture[::-1], seed=1, steps=1)
    ends: list[Exception] = []
    waits, push = threading.Event(), left._features.push

    def hear(samples: torch.Tensor) -> torch.Tensor:
        features = push(samples)
        waits.set()
        return features

    def feed() -> None:
        try:
            left.feed(LOUD)
        except Exception as error:
            ends.append(error)

    monkeypatch.setattr(left._features, "push", hear)
    thread = threading.Thread(target=feed)
    with engines(captured).turn:  # as another session has it while it works
        thread.start()
        assert waits.wait(10)
        left.close()
        later = captured.stream(picture, seed=5, steps=1)
        frames = [later.feed(LOUD[:8000])]
    thread.join(10)  # has had its turn between two blocks of `later`
    with later:
        frames += [later.feed(LOUD[8000:]), later.finish()]
    assert [type(error) for error in ends] == [InputError] and "has ended" in str(ends[0])
    assert np.array_equal(np.concatenate(frames), wanted)


def test_a_session_closed_in_the_middle_of_a_feed_says_so(
    plain: Avatar, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = plain.stream(picture, steps=1)
    blocks = session._blocks
    assert blocks is not None
    make = blocks.next

    def closing(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        session.close()
        return make(features)

    monkeypatch.setattr(blocks, "next", closing)
    with pytest.raises(InputError, match="has ended"):
        session.feed(sound(1.2))


def test_warming_up_makes_sessions_ready(captured: Avatar, picture: np.ndarray, compilations: list[object]) -> None:
    assert captured.warm_up(steps=1, sessions=2) > 0
    assert len(compilations) == 2 and len(engines(captured).engines) == 2
    with captured.stream(picture, steps=1), captured.stream(picture, steps=1):
        assert len(compilations) == 2 and len(engines(captured).engines) == 0
    assert len(engines(captured).engines) == 2
    with pytest.raises(InputError, match="sessions"):
        captured.warm_up(sessions=0)
    for size in ((60, 64), (-64, 64), (10**7, 10**7)):
        with pytest.raises(InputError, match="multiples"):
            captured.warm_up(size, sessions=9)
    assert engines(captured).engines.bound == 2


def test_plain_models_warm_up_too(plain: Avatar) -> None:
    assert plain.warm_up(steps=1) > 0


def test_memory_is_flat_over_blocks_and_sessions(captured: Avatar, picture: np.ndarray) -> None:
    sizes, between = [], []
    for seed in range(2):
        with captured.stream(picture, steps=1, seed=seed) as session:
            for block in range(9):
                session.feed(sound(0.48, seed=block))
                if block in (6, 8):  # the ring is full, clip 1 has begun
                    sizes.append(tensor_bytes())
        between.append(tensor_bytes())
    assert len(set(sizes)) == 1 and len(set(between)) == 1


def test_an_engine_comes_back_when_opening_fails(captured: Avatar, picture: np.ndarray, monkeypatch) -> None:
    monkeypatch.setattr("kinora.runtime.avatar.image_pixels", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        captured.stream(picture, steps=1)
    assert len(engines(captured).engines) == 1


@pytest.mark.parametrize("placement", ["single", "captured"])
def test_fp8_is_quantised_at_load(folder: Path, plain: Avatar, picture: np.ndarray, placement: str) -> None:
    avatar = load(folder, device="cpu", precision="fp8", placement=placement)
    names = [name for name, module in avatar.system.dit.named_modules() if isinstance(module, Fp8Linear)]
    assert "blocks.0.self_attn.q" in names and "head.head" not in names
    frames = avatar.generate(picture, sound(0.6), steps=2).frames
    wanted = plain.generate(picture, sound(0.6), steps=2).frames
    assert 0 < np.abs(frames.astype(float) - wanted).mean() < 8.0


def test_the_captured_vae_is_the_plain_one() -> None:
    vae, latents = make_vae(TINY), torch.randn(1, 3, 8, 2, 3)
    factor = TINY.spatial_factor
    clip = torch.rand(1, 3, 1 + 4 * 5, 2 * factor, 3 * factor) * 2 - 1
    decoder, encoder = CapturedDecoder(vae, (2, 3)), CapturedEncoder(vae, (2 * factor, 3 * factor))
    wide = CapturedEncoder(vae, (2 * factor, 3 * factor), latents=3)
    with torch.inference_mode():
        state, own = DecoderState(), DecoderState()
        for piece in latents.split((7, 1), 2):
            wanted = vae.decode_stream(piece, state)
            torch.testing.assert_close(decoder.decode_stream(piece, own), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(decoder.decode(latents), vae.decode(latents), rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="cannot go back"):
            decoder.decode_stream(latents, own)
        for made in (encoder, wide):
            torch.testing.assert_close(made.encode(clip), vae.encode(clip), rtol=1e-5, atol=1e-5)
            seen, once = EncoderState(), made.encode(clip)
            parts = [made.encode_stream(part, seen) for part in clip.split((5, 16), 2)]
            torch.testing.assert_close(torch.cat(parts, 2), once, rtol=1e-5, atol=1e-5)


def test_idle_things_are_bounded_and_the_latest_comes_first() -> None:
    built: list[str] = []
    pool: IdlePool[str, list[str]] = IdlePool(lambda key: built.append(key) or [key], bound=2)  # type: ignore[func-returns-value]
    a, b = pool.take("a"), pool.take("a")
    assert built == ["a", "a"] and a is not b
    pool.give("a", a)
    pool.give("a", b)
    assert pool.take("a") is b and pool.take("a") is a and len(pool) == 0
    for key, item in (("a", a), ("b", pool.take("b")), ("c", pool.take("c"))):
        pool.give(key, item)
    assert len(pool) == 2
    pool.take("a")  # was dropped; and to build it room was made
    assert built == ["a", "a", "b", "c", "a"] and len(pool) == 1
    assert pool.take("c") == ["c"] and len(built) == 5
    pool.bound = 0
    pool.give("c", ["c"])
    assert len(pool) == 0
