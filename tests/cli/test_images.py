"""Odd images work, broken ones are refused in one line."""

import numpy as np
import pytest
from PIL import Image

from vlmzip.cli._shared.images import load_image, save_image
from vlmzip.errors import UserError
from vlmzip.runtime.images import to_rgb


def write(folder, mode, size=(20, 10)):
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    image = Image.fromarray(values, "RGBA").convert("RGB" if mode in ("CMYK", "P") else "RGBA")
    if mode == "I;16":
        image = Image.fromarray(np.linspace(0, 65535, size[0] * size[1], dtype=np.uint16).reshape(size[1], size[0]))
    elif mode != "RGBA":
        image = image.convert(mode)
    path = folder / f"image.{'tiff' if mode == 'CMYK' else 'png'}"
    image.save(path)
    return path


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "1"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    image = load_image(write(tmp_path, mode))
    assert (image.mode, image.size) == ("RGB", (20, 10))
    assert len(image.getcolors(300)) > 1


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    grey = np.asarray(load_image(write(tmp_path, "I;16")))[..., 0]
    assert grey.min() == 0
    assert grey.max() == 255
    assert 100 < grey.mean() < 155


def test_a_dark_sixteen_bit_image_stays_dark(tmp_path):
    Image.fromarray(np.full((4, 4), 200, dtype=np.uint16)).save(tmp_path / "dark.png")
    assert np.asarray(load_image(tmp_path / "dark.png")).max() <= 1


def test_floats_in_the_unit_range_are_scaled():
    assert np.asarray(to_rgb(Image.fromarray(np.full((2, 2), 0.5, dtype=np.float32)))).max() == 128


def test_transparent_is_white():
    assert to_rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("size", [(1, 1), (20000, 3), (3, 20000)])
def test_odd_sizes(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "p.png")
    image = load_image(tmp_path / "p.png")
    assert max(image.size) <= 32 * min(image.size)


def test_images_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 10)).save(tmp_path / "p.jpg", exif=exif)
    assert load_image(tmp_path / "p.jpg").size == (10, 30)


def test_what_is_no_image_is_refused(tmp_path, monkeypatch):
    good = write(tmp_path, "RGB", (200, 200))
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:2000])
    (tmp_path / "header.png").write_bytes(good.read_bytes()[:20])
    cases = [
        ("none.png", "no file"),
        ("empty.png", "empty"),
        ("text.png", "not an image"),
        ("cut.png", "cannot be read"),
        ("header.png", "not an image|cannot be read"),
        (".", "is a folder"),
    ]
    for name, message in cases:
        with pytest.raises(UserError, match=message) as error:
            load_image(tmp_path / name)
        assert "\n" not in str(error.value)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(UserError, match="more than 10,000 pixels"):
        load_image(good)


class TestSaving:
    def test_never_over_a_source(self, tmp_path):
        source = write(tmp_path, "RGB")
        before = source.read_bytes()
        with pytest.raises(UserError, match="one of the images asked about"):
            save_image(Image.new("RGB", (1, 1)), source, sources=[str(source)])
        assert source.read_bytes() == before

    @pytest.mark.parametrize("name", ["out", "out.xyz", "out.txt"])
    def test_a_name_without_a_format_is_refused(self, tmp_path, name):
        with pytest.raises(UserError, match="no suffix of an image format"):
            save_image(Image.new("RGB", (1, 1)), tmp_path / name, sources=[])

    def test_a_failed_write_leaves_nothing(self, tmp_path, monkeypatch):
        def fail(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Image.Image, "save", fail)
        with pytest.raises(UserError, match="No space left"):
            save_image(Image.new("RGB", (1, 1)), tmp_path / "out.png", sources=[])
        assert list(tmp_path.iterdir()) == []

    def test_folders_are_made(self, tmp_path):
        save_image(Image.new("RGB", (1, 1)), tmp_path / "a" / "b.jpg", sources=[])
        assert Image.open(tmp_path / "a" / "b.jpg").size == (1, 1)
