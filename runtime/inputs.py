"""What people pass as picture and sound -> arrays, with errors that say what to do."""

import os
from operator import index
from pathlib import Path
from typing import SupportsIndex

import numpy as np
from PIL import Image

from .errors import InputError
from .media.images import read_image, rgb_pixels

ImageInput = str | os.PathLike[str] | Image.Image | np.ndarray
AudioInput = str | os.PathLike[str] | np.ndarray


def as_picture(image: ImageInput) -> np.ndarray:
    """uint8 RGB [H, W, 3] of a file, a PIL image (like its file: upright, transparency on white) or such an array."""
    if isinstance(image, str | os.PathLike):
        return read_image(image)
    if isinstance(image, Image.Image):
        return rgb_pixels(image, "the picture")
    if not isinstance(image, np.ndarray):
        raise InputError(f"the picture is a {type(image).__name__}; pass a path, a PIL image or a uint8 array")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise InputError(f"the picture is {image.dtype} {list(image.shape)}; pass uint8 RGB [height, width, 3]")
    return image


def as_samples(samples: np.ndarray) -> np.ndarray:
    """float32 [n] of mono sound at 16 kHz, 1 is full scale; checked for shape, type and finite values."""
    if not isinstance(samples, np.ndarray):
        raise InputError(f"the sound is a {type(samples).__name__}; pass a float32 array of samples at 16 kHz")
    if samples.ndim != 1:
        raise InputError(f"the sound has shape {list(samples.shape)}; pass mono samples [n] (average the channels)")
    if not np.issubdtype(samples.dtype, np.floating):
        raise InputError(f"the sound is {samples.dtype}; pass float32 in [-1, 1] (divide int16 by 32768)")
    if not np.isfinite(samples).all():
        raise InputError("the sound holds NaN or infinite samples; repair or re-record it")
    return samples.astype(np.float32, copy=False)


def as_seed(seed: SupportsIndex) -> int:
    """A seed that a generator takes. Raises InputError for anything but a whole number from 0 to 2^63 - 1."""
    try:
        number = index(seed)
    except TypeError:
        number = -1
    if not 0 <= number < 2**63:
        raise InputError(f"the seed is {seed!r}; pass a whole number from 0 to 2^63 - 1")
    return number


def as_sound(audio: AudioInput, model_rate: int, file_rate: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(samples for the model at `model_rate`, samples to be heard, their rate) of a file or an array.

    A file is heard at `file_rate`, an array is at `model_rate` already. Errors: InputError for an unreadable, empty
    or wrongly typed sound.
    """
    if isinstance(audio, str | os.PathLike):
        from .media.audio import read_audio  # PyAV is needed for files only

        return read_audio(Path(audio), model_rate), read_audio(Path(audio), file_rate), file_rate
    samples = as_samples(audio)
    if not len(samples):
        raise InputError("the sound is empty; pass at least one sample")
    return samples, samples, model_rate
