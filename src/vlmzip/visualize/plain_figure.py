"""The figure class of every plot. Only `figure.new_figure` imports this module, because matplotlib is an extra."""

from __future__ import annotations

from typing import Any

from matplotlib.artist import Artist
from matplotlib.axis import Axis
from matplotlib.figure import Figure  # not pyplot, which opens windows and keeps global state
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator


class PlainFigure(Figure):
    """A figure that does not read `$` in text as mathematics: method names may contain it.

    Tick labels are excepted: matplotlib writes powers as mathematics.
    """

    def draw(self, renderer: Any) -> None:
        # `Any`: some of matplotlib's renderers, such as that of SVG files, are of no common class.
        _write_plainly(self)
        super().draw(renderer)

    def tick_whole_numbers(self, axis: Axis) -> None:
        """Put the ticks of an axis at whole numbers only."""
        axis.set_major_locator(MaxNLocator(integer=True))


def _write_plainly(part: Artist) -> None:
    """Turn off mathematics in every text inside `part`, except tick labels."""
    if isinstance(part, Text):
        part.set_parse_math(False)
    for inner in [part.label] if isinstance(part, Axis) else part.get_children():
        _write_plainly(inner)
