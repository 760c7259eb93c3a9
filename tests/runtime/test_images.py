"""One way to read images: the same file is the same pixels in every command, and a broken one is one line."""

import io
import logging
import os
import random
import re
import struct
import subprocess
import sys
import warnings
import zlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageOps, TiffImagePlugin, features

import vlmzip
from tests.families import FAMILIES, tiny_llava
from vlmzip import DFMR, calibrate
from vlmzip.cli._shared.images import load_image as load_in_cli
from vlmzip.errors import UserError
from vlmzip.lab.lmms.requests import read_chat
from vlmzip.lab.tasks.folder import folder_task
from vlmzip.runtime.images import ImageError, load_image
from vlmzip.training.records import BadRecord, TrainingRecord, Turn

#: Each format with the modes that it can hold.
FORMATS = {
    "png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "jpg": ("L", "RGB", "CMYK"),
    "webp": ("RGB", "RGBA"),
    "gif": ("1", "L", "P"),
    "bmp": ("1", "L", "P", "RGB", "RGBA"),
    "tiff": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F", "LAB", "YCbCr"),
    **({"avif": ("RGB", "RGBA")} if features.check("avif") else {}),
}
WITH_EXIF = ("png", "jpg", "webp", "tiff")
FILES = [(suffix, mode) for suffix, modes in FORMATS.items() for mode in modes]


def draw(mode, size=(40, 24)):
    """Something without any symmetry, half of it see-through where the mode can be."""
    rows, cols = np.mgrid[: size[1], : size[0]]
    values = np.stack([4 * cols, 6 * rows, 255 - 3 * cols, np.where(cols < size[0] // 2, 255, 40)], -1) % 256
    image = Image.fromarray(values.astype(np.uint8), "RGBA")
    if mode == "I;16":
        return Image.fromarray((values[..., 0] * 257).astype(np.uint16))
    if mode == "LAB":
        return Image.merge("LAB", image.convert("RGB").split())
    return image if mode == "RGBA" else image.convert("RGB" if mode in ("P", "CMYK") else "RGBA").convert(mode)


def save(folder, suffix, mode, size=(40, 24), orientation=None):
    path = folder / f"{mode.replace(';', '')}-{size[0]}x{size[1]}-{orientation}.{suffix}"
    settings = {"transparency": 3} if mode == "P" and suffix in ("png", "gif") else {}
    if orientation is not None:
        settings["exif"] = Image.Exif()
        settings["exif"][0x0112] = orientation
    draw(mode, size).save(path, **settings)
    return path


def asked(path):
    return load_in_cli(str(path))


def evaluated(path):
    questions = path.parent / f"{path.name}.jsonl"
    questions.write_text(f'{{"image": "{path.name}", "question": "?", "answers": ["yes"]}}\n')
    (sample,) = folder_task(str(questions), "exact", None, None).samples
    return sample.load()


def trained_on(path):
    (image,) = TrainingRecord("", (Turn("<image>", "!"),), (path.name,)).load_images(path.parent)
    return image


def handed_over(how, path):
    """By a task of lmms-eval: a path, or what Pillow has opened."""
    given = Image.open(path) if how == "opened" else str(path)
    messages = [{"role": "user", "content": [{"type": "image", "url": given}]}]
    (image,) = read_chat(messages, ["<image>"]).images
    return image


READERS = {
    "eval": evaluated,
    "train": trained_on,
    "lmms, a path": partial(handed_over, "path"),
    "lmms, of Pillow": partial(handed_over, "opened"),
}


def same(one, other):
    return (one.mode, one.size, one.tobytes()) == (other.mode, other.size, other.tobytes())


@pytest.mark.parametrize(("suffix", "mode"), FILES)
@pytest.mark.parametrize("reader", READERS)
def test_the_same_file_is_the_same_pixels_everywhere(tmp_path, reader, suffix, mode):
    for size in ((40, 24), (1, 1), (2000, 3), (3, 2000)):
        path = save(tmp_path, suffix, mode, size)
        assert same(READERS[reader](path), asked(path)), size


@pytest.mark.parametrize("suffix", WITH_EXIF)
@pytest.mark.parametrize("reader", ["ask", *READERS])
def test_all_orientations_look_alike(tmp_path, reader, suffix):
    """As a camera writes them: turned by the opposite of what EXIF says is to be done."""
    read = {"ask": asked, **READERS}[reader]
    upright = draw("RGB")
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that brings back what ImageOps does
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
        path = tmp_path / f"{orientation}.{suffix}"
        lossless = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
        stored.save(path, exif=exif, **lossless)
        seen = read(path)
        assert seen.size == upright.size, orientation
        off = np.abs(np.asarray(seen, dtype=int) - np.asarray(upright, dtype=int))
        assert off.max() <= (8 if suffix == "jpg" else 0), orientation


def test_calibration_sees_what_is_asked_about(tmp_path):
    """Given paths, or what Pillow has opened: the same pixels reach the processor."""
    paths = [save(tmp_path, "jpg", "RGB", orientation=6), save(tmp_path, "png", "RGBA"), save(tmp_path, "tiff", "I;16")]
    processor, model = FAMILIES["llava"].processor(), tiny_llava()
    seen = []

    def watched(images, **settings):
        seen.extend(images)
        return processor.image_processor(images, **settings)

    for images in (paths, [Image.open(path) for path in paths]):
        seen.clear()
        calibrate(model, images, DFMR(), 36, processor=SimpleNamespace(image_processor=watched))
        assert all(same(one, asked(path)) for one, path in zip(seen, paths, strict=True))


def test_a_thin_image_is_squeezed_wherever_it_comes_from(tmp_path):
    path = save(tmp_path, "png", "RGB", (4000, 5))
    assert {READERS[name](path).size for name in READERS} == {(160, 5)} == {load_image(Image.open(path)).size}


def test_an_animation_is_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for suffix in ("gif", "png", "webp", "tiff"):
        frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
        red, green, blue = load_image(tmp_path / f"a.{suffix}").getpixel((4, 4))
        assert red > 250 > 5 > green + blue - 4, suffix


def test_a_profile_changes_nothing(tmp_path):
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    draw("RGB").save(tmp_path / "profile.png", icc_profile=profile)
    assert same(load_image(tmp_path / "profile.png"), draw("RGB"))


@pytest.mark.parametrize("mode", ["RGBa", "La"])
def test_premultiplied_colours_lie_on_white_too(mode):
    straight = {"RGBa": "RGBA", "La": "LA"}[mode]
    clear = Image.new(straight, (2, 2), (0,) * len(straight)).convert(mode)
    assert load_image(clear).getpixel((0, 0)) == (255, 255, 255)


def test_the_transparent_value_of_sixteen_bits_is_white(tmp_path):
    Image.fromarray(np.array([[7, 30000]], dtype=np.uint16)).save(tmp_path / "p.png", transparency=7)
    assert [pixel[0] for pixel in map(load_image(tmp_path / "p.png").getpixel, [(0, 0), (1, 0)])] == [255, 117]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_transparent_value_of_few_bits_is_white(tmp_path, bits):
    """A grey PNG of two pixels: the value 0 is black, the value 1 is transparent."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = bytes([0, 0, 1]) if bits == 8 else bytes([0, 1 << (8 - 2 * bits)])  # a filter byte, then the pixels
    header = struct.pack(">IIBBBBB", 2, 1, bits, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"tRNS", struct.pack(">H", 1)), (b"IDAT", zlib.compress(row)), (b"IEND", b""))
    (tmp_path / "p.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))
    image = load_image(tmp_path / "p.png")
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 0), (255, 255, 255)]


def test_what_pillow_has_opened_is_left_as_it_was(tmp_path):
    path = save(tmp_path, "jpg", "RGB", orientation=6)
    with Image.open(path) as opened:
        load_image(opened)
        assert (opened.size, opened.getexif()[0x0112]) == ((40, 24), 6)


# ---------------------------------------------------------------- what cannot be read


def bomb(folder):
    path = folder / "bomb.png"
    Image.new("1", (500, 500)).save(path)
    return path


@pytest.mark.parametrize("limit", [200_000, 100_000])  # Pillow warns from the limit on, and refuses from twice of it
@pytest.mark.parametrize("reader", ["ask", "eval", "train", "lmms, a path"])
def test_what_unpacks_to_too_much_is_refused_everywhere(tmp_path, monkeypatch, reader, limit):
    path = bomb(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises((UserError, BadRecord), match=r"more than .00,000 pixels|an image has too many pixels"):
        {"ask": asked, **READERS}[reader](path)


def test_what_was_opened_in_spite_of_a_warning_is_refused(tmp_path, monkeypatch):
    opened = Image.open(bomb(tmp_path))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200_000)
    with pytest.raises(UserError, match="more than 200,000 pixels"):
        load_image(opened)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("Failed to decode frame 0: x"), struct.error("unpack"), KeyError("tag"), IndexError("out"),
     TypeError("None"), zlib.error("Error -3"), OverflowError("big"), AttributeError("no"), ZeroDivisionError("0"),
     AssertionError(), MemoryError(), NotImplementedError("compression 9"), RecursionError("deep"),
     UnicodeDecodeError("utf-8", b"x", 0, 1, "no"), OSError(5, "Input/output error")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
@pytest.mark.parametrize("where", ["open", "load"])
def test_whatever_a_plugin_raises_is_one_line(tmp_path, monkeypatch, error, where):
    def broken(*_, **__):
        raise error

    path = save(tmp_path, "png", "RGB")
    monkeypatch.setattr(*((Image, "open") if where == "open" else (Image.Image, "load")), broken)
    with pytest.raises(ImageError, match=r"^'.*' cannot be read: .") as told:
        asked(path)
    assert "\n" not in str(told.value)
    with pytest.raises(BadRecord, match=r"^an image cannot be read$"):
        trained_on(path)


@pytest.mark.skipif("avif" not in FORMATS, reason="this Pillow reads no AVIF")
def test_a_broken_avif_is_one_line(tmp_path):
    whole = save(tmp_path, "avif", "RGB", (64, 64)).read_bytes()
    path, found = tmp_path / "broken.avif", set()
    start = whole.index(b"mdat")
    for place in range(start + 4, len(whole)):
        path.write_bytes(whole[:place] + b"\0" * (len(whole) - place))
        try:
            load_image(path)
        except UserError as error:
            found.add(str(error))
    assert any("decode" in said for said in found), found
    assert not any("\n" in said for said in found)


@pytest.mark.parametrize(
    ("name", "said", "kind"),
    [
        ("none.png", "there is no file", "is missing"),
        ("x" * 5000, "File name too long", "cannot be read"),
        ("a\0b.png", "null byte", "cannot be read"),
        (".", "is a folder", "cannot be read"),
        ("/dev/null", "is a device or a pipe, not a file", "cannot be read"),
        ("https://example.org/a.png", "is not a file: download the image", "is a URL or data, not a file"),
        ("data:image/png;base64," + "iVBORw0KGgo/" * 900, "is not a file: download", "is a URL or data, not a file"),
    ],
)
def test_what_is_no_file_is_said_in_a_short_line(tmp_path, name, said, kind):
    with pytest.raises(ImageError, match=re.escape(said)) as told:
        load_image(tmp_path / name)
    assert len(str(told.value)) < 400
    with pytest.raises(BadRecord, match=f"^an image {re.escape(kind)}$"):
        TrainingRecord("", (Turn("<image>", "!"),), (name,)).load_images(tmp_path)


def test_an_empty_path_is_said():
    with pytest.raises(ImageError, match="the path of an image is empty"):
        load_image("")


def test_broken_exif_says_nothing_about_the_pixels(tmp_path):
    draw("RGB").save(tmp_path / "p.png", exif=b"Exif\0\0no TIFF header")
    with pytest.raises(SyntaxError, match="not a TIFF file"):
        ImageOps.exif_transpose(Image.open(tmp_path / "p.png"))
    assert same(load_image(tmp_path / "p.png"), draw("RGB"))


def broken_files(seed, count):
    """Files of every format with some bytes changed, or cut short."""
    rng = random.Random(seed)
    whole = []
    for suffix, modes in FORMATS.items():
        for mode in modes:
            for compression in (None, "tiff_lzw", "group4", "jpeg") if suffix == "tiff" else (None,):
                buffer, settings = io.BytesIO(), {} if compression is None else {"compression": compression}
                try:
                    kind = Image.registered_extensions()[f".{suffix}"]
                    draw(mode).save(buffer, kind, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0", **settings)
                except OSError:
                    continue  # a compression that does not take the mode
                whole.append(buffer.getvalue())
    for _ in range(count):
        data = bytearray(rng.choice(whole))
        for _ in range(rng.choice([1, 3, 10])):
            data[rng.randrange(min(len(data), rng.choice([40, 200, 100_000])))] = rng.randrange(256)
        yield bytes(data[: rng.randrange(1, len(data))] if rng.random() < 0.3 else data)


def test_broken_files_print_nothing_and_raise_nothing_else(tmp_path, capfd):
    outcomes, lines, files = {"read": 0, "refused": 0}, set(), list(broken_files(0, 600))
    capfd.readouterr()  # of libtiff, while they were made
    for data in files:
        (tmp_path / "file").write_bytes(data)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                load_image(tmp_path / "file")
                outcomes["read"] += 1
            except UserError as error:
                outcomes["refused"] += 1
                lines.add(str(error))
        assert not warned
    assert not [line for line in lines if "\n" in line]
    assert min(outcomes.values()) > 50
    assert capfd.readouterr() == ("", "")


def test_stderr_is_back_afterwards(tmp_path, capfd):
    load_image(save(tmp_path, "tiff", "RGB"))
    (tmp_path / "cut.tiff").write_bytes(save(tmp_path, "tiff", "RGB").read_bytes()[:-99])
    with pytest.raises(UserError):
        load_image(tmp_path / "cut.tiff")
    os.write(2, b"still here")
    assert capfd.readouterr().err == "still here"


def test_without_a_stderr_images_are_read_too(tmp_path):
    """The image's own file then has the number of stderr."""
    code = "import sys; from vlmzip.runtime.images import load_image as f; print(f(sys.argv[1]).size)"
    command = f"exec '{sys.executable}' -c '{code}' '{save(tmp_path, 'tiff', 'RGB')}' 2>&-"
    assert subprocess.run(command, shell=True, stdout=subprocess.PIPE, text=True).stdout == "(40, 24)\n"


def test_what_pillow_logs_is_not_printed_beside_ours(tmp_path):
    code = (
        "import logging, vlmzip.runtime.images;"
        " logging.getLogger('PIL.TiffImagePlugin').error('More samples per pixel than can be decoded')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert TiffImagePlugin.logger.name.startswith("PIL.")
    assert logging.getLogger("PIL").propagate  # who set logging up gets them all


def test_no_file_of_the_user_is_read_in_another_way():
    """Only the loader opens image files; others read images from memory."""
    folder = Path(vlmzip.__file__).parent
    found = {str(path.relative_to(folder)) for path in folder.rglob("*.py") if "Image.open(" in path.read_text()}
    own = {"visualize/figure.py", "serving/server/images.py"}  # a plot that the package drew, and a request's bytes
    assert found - own == {"runtime/images.py"}
