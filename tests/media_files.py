"""Pictures and sounds that the tests of media make and look at."""

from fractions import Fraction
from pathlib import Path

import numpy as np

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def quarters() -> np.ndarray:
    """Four coloured quarters, so that every turn and flip is told from the others: uint8 [40, 60, 3]."""
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[:20, :30], picture[:20, 30:], picture[20:, :30], picture[20:, 30:] = RED, GREEN, BLUE, WHITE
    return picture


def write_sound(path: Path, samples: np.ndarray, codec: str, rate: int, layout: str = "mono") -> None:
    """Encode float32 [n], the same in every channel, with PyAV; the container follows the file name."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        if not len(samples):
            container.start_encoding()  # a header with nothing after it
            return
        resampler = av.AudioResampler(stream.codec_context.format, layout, rate)
        channels = stream.codec_context.layout.nb_channels
        frame = av.AudioFrame.from_ndarray(np.repeat(samples[None], channels, axis=0), format="fltp", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        for piece in (*resampler.resample(frame), *resampler.resample(None)):
            container.mux(stream.encode(piece))
        container.mux(stream.encode(None))


def click_at(seconds: float, length: float, rate: int) -> np.ndarray:
    """Silence of `length` seconds with a 2 ms click that starts at `seconds`."""
    samples = np.zeros(round(length * rate), np.float32)
    start = round(seconds * rate)
    samples[start : start + rate // 500] = 0.8
    return samples


def onset(samples: np.ndarray, rate: int) -> float:
    """Seconds at which the loudest event starts."""
    level = np.abs(samples)
    return int(np.argmax(level > 0.4 * level.max())) / rate
