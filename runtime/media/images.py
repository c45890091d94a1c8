"""Pictures as people have them -> uint8 RGB arrays, and back to files."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import InputError, OutputError

MIN_SIDE = 16
MAX_SIDE = 16_384
MAX_PIXELS = 64_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF")
WRITABLE = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """The picture as uint8 RGB [H, W, 3].

    Upright after its EXIF orientation; transparent parts on white; the first frame of an animation; 16-bit
    samples scaled to 8 bits; palette, greyscale and CMYK converted. Embedded colour profiles are not applied.
    Raises InputError when the file is missing, is no picture in one of `FORMATS`, is cut off, has a side outside
    MIN_SIDE to MAX_SIDE or more than MAX_PIXELS (checked before anything is decoded).
    """
    path = Path(path)
    _check_file(path)
    with _clear_errors(str(path)), Image.open(path, formats=FORMATS) as image:
        return rgb_pixels(image, str(path))


def rgb_pixels(image: Image.Image, name: str) -> np.ndarray:
    """What `read_image` gives for a picture that is open, with its errors, in which it is called `name`."""
    _check_size(name, *image.size)
    with _clear_errors(name):
        return np.array(_to_rgb(name, _upright(image)))


def write_image(path: str | os.PathLike[str], image: np.ndarray) -> None:
    """Write uint8 RGB [H, W, 3] as .png, .jpg or .webp; missing folders are made.

    Raises InputError for another ending, OutputError when the file cannot be written.
    """
    path = Path(path)
    kind = WRITABLE.get(path.suffix.lower())
    if kind is None:
        raise InputError(f"cannot write a picture as {path.name!r}; end the name with {', '.join(WRITABLE)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(image)).save(
            path, format=kind, **({"quality": 95} if kind != "PNG" else {})
        )
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def _clear_errors(name: str) -> Iterator[None]:
    """What Pillow raises becomes an InputError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large pictures (our own limit is lower), broken EXIF data
            yield
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{name} has absurdly many pixels; the limit is {MAX_PIXELS // 10**6} million") from error
    except UnidentifiedImageError as error:
        known = ", ".join(FORMATS).lower()
        raise InputError(f"{name} is not a picture that can be read; give one of: {known}") from error
    except (OSError, SyntaxError, ValueError) as error:  # what its decoders raise on damaged data
        raise InputError(f"{name} is damaged or cut off ({error}); export the picture again") from error


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise InputError(f"{path} is a folder; give a picture file")
    if not path.exists():
        raise InputError(f"no such picture: {path}; check the path")
    if not os.access(path, os.R_OK):
        raise InputError(f"no permission to read {path}")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is an empty file; give a picture")


def _check_size(name: str, width: int, height: int) -> None:
    if min(width, height) < MIN_SIDE:
        raise InputError(f"{name} is {width}x{height} pixels; each side must have at least {MIN_SIDE}")
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        limit = f"at most {MAX_SIDE} a side and {MAX_PIXELS // 10**6} million in all"
        raise InputError(f"{name} is {width}x{height} pixels; scale it down ({limit})")


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # unreadable EXIF data must not cost the picture
        return image


def _to_rgb(name: str, image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a sample, in "I;16" or widened to 32
        samples = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(np.clip(samples + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise InputError(f"{name} holds floating-point samples of unknown range; save it with 8 bits a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
