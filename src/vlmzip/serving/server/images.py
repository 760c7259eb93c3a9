"""Images of a request: bytes of a data URL or of an allowed address, checked before they are decoded."""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Sequence

from PIL import Image

from vlmzip.errors import UserError, alternatives
from vlmzip.runtime.images import COMMON_FORMATS, load_image
from vlmzip.serving.server.errors import RequestError
from vlmzip.serving.server.fetch import Left, fetch
from vlmzip.serving.server.settings import Settings

#: A progressive JPEG has about ten scans. Each takes as long to decode as the image, and they can be nearly empty.
MOST_SCANS = 100
_DATA = re.compile(r"data:image/[\w.+-]{1,40};base64,", re.ASCII | re.IGNORECASE)


def read_images(urls: Sequence[str], settings: Settings) -> list[Image.Image]:
    """Return the images as upright RGB. Raise `RequestError` for any that cannot be used, before decoding the first.

    This can take long: call it in a thread.
    """
    refuse_many(len(urls), settings)
    opened, pixels, left = [], 0, Left(settings)
    for number, url in enumerate(urls, 1):
        name = f"image {number}"
        image = _open(_bytes_of(url, name, settings, left), name)
        pixels += image.width * image.height
        if pixels > settings.max_pixels:
            size = f"{image.width} x {image.height} pixels"
            raise RequestError(
                f"{name} has {size}; all images of a request may have {settings.max_pixels:,} together: scale it down",
                code="image_too_large",
                param="messages",
            )
        opened.append(image)
    return [_decoded(image, f"image {number}") for number, image in enumerate(opened, 1)]


def refuse_many(count: int, settings: Settings) -> None:
    """Raise `RequestError` if a request has more images than are allowed."""
    if count > settings.max_images:
        raise RequestError(
            f"the request has {count} images; the limit is {settings.max_images}",
            code="too_many_images",
            param="messages",
        )


def _bytes_of(url: str, name: str, settings: Settings, left: Left) -> bytes:
    match = _DATA.match(url)
    if match is None:
        if url[:5].lower() == "data:":
            raise RequestError(
                f"{name} must be {alternatives(COMMON_FORMATS)}, in a URL like data:image/png;base64,…",
                code="invalid_image_url",
                param="messages",
            )
        return fetch(url, name, settings, left)
    try:
        content = base64.b64decode(url[match.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(f"{name} is not valid base64", code="invalid_base64", param="messages") from None
    if not content:
        raise RequestError(f"{name} is empty", code="invalid_image", param="messages")
    return content


def _open(content: bytes, name: str) -> Image.Image:
    """Read the header of an image."""
    try:
        image = Image.open(io.BytesIO(content), formats=COMMON_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        message = f"{name} would unpack to more than {Image.MAX_IMAGE_PIXELS:,} pixels; scale it down"
        raise RequestError(message, code="image_too_large", param="messages") from None
    except Exception:  # Pillow's plugins raise many types
        message = f"{name} is not {alternatives(COMMON_FORMATS)}"
        raise RequestError(message, code="invalid_image", param="messages") from None
    # Inside a scan, no other byte follows 0xFF than 0 and those of restarts, so this counts scans.
    if image.format == "JPEG" and content.count(b"\xff\xda") > MOST_SCANS:
        message = f"{name} is a JPEG of more than {MOST_SCANS} scans; save it anew"
        raise RequestError(message, code="invalid_image", param="messages")
    return image


def _decoded(image: Image.Image, name: str) -> Image.Image:
    try:
        return load_image(image)
    except UserError as error:
        message = str(error).removeprefix("an image").strip()
        logged = f"{name} cannot be used"  # Pillow quotes parts of images
        raise RequestError(f"{name} {message}", code="invalid_image", param="messages", logged=logged) from None
