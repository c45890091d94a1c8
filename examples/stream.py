"""Push sound, get frames: what a live application does. Here a file plays the microphone.

python examples/stream.py
"""

from pathlib import Path

from kinora.runtime import load
from kinora.runtime.media import VideoWriter, read_audio

HERE = Path(__file__).parent
PIECE = 1600  # samples: 100 ms at 16 kHz, any length will do


def main() -> None:
    voice = read_audio(HERE / "voices" / "welcome.flac")  # float32, mono, 16 kHz
    avatar = load("tiny")
    out = Path("out/stream.mp4")
    out.parent.mkdir(exist_ok=True)
    with avatar.stream(HERE / "faces" / "mira.png", seed=1) as session:
        height, width = session.size
        with VideoWriter(out, width, height, fragmented=True) as video:
            for start in range(0, len(voice), PIECE):
                piece = voice[start : start + PIECE]
                video.write_audio(piece)
                video.write_frames(session.feed(piece))  # uint8 [T, H, W, 3]: 9 with the first block, then 12
            video.write_frames(session.finish())
        print(f"{out}: {session.stats}")


if __name__ == "__main__":
    main()
