"""Pictures: what is read equals what was stored, upright and in RGB; bad files say what is wrong."""

from pathlib import Path

import numpy as np
import pytest
from kinora.runtime.errors import InputError, OutputError
from kinora.runtime.inputs import as_picture
from kinora.runtime.media import images as images_module
from kinora.runtime.media import read_image, write_image
from media_files import GREEN, RED, WHITE, quarters
from PIL import Image


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_pictures_survive_a_round_trip(tmp_path, name):
    write_image(tmp_path / "new" / name, quarters())
    read = read_image(tmp_path / "new" / name)
    assert read.dtype == np.uint8 and read.shape == (40, 60, 3)
    assert np.abs(read[5:15, 5:25].astype(int) - RED).max() < 8
    assert np.abs(read[25:35, 35:55].astype(int) - WHITE).max() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path, orientation):
    upright = Image.fromarray(quarters())
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the Pillow transpose that a camera of this orientation did
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "photo.png"), quarters())


def test_an_open_picture_is_read_as_its_file(tmp_path):
    """Rotated by EXIF, with 16 bits, transparent; and with the same errors."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(quarters()).resize((600, 400)).save(tmp_path / "turned.jpg", exif=exif)
    Image.fromarray(np.repeat(np.linspace(0, 65535, 32)[None], 32, axis=0).astype(np.uint16)).save(
        tmp_path / "deep.png"
    )
    Image.new("RGBA", (20, 20), (255, 0, 0, 128)).save(tmp_path / "logo.png")
    for name in ("turned.jpg", "deep.png", "logo.png"):
        with Image.open(tmp_path / name) as image:
            assert np.array_equal(as_picture(image), read_image(tmp_path / name))
    data = (tmp_path / "turned.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    with Image.open(tmp_path / "cut.jpg") as cut:
        bad = {"the picture is damaged or cut off": cut, "at least 16": Image.new("RGB", (8, 300))}
        for told, image in bad.items():
            with pytest.raises(InputError, match=told):
                as_picture(image)


def test_transparency_is_laid_on_white(tmp_path):
    rgba = np.zeros((20, 20, 4), np.uint8)
    rgba[:10] = (255, 0, 0, 128)
    Image.fromarray(rgba).save(tmp_path / "logo.webp", lossless=True)
    read = read_image(tmp_path / "logo.webp")
    assert tuple(read[15, 15]) == WHITE
    assert np.abs(read[5, 5].astype(int) - (255, 127, 127)).max() <= 1


def test_every_kind_of_pixel_becomes_rgb(tmp_path):
    picture = Image.fromarray(quarters())
    ramp = np.repeat(np.linspace(0, 65535, 32)[None], 32, axis=0)
    picture.quantize(8).save(tmp_path / "palette.png")
    picture.convert("L").save(tmp_path / "grey.png")
    picture.convert("1").save(tmp_path / "bits.png")
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "deep.png")
    palette = picture.quantize(8)
    palette.save(tmp_path / "hole.png", transparency=palette.getpixel((5, 5)))

    assert np.array_equal(read_image(tmp_path / "palette.png"), quarters())
    assert tuple(read_image(tmp_path / "grey.png")[5, 5]) == (76, 76, 76)  # ITU-R 601 luma of red
    assert tuple(read_image(tmp_path / "bits.png")[30, 45]) == WHITE
    assert np.abs(read_image(tmp_path / "cmyk.jpg")[5, 5].astype(int) - RED).max() < 8
    assert np.array_equal(read_image(tmp_path / "deep.png")[0, :, 0], np.round(ramp[0] // 1 / 257).astype(np.uint8))
    assert tuple(read_image(tmp_path / "hole.png")[5, 5]) == WHITE
    assert tuple(read_image(tmp_path / "hole.png")[5, 45]) == GREEN


def test_the_readme_names_every_format():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    told = readme.split("Pictures: ")[1].split(", EXIF")[0]
    assert told.upper().split(", ") == list(images_module.FORMATS)


def test_broken_exif_does_not_cost_the_picture(tmp_path):
    Image.fromarray(quarters()).save(tmp_path / "photo.png", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert np.array_equal(read_image(tmp_path / "photo.png"), quarters())


def test_bad_pictures_say_what_to_do(tmp_path):
    Image.fromarray(quarters()).resize((600, 400)).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "notes.png").write_text("not a picture at all")
    (tmp_path / "empty.png").touch()
    Image.new("RGB", (8, 300)).save(tmp_path / "thin.png")
    Image.new("1", (16_385, 20)).save(tmp_path / "wide.png")
    Image.new("1", (9_000, 9_000)).save(tmp_path / "big.png")
    Image.new("F", (20, 20)).save(tmp_path / "float.tiff")
    for name, told in {
        "missing.png": "no such picture",
        "cut.jpg": "cut off",
        "notes.png": "not a picture",
        "empty.png": "empty file",
        "thin.png": "at least 16",
        "wide.png": "scale it down",
        "big.png": "scale it down",
        "float.tiff": "8 bits",
        ".": "is a folder",
    }.items():
        with pytest.raises(InputError, match=told):
            read_image(tmp_path / name)
    with pytest.raises(InputError, match=r"\.png"):
        write_image(tmp_path / "face.xyz", quarters())
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        write_image(tmp_path / "file" / "face.png", quarters())


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path, monkeypatch):
    Image.new("1", (9_000, 9_000)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(images_module, "_upright", lambda image: pytest.fail("the pixels were decoded"))
    with pytest.raises(InputError, match="scale it down"):
        read_image(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    with pytest.raises(InputError, match="absurdly many pixels"):
        read_image(tmp_path / "bomb.png")
