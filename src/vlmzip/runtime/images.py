"""Read images as upright 8-bit RGB, and refuse anything else with a one-line message.

Every command reads its images here, so a file gives the same pixels everywhere. Of an animation, the first frame is
read. Colour profiles are not applied, as in the code of the published models.
"""

from __future__ import annotations

import io
import logging
import os
import stat
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vlmzip.errors import UserError, alternatives

#: The formats in common use. Pillow knows others, whose decoders start programs or are rarely used.
COMMON_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
#: The largest ratio of the sides; longer images are squeezed. A processor that scales the short side up would turn a
#: 20000 x 3 image into gigabytes.
LONGEST_TO_SHORTEST = 32
#: Modes with alpha, and modes whose colours are premultiplied with alpha.
ALPHA, PREMULTIPLIED = ("RGBA", "LA", "PA"), {"RGBa": "RGBA", "La": "LA"}

# Pillow's plugins log what they refuse. Without a handler, Python would print it next to our message.
logging.getLogger("PIL").addHandler(logging.NullHandler())


def common_suffixes() -> frozenset[str]:
    """Return the suffixes of files in a common format, by which images are found in a folder."""
    return frozenset(suffix for suffix, format in Image.registered_extensions().items() if format in COMMON_FORMATS)


class ImageError(UserError):
    """An image that cannot be used."""

    def __init__(self, message: str, kind: str = "cannot be read") -> None:
        super().__init__(message)
        self.kind = kind
        """The reason in a few words, the same text for all errors of one kind."""


def load_image(image: str | os.PathLike[str] | Image.Image) -> Image.Image:
    """Return the image at a path, or an image that Pillow has opened, as upright RGB.

    Raise `ImageError` if it cannot be read as an image.
    """
    if isinstance(image, Image.Image):
        return _finished(image, _name_of(image))
    if not os.fspath(image):
        raise ImageError("the path of an image is empty; give an image file")
    name = repr(shortened(os.fspath(image)))
    path = Path(image)
    check_file(path, name)
    with _errors_in_one_line(name), Image.open(path) as opened:
        return _finished(opened, name)


def decode(content: bytes, name: str, formats: tuple[str, ...]) -> Image.Image:
    """Return the image in the content of a file, like `load_image`; `name` stands for the file in messages."""
    with _errors_in_one_line(name):
        try:
            opened = Image.open(io.BytesIO(content), formats=formats)
        except UnidentifiedImageError:
            raise ImageError(f"{name} is not a {alternatives(formats)} image") from None
        with opened:
            return _finished(opened, name)


def _name_of(image: Image.Image) -> str:
    return repr(name) if isinstance(name := getattr(image, "filename", None), str) and name else "an image"


def shortened(text: str) -> str:
    """Return the text for a message, without the rest of a very long one."""
    return text if len(text) <= 200 else f"{text[:100]}…"


def check_file(path: Path, name: str) -> None:
    """Raise `ImageError` unless there is a file with content at `path`; `name` stands for it in the message."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        if _is_address(path):
            message = f"{name} is not a file: download the image and give its path"
            raise ImageError(message, "is a URL or data, not a file") from None
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise ImageError(f"there is no file {name}", "is missing") from None
        raise ImageError(f"{name} cannot be read: {_cause(error)}") from None
    if path.is_dir():
        raise ImageError(f"{name} is a folder; give image files")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"{name} is a device or a pipe, not a file")
    if status.st_size == 0:
        raise ImageError(f"{name} is empty")


def _is_address(path: Path) -> bool:
    """Return whether `path` is a URL or a `data:` URI, possibly inside a folder that was joined to it."""
    return any(part in ("http:", "https:") or part.startswith("data:image") for part in path.parts)


def _finished(image: Image.Image, name: str) -> Image.Image:
    """Decode an image and convert it to the form that processors get."""
    with _errors_in_one_line(name), _without_lines_of_libtiff(image):
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and image.width * image.height > limit:
            raise Image.DecompressionBombError  # Pillow itself only warns of it, perhaps before this call
        _scale_clear_value(image)
        image.load()
        return squeeze(to_rgb(_upright(image)))


def _scale_clear_value(image: Image.Image) -> None:
    """Scale the transparent value of a 2- or 4-bit PNG to 8 bits, as Pillow scales its pixels."""
    tiles = getattr(image, "tile", None)
    rawmode = tiles[0][3] if tiles else None
    factor = {"L;2": 85, "L;4": 17}.get(rawmode) if isinstance(rawmode, str) else None
    if factor is not None and isinstance(clear := image.info.get("transparency"), int):
        image.info["transparency"] = factor * clear


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF data does not affect the pixels: viewers show the image as it is stored
        return image


class _Ignoring:
    """Ignores warnings while at least one thread is in a block.

    Filters belong to the process, so threads that each save and restore them could restore those of another thread.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._inside == 0:
                self._before.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
                warnings.simplefilter("error", Image.DecompressionBombWarning)
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._before.close()


#: Ignores warnings in a block, of which several threads can be in one at once. Too large images are still errors.
ignoring_warnings = _Ignoring()


@contextmanager
def _errors_in_one_line(name: str) -> Iterator[None]:
    """Raise `ImageError` for any error of Pillow's plugins, and suppress their warnings."""
    try:
        with ignoring_warnings():
            yield
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not an image that Pillow can read") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = f"{Image.MAX_IMAGE_PIXELS:,}"
        message = f"{name} would unpack to more than {limit} pixels; scale it down first"
        raise ImageError(message, "has too many pixels") from None
    except Exception as error:  # plugins raise many types: RuntimeError for AVIF, struct.error, KeyError …
        raise ImageError(f"{name} cannot be read: {_cause(error)}") from None


def _cause(error: Exception) -> str:
    """Return an error's message on one line of at most 200 characters."""
    cause = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(cause).split())[:200]


_ONE_AT_A_TIME = threading.Lock()


@contextmanager
def _without_lines_of_libtiff(image: Image.Image) -> Iterator[None]:
    """Suppress the messages of libtiff, which writes directly to the process's stderr."""
    if image.format != "TIFF" or sys.__stderr__ is None:  # without stderr, descriptor 2 may be the image file
        yield
        return
    with _ONE_AT_A_TIME:
        with suppress(Exception):
            sys.stderr.flush()
        stderr = os.dup(2)
        try:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB: alpha is composed over white, and deeper colours are scaled down."""
    if image.mode.startswith("I") or image.mode == "F":
        return _from_many_bits(image)
    if image.mode in PREMULTIPLIED:
        image = image.convert(PREMULTIPLIED[image.mode])
    if image.mode in ALPHA or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def squeeze(image: Image.Image) -> Image.Image:
    """Shorten the long side of an extreme strip to `LONGEST_TO_SHORTEST` times the short side."""
    limit = LONGEST_TO_SHORTEST * min(image.size)
    if max(image.size) <= limit:
        return image
    return image.resize((min(image.width, limit), min(image.height, limit)), Image.Resampling.BOX)


def _from_many_bits(image: Image.Image) -> Image.Image:
    """Convert an image of integers or floats of more than 8 bits to RGB."""
    sixteen_bit = image.mode.startswith("I;16")
    values = np.asarray(image, dtype=np.float64)
    clear = image.info.get("transparency")  # the transparent value of a 16-bit PNG
    if sixteen_bit and isinstance(clear, int):
        values = np.where(values == clear, 65535, values)
    return Image.fromarray(_to_8_bit(values, sixteen_bit=sixteen_bit)).convert("RGB")


def _to_8_bit(values: np.ndarray, *, sixteen_bit: bool) -> np.ndarray:
    """Scale 16-bit values and floats in [0, 1] to 0..255; values up to 255 are kept."""
    finite = np.nan_to_num(values, posinf=0.0, neginf=0.0)
    largest = finite.max(initial=0.0)
    scale = 1 / 257 if sixteen_bit or largest > 255 else 255.0 if largest <= 1 else 1.0
    return (finite * scale).clip(0, 255).round().astype(np.uint8)
