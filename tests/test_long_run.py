"""Minutes of video from the embedded model at flat memory. Slow: 10 minutes of video, or KINORA_LONG_RUN_SECONDS."""

import gc
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from kinora.runtime import load
from torch._subclasses.fake_tensor import FakeTensor

pytest.importorskip("av")
from kinora.runtime.media import VideoWriter, iter_frames, read_audio

RATE, FPS = 16_000, 25
SECONDS = int(os.environ.get("KINORA_LONG_RUN_SECONDS", "600"))
SETTLED = min(60.0, SECONDS / 3)  # seconds after which caches, allocator and encoder have their final size
GROWTH = 32 * 2**20  # bytes: what an allocator may fragment; ten minutes of leaked latents would be 130 MiB
EXAMPLES = Path(__file__).parent.parent / "examples"


def resident_bytes() -> int:
    """Memory of this process that is in RAM now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def state_sizes() -> list[int]:
    """Bytes of every tensor storage that is alive, models and streams alike; what other tests traced has none."""
    gc.collect()
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        if issubclass(type(tensor), torch.Tensor) and type(tensor) is not FakeTensor  # isinstance would ask proxies
    }
    return sorted(storages.values())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory of the process from Linux")
def test_minutes_of_video_at_flat_memory(tmp_path: Path) -> None:
    """A voice that starts over without end, second by second, into a fragmented file."""
    voice = read_audio(EXAMPLES / "voices" / "welcome.flac", RATE)
    path = tmp_path / "long.mp4"
    avatar = load("tiny", device="cpu")
    resident: list[tuple[float, int]] = []  # seconds of video, bytes
    sizes: list[list[int]] = []
    with (
        avatar.stream(EXAMPLES / "faces" / "mira.png", seed=1) as session,
        VideoWriter(path, session.size[1], session.size[0], FPS, RATE, fragmented=True) as writer,
    ):
        for second in range(SECONDS):
            sound = voice[np.arange(second * RATE, (second + 1) * RATE) % len(voice)]
            writer.write_frames(session.feed(sound))
            writer.write_audio(sound)
            made = writer.frames_written / FPS
            assert second + 1 - 1.2 < made <= second + 1  # frames keep up with the sound: nothing piles up
            resident.append((made, resident_bytes()))
            if second % 12 == 11:  # 25 blocks: the same place in the cycle of blocks and seconds
                sizes.append(state_sizes())
        writer.write_frames(session.finish())
    settled = [used for made, used in resident if made >= SETTLED]
    half = len(settled) // 2
    assert max(settled[half:]) - max(settled[:half]) < GROWTH
    assert len(sizes) >= 2 and all(size == sizes[0] for size in sizes[1:])
    frames = 0
    for frame in iter_frames(path):
        frames += 1
        assert frame.shape == (*session.size, 3)
    assert frames == SECONDS * FPS
