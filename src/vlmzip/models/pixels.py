"""Images at another size."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate


def resized(
    pixels: Float[Tensor, "batch 3 height width"], height: int, width: int
) -> Float[Tensor, "batch 3 new_height new_width"]:
    """Bicubic with antialiasing, computed in float32: there is no such kernel for half precision on CPUs."""
    return interpolate(pixels.float(), (height, width), mode="bicubic", antialias=True).to(pixels.dtype)
