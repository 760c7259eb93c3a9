"""Pictures from files: whatever their mode, as RGB; whatever is no picture, refused in one line."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vlmzip.errors import UserError

#: Processors that scale the short side up would turn a 20000 x 3 picture into gigabytes; beyond this it is squeezed.
LONGEST_TO_SHORTEST = 32


def load_picture(path: str | Path) -> Image.Image:
    """The picture at `path` as upright RGB. Raises `UserError` for what cannot be read as one."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"there is no file {str(path)!r}")
    if path.is_dir():
        raise UserError(f"{str(path)!r} is a folder; give picture files")
    if path.stat().st_size == 0:
        raise UserError(f"{str(path)!r} is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                opened.load()
                return squeeze(to_rgb(ImageOps.exif_transpose(opened)))
    except UnidentifiedImageError:
        raise UserError(f"{str(path)!r} is no picture that Pillow can read") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = f"{Image.MAX_IMAGE_PIXELS:,}"
        raise UserError(f"{str(path)!r} would unpack to more than {limit} pixels; scale it down first") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise UserError(f"{str(path)!r} cannot be read: {error}") from None


def to_rgb(picture: Image.Image) -> Image.Image:
    """8-bit RGB: alpha over white, more than 8 bits scaled down."""
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.asarray(picture, dtype=np.float64)
        return Image.fromarray(_to_8_bit(values, sixteen_bit=picture.mode.startswith("I;16"))).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return picture.convert("RGB")


def squeeze(picture: Image.Image) -> Image.Image:
    """Shortens the long side of an extreme strip to `LONGEST_TO_SHORTEST` times the short one."""
    limit = LONGEST_TO_SHORTEST * min(picture.size)
    if max(picture.size) <= limit:
        return picture
    return picture.resize((min(picture.width, limit), min(picture.height, limit)), Image.Resampling.BOX)


def _to_8_bit(values: np.ndarray, *, sixteen_bit: bool) -> np.ndarray:
    """16-bit values, values up to 255 and floats in [0, 1] to 0..255."""
    finite = np.nan_to_num(values, posinf=0.0, neginf=0.0)
    largest = finite.max(initial=0.0)
    scale = 1 / 257 if sixteen_bit or largest > 255 else 255.0 if largest <= 1 else 1.0
    return (finite * scale).clip(0, 255).round().astype(np.uint8)
