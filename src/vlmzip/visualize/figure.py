"""Matplotlib figures for every plot of this package."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from PIL import Image

from vlmzip.errors import UserError, how_to_install

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vlmzip.visualize.plain_figure import PlainFigure


def import_matplotlib() -> Any:
    """Return the matplotlib module. Raise `UserError` if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError(f"figures need matplotlib: {how_to_install('eval')}") from None
    return matplotlib


def new_figure(width: int | float, height: int | float) -> PlainFigure:
    """Return an empty figure of the given size in inches. Raise `UserError` if matplotlib is not installed."""
    import_matplotlib()
    from vlmzip.visualize.plain_figure import PlainFigure  # needs matplotlib, an extra

    return PlainFigure(figsize=(width, height), dpi=150, layout="constrained")


def as_image(figure: Figure, dpi: int | None = None) -> Image.Image:
    """Return a figure as an image, at its own resolution or at `dpi`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return Image.open(buffer).convert("RGB")
