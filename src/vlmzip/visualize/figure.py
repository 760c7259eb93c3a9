"""The figures of matplotlib that everything here draws on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlmzip.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def import_matplotlib() -> Any:
    """Raises `UserError` where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("figures need matplotlib: pip install 'vlmzip[eval]'") from None
    return matplotlib


def new_figure(width: int | float, height: int | float) -> Figure:
    """An empty figure, in inches, whose texts stand as they are: names with `$` are names, not mathematics.

    Texts at ticks are matplotlib's own, which writes powers as mathematics. Raises `UserError` where matplotlib is not
    installed.
    """
    import_matplotlib()
    from matplotlib.figure import Figure  # without pyplot: no window, no state that lasts

    class Plain(Figure):
        def draw(self, renderer: Any) -> None:
            _write_plainly(self)
            super().draw(renderer)

    return Plain(figsize=(width, height), dpi=150, layout="constrained")


def _write_plainly(part: Any) -> None:
    from matplotlib.axis import Axis
    from matplotlib.text import Text

    if isinstance(part, Text):
        part.set_parse_math(False)
    for inner in [part.label] if isinstance(part, Axis) else part.get_children():
        _write_plainly(inner)
