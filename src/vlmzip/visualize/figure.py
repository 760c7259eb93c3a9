"""Matplotlib figures for every plot of this package."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from PIL import Image

from vlmzip.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def import_matplotlib() -> Any:
    """Return the matplotlib module. Raise `UserError` if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("figures need matplotlib: pip install 'vlmzip[eval]'") from None
    return matplotlib


def new_figure(width: int | float, height: int | float) -> Figure:
    """Return an empty figure of the given size in inches that does not read `$` in text as mathematics.

    Method names may contain `$`. Tick labels are excepted: matplotlib writes powers as mathematics. Raise `UserError`
    if matplotlib is not installed.
    """
    import_matplotlib()
    from matplotlib.figure import Figure  # not pyplot, which opens windows and keeps global state

    class Plain(Figure):
        def draw(self, renderer: Any) -> None:
            _write_plainly(self)
            super().draw(renderer)

    return Plain(figsize=(width, height), dpi=150, layout="constrained")


def as_image(figure: Figure, dpi: int | None = None) -> Image.Image:
    """Return a figure as an image, at its own resolution or at `dpi`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return Image.open(buffer).convert("RGB")


def _write_plainly(part: Any) -> None:
    """Turn off mathematics in every text inside `part`, except tick labels."""
    from matplotlib.axis import Axis
    from matplotlib.text import Text

    if isinstance(part, Text):
        part.set_parse_math(False)
    for inner in [part.label] if isinstance(part, Axis) else part.get_children():
        _write_plainly(inner)
