"""Resize images."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

#: The message for frames of different sizes, where a family encodes all frames of a video in one batch.
SAME_SIZE_IN_VIDEO = "all frames of a video need the same size: give keep_per_view or factor instead of keep"


def resized(
    pixels: Float[Tensor, "batch 3 height width"], height: int, width: int
) -> Float[Tensor, "batch 3 new_height new_width"]:
    """Return images resized by antialiased bicubic interpolation.

    It is computed in float32, because CPUs have no such kernel for half precision.
    """
    return interpolate(pixels.float(), (height, width), mode="bicubic", antialias=True).to(pixels.dtype)
